"""How a device's calls reach its cloud: over HTTP with connections that are kept, or straight into a server in the same process."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import warnings
from typing import Protocol
from urllib.parse import urlsplit

from headway.learning.cloud_edge.cloud import CloudServer
from headway.learning.cloud_edge.messages import BadMessage, Request, Response


class Transport(Protocol):
    """Carries a call to the cloud. Raises OSError, http.client.HTTPException or BadMessage where it does not get there and back."""

    def request(self, request: Request, timeout: float) -> Response:
        """The answer, which comes within ``timeout`` seconds or not at all."""
        ...

    def close(self) -> None:
        """Ends whatever is under way."""
        ...


class LocalTransport:
    """Calls a server in this process; without a worker of its own it works before it answers."""

    def __init__(self, cloud: CloudServer) -> None:
        self.cloud = cloud

    def request(self, request: Request, timeout: float) -> Response:
        """The server's answer."""
        answer = self.cloud.handle(request)
        if not self.cloud.working:
            self.cloud.process()
        return answer

    def close(self) -> None:
        """Nothing is open."""


class HTTPTransport:
    """HTTP/1.1 with one kept connection a thread.

    Args:
        url: "http://host:port" or "https://host:port", perhaps with a path in front of the protocol's.
        token: shown as a bearer token.
        tls: for https; the system's certificates by default.
        max_reply: bytes of the largest answer that is read.

    Raises:
        ValueError: the address is no such URL.
    """

    def __init__(
        self, url: str, token: str | None = None, tls: ssl.SSLContext | None = None, max_reply: int = 64 << 20
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the cloud's address must be http://host:port or https://host:port; it is {url!r}")
        if token is not None and parts.scheme == "http" and not _loopback(parts.hostname):
            warnings.warn(f"the token travels to {parts.hostname} in the clear; use https", stacklevel=3)
        self._host, self._port, self._secure = parts.hostname, parts.port, parts.scheme == "https"
        self._prefix, self._tls, self._max_reply = parts.path.rstrip("/"), tls, max_reply
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._mine = threading.local()
        self._open: set[http.client.HTTPConnection] = set()

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        connection = getattr(self._mine, "connection", None)
        if connection is None:
            if self._secure:
                context = self._tls or ssl.create_default_context()
                connection = http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=context)
            else:
                connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
            self._mine.connection = connection
            self._open.add(connection)
        connection.timeout = timeout
        if connection.sock is not None:
            connection.sock.settimeout(timeout)
        return connection

    def _drop(self) -> None:
        connection = getattr(self._mine, "connection", None)
        if connection is not None:
            self._open.discard(connection)
            connection.close()
            self._mine.connection = None

    def request(self, request: Request, timeout: float) -> Response:
        """Sends the call; a kept connection that the other side has closed meanwhile is opened anew, once.

        Sending twice does no harm: every message of samples has its number.
        """
        kept = getattr(self._mine, "connection", None) is not None
        try:
            return self._exchange(request, timeout)
        except TimeoutError:
            self._drop()
            raise
        except (OSError, http.client.HTTPException):
            self._drop()
            if not kept:
                raise
        except BaseException:
            self._drop()
            raise
        try:
            return self._exchange(request, timeout)
        except BaseException:
            self._drop()
            raise

    def _exchange(self, request: Request, timeout: float) -> Response:
        connection = self._connection(timeout)
        # the socket's own timeout begins anew with every byte; this one is of the whole answer
        end = threading.Timer(timeout, self._cut, [connection])
        end.daemon = True
        end.start()
        try:
            headers = {**self._headers, **request.headers}
            connection.request(request.method, self._prefix + request.path, request.body or None, headers)
            answer = connection.getresponse()
            body = answer.read(self._max_reply + 1)
        finally:
            end.cancel()
        if len(body) > self._max_reply:
            raise BadMessage(f"the answer has more than {self._max_reply} bytes")
        return Response(answer.status, body, {name.lower(): value for name, value in answer.getheaders()})

    @staticmethod
    def _cut(connection: http.client.HTTPConnection) -> None:
        if connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends whatever is under way in any thread."""
        for connection in list(self._open):
            self._cut(connection)
        self._drop()


def _loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
