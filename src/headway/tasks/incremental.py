"""Digits that come two classes at a time, once, with a small replay buffer: online class-incremental learning.

The smallest stream on which batch norm's statistics drift towards the newest task (Lyu et al., 2023, arXiv 2310.08855, with CIFAR and
Mini-ImageNet). Every batch carries the task of each sample; norms with task-balanced statistics use it, other models do not see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.norms.balancing import balance_penalty, start_task, task_batch
from headway.tasks.digits import Images, _sklearn_digits
from headway.tasks.rehearsal import ReservoirBuffer

Batch = tuple[Tensor, Tensor, Tensor]


class DigitsIncremental(Images):
    """Five tasks of two digits in an order drawn by the seed, one pass, new samples beside as many replayed ones; the metric is the
    accuracy in percent on all ten digits.

    Args:
        width: of the four convolutions. replay: replayed samples a step. capacity: of the buffer.
        strength: of the penalty of task-balanced norms.
        passes: over each task before the next one; the buffer takes every sample once.
    """

    name = "digits-incremental"
    batch_size = 10
    budget = "145 steps"
    learning_rate = 0.03

    def __init__(
        self, width: int = 32, replay: int = 10, capacity: int = 100, strength: float = 0.1, passes: int = 1
    ) -> None:
        super().__init__()
        if min(width, replay, capacity, passes) < 1:
            raise ValueError(
                f"width, replay, capacity and passes are at least 1; they are {width}, {replay}, {capacity} and {passes}"
            )
        self.width, self.replay, self.capacity, self.strength, self.passes = width, replay, capacity, strength, passes
        self.budget = f"{145 * passes} steps"
        self._first = torch.arange(2)

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _sklearn_digits()

    def model(self, seed: int) -> nn.Module:
        layers: list[nn.Module] = []
        before = 1
        for after, stride in ((self.width, 1), (self.width, 2), (2 * self.width, 1), (2 * self.width, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * self.width, 10))

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.learning_rate)

    def rate(self, progress: float) -> float:
        """Constant: a stream does not know its end."""
        return 1.0

    def train_batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        stream = _Stream(self, seed, batch_size)
        self._first = stream.order[:2]
        return stream

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels, tasks = batch
        start_task(model, int(tasks.max()))
        with task_batch(model, tasks):
            loss = F.cross_entropy(model(images).float(), labels)
            return loss + self.strength * balance_penalty(model)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``accuracy`` in percent and ``loss`` in nats on all digits, and the accuracy on the ``first_task``."""
        images, labels = self.data()[2:]
        found = super().evaluate(model)
        device = next(model.parameters()).device
        mine = torch.isin(labels, self._first)
        right = model(images[mine].to(device)).argmax(1).cpu() == labels[mine]
        return {**found, "first_task": 100 * float(right.double().mean())}


class _Stream(Iterator[Batch]):
    """The whole pass is laid out by the seed; after its end the last task comes again."""

    def __init__(self, task: DigitsIncremental, seed: int, batch_size: int) -> None:
        self.images, self.labels = task.data()[:2]
        draw = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(10, generator=draw)
        self.task_of = torch.empty(10, dtype=torch.int64)
        self.task_of[self.order] = torch.arange(10) // 2
        buffer, self.steps, self.position = ReservoirBuffer(task.capacity, seed), [], 0
        for number in range(5):
            mine = torch.isin(self.labels, self.order[2 * number : 2 * number + 2]).nonzero()[:, 0]
            for again in range(task.passes):
                for index in mine[torch.randperm(len(mine), generator=draw)].split(batch_size):
                    old = buffer.sample(task.replay)[0] if len(buffer) else index[:0]
                    self.steps.append(torch.cat([index, old]))
                    if not again:
                        buffer.add(index)
                    self.last = len(self.steps) if number < 4 else self.last

    def skip(self, steps: int) -> None:
        """Passes over ``steps`` batches at no cost."""
        self.position += steps

    def __next__(self) -> Batch:
        step, self.position = self.position, self.position + 1
        if step >= len(self.steps):
            step = self.last + (step - self.last) % (len(self.steps) - self.last)
        index = self.steps[step]
        labels = self.labels[index]
        return self.images[index], labels, self.task_of[labels]
