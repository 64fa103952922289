"""How signed bytes travel, for threads: httpx's own connection pool, without the client machinery around it.

A gate call is on the way of every model call, so it goes straight to the pool (``httpcore``): 165 µs of CPU instead of
360 µs through ``httpx.Client``, measured on one exchange. Where a proxy of the environment applies, or where the caller
brings a client (client certificates, own transports), it goes through ``httpx.Client``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpcore
import httpx

from .credentials import is_loopback
from .wire import Answer, Patience, TransportError, WireRequest

MAX_CONNECTIONS = 64
KEEPALIVE_SECONDS = 60.0
"""Shorter than the 72 s after which the gate closes an idle connection (gate contract 2)."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024


class Transport(Protocol):
    """Sends one request and brings back one answer; usable from any thread."""

    def exchange(self, request: WireRequest, patience: Patience) -> Answer:
        """Send and wait; raises ``TransportError`` where no answer came."""
        ...

    def close(self) -> None:
        """Close all connections."""
        ...


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


def open_transport(base_url: str, client: httpx.Client | None = None) -> Transport:
    """The transport for this address: the caller's client, a proxied one, or the bare pool."""
    if client is not None:
        return HttpxTransport(base_url, client, owned=False)
    if proxy_applies(base_url):
        return HttpxTransport(base_url, httpx.Client(follow_redirects=False), owned=True)
    return PooledTransport(base_url)


class HttpxTransport:
    """Through an ``httpx.Client``, redirects never followed."""

    def __init__(self, base_url: str, client: httpx.Client, *, owned: bool) -> None:
        parts = urlsplit(base_url)
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._client = client
        self._owned = owned

    def exchange(self, request: WireRequest, patience: Patience) -> Answer:
        """Send and wait; raises ``TransportError`` where no answer came."""
        message = httpx_request(self._origin, request, patience)
        with httpx_faults():
            response = self._client.send(message, follow_redirects=False)
        return Answer(response.status_code, dict(response.headers.items()), response.content, request.request_id)

    def close(self) -> None:
        """Close the client where it is ours."""
        if self._owned:
            self._client.close()


class PooledTransport:
    """A pool of keep-alive connections to one gate. A forked child starts with an empty pool of its own."""

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        self._scheme = parts.scheme.encode("ascii")
        self._host = (parts.hostname or "").encode("ascii")
        self._port = parts.port
        self._host_header = (b"host", parts.netloc.encode("ascii"))
        self._ssl_context: ssl.SSLContext | None = None
        self._pool: httpcore.ConnectionPool | None = None
        self._pid = 0
        self._deadline = _Deadline()

    def exchange(self, request: WireRequest, patience: Patience) -> Answer:
        """Send and wait; raises ``TransportError`` where no answer came."""
        pool = self._pool
        if pool is None or self._pid != os.getpid():
            pool = self._fresh_pool()
        message = httpcore.Request(
            method=request.method.encode("ascii"),
            url=httpcore.URL(
                scheme=self._scheme, host=self._host, port=self._port, target=request.target.encode("ascii")
            ),
            headers=[self._host_header, *wire_headers(request)],
            content=request.body,
            extensions={"timeout": patience.as_dict()},
        )
        self._deadline.at = time.monotonic() + patience.total
        with httpcore_faults():
            response = pool.handle_request(message)
            try:
                body = _bounded(response.iter_stream())
            finally:
                response.close()
        return Answer(response.status, decoded_headers(response.headers), body, request.request_id)

    def close(self) -> None:
        """Close all connections of this process; the next exchange would open new ones."""
        pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.close()

    def _fresh_pool(self) -> httpcore.ConnectionPool:
        # Two threads may both come here first: both pools work, the loser's is dropped with its one connection. A lock
        # could be held by a thread that does not exist in a forked child.
        if self._scheme == b"https" and self._ssl_context is None:
            self._ssl_context = httpx.create_ssl_context()
        pool = httpcore.ConnectionPool(
            ssl_context=self._ssl_context,
            max_connections=MAX_CONNECTIONS,
            max_keepalive_connections=MAX_CONNECTIONS,
            keepalive_expiry=KEEPALIVE_SECONDS,
            network_backend=_BoundedBackend(self._deadline),
        )
        self._pool, self._pid = pool, os.getpid()
        return pool


class _Deadline(threading.local):
    """When the exchange of the current thread has to be over (monotonic seconds)."""

    at: float = float("inf")

    def bound(self, timeout: float | None, error: type[Exception]) -> float:
        left = self.at - time.monotonic()
        if left <= 0:
            raise error("the time for the whole exchange is over")
        return left if timeout is None else min(timeout, left)


class _BoundedBackend(httpcore.SyncBackend):
    """Lets no single step outlive the exchange: a server that sends a byte now and then would, and so would a name
    with many dead addresses."""

    def __init__(self, deadline: _Deadline) -> None:
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        until = time.monotonic() + (timeout if timeout is not None else float("inf"))
        for *_, address in found:
            left = self._deadline.bound(until - time.monotonic(), httpcore.ConnectTimeout)
            if left <= 0:
                break
            try:
                stream = super().connect_tcp(str(address[0]), port, left, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return _BoundedStream(stream, self._deadline)
        raise failure


class _BoundedStream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.bound(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.bound(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        bound = self._deadline.bound(timeout, httpcore.ConnectTimeout)
        return _BoundedStream(self._stream.start_tls(ssl_context, server_hostname, bound), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def wire_headers(request: WireRequest) -> Iterator[tuple[bytes, bytes]]:
    """Headers as bytes; values are Latin-1, as the gate reads them (gate contract 3.2)."""
    for name, value in request.headers:
        yield name.encode("ascii"), value.encode("latin-1")
    if request.body:
        yield b"content-length", b"%d" % len(request.body)


def decoded_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Header names in lower case; of a repeated one the last."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}


def httpx_request(origin: str, request: WireRequest, patience: Patience) -> httpx.Request:
    """The same bytes as an ``httpx.Request``."""
    return httpx.Request(
        request.method,
        origin + request.target,
        headers=list(wire_headers(request)),
        content=request.body or None,
        extensions={"timeout": patience.as_dict()},
    )


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


class httpcore_faults:
    """Translate httpcore's exceptions; a class because it is on the way of every call."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, TransportError):
            return
        if isinstance(error, (httpcore.ConnectError, httpcore.ConnectTimeout, httpcore.PoolTimeout)):
            raise TransportError("connect", describe(error)) from error
        if isinstance(error, httpcore.TimeoutException):
            raise TransportError("timeout", describe(error)) from error
        raise TransportError("broken", describe(error)) from error


def describe(error: BaseException) -> str:
    """Kind and text of an exception, e.g. ``ConnectError: [Errno 111] Connection refused``."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _bounded(chunks: Iterable[bytes]) -> bytes:
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise TransportError("broken", f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    return b"".join(parts)
