"""Tables of numbers with classes: scikit-learn's digits, breast cancer, wine and iris (embedded), and a plain deep network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.tasks.batches import Batches
from headway.tasks.task import Task

Name = Literal["digits", "breast-cancer", "wine", "iris"]
Norm = Literal["none", "batch", "layer"]
_LOADERS = {"digits": "load_digits", "breast-cancer": "load_breast_cancer", "wine": "load_wine", "iris": "load_iris"}
_NORMS = {"none": None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


def load_table(data: Name, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training features (standardised, float32) and classes, then the held-out fifth, standardised by the training part.

    Raises:
        ValueError: an unknown table.
    """
    import sklearn.datasets

    if data not in _LOADERS:
        raise ValueError(f"there is no table {data!r}; it is one of {', '.join(_LOADERS)}")
    features, classes = getattr(sklearn.datasets, _LOADERS[data])(return_X_y=True)
    x = torch.from_numpy(np.asarray(features, np.float64))
    y = torch.from_numpy(np.asarray(classes, np.int64))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held_out, train = order[: len(x) // 5], order[len(x) // 5 :]
    mean, spread = x[train].mean(0), x[train].std(0, correction=0)
    x = ((x - mean) / torch.where(spread > 1e-12, spread, 1.0)).float()
    return x[train], y[train], x[held_out], y[held_out]


def mlp(inputs: int, outputs: int, depth: int, width: int, norm: Norm = "none") -> nn.Sequential:
    """``depth`` hidden layers of linear, norm (if any) and ReLU with the He start, then a linear layer."""
    layers: list[nn.Module] = []
    for i in range(depth):
        linear = nn.Linear(inputs if i == 0 else width, width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        kind = _NORMS[norm]
        layers += [linear, *([] if kind is None else [kind(width)]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width if depth else inputs, outputs))


class Table(Task):
    """A table and a deep fully connected network, trained by SGD at a constant rate.

    Args:
        data: "digits", "breast-cancer", "wine" or "iris".
        depth, width, norm: of the network; norm is "none", "batch" or "layer", in front of every ReLU.
        samples: train on so many rows only (0: all of them).
        noise: share of training labels drawn anew at random.
        learning_rate: of SGD without momentum.
    """

    name = "table"
    metric = "accuracy"
    lower_is_better = False
    budget = "600 steps"

    def __init__(
        self,
        data: Name = "digits",
        depth: int = 8,
        width: int = 64,
        norm: Norm = "none",
        samples: int = 0,
        noise: float = 0.0,
        learning_rate: float = 0.01,
    ) -> None:
        if norm not in _NORMS:
            raise ValueError(f"norm is none, batch or layer; it is {norm!r}")
        if data not in _LOADERS:
            raise ValueError(f"there is no table {data!r}; it is one of {', '.join(_LOADERS)}")
        if not 0 <= noise <= 1 or samples < 0 or depth < 0 or width < 1 or not 0 < learning_rate < math.inf:
            raise ValueError(
                f"noise lies in [0, 1], samples and depth are at least 0, width at least 1, learning_rate above 0; they are "
                f"{noise}, {samples}, {depth}, {width}, {learning_rate}"
            )
        self.data: Name = data
        self.norm: Norm = norm
        self.depth, self.width, self.samples = depth, width, samples
        self.noise, self.learning_rate = noise, learning_rate
        self._held: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training features and (noisy) classes, then the held-out ones."""
        if self._held is None:
            x, y, test_x, test_y = load_table(self.data)
            count = min(self.samples, len(x)) if self.samples else len(x)
            x, y = x[:count], y[:count].clone()
            random = torch.Generator().manual_seed(1)
            wrong = torch.rand(count, generator=random) < self.noise
            y[wrong] = torch.randint(int(test_y.max()) + 1, (count,), generator=random)[wrong]
            self._held = x, y, test_x, test_y
        return self._held

    def model(self, seed: int) -> nn.Module:
        x, _, _, test_y = self.load()
        return mlp(x.shape[1], int(test_y.max()) + 1, self.depth, self.width, self.norm)

    def train_batches(self, seed: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.load()[:2]
        return Batches(len(x), min(batch_size, len(x)), seed, lambda index: (x[index], y[index]))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``accuracy`` in percent and ``loss`` in nats over the held-out rows."""
        x, y = self.load()[2:]
        logits = model(x.to(next(model.parameters()).device)).float().cpu()
        right = (logits.argmax(1) == y).double().mean()
        return {"accuracy": 100 * float(right), "loss": float(F.cross_entropy(logits, y))}

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.learning_rate)

    def rate(self, progress: float) -> float:
        return 1.0
