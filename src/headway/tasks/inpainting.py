"""Digits with holes: the smallest inpainting there is, for norms that know where an image is missing and norms that do not.

``hw.compare("digits-inpainting", {"batch norm": "baseline", "instance norm": InstanceNorms(), "region norm": hw.RegionNorm()})`` trains
the network of Yu et al., 2020 (arXiv 1911.10375), with each norm, from the same weights. On photographs: :mod:`headway.tasks.photos`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.surgery import Site, Technique
from headway.tasks.batches import Batches, generator_of
from headway.tasks.digits import _sklearn_digits
from headway.tasks.image_files import ImageFiles, taken
from headway.tasks.task import Task
from headway.vision.inpainting import InpaintingNet
from headway.vision.masks import irregular_masks

Batch = tuple[Tensor, Tensor, Tensor]
Fill = Literal["white", "random"]
_SIZE = 16


class Inpainting(Task):
    """Images with holes: L1 loss, five times as heavy in the hole; the metric is the peak signal-to-noise ratio (dB) of held-out images
    whose valid pixels are put back."""

    metric = "psnr"
    lower_is_better = False
    batch_size = 32
    budget = "300 steps"
    learning_rate = 2e-3
    fill: Fill = "white"

    def images(self) -> tuple[Tensor | ImageFiles, Tensor | ImageFiles]:
        """Training and held-out images (count, C, H, W) from 0 to 1."""
        raise NotImplementedError

    def masks(self) -> tuple[Tensor | ImageFiles, Tensor | ImageFiles, Tensor | None]:
        """Holes (count, 1, H, W) for training, of held-out images as large as in training, and larger ones, where there are such."""
        raise NotImplementedError

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=self.learning_rate)

    def train_batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        images, masks = self.images()[0], self.masks()[0]

        def take(index: Tensor) -> Batch:
            draw = generator_of(seed, index)
            chosen = taken(masks, torch.randint(len(masks), (len(index),), generator=draw), draw)
            fill = self._fill(len(index), draw)
            return taken(images, index, draw), chosen, fill

        return Batches(len(images), batch_size, seed, take)

    def _fill(self, count: int, draw: torch.Generator) -> Tensor:
        numbers = torch.rand(count, 1, 1, 1, generator=draw)
        return numbers if self.fill == "random" else torch.ones_like(numbers)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, masks, fill = batch
        found = model(torch.where(masks, fill, images), masks).float()
        return ((found - images).abs() * (1 + 4 * masks)).mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``psnr`` in dB with holes as large as in training, ``psnr_large`` with larger ones, of the composited images."""
        _, usual, large = self.masks()
        found = {"psnr": self._psnr(model, usual)}
        return found if large is None else {**found, "psnr_large": self._psnr(model, large)}

    def _psnr(self, model: nn.Module, masks: Tensor | ImageFiles) -> float:
        images, device = self.images()[1], next(model.parameters()).device
        fill = self._fill(len(images), torch.Generator().manual_seed(1))
        error, numbers = 0.0, 0
        for index in torch.arange(len(images)).split(120):
            image, mask = taken(images, index), taken(masks, index % len(masks))
            found = model(torch.where(mask, fill[index], image).to(device), mask.to(device)).float().cpu()
            error += float(((found - image).square() * mask).double().sum())
            numbers += image.numel()
        return float(-10 * torch.log10(torch.tensor(error / numbers)))


class DigitsInpainting(Inpainting):
    """scikit-learn's digits at 16x16 with irregular holes.

    Args:
        width, blocks: of :class:`headway.vision.inpainting.InpaintingNet`, with batch norms.
        share: of the image a training hole takes, from and to.
        fill: what a hole holds: 1 ("white") everywhere, or a "random" number an image, another one at every step.
        large: of the image that a held-out hole takes for ``psnr_large``: more than was trained.
    """

    name = "digits-inpainting"

    def __init__(
        self,
        width: int = 16,
        blocks: int = 2,
        share: tuple[float, float] = (0.1, 0.4),
        fill: Fill = "white",
        large: tuple[float, float] = (0.5, 0.7),
    ) -> None:
        check_fill(fill)
        self.width, self.blocks, self.fill = width, blocks, fill
        self.share, self.large = (share[0], share[1]), (large[0], large[1])
        self._data: tuple[Tensor, Tensor] | None = None
        self._masks: tuple[Tensor, Tensor, Tensor] | None = None

    def images(self) -> tuple[Tensor, Tensor]:
        if self._data is None:
            train, _, held_out, _ = _sklearn_digits()
            scaled = [
                F.interpolate((part + 1) / 2, scale_factor=2, mode="bilinear", align_corners=False)
                for part in (train, held_out)
            ]
            self._data = (scaled[0], scaled[1])
        return self._data

    def masks(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._masks is None:
            draw, held_out = torch.Generator().manual_seed(0), len(self.images()[1])
            counts = ((512, self.share), (held_out, self.share), (held_out, self.large))
            made = [irregular_masks(count, _SIZE, share, draw) for count, share in counts]
            self._masks = (made[0], made[1], made[2])
        return self._masks

    def model(self, seed: int) -> nn.Module:
        return InpaintingNet(1, self.width, self.blocks, norm="batch", fill=None)


def check_fill(fill: str) -> None:
    if fill not in ("white", "random"):
        raise ValueError(f'fill is "white" or "random"; it is {fill!r}')


@dataclass(frozen=True)
class InstanceNorms(Technique):
    """Every batch norm as an instance norm with the same gain and offset: the norm that inpainting networks have otherwise."""

    looks_for: ClassVar[str] = "nn.BatchNorm2d"

    def change(self, site: Site) -> nn.Module | None:
        old = site.module
        if type(old) is not nn.BatchNorm2d:
            return None
        new = nn.InstanceNorm2d(old.num_features, old.eps, affine=old.affine)
        if old.affine:
            new.weight, new.bias = old.weight, old.bias
        return new
