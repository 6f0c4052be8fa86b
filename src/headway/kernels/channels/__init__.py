"""Norms whose statistics belong to channels: UnifiedNorm (arXiv 2208.01313) and PowerNorm (arXiv 2003.07845), fused.

A training pass reads its input twice: sums of squares down the columns, then one multiply-add an entry. What happens to the
statistics in between is one loop over the channels in C++, where plain torch takes thirty small operations; it moves the
statistics in place, as the operators' schemas declare, and reads nothing back to Python. Neither gradient is the derivative of
the forward pass, so both live in a ``torch.autograd.Function``. :mod:`.reference` is the truth they are tested against.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.channels import reference
from headway.kernels.library import below_autograd, define, load, needs_grad

load("channels")


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _vector(x: Tensor, n: Any, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(n, dtype=dtype or reference.wide(x.dtype))


def _grads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[-1]
    return _like(x), _vector(x, n), _vector(x, n)


def _column_squares_plain(x, pad_mask, groups, eps):
    return reference.squares(reference.scaled(reference.rows(x), groups, eps)[0], pad_mask).double()


def _column_products_plain(gy, x, pad_mask, rstd, groups):
    u = reference.rows(x)
    if groups:
        u = (u.unflatten(1, (groups, u.shape[1] // groups)) * rstd.reshape(len(u), groups, 1)).flatten(1)
    return reference.products(reference.rows(gy), u, pad_mask).double()


_squares_op = define(
    "column_squares(Tensor x, Tensor? pad_mask, int groups, float eps) -> Tensor",
    _column_squares_plain,
    lambda x, *_: _vector(x, x.shape[-1] + 1, torch.float64),
    native="channels",
)
_products_op = define(
    "column_products(Tensor gy, Tensor x, Tensor? pad_mask, Tensor rstd, int groups) -> Tensor",
    _column_products_plain,
    lambda gy, x, *_: _vector(x, 5 * x.shape[-1] + 2, torch.float64),
)
_scale_op = define(
    "channel_scale(Tensor x, Tensor square, Tensor? weight, Tensor? bias, int groups, float eps) -> Tensor",
    reference.channel_scale,
    lambda x, *_: _like(x),
)
_unified_op = define(
    "unified_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? pad_mask, Tensor? sums, Tensor(a!) running_var, "
    "Tensor(b!) window, Tensor(c!) iters, Tensor(d!) skip_counter, int backward_window, int warmup, int compensation, "
    "bool filtration, float eps, float momentum, bool moves) -> (Tensor, Tensor)",
    reference.unified_norm,
    lambda x, *_: (_like(x), _vector(x, 2 * x.shape[-1] + 4)),
)
_unified_backward_op = define(
    "unified_norm_backward(Tensor gy, Tensor x, Tensor kept, Tensor? weight, Tensor? pad_mask, Tensor? own, Tensor? whole, "
    "Tensor(a!) window, Tensor(b!) ema_gz, float momentum, bool count_padding) -> (Tensor, Tensor, Tensor)",
    reference.unified_norm_backward,
    lambda gy, x, *_: _grads(x),
)
_power_op = define(
    "power_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? pad_mask, Tensor? sums, Tensor(a!) running_phi, "
    "Tensor(b!) iters, int groups, int warmup, float alpha, float eps, bool batch_forward, bool batch_gradient, bool moves) "
    "-> (Tensor, Tensor, Tensor)",
    reference.power_norm,
    lambda x, weight, bias, pad_mask, sums, running_phi, iters, groups, *_: (
        _like(x),
        _vector(x, 3 * x.shape[-1] + 1),
        _vector(x, x.shape[:-1].numel() * groups),
    ),
)
_power_backward_op = define(
    "power_norm_backward(Tensor gy, Tensor x, Tensor kept, Tensor rstd, Tensor? weight, Tensor? pad_mask, Tensor? own, "
    "Tensor? whole, Tensor(a!) ema_gz, int groups, float alpha, bool count_padding, bool clamp_gamma, bool exact) "
    "-> (Tensor, Tensor, Tensor)",
    reference.power_norm_backward,
    lambda gy, x, *_: _grads(x),
)


def _quiet() -> Any:
    """Inside a ``Function`` autograd has nothing to do; a compiler must see the operators as they are."""
    return nullcontext() if torch.compiler.is_compiling() else below_autograd()


def _everywhere(sums: Tensor) -> Tensor:
    """The sums over all processes, in a tensor of their own."""
    total = sums.clone()
    torch.distributed.all_reduce(total)
    return total


def _cast(grad: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else grad.to(parameter.dtype)


class _UnifiedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, pad_mask, statistics, settings, momentum, count_padding, sync, moves):
        window, ema_gz = statistics[4:]
        with _quiet():
            sums = _everywhere(_squares_op(x, pad_mask, 0, 0.0)) if sync else None
            y, kept = _unified_op(
                x, weight, bias, pad_mask, sums, *statistics[:4], window.shape[0], *settings, momentum, moves
            )
        # all of it as saved tensors: under checkpointing they then come from the second pass, ``moves`` with them
        ctx.save_for_backward(x, weight, bias, pad_mask, kept)
        ctx.statistics, ctx.momentum, ctx.count_padding, ctx.sync = (window, ema_gz), momentum, count_padding, sync
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):  # type: ignore[override]
        x, weight, bias, pad_mask, kept = ctx.saved_tensors
        own = whole = None
        with _quiet():
            if ctx.sync:
                own = _products_op(gy, x, pad_mask, kept[:0], 0)
                whole = _everywhere(own)
            gx, gw, gb = _unified_backward_op(
                gy, x, kept, weight, pad_mask, own, whole, *ctx.statistics, ctx.momentum, ctx.count_padding
            )
        return gx, _cast(gw, weight), _cast(gb, bias), *(None,) * 7


class _PowerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, pad_mask, statistics, settings, backward_settings, exact, sync, moves):
        groups, eps = settings[0], settings[3]
        with _quiet():
            sums = _everywhere(_squares_op(x, pad_mask, groups, eps)) if sync else None
            y, kept, rstd = _power_op(x, weight, bias, pad_mask, sums, *statistics[:2], *settings, moves)
        ctx.save_for_backward(x, weight, bias, pad_mask, kept, rstd)
        ctx.ema_gz, ctx.groups, ctx.settings, ctx.exact, ctx.sync = (
            statistics[2],
            groups,
            backward_settings,
            exact,
            sync,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):  # type: ignore[override]
        x, weight, bias, pad_mask, kept, rstd = ctx.saved_tensors
        own = whole = None
        with _quiet():
            if ctx.sync:
                own = _products_op(gy, x, pad_mask, rstd, ctx.groups)
                whole = _everywhere(own)
            gx, gw, gb = _power_backward_op(
                gy, x, kept, rstd, weight, pad_mask, own, whole, ctx.ema_gz, ctx.groups, *ctx.settings, ctx.exact
            )
        return gx, _cast(gw, weight), _cast(gb, bias), *(None,) * 7


def unified_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pad_mask: Tensor | None,
    statistics: tuple[Tensor, ...],
    *,
    warmup: int,
    compensation: int,
    filtration: bool,
    eps: float,
    momentum: float,
    count_padding: bool,
    sync: bool,
    moves: bool,
) -> Tensor:
    """A training pass of UnifiedNorm; ``statistics`` are running_var, forward_window, iters, skip_counter, backward_window and
    ema_gz, moved in place (the last two by the backward) where ``moves`` is True."""
    settings = warmup, compensation, filtration, eps
    return _UnifiedNorm.apply(x, weight, bias, pad_mask, statistics, settings, momentum, count_padding, sync, moves)  # type: ignore[return-value]


def power_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pad_mask: Tensor | None,
    statistics: tuple[Tensor, ...],
    *,
    groups: int,
    warmup: int,
    alpha_fwd: float,
    alpha_bkw: float,
    eps: float,
    batch_forward: bool,
    batch_gradient: bool,
    exact: bool,
    count_padding: bool,
    clamp_gamma: bool,
    sync: bool,
    moves: bool,
) -> Tensor:
    """A training pass of PowerNorm; ``statistics`` are running_phi, iters and ema_gz, moved in place (the last one by the
    backward) where ``moves`` is True. ``groups`` = 0 leaves the group scaling out; ``exact`` takes the true derivative."""
    settings = groups, warmup, alpha_fwd, eps, batch_forward, batch_gradient
    backward_settings = alpha_bkw, count_padding, clamp_gamma
    return _PowerNorm.apply(x, weight, bias, pad_mask, statistics, settings, backward_settings, exact, sync, moves)  # type: ignore[return-value]


def channel_scale(
    x: Tensor,
    square: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    groups: int = 0,
) -> Tensor:
    """``weight * u / sqrt(square + eps) + bias`` with a fixed statistic (C,) for x (..., C); u is x, divided by the quadratic
    mean of each of ``groups`` groups of channels where there are groups. Differentiable any number of times."""
    if torch.compiler.is_compiling() or needs_grad(x, square, weight, bias):
        return reference.channel_scale(x, square, weight, bias, groups, eps)
    return _scale_op._op(x, square, weight, bias, groups, eps)  # the shortest way: on few tokens it is most of the time
