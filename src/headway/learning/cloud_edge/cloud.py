"""The cloud: answers the protocol's calls, whatever carries them, and adapts its copies of the edge network in one worker.

    POST /v1/deployments   {model_hash, num_classes, dtype, E_max0}  -> 201 {deployment, epoch, version, thresholds}; 409: other network
    POST /v1/samples       Idempotency-Key deployment:sequence       -> 202; 409 had it already; 413; 422 not finite; 429 wait
    GET  /v1/params        ?deployment=&since=epoch.version&wait=    -> 304, or 200 with what changed; ``wait`` holds the answer back
    POST /v1/rollback      {deployment, reason}                      -> 200 {epoch, version} of the source parameters, newly published
    GET  /v1/health                                                  -> 200 {status, epoch, processes, deployments}

Answers never wait for a step: what edges may fetch is published beside the network that is worked on.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch
from torch import nn

from headway.learning.cloud_edge.affine import architecture_hash, class_count, count, weights_checksum
from headway.learning.cloud_edge.deployment import Deployment
from headway.learning.cloud_edge.messages import BadMessage, Request, Response, decode, parse_json, unpack
from headway.learning.cloud_edge.settings import Settings, prepare
from headway.learning.cloud_edge.workshop import Workshop

log = logging.getLogger(__name__)
LONGEST_WAIT = 30.0
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class CloudServer:
    """The server's side of cloud-edge adaptation.

    Args:
        edge_model: the network of the devices, with the very weights they start from.
        foundation_model: the teacher, for the same classes.
        batch_size, replay, edge_lr, cloud_lr, **settings: see :class:`~headway.learning.cloud_edge.settings.Settings`.
        state_dir: a folder in which everything is kept across restarts; nothing is kept without it.
        shared: one adapted copy for all edges instead of one each.
        token: what edges must show as "Authorization: Bearer ..."; None lets everybody in.
        queue: samples of one copy that may wait for the worker.
        max_body: bytes of the largest message.
        max_deployments: adapted copies at most.
        checkpoint_every: steps between two writes to ``state_dir``.
        processes: that share every batch and do each step together (:mod:`~headway.learning.cloud_edge.crew`); with 1 the server does
            it itself. With more, what is given must be picklable and a script needs ``if __name__ == "__main__":``.

    The models given are copied and stay as they are.

    Raises:
        ValueError: a network without affine normalisation, different numbers of classes, a ``state_dir`` of another network, or
            networks that several processes cannot share.
    """

    def __init__(
        self,
        edge_model: nn.Module,
        foundation_model: nn.Module,
        batch_size: int = 32,
        replay: int = 10_000,
        edge_lr: float = 2.5e-3,
        cloud_lr: float = 2.5e-4,
        state_dir: str | os.PathLike[str] | None = None,
        *,
        shared: bool = False,
        token: str | None = None,
        queue: int = 4096,
        max_body: int = 8 << 20,
        max_deployments: int = 64,
        checkpoint_every: int = 10,
        processes: int = 1,
        **settings: Any,
    ) -> None:
        self.settings = Settings(batch_size, replay, edge_lr=edge_lr, cloud_lr=cloud_lr, **settings)
        self.architecture, self.weights = architecture_hash(edge_model), weights_checksum(edge_model)
        self.classes = class_count(edge_model)
        models = prepare(edge_model, foundation_model, self.settings)
        self._shop = Workshop(models, self.settings, self.architecture, state_dir, checkpoint_every, processes)
        self.shared, self.token, self.queue, self.max_body = shared, token, queue, max_body
        self.max_deployments = max_deployments

    # --- the protocol

    def handle(self, request: Request) -> Response:
        """Answers one call; an error is a JSON object with one sentence. Any number of threads may call it at once."""
        parts = urlsplit(request.path)
        calls: dict[str, tuple[str, Callable[..., Response]]] = {
            "/v1/deployments": ("POST", self._register),
            "/v1/samples": ("POST", self._samples),
            "/v1/params": ("GET", self._params),
            "/v1/rollback": ("POST", self._roll_back),
            "/v1/health": ("GET", self._health),
        }
        if not self._allowed(request):
            return _error(401, "this server asks for a bearer token; set token=", {"www-authenticate": "Bearer"})
        if parts.path not in calls:
            return _error(404, f"there is no {parts.path}; there are {', '.join(calls)}")
        method, call = calls[parts.path]
        if request.method != method:
            return _error(405, f"{parts.path} answers {method}", {"allow": method})
        if len(request.body) > self.max_body:
            return _error(413, f"a message may have {self.max_body} bytes; this one has {len(request.body)}")
        try:
            return call(request, dict(parse_qsl(parts.query)))
        except BadMessage as error:
            return _error(400, str(error))
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return _error(500, "the server failed; its log says why")

    def _allowed(self, request: Request) -> bool:
        given = request.headers.get("authorization", "")
        return self.token is None or hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode())

    def _register(self, request: Request, query: dict[str, str]) -> Response:
        asked = parse_json(request.body)
        e_max0, classes = asked.get("E_max0"), asked.get("num_classes")
        if not isinstance(e_max0, int | float) or not 0 < e_max0 < 100 or not isinstance(classes, int):
            return _error(400, f"E_max0 (nats) and num_classes are needed; they are {e_max0!r} and {classes!r}")
        if asked.get("model_hash") != self.architecture:
            return _error(
                409, "the edge's network has other tensors than the server's; deploy the same network on both"
            )
        if self.classes is not None and classes != self.classes:
            return _error(409, f"the edge tells {classes} classes apart, the server's network {self.classes}")
        if asked.get("weights", self.weights) != self.weights:
            return _error(409, "the edge's weights differ from the server's; load the same checkpoint on both")
        name = asked.get("deployment") or uuid.uuid4().hex
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            return _error(400, "a deployment is named by up to 64 letters, digits, - and _")
        shop = self._shop
        with shop.news:
            copy = shop.of_edge.get(name) or (shop.copies.get("shared") if self.shared else None)
            if copy is None:
                if len(shop.copies) >= self.max_deployments:
                    return _error(503, f"this server holds {self.max_deployments} deployments and takes no more")
                copy = shop.new_copy("shared" if self.shared else name, float(e_max0))
            shop.of_edge[name] = copy
            last = copy.sequences.setdefault(name, 0)
        now = copy.published
        return _json(201, {
            "deployment": name, "epoch": now.epoch, "version": now.version, "next_sequence": last + 1,
            "thresholds": {"E_max0": copy.adapter.e_max0},
        })  # fmt: skip

    def _copy_of(self, edge: str | None) -> Deployment | Response:
        copy = self._shop.of_edge.get(edge or "")
        return copy or _error(404, f"there is no deployment {edge!r}; register at /v1/deployments")

    def _samples(self, request: Request, query: dict[str, str]) -> Response:
        edge, _, number = request.headers.get("idempotency-key", "").rpartition(":")
        if not number.isdecimal():
            return _error(400, "the header Idempotency-Key must be deployment:sequence")
        copy = self._copy_of(edge)
        if isinstance(copy, Response):
            return copy
        samples = decode(unpack(request.body)[0])
        if not all(torch.isfinite(t).all() for t in samples.values() if t.is_floating_point()):
            copy.counters.refused += count(samples)
            return _error(422, "a sample is not finite; nothing of the message was taken")
        with self._shop.news:
            if int(number) <= copy.sequences[edge]:
                copy.counters.duplicates += 1
                return _error(409, f"message {number} of {edge} was taken already")
            if copy.queued + count(samples) > self.queue and copy.inbox:
                return _error(429, f"{copy.queued} samples wait already", {"retry-after": "1"})
            if why := copy.misfit(samples):
                copy.counters.refused += count(samples)
                return _error(422, why)
            copy.sequences[edge] = int(number)
            copy.counters.received += count(samples)
            copy.counters.bytes_in += len(request.body)
            if count(samples):
                copy.inbox.append(samples)
            self._shop.news.notify_all()
        return _json(202, {"queued": copy.queued, "version": copy.published.version})

    def _params(self, request: Request, query: dict[str, str]) -> Response:
        copy = self._copy_of(query.get("deployment"))
        if isinstance(copy, Response):
            return copy
        try:
            since = _moment(query.get("since"), self.epoch)
            wait = min(max(float(query.get("wait", 0)), 0.0), LONGEST_WAIT)
            rejected = int(query.get("rejected", 0))
        except ValueError:
            return _error(400, "since is epoch.version, wait are seconds, rejected is a number")
        if rejected:
            copy.counters.rejected[query["deployment"]] = rejected
        settle = query.get("settled") == "1"

        def ready() -> bool:
            now = (copy.published.epoch, copy.published.version)
            return self._shop.closed or (copy.settled if settle else now != since)

        with self._shop.news:
            self._shop.news.wait_for(ready, wait)
            now, settled = copy.published, copy.settled
        headers = {"settled": str(int(settled))}
        if since == (now.epoch, now.version):
            return Response(304, b"", headers)
        body = now.message(since)
        copy.counters.bytes_out += len(body)
        return Response(200, body, {**headers, "content-type": "application/octet-stream"})

    def _roll_back(self, request: Request, query: dict[str, str]) -> Response:
        asked = parse_json(request.body)
        copy = self._copy_of(asked.get("deployment"))
        if isinstance(copy, Response):
            return copy
        with copy.at_work:
            copy.roll_back()
        log.warning("deployment %s was rolled back: %s", copy.name, asked.get("reason"))
        with self._shop.news:
            self._shop.news.notify_all()
        return _json(200, {"epoch": copy.published.epoch, "version": copy.published.version})

    def _health(self, request: Request, query: dict[str, str]) -> Response:
        copies = {name: copy.health() for name, copy in list(self._shop.copies.items())}
        crew = self._shop.crew
        processes = {} if crew is None else {"asked": crew.processes, "alive": crew.alive, "losses": crew.losses}
        return _json(200, {"status": "ok", "epoch": self.epoch, "processes": processes, "deployments": copies})

    # --- the work

    def start(self) -> None:
        """Starts the worker; front ends do so by themselves."""
        self._shop.start()

    @property
    def working(self) -> bool:
        """Whether a worker of its own looks after what comes in."""
        return self._shop.working

    @property
    def epoch(self) -> int:
        """The number of this start; a later start has a larger one."""
        return self._shop.epoch

    def process(self) -> None:
        """Works on all that waits, here and now: what the worker does by itself once it is started."""
        self._shop.process()

    def settle(self, timeout: float = 60.0) -> bool:
        """Waits until nothing waits to be worked on; whether that came to be in time."""
        return self._shop.settle(timeout)

    def deployment(self, name: str) -> Deployment:
        """The adapted copy that an edge follows; KeyError where there is no such edge."""
        return self._shop.of_edge[name]

    def close(self) -> None:
        """Stops the worker after the step it is at, and writes everything but what still waits for it to ``state_dir``."""
        self._shop.close()

    def __enter__(self) -> CloudServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def serve(self, host: str = "127.0.0.1", port: int = 8008, **options: Any) -> None:
        """Serves HTTP until interrupted; see :class:`headway.learning.cloud_edge.server.HTTPFrontEnd` for the options."""
        from headway.learning.cloud_edge.server import HTTPFrontEnd

        with HTTPFrontEnd(self, host, port, **options) as front:
            log.info("serving %s", front.url)
            while True:
                time.sleep(3600)


def _moment(text: str | None, epoch: int) -> tuple[int, int] | None:
    """ "epoch.version", or a version of the present epoch."""
    if text is None:
        return None
    before, _, version = text.rpartition(".")
    return int(before) if before else epoch, int(version)


def _json(status: int, words: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(status, json.dumps(words).encode(), {"content-type": "application/json", **(headers or {})})


def _error(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    return _json(status, {"error": sentence}, headers)
