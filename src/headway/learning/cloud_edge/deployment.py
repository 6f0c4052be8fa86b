"""One adapted copy on the cloud: what its edges have sent, what they are to know, and both on disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headway.learning.cloud_edge.adaptation import Adapter
from headway.learning.cloud_edge.affine import Samples, checksum, count, travelling
from headway.learning.cloud_edge.crew import Crew
from headway.learning.cloud_edge.messages import pack
from headway.learning.cloud_edge.saved import StateFolder
from headway.learning.cloud_edge.settings import Settings


@dataclass(frozen=True)
class Published:
    """The state of an adapted edge network that edges may fetch; never changed once it is made.

    Attributes:
        epoch, version: of the server's start and of the step; newer is larger in this order.
        tensors: all affine parameters and running statistics.
        changed: for each of them the version that changed it last in this epoch.
        crc: CRC-32 of epoch, version and all tensors: what an edge must hold after taking the update.
    """

    epoch: int
    version: int
    tensors: Mapping[str, Tensor]
    changed: Mapping[str, int]
    crc: int

    def message(self, since: tuple[int, int] | None) -> bytes:
        """What brings an edge from ``since`` to here: the tensors that changed, or all of them where that cannot be told."""
        full = since is None or since[0] != self.epoch or since[1] > self.version
        after = -1 if full or since is None else since[1]
        words = {"epoch": self.epoch, "version": self.version, "full": full, "since": after, "crc": self.crc}
        return pack({name: t for name, t in self.tensors.items() if self.changed[name] > after}, words)


def update_checksum(epoch: int, version: int, tensors: Mapping[str, Tensor]) -> int:
    """The checksum of a whole state as it stands in an update."""
    return checksum(tensors, f"{epoch}.{version}")


@dataclass
class Counters:
    """What went in and out, in samples, messages and bytes of bodies."""

    received: int = 0
    duplicates: int = 0
    refused: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    rollbacks: int = 0
    rejected: dict[str, int] = field(default_factory=dict)  # updates that an edge did not take, by edge


class Deployment:
    """An adapted pair of networks that one edge, or a group of them, feeds and follows.

    Whoever calls :meth:`work` or :meth:`roll_back` holds ``at_work``; ``published`` may be read at any time.
    """

    def __init__(
        self,
        name: str,
        models: tuple[nn.Module, nn.Module],
        e_max0: float,
        settings: Settings,
        epoch: int,
        crew: Crew | None = None,
    ) -> None:
        self.name, self.epoch = name, epoch
        self.adapter = Adapter(*models, e_max0, settings, crew)
        self.at_work = threading.Lock()
        self.inbox: deque[Samples] = deque()
        self.busy = False
        self.sequences: dict[str, int] = {}
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] | None = None
        self.counters = Counters()
        self.unsaved = 0
        self.published = self._publish(0, None)

    def _publish(self, version: int, before: Published | None) -> Published:
        tensors = {name: t.detach().cpu().clone() for name, t in travelling(self.adapter.edge).items()}
        changed = {
            name: version if before is None or not torch.equal(t, before.tensors[name]) else before.changed[name]
            for name, t in tensors.items()
        }
        return Published(self.epoch, version, tensors, changed, update_checksum(self.epoch, version, tensors))

    @property
    def settled(self) -> bool:
        """Whether nothing waits to be worked on."""
        return not self.inbox and not self.busy

    @property
    def queued(self) -> int:
        """Samples that no step has looked at."""
        return sum(count(samples) for samples in self.inbox)

    def misfit(self, samples: Samples) -> str:
        """Why these samples cannot stand beside the earlier ones; empty where they can."""
        free = "attention_mask" in samples  # texts may differ in length
        found = {key: (t.shape[2:] if free else t.shape[1:], t.dtype) for key, t in samples.items()}
        if self.shapes is None:
            self.shapes = found
        if found == self.shapes:
            return ""
        told = [
            ", ".join(f"{key or 'x'} {tuple(shape)} {dtype}" for key, (shape, dtype) in sorted(shapes.items()))
            for shapes in (found, self.shapes)
        ]
        return f"a sample is {told[0]}; earlier ones of this deployment were {told[1]}"

    def work(self, samples: Samples) -> None:
        """Does what one message makes possible, and publishes after every step."""
        failures = self.adapter.failures
        for _ in self.adapter.receive(samples):
            self.published = self._publish(self.published.version + 1, self.published)
            self.unsaved += 1
        if self.adapter.failures > failures and not self.adapter.steps:
            self.shapes = None  # the first samples may have been the wrong ones

    def roll_back(self) -> None:
        """Publishes the source parameters as the newest version."""
        self.adapter.roll_back()
        self.counters.rollbacks += 1
        self.published = self._publish(self.published.version + 1, self.published)
        self.unsaved += 1

    def save(self, folder: StateFolder, architecture: str) -> None:
        """Writes everything that the next step depends on."""
        tensors, words = self.adapter.state()
        words |= {
            "version": self.published.version, "sequences": self.sequences, "architecture": architecture,
            "counters": asdict(self.counters),
        }  # fmt: skip
        folder.save(self.name, tensors, words)
        self.unsaved = 0

    def load(self, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
        """The inverse of :meth:`save`."""
        self.adapter.load_state(tensors, words)
        self.sequences = {str(edge): int(last) for edge, last in words["sequences"].items()}
        self.counters = Counters(**words.get("counters", {}))
        self.published = self._publish(int(words["version"]), None)

    def health(self) -> dict[str, Any]:
        """Plain data about it."""
        adapter = self.adapter
        return {
            "version": self.published.version,
            "edges": len(self.sequences),
            "queued": self.queued,
            "waiting": len(adapter.waiting),
            "buffer": len(adapter.buffer),
            "steps": adapter.steps,
            "failed_steps": adapter.failures,
            "last_error": adapter.last_error,
            **vars(self.counters),
        }
