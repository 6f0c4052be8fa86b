"""Continual learning without end: the same digits, given new random labels again and again.

Nothing can be carried over from one labelling to the next, so how well the last ones are learned measures how much of the ability to
learn is left (Lyle et al., 2024, arXiv 2407.01800, with CIFAR-10 and 200 labellings).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.tasks.digits import _sklearn_digits
from headway.tasks.task import Task

Batch = tuple[Tensor, Tensor, Tensor]


class DigitsRelabelled(Task):
    """A multi-layer perceptron on 1,000 digits whose labels are drawn anew every ``every`` steps; the metric is the accuracy in
    percent on the labelling that was trained last.

    Args:
        every: steps with one labelling. count: images. width: of the two hidden layers.
    """

    name = "digits-relabelled"
    metric = "accuracy"
    lower_is_better = False
    batch_size = 64
    budget = "4500 steps"
    learning_rate = 1e-3

    def __init__(self, every: int = 150, count: int = 1000, width: int = 256) -> None:
        if every < 1 or not 1 <= count <= 1437:
            raise ValueError(f"every is at least 1 and count from 1 to 1437; they are {every} and {count}")
        self.every, self.count, self.width = every, count, width
        self._images: Tensor | None = None
        self._number = 0

    def images(self) -> Tensor:
        """(count, 64) float32 from -1 to 1."""
        if self._images is None:
            self._images = _sklearn_digits()[0][: self.count].flatten(1)
        return self._images

    def labels(self, number: int) -> Tensor:
        """(count,) int64: labelling ``number``, the same for every seed and arm."""
        return torch.randint(10, (self.count,), generator=torch.Generator().manual_seed(7919 + number))

    def model(self, seed: int) -> nn.Module:
        width = self.width
        return nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )  # fmt: skip

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=self.learning_rate)

    def rate(self, progress: float) -> float:
        """Constant: the labellings never end."""
        return 1.0

    def train_batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        return _Stream(self, seed, batch_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels, numbers = batch
        self._number = int(numbers[0])
        return F.cross_entropy(model(images).float(), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``accuracy`` in percent and ``loss`` in nats on all images with the labelling trained last, and its ``labelling``."""
        device = next(model.parameters()).device
        logits, labels = model(self.images().to(device)).float().cpu(), self.labels(self._number)
        right = float((logits.argmax(1) == labels).double().mean())
        return {"accuracy": 100 * right, "loss": float(F.cross_entropy(logits, labels)), "labelling": self._number}


class _Stream(Iterator[Batch]):
    """Batch k depends on the seed and on k alone."""

    def __init__(self, task: DigitsRelabelled, seed: int, batch_size: int) -> None:
        self.task, self.seed, self.batch_size, self.position = task, seed, batch_size, 0

    def skip(self, steps: int) -> None:
        """Passes over ``steps`` batches at no cost."""
        self.position += steps

    def __next__(self) -> Batch:
        step, self.position = self.position, self.position + 1
        number = step // self.task.every
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        index = torch.randint(self.task.count, (self.batch_size,), generator=draw)
        return self.task.images()[index], self.task.labels(number)[index], torch.full((self.batch_size,), number)
