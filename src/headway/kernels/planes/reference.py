"""Plain torch bodies of the plane operators: the truth that ``csrc/planes.cpp`` is tested against.

x is (samples, channels, space). ``moments`` (2, samples, channels) holds each plane's mean and mean squared distance from it, and
``statistics`` (2, channels) a mean and a variance a channel; both are float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in the type that is computed in: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def plane_moments(x: Tensor) -> Tensor:
    """Mean and biased variance of every plane."""
    if x.numel() == 0:
        return x.new_zeros((2, *x.shape[:2]), dtype=torch.float64)
    a = wide(x).double()
    return torch.stack([a.mean(2), a.var(2, unbiased=False)])


def plane_statistics(moments: Tensor, shares: Tensor | None, centre: Tensor | None) -> Tensor:
    """Mean over the shares of the planes' means, and of their squared distances from it or from ``centre``."""
    means, variances = moments
    if shares is None:
        shares = moments.new_full((moments.shape[1],), 1 / max(1, moments.shape[1]))
    mean = shares @ means
    away = means - (mean if centre is None else centre.double())
    return torch.stack([mean, shares @ (variances + away.square())])


def move_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    kept_rate: Tensor | None,
    statistics: Tensor,
    rate: float,
    decay: float,
    moves: bool,
) -> Tensor:
    """running += rate * (statistics - running) where all of it is finite, in place where it moves; returns the new values. A rate
    that is kept moves first, to 1 / (1 + decay / rate)."""
    usable = torch.isfinite(statistics).all()
    share = rate if kept_rate is None else 1 / (1 + decay / kept_rate)
    before = torch.stack([running_mean, running_var])
    moved = (before.double() + share * (statistics - before.double())).to(before.dtype)
    after = torch.where(usable, moved, before)
    if moves:
        running_mean.copy_(after[0])
        running_var.copy_(after[1])
        if kept_rate is not None:
            kept_rate.copy_(torch.where(usable, share, kept_rate))
    return after.double()


def _spread(given: Tensor | None, channels: int, missing: float, like: Tensor) -> Tensor:
    if given is None:
        return like.new_full((channels,), missing)
    return given.double().repeat_interleave(channels // max(1, given.numel()))


def _gather(sums: Tensor, parameter: Tensor | None) -> Tensor:
    if parameter is None or not parameter.numel():
        return sums.new_zeros(0, dtype=torch.float32)
    return sums.reshape(parameter.numel(), -1).sum(1).to(torch.promote_types(parameter.dtype, torch.float32))


def _stages(moments, statistics, weight, bias, groups, eps, group_eps) -> tuple[Tensor, ...]:
    """first, z (a plane's mean after the first stage, minus its group's) and t, a number a plane."""
    channels = moments.shape[2]
    first = _spread(weight, channels, 1, moments) * torch.rsqrt(statistics[1] + eps)
    z = first * (moments[0] - statistics[0]) + _spread(bias, channels, 0, moments)
    if not groups:
        return first, z, torch.ones_like(z)
    parts = z.unflatten(1, (groups, -1))
    parts = parts - parts.mean(2, keepdim=True)
    square = (first.square() * moments[1]).unflatten(1, (groups, -1)) + parts.square()
    t = torch.rsqrt(square.mean(2) + group_eps).repeat_interleave(channels // groups, 1)
    return first, parts.flatten(1), t


def _affine(x: Tensor, centre: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """gain * (x - centre) + shift with a number a plane each, in the arithmetic type of x."""
    return (x - centre[..., None].to(x.dtype)) * gain[..., None].to(x.dtype) + shift[..., None].to(x.dtype)


def plane_norm(
    x, moments, statistics, weight, bias, group_weight, group_bias, groups: int, eps: float, group_eps: float
) -> Tensor:
    """Both stages at once: one multiply-add an entry."""
    channels = x.shape[1]
    first, z, t = _stages(moments, statistics, weight, bias, groups, eps, group_eps)
    outer = t * _spread(group_weight, channels, 1, moments)
    shift = outer * z + _spread(group_bias, channels, 0, moments)
    return _affine(wide(x), moments[0], outer * first, shift).to(x.dtype)


def plane_sums(
    gy, x, moments, statistics, weight, bias, group_weight, groups: int, eps: float, group_eps: float
) -> tuple[Any, ...]:
    """Gradient of the second stage: its gain, pull and shift on (gy, x - centre, 1), the sums of gz and of gz * (x - mean) over
    a plane, and the gradients of the second stage's gain and offset a channel."""
    channels, space = x.shape[1:]
    first, z, t = _stages(moments, statistics, weight, bias, groups, eps, group_eps)
    outer = _spread(group_weight, channels, 1, moments)
    g, a = wide(gy).double(), wide(x).double()
    one, two = g.sum(2), (g * (a - moments[0][..., None])).sum(2)
    along, pull, shift = torch.ones_like(z), torch.zeros_like(z), torch.zeros_like(z)
    grad_gain, grad_offset = z.new_zeros(channels), z.new_zeros(channels)
    if groups and x.numel():
        projected = t * (first * two + z * one)
        grad_gain, grad_offset = projected.sum(0), one.sum(0)

        def over_group(values: Tensor) -> Tensor:
            mean = values.unflatten(1, (groups, -1)).mean(2) / space
            return mean.repeat_interleave(channels // groups, 1)

        along, s1, s2 = t * outer, over_group(outer * one), over_group(outer * projected)
        pull, shift = -t * t * first * s2, -t * (s1 + t * z * s2)
        one, two = along * one + shift * space, along * two + pull * space * moments[1]
    two = two + (moments[0] - statistics[0]) * one
    return first, along, pull, shift, one, two, grad_gain, grad_offset


def plane_norm_backward(
    gy, x, moments, statistics, shares, weight, bias, group_weight, group_bias, grad_statistics, whole,
    groups: int, eps: float, group_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, weight, bias, group_weight, group_bias and shares. ``whole`` (4 * channels + 1,): the sums of gz
    and of gz * (x - mean), the gradients of the statistics and the sum of the shares over all processes, where this one sees a part."""
    first, along, pull, shift, one, two, grad_gain, grad_offset = plane_sums(
        gy, x, moments, statistics, weight, bias, group_weight, groups, eps, group_eps
    )
    rstd = torch.rsqrt(statistics[1] + eps)
    along, pull, shift = along * first, pull * first, shift * first
    grad_shares = moments.new_zeros(0)
    if shares is not None and (x.numel() or whole is not None):
        extra = torch.zeros_like(statistics) if grad_statistics is None else grad_statistics.double()
        everywhere = torch.cat([torch.stack([one.sum(0), two.sum(0)]), extra])
        total = shares.sum()
        if whole is not None:
            everywhere, total = whole[:-1].reshape(4, -1), whole[-1]
        to_var = everywhere[3] - 0.5 * first * rstd.square() * everywhere[1]
        to_mean = everywhere[2] - first * everywhere[0] - 2 * to_var * statistics[0] * (1 - total)
        away, part = moments[0] - statistics[0], shares[:, None] / max(1, x.shape[2])
        pull = pull + 2 * part * to_var
        shift = shift + part * (to_mean + 2 * to_var * away)
        grad_shares = (to_mean * moments[0] + to_var * (moments[1] + away.square())).sum(1)
    elif shares is not None:
        grad_shares = torch.zeros_like(shares)
    g = wide(gy)
    gx = g * along[..., None].to(g.dtype) + _affine(wide(x), moments[0], pull, shift)
    return (
        gx.to(x.dtype),
        _gather(two.sum(0) * rstd, weight),
        _gather(one.sum(0), bias),
        _gather(grad_gain, group_weight),
        _gather(grad_offset, group_bias),
        grad_shares,
    )


def task_shares(task_weight: Tensor, task_ids: Tensor, counts: Tensor, seen: int, renormalize: bool) -> Tensor:
    """(samples,) float64: how much each sample counts where the ``seen`` tasks weigh exp(task_weight) + counts."""
    omega, n = task_weight[:seen].double(), counts[:seen].double()
    top = omega.detach().amax().clamp(min=0)  # weights of any size without overflow
    pi = (omega - top).exp() + n * (-top).exp()
    if renormalize:
        pi = pi * (n > 0)
    return (pi / pi.sum() / n.clamp(min=1))[task_ids]


def task_shares_backward(
    gradient: Tensor, task_weight: Tensor, task_ids: Tensor, counts: Tensor, seen: int, renormalize: bool
) -> Tensor:
    """Gradient of the task weights, written out: the operator's body runs where autograd is off."""
    omega, n = task_weight[:seen].double(), counts[:seen].double()
    top = omega.amax().clamp(min=0)
    weight = (omega - top).exp()
    pi = weight + n * (-top).exp()
    if renormalize:
        weight, pi = weight * (n > 0), pi * (n > 0)
    weight, pi = weight / pi.sum(), pi / pi.sum()
    to_pi = torch.zeros_like(pi).index_add(0, task_ids, gradient / n.clamp(min=1)[task_ids])
    found = torch.zeros_like(task_weight, dtype=torch.promote_types(task_weight.dtype, torch.float32))
    found[:seen] = weight * (to_pi - (to_pi * pi).sum())
    return found


def plane_step(
    x, weight, bias, group_weight, group_bias, task_weight, task_ids, counts, running_mean, running_var, kept_rate,
    rate: float, decay: float, seen: int, moves: bool, estimate: bool, unbiased: bool, renormalize: bool,
    groups: int, eps: float, group_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One training step: the output, the planes' moments, the samples' shares, the statistics that were used, the running values after
    they have moved (the batch's statistics where there are none), and the squared distance of these two, averaged over the channels."""
    samples, values = x.shape[0], x.shape[0] * x.shape[2]
    if task_weight is None:
        shares = x.new_full((samples,), 1 / max(1, samples), dtype=torch.float64)
    else:
        shares = task_shares(task_weight, task_ids, counts, seen, renormalize)
    moments = plane_moments(x)
    statistics = plane_statistics(moments, shares, running_mean if estimate else None)
    running = statistics.clone()
    if running_mean is not None:
        target = torch.stack([statistics[0], statistics[1] * (values / max(values - 1, 1))]) if unbiased else statistics
        running = move_statistics(running_mean, running_var, kept_rate, target, rate, decay, moves)
    if estimate:
        statistics = running.clone()
    y = plane_norm(x, moments, statistics, weight, bias, group_weight, group_bias, groups, eps, group_eps)
    return y, moments, shares, statistics, running, (statistics - running).square().mean(1).sum()
