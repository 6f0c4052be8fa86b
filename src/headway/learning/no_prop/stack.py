"""The same blocks trained by back-propagation, and the technique that turns them into NoProp-DT: what a comparison is made of.

    z_t = (1 - alpha_t) z_{t-1} + alpha_t u_t(z_{t-1}, x),  alpha_t = tanh(w_t),  z_0 ~ N(0, I),  loss = CE(head(z_T), y)

the baseline of arXiv 2503.24322 (2025). It is slow to start where w_t begins near 0 and the head at random; here alpha_t begins at
0.5 and the head at ten times the identity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.learning.no_prop.discrete import NoPropDT
from headway.surgery import Site, Technique


def confident_head(num_classes: int) -> nn.Linear:
    """A linear layer that begins by believing the probabilities it is given."""
    head = nn.Linear(num_classes, num_classes)
    with torch.no_grad():
        head.weight.copy_(10 * torch.eye(num_classes))
        head.bias.zero_()
    return head


class BackpropStack(nn.Module):
    """Blocks of (z (B, num_classes), x) -> logits, one after the other, for back-propagation from end to end.

    Args:
        blocks: as for NoPropDT with one-hot labels. num_classes: classes.

    Shapes:
        x: (B, ...) -> logits (B, num_classes).
    """

    def __init__(self, blocks: Iterable[nn.Module], num_classes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if not len(self.blocks):
            raise ValueError("a stack needs at least one block")
        self.num_classes = num_classes
        self.w = nn.Parameter(torch.full((len(self.blocks),), math.atanh(0.5)))
        self.head = confident_head(num_classes)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        like = self.head.weight
        z = torch.randn(len(x), self.num_classes, generator=generator, device=like.device, dtype=like.dtype)
        for block, alpha in zip(self.blocks, torch.tanh(self.w), strict=True):
            z = (1 - alpha) * z + alpha * block(z, x).softmax(1)
        return self.head(z)

    def local_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The cross entropy of the whole stack: nothing here is local."""
        return F.cross_entropy(self(x).float(), y)


@dataclass(frozen=True)
class NoProp(Technique):
    """Trains the blocks of a :class:`BackpropStack` by NoProp-DT instead: the same modules, each with a loss of its own.

    Args:
        eta: weight of the denoising loss.
    """

    looks_for: ClassVar[str] = "a headway.learning.BackpropStack"
    eta: float = 0.1

    def change(self, site: Site) -> nn.Module | None:
        stack = site.module
        if not isinstance(stack, BackpropStack):
            return None
        return NoPropDT.of_blocks(stack.blocks, stack.num_classes, eta=self.eta)
