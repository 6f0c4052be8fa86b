"""What scaled long skips are to bound: how far features grow through a network, and how far noise in its input moves its output.

    growth  E|F(x)|^2 / E|x|^2            1 + sum_i s_i^2 for sums of N skips over variance-preserving blocks
    gain    E|F(x + e) - F(x)| / |e|      at most sum_i s_i M^i + c for blocks that stretch by at most M

(arXiv 2310.13545.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from headway.residual.equivalence import output_of, unpacked


def perturbation_gain(
    model: nn.Module, x: Any, eps: float = 1e-3, n: int = 16, generator: torch.Generator | None = None
) -> float:
    """How much longer a small change of the input becomes on its way: the mean of |F(x + e) - F(x)| / |e| over samples and draws.

    Args:
        model: in evaluation mode while it is measured; its mode is put back.
        x: what it is called with, a tensor or a tuple of arguments; noise is added to the first, (B, ...).
        eps: standard deviation of the Gaussian noise e.
        n: draws.

    Raises:
        ValueError: eps is not positive, n < 1, or the batch is empty.
    """
    args, kwargs = unpacked(x)
    first = args[0] if args else None
    if eps <= 0 or n < 1 or not isinstance(first, torch.Tensor) or first.numel() == 0:
        raise ValueError(
            f"noise needs eps > 0 and n >= 1, and a tensor of at least one sample as the first input; eps={eps}, n={n} and "
            f"{'no tensor' if not isinstance(first, torch.Tensor) else tuple(first.shape)} were given"
        )
    before = output_of(model, *args, **kwargs)
    total = 0.0
    for _ in range(n):
        e = eps * torch.randn(first.shape, generator=generator, dtype=first.dtype, device=first.device)
        moved = (output_of(model, first + e, *args[1:], **kwargs) - before).flatten(1).norm(dim=1)
        total += (moved / e.flatten(1).norm(dim=1)).mean().item()
    return total / n


def feature_growth(model: nn.Module, x: Any) -> float:
    """E|F(x)|^2 / E|x|^2, by the elements of the output and of the first input.

    Args:
        model: in evaluation mode while it is measured; its mode is put back.
        x: what it is called with, a tensor or a tuple of arguments.
    """
    args, kwargs = unpacked(x)
    return (output_of(model, *args, **kwargs).square().mean() / args[0].square().mean()).item()
