"""A stream run through device and cloud in lockstep: the same code as on the network, with every update taken before the next batch.

With a :class:`CloudServer` everything happens in this process; with an address the same calls go over HTTP. Both end with bitwise the
same parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from headway.learning.cloud_edge.client import EdgeClient
from headway.learning.cloud_edge.cloud import CloudServer


@dataclass(frozen=True)
class Simulation:
    """How a stream went.

    Attributes:
        samples: how many there were.
        right: for each labelled batch, how many of its predictions were.
        uploaded: share of the samples that was uploaded.
        stats: of the client, at the end.
        logits: of every batch where they were asked for.
    """

    samples: int
    right: list[int]
    uploaded: float
    stats: dict[str, Any]
    logits: list[Tensor] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Share of right predictions over the stream, each made before anything of its batch was learned."""
        return sum(self.right) / max(1, self.samples) if self.right else float("nan")


def simulate(
    edge: nn.Module | EdgeClient,
    cloud: CloudServer | str,
    stream: Iterable[Any],
    *,
    every: int = 1,
    keep_logits: bool = False,
    **client: Any,
) -> Simulation:
    """Runs a stream through a device that is brought up to date after every batch.

    Args:
        edge: the device's network, or a client made with ``background=False``.
        cloud: a server in this process, or the address of one.
        stream: batches x, or (x, labels) to count what is right.
        every: batches between two synchronisations.
        keep_logits: whether the answer holds all logits.
        **client: of :class:`~headway.learning.cloud_edge.client.EdgeClient`.

    Raises:
        TimeoutError: the server does not answer.
    """
    device = edge if isinstance(edge, EdgeClient) else EdgeClient(edge, cloud, background=False, **client)
    samples, right, kept = 0, [], []
    for number, batch in enumerate(stream, 1):
        x, labels = batch if isinstance(batch, tuple | list) else (batch, None)
        logits = device(x)
        samples += len(logits)
        if labels is not None:
            right.append(int((logits.argmax(1) == labels.to(logits.device)).sum()))
        if keep_logits:
            kept.append(logits)
        if number % every == 0:
            device.synchronise()
    device.synchronise()
    device.edge.settle()
    stats = device.stats()
    return Simulation(samples, right, stats["uploaded"] / max(1, samples), stats, kept)
