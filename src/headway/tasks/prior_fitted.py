"""A prior-data fitted network on a Gaussian process: how near to the exact posterior a short training comes.

("Transformers Can Do Bayesian Inference", 2022, arXiv 2112.10510.) The best possible loss is known, so that the measure is the distance
from the truth in nats, which no run can make negative but by the noise of the held-out tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from headway.tabular.pfn.bars import BarDistribution
from headway.tabular.pfn.network import PFN
from headway.tabular.pfn.priors import GPPrior
from headway.tabular.pfn.training import Batch, Draws
from headway.tasks.task import Task


class _Stream(Iterator[Batch]):
    """The draws in order; ``skip`` passes over some at no cost."""

    def __init__(self, draws: Draws) -> None:
        self.draws, self.position = draws, 0

    def skip(self, steps: int) -> None:
        self.position += steps

    def __next__(self) -> Batch:
        self.position += 1
        return self.draws[self.position - 1]


class PriorFittedRegression(Task):
    """One-dimensional regression under a Gaussian process with an RBF kernel, N rows a data set.

    Args:
        width, layers, bars: of the network.
        seq_len: N. noise: variance of the outcomes' noise.
    """

    name = "prior-fitted-regression"
    metric = "gap"
    budget = "300 steps"
    learning_rate = 2e-3

    def __init__(
        self, width: int = 48, layers: int = 3, bars: int = 150, seq_len: int = 16, noise: float = 0.05
    ) -> None:
        self.width, self.layers, self.bars, self.seq_len, self.noise = width, layers, bars, seq_len, noise

    def _prior(self) -> GPPrior:
        return GPPrior(noise=self.noise)

    def model(self, seed: int) -> nn.Module:
        # equal widths: the wide outermost bars of equal masses would cost more than a short training leaves
        borders = torch.linspace(-4.5, 4.5, self.bars + 1) * math.sqrt(1 + self.noise)
        return PFN(1, BarDistribution(borders), self.width, self.layers, 2)

    def train_batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        return _Stream(Draws(self._prior(), batch_size, self.seq_len, 1, seed))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y, x_q, y_q = batch
        return _network(model).loss(model(x, y, x_q), y, y_q)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``nll`` and ``gap``, its distance from the exact posterior, in nats over 1,000 data sets for n = 0, N/4, N/2, N - 1."""
        prior, device = self._prior(), next(model.parameters()).device
        ours, gaps = [], []
        for n in (0, self.seq_len // 4, self.seq_len // 2, self.seq_len - 1):
            x, y = prior(1000, n + 1, 1, torch.Generator().manual_seed(1_000_003 + n))
            mean, variance = prior.posterior(x[:, :n], y[:, :n], x[:, n:])
            exact = 0.5 * ((y[:, n:] - mean).square() / variance + (2 * math.pi * variance).log()).mean()
            out = model(x[:, :n].to(device), y[:, :n].to(device), x[:, n:].to(device))
            nll = _network(model).head.nll(out, y[:, n:].to(device)).mean()
            ours.append(float(nll))
            gaps.append(float(nll - exact))
        return {"gap": sum(gaps) / len(gaps), "nll": sum(ours) / len(ours)}


def _network(model: nn.Module) -> PFN:
    """The network inside the wrapper of several processes, which passes on calls but no methods."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, PFN)
    return inner
