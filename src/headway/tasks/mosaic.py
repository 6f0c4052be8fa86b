"""Four digits side by side, and for every pixel which digit it is of: segmentation with one image a step.

The smallest task of the kind that Batch-Channel Normalization was made for (Qiao et al., 2019, arXiv 1903.10520: detection and
segmentation leave room for one or two images a device).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headway.tasks.digits import _sklearn_digits
from headway.tasks.microbatch import DigitsMicroBatch

BACKGROUND = 10


class DigitsMosaic(DigitsMicroBatch):
    """Mosaics of 2 x 2 digits, 16 x 16 pixels, each pixel one of ten digits or background; a plain net of seven convolutions with batch
    norms, plain SGD. The metric is the mean over classes of intersection over union, in percent.

    Args:
        batch_size: mosaics a step. width: of the first convolutions.
    """

    name = "digits-mosaic"
    metric = "iou"

    def __init__(self, batch_size: int = 1, width: int = 24) -> None:
        super().__init__(batch_size, width)

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images, labels, held_out, marks = _sklearn_digits()
        return *_mosaics(images, labels, 4), *_mosaics(held_out, marks, 1)

    def model(self, seed: int) -> nn.Module:
        layers: list[nn.Module] = []
        before, width = 1, self.width
        for after, stride in [(width, 1)] * 2 + [(2 * width, 2)] + [(2 * width, 1)] * 4:
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        return nn.Sequential(
            *layers, nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(before, BACKGROUND + 1, 1)
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``iou`` and ``accuracy`` of the pixels in percent, ``loss`` in nats a pixel, over the held-out mosaics."""
        images, labels = self.data()[2:]
        device = next(model.parameters()).device
        logits = torch.cat([model(part.to(device)).float().cpu() for part in images.split(64)])
        loss, found = nn.functional.cross_entropy(logits, labels), logits.argmax(1)
        shares = []
        for kind in range(BACKGROUND + 1):
            ours, theirs = found == kind, labels == kind
            shares.append(float((ours & theirs).sum()) / max(1, int((ours | theirs).sum())))
        return {
            "iou": 100 * sum(shares) / len(shares),
            "accuracy": 100 * float((found == labels).double().mean()),
            "loss": float(loss),
        }


def _mosaics(images: Tensor, labels: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """All digits, four to a mosaic, ``rounds`` times in another order: (count, 1, 16, 16), and the label of every pixel."""
    draw = torch.Generator().manual_seed(0)
    count = len(images) // 4
    order = torch.cat([torch.randperm(len(images), generator=draw)[: 4 * count] for _ in range(rounds)])
    ink = images[order, 0] > -0.5
    marks = torch.where(ink, labels[order, None, None], BACKGROUND)

    def beside(tiles: Tensor) -> Tensor:  # (4 * n, 8, 8) -> (n, 16, 16)
        return tiles.reshape(-1, 2, 2, 8, 8).transpose(2, 3).reshape(-1, 16, 16)

    return beside(images[order, 0])[:, None], beside(marks)
