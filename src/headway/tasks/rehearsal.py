"""What continual learning with replay needs: a reservoir of past samples, its losses, and one training step.

Experience replay (ER), ER-ACE (arXiv 2104.05025) and DER++ (arXiv 2004.07211). New and replayed samples go through ONE forward pass, so
that norms with batch statistics see both.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.norms.balancing import balance_penalty, task_batch

Method = Literal["er", "er-ace", "der++"]


class ReservoirBuffer:
    """A uniform sample of everything seen, of at most ``capacity`` entries (reservoir sampling).

    An entry is a tuple of tensors, one row each of what :meth:`add` is given.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1; it is {capacity}")
        self.capacity, self.seen = capacity, 0
        self._draw = torch.Generator().manual_seed(seed)
        self._rows: list[tuple[Tensor, ...]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, *columns: Tensor) -> None:
        """Takes a batch: tensors whose first axis holds the samples."""
        for row in zip(*(column.detach() for column in columns), strict=True):
            self.seen += 1
            if len(self._rows) < self.capacity:
                self._rows.append(row)
                continue
            place = int(torch.randint(self.seen, (), generator=self._draw))
            if place < self.capacity:
                self._rows[place] = row

    def sample(self, count: int) -> tuple[Tensor, ...]:
        """Up to ``count`` different entries, stacked column by column.

        Raises:
            ValueError: the buffer is empty.
        """
        if not self._rows:
            raise ValueError("the buffer is empty; add a batch first")
        chosen = torch.randperm(len(self._rows), generator=self._draw)[:count].tolist()
        return tuple(torch.stack(column) for column in zip(*(self._rows[i] for i in chosen), strict=True))


def er_loss(new: Tensor, new_labels: Tensor, old: Tensor, old_labels: Tensor) -> Tensor:
    """Cross-entropy over new and replayed samples together. Logits (N, classes), labels (N,)."""
    return F.cross_entropy(torch.cat([new, old]).float(), torch.cat([new_labels, old_labels]))


def er_ace_loss(new: Tensor, new_labels: Tensor, old: Tensor, old_labels: Tensor, seen: Tensor) -> Tensor:
    """ER-ACE: new samples compete among their own batch's classes and unseen ones only, replayed ones among all.

    Args:
        seen: the classes of everything before this batch.
    """
    hidden = torch.zeros(new.shape[1], dtype=torch.bool, device=new.device)
    hidden[seen] = True
    hidden[new_labels] = False
    loss = F.cross_entropy(new.float().masked_fill(hidden, -1e9), new_labels)
    return loss + F.cross_entropy(old.float(), old_labels) if len(old) else loss


def der_pp_loss(
    new: Tensor, new_labels: Tensor, old: Tensor, old_logits: Tensor, again: Tensor, again_labels: Tensor,
    alpha: float = 0.1, beta: float = 0.5,
) -> Tensor:  # fmt: skip
    """DER++: cross-entropy of the new samples, the squared distance of one draw's logits from what they were when they were stored,
    and cross-entropy of another draw."""
    loss = F.cross_entropy(new.float(), new_labels)
    if not len(old):
        return loss
    return (
        loss + alpha * F.mse_loss(old.float(), old_logits.float()) + beta * F.cross_entropy(again.float(), again_labels)
    )


def er_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    task: int,
    buffer: ReservoirBuffer,
    replay: int = 10,
    method: Method = "er",
    strength: float = 0.1,
    from_task: int = 1,
) -> float:
    """One step on new samples and replayed ones, then the new ones go into the buffer; the loss.

    Args:
        task: of the new samples. replay: samples of a draw; DER++ takes two.
        strength: of :func:`headway.norms.balancing.balance_penalty`, from the task ``from_task`` on; models without task-balanced
            norms have none.
    """
    if method not in ("er", "er-ace", "der++"):
        raise ValueError(f'method is "er", "er-ace" or "der++"; it is {method!r}')
    ids, n = torch.full((len(x),), task, device=x.device), len(x)
    draws = [buffer.sample(replay) for _ in range(2 if method == "der++" else 1)] if len(buffer) else []
    inputs, tasks = torch.cat([x, *(d[0] for d in draws)]), torch.cat([ids, *(d[2] for d in draws)])
    with task_batch(model, tasks):
        logits = model(inputs)
        new, old = logits[:n], logits[n:]
        old_labels = torch.cat([d[1] for d in draws]) if draws else labels[:0]
        if method == "er":
            loss = er_loss(new, labels, old, old_labels)
        elif method == "er-ace":
            loss = er_ace_loss(new, labels, old, old_labels, buffer_classes(buffer))
        else:
            half = len(draws[0][0]) if draws else 0
            stored = draws[0][3] if draws else old
            loss = der_pp_loss(new, labels, old[:half], stored, old[half:], old_labels[half:])
        if strength:
            loss = loss + strength * balance_penalty(model, from_task)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    buffer.add(x, labels, ids, new)
    return float(loss.detach())


def buffer_classes(buffer: ReservoirBuffer) -> Tensor:
    """The classes in a buffer whose second column holds labels."""
    rows = [row[1] for row in buffer._rows]
    return torch.stack(rows).unique() if rows else torch.zeros(0, dtype=torch.int64)
