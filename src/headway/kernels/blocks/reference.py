"""Products of many small square blocks with wide matrices, plainly."""

from __future__ import annotations

import torch
from torch import Tensor


def block_product(W: Tensor, z: Tensor) -> Tensor:
    """W z: (K, n, n) and (K, n, P) -> (K, n, P)."""
    return torch.bmm(W, z)


def block_outer(a: Tensor, b: Tensor) -> Tensor:
    """a b^T: (K, n, P) twice -> (K, n, n)."""
    return torch.bmm(a, b.mT)


def color_blocks(x: Tensor, mean: Tensor, change: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """x + A z + shift and z z^T of z = x - mean: (K, n, P), (K, n), (K, n, n), (K, n) -> (K, n, P), (K, n, n), the latter float32 or
    wider, as are mean and shift."""
    z = x.to(mean.dtype) - mean[..., None]
    y = torch.bmm(change.to(x.dtype), z.to(x.dtype)).add_(x).add_(shift.to(x.dtype)[..., None])
    return y, torch.bmm(z, z.mT)
