"""Irregular holes: strokes of a wandering brush, as in the mask sets that inpainting is trained and judged with.

Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", 2018, arXiv 1804.07723, collect such masks by the share
of the image they take; here they are drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor


def irregular_masks(
    count: int,
    size: int | tuple[int, int],
    share: tuple[float, float] = (0.1, 0.4),
    generator: torch.Generator | None = None,
) -> Tensor:
    """(count, 1, H, W) bool, True in the hole.

    A brush one to three sixteenths of the image wide walks straight on, turns now and then, and starts anew elsewhere, until the hole
    takes a share of the image that is drawn evenly from ``share``; the last stroke may make it a brush larger.

    Raises:
        ValueError: no image, or shares that are not 0 <= low <= high < 1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    low, high = share
    if count < 0 or min(height, width) < 1 or not 0 <= low <= high < 1:
        raise ValueError(f"masks need a size and shares 0 <= low <= high < 1; they are {height}x{width} and {share}")
    return (
        torch.stack([_one(height, width, low, high, generator) for _ in range(count)])
        if count
        else torch.zeros((0, 1, height, width), dtype=torch.bool)
    )


def _one(height: int, width: int, low: float, high: float, generator: torch.Generator | None) -> Tensor:
    hole = torch.zeros((height, width), dtype=torch.bool)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    side = max(height, width)

    def draw() -> float:
        return float(torch.rand((), generator=generator))

    wanted = (low + (high - low) * draw()) * height * width
    while hole.sum() < wanted:
        radius = max(0.5, side / 32 * (1 + 2 * draw()))
        y, x, angle = draw() * height, draw() * width, draw() * 2 * torch.pi
        for _ in range(int(4 + 8 * draw())):
            if hole.sum() >= wanted:
                break
            hole |= (rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 <= radius**2
            angle += (draw() - 0.5) * 1.5
            step = torch.tensor(angle)
            y, x = y + radius * float(step.sin()), x + radius * float(step.cos())
    return hole[None]
