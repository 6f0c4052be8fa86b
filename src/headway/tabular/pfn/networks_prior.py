"""Priors made of random networks: the Bayesian neural network, and the mixture over architectures for small tables.

("Transformers Can Do Bayesian Inference", 2022, arXiv 2112.10510, sections 5 and 6.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ACTIVATIONS: dict[str, Any] = {"tanh": torch.tanh, "relu": torch.relu, "sin": torch.sin, "abs": torch.abs}


@dataclass(frozen=True)
class BNNPrior:
    """y = W_2 act(W_1 x + b_1) + b_2 + noise, all weights N(0, 1), x ~ N(0, I).

    The published code has no activation between its layers; ``activation=None`` is that.
    """

    hidden: int = 5
    activation: str | None = "tanh"
    noise: float = 0.0

    def __call__(self, batch: int, N: int, F: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        if self.activation is not None and self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation is None or one of {', '.join(_ACTIVATIONS)}, not {self.activation!r}")

        def normal(*size: int) -> Tensor:
            return torch.randn(batch, *size, generator=generator)

        x = normal(N, F)
        h = x @ normal(F, self.hidden) + normal(1, self.hidden)
        h = h if self.activation is None else _ACTIVATIONS[self.activation](h)
        y = (h @ normal(self.hidden, 1) + normal(1, 1))[..., 0]
        return x, y + self.noise * normal(N)


@dataclass(frozen=True)
class TabularPrior:
    """Random networks of random shape for small tables, the outcome cut into classes at its quantiles (two: at the median).

    Drawn once a batch: depth, width, activation, number of features. Drawn for each data set: weight scale, noise, sparsity of
    the first layer (which features matter), the scales of the features.

    Args:
        classes: 2 or more labels 0 ... classes - 1, or None for a number.
        max_depth, max_width: of the networks. min_features: fewest features drawn; F is the most.
    """

    classes: int | None = 2
    max_depth: int = 3
    max_width: int = 32
    min_features: int = 1

    def __call__(self, batch: int, N: int, F: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        def integer(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        def normal(*size: int) -> Tensor:
            return torch.randn(batch, *size, generator=generator)

        def uniform(*size: int) -> Tensor:
            return torch.rand(batch, *size, generator=generator)

        features = integer(min(self.min_features, F), F)
        depth, width = integer(1, self.max_depth), integer(2, max(2, self.max_width))
        activation = list(_ACTIVATIONS.values())[integer(0, len(_ACTIVATIONS) - 1)]
        # features that share a few hidden causes, as columns of real tables do
        causes = integer(1, features)
        x = normal(N, causes) @ normal(causes, features) / causes**0.5 + uniform(1, 1) * normal(N, features)
        kept = uniform(features, 1) < 0.2 + 0.8 * uniform(1, 1)
        gain = 0.5 + 2 * uniform(1, 1)
        h, size = torch.where(kept.mT, x, 0.0), features
        for _ in range(depth):
            h = activation(gain * (h @ normal(size, width) / size**0.5 + normal(1, width)))
            size = width
        y = (h @ normal(size, 1))[..., 0]
        y = (y - y.mean(1, keepdim=True)) / y.std(1, keepdim=True).clamp(min=1e-6)
        y = y + 0.5 * uniform(1).square() * normal(N)
        if self.classes is None:
            return x, y
        rank = y.argsort(1).argsort(1)
        label = (rank * self.classes).div(N, rounding_mode="floor")
        # which class is the first must not be a hint
        order = uniform(self.classes).argsort(1)
        return x, order.gather(1, label).float()
