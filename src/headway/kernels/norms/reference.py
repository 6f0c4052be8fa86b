"""The plain bodies of the norm operators: short, in the order of the equations, and differentiable.

LAYER        z = (a - mean(a)) / sqrt(var(a) + eps)
RMS          z = a / sqrt(mean(a^2) + eps)
COMPRESSED   z = a / sqrt((sum(a^2) + sum(a)^2) / (n + 1) + eps)         the RMS norm of (a, -sum(a)) without its last entry

then ``y = (weight + offset) * z + bias``. Statistics are taken in float32 for float16 and bfloat16, in float64 for float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYER, RMS, COMPRESSED = 0, 1, 2


def wide(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic type of a tensor type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _affine(z: Tensor, weight: Tensor | None, bias: Tensor | None, offset: float) -> Tensor:
    if weight is not None:
        z = z * (weight.to(z.dtype).reshape(-1) + offset)
    return z if bias is None else z + bias.to(z.dtype).reshape(-1)


def matrix(x: Tensor, n: int) -> Tensor:
    """``x`` as (rows, n) in the arithmetic type."""
    return x.reshape(x.shape.numel() // n if n else 0, n).to(wide(x.dtype))


def statistics(a: Tensor, eps: float, kind: int) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of every row of (rows, n), a column each; the sum instead of the mean for COMPRESSED, 0 for RMS."""
    if kind == COMPRESSED:
        total = a.sum(1, keepdim=True)
        return total, torch.rsqrt(((a * a).sum(1, keepdim=True) + total * total) / (a.shape[1] + 1) + eps)
    mean = torch.zeros_like(a[:, :1]) if kind == RMS else a.mean(1, keepdim=True)
    return mean, torch.rsqrt(((a - mean) ** 2).mean(1, keepdim=True) + eps)


def _normalise(
    a: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: int, offset: float
) -> tuple[Tensor, Tensor]:
    mean, rstd = statistics(a, eps, kind)
    z = (a - mean) * rstd if kind == LAYER else a * rstd
    return _affine(z, weight, bias, offset), torch.cat([mean, rstd], 1)


def rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, eps: float, kind: int, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``y`` shaped as ``x``, and (mean, rstd) of every row of ``n`` numbers, shape (rows, 2)."""
    y, stats = _normalise(matrix(x, n), weight, bias, eps, kind, offset)
    return y.to(x.dtype).reshape(x.shape), stats


def rows_backward(
    gy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, n: int, kind: int, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """``grad_x = rstd * (h - mean(h) - z * mean(h * z))`` with ``h = gy * weight``; no ``mean(h)`` for the RMS norm.

    Of the compressed norm: ``grad = rstd * g - rstd^3 / (n + 1) * sum(g * a) * (a + sum(a))``.
    """
    a, g = matrix(x, n), matrix(gy, n)
    mean, rstd = stats[:, :1], stats[:, 1:]
    h = g if weight is None else g * (weight.to(g.dtype) + offset)
    z = a * rstd if kind != LAYER else (a - mean) * rstd
    if kind == COMPRESSED:
        gx = rstd * h - rstd**3 / (n + 1) * (h * a).sum(1, keepdim=True) * (a + mean)
    else:
        centre = 0.0 if kind == RMS else h.mean(1, keepdim=True)
        gx = rstd * (h - centre - z * (h * z).mean(1, keepdim=True))
    return gx.to(x.dtype).reshape(x.shape), (g * z).sum(0), g.sum(0)


def norm_add_norm(
    f: Tensor,
    x: Tensor,
    output_weight: Tensor | None,
    output_bias: Tensor | None,
    input_weight: Tensor | None,
    input_bias: Tensor | None,
    n: int,
    eps: float,
    rms: bool,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x_new = x + N_out(f)``, rounded once, ``u = N_in(x_new)``, and the statistics of both, (rows, 4)."""
    kind = RMS if rms else LAYER
    y, first = _normalise(matrix(f, n), output_weight, output_bias, eps, kind, offset)
    x_new = (matrix(x, n) + y).to(x.dtype)
    u, second = rows(x_new, input_weight, input_bias, n, eps, kind, offset)
    return x_new.reshape(x.shape), u.reshape(x.shape), torch.cat([first, second], 1)


def channels(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """The same over the channels of (samples, channels, space); statistics (samples * space, 2)."""
    a = x.transpose(1, 2)
    y, stats = rows(a.reshape(-1, a.shape[2]), weight, bias, a.shape[2], eps, RMS if rms else LAYER)
    return y.reshape(a.shape).transpose(1, 2).contiguous(), stats


def channels_backward(
    gy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of :func:`channels`."""
    a, g = x.transpose(1, 2), gy.transpose(1, 2)
    n = a.shape[2]
    gx, gw, gb = rows_backward(g.reshape(-1, n), a.reshape(-1, n), stats, weight, n, RMS if rms else LAYER)
    return gx.reshape(a.shape).transpose(1, 2).contiguous(), gw, gb
