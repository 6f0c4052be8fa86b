"""The device's side without the network: inference, the choice of samples, updates taken between two batches, the way back.

No gradient is ever computed and nothing waits for anybody: an update is checked and laid ready by whoever received it, and copied
into the model's own tensors by the next call of inference, before its forward pass.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headway.learning.cloud_edge.affine import (
    Samples,
    as_samples,
    class_count,
    count,
    install,
    is_statistic,
    logits_of,
    named_affine_parameters,
    rows,
    travelling,
)
from headway.learning.cloud_edge.deployment import update_checksum
from headway.learning.cloud_edge.messages import BadMessage, unpack
from headway.learning.cloud_edge.selection import EntropyThreshold, RedundancyFilter, entropy

log = logging.getLogger(__name__)
Moment = tuple[int, int]  # (epoch, version)


class Selection(Protocol):
    """A choice of samples other than by entropy: :class:`~headway.learning.cloud_edge.selection.RandomSelection`, or your own."""

    def mask(self, logits: Tensor) -> Tensor:
        """Which of the samples to upload, bool (n,)."""
        ...


class Refused(ValueError):
    """An update that the device does not take."""


@dataclass
class EdgeStats:
    """What a device has seen and done.

    Attributes:
        samples, not_finite, selected: samples seen, those of them with logits that are no numbers, and those chosen for upload.
        updates, refused_updates, last_refusal: taken, not taken, and why.
        rollbacks, last_rollback: returns to the source parameters, and why.
        epoch, version: of the parameters that the next batch will be seen with; 0.0 are the source parameters.
    """

    samples: int = 0
    not_finite: int = 0
    selected: int = 0
    updates: int = 0
    refused_updates: int = 0
    last_refusal: str = ""
    rollbacks: int = 0
    last_rollback: str = ""
    epoch: int = 0
    version: int = 0


class EdgeModel:
    """A classifier that is kept fit from outside.

    Args:
        model: it is used as it is: put in evaluation mode, without gradients, and updated in place.
        transform: from what is given (and uploaded) to what the model takes.
        thresholds: made from the number of classes by default.
        redundancy: drops samples like the kept ones, after the thresholds.
        select: chooses instead of both.
        forward: what is called in place of the model, ``torch.compile(model)`` say.
        norm_bound: the largest change of the affine parameters in one update, as a share of their norm.
        guard_window: samples after each of which the predictions are looked at: if their mean entropy is below a tenth of E_min, or
            95 % of them are one class, the source parameters come back. 0 never looks.
    """

    def __init__(
        self,
        model: nn.Module,
        transform: Callable[[Any], Any] | None = None,
        thresholds: EntropyThreshold | None = None,
        redundancy: RedundancyFilter | None = None,
        select: Selection | None = None,
        forward: Callable[..., Any] | None = None,
        norm_bound: float = 0.5,
        guard_window: int = 512,
    ) -> None:
        named_affine_parameters(model)
        self.model = model.eval().requires_grad_(False)
        self.transform, self.thresholds, self.redundancy, self.select = transform, thresholds, redundancy, select
        self._forward = model if forward is None else forward
        self.norm_bound, self.guard_window = norm_bound, guard_window
        self.classes = class_count(model) if thresholds is None else thresholds.num_classes
        self.stats = EdgeStats()
        self.source = {name: tensor.detach().cpu().clone() for name, tensor in travelling(model).items()}
        self.held = self.source  # the newest state that was taken, and which one that is
        self.moment: Moment | None = None
        self.rolled_back = ""
        self._not_before: Moment = (0, 0)
        self._fresh = False
        self._turn = threading.Condition()
        self._running = 0
        self._reset_window()

    # --- inference

    @torch.no_grad()
    def infer(self, x: Any) -> tuple[Tensor, Samples | None]:
        """Logits (n, classes), and the samples to upload if there are any. Threads may call it side by side."""
        samples = as_samples(x)
        if not count(samples) and self.classes is not None:
            return torch.zeros(0, self.classes, device=next(iter(samples.values())).device), None
        with self._turn:
            self.settle()
            self._running += 1
        try:
            given = samples.get("", samples)
            made = given if self.transform is None else self.transform(given)
            logits = logits_of(self._forward, as_samples(made))
        finally:
            with self._turn:
                self._running -= 1
                self._turn.notify_all()
        with self._turn:
            chosen = self._choose(logits).nonzero()[:, 0]
            self.stats.selected += len(chosen)
        if not len(chosen):
            return logits, None
        return logits, rows(samples, chosen.to(next(iter(samples.values())).device))

    def settle(self) -> None:
        """Copies an update that lies ready into the model, while no forward pass runs; those that come meanwhile wait for it."""
        with self._turn:
            while self._fresh and self._running:
                self._turn.wait()
            if self._fresh:
                install(self.model, self.held)
                self._fresh = False

    def _choose(self, logits: Tensor) -> Tensor:
        if self.thresholds is None:
            self.thresholds = EntropyThreshold(logits.shape[1])
        if logits.shape[1] != self.thresholds.num_classes:
            raise ValueError(
                f"the model tells {logits.shape[1]} classes apart and the thresholds {self.thresholds.num_classes}; make both equal"
            )
        self.classes = logits.shape[1]
        finite, entropies, before = torch.isfinite(logits).all(1), entropy(logits), self.thresholds.total
        all_finite = bool(finite.all())
        self.thresholds.update(entropies if all_finite else entropies[finite])
        if self.select is not None:
            mask = self.select.mask(logits)
        else:
            mask = self.thresholds.mask(entropies)
        if not all_finite:
            mask = mask & finite
            self.stats.not_finite += int((~finite).sum())
        if self.redundancy is not None and self.select is None:
            mask[mask.clone()] = self.redundancy.mask(logits[mask])
        self.stats.samples += len(logits)
        if self.guard_window:
            predictions = logits.argmax(1)
            self._guard(predictions if all_finite else predictions[finite], self.thresholds.total - before)
        return mask

    # --- updates

    def begin(self, moment: Moment) -> None:
        """The cloud's copy stands at ``moment`` and is the source network, as this one is."""
        with self._turn:
            if self.moment is None and not self.rolled_back:
                self.moment = moment

    def offer(self, body: bytes) -> None:
        """Checks an update and lays it ready for the next batch.

        Raises:
            Refused: it is damaged, not newer, does not fit, is not finite, or changes too much; nothing changes then.
        """
        try:
            tensors, words = unpack(body)
            moment = int(words["epoch"]), int(words["version"])
            full, since, crc = bool(words["full"]), int(words["since"]), int(words["crc"])
        except (BadMessage, KeyError, TypeError, ValueError) as error:
            raise self._refuse(f"the update is damaged: {error}") from None
        with self._turn:
            if moment == self.moment:
                return
            if self.rolled_back or moment < self._not_before or (self.moment is not None and moment < self.moment):
                raise self._refuse(f"update {moment} is not newer than {self.moment}")
            if not full and (self.moment is None or self.moment[0] != moment[0] or self.moment[1] < since):
                raise self._refuse(f"update {moment} builds on version {since}, and {self.moment} is here")
            candidate = self._checked({**({} if full else self.held), **tensors})
            if update_checksum(*moment, candidate) != crc:
                raise self._refuse(f"the checksum of update {moment} is wrong")
            self.held, self.moment, self._fresh = candidate, moment, True
            self.stats.updates += 1
            self.stats.epoch, self.stats.version = moment

    def _checked(self, candidate: dict[str, Tensor]) -> dict[str, Tensor]:
        if candidate.keys() != self.source.keys():
            odd = sorted(candidate.keys() ^ self.source.keys())[:5]
            raise self._refuse(f"the update does not hold what adapts: {', '.join(odd)}")
        change = norm = 0.0
        for name, new in candidate.items():
            old = self.held[name]
            if new.shape != old.shape or new.dtype != old.dtype:
                raise self._refuse(
                    f"{name} is {tuple(old.shape)} {old.dtype} here and {tuple(new.shape)} {new.dtype} there"
                )
            if not torch.isfinite(new).all() or (name.endswith("running_var") and (new < 0).any()):
                raise self._refuse(f"{name} of the update is not finite, or a negative variance")
            if not is_statistic(name):
                change += float((new.double() - old.double()).square().sum())
                norm += float(old.double().square().sum())
        if change > self.norm_bound**2 * norm:
            share = (change / norm) ** 0.5 if norm else float("inf")
            raise self._refuse(
                f"the update changes the affine parameters by {share:.2g} of their norm, above {self.norm_bound}"
            )
        return candidate

    def _refuse(self, why: str) -> Refused:
        self.stats.refused_updates += 1
        self.stats.last_refusal = why
        log.warning("an update was not taken: %s", why)
        return Refused(why)

    # --- the way back

    def _reset_window(self) -> None:
        self._window, self._window_entropy, self._window_predictions = 0, 0.0, []

    def _guard(self, predictions: Tensor, entropies: float) -> None:
        """Looks at a window once it is full; until then its predictions and the sum of its entropies are kept."""
        self._window_predictions.append(predictions)
        self._window, self._window_entropy = self._window + len(predictions), self._window_entropy + entropies
        if self._window < self.guard_window:
            return
        counts = torch.bincount(torch.cat(self._window_predictions))
        mean, share = self._window_entropy / self._window, float(counts.max()) / self._window
        self._reset_window()
        if self.held is self.source or self.thresholds is None:  # these are the source parameters already
            return
        if mean < 0.1 * self.thresholds.e_min:
            self._roll_back(f"the mean entropy fell to {mean:.2g} nats")
        elif share > 0.95:
            self._roll_back(f"one class takes {100 * share:.0f} % of the predictions")

    def _roll_back(self, why: str) -> None:
        self.held, self.moment, self._fresh, self.rolled_back = self.source, None, True, why
        self.stats.rollbacks += 1
        self.stats.last_rollback = why
        self.stats.epoch, self.stats.version = 0, 0
        log.warning("back to the source parameters: %s", why)

    def roll_back(self, why: str) -> None:
        """Back to the source parameters from the next batch on; no update is taken before the cloud has done the same."""
        with self._turn:
            self._roll_back(why)

    def cloud_rolled_back(self, moment: Moment) -> None:
        """The cloud has rolled back too, and published that as ``moment``: updates from there on are taken again."""
        with self._turn:
            self.rolled_back, self._not_before = "", moment
