"""Holes: strokes of a wandering brush, as in the mask sets that inpainting is trained and judged with, and rectangles.

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

    def draw(scale: float = 1.0) -> Tensor:
        return torch.rand(count, generator=generator) * scale

    hole = torch.zeros((count, height, width), dtype=torch.bool)
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    wanted = (low + (high - low) * draw()) * (height * width)
    y, x, angle, radius, steps = (torch.zeros(count) for _ in range(5))
    while (short := hole.sum((1, 2)) < wanted).any():
        fresh = steps <= 0  # a new stroke begins
        thick = (1 + draw(2)) * (max(height, width) / 32)
        starts = (draw(height), draw(width), draw(2 * torch.pi), thick.clamp(min=0.75), 4 + draw(8))
        for now, start in zip((y, x, angle, radius, steps), starts, strict=True):
            now.copy_(torch.where(fresh, start, now))
        away = (rows - y[:, None, None]).square() + (columns - x[:, None, None]).square()
        hole |= (away <= radius[:, None, None].square()) & short[:, None, None]
        angle += draw(1.5) - 0.75
        y += radius * angle.sin()
        x += radius * angle.cos()
        steps -= 1
    return hole[:, None]


def rectangular_masks(
    count: int,
    size: int | tuple[int, int],
    number: tuple[int, int] = (2, 5),
    generator: torch.Generator | None = None,
) -> Tensor:
    """(count, 1, H, W) bool, True in the hole: some rectangles an image, which may overlap.

    Their number is drawn from ``number``, both ends included, their sides from an eighth to three eighths of the image's.

    Raises:
        ValueError: no image, or numbers that are not 1 <= low <= high.
    """
    height, width = (size, size) if isinstance(size, int) else size
    low, high = number
    if count < 0 or min(height, width) < 1 or not 1 <= low <= high:
        raise ValueError(f"masks need a size and 1 <= low <= high rectangles; they are {height}x{width} and {number}")
    many = torch.randint(low, high + 1, (count, 1), generator=generator)
    inside = []
    for side in (height, width):
        long = ((0.125 + 0.25 * torch.rand(count, high, generator=generator)) * side).round().clamp(min=1)
        start = (torch.rand(count, high, generator=generator) * (side - long + 1)).floor()
        place = torch.arange(side)
        inside.append((place >= start[..., None]) & (place < (start + long)[..., None]))
    rows, columns = inside
    used = (torch.arange(high) < many)[..., None, None]
    return (rows[..., None] & columns[..., None, :] & used).any(1, keepdim=True)
