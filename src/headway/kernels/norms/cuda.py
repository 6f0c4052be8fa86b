"""Triton bodies of the norm operators for CUDA: float32, bfloat16 and float16, accumulated in float32, rows of any length.

One program takes one row forward, in blocks of columns: mean, spread around it, result. Backward, one program takes every
``programs``-th row and keeps its own share of the sums for weight and bias in a line of a small matrix, which is added up
afterwards; so the result does not depend on the order in which programs run. float64 and the rest goes to the plain bodies.
Under ``TRITON_INTERPRET=1`` the same code runs on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.norms import reference
from headway.kernels.norms.reference import COMPRESSED, LAYER, RMS

_LARGEST = 8192  # columns a program holds at once
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _forward(
    X, R, W, B, Y, H, STATS, n, eps, offset,
    rms: tl.constexpr, adds: tl.constexpr, has_weight: tl.constexpr, has_bias: tl.constexpr, keep: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    start = row * n
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, n, BLOCK):
        c = first + columns
        inside = c < n
        a = tl.load(X + start + c, mask=inside, other=0.0)
        if adds:
            # the sum is rounded as it is kept, so that forward and backward see the same numbers
            a = (a.to(tl.float32) + tl.load(R + start + c, mask=inside, other=0.0).to(tl.float32)).to(a.dtype)
            tl.store(H + start + c, a, mask=inside)
        total += a.to(tl.float32)
    if adds:
        tl.debug_barrier()  # what other threads of this program wrote to H is read next
    mean = 0.0
    if not rms:
        mean = tl.sum(total, axis=0) / n
    spread = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, n, BLOCK):
        c = first + columns
        inside = c < n
        a = tl.load(H + start + c, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(inside, a - mean, 0.0)
        spread += d * d
    rstd = 1.0 / tl.sqrt(tl.sum(spread, axis=0) / n + eps)
    if keep:
        tl.store(STATS + 2 * row, mean)
        tl.store(STATS + 2 * row + 1, rstd)
    for first in range(0, n, BLOCK):
        c = first + columns
        inside = c < n
        z = (tl.load(H + start + c, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        if has_weight:
            z = z * (tl.load(W + c, mask=inside, other=0.0).to(tl.float32) + offset)
        if has_bias:
            z += tl.load(B + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(Y + start + c, z.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    GY, GH, X, W, STATS, GX, GW, GB, rows, n, offset,
    rms: tl.constexpr, adds: tl.constexpr, has_weight: tl.constexpr, want_weight: tl.constexpr, want_bias: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    for row in range(program, rows, programs):
        start = row * n
        mean = tl.load(STATS + 2 * row)
        rstd = tl.load(STATS + 2 * row + 1)
        p = tl.zeros([BLOCK], dtype=tl.float32)
        q = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, n, BLOCK):
            c = first + columns
            inside = c < n
            g = tl.load(GY + start + c, mask=inside, other=0.0).to(tl.float32)
            a = tl.load(X + start + c, mask=inside, other=0.0).to(tl.float32)
            z = tl.where(inside, (a - mean) * rstd, 0.0)
            # these lines belong to this program alone
            if want_weight:
                tl.store(
                    GW + program * n + c, tl.load(GW + program * n + c, mask=inside, other=0.0) + g * z, mask=inside
                )
            if want_bias:
                tl.store(GB + program * n + c, tl.load(GB + program * n + c, mask=inside, other=0.0) + g, mask=inside)
            if has_weight:
                g = g * (tl.load(W + c, mask=inside, other=0.0).to(tl.float32) + offset)
            p += g
            q += g * z
        tl.debug_barrier()  # the next row reads the sums again
        centre = 0.0
        if not rms:
            centre = tl.sum(p, axis=0) / n
        slope = tl.sum(q, axis=0) / n
        for first in range(0, n, BLOCK):
            c = first + columns
            inside = c < n
            g = tl.load(GY + start + c, mask=inside, other=0.0).to(tl.float32)
            a = tl.load(X + start + c, mask=inside, other=0.0).to(tl.float32)
            if has_weight:
                g = g * (tl.load(W + c, mask=inside, other=0.0).to(tl.float32) + offset)
            gx = rstd * (g - centre - (a - mean) * rstd * slope)
            if adds:
                gx += tl.load(GH + start + c, mask=inside, other=0.0).to(tl.float32)
            tl.store(GX + start + c, gx.to(GX.dtype.element_ty), mask=inside)


def _block(n: int) -> tuple[int, int]:
    """Columns a program holds at once, and the warps that share them."""
    block = min(_LARGEST, triton.next_power_of_2(max(n, 1)))
    return block, min(16, max(1, block // 256))


def _run(x: Tensor, residual: Tensor | None, weight, bias, n: int, eps: float, rms: bool, offset: float, keep: bool):
    x = x.contiguous()
    rows = x.numel() // n if n else 0
    y, stats = torch.empty_like(x), x.new_empty((rows if keep else 0, 2), dtype=torch.float32)
    adds = residual is not None
    h = torch.empty_like(x) if adds else x
    if rows and n:
        block, warps = _block(n)
        beside = residual.contiguous() if residual is not None else x
        w, b = (None if p is None else p.contiguous() for p in (weight, bias))
        _forward[(rows,)](
            x, beside, x if w is None else w, x if b is None else b, y, h, stats, n, eps, offset,
            rms, adds, w is not None, b is not None, keep, block, num_warps=warps,  # type: ignore[call-arg]
        )  # fmt: skip
    return y, h, stats


def _ours(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype in _TYPES for t in tensors)


def norm(x, weight, bias, n, eps, kind, offset):
    """Body of ``headway::norm``."""
    if kind == COMPRESSED or not _ours(x, weight, bias):
        return reference.rows(x.contiguous(), weight, bias, n, eps, kind, offset)[0]
    return _run(x, None, weight, bias, n, eps, kind == RMS, offset, False)[0]


def layer_norm(x, weight, bias, n, eps):
    """Body of ``headway::layer_norm``."""
    if not _ours(x, weight, bias):
        return reference.rows(x.contiguous(), weight, bias, n, eps, LAYER)
    y, _, stats = _run(x, None, weight, bias, n, eps, False, 0.0, True)
    return y, stats


def rms_norm(x, weight, bias, n, eps, offset):
    """Body of ``headway::rms_norm``."""
    if not _ours(x, weight, bias):
        return reference.rows(x.contiguous(), weight, bias, n, eps, RMS, offset)
    y, _, stats = _run(x, None, weight, bias, n, eps, True, offset, True)
    return y, stats


def add_norm(x, residual, weight, bias, n, eps, rms, offset, keep):
    """Body of ``headway::add_norm``."""
    if not _ours(x, residual, weight, bias):
        h = (x + residual).contiguous()
        y, stats = reference.rows(h, weight, bias, n, eps, RMS if rms else LAYER, offset)
        return y, h, stats if keep else stats[:0].clone()
    return _run(x, residual, weight, bias, n, eps, rms, offset, keep)


def _programs(x: Tensor, rows: int) -> int:
    """How many programs share the rows: four a multiprocessor, so that the matrix of their sums stays small."""
    if x.device.type != "cuda":
        return min(rows, 4)
    return min(rows, 4 * torch.cuda.get_device_properties(x.device).multi_processor_count)


def norm_backward(gy, gh, x, stats, weight, n, kind, offset, want_weight, want_bias):
    """Body of ``headway::norm_backward``."""
    rows = x.numel() // n if n else 0
    if kind == COMPRESSED or not _ours(gy, gh, x, weight) or not rows:
        gx, gw, gb = reference.rows_backward(gy.contiguous(), x.contiguous(), stats, weight, n, kind, offset)
        gx = gx if gh is None else gx + gh
        return gx, gw if want_weight else gw[:0].clone(), gb if want_bias else gb[:0].clone()
    gy, x = gy.contiguous(), x.contiguous()
    gx = torch.empty_like(x)
    block, warps = _block(n)
    programs = _programs(x, rows)
    gw, gb = (x.new_zeros((programs if wanted else 0, n), dtype=torch.float32) for wanted in (want_weight, want_bias))
    beside = x if gh is None else gh.contiguous()
    _backward[(programs,)](
        gy, beside, x, x if weight is None else weight.contiguous(), stats, gx, gw, gb, rows, n, offset,
        kind == RMS, gh is not None, weight is not None, want_weight, want_bias, block, num_warps=warps,  # type: ignore[call-arg]
    )  # fmt: skip
    empty = x.new_empty(0, dtype=torch.float32)
    return gx, gw.sum(0) if want_weight else empty, gb.sum(0) if want_bias else empty.clone()
