"""Masks of holes: checked, brought to the size of a feature map, and handed to all layers of a model that take one.

A mask marks invalid pixels: 1 (or True) in the hole, 0 where an image is valid. It is never differentiated, and resized by nearest
neighbour, so that it stays what it is made of; after that a sample may have no hole left, or nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def hole_of(mask: Tensor, soft: bool = False, hole_value: int = 1) -> Tensor:
    """(B, h, w): True in the hole; with ``soft`` its weight from 0 to 1, unless the mask is bool. Never differentiated.

    Args:
        mask: (B, h, w) or (B, 1, h, w), bool or numbers; ``hole_value`` (0 or 1) is what it holds in a hole.

    Raises:
        ValueError: another shape, or values other than 0 and 1 (with ``soft``: outside 0 to 1).
    """
    if mask.dim() == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    elif mask.dim() != 3:
        raise ValueError(f"the mask must be (B, H, W) or (B, 1, H, W); it has the shape {tuple(mask.shape)}")
    mask = mask.detach()
    if mask.dtype == torch.bool:
        return mask if hole_value == 1 else ~mask
    right = (mask >= 0) & (mask <= 1) if soft else (mask == 0) | (mask == 1)
    wanted = "from 0 to 1" if soft else "0 or 1 (soft=True takes weights between them)"
    if torch.compiler.is_compiling():
        torch._assert_async(right.all(), f"a mask holds {wanted}")
    elif not bool(right.all()):
        raise ValueError(f"a mask holds {wanted}; this one has other values")
    if soft:
        weight = mask.to(torch.promote_types(mask.dtype, torch.float32))
        return weight if hole_value == 1 else 1 - weight
    return mask == hole_value


def resize(hole: Tensor, size: tuple[int, int]) -> Tensor:
    """The hole (B, h, w) at another size, by nearest neighbour, so that it stays what it is made of."""
    if tuple(hole.shape[1:]) == tuple(size):
        return hole
    numbers = hole.to(torch.uint8) if hole.dtype == torch.bool else hole
    return F.interpolate(numbers[:, None], size=size, mode="nearest")[:, 0].to(hole.dtype)


def fitting(hole: Tensor, x: Tensor) -> Tensor:
    """The hole at the size and on the device of a feature map (B, C, H, W).

    Raises:
        ValueError: the batch has another size, or the mask no pixel.
    """
    if hole.shape[0] != x.shape[0]:
        raise ValueError(f"the mask is of {hole.shape[0]} samples and the input of {x.shape[0]}")
    if 0 in hole.shape[1:] and x.numel():
        raise ValueError(f"the mask has no pixel: its shape is {tuple(hole.shape)}")
    return resize(hole.to(x.device), (x.shape[2], x.shape[3]))


class TakesMask(nn.Module):
    """A layer that takes a mask as an argument, or from :func:`region_mask`."""

    hole_value: int = 1
    soft: bool = False
    _given: SharedMask | None = None

    def hole(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, W): the hole for an input (B, C, H, W), from an argument or else from the context.

        Raises:
            RuntimeError: there is neither. ValueError: a mask that does not fit.
        """
        if mask is not None:
            return fitting(hole_of(mask, self.soft, self.hole_value), x)
        if self._given is None:
            raise RuntimeError(
                "no mask was given; call the layer with one, or the model inside `with region_mask(model, mask):`"
            )
        return self._given.at(x, self.soft, self.hole_value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_given": None}  # the mask of a pass is no part of the layer


class SharedMask:
    """The mask of a context, resized once for every size, convention and device that asks."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.known: dict[tuple[Any, ...], Tensor] = {}

    def at(self, x: Tensor, soft: bool, hole_value: int) -> Tensor:
        key = (x.shape[0], x.shape[2], x.shape[3], x.device, soft, hole_value)
        if key not in self.known:
            self.known[key] = fitting(hole_of(self.mask, soft, hole_value), x)
        return self.known[key]


@contextmanager
def region_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Within it, every layer inside ``model`` that takes a mask (RN-B) and is called without one takes this one.

    A model without such layers is left alone. With gradient checkpointing the backward belongs into the block too.

    Raises:
        ValueError: at the first layer, for a mask it cannot take.
    """
    shared = SharedMask(mask)
    layers = [module for module in model.modules() if isinstance(module, TakesMask)]
    before = [layer._given for layer in layers]
    for layer in layers:
        layer._given = shared
    try:
        yield
    finally:
        for layer, former in zip(layers, before, strict=True):
            layer._given = former
