"""The cloud on the network: the standard library's HTTP server, an ASGI application, and a command.

    python -m headway.learning.cloud_edge.server --edge pkg.models:edge --foundation pkg.models:foundation --state-dir state --port 8008

The factories return networks with their trained weights. The token is read from the environment (HEADWAY_TOKEN), so that it stands in
no list of processes.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import os
import signal
import socketserver
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from headway.learning.cloud_edge.cloud import LONGEST_WAIT, CloudServer
from headway.learning.cloud_edge.messages import Request, Response

log = logging.getLogger(__name__)
_BEARABLE = 64 << 20  # bytes of a body too long that are read all the same


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "headway", ""
    timeout = 2 * LONGEST_WAIT  # of a silent connection
    wbufsize = 1 << 16
    disable_nagle_algorithm = True
    cloud: CloudServer

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not length.isdecimal():
            self._send(Response(411, b'{"error": "Content-Length is needed"}'), close=True)
            return
        if int(length) > self.cloud.max_body:
            # read to its end where that is bearable: who is still sending does not see an answer
            left = int(length) if int(length) <= _BEARABLE else 0
            while left > 0 and (part := self.rfile.read(min(left, 1 << 16))):
                left -= len(part)
            told = f'{{"error": "a message may have {self.cloud.max_body} bytes; this one has {length}"}}'
            self._send(Response(413, told.encode()), close=True)
            return
        body = self.rfile.read(int(length))
        if len(body) < int(length):  # the sender is gone
            self.close_connection = True
            return
        self._send(self.cloud.handle(Request(self.command, self.path, body, headers)))

    def _send(self, response: Response, close: bool = False) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        if response.status != 304:
            self.send_header("content-length", str(len(response.body)))
        if close:
            self.send_header("connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(response.body)
        self.wfile.flush()

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.address_string(), format % args)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        # a device that goes away in the middle is everyday life
        log.debug("connection of %s ended: %s", client_address, sys.exc_info()[1])


class HTTPFrontEnd:
    """Serves a cloud over HTTP/1.1 with connections that stay open, one thread a connection.

    Args:
        cloud: its worker is started, and ended by :meth:`close`.
        host, port: where to listen; port 0 takes a free one, see ``url``.
        tls: serves https with this context's certificate.

    Raises:
        OSError: the port is taken, or not allowed.
    """

    def __init__(
        self, cloud: CloudServer, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        self.cloud = cloud
        handler = type("Handler", (_Handler,), {"cloud": cloud})
        self._server: socketserver.TCPServer = _Server((host, port), handler)
        if tls is not None:
            # the handshake is done by the connection's own thread, so that a silent stranger holds up nobody
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"http{'' if tls is None else 's'}://{host}:{self._server.server_address[1]}"
        cloud.start()
        self._thread = threading.Thread(target=self._server.serve_forever, name="cloud-edge http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening, then the cloud."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.cloud.close()

    def __enter__(self) -> HTTPFrontEnd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def asgi_app(cloud: CloudServer) -> Callable[..., Awaitable[None]]:
    """The same protocol as an ASGI 3 application, for uvicorn, hypercorn and their like.

    The cloud's worker starts with the application's lifespan, or with the first call where the server has none.
    """

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            cloud.start()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await asyncio.to_thread(cloud.close)
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["type"] != "http":
            raise ValueError(f"this application speaks http; it was asked for {scope['type']}")
        cloud.start()
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            # what is too long is read to its end and not kept
            if len(body) <= cloud.max_body:
                body += message.get("body", b"")
            more = message.get("more_body", False)
        query = scope.get("query_string", b"").decode("latin-1")
        path = scope["path"] + (f"?{query}" if query else "")
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        answer = await asyncio.to_thread(cloud.handle, Request(scope["method"], path, body, headers))
        told = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers.items()]
        if answer.status != 304:
            told.append((b"content-length", str(len(answer.body)).encode()))
        await send({"type": "http.response.start", "status": answer.status, "headers": told})
        await send({"type": "http.response.body", "body": answer.body})

    return app


def main(arguments: list[str] | None = None) -> None:
    """The command: serves until it is told to stop, then saves."""
    from headway.models import load_model

    parser = argparse.ArgumentParser(prog="python -m headway.learning.cloud_edge.server", description=__doc__)
    parser.add_argument("--edge", required=True, help="pkg.module:factory of the devices' network")
    parser.add_argument("--foundation", required=True, help="pkg.module:factory of the teacher")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8008, help="0 takes a free one, which is printed")
    parser.add_argument("--state-dir", help="keeps everything across restarts")
    parser.add_argument("--shared", action="store_true", help="one adapted copy for all devices")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--replay", type=int, default=10_000)
    parser.add_argument("--edge-lr", type=float, default=2.5e-3)
    parser.add_argument("--cloud-lr", type=float, default=2.5e-4)
    parser.add_argument("--checkpoint-every", type=int, default=10, help="steps between two writes to the state")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes that share every batch and do each step together"
    )
    parser.add_argument("--certificate", help="PEM file with certificate and key: serves https")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    tls = None
    if given.certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(given.certificate)
    if given.processes > 1 and "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload(
            ["headway.learning.cloud_edge.crew_member"]
        )  # new processes start at once
    cloud = CloudServer(
        load_model(given.edge)[0], load_model(given.foundation)[0], given.batch_size, given.replay, given.edge_lr,
        given.cloud_lr, given.state_dir, shared=given.shared, token=os.environ.get("HEADWAY_TOKEN") or None,
        checkpoint_every=given.checkpoint_every, processes=given.processes,
    )  # fmt: skip
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with HTTPFrontEnd(cloud, given.host, given.port, tls) as front:
        print(f"listening on {front.url}", flush=True)
        stop.wait()


if __name__ == "__main__":
    main()
