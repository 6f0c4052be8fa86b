"""One direction of one layer-normalised LSTM, GRU or plain recurrent layer as one operator, forward and backward.

All input products are one matrix product over T*B rows. The time loop (recurrent product, both normalisations, gates, cell) is
C++; its body keeps the recurrent product Z, the states and (mean, rstd) of every row, and the backward computes the input
product and the gates again, so that 6 H numbers a step and sample are saved instead of about 15 H. The weight gradients are
one product over T*B rows after the loop. :mod:`.reference` is the truth it is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.library import define, load, needs_grad
from headway.kernels.products import linear, outer
from headway.kernels.recurrent import reference
from headway.kernels.recurrent.reference import GATES, LSTM

_SETTINGS = "int kind, int gate_norm, int cell_norm, float eps, bool reverse, bool relu"
_INPUTS = (
    "Tensor x, Tensor h0, Tensor c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias, Tensor gains, Tensor cell, "
    "Tensor? lengths"
)
_SAVED = "Tensor h, Tensor c, Tensor z, Tensor stats_in, Tensor stats_rec, Tensor stats_cell, Tensor raw"

_NATIVE = load("recurrent")


def available(x: Tensor) -> bool:
    """Whether the C++ time loop runs for this tensor; otherwise the plain step by step version does."""
    return _NATIVE and x.device.type == "cpu"


def _no_plain_scan(*_):
    raise NotImplementedError(
        "the recurrent time loop is C++ for the CPU; call headway.kernels.recurrent.recurrent_layer"
    )


def _scan_fake(p, h0, c0, weight, gains, cell, lengths, kind, gate_norm, cell_norm, eps, reverse, relu, low, keep):
    steps, batch = p.shape[0], p.shape[1]
    hidden, cells = h0.shape[1], steps if kind == LSTM else 0
    count = 2 * len(reference.segments(kind, gate_norm, hidden))
    return (
        p.new_empty((steps, batch, hidden)),
        p.new_empty((cells, batch, hidden)),
        p.new_empty((batch if kind == LSTM else 0, hidden)),
        p.new_empty((steps if keep else 1, batch, GATES[kind] * hidden)),
        p.new_empty((steps, batch, count)),
        p.new_empty((steps, batch, count)),
        p.new_empty((cells, batch, 2)),
        p.new_empty((steps if kind == LSTM and cell_norm == 2 else 0, batch, hidden)),
    )


def _scan_backward_fake(gh, gc, p, h0, c0, weight, gains, cell, *_):
    return (
        torch.empty_like(p),
        torch.empty_like(h0),
        torch.empty_like(h0),
        torch.empty_like(gains),
        torch.empty_like(cell),
    )


_scan = define(
    f"recurrent_scan(Tensor p, Tensor h0, Tensor c0, Tensor weight, Tensor gains, Tensor cell, Tensor? lengths, {_SETTINGS}, "
    "bool low, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _no_plain_scan,
    fake=_scan_fake,
    native="recurrent",
)
_scan_backward = define(
    "recurrent_scan_backward(Tensor gh, Tensor gc, Tensor(a!) p, Tensor h0, Tensor c0, Tensor weight, Tensor gains, "
    f"Tensor cell, Tensor? lengths, {_SAVED}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _no_plain_scan,
    fake=_scan_backward_fake,
    native="recurrent",
)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    """P = x weight^T + bias for all steps at once, (T, B, gates * hidden) in the arithmetic type."""
    # half-precision operands, but sums and result in the arithmetic type: a norm enlarges what rounding P would lose
    p = linear(x.flatten(0, 1).to(wide), weight.to(wide), bias)
    return p.view(*x.shape[:2], weight.shape[0])


def _forward(
    x, h0, c0, weight_ih, weight_hh, bias, gains, cell, lengths, kind, gate_norm, cell_norm, eps, reverse, relu, keep
):
    p = _product(x, weight_ih, bias, h0.dtype)
    return _scan(
        p,
        h0.contiguous(),
        c0.contiguous(),
        weight_hh.to(h0.dtype).contiguous(),
        gains.contiguous(),
        cell.contiguous(),
        lengths,
        kind,
        gate_norm,
        cell_norm,
        eps,
        reverse,
        relu,
        x.dtype == torch.bfloat16,
        keep,
    )


def _forward_fake(
    x, h0, c0, weight_ih, weight_hh, bias, gains, cell, lengths, kind, gate_norm, cell_norm, eps, reverse, relu, keep
):
    p = h0.new_empty((x.shape[0], x.shape[1], weight_ih.shape[0]))
    return _scan_fake(
        p, h0, c0, weight_hh, gains, cell, lengths, kind, gate_norm, cell_norm, eps, reverse, relu, False, keep
    )


def _backward_body(
    gh,
    gc,
    x,
    h0,
    c0,
    weight_ih,
    weight_hh,
    bias,
    gains,
    cell,
    lengths,
    h,
    c,
    z,
    stats_in,
    stats_rec,
    stats_cell,
    raw,
    kind,
    gate_norm,
    cell_norm,
    eps,
    reverse,
    relu,
    want_x,
):
    h0, c0, low = h0.contiguous(), c0.contiguous(), x.dtype
    p = _product(x, weight_ih, bias, h0.dtype)
    dz, dh0, dc0, dgains, dcell = _scan_backward(
        gh.contiguous(),
        gc.contiguous(),
        p,
        h0,
        c0,
        weight_hh.to(h0.dtype).contiguous(),
        gains.contiguous(),
        cell.contiguous(),
        lengths,
        h,
        c,
        z,
        stats_in,
        stats_rec,
        stats_cell,
        raw,
        kind,
        gate_norm,
        cell_norm,
        eps,
        reverse,
        relu,
    )
    flat = p.flatten(0, 1)
    dbias = h0.new_empty(0) if bias is None else flat.sum(0)
    flat = flat.to(low)
    dx = linear(flat, weight_ih.t()).view_as(x) if want_x else x.new_empty(0)
    dweight_ih = outer(flat, x.flatten(0, 1))
    later, earlier, first = (dz[:-1], h[1:], dz[-1]) if reverse else (dz[1:], h[:-1], dz[0])
    dweight_hh = outer(first.to(low), h0.to(low))
    if x.shape[0] > 1:
        dweight_hh += outer(later.flatten(0, 1).to(low), earlier.flatten(0, 1).to(low))
    return dx, dh0, dc0, dweight_ih, dweight_hh, dbias, dgains, dcell


def _backward_fake(gh, gc, x, h0, c0, weight_ih, weight_hh, bias, gains, cell, *rest):
    dbias = h0.new_empty(0 if bias is None else weight_ih.shape[0])
    like = torch.empty_like
    dx = x.new_empty(x.shape if rest[-1] else 0)
    weights = torch.empty_like(weight_ih, memory_format=torch.contiguous_format), weight_hh.new_empty(weight_hh.shape)
    return dx, h0.new_empty(h0.shape), h0.new_empty(h0.shape), *weights, dbias, like(gains), like(cell)


_backward_op = define(
    f"recurrent_layer_backward(Tensor gh, Tensor gc, {_INPUTS}, {_SAVED}, {_SETTINGS}, bool want_x) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_body,
    fake=_backward_fake,
)


def _setup_context(ctx, inputs, output):
    *tensors, kind, gate_norm, cell_norm, eps, reverse, relu, _ = inputs
    h, c, _last, *rest = output
    ctx.save_for_backward(*tensors, h, c, *rest)
    ctx.settings = kind, gate_norm, cell_norm, eps, reverse, relu
    ctx.mark_non_differentiable(c, *rest)
    ctx.set_materialize_grads(False)


def _backward(ctx, gh, _c, gc, *_):
    saved = ctx.saved_tensors
    h0, bias, h = saved[1], saved[5], saved[9]
    gh = torch.zeros_like(h) if gh is None else gh
    gc = h0.new_empty(0) if gc is None else gc
    grads = _backward_op(gh, gc, *saved, *ctx.settings, ctx.needs_input_grad[0])
    dx, dh0, dc0, dweight_ih, dweight_hh, dbias, dgains, dcell = grads
    return (
        dx if ctx.needs_input_grad[0] else None,
        dh0,
        dc0 if ctx.settings[0] == LSTM else None,
        dweight_ih,
        dweight_hh,
        None if bias is None else dbias,
        dgains,
        dcell,
        *[None] * 8,
    )


_layer = define(
    f"recurrent_layer({_INPUTS}, {_SETTINGS}, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def recurrent_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    gains: Tensor,
    cell: Tensor,
    lengths: Tensor | None = None,
    *,
    kind: int,
    gate_norm: int,
    cell_norm: int,
    eps: float = 1e-5,
    reverse: bool = False,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """One direction of one layer over a whole sequence.

    Args:
        x: (T, B, input) in the type of the weights: float32, float64, bfloat16 or float16.
        h0, c0: (B, hidden), float32 (float64 for float64 x); c0 is used by the LSTM alone.
        weight_ih, weight_hh: (gates * hidden, input) and (gates * hidden, hidden).
        bias: (gates * hidden,), added to the input product before its norm, or None.
        gains: (4, gates * hidden): gain and offset of the input norm, gain and offset of the recurrent norm;
            without a norm the gains are not used.
        cell: (2, hidden): gain and offset of the cell norm.
        lengths: (B,) int64; later steps carry the state over.
        kind, gate_norm, cell_norm: the constants of :mod:`.reference`.

    Returns:
        h of every step (T, B, hidden) and the last c (B, hidden; empty but for the LSTM), in the type of h0.
    """
    settings = (kind, gate_norm, cell_norm, eps, reverse, relu)
    tensors = (x, h0, c0, weight_ih, weight_hh, bias, gains, cell, lengths)
    if torch.is_autocast_enabled(x.device.type):
        # the operands have their types already; the products inside keep float32 sums
        with torch.autocast(x.device.type, enabled=False):
            return _run(tensors, settings)
    return _run(tensors, settings)


def _run(tensors: tuple[Tensor | None, ...], settings: tuple) -> tuple[Tensor, Tensor]:
    if not available(tensors[0]):  # type: ignore[arg-type]
        h, c = reference.layer(*tensors, *settings)  # type: ignore[arg-type]
        return h, c if settings[0] == LSTM else c[:0]
    out = _layer(*tensors, *settings, needs_grad(*tensors))
    return out[0], out[2]
