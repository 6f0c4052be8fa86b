"""A device's talk with its cloud, one call at a time: register, send what was chosen, ask for new parameters.

Every call counts what it moved and raises where it led nowhere; whoever calls tries again.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
from typing import Any
from urllib.parse import urlencode

from headway.learning.cloud_edge.affine import count
from headway.learning.cloud_edge.edge import EdgeModel, Refused
from headway.learning.cloud_edge.messages import BadMessage, Codec, Request, Response, encode, pack
from headway.learning.cloud_edge.outbox import Outbox, Parcel
from headway.learning.cloud_edge.selection import EntropyThreshold
from headway.learning.cloud_edge.transport import Transport

log = logging.getLogger(__name__)
LARGEST_BODY = 32 << 20
TROUBLE = (OSError, http.client.HTTPException, ValueError)
_COUNTED = ["uploaded", "messages", "refused_samples", "too_large", "put_off", "failures", "bytes_up", "bytes_down"]


class Unanswered(BadMessage):
    """The cloud gave an answer that helps nothing now: ask again later.

    Attributes:
        after: seconds the cloud asks to wait, or None.
    """

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


class Uplink:
    """The calls of one device. Threads may make them side by side; what is sent keeps its order.

    Args:
        edge: whose parameters are asked for.
        link: carries the calls.
        outbox: what is to be sent.
        identity: what the cloud compares with its own network.
        codec, timeout, deployment: see :class:`~headway.learning.cloud_edge.client.EdgeClient`.

    Attributes:
        connected, last_error: whether the last call went well, and what went wrong last.
        ask_for_all: the next question asks for every parameter, not for what changed.
    """

    def __init__(
        self,
        edge: EdgeModel,
        link: Transport,
        outbox: Outbox,
        identity: dict[str, Any],
        codec: Codec,
        timeout: float,
        deployment: str | None,
    ) -> None:
        self.edge, self.link, self.outbox, self.deployment = edge, link, outbox, deployment
        self.connected, self.last_error, self.ask_for_all = False, "", False
        self._identity, self._timeout = identity, timeout
        self._codec: Codec = codec
        self._in_flight: Parcel | None = None
        self._sequence, self._registered = 1, False
        self._registering, self._sending, self._counting = threading.Lock(), threading.Lock(), threading.Lock()
        self._counts: dict[str, int] = dict.fromkeys(_COUNTED, 0)

    def counts(self) -> dict[str, int]:
        """Samples, messages, failures and bytes so far."""
        with self._counting:
            return dict(self._counts)

    def failed(self, error: Exception) -> None:
        """Counts a call that led nowhere, and tells it in the log."""
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
        answer = self.link.request(Request(method, path, body, headers or {}), self._timeout + wait)
        self._count(bytes_down=len(answer.body))
        if answer.status == 404 and path != "/v1/deployments":
            self._registered = False
        return answer

    def register(self) -> str:
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

    def send(self) -> bool:
        """Sends the oldest parcel; whether there was one. Where it fails, the parcel is the next one again."""
        with self._sending:
            if self._in_flight is None:
                self._in_flight = self.outbox.take()
            parcel = self._in_flight
            if parcel is None:
                return False
            name, number = self.register(), count(parcel.samples)
            if parcel.body is None:
                try:
                    parcel.body = pack(encode(parcel.samples, self._codec), {})
                except ValueError as error:  # no later try would go better
                    self._in_flight = None
                    self._count(refused_samples=number)
                    log.warning("%d samples cannot be sent: %s", number, error)
                    return True
            if len(parcel.body) > LARGEST_BODY and number > 1:
                self._in_flight = None
                self.outbox.give_back(parcel.halves())
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
            self.outbox.give_back(parcel.halves())
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

    def ask(self, wait: float, settled: bool = False) -> bool:
        """Asks for new parameters and lays them ready; whether the cloud has worked on everything."""
        name = self.register()
        edge = self.edge
        if edge.rolled_back:
            words = json.dumps({"deployment": name, "reason": edge.rolled_back}).encode()
            answer = self._call("POST", "/v1/rollback", words)
            if answer.status != 200:
                raise _unanswered(answer)
            told = answer.json()
            edge.cloud_rolled_back((int(told["epoch"]), int(told["version"])))
        query: dict[str, Any] = {"deployment": name, "wait": f"{wait:g}", "rejected": edge.stats.refused_updates}
        moment = None if self.ask_for_all else edge.moment
        if moment is not None:
            query["since"] = f"{moment[0]}.{moment[1]}"
        if settled:
            query["settled"] = 1
        answer = self._call("GET", f"/v1/params?{urlencode(query)}", wait=wait)
        if answer.status == 200:
            try:
                edge.offer(answer.body)
            except Refused:
                self.ask_for_all = True
                raise
            self.ask_for_all = False
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
