"""Norms by channel statistics of (samples, channels, space), optionally followed by a norm over groups of channels, fused.

    z = weight * (x - mean) / sqrt(var + eps) + bias        mean, var: of the batch by shares of its samples, or given
    y = gain * (z - mu) / sqrt(v + eps) + offset            mu, v: of each sample's groups of z

Mean and variance of every plane are read off once; all other statistics follow from them by loops over the planes, also those of
the second stage, because the first one is a multiply-add a plane. So both stages together read the input twice and write once,
as batch norm alone does. :mod:`.reference` is the truth they are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.library import Function, below_autograd, define
from headway.kernels.planes import reference


def _vector(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64)


def _gradient(like: Tensor, parameter: Tensor | None) -> Tensor:
    dtype = torch.float32 if parameter is None else torch.promote_types(parameter.dtype, torch.float32)
    return like.new_empty(0 if parameter is None else parameter.numel(), dtype=dtype)


_moments_op = define(
    "plane_moments(Tensor x) -> Tensor",
    reference.plane_moments,
    lambda x: _vector(x, 2, *x.shape[:2]),
    native="planes",
)
_statistics_op = define(
    "plane_statistics(Tensor moments, Tensor? shares, Tensor? centre) -> Tensor",
    reference.plane_statistics,
    lambda moments, *_: _vector(moments, 2, moments.shape[2]),
)
_move_op = define(
    "move_statistics(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? kept_rate, Tensor statistics, float rate, "
    "float decay, bool moves) -> Tensor",
    reference.move_statistics,
    lambda running_mean, *_: _vector(running_mean, 2, running_mean.numel()),
)
_norm_op = define(
    "plane_norm(Tensor x, Tensor moments, Tensor statistics, Tensor? weight, Tensor? bias, Tensor? group_weight, "
    "Tensor? group_bias, int groups, float eps, float group_eps) -> Tensor",
    reference.plane_norm,
    lambda x, *_: x.new_empty(x.shape),
)
_backward_op = define(
    "plane_norm_backward(Tensor gy, Tensor x, Tensor moments, Tensor statistics, Tensor? shares, Tensor? weight, Tensor? bias, "
    "Tensor? group_weight, Tensor? group_bias, Tensor? grad_statistics, Tensor? whole, int groups, float eps, float group_eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.plane_norm_backward,
    lambda gy, x, moments, statistics, shares, weight, bias, group_weight, group_bias, *_: (
        x.new_empty(x.shape),
        *(_gradient(x, p) for p in (weight, bias, group_weight, group_bias)),
        _vector(x, 0 if shares is None else shares.numel()),
    ),
)
_shares_op = define(
    "task_shares(Tensor task_weight, Tensor task_ids, Tensor counts, int seen, bool renormalize) -> Tensor",
    reference.task_shares,
    lambda task_weight, task_ids, *_: _vector(task_weight, task_ids.numel()),
)
_shares_backward_op = define(
    "task_shares_backward(Tensor gradient, Tensor task_weight, Tensor task_ids, Tensor counts, int seen, bool renormalize) -> Tensor",
    reference.task_shares_backward,
    lambda gradient, task_weight, *_: _gradient(task_weight, task_weight),
)
_step_op = define(
    "plane_step(Tensor x, Tensor? weight, Tensor? bias, Tensor? group_weight, Tensor? group_bias, Tensor? task_weight, "
    "Tensor? task_ids, Tensor? counts, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? kept_rate, float rate, "
    "float decay, int seen, bool moves, bool estimate, bool unbiased, bool renormalize, int groups, float eps, float group_eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.plane_step,
    lambda x, *_: (
        x.new_empty(x.shape),
        _vector(x, 2, *x.shape[:2]),
        _vector(x, x.shape[0]),
        _vector(x, 2, x.shape[1]),
        _vector(x, 2, x.shape[1]),
        _vector(x),
    ),
)


def _quiet() -> Any:
    """Inside a ``Function`` autograd has nothing to do; a compiler must see the operators as they are."""
    return nullcontext() if torch.compiler.is_compiling() else below_autograd()


def _everywhere(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def together(sync: bool) -> bool:
    """Whether a pass shares its sums with other processes; a single process needs no process group."""
    if not sync or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return torch.distributed.get_world_size() > 1


def _batch_statistics(moments: Tensor, shares: Tensor, centre: Tensor | None, sync: bool) -> Tensor:
    if not sync:
        return _statistics_op(moments, shares, centre)
    mean = _everywhere(shares @ moments[0])
    away = moments[0] - (mean if centre is None else centre.double())
    return torch.stack([mean, _everywhere(shares @ (moments[1] + away.square()))])


def count_samples(x: Tensor, sync: bool) -> Any:
    """Samples of the batch, of all processes together with ``sync``."""
    if not sync:
        return x.shape[0]
    return int(_everywhere(torch.tensor(x.shape[0], device=x.device)))


def even_shares(x: Tensor, samples: Any) -> Tensor:
    """(samples here,) float64: every one of ``samples`` counts the same."""
    return x.new_full((x.shape[0],), 1 / max(1, samples), dtype=torch.float64)


class _PlaneNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, group_weight, group_bias, shares, given, moments, groups, eps, group_eps, sync):
        with _quiet():
            if moments is None:
                moments = _moments_op(x)
            statistics = _batch_statistics(moments, shares, None, sync) if given is None else given.clone()
            y = _norm_op(x, moments, statistics, weight, bias, group_weight, group_bias, groups, eps, group_eps)
        ctx.save_for_backward(x, weight, bias, group_weight, group_bias, shares, moments, statistics)
        ctx.settings, ctx.sync = (groups, eps, group_eps), sync
        ctx.set_materialize_grads(False)
        if shares is None:
            ctx.mark_non_differentiable(statistics)
        return y, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, grad_statistics):  # type: ignore[override]
        x, weight, bias, group_weight, group_bias, shares, moments, statistics = ctx.saved_tensors
        with _quiet():
            gy = torch.zeros_like(x) if gy is None else gy.to(x.dtype)
            whole = None
            if ctx.sync and shares is not None:
                *_, one, two, _, _ = reference.plane_sums(
                    gy, x, moments, statistics, weight, bias, group_weight, *ctx.settings
                )
                extra = torch.zeros_like(statistics) if grad_statistics is None else grad_statistics.double()
                whole = _everywhere(torch.cat([one.sum(0), two.sum(0), extra.flatten(), shares.sum()[None]]))
            gx, *grads = _backward_op(
                gy, x, moments, statistics, shares, weight, bias, group_weight, group_bias,
                grad_statistics, whole, *ctx.settings,
            )  # fmt: skip
        parameters = (weight, bias, group_weight, group_bias, shares)
        return gx, *_cast(grads, parameters), *(None,) * 6


def _cast(grads: Sequence[Tensor], parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the type of what they belong to."""
    pairs = zip(grads, parameters, strict=True)
    return [None if p is None else g if g.dtype == p.dtype else g.to(p.dtype) for g, p in pairs]


@dataclass(frozen=True)
class Tasks:
    """Of which of the ``seen`` tasks each sample is, and what makes their weights; the fields of AdaB2N's layer."""

    weight: Tensor
    ids: Tensor
    counts: Tensor
    seen: int
    renormalize: bool = False

    def shares(self) -> Tensor:
        """(samples,) float64: how much each sample counts; differentiable in the weights."""
        return reference.task_shares(self.weight, self.ids, self.counts, self.seen, self.renormalize)


class _PlaneStep(Function):
    """A training step as one operator forward and one or two backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, group_weight, group_bias, omega, ids, counts, buffers, settings):
        with below_autograd():
            y, moments, shares, statistics, running, distance = _step_op(
                x, weight, bias, group_weight, group_bias, omega, ids, counts, *buffers, *settings
            )
        for buffer in buffers:  # what was saved of them for another backward has changed
            if buffer is not None:
                torch.autograd.graph.increment_version(buffer)
        _, _, seen, _, estimate, _, renormalize, *rest = settings
        ctx.save_for_backward(
            x, weight, bias, group_weight, group_bias, omega, ids, counts, moments, shares, statistics, running
        )
        ctx.tasks, ctx.settings, ctx.estimate = (seen, renormalize), rest, estimate
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(running, *((statistics, distance) if estimate else ()))
        return y, statistics, running, distance

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, grad_statistics, _, grad_distance):  # type: ignore[override]
        x, *parameters, omega, ids, counts, moments, shares, statistics, running = ctx.saved_tensors
        with below_autograd():
            if grad_distance is not None:  # the running values count as constants
                away = (statistics - running) * (grad_distance * (2 / statistics.shape[1]))
                grad_statistics = away if grad_statistics is None else grad_statistics + away
            gy = torch.zeros_like(x) if gy is None else gy if gy.dtype == x.dtype else gy.to(x.dtype)
            gx, *grads, to_shares = _backward_op(
                gy, x, moments, statistics, None if ctx.estimate else shares, *parameters, grad_statistics, None,
                *ctx.settings,
            )  # fmt: skip
            to_omega = None
            if omega is not None:
                to_omega = _shares_backward_op(to_shares, omega, ids, counts, *ctx.tasks)
                to_omega = to_omega if to_omega.dtype == omega.dtype else to_omega.to(omega.dtype)
        return gx, *_cast(grads, parameters), to_omega, None, None, None, None


def plane_moments(x: Tensor) -> Tensor:
    """(2, samples, channels) float64: mean and mean squared distance from it of every plane of x (samples, channels, space)."""
    with torch.no_grad():
        return _moments_op(x)


def batch_statistics(moments: Tensor, shares: Tensor, centre: Tensor | None = None, sync: bool = False) -> Tensor:
    """(2, channels) float64: the mean of the planes' means by shares, and the variance around it or around ``centre``."""
    with torch.no_grad():
        return _batch_statistics(moments, shares, centre, sync)


def move_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    statistics: Tensor,
    rate: float | Tensor,
    moves: bool = True,
    decay: float | None = None,
) -> Tensor:
    """Moves the running values towards ``statistics`` by the share ``rate``, unless one of these is NaN or infinite, in place where
    ``moves``; returns the new values, (2, channels) float64.

    With ``decay`` the rate is a float64 tensor () that moves with them: it becomes 1 / (1 + decay / rate) first.
    """
    with torch.no_grad():
        if decay is not None:
            assert isinstance(rate, Tensor)
            return _move_op(running_mean, running_var, rate, statistics, 0.0, decay, moves)
        return _move_op(running_mean, running_var, None, statistics, float(rate), 0.0, moves)


def plane_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shares: Tensor | None,
    statistics: Tensor | None = None,
    *,
    moments: Tensor | None = None,
    groups: int = 0,
    group_weight: Tensor | None = None,
    group_bias: Tensor | None = None,
    eps: float = 1e-5,
    group_eps: float = 1e-5,
    sync: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both stages; the second only with ``groups``. The output and the statistics of the first stage, (2, channels) float64.

    Args:
        x: (samples, channels, space).
        weight, bias: (channels,), of the first stage.
        shares: (samples,) float64 weights of the samples in the batch statistics, whose sum may differ from 1; gradients flow
            through the statistics into x and the shares. None takes the statistics as constants.
        statistics: (2, channels); with shares what :func:`batch_statistics` says of them, where that is known.
        moments: :func:`plane_moments` of x, where they are known.
        group_weight, group_bias: (groups,) or (channels,).
        sync: take the statistics over all processes.
    """
    return _PlaneNorm.apply(
        x.contiguous(),
        weight,
        bias,
        group_weight,
        group_bias,
        shares,
        statistics,
        moments,
        groups,
        eps,
        group_eps,
        sync,
    )  # type: ignore[return-value]


def plane_step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    rate: float | Tensor,
    *,
    decay: float | None = None,
    moves: bool = True,
    tasks: Tasks | None = None,
    estimate: bool = False,
    unbiased: bool = False,
    groups: int = 0,
    group_weight: Tensor | None = None,
    group_bias: Tensor | None = None,
    eps: float = 1e-5,
    group_eps: float = 1e-5,
    sync: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A training step: the batch's statistics, the running values moved by them, and :func:`plane_norm`.

    Args:
        running: mean and variance (channels,), moved in place where ``moves``; None where none are kept.
        rate, decay: as for :func:`move_statistics`.
        tasks: weighs the samples; None: all alike.
        estimate: normalise by the running values after they have moved, taken as constants, and take the variance around the
            running mean as it was.
        unbiased: move towards the unbiased variance.

    Returns:
        The output, the statistics that were used, (2, channels) float64, the running values after the step, and the squared distance of
        the two, mean and variance each averaged over the channels, with the running values as constants. The last two are None if
        the batch is empty or no values are kept.
    """
    if not (sync or torch.compiler.is_compiling() or x.numel() == 0):
        kept, share = (None, float(rate)) if decay is None else (rate, 0.0)
        omega, ids, counts, seen, again = (
            (None, None, None, 0, False)
            if tasks is None
            else (tasks.weight, tasks.ids, tasks.counts, tasks.seen, tasks.renormalize)
        )
        settings = share, decay or 0.0, seen, moves, estimate, unbiased, again, groups, eps, group_eps
        y, statistics, after, distance = _PlaneStep.apply(
            x.contiguous(), weight, bias, group_weight, group_bias, omega, ids, counts, (*running, kept), settings
        )  # type: ignore[misc]
        return (y, statistics, None, None) if running[0] is None else (y, statistics, after, distance)
    samples = count_samples(x, sync)
    shares, values = even_shares(x, samples) if tasks is None else tasks.shares(), samples * x.shape[2]
    moments, after = plane_moments(x.detach()), None
    used = batch_statistics(moments, shares.detach(), running[0] if estimate else None, sync)
    # before the output: a recomputation under checkpointing ends with the last tensor that the backward needs
    if running[0] is not None and running[1] is not None and values:
        target = torch.stack([used[0], used[1] * (values / max(values - 1, 1))]) if unbiased else used
        after = move_statistics(running[0], running[1], target, rate, moves, decay)
    if estimate:
        used = torch.stack(running).double() if after is None else after  # type: ignore[arg-type]
    y, statistics = plane_norm(
        x, weight, bias, None if estimate else shares, used, moments=moments, groups=groups, group_weight=group_weight,
        group_bias=group_bias, eps=eps, group_eps=group_eps, sync=sync,
    )  # fmt: skip
    return y, statistics, after, None if after is None else 2 * F.mse_loss(statistics, after)
