"""One adapted pair of networks on the cloud: the samples that came, when they make a step possible, and what becomes of one that fails.

A batch of B_c uploaded samples makes a step (:mod:`~headway.learning.cloud_edge.steps`), together with three times as many drawn from
the buffer once enough were uploaded. A step that goes wrong leaves everything as it was before it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.learning.cloud_edge.affine import Samples, count, travelling
from headway.learning.cloud_edge.crew import Crew
from headway.learning.cloud_edge.settings import Settings
from headway.learning.cloud_edge.steps import Steps, under

log = logging.getLogger(__name__)


class Adapter(Steps):
    """One adapted pair of networks, with its optimisers, samples in waiting and replay buffer.

    Args:
        edge, foundation: from :func:`~headway.learning.cloud_edge.settings.prepare`; everything but what adapts is shared with them.
        e_max0: the initial threshold in nats, which weighs every loss here.
        crew: the processes that do the steps together; this one does them alone without.
    """

    def __init__(
        self, edge: nn.Module, foundation: nn.Module, e_max0: float, settings: Settings, crew: Crew | None = None
    ) -> None:
        super().__init__(edge, foundation, e_max0, settings)
        self._crew = crew
        self.waiting: list[Samples] = []
        self.buffer: list[Samples] = []
        self.steps = self.failures = 0
        self.last_error = ""
        self._draw = torch.Generator().manual_seed(settings.seed)
        self._source = self.tensors()

    # --- what happens when samples come

    def receive(self, samples: Samples) -> Iterator[None]:
        """Takes uploaded samples and does the steps they make possible; yields after each that succeeded."""
        single = [{key: tensor[i] for key, tensor in samples.items()} for i in range(count(samples))]
        self.waiting += single
        if self.settings.replay:
            self.buffer += single
            del self.buffer[: -self.settings.replay]
        size, tried = self.settings.batch_size, False
        while len(self.waiting) >= size:
            fresh, self.waiting, tried = self.waiting[:size], self.waiting[size:], True
            if self._guarded(fresh, 3 * size if self._ready() else 0):
                yield
        if self.settings.idle_replay and not tried and self._ready() and self._guarded([], 4 * size):
            yield

    def _ready(self) -> bool:
        return len(self.buffer) >= max(self.settings.replay_start, 3 * self.settings.batch_size)

    def _replayed(self, number: int) -> list[Samples]:
        return [self.buffer[i] for i in torch.randperm(len(self.buffer), generator=self._draw)[:number].tolist()]

    def _guarded(self, fresh: list[Samples], replayed: int) -> bool:
        """Does a step; one that fails, or leaves a network that is not finite, changes nothing, is counted, and its samples do not come
        again."""
        before, unseen = self.tensors(), self.unseen
        try:
            batches = stack(fresh) if fresh else None, stack([*fresh, *(self._replayed(replayed) if replayed else [])])
            if self._crew is None:
                self.step(*batches)
            else:
                self.restore(self._crew.step(before, unseen, self.e_max0, *batches))
            if not all(torch.isfinite(tensor).all() for tensor in travelling(self.edge).values()):
                raise ValueError("the edge model's parameters are no longer finite; lower edge_lr")
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError, OSError) as error:
            self.restore(before, unseen)
            spoilt = {id(sample) for sample in fresh}  # or every step that draws one of them again would fail too
            self.buffer = [sample for sample in self.buffer if id(sample) not in spoilt]
            self.failures += 1
            self.last_error = f"{type(error).__name__}: {error}"
            log.warning("a step was taken back: %s", self.last_error)
            return False
        finally:
            self.edge.eval()
            self.foundation.eval()
        self.steps += 1
        return True

    # --- its state

    def roll_back(self) -> None:
        """Both networks as they were at the start, without momenta; what was uploaded stays."""
        self.restore(self._source, unseen=True)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on, as tensors and plain data."""
        tensors = {**self.tensors(), "generator": self._draw.get_state()}
        for name, samples in (("waiting", self.waiting), ("buffer", self.buffer)):
            if samples:
                tensors |= {f"{name}/{key}": tensor for key, tensor in stack(samples).items()}
        words = {"e_max0": self.e_max0, "steps": self.steps, "failures": self.failures, "unseen": self.unseen}
        return tensors, words

    def load_state(self, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.steps, self.failures = int(words["steps"]), int(words["failures"])
        self.restore(tensors, bool(words.get("unseen", not self.steps)))
        self._draw.set_state(tensors["generator"])
        for name in ("waiting", "buffer"):
            stacked = under(tensors, name)
            length = count(stacked) if stacked else 0
            setattr(self, name, [{key: tensor[i] for key, tensor in stacked.items()} for i in range(length)])


def stack(samples: list[Samples]) -> Samples:
    """Single samples as a batch. Texts of different lengths (a mapping with an attention mask) are padded with zeros at the end.

    Raises:
        ValueError: other samples differ in shape, or in what they are made of.
    """
    keys = samples[0].keys()
    if any(sample.keys() != keys for sample in samples):
        raise ValueError("samples of one deployment must be made of the same tensors")
    found: Samples = {}
    for key in keys:
        tensors = [sample[key] for sample in samples]
        if "attention_mask" in keys and len({t.shape for t in tensors}) > 1 and {t.dim() for t in tensors} == {1}:
            longest = max(len(t) for t in tensors)
            tensors = [F.pad(t, (0, longest - len(t))) for t in tensors]
        if len({(t.shape, t.dtype) for t in tensors}) > 1:
            raise ValueError(f"samples of one deployment must have one shape and type; {key or 'they'} differ")
        found[key] = torch.stack(tensors)
    return found
