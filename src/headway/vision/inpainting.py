"""Inpainting: a network that fills the hole of an image, with region normalisation where its holes are known and where they are not.

    x = where(mask, 1, image)                                  the hole is filled with a constant
    encoder:  conv 7, conv 4 stride 2, conv 4 stride 2         each with RN-B (given the mask) and ReLU
    middle:   dilated residual blocks                          with RN-L, which finds what is filled by itself
    decoder:  two times conv 3 and pixel shuffle               with RN-L and ReLU, then conv 7
    y = (tanh(.) + 1) / 2

Yu et al., "Region Normalization for Image Inpainting", AAAI 2020, arXiv 1911.10375: the generator of EdgeConnect (Nazeri et al., 2019,
arXiv 1901.00212) with its instance norms replaced. ``norm="instance"`` or ``"batch"`` is the same network with ordinary norms, and
state of the released network loads. For images with missing pixels whose place is known. On photographs and masks of yours, from
folders to a picture on disk: ``examples/inpaint_photos.py``.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headway.norms.holes import hole_of, region_mask
from headway.norms.region import AffineMode, EpsMode, RegionNormB2d, RegionNormL2d, Statistics

Norm = Literal["region", "instance", "batch"]
# where the released network keeps what the encoder holds here
_RELEASED = {
    "encoder_conv1": "1", "encoder_in1": "2", "encoder_conv2": "4", "encoder_in2": "5", "encoder_conv3": "7", "encoder_in3": "8",
}  # fmt: skip


class InpaintingNet(nn.Module):
    """Fills holes: (image, mask) -> image.

    Args:
        channels: of the image. width: of the first convolution, doubled twice. blocks: residual ones. dilation: of their first convolution.
        norm: "region" (RN-B in the encoder, RN-L behind it), "instance" or "batch".
        fill: what the hole is filled with before the first convolution; None leaves what the image holds there.
        threshold: of RN-L.
        stats, eps_mode, affine_mode: of region norms; the released network has stats="batch", eps_mode="released" and
            affine_mode="released".

    Shapes:
        image and output: (B, channels, H, W) with values from 0 to 1, H and W multiples of 4 above 4 * dilation (and 4).
        mask: (B, H, W) or (B, 1, H, W), True or 1 in the hole.

    Raises:
        ValueError: a setting out of its range, an image of another shape, or a mask that does not fit.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        blocks: int = 8,
        dilation: int = 2,
        norm: Norm = "region",
        fill: float | None = 1.0,
        threshold: float = 0.8,
        stats: Statistics = "instance",
        eps_mode: EpsMode = "plain",
        affine_mode: AffineMode = "paper",
    ) -> None:
        super().__init__()
        if norm not in ("region", "instance", "batch"):
            raise ValueError(f'norm is "region", "instance" or "batch"; it is {norm!r}')
        if min(channels, width, dilation) < 1 or blocks < 0:
            raise ValueError(
                f"channels, width and dilation are at least 1 and blocks at least 0; they are {channels}, {width}, {dilation} and {blocks}"
            )
        self.channels, self.dilation, self.fill = channels, dilation, fill
        plain = nn.InstanceNorm2d if norm == "instance" else nn.BatchNorm2d
        shared: dict[str, Any] = {"stats": stats, "eps_mode": eps_mode}

        def early(features: int) -> nn.Module:
            return RegionNormB2d(features, affine_mode=affine_mode, **shared) if norm == "region" else plain(features)

        def late(features: int) -> nn.Module:
            return RegionNormL2d(features, threshold, **shared) if norm == "region" else plain(features)

        deep = 4 * width
        self.encoder = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(channels, width, 7), early(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), early(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, deep, 4, stride=2, padding=1), early(deep), nn.ReLU(),
        )  # fmt: skip
        self.middle = nn.Sequential(*(_Block(deep, dilation, late(deep), late(deep)) for _ in range(blocks)))
        self.decoder = nn.Sequential(
            nn.Conv2d(deep, 8 * width, 3, padding=1), nn.PixelShuffle(2), late(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.PixelShuffle(2), late(width), nn.ReLU(),
            nn.ReflectionPad2d(3), nn.Conv2d(width, channels, 7),
        )  # fmt: skip

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        self._check(image)
        hole = hole_of(mask)
        if (hole.shape[0], *hole.shape[1:]) != (image.shape[0], *image.shape[2:]):
            raise ValueError(f"the mask {tuple(mask.shape)} is not of the size of the image {tuple(image.shape)}")
        if self.fill is not None:
            image = torch.where(hole[:, None], self.fill, image)
        with region_mask(self, hole):
            filled = self.decoder(self.middle(self.encoder(image)))
        return (torch.tanh(filled) + 1) / 2

    def _check(self, image: Tensor) -> None:
        if image.dim() != 4 or image.shape[1] != self.channels:
            raise ValueError(f"the image must be (B, {self.channels}, H, W); it has the shape {tuple(image.shape)}")
        least = 4 * max(self.dilation, 1) + 4
        if any(side % 4 or side < least for side in image.shape[2:]):
            raise ValueError(
                f"height and width must be multiples of 4 from {least} on; they are {image.shape[2]} and {image.shape[3]}"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in [name for name in state_dict if name.startswith(f"{prefix}encoder_")]:
            part, _, entry = name.removeprefix(prefix).partition(".")
            if part in _RELEASED:
                state_dict[f"{prefix}encoder.{_RELEASED[part]}.{entry}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Block(nn.Module):
    """x + norm(conv(relu(norm(dilated conv(x)))))."""

    def __init__(self, features: int, dilation: int, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(dilation), nn.Conv2d(features, features, 3, dilation=dilation), first, nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(features, features, 3), second,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


@torch.no_grad()
def inpaint(model: nn.Module, image: Tensor, mask: Tensor) -> Tensor:
    """The image with its hole filled by a model in evaluation mode; every valid pixel is the very number it was.

    Args:
        model: :class:`InpaintingNet`, or any module that takes (image, mask), or one that takes the image alone, which is then filled
            with 1 and whose RN-B layers get the mask.
        image: (B, C, H, W); what it holds in the hole (NaN, say) is not looked at.
        mask: (B, H, W) or (B, 1, H, W), True or 1 in the hole.

    Raises:
        ValueError: a mask that does not fit, or a model that gives another shape.
    """
    hole = hole_of(mask)[:, None]
    if hole.shape[0] != image.shape[0] or hole.shape[2:] != image.shape[2:]:
        raise ValueError(f"the mask {tuple(mask.shape)} is not of the size of the image {tuple(image.shape)}")
    blank = torch.where(hole, 1, image)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with region_mask(model, hole):
            filled = model(blank, hole) if _takes_mask(model) else model(blank)
    finally:
        for module, mode in modes:
            module.training = mode
    if filled.shape != image.shape:
        raise ValueError(f"the model gave {tuple(filled.shape)} for an image {tuple(image.shape)}")
    return torch.where(hole, filled.to(image.dtype), image)


def _takes_mask(model: nn.Module) -> bool:
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in positional for kind in kinds) > 1 or inspect.Parameter.VAR_POSITIONAL in kinds
