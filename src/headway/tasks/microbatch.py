"""Digits one or two at a time: what a convolutional net with norms does when the batch is too small for batch norm.

The setting of Qiao et al., 2019 (arXiv 1903.10520), where detection and segmentation leave room for one image a device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from headway.tasks.digits import Images, _sklearn_digits


class DigitsMicroBatch(Images):
    """A plain net of seven convolutions with batch norms on scikit-learn's digits, plain SGD, batches of ``batch_size``.

    Args:
        batch_size: images a step. width: of the first convolutions.
    """

    name = "digits-microbatch"
    budget = "900 steps"
    learning_rate = 0.01

    def __init__(self, batch_size: int = 2, width: int = 24) -> None:
        super().__init__()
        if batch_size < 1 or width < 1:
            raise ValueError(f"batch_size and width are at least 1; they are {batch_size} and {width}")
        self.batch_size, self.width = batch_size, width

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _sklearn_digits()

    def model(self, seed: int) -> nn.Module:
        layers: list[nn.Module] = []
        before, width = 1, self.width
        for after, stride in (
            (width, 1),
            (width, 1),
            (width, 1),
            (2 * width, 2),
            (2 * width, 1),
            (2 * width, 1),
            (2 * width, 1),
        ):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.learning_rate, momentum=0.9)
