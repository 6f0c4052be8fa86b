"""Batch norm of a training pass, with or without the ReLU behind it, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def _map(x: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """x - mean, gain and shift of y = gain (x - mean) + shift, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, var = statistics.to(wide)[:, None, :, None]
    gain = (var + eps).rsqrt() if weight is None else weight.to(wide)[:, None] * (var + eps).rsqrt()
    shift = torch.zeros_like(gain) if bias is None else bias.to(wide)[:, None]
    return x.to(wide) - mean, gain, shift


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    rate: float,
    eps: float,
    rectified: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and the mean and the biased variance of every channel, (2, channels) float64. Running values move in place."""
    if x.numel() == 0:
        raise RuntimeError("an empty batch has no statistics")
    var, mean = torch.var_mean(x.double(), (0, 2), correction=0)
    count = x.numel() // x.shape[1]
    for running, now in ((running_mean, mean), (running_var, var * (count / max(1, count - 1)))):
        if running is not None:
            running.lerp_(now.to(running.dtype), rate)
    statistics = torch.stack([mean, var])
    away, gain, shift = _map(x, statistics, weight, bias, eps)
    y = away * gain + shift
    return (y.relu() if rectified else y).to(x.dtype).contiguous(), statistics


def batch_norm_backward(
    gy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rectified: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; the ReLU's mask follows from x."""
    away, gain, shift = _map(x, statistics, weight, bias, eps)
    gz = gy.to(away.dtype)
    if rectified:
        gz = torch.where(away * gain + shift <= 0, 0, gz)
    rstd = (statistics[1] + eps).rsqrt().to(away.dtype)
    gb, gw = gz.sum((0, 2)), (gz * away).sum((0, 2)) * rstd
    count = x.numel() // x.shape[1]
    gx = gain * (gz - (gb[:, None] + away * (gw * rstd)[:, None]) / count)
    return gx.to(x.dtype).contiguous(), gw, gb
