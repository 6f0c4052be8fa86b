"""An endless stream of training batches whose k-th batch depends on the seed and k alone.

A run that stops at step k and goes on later calls ``skip(k)`` and sees exactly the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class Batches(Iterator[Any]):
    """Batches drawn by index.

    Args:
        count: how many samples there are.
        batch_size: samples a batch.
        seed: of the order.
        take: indices (int64, (batch_size,)) -> batch.
        epochs: walk through shuffled epochs (every sample once before any comes again; the last samples of an epoch that
            fill no batch are left out); False draws independently.

    Raises:
        ValueError: fewer samples than one batch needs.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, take: Callable[[Tensor], Any], epochs: bool = True
    ) -> None:
        if batch_size < 1 or (epochs and count < batch_size) or count < 1:
            raise ValueError(
                f"a batch of {batch_size} cannot be drawn from {count} samples; choose a smaller batch_size"
            )
        self.count, self.batch_size, self.seed, self.take, self.epochs = count, batch_size, seed, take, epochs
        self.position = 0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def skip(self, steps: int) -> None:
        """Passes over ``steps`` batches at no cost."""
        self.position += steps

    def __next__(self) -> Any:
        step, self.position = self.position, self.position + 1
        if not self.epochs:
            generator = generator_for(self.seed, step)
            return self.take(torch.randint(self.count, (self.batch_size,), generator=generator))
        per_epoch = self.count // self.batch_size
        epoch, place = divmod(step, per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, torch.randperm(self.count, generator=generator_for(self.seed, epoch)))
        return self.take(self._order[1][place * self.batch_size : (place + 1) * self.batch_size])


def generator_of(seed: int, index: Tensor) -> torch.Generator:
    """A generator that depends on the seed and on the first and last sample of a batch alone."""
    return generator_for(seed, int(index[0]) * 7919 + int(index[-1]))


def generator_for(seed: int, number: int) -> torch.Generator:
    """A generator that depends on the seed and a number alone; neighbouring numbers give unrelated draws."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
    return torch.Generator().manual_seed(mixed ^ (mixed >> 31))
