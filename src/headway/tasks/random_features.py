"""Digits and a deep residual net: what its norms can do while its convolutions stay random, and what as many other weights can.

The smallest setting of "Training BatchNorm and Only BatchNorm" (2020, arXiv 2003.00152), with that paper's recipe:

    headway compare digits-random-features --arms "baseline,batchnorm-only,batchnorm-only(include_output=True),\\
        headway.learning:OutputOnly,headway.learning:RandomParametersOnly"
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from headway.learning.batchnorm_only.resnets import CIFARResNet
from headway.tasks.digits import Images, _sklearn_digits


class DigitsRandomFeatures(Images):
    """scikit-learn's digits and a :class:`headway.learning.CIFARResNet` of two stages; SGD with momentum and weight decay, whose rate
    is divided by ten at a half and at three quarters.

    Args:
        depth: blocks of each stage; the net has 2 + 4 * depth layers. width: of the first stage.
        gain: how batch norms start: "uniform" (U(0, 1), the paper's), "ones" or "signed".
    """

    name = "digits-random-features"
    batch_size = 128
    budget = "660 steps"
    learning_rate = 0.1

    def __init__(self, depth: int = 4, width: int = 16, gain: Literal["uniform", "ones", "signed"] = "uniform") -> None:
        super().__init__()
        if depth < 1 or width < 1:
            raise ValueError(f"depth and width are at least 1; they are {depth} and {width}")
        self.depth, self.width = depth, width
        self.gain: Literal["uniform", "ones", "signed"] = gain

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _sklearn_digits()

    def model(self, seed: int) -> nn.Module:
        return CIFARResNet(self.depth, self.width, 1, 10, 2, self.gain)

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.learning_rate, momentum=0.9, weight_decay=1e-4)

    def rate(self, progress: float) -> float:
        return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
