"""ReLU and the bits of what it lets through, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.selu.reference import pack, unpack


def relu_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """``max(x, 0)`` and one bit an entry, in the order of the indices: set where the entry passes. NaN passes."""
    return torch.relu(x).contiguous(), pack(~(x <= 0))


def relu_bits_(x: Tensor) -> Tensor:
    """The same, over ``x`` itself; the bits alone are returned."""
    bits = pack(~(x <= 0))
    torch.relu_(x)
    return bits


def keep_bits(gy: Tensor, bits: Tensor) -> Tensor:
    """``gy`` where the bit is set, 0 elsewhere."""
    return torch.where(unpack(bits, gy.numel()).view(gy.shape), gy, 0).to(gy.dtype).contiguous()
