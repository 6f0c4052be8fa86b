"""Layer norm, RMS norm, residual add fused with either, and either over the channels of a feature map.

Layer normalisation: Ba, Kiros, Hinton, 2016 (arXiv 1607.06450). RMS normalisation: Zhang, Sennrich, 2019 (arXiv 1910.07467).
The C++ body reads a row once from memory and normalises it from the nearest cache; :mod:`.reference` is the truth it is
tested against. Under ``torch.compile`` the plain version is used, because the compiler fuses it with its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headway.kernels.library import below_autograd, define, load, needs_grad
from headway.kernels.norms import reference

load("norms")


def _norm_plain(x, weight, bias, n, eps, rms, offset, keep):
    y, stats = reference.rows(x.contiguous(), weight, bias, n, eps, rms, offset)
    return y, stats if keep else stats[:0].clone()


def _norm_out_plain(x, weight, bias, n, eps, rms, offset, out):
    out.copy_(reference.rows(x, weight, bias, n, eps, rms, offset)[0])


def _backward_plain(gy, x, stats, weight, n, rms, offset, want_weight, want_bias):
    gx, gw, gb = reference.rows_backward(gy.contiguous(), x.contiguous(), stats, weight, n, rms, offset)
    return gx, gw if want_weight else gw[:0].clone(), gb if want_bias else gb[:0].clone()


def _add_norm_plain(x, residual, weight, bias, n, eps, rms, offset, keep):
    h = (x + residual).contiguous()
    y, stats = _norm_plain(h, weight, bias, n, eps, rms, offset, keep)
    return y, h, stats


def _add_backward_plain(gy, gh, h, stats, weight, n, rms, offset, want_weight, want_bias):
    gx, gw, gb = _backward_plain(gy, h, stats, weight, n, rms, offset, want_weight, want_bias)
    return gx + gh, gw, gb


def _channel_plain(x, weight, bias, eps, rms, keep):
    y, stats = reference.channels(x, weight, bias, eps, rms)
    return y, stats if keep else stats[:0].clone()


def _channel_backward_plain(gy, x, stats, weight, rms, want_weight, want_bias):
    gx, gw, gb = reference.channels_backward(gy, x, stats, weight, rms)
    return gx, gw if want_weight else gw[:0].clone(), gb if want_bias else gb[:0].clone()


def _packed(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _stats(x: Tensor, rows: Any) -> Tensor:
    return x.new_empty((rows, 2), dtype=reference.wide(x.dtype))


def _norm_fake(x, weight, bias, n, eps, rms, offset, keep):
    return _packed(x), _stats(x, x.numel() // n if keep and n else 0)


def _add_norm_fake(x, residual, weight, bias, n, eps, rms, offset, keep):
    return _packed(x), _packed(x), _stats(x, x.numel() // n if keep and n else 0)


def _channel_fake(x, weight, bias, eps, rms, keep):
    return _packed(x), _stats(x, x.shape[0] * x.shape[2] if keep else 0)


def _sums(x: Tensor, n: Any, want_weight: bool, want_bias: bool) -> tuple[Tensor, Tensor]:
    wide = reference.wide(x.dtype)
    return x.new_empty(n if want_weight else 0, dtype=wide), x.new_empty(n if want_bias else 0, dtype=wide)


_norm_backward_op = define(
    "norm_backward(Tensor gy, Tensor x, Tensor stats, Tensor? weight, SymInt n, bool rms, float offset, bool want_weight, "
    "bool want_bias) -> (Tensor, Tensor, Tensor)",
    _backward_plain,
    lambda gy, x, stats, weight, n, rms, offset, ww, wb: (_packed(x), *_sums(x, n, ww, wb)),
)
_add_backward_op = define(
    "add_norm_backward(Tensor gy, Tensor gh, Tensor h, Tensor stats, Tensor? weight, SymInt n, bool rms, float offset, "
    "bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)",
    _add_backward_plain,
    lambda gy, gh, h, stats, weight, n, rms, offset, ww, wb: (_packed(h), *_sums(h, n, ww, wb)),
)
_channel_backward_op = define(
    "channel_norm_backward(Tensor gy, Tensor x, Tensor stats, Tensor? weight, bool rms, bool want_weight, bool want_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _channel_backward_plain,
    lambda gy, x, stats, weight, rms, ww, wb: (_packed(x), *_sums(x, x.shape[1], ww, wb)),
)


def _cast(grad: Tensor, parameter: Tensor | None, wanted: bool) -> Tensor | None:
    return grad.to(parameter.dtype).view(parameter.shape) if wanted and parameter is not None else None


def _save(ctx, x, weight, bias, stats, n, eps, rms, offset):
    ctx.save_for_backward(x, weight, bias, stats)
    ctx.settings = n, eps, rms, offset


def _norm_grads(ctx, gy: Tensor):
    x, weight, bias, stats = ctx.saved_tensors
    n, eps, rms, offset = ctx.settings
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled() and needs_grad(gy, x, weight):
        # a second derivative is wanted: differentiate the plain equations, statistics included
        fresh = reference.rows(x, None, None, n, eps, rms, 0.0)[1]
        gx, gw, gb = reference.rows_backward(gy, x, fresh, weight, n, rms, offset)
    else:
        with below_autograd():
            gx, gw, gb = _norm_backward_op(gy, x, stats, weight, n, rms, offset, need_weight, need_bias)
    return gx if need_x else None, _cast(gw, weight, need_weight), _cast(gb, bias, need_bias)


def _add_norm_grads(ctx, gy: Tensor, gh: Tensor):
    h, weight, bias, stats = ctx.saved_tensors
    n, eps, rms, offset = ctx.settings
    need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled() and needs_grad(gy, gh, h, weight):
        fresh = reference.rows(h, None, None, n, eps, rms, 0.0)[1]
        gx, gw, gb = reference.rows_backward(gy, h, fresh, weight, n, rms, offset)
        gx = gx + gh
    else:
        with below_autograd():
            gx, gw, gb = _add_backward_op(gy, gh, h, stats, weight, n, rms, offset, need_weight, need_bias)
    grads = _cast(gw, weight, need_weight), _cast(gb, bias, need_bias)
    return gx if need_x else None, gx if need_residual else None, *grads


def _channel_grads(ctx, gy: Tensor):
    x, weight, bias, stats = ctx.saved_tensors
    eps, rms = ctx.settings
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled() and needs_grad(gy, x, weight):
        rows = x.transpose(1, 2).reshape(-1, x.shape[1])
        fresh = reference.rows(rows, None, None, x.shape[1], eps, rms, 0.0)[1]
        gx, gw, gb = reference.channels_backward(gy, x, fresh, weight, rms)
    else:
        with below_autograd():
            gx, gw, gb = _channel_backward_op(gy, x, stats, weight, rms, need_weight, need_bias)
    return gx if need_x else None, _cast(gw, weight, need_weight), _cast(gb, bias, need_bias)


def _norm_setup(ctx, inputs, output):
    x, weight, bias, n, eps, rms, offset, _ = inputs
    ctx.mark_non_differentiable(output[1])
    _save(ctx, x, weight, bias, output[1], n, eps, rms, offset)


def _add_norm_setup(ctx, inputs, output):
    _, _, weight, bias, n, eps, rms, offset, _ = inputs
    ctx.mark_non_differentiable(output[2])
    _save(ctx, output[1], weight, bias, output[2], n, eps, rms, offset)


def _channel_setup(ctx, inputs, output):
    x, weight, bias, eps, rms, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.settings = eps, rms


_norm_op = define(
    "norm(Tensor x, Tensor? weight, Tensor? bias, SymInt n, float eps, bool rms, float offset, bool keep) -> (Tensor, Tensor)",
    _norm_plain,
    _norm_fake,
    _norm_setup,
    lambda ctx, gy, _: (*_norm_grads(ctx, gy), None, None, None, None, None),
)
_norm_out_op = define(
    "norm_out(Tensor x, Tensor? weight, Tensor? bias, SymInt n, float eps, bool rms, float offset, Tensor(a!) out) -> ()",
    _norm_out_plain,
    lambda *_: None,
)
_add_norm_op = define(
    "add_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, SymInt n, float eps, bool rms, float offset, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    _add_norm_plain,
    _add_norm_fake,
    _add_norm_setup,
    lambda ctx, gy, gh, _: (*_add_norm_grads(ctx, gy, gh), None, None, None, None, None),
)
_channel_norm_op = define(
    "channel_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool rms, bool keep) -> (Tensor, Tensor)",
    _channel_plain,
    _channel_fake,
    _channel_setup,
    lambda ctx, gy, _: (*_channel_grads(ctx, gy), None, None, None),
)


class _Norm(torch.autograd.Function):
    """The slim way through autograd: one node, no dispatcher round trip."""

    @staticmethod
    def forward(ctx, x, weight, bias, n, eps, rms, offset):
        with below_autograd():
            y, stats = _norm_op(x, weight, bias, n, eps, rms, offset, True)
        _save(ctx, x, weight, bias, stats, n, eps, rms, offset)
        return y

    @staticmethod
    def backward(ctx, gy):
        return *_norm_grads(ctx, gy), None, None, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, n, eps, rms, offset):
        with below_autograd():
            y, h, stats = _add_norm_op(x, residual, weight, bias, n, eps, rms, offset, True)
        _save(ctx, h, weight, bias, stats, n, eps, rms, offset)
        return y, h

    @staticmethod
    def backward(ctx, gy, gh):
        return *_add_norm_grads(ctx, gy, gh), None, None, None, None


class _ChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, rms):
        with below_autograd():
            y, stats = _channel_norm_op(x, weight, bias, eps, rms, True)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.settings = eps, rms
        return y

    @staticmethod
    def backward(ctx, gy):
        return *_channel_grads(ctx, gy), None, None


def _count(x: Tensor, shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None) -> int:
    """The numbers in one row; ValueError where ``x`` does not end in ``shape`` or a parameter has another shape."""
    wanted = (shape,) if isinstance(shape, int) else tuple(shape)
    # the usual call, checked with as few Python steps as there are: on small tensors they cost more than the norm
    if (
        len(wanted) == 1
        and x.dim()
        and x.size(-1) == wanted[0]
        and (weight is None or weight.shape == wanted)
        and (bias is None or bias.shape == wanted)
    ):
        return wanted[0]
    if not wanted or tuple(x.shape[-len(wanted) :]) != wanted:
        raise ValueError(f"the input must end in the normalised shape {wanted}; its shape is {tuple(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and tuple(parameter.shape) != wanted:
            raise ValueError(f"{name} must have the normalised shape {wanted}; its shape is {tuple(parameter.shape)}")
    if len(wanted) == 1:
        return wanted[0]
    n = 1
    for size in wanted:
        n *= size
    return n


def _apply(x, weight, bias, n, eps, rms, offset, out):
    if torch.compiler.is_compiling():
        y = reference.rows(x, _flat(weight), _flat(bias), n, eps, rms, offset)[0]
        return y if out is None else out.copy_(y)
    if out is not None:
        if needs_grad(x, weight, bias):
            raise ValueError("out= takes no gradients; call inside torch.no_grad() or leave it out")
        if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous, {tuple(x.shape)} and {x.dtype}; it is {tuple(out.shape)} and {out.dtype}"
            )
        with below_autograd():
            _norm_out_op(x.contiguous(), _flat(weight), _flat(bias), n, eps, rms, offset, out)
        return out
    if (weight is not None and weight.dim() != 1) or (bias is not None and bias.dim() != 1):
        weight, bias = _flat(weight), _flat(bias)
    if needs_grad(x, weight, bias):
        return _Norm.apply(x, weight, bias, n, eps, rms, offset)
    with below_autograd():
        return _norm_op(x, weight, bias, n, eps, rms, offset, False)[0]


def _flat(parameter: Tensor | None) -> Tensor | None:
    return parameter if parameter is None or parameter.dim() == 1 else parameter.reshape(-1)


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``weight * (a - mean(a)) / sqrt(var(a) + eps) + bias`` over the last axes, as ``torch.nn.functional.layer_norm``.

    Args:
        x: (..., *normalized_shape), float32, float64, bfloat16 or float16; weight and bias may be of a wider type.
        out: memory to write to (no gradients), which saves the allocation of a large result.

    Raises:
        ValueError: a shape does not fit, or ``out`` is given while gradients are wanted.
    """
    return _apply(x, weight, bias, _count(x, normalized_shape, weight, bias), eps, False, 0.0, out)


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    offset: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """``(weight + offset) * a / sqrt(mean(a^2) + eps) + bias`` over the last axes.

    ``offset=1.0`` is the gain of the Gemma family, whose weight starts at zero. Arguments and errors as :func:`layer_norm`.
    """
    return _apply(x, weight, bias, _count(x, normalized_shape, weight, bias), eps, True, offset, out)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    rms: bool = False,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``h = x + residual``, ``y = norm(h)`` over the last axis in one pass over memory; returns ``(y, h)``.

    Raises:
        ValueError: the two shapes or types differ, or a parameter does not fit the last axis.
    """
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"x and residual must agree in shape and type; they are {tuple(x.shape)} {x.dtype} and "
            f"{tuple(residual.shape)} {residual.dtype}"
        )
    n = _count(x, x.shape[-1], weight, bias)
    if torch.compiler.is_compiling():
        h = x + residual
        return reference.rows(h, weight, bias, n, eps, rms, offset)[0], h
    if needs_grad(x, residual, weight, bias):
        return _AddNorm.apply(x, residual, weight, bias, n, eps, rms, offset)  # type: ignore[return-value]
    with below_autograd():
        return _add_norm_op(x, residual, weight, bias, n, eps, rms, offset, False)[:2]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """:func:`add_norm` with the RMS norm: returns ``(rms_norm(x + residual), x + residual)``."""
    return add_norm(x, residual, weight, bias, eps, rms=True)


def norm_add_norm(
    f: Tensor,
    x: Tensor,
    output_weight: Tensor | None = None,
    input_weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    output_bias: Tensor | None = None,
    input_bias: Tensor | None = None,
    rms: bool = True,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``x_new = x + N_out(f)``, ``u = N_in(x_new)``: the seam between two sub-layers of a Peri-LN block (arXiv 2502.02732).

    Returns ``(x_new, u)``. The addition and the second norm are one pass.
    """
    if rms:
        h = rms_norm(f, f.shape[-1], output_weight, output_bias, eps, offset=offset)
    else:
        h = layer_norm(f, f.shape[-1], output_weight, output_bias, eps)
    u, x_new = add_norm(h, x, input_weight, input_bias, eps, rms=rms, offset=offset)
    return x_new, u


def channel_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, rms: bool = False
) -> Tensor:
    """The norm over the channels of (samples, channels, ...), planes read as they lie: no permuted copies."""
    if x.dim() < 2:
        raise ValueError(f"channel_norm takes (samples, channels, ...); the input has the shape {tuple(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and tuple(parameter.shape) != (x.shape[1],):
            raise ValueError(
                f"{name} must have one number a channel, ({x.shape[1]},); its shape is {tuple(parameter.shape)}"
            )
    flat = x.reshape(x.shape[0], x.shape[1], -1) if x.numel() else x.reshape(x.shape[0], x.shape[1], 0)
    if torch.compiler.is_compiling():
        y = reference.channels(flat, weight, bias, eps, rms)[0]
    elif needs_grad(x, weight, bias):
        y = _ChannelNorm.apply(flat, weight, bias, eps, rms)
    else:
        with below_autograd():
            y = _channel_norm_op(flat, weight, bias, eps, rms, False)[0]
    return y.reshape(x.shape)  # type: ignore[union-attr]


def crms_norm(z: Tensor, eps: float = 1e-5) -> Tensor:
    """``z / sqrt((sum(z^2) + sum(z)^2) / (k + 1) + eps)`` over the last axis of k numbers.

    It equals the first k entries of ``rms_norm([z, -sum(z)])``: the RMS norm of a vector with zero mean whose last entry is
    left out (Jiang et al., 2023, arXiv 2305.14858).
    """
    a = z.to(reference.wide(z.dtype))
    total = a.sum(-1, keepdim=True)
    rstd = torch.rsqrt(((a * a).sum(-1, keepdim=True) + total * total) / (z.shape[-1] + 1) + eps)
    return (a * rstd).to(z.dtype)
