"""Backward operators of the norms, and the rules by which autograd calls them.

A context holds what :func:`keep` put there; a rule returns the gradients of the tensor inputs in the operator's order. Where a
second derivative is wanted, a rule differentiates the plain equations instead, statistics included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.kernels.library import define, load, needs_grad
from headway.kernels.norms import reference
from headway.kernels.norms.lazy import on_cuda
from headway.kernels.norms.reference import COMPRESSED, LAYER, RMS

load("norms_backward")
load("channel_norm")


def packed(x: Tensor) -> Tensor:
    """An empty contiguous tensor like ``x``."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _sums(x: Tensor, n: Any, *wanted: bool) -> list[Tensor]:
    return [x.new_empty(n if each else 0, dtype=reference.wide(x.dtype)) for each in wanted]


def _wanted(sums: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> list[Tensor]:
    return [each if use else each[:0].clone() for each, use in zip(sums, wanted, strict=True)]


def _norm_plain(gy, gh, x, stats, weight, n, kind, offset, want_weight, want_bias):
    gx, *sums = reference.rows_backward(gy.contiguous(), x.contiguous(), stats, weight, n, kind, offset)
    return gx if gh is None else gx + gh, *_wanted(tuple(sums), (want_weight, want_bias))


def _norm_add_norm_plain(gs, gu, f, x_new, stats, output_weight, input_weight, n, rms, offset, *wanted):
    kind = RMS if rms else LAYER
    gx, giw, gib = reference.rows_backward(gu, x_new.contiguous(), stats[:, 2:], input_weight, n, kind, offset)
    gx = gx + gs
    gf, gow, gob = reference.rows_backward(gx, f.contiguous(), stats[:, :2], output_weight, n, kind, offset)
    return gf, gx, *_wanted((gow, gob, giw, gib), wanted)


def _channel_plain(gy, x, stats, weight, rms, want_weight, want_bias):
    gx, *sums = reference.channels_backward(gy, x, stats, weight, rms)
    return gx, *_wanted(tuple(sums), (want_weight, want_bias))


norm_backward = define(
    "norm_backward(Tensor gy, Tensor? gh, Tensor x, Tensor stats, Tensor? weight, SymInt n, int kind, float offset, "
    "bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)",
    _norm_plain,
    lambda gy, gh, x, stats, weight, n, kind, offset, ww, wb: (packed(x), *_sums(x, n, ww, wb)),
    cuda=on_cuda("norm_backward", _norm_plain),
)
norm_add_norm_backward = define(
    "norm_add_norm_backward(Tensor gs, Tensor gu, Tensor f, Tensor x_new, Tensor stats, Tensor? output_weight, "
    "Tensor? input_weight, SymInt n, bool rms, float offset, bool want_output_weight, bool want_output_bias, "
    "bool want_input_weight, bool want_input_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _norm_add_norm_plain,
    lambda gs, gu, f, x_new, stats, ow, iw, n, rms, offset, *wanted: (packed(f), packed(f), *_sums(f, n, *wanted)),
)
channel_norm_backward = define(
    "channel_norm_backward(Tensor gy, Tensor x, Tensor stats, Tensor? weight, bool rms, bool want_weight, bool want_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _channel_plain,
    lambda gy, x, stats, weight, rms, ww, wb: (packed(x), *_sums(x, x.shape[1], ww, wb)),
)


def keep(ctx, tensors: tuple[Tensor | None, ...], biases: tuple[Tensor | None, ...], *settings) -> None:
    """Saves ``tensors`` for the rule; of a bias, only the type is needed."""
    ctx.save_for_backward(*tensors)
    ctx.bias_types = [None if bias is None else bias.dtype for bias in biases]
    ctx.settings = settings


def _cast(grad: Tensor, dtype: torch.dtype | None, wanted: bool) -> Tensor | None:
    if not wanted or dtype is None:
        return None
    return grad if grad.dtype is dtype else grad.to(dtype)


def _type(parameter: Tensor | None) -> torch.dtype | None:
    return None if parameter is None else parameter.dtype


def norm_rule(ctx, gy: Tensor | None, gh: Tensor | None = None, inputs: int = 1):
    """Gradients of (x, weight, bias), or with ``inputs=2`` of (x, residual, weight, bias)."""
    x, weight, stats = ctx.saved_tensors
    n, eps, kind, offset = ctx.settings
    if gy is None:
        gy = torch.zeros_like(x)
    needed = ctx.needs_input_grad
    need_weight, need_bias = needed[inputs], needed[inputs + 1]
    if torch.is_grad_enabled() and needs_grad(gy, gh, x, weight):
        fresh = torch.cat(reference.statistics(reference.matrix(x, n), eps, kind), 1)
        gx, gw, gb = reference.rows_backward(gy, x, fresh, weight, n, kind, offset)
        gx = gx if gh is None else gx + gh
    else:
        gx, gw, gb = norm_backward(gy, gh, x, stats, weight, n, kind, offset, need_weight, need_bias)
    gradients = _cast(gw, _type(weight), need_weight), _cast(gb, ctx.bias_types[0], need_bias)
    if inputs == 1:
        return gx if needed[0] else None, *gradients
    return gx if needed[0] else None, gx if needed[1] else None, *gradients


def crms_rule(ctx, gy: Tensor) -> Tensor | None:
    """Gradient of z."""
    z, stats = ctx.saved_tensors
    n, eps = ctx.settings
    if not ctx.needs_input_grad[0]:
        return None
    if torch.is_grad_enabled() and needs_grad(gy, z):
        fresh = torch.cat(reference.statistics(reference.matrix(z, n), eps, COMPRESSED), 1)
        return reference.rows_backward(gy, z, fresh, None, n, COMPRESSED)[0]
    return norm_backward(gy, None, z, stats, None, n, COMPRESSED, 0.0, False, False)[0]


def norm_add_norm_rule(ctx, gs: Tensor, gu: Tensor):
    """Gradients of (f, x, output_weight, output_bias, input_weight, input_bias)."""
    f, x_new, output_weight, input_weight, stats = ctx.saved_tensors
    n, eps, rms, offset = ctx.settings
    need_f, need_x, *wanted = ctx.needs_input_grad[:6]
    if torch.is_grad_enabled() and needs_grad(gs, gu, f, x_new, output_weight, input_weight):
        kind = RMS if rms else LAYER
        parts = [t for a in (f, x_new) for t in reference.statistics(reference.matrix(a, n), eps, kind)]
        fresh = torch.cat(parts, 1)
        gf, gx, *sums = _norm_add_norm_plain(
            gs, gu, f, x_new, fresh, output_weight, input_weight, n, rms, offset, *wanted
        )
    else:
        gf, gx, *sums = norm_add_norm_backward(
            gs, gu, f, x_new, stats, output_weight, input_weight, n, rms, offset, *wanted
        )
    types = _type(output_weight), ctx.bias_types[0], _type(input_weight), ctx.bias_types[1]
    gradients = [_cast(g, dtype, want) for g, dtype, want in zip(sums, types, wanted, strict=True)]
    return gf if need_f else None, gx if need_x else None, *gradients


def channel_rule(ctx, gy: Tensor):
    """Gradients of (x, weight, bias)."""
    x, weight, stats = ctx.saved_tensors
    eps, rms = ctx.settings
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled() and needs_grad(gy, x, weight):
        rows = x.transpose(1, 2).reshape(-1, x.shape[1])
        fresh = torch.cat(reference.statistics(rows.to(reference.wide(x.dtype)), eps, RMS if rms else LAYER), 1)
        gx, gw, gb = reference.channels_backward(gy, x, fresh, weight, rms)
    else:
        gx, gw, gb = channel_norm_backward(gy, x, stats, weight, rms, need_weight, need_bias)
    gradients = _cast(gw, _type(weight), need_weight), _cast(gb, ctx.bias_types[0], need_bias)
    return gx if need_x else None, *gradients
