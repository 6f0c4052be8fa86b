"""The device: inference here and now, the network behind its back.

Two threads of the client talk to the cloud: one uploads chosen samples, one asks for new parameters. Whatever goes wrong there (no
server, a slow one, garbage, a restart) is counted, told in the log and tried again later; inference does not notice.
"""

from __future__ import annotations

import http.client
import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from urllib.parse import urlencode

from torch import Tensor, nn

from headway.learning.cloud_edge.affine import architecture_hash, count, weights_checksum
from headway.learning.cloud_edge.cloud import CloudServer
from headway.learning.cloud_edge.edge import EdgeModel, Refused, Selection
from headway.learning.cloud_edge.messages import BadMessage, Codec, Request, Response, check_codec, encode, pack
from headway.learning.cloud_edge.outbox import Outbox, Parcel
from headway.learning.cloud_edge.selection import EntropyThreshold, RedundancyFilter
from headway.learning.cloud_edge.transport import HTTPTransport, LocalTransport, Transport

log = logging.getLogger(__name__)
LARGEST_BODY = 32 << 20
_COUNTED = ["uploaded", "messages", "refused_samples", "too_large", "put_off", "failures", "bytes_up", "bytes_down"]
_TROUBLE = (OSError, http.client.HTTPException, ValueError)


class Unanswered(BadMessage):
    """The cloud gave an answer that helps nothing now: ask again later.

    Attributes:
        after: seconds the cloud asks to wait, or None.
    """

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


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
        identity = {"model_hash": architecture_hash(model), "weights": weights_checksum(model)}
        self._identity = {**identity, "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
        self.edge = EdgeModel(model, transform, thresholds, redundancy, select, **edge)
        self.codec: Codec = check_codec(codec)
        self.poll, self.wait, self.timeout = poll, wait, timeout
        self.deployment = deployment
        self._link: Transport = HTTPTransport(url, token, tls) if isinstance(url, str) else LocalTransport(url)
        self._outbox = Outbox(queue)
        self._in_flight: Parcel | None = None
        self._sequence, self._registered, self._ask_for_all = 1, False, False
        self._registering, self._sending, self._counting = threading.Lock(), threading.Lock(), threading.Lock()
        self._counts: dict[str, int] = dict.fromkeys(_COUNTED, 0)
        self.connected, self.last_error = False, ""
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
        with self._counting:
            counts = dict(self._counts)
        thresholds = self.edge.thresholds
        return {
            **asdict(self.edge.stats), **counts, "dropped": self._outbox.dropped, "queued": len(self._outbox),
            "connected": self.connected, "last_error": self.last_error, "deployment": self.deployment,
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
            whole = self._ask_for_all
            try:
                while self._send():
                    pass
                if self._ask(min(1.0, max(0.0, end - time.monotonic())), settled=True):
                    return
            except _TROUBLE as error:
                self._failed(error)
                if whole and isinstance(error, Refused):
                    return
                self._closing.wait(pause.next())
            if time.monotonic() > end:
                raise TimeoutError(f"the cloud could not be brought up to date in {timeout:g} s; {self.last_error}")

    def close(self, timeout: float = 5.0) -> None:
        """Ends the threads; what was not sent is lost. The model goes on as it is."""
        self._closing.set()
        self._seen.set()
        self._outbox.wake()
        self._link.close()
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
            if not self._send():
                self._outbox.wait(1.0)

        self._loop(once, self._backoffs[0])

    def _poll_loop(self) -> None:
        def once() -> None:
            self._ask(self.wait)
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
                self._failed(error)
                after = getattr(error, "after", None)
                self._closing.wait(backoff.next() if after is None else min(after, backoff.high))

    def _failed(self, error: Exception) -> None:
        told = f"{type(error).__name__}: {error}"
        with self._counting:
            self._counts["failures"] += 1
        (log.debug if told == self.last_error else log.warning)("the cloud: %s", told)
        self.connected, self.last_error = False, told

    def _count(self, **more: int) -> None:
        with self._counting:
            for name, number in more.items():
                self._counts[name] += number

    def _call(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, wait: float = 0.0
    ) -> Response:
        self._count(bytes_up=len(body))
        answer = self._link.request(Request(method, path, body, headers or {}), self.timeout + wait)
        self._count(bytes_down=len(answer.body))
        if answer.status == 404 and path != "/v1/deployments":
            self._registered = False
        return answer

    def _register(self) -> str:
        """Makes this device known to the cloud, where it is not yet; its name there."""
        with self._registering:
            if self._registered and self.deployment is not None:
                return self.deployment
            thresholds = self.edge.thresholds or (
                None if self.edge.classes is None else EntropyThreshold(self.edge.classes)
            )
            if thresholds is None:
                raise Unanswered("the number of classes is not known before the first batch")
            words = {
                **self._identity, "num_classes": thresholds.num_classes, "E_max0": thresholds.e_max0,
                **({} if self.deployment is None else {"deployment": self.deployment}),
            }  # fmt: skip
            answer = self._call(
                "POST", "/v1/deployments", json.dumps(words).encode(), {"content-type": "application/json"}
            )
            if answer.status != 201:
                raise _unanswered(answer)
            told = answer.json()
            try:
                name, after = str(told["deployment"]), int(told["next_sequence"])
                if int(told["version"]) == 0:
                    self.edge.begin((int(told["epoch"]), 0))
            except (KeyError, TypeError, ValueError):
                raise BadMessage("the answer to a registration lacks its deployment") from None
            self.deployment, self._sequence = name, max(self._sequence, after)
            self._registered = True
            return name

    def _send(self) -> bool:
        """Sends the oldest parcel; whether there was one. Where it fails, the parcel is the next one again."""
        with self._sending:
            if self._in_flight is None:
                self._in_flight = self._outbox.take()
            parcel = self._in_flight
            if parcel is None:
                return False
            name, number = self._register(), count(parcel.samples)
            if parcel.body is None:
                parcel.body = pack(encode(parcel.samples, self.codec), {})
            if len(parcel.body) > LARGEST_BODY and number > 1:
                self._in_flight = None
                self._outbox.give_back(parcel.halves())
                return True
            if parcel.sequence is None:
                parcel.sequence, self._sequence = self._sequence, self._sequence + 1
            key = {"idempotency-key": f"{name}:{parcel.sequence}", "content-type": "application/octet-stream"}
            answer = self._call("POST", "/v1/samples", parcel.body, key)
            self._settle(parcel, answer, number)
            self.connected = True
            return True

    def _settle(self, parcel: Parcel, answer: Response, number: int) -> None:
        if answer.status in (202, 409):  # taken, or taken before: the answer to that one was lost
            self._count(uploaded=number, messages=1)
        elif answer.status == 413 and number > 1:
            self._outbox.give_back(parcel.halves())
        elif answer.status == 413:
            self._count(too_large=1)
        elif answer.status in (400, 422):
            self._count(refused_samples=number)
            log.warning("the cloud does not take %d samples: %s", number, _sentence(answer))
        elif answer.status == 429:
            self._count(put_off=number)
            self._in_flight = None
            raise _unanswered(answer)
        else:
            raise _unanswered(answer)
        self._in_flight = None

    def _ask(self, wait: float, settled: bool = False) -> bool:
        """Asks for new parameters and lays them ready; whether the cloud has worked on everything."""
        name = self._register()
        edge = self.edge
        if edge.rolled_back:
            words = json.dumps({"deployment": name, "reason": edge.rolled_back}).encode()
            answer = self._call("POST", "/v1/rollback", words)
            if answer.status != 200:
                raise _unanswered(answer)
            told = answer.json()
            edge.cloud_rolled_back((int(told["epoch"]), int(told["version"])))
        query: dict[str, Any] = {"deployment": name, "wait": f"{wait:g}", "rejected": edge.stats.refused_updates}
        moment = None if self._ask_for_all else edge.moment
        if moment is not None:
            query["since"] = f"{moment[0]}.{moment[1]}"
        if settled:
            query["settled"] = 1
        answer = self._call("GET", f"/v1/params?{urlencode(query)}", wait=wait)
        if answer.status == 200:
            try:
                edge.offer(answer.body)
            except Refused:
                self._ask_for_all = True
                raise
            self._ask_for_all = False
        elif answer.status != 304:
            raise _unanswered(answer)
        self.connected = True
        return answer.headers.get("settled", "1") == "1"


def _sentence(answer: Response) -> str:
    try:
        return str(answer.json().get("error", ""))[:300]
    except BadMessage:
        return ""


def _unanswered(answer: Response) -> Unanswered:
    after = answer.headers.get("retry-after", "")
    seconds = float(after) if after.isdecimal() else None
    return Unanswered(f"the cloud answered {answer.status} {_sentence(answer)}", seconds)
