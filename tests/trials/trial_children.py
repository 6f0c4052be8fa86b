"""Tasks and entry points that the tests run in child processes."""

import os
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn

from headway.surgery import Technique
from headway.tasks.task import Task


class Tiny(Task):
    """A few neurons with everything that has a state: dropout, running statistics, Adam's moments, batches by place."""

    name = "tiny"
    batch_size = 12
    budget = "30 steps"
    learning_rate = 0.03

    def __init__(self, pause: float = 0.0, dropout: float = 0.1) -> None:
        self._pause, self.dropout = pause, dropout
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(96, 6, generator=generator)
        self._y = self._x.sin().sum(1, keepdim=True)

    def model(self, seed):
        return nn.Sequential(
            nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(16, 8), nn.Linear(8, 1)
        )

    def train_batches(self, seed, batch_size):
        generator = torch.Generator().manual_seed(seed)
        while True:
            index = torch.randint(len(self._x), (batch_size,), generator=generator)
            yield {"x": self._x[index], "y": self._y[index]}

    def loss(self, model, batch):
        time.sleep(self._pause)
        return (model(batch["x"]) - batch["y"]).square().mean()

    def evaluate(self, model):
        return {"loss": float(self.loss(model, {"x": self._x, "y": self._y}))}


@dataclass(frozen=True)
class WithBatchNorm(Technique):
    """Puts running statistics where the layer normalisation was."""

    def change(self, site):
        return nn.BatchNorm1d(16) if isinstance(site.module, nn.LayerNorm) else None


@dataclass(frozen=True)
class Breaks(Technique):
    """A model that cannot be run."""

    def change(self, site):
        return nn.LayerNorm(5) if isinstance(site.module, nn.LayerNorm) else None


def make_tiny(pause=0.0, dropout=0.1):
    return Tiny(pause, dropout)


ARMS = {"baseline": "baseline", "batch": WithBatchNorm()}


def run(store, pause=0.0, checkpoint_every=0.0, **options):
    from headway.trials.compare import compare

    torch.set_num_threads(1)
    options = {"progress": False, "probe": False, "device": "cpu", **options}
    return compare(Tiny(pause), ARMS, seeds=2, store=store, checkpoint_every=checkpoint_every, **options)


def run_quietly(store, pause=0.0, checkpoint_every=0.0):
    """For child processes: the exit status says how it went."""
    os.environ.update(OMP_NUM_THREADS="1")
    run(store, pause, checkpoint_every)
    sys.exit(0)
