"""Central moments in plain torch, in float64, over pieces small enough that no copy of the tensor ever stands in memory."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 1 << 18


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of the finite entries of ``x`` (N, C, S) around their mean.

    Returns:
        scalars: (8,) float64: count of finite entries, mean, sum (x - mean)^2, ^3, ^4, largest finite |x|, zeros, nonfinite.
        channels: (3, C) float64: count of finite entries, mean, sum (x - mean)^2 of every channel.
    """
    N, C, S = x.shape
    scalars = torch.zeros(8, dtype=torch.float64, device=x.device)
    channels = torch.zeros(3, C, dtype=torch.float64, device=x.device)
    rows = max(1, PIECE // max(1, C * S))
    for start in range(0, N, rows):
        for first in range(0, S, PIECE):
            piece = x[start : start + rows, :, first : first + PIECE]
            scalars, channels = combine((scalars, channels), _piece(piece.to(torch.float64)))
    return scalars, channels


def _piece(x: Tensor) -> tuple[Tensor, Tensor]:
    finite = torch.isfinite(x)
    x = torch.where(finite, x, 0.0)
    count, total = finite.sum((0, 2)).double(), x.sum((0, 2))
    mean = total / count.clamp(min=1)
    spread = torch.where(finite, x - mean[None, :, None], 0.0).square().sum((0, 2))
    n = count.sum()
    centre = total.sum() / n.clamp(min=1)
    d = torch.where(finite, x - centre, 0.0)
    square = d.square()
    zeros = ((x == 0) & finite).sum().double()
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    scalars = [n, centre, square.sum(), (square * d).sum(), square.square().sum(), largest, zeros, x.numel() - n]
    return torch.stack(scalars), torch.stack([count, mean, spread])


def combine(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The moments of two disjoint parts put together (Chan, Golub and LeVeque 1979; Pebay 2008)."""
    (na, ma, a2, a3, a4, la, za, fa), (nb, mb, b2, b3, b4, lb, zb, fb) = a[0], b[0]
    n = (na + nb).clamp(min=1)
    d = mb - ma
    scalars = torch.stack(
        [
            na + nb,
            ma + d * nb / n,
            a2 + b2 + d**2 * na * nb / n,
            a3 + b3 + d**3 * na * nb * (na - nb) / n**2 + 3 * d * (na * b2 - nb * a2) / n,
            a4
            + b4
            + d**4 * na * nb * (na**2 - na * nb + nb**2) / n**3
            + 6 * d**2 * (na**2 * b2 + nb**2 * a2) / n**2
            + 4 * d * (na * b3 - nb * a3) / n,
            torch.maximum(la, lb),
            za + zb,
            fa + fb,
        ]
    )
    (ca, xa, sa), (cb, xb, sb) = a[1], b[1]
    c = (ca + cb).clamp(min=1)
    step = xb - xa
    channels = torch.stack([ca + cb, xa + step * cb / c, sa + sb + step**2 * ca * cb / c])
    return scalars, channels
