"""How signed bytes travel, for threads.

A gate call is on the way of every model call, so it goes over plain keep-alive sockets with h11 for the protocol: a
fraction of the CPU of ``httpx.Client``. Where a proxy of the environment applies, or where the caller brings a client
(client certificates, own transports), it goes through ``httpx.Client``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import ssl
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from typing import Protocol
from urllib.parse import urlsplit

import httpx

from .credentials import is_loopback
from .http1 import Http1
from .wire import Answer, Patience, TransportError, WireRequest

MAX_IDLE = 64
KEEPALIVE_SECONDS = 20.0
"""How long an idle connection is used again; the gate closes it after 72 s (contract 2), proxies on the way earlier."""
_READ_SIZE = 64 * 1024


class Transport(Protocol):
    """Sends one request and brings back one answer; usable from any thread."""

    def exchange(self, request: WireRequest, patience: Patience) -> Answer:
        """Send and wait; raises ``TransportError`` where no answer came."""
        ...

    def close(self) -> None:
        """Close all connections."""
        ...


def open_transport(base_url: str, client: httpx.Client | None = None) -> Transport:
    """The transport for this address: the caller's client, a proxied one, or bare connections."""
    if client is not None:
        return HttpxTransport(base_url, client, owned=False)
    if proxy_applies(base_url):
        return HttpxTransport(base_url, httpx.Client(follow_redirects=False), owned=True)
    return SocketTransport(base_url)


def proxy_applies(base_url: str) -> bool:
    """Whether the environment names a proxy for this address; never for this machine itself."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if is_loopback(host):
        return False
    proxies = urllib.request.getproxies()
    if parts.scheme not in proxies and "all" not in proxies:
        return False
    return not urllib.request.proxy_bypass(host)


@functools.cache
def tls_context() -> ssl.SSLContext:
    """httpx's own TLS settings: certifi's roots, or those of ``SSL_CERT_FILE`` and ``SSL_CERT_DIR``."""
    return httpx.create_ssl_context()


class SocketTransport:
    """Keep-alive connections to one gate, one exchange at a time on each; a thread never waits for another one's.

    A forked child starts without connections: it leaves its parent's alone.
    """

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._netloc = parts.netloc
        self._tls = parts.scheme == "https"
        self._idle: deque[_Connection] = deque()
        self._pid = os.getpid()

    def exchange(self, request: WireRequest, patience: Patience) -> Answer:
        """Send and wait; raises ``TransportError`` where no answer came."""
        until = time.monotonic() + patience.total
        connection = self._reused() or self._opened(min(until, time.monotonic() + patience.connect))
        try:
            answer = connection.exchange(request, self._netloc, patience.read, until)
        except BaseException:
            connection.close()
            raise
        if connection.http.reusable and len(self._idle) < MAX_IDLE:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    def close(self) -> None:
        """Close the idle connections of this process; another exchange would open new ones."""
        if self._pid == os.getpid():
            with contextlib.suppress(IndexError):
                while True:
                    self._idle.pop().close()

    def _reused(self) -> _Connection | None:
        # No lock anywhere: one could be held, at a fork, by a thread that the child does not have.
        if self._pid != os.getpid():
            self._idle, self._pid = deque(), os.getpid()
        with contextlib.suppress(IndexError):
            while True:
                connection = self._idle.pop()
                if connection.is_usable(time.monotonic()):
                    return connection
                connection.close()
        return None

    def _opened(self, until: float) -> _Connection:
        # Address by address within one time: `socket.create_connection` would grant the whole time to each.
        failure: Exception | None = None
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise TransportError("connect", describe(error)) from error
        for family, kind, proto, _, address in found:
            left = until - time.monotonic()
            if left <= 0:
                break
            sock = socket.socket(family, kind, proto)
            try:
                sock.settimeout(left)
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls:
                    sock.settimeout(max(0.001, until - time.monotonic()))
                    sock = tls_context().wrap_socket(sock, server_hostname=self._host)
            except OSError as error:
                failure = error
                sock.close()
            except BaseException:
                sock.close()
                raise
            else:
                return _Connection(sock)
        text = "no connection in time" if failure is None else describe(failure)
        raise TransportError("connect", text) from failure


class _Connection:
    __slots__ = ("_sock", "http", "idle_since")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.http = Http1()
        self.idle_since = 0.0

    def exchange(self, request: WireRequest, host: str, read: float, until: float) -> Answer:
        sock, http = self._sock, self.http
        data = http.send(request, host)
        try:
            sock.settimeout(self._left(read, until))
            sock.sendall(data)
            while True:
                sock.settimeout(self._left(read, until))
                answer = http.receive(sock.recv(_READ_SIZE))
                if answer is not None:
                    return answer
        except TimeoutError as error:
            raise TransportError("timeout", "no answer in time") from error
        except OSError as error:
            raise TransportError("broken", describe(error)) from error

    def is_usable(self, now: float) -> bool:
        """Whether the connection is young enough and still open: what is readable while idle is its end."""
        return now - self.idle_since <= KEEPALIVE_SECONDS and not _readable(self._sock)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()

    @staticmethod
    def _left(read: float, until: float) -> float:
        left = until - time.monotonic()
        if left <= 0:
            raise TransportError("timeout", "no complete answer in time")
        return min(read, left)


class HttpxTransport:
    """Through an ``httpx.Client``, redirects never followed."""

    def __init__(self, base_url: str, client: httpx.Client, *, owned: bool) -> None:
        self._origin = origin_of(base_url)
        self._client = client
        self._owned = owned

    def exchange(self, request: WireRequest, patience: Patience) -> Answer:
        """Send and wait; raises ``TransportError`` where no answer came."""
        with httpx_faults():
            response = self._client.send(httpx_request(self._origin, request, patience), follow_redirects=False)
        return httpx_answer(response, request)

    def close(self) -> None:
        """Close the client where it is ours."""
        if self._owned:
            self._client.close()


def origin_of(base_url: str) -> str:
    """Scheme, host and port of a URL."""
    parts = urlsplit(base_url)
    return f"{parts.scheme}://{parts.netloc}"


def httpx_request(origin: str, request: WireRequest, patience: Patience) -> httpx.Request:
    """The same bytes as an ``httpx.Request``; its target is replaced, since httpx may spell a query its own way."""
    timeouts = {"connect": patience.connect, "read": patience.read, "write": patience.read, "pool": patience.total}
    return httpx.Request(
        request.method,
        origin + request.target,
        headers=[(name.encode("ascii"), value.encode("latin-1")) for name, value in request.headers],
        content=request.body or None,
        extensions={"timeout": timeouts, "target": request.target.encode("ascii")},
    )


def httpx_answer(response: httpx.Response, request: WireRequest) -> Answer:
    """The answer as a value."""
    return Answer(response.status_code, dict(response.headers.items()), response.content, request.request_id)


@contextlib.contextmanager
def httpx_faults() -> Iterator[None]:
    """Translate httpx's exceptions."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError) as error:
        raise TransportError("connect", describe(error)) from error
    except httpx.TimeoutException as error:
        raise TransportError("timeout", describe(error)) from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise TransportError("broken", describe(error)) from error


def describe(error: BaseException) -> str:
    """Kind and text of an exception, e.g. ``ConnectionRefusedError: [Errno 111] Connection refused``."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _readable(sock: socket.socket) -> bool:
    try:
        if hasattr(select, "poll"):
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            return bool(poll.poll(0))
        return bool(select.select([sock], [], [], 0)[0])
    except (OSError, ValueError):
        return True
