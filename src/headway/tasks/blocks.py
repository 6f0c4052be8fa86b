"""Digits and a stack of blocks that each see the image: back-propagation from end to end against rules that train blocks apart.

``hw.compare("digits-blocks", ["baseline", "no-prop"])`` trains the same blocks by back-propagation and by NoProp (arXiv 2503.24322,
2025). A step of NoProp trains one block of the stack, a step of back-propagation all of them: compare by seconds, or give NoProp
``depth`` times the steps.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from headway.learning.no_prop.blocks import ConditionalBlock, dense_encoder
from headway.learning.no_prop.stack import BackpropStack
from headway.tasks.digits import Images, _sklearn_digits


class Learner(nn.Module):
    """The stack under test: its training loss where labels are given, its logits otherwise."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is not None:
            return self.stack.local_loss(images, labels)  # type: ignore[operator]
        # the same noise at every evaluation
        return self.stack(images, generator=torch.Generator(images.device).manual_seed(0))


class DigitsBlocks(Images):
    """scikit-learn's digits and a stack of dense blocks that each see the whole image. Runs in one process.

    Args:
        depth, width: blocks and their width.
    """

    name = "digits-blocks"
    batch_size = 128
    budget = "20 s"
    learning_rate = 1e-3

    def __init__(self, depth: int = 10, width: int = 128) -> None:
        super().__init__()
        if depth < 1 or width < 2:
            raise ValueError(f"depth is at least 1 and width at least 2; they are {depth} and {width}")
        self.depth, self.width = depth, width

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _sklearn_digits()

    def model(self, seed: int) -> nn.Module:
        blocks = [ConditionalBlock(*dense_encoder(64, self.width), 10, self.width) for _ in range(self.depth)]
        return Learner(BackpropStack(blocks, 10))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(*batch)

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        # a block that had no turn has no gradient, and is passed over: neither decay nor momentum moves it
        return torch.optim.AdamW(params, lr=self.learning_rate, weight_decay=1e-3)
