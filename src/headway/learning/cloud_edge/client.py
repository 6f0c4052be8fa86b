"""The device: inference here and now, the network behind its back.

Two threads of the client talk to the cloud: one uploads chosen samples, one asks for new parameters. Whatever goes wrong there (no
server, a slow one, garbage, a restart) is counted, told in the log and tried again later; inference does not notice.
"""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from headway.learning.cloud_edge.affine import architecture_hash, weights_checksum
from headway.learning.cloud_edge.cloud import CloudServer
from headway.learning.cloud_edge.edge import EdgeModel, Refused, Selection
from headway.learning.cloud_edge.messages import Codec, check_codec
from headway.learning.cloud_edge.outbox import Outbox
from headway.learning.cloud_edge.selection import EntropyThreshold, RedundancyFilter
from headway.learning.cloud_edge.transport import HTTPTransport, LocalTransport, Transport
from headway.learning.cloud_edge.uplink import TROUBLE, Uplink


class Backoff:
    """Seconds to wait after one failure, two, three, ...: doubling from ``low`` to ``high``, each a random half to whole of that."""

    def __init__(self, low: float, high: float) -> None:
        if not 0 < low <= high:
            raise ValueError(f"backoff must be two numbers of seconds, 0 < low <= high; they are {low} and {high}")
        self.low, self.high, self.failures = low, high, 0
        self._random = random.Random()

    def next(self) -> float:
        """The next wait."""
        whole = min(self.high, self.low * 2 ** min(self.failures, 60))
        self.failures += 1
        return whole * self._random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """It went well again."""
        self.failures = 0


class EdgeClient:
    """A classifier on a device, kept fit by a cloud: ``logits = client(x)``.

    Args:
        model: the device's network, with the weights the cloud holds too. It is put in evaluation mode and updated in place.
        url: the cloud's address; or a :class:`CloudServer` in the same process.
        transform: from what is given to what the model takes; what is given is uploaded, so that the cloud needs it as well.
        thresholds, redundancy, select: the choice of samples; see :class:`~headway.learning.cloud_edge.edge.EdgeModel`.
        codec: how samples travel: "fp32", "fp16", "uint8" or "jpeg".
        queue: samples that may wait to be sent; beyond it the oldest are dropped.
        poll: seconds between two questions for new parameters.
        wait: seconds for which the cloud may hold an answer back until there is news.
        deployment: the name under which the cloud keeps this device's parameters, to go on after a restart; drawn by it otherwise.
        token, tls: bearer token, and certificates for https.
        timeout: seconds for which an answer is waited for, beyond ``wait``.
        backoff: shortest and longest wait after failures, in seconds.
        background: False leaves sending and asking to calls of :meth:`synchronise`.
        **edge: ``forward``, ``norm_bound``, ``guard_window`` of :class:`~headway.learning.cloud_edge.edge.EdgeModel`.

    Shapes:
        x: (n, ...) or a mapping of such tensors -> logits (n, classes), without gradient; n may be 0 or 1.

    Raises:
        ValueError: no affine normalisation in the model, an unknown codec, or an input that is no batch of samples.
    """

    def __init__(
        self,
        model: nn.Module,
        url: str | CloudServer,
        transform: Callable[[Any], Any] | None = None,
        thresholds: EntropyThreshold | None = None,
        codec: Codec = "fp16",
        queue: int = 256,
        poll: float = 2.0,
        *,
        redundancy: RedundancyFilter | None = None,
        select: Selection | None = None,
        wait: float = 30.0,
        deployment: str | None = None,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        timeout: float = 10.0,
        backoff: tuple[float, float] = (0.5, 30.0),
        background: bool = True,
        **edge: Any,
    ) -> None:
        identity = {
            "model_hash": architecture_hash(model), "weights": weights_checksum(model),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        }  # fmt: skip
        self.edge = EdgeModel(model, transform, thresholds, redundancy, select, **edge)
        self.poll, self.wait = poll, wait
        link: Transport = HTTPTransport(url, token, tls) if isinstance(url, str) else LocalTransport(url)
        self._outbox = Outbox(queue)
        self.uplink = Uplink(self.edge, link, self._outbox, identity, check_codec(codec), timeout, deployment)
        self._backoffs = [Backoff(*backoff), Backoff(*backoff)]
        self._closing, self._seen = threading.Event(), threading.Event()
        loops = (self._upload_loop, self._poll_loop) if background else ()
        self._threads = [
            threading.Thread(target=loop, name=f"cloud-edge {loop.__name__}", daemon=True) for loop in loops
        ]
        for thread in self._threads:
            thread.start()

    # --- what the application calls

    def __call__(self, x: Any) -> Tensor:
        """Logits of a batch; never waits for the network."""
        logits, chosen = self.edge.infer(x)
        if self.edge.classes is not None:
            self._seen.set()
        if chosen is not None:
            self._outbox.put(chosen)
        return logits

    def stats(self) -> dict[str, Any]:
        """Plain data: samples seen, selected, uploaded, dropped; bytes of message bodies up and down; updates; failures."""
        thresholds = self.edge.thresholds
        return {
            **asdict(self.edge.stats), **self.uplink.counts(), "dropped": self._outbox.dropped, "queued": len(self._outbox),
            "connected": self.uplink.connected, "last_error": self.uplink.last_error, "deployment": self.uplink.deployment,
            "e_max": None if thresholds is None else thresholds.e_max,
        }  # fmt: skip

    def synchronise(self, timeout: float = 60.0) -> None:
        """Sends all that is queued, waits until the cloud has worked on it, and lays the newest parameters ready.

        Parameters that the device refuses, also when they come whole, are told in :meth:`stats` and end it too.

        Raises:
            TimeoutError: the cloud does not answer, or not in time; what could not be sent stays queued.
        """
        end, pause = time.monotonic() + timeout, Backoff(0.01, 1.0)
        while True:
            whole = self.uplink.ask_for_all
            try:
                while self.uplink.send():
                    pass
                if self.uplink.ask(min(1.0, max(0.0, end - time.monotonic())), settled=True):
                    return
            except TROUBLE as error:
                self.uplink.failed(error)
                if whole and isinstance(error, Refused):
                    return
                self._closing.wait(pause.next())
            if time.monotonic() > end:
                raise TimeoutError(
                    f"the cloud could not be brought up to date in {timeout:g} s; {self.uplink.last_error}"
                )

    def close(self, timeout: float = 5.0) -> None:
        """Ends the threads; what was not sent is lost. The model goes on as it is."""
        self._closing.set()
        self._seen.set()
        self._outbox.wake()
        self.uplink.link.close()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def __enter__(self) -> EdgeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- behind its back

    def _upload_loop(self) -> None:
        def once() -> None:
            if not self.uplink.send():
                self._outbox.wait(1.0)

        self._loop(once, self._backoffs[0])

    def _poll_loop(self) -> None:
        def once() -> None:
            self.uplink.ask(self.wait)
            self._closing.wait(self.poll)

        self._seen.wait()  # before the first batch the number of classes may not be known
        self._loop(once, self._backoffs[1])

    def _loop(self, once: Callable[[], None], backoff: Backoff) -> None:
        while not self._closing.is_set():
            try:
                once()
                backoff.reset()
            except Exception as error:  # nothing that the network does may end the thread
                if self._closing.is_set():
                    return
                self.uplink.failed(error)
                after = getattr(error, "after", None)
                self._closing.wait(backoff.next() if after is None else min(after, backoff.high))
