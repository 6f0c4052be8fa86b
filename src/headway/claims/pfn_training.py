"""What the claims of prior-data fitted networks share: priors, a trained network, and the density of a normal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headway.tabular.pfn.bars import BarDistribution
from headway.tabular.pfn.network import PFN
from headway.tabular.pfn.priors import GPHyperPrior, GPPrior
from headway.tabular.pfn.training import center_encoders_, train_pfn

KEY = "pfn"
FIXED = GPPrior(noise=0.05)
HYPER = GPHyperPrior(noise=(2.0, 20.0))
"""The paper's noise prior Gamma(1e-4, 1) is almost surely 0, where no Monte Carlo chain moves; this one is common to all sides."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(
    prior: Any,
    features: int,
    borders: Tensor,
    shape: tuple[int, int],
    steps: int,
    batch: int,
    contexts: int,
    queries: int,
    lr: float,
) -> tuple[PFN, float]:
    """A network of ``shape`` (width, layers) trained on contexts of up to ``contexts`` - 1 rows, and the seconds it took."""
    torch.manual_seed(0)
    model = center_encoders_(PFN(features, BarDistribution(borders.float()), *shape), prior)
    with torch.enable_grad():
        taken = seconds(lambda: train_pfn(model, prior, steps, batch, contexts, lr, queries=queries))
    return model, taken


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def normal_nll(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return 0.5 * ((y - mean).square() / variance + (2 * math.pi * variance).log())
