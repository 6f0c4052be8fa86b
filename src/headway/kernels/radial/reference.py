"""AdamP's and SGDP's step in plain torch, one parameter after another: the truth.

Low-precision parameters are widened to float32 for a step and rounded once at its end. Nothing here asks a tensor for its value,
so that a step on a GPU never waits: whether a tensor is projected is a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NONE, CHANNEL, LAYER = 0, 1, 2


def wide(x: Tensor) -> Tensor:
    """``x`` in the type sums are taken in; a complex tensor as pairs of real numbers."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rows(x: Tensor) -> Tensor:
    """(n, ...) -> (n, width)."""
    return x.reshape(x.shape[0], -1)


def row_sums(p: Tensor, g: Tensor, u: Tensor) -> Tensor:
    """<g,p>, <g,g>, <p,p> and <p,u> of every row: (4, n)."""
    p, g, u = rows(p), rows(g), rows(u)
    return torch.stack([torch.linalg.vecdot(a, b, dim=1) for a, b in ((g, p), (g, g), (p, p), (p, u))])


def decide(sums: Tensor, width: int, numel: int, delta: Any, eps: float) -> tuple[Tensor, Tensor]:
    """From :func:`row_sums` of whole rows, the coefficient of every row (n,) and the kind (NONE, CHANNEL, LAYER), a 0-dim
    tensor. The update of row r becomes u_r - coefficient_r p_r."""
    return choose(likeness(sums, eps).amax(), sums, sums.sum(1), width, numel, delta, eps)


def likeness(sums: Tensor, eps: float) -> Tensor:
    """|cosine| of gradient and weight, from sums (4, ...)."""
    gp, gg, pp, _ = sums.unbind()
    return gp.abs() / (gg.sqrt().clamp(min=eps) * pp.sqrt().clamp(min=eps))


def choose(
    most: Tensor, sums: Tensor, whole: Tensor, width: int, numel: int, delta: Any, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`decide` from the largest likeness of a row, the sums of rows (4, n), and those of the whole tensor (4,)."""
    channel = most < delta / math.sqrt(width)
    layer = ~channel & (likeness(whole[:, None], eps)[0] < delta / math.sqrt(numel))
    by_row = sums[3] / (sums[2].sqrt() + eps).square()
    by_layer = whole[3] / (whole[2].sqrt() + eps).square()
    coefficient = torch.where(channel, by_row, torch.where(layer, by_layer, torch.zeros_like(by_row)))
    return coefficient, CHANNEL * channel + LAYER * layer


def project(p: Tensor, g: Tensor, u: Tensor, delta: Any, eps: float) -> tuple[Tensor, Tensor]:
    """The update without its radial part where ``p`` looks scale invariant, and the kind. All in the same real dtype."""
    if p.dim() < 2 or p.numel() == 0:
        return u, torch.zeros((), dtype=torch.int64, device=p.device)
    coefficient, kind = decide(row_sums(p, g, u), p[0].numel(), p.numel(), delta, eps)
    return u - coefficient.view(-1, *[1] * (p.dim() - 1)) * p, kind


def move(
    p: Tensor, g: Tensor, u: Tensor, step: Any, decay: Any, delta: Any, wd_ratio: Any, eps: float
) -> tuple[Tensor, Tensor]:
    """Projects ``u``, decays the old ``p``, steps. Returns the projected update and the kind."""
    wide_p = wide(p)
    u, kind = project(wide_p, g, u, delta, eps)
    if isinstance(decay, Tensor) or decay > 0:
        wide_p = wide_p * kept(kind > NONE, decay, wd_ratio, wide_p)
    store(p, wide_p - step * u)
    return u, kind


def kept(projected: Tensor, decay: Any, wd_ratio: Any, like: Tensor) -> Tensor:
    """The factor that weight decay leaves: 1 - decay, or 1 - decay * wd_ratio where a tensor is projected."""
    # filled on the device, so that no host memory is copied, and in the type of the weights
    full, part = (torch.ones_like(projected, dtype=like.dtype) * (1 - x) for x in (decay, decay * wd_ratio))
    return torch.where(projected, part, full)


def store(target: Tensor, value: Tensor) -> None:
    """``target`` := ``value``, which may be its widened real form."""
    (torch.view_as_real(target) if target.is_complex() else target).copy_(value)


def adamp_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Any,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
    maximize: bool,
) -> Tensor:
    """One step of AdamP in place; returns the kinds (n,) int8."""
    kinds = []
    for p, g, m, v, k in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        k += 1
        g = -wide(g) if maximize else wide(g)
        store(m, wide(m).mul(beta1).add(g, alpha=1 - beta1))
        store(v, wide(v).mul(beta2).addcmul(g, g, value=1 - beta2))
        count = k.double() if k.device.type != "cpu" or torch.compiler.is_compiling() else float(k)
        root = (1 - beta2**count) ** 0.5
        top = wide(m).mul(beta1).add(g, alpha=1 - beta1) if nesterov else wide(m)
        u = top / (wide(v).sqrt() / root + eps)
        _, kind = move(p, g, u, lr / (1 - beta1**count), lr * weight_decay, delta, wd_ratio, eps)
        kinds.append(kind)
    return torch.stack(kinds).to(torch.int8)


def sgdp_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    lr: Any,
    momentum: float,
    dampening: float,
    eps: float,
    weight_decay: float,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
    maximize: bool,
    official_inplace: bool,
) -> Tensor:
    """One step of SGDP in place; ``buffers`` is empty where the momentum is 0. Returns the kinds (n,) int8."""
    kinds = []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        g = -wide(g) if maximize else wide(g)
        u = (1 - dampening) * g
        if buffers:
            store(buffers[i], wide(buffers[i]).mul(momentum).add(u))
            u = wide(buffers[i])
        if nesterov:
            u = g + momentum * u if buffers else g
        u, kind = move(p, g, u, lr, lr * weight_decay / (1 - momentum), delta, wd_ratio, eps)
        if official_inplace and buffers and not nesterov:
            store(buffers[i], u)
        kinds.append(kind)
    return torch.stack(kinds).to(torch.int8)


def radial_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    updates: Sequence[Tensor],
    steps: Sequence[Any],
    decay: Any,
    delta: float,
    wd_ratio: float,
    eps: float,
    keep: bool,
) -> Tensor:
    """The end of a step whose updates are given: projects, decays, moves; with ``keep`` the projected update is written back.
    Returns the kinds (n,) int8."""
    kinds = []
    for p, g, u, step in zip(params, grads, updates, steps, strict=True):
        projected, kind = move(p, wide(g), wide(u), step, decay, delta, wd_ratio, eps)
        if keep:
            store(u, projected)
        kinds.append(kind)
    return torch.stack(kinds).to(torch.int8)
