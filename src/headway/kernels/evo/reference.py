"""EvoNorm in plain torch: the layers as their equations stand, and the operators' bodies with the gradients written out.

All tensors are (samples, channels, *space). ``kind`` is the digit of B0, B1, B2. Half precision is computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that statistics are computed in."""
    return torch.promote_types(dtype, torch.float32)


def planes(x: Tensor) -> Tensor:
    """(samples, channels, space) in the arithmetic type."""
    return x.to(wide(x.dtype)).reshape(*x.shape[:2], x.shape[2:].numel())


def column(vector: Tensor | None, x: Tensor, missing: float) -> Tensor:
    """A number a channel, ready to meet planes."""
    return x.new_full((1, 1, 1), missing) if vector is None else vector.to(x.dtype)[:, None]


def batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    v: Tensor | None,
    variance: Tensor | None,
    kind: int,
    act: bool,
    eps: float,
) -> Tensor:
    """gamma x / max(sqrt(variance + eps), R) + beta; the batch's own variance where none is given. Autograd can follow it."""
    a = planes(x)
    of_batch = a.var((0, 2), correction=0) if variance is None else variance.to(a.dtype)
    left = torch.sqrt(of_batch + eps)[:, None]
    if not act:
        divisor = left
    else:
        square = a.var(2, correction=0, keepdim=True) if kind == 0 else a.square().mean(2, keepdim=True)
        q = torch.sqrt(square + eps)
        right = column(v, a, 1) * a + q if kind == 0 else (a + 1) * q if kind == 1 else q - a
        divisor = torch.maximum(left, right)
    return (column(weight, a, 1) * a / divisor + column(bias, a, 0)).to(x.dtype).reshape(x.shape)


def group(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    v: Tensor | None,
    groups: int,
    centred: bool,
    act: bool,
    eps: float,
) -> Tensor:
    """gamma x sigmoid(v x) / sqrt(s + eps) + beta; s is the variance (``centred``) or mean square of each sample's groups."""
    a = planes(x)
    grouped = a.reshape(len(a), groups, a.shape[1] // groups * a.shape[2])
    square = grouped.var(2, correction=0) if centred else grouped.square().mean(2)
    rstd = torch.rsqrt(square + eps).repeat_interleave(a.shape[1] // groups, 1)[:, :, None]
    gated = a * torch.sigmoid(column(v, a, 1) * a) if act else a
    return (column(weight, a, 1) * gated * rstd + column(bias, a, 0)).to(x.dtype).reshape(x.shape)


def evo_moments(x: Tensor) -> Tensor:
    """(2, C) float64: mean and biased variance of every channel; zero for an empty batch."""
    a = planes(x).double()
    if a.numel() == 0:
        return a.new_zeros(2, x.shape[1])
    return torch.stack([a.mean((0, 2)), a.var((0, 2), correction=0)])


def evo_batch(x, weight, bias, v, variance, kind, act, eps) -> tuple[Tensor, Tensor, Tensor]:
    """The output; (mean, q) of every plane; mean and variance of every channel."""
    a = planes(x)
    mean = a.mean(2)
    square = (a - mean[..., None]).square().mean(2) if kind == 0 else a.square().mean(2)
    of_batch = evo_moments(x).to(a.dtype)
    if variance is not None:
        of_batch = torch.stack([of_batch[0], variance.to(a.dtype)])
    y = batch(x, weight, bias, v, of_batch[1], kind, act, eps)
    kept = torch.stack([mean, torch.sqrt(square + eps)], 2).reshape(-1, 2)
    return y, kept, of_batch


def evo_batch_backward(gy, x, kept, moments, weight, v, kind, act, eps, through) -> tuple[Tensor, ...]:
    """Gradients of input, weight, bias and v, and what reaches sqrt(variance + eps); ``through``: it goes on to the input."""
    a, g = planes(x), planes(gy)
    mean, q = kept.reshape(len(a), a.shape[1], 1, 2).unbind(-1)
    left = torch.sqrt(moments[1] + eps)[:, None]
    p = column(v, a, 1) if kind == 0 else q if kind == 1 else -torch.ones_like(q)
    right = p * a + q if act else torch.full_like(a, -1)
    divisor = torch.maximum(left, right)
    h = g * column(weight, a, 1)
    to_divisor = -h * a / divisor.square()
    mine = to_divisor * ((right > left).to(a.dtype) + 0.5 * (right == left))
    pull = (to_divisor - mine).sum((0, 2))
    gx = h / divisor
    if act:
        inner = mine * (a + 1) if kind == 1 else mine
        gx = gx + p * mine + (a - mean if kind == 0 else a) * inner.mean(2, keepdim=True) / q
    if through and a.numel():
        gx = gx + (a - moments[0][:, None]) * (pull / (len(a) * a.shape[2]))[:, None] / left
    grads = (g * a / divisor).sum((0, 2)), g.sum((0, 2)), (mine * a).sum((0, 2))
    return gx.to(x.dtype).reshape(x.shape), *grads, pull


def evo_group(x, weight, bias, v, groups, centred, act, eps) -> tuple[Tensor, Tensor]:
    """The output, and (mean or 0, 1 / sqrt(square + eps)) of every group of every sample."""
    a = planes(x)
    a = a.reshape(len(a), groups, a.shape[1] // groups * a.shape[2])
    mean = a.mean(2) if centred else a.new_zeros(a.shape[:2])
    rstd = torch.rsqrt((a - mean[..., None]).square().mean(2) + eps)
    return group(x, weight, bias, v, groups, centred, act, eps), torch.stack([mean, rstd], 2).reshape(-1, 2)


def evo_group_backward(gy, x, stats, weight, v, groups, act) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, bias and v."""
    a, g = planes(x), planes(gy)
    each = a.shape[1] // groups
    mean, rstd = stats.reshape(len(a), groups, 2).repeat_interleave(each, 1)[:, :, None].unbind(-1)
    p = torch.sigmoid(column(v, a, 1) * a) if act else torch.ones_like(a)
    slope = p * (1 - p)
    h = g * column(weight, a, 1)
    total = (h * a * p).reshape(len(a), groups, each * a.shape[2]).mean(2).repeat_interleave(each, 1)[:, :, None]
    gx = h * rstd * (p + column(v, a, 1) * a * slope) - rstd**3 * (a - mean) * total
    grads = (g * a * p * rstd).sum((0, 2)), g.sum((0, 2)), (h * rstd * a.square() * slope).sum((0, 2))
    return gx.to(x.dtype).reshape(x.shape), *grads
