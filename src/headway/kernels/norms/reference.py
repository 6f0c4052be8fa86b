"""The plain bodies of the norm operators: short, in the order of the equations, and differentiable.

``kind`` of the equations: layer norm ``z = (a - mean(a)) / sqrt(var(a) + eps)``, RMS norm ``z = a / sqrt(mean(a^2) + eps)``;
then ``y = (weight + offset) * z + bias``. Statistics are taken in float32 for float16 and bfloat16, in float64 for float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic type of a tensor type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _affine(z: Tensor, weight: Tensor | None, bias: Tensor | None, offset: float) -> Tensor:
    if weight is not None:
        z = z * (weight.to(z.dtype) + offset)
    return z if bias is None else z + bias.to(z.dtype)


def rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, eps: float, rms: bool, offset: float
) -> tuple[Tensor, Tensor]:
    """``y`` shaped as ``x``, and (mean, rstd) of every row of ``n`` numbers, shape (rows, 2)."""
    a = x.reshape(x.shape.numel() // n if n else 0, n).to(wide(x.dtype))
    mean = torch.zeros_like(a[:, :1]) if rms else a.mean(1, keepdim=True)
    rstd = torch.rsqrt(((a - mean) ** 2).mean(1, keepdim=True) + eps)
    y = _affine((a - mean) * rstd, weight, bias, offset)
    return y.to(x.dtype).reshape(x.shape), torch.cat([mean, rstd], 1)


def rows_backward(
    gy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, n: int, rms: bool, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``grad_x = rstd * (h - mean(h) - z * mean(h * z))`` with ``h = gy * weight``; no ``mean(h)`` for the RMS norm."""
    a, g = x.reshape(-1, n).to(wide(x.dtype)), gy.reshape(-1, n).to(wide(x.dtype))
    mean, rstd = stats[:, :1], stats[:, 1:]
    z = (a - mean) * rstd
    h = g if weight is None else g * (weight.to(g.dtype) + offset)
    centre = 0.0 if rms else h.mean(1, keepdim=True)
    gx = rstd * (h - centre - z * (h * z).mean(1, keepdim=True))
    return gx.to(x.dtype).reshape(x.shape), (g * z).sum(0), g.sum(0)


def channels(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """The same over the channels of (samples, channels, space); statistics (samples * space, 2)."""
    a = x.transpose(1, 2)
    y, stats = rows(a.reshape(-1, a.shape[2]), weight, bias, a.shape[2], eps, rms, 0.0)
    return y.reshape(a.shape).transpose(1, 2).contiguous(), stats


def channels_backward(
    gy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of :func:`channels`."""
    a, g = x.transpose(1, 2), gy.transpose(1, 2)
    gx, gw, gb = rows_backward(
        g.reshape(-1, a.shape[2]), a.reshape(-1, a.shape[2]), stats, weight, a.shape[2], rms, 0.0
    )
    return gx.reshape(a.shape).transpose(1, 2).contiguous(), gw, gb
