"""SELU, alpha dropout and its random bits in plain torch: the equations, and the bits that the C++ body draws, one by one."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def selu(x: Tensor, alpha: float, scale: float) -> Tensor:
    """``scale * x`` above 0, ``scale * alpha * (exp(x) - 1)`` elsewhere."""
    # expm1 of a large positive number is never wanted, and its infinity would make NaN gradients
    return scale * torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


def selu_backward(gy: Tensor, y: Tensor, alpha: float, scale: float) -> Tensor:
    """The gradient from the output alone: the slope is ``scale`` above 0 and ``y + scale * alpha`` elsewhere."""
    return gy * torch.where(y > 0, scale, y + scale * alpha)


def alpha_dropout(x: Tensor, kept: Tensor, gain: float, shift: float, low: float) -> Tensor:
    """``gain * x + shift`` where ``kept``, the constant ``gain * low + shift`` elsewhere. ``kept`` broadcasts."""
    return torch.where(kept, gain * x + shift, gain * low + shift)


def _int64(number: int) -> int:
    number &= 2**64 - 1
    return number - 2**64 if number >= 2**63 else number


def _mix(z: Tensor, shift: int) -> Tensor:
    return z ^ ((z >> shift) & (2 ** (64 - shift) - 1))


def kept_bits(n: int, seed: int, p: float) -> Tensor:
    """(n,) bool, True with probability 1 - p: SplitMix64 (Steele, Lea, Flood, 2014) of ``seed`` and the place.

    Every 64 bits serve two neighbouring entries, the lower half the first; an entry falls out where its half is below p * 2^32.
    """
    place = torch.arange(1, (n + 1) // 2 + 1, dtype=torch.int64)
    z = place * _int64(_GOLDEN) + _int64(seed)
    z = _mix(z, 30) * _int64(_FIRST)
    z = _mix(_mix(z, 27) * _int64(_SECOND), 31)
    halves = torch.stack([z & 0xFFFFFFFF, (z >> 32) & 0xFFFFFFFF], 1).flatten()[:n]
    return halves >= round(p * 2**32)


def pack(kept: Tensor) -> Tensor:
    """Eight bools a byte, the first in the lowest bit."""
    kept = kept.flatten()
    padded = torch.zeros(-(-kept.numel() // 8) * 8, dtype=torch.uint8, device=kept.device)
    padded[: kept.numel()] = kept
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=kept.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, n: int) -> Tensor:
    """The first ``n`` bools of :func:`pack`."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> places) & 1).bool().flatten()[:n]
