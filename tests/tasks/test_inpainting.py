"""Digits with holes: what is measured, what fills a hole, and norms that can be exchanged from the same weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import headway as hw
from headway.norms import RegionNormB2d, RegionNormL2d
from headway.tasks.inpainting import DigitsInpainting, InstanceNorms


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, image, mask):
        return self.value.expand(image.shape)


@pytest.fixture(scope="module")
def task():
    return DigitsInpainting(4, 1)


def test_psnr_is_that_of_the_composited_held_out_images(task):
    images, masks = task.images()[1], task.masks()
    found = task.evaluate(Constant(0.25))
    for name, mask in (("psnr", masks[1]), ("psnr_large", masks[2])):
        composited = torch.where(mask, 0.25, images)
        error = float((composited - images).double().square().mean())
        assert found[name] == pytest.approx(-10 * math.log10(error), abs=1e-4)
    shares = [float(m.double().mean()) for m in masks]
    assert 0.1 < shares[0] < 0.4 and abs(shares[0] - shares[1]) < 0.03 and 0.5 < shares[2] < 0.7


def test_the_hole_weighs_five_times_as_much_in_the_loss(task):
    images, masks, fill = next(task.train_batches(0, 8))
    assert (fill == 1).all() and images.min() >= 0 and images.max() <= 1
    wanted = ((images - 0.25).abs() * torch.where(masks, 5.0, 1.0)).mean()
    torch.testing.assert_close(task.loss(Constant(0.25), (images, masks, fill)), wanted)


def test_a_random_fill_is_another_number_in_every_image():
    task = DigitsInpainting(4, 1, fill="random")
    seen = []

    class Looks(Constant):
        def forward(self, image, mask):
            seen.append([row[m].unique().tolist() for row, m in zip(image, mask, strict=True)])
            return super().forward(image, mask)

    task.loss(Looks(0.5), next(task.train_batches(0, 6)))
    assert all(len(numbers) == 1 for numbers in seen[0]) and len({n[0] for n in seen[0]}) == 6
    with pytest.raises(ValueError, match="fill is"):
        DigitsInpainting(fill="grey")  # type: ignore[arg-type]


def test_the_arms_start_from_the_same_convolutions(task):
    torch.manual_seed(0)
    plain = task.model(0)
    images, masks, _ = next(task.train_batches(0, 4))
    for technique, early, late in (
        (InstanceNorms(), nn.InstanceNorm2d, nn.InstanceNorm2d),
        (hw.RegionNorm(), RegionNormB2d, RegionNormL2d),
        (hw.RegionNorm(late=()), RegionNormB2d, nn.BatchNorm2d),
    ):
        changed = hw.apply(plain, technique, copy=True)
        assert torch.equal(changed.encoder[1].weight, plain.encoder[1].weight)
        task.loss(changed, (images, masks, torch.ones(4, 1, 1, 1))).backward()
        assert type(changed.encoder[2]) is early and type(changed.decoder[2]) is late
