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
