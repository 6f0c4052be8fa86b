"""A task of your own: anything with a model, batches, a loss and a held-out measure.

    headway compare own_task:make_task --arms baseline,peri-ln --seeds 3        (run in this folder)

or from Python:

    import headway as hw
    print(hw.compare("own_task:make_task(depth=4)", ["baseline", "peri-ln"], budget="60s"))

This one learns to sort short sequences of digits with a ``torch.nn`` encoder.
"""

import torch
import torch.nn.functional as F
from torch import nn

from headway.tasks import Batches, Task


class Sorter(nn.Module):
    """Digits (batch, length) int64 -> logits (batch, length, 10) of the same digits in order."""

    def __init__(self, length: int, depth: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, dim)
        self.position = nn.Parameter(torch.randn(length, dim) * 0.1)
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, 10)

    def forward(self, digits: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(digits) + self.position))


class Sorting(Task):
    name = "sorting"
    metric = "accuracy"
    lower_is_better = False
    batch_size = 64
    budget = "300 steps"

    def __init__(self, length: int = 12, depth: int = 2, dim: int = 32) -> None:
        # Public plain attributes are the settings that tell one variant from another in the store.
        self.length, self.depth, self.dim = length, depth, dim
        generator = torch.Generator().manual_seed(0)
        self._digits = torch.randint(10, (20_000, length), generator=generator)

    def model(self, seed: int) -> nn.Module:
        return Sorter(self.length, self.depth, self.dim)

    def train_batches(self, seed: int, batch_size: int):
        # The k-th batch depends on the seed and k alone, so that an interrupted run goes on with the batches it would have seen.
        return Batches(len(self._digits) - 512, batch_size, seed, lambda index: self._digits[index])

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(batch).float().flatten(0, 1), batch.sort(dim=1).values.flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        held_out = self._digits[-512:].to(next(model.parameters()).device)
        right = model(held_out).argmax(-1) == held_out.sort(dim=1).values
        return {"accuracy": 100 * right.double().mean().item()}


def make_task(length: int = 12, depth: int = 2, dim: int = 32) -> Sorting:
    """What ``own_task:make_task`` names."""
    return Sorting(length, depth, dim)
