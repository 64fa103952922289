"""How signed bytes travel, for event loops.

On asyncio (uvloop included) over plain keep-alive connections with h11 for the protocol: a sixth of the CPU of
``httpx.AsyncClient``, and one turn of the loop instead of seven. On trio, with a proxy of the environment or with the
caller's own client it goes through ``httpx.AsyncClient``.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from typing import Protocol, cast
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel
import httpx

from .http1 import Http1
from .transport import (
    KEEPALIVE_SECONDS,
    MAX_IDLE,
    describe,
    httpx_answer,
    httpx_faults,
    httpx_request,
    origin_of,
    proxy_applies,
    tls_context,
)
from .wire import Answer, Patience, TransportError, WireRequest

MAX_CONNECTIONS = 64
"""Exchanges at one time on one loop; more wait for their turn, within their own time-out."""


class AsyncTransport(Protocol):
    """Sends one request and brings back one answer; usable from any event loop."""

    async def exchange(self, request: WireRequest, patience: Patience) -> Answer:
        """Send and wait; raises ``TransportError`` where no answer came."""
        ...

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        ...


def open_async_transport(base_url: str, client: httpx.AsyncClient | None = None) -> AsyncTransport:
    """The transport for this address: the caller's client, a proxied one, or bare connections."""
    if client is not None or proxy_applies(base_url):
        return AsyncHttpxTransport(base_url, client)
    return LoopTransport(base_url)


class LoopTransport:
    """Keep-alive connections to one gate, a set of its own for every event loop, forgotten with it."""

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._netloc = parts.netloc
        self._context = tls_context() if parts.scheme == "https" else None
        self._base_url = base_url
        self._elsewhere: AsyncHttpxTransport | None = None
        self._pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Pool] = weakref.WeakKeyDictionary()
        self._opening = threading.Lock()
        self._pid = os.getpid()

    async def exchange(self, request: WireRequest, patience: Patience) -> Answer:
        """Send and wait; raises ``TransportError`` where no answer came."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return await self._on_trio().exchange(request, patience)
        pool = self._pool_of(loop)
        until = loop.time() + patience.total
        connection = await pool.acquire(until)
        try:
            if connection is None:
                connection = await self._opened(loop, min(patience.connect, until - loop.time()))
            return await connection.exchange(request, self._netloc, patience.read, until)
        finally:
            pool.release(connection)

    async def aclose(self) -> None:
        """Close the connections of the running loop; another exchange would open new ones."""
        if self._elsewhere is not None:
            await self._elsewhere.aclose()
        try:
            pool = self._pools.pop(asyncio.get_running_loop(), None)
        except RuntimeError:
            return
        if pool is not None and self._pid == os.getpid():
            pool.close()
            await asyncio.sleep(0)

    def _on_trio(self) -> AsyncHttpxTransport:
        if self._elsewhere is None:
            self._elsewhere = AsyncHttpxTransport(self._base_url, None)
        return self._elsewhere

    def _pool_of(self, loop: asyncio.AbstractEventLoop) -> _Pool:
        if self._pid != os.getpid():
            # The parent's lock may have been held at the fork.
            self._opening = threading.Lock()
            self._pools, self._pid = weakref.WeakKeyDictionary(), os.getpid()
        pool = self._pools.get(loop)
        if pool is None:
            with self._opening:
                # A pool's transports keep their loop alive, so those of closed loops have to be dropped by hand.
                for other in [known for known in list(self._pools) if known.is_closed()]:
                    del self._pools[other]
                pool = self._pools[loop] = _Pool(loop)
        return pool

    async def _opened(self, loop: asyncio.AbstractEventLoop, seconds: float) -> _Connection:
        try:
            _, connection = await asyncio.wait_for(
                loop.create_connection(
                    lambda: _Connection(loop),
                    self._host,
                    self._port,
                    ssl=self._context,
                    server_hostname=self._host if self._context else None,
                ),
                max(seconds, 0.001),
            )
        except asyncio.TimeoutError as error:
            raise TransportError("connect", "no connection in time") from error
        except OSError as error:
            raise TransportError("connect", describe(error)) from error
        return connection


class _Pool:
    """The connections of one loop. Whoever acquires releases, with the connection or without one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._idle: deque[_Connection] = deque()
        self._waiting: deque[asyncio.Future[_Connection | None]] = deque()
        self._busy = 0

    async def acquire(self, until: float) -> _Connection | None:
        """An idle connection, or None for the right to open one; waits where too many are busy."""
        if self._busy < MAX_CONNECTIONS:
            self._busy += 1
            return self._usable()
        turn: asyncio.Future[_Connection | None] = self._loop.create_future()
        self._waiting.append(turn)
        timer = self._loop.call_at(until, _give_up, turn)
        try:
            return await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.release(turn.result())
            raise
        finally:
            timer.cancel()

    def release(self, connection: _Connection | None) -> None:
        """Give the right, and a connection that can be used again, to whoever waits."""
        if connection is not None and not connection.is_usable(self._loop.time()):
            connection.abort()
            connection = None
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(connection)
                return
        self._busy -= 1
        if connection is not None:
            if len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
            else:
                connection.abort()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()

    def _usable(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable(self._loop.time()):
                return connection
            connection.abort()
        return None


def _give_up(turn: asyncio.Future[_Connection | None]) -> None:
    if not turn.done():
        turn.set_exception(
            TransportError("connect", f"{MAX_CONNECTIONS} exchanges are under way and none ended in time")
        )


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time. Its end, at any moment, makes it unusable."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._http = Http1()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._last_byte = 0.0
        self._idle_since = loop.time()

    async def exchange(self, request: WireRequest, host: str, read: float, until: float) -> Answer:
        loop, transport = self._loop, self._transport
        if transport is None:
            raise TransportError("connect", "the connection was closed at once")
        answer: asyncio.Future[Answer] = loop.create_future()
        self._answer = answer
        self._last_byte = loop.time()
        timer = loop.call_at(min(self._last_byte + read, until), self._tick, answer, read, until)
        try:
            transport.write(self._http.send(request, host))
            return await answer
        finally:
            # A caller who was cancelled leaves half an exchange behind, and `reusable` stays False.
            timer.cancel()
            self._answer = None
            self._idle_since = loop.time()

    def is_usable(self, now: float) -> bool:
        return (
            self._transport is not None
            and self._http.reusable
            and self._answer is None
            and now - self._idle_since <= KEEPALIVE_SECONDS
            and not self._transport.is_closing()
        )

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not asyncio's by inheritance

    def data_received(self, data: bytes) -> None:
        self._take(data)

    def eof_received(self) -> bool:
        self._take(b"")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        text = "the gate closed the connection before it answered" if exc is None else describe(exc)
        self._fail(TransportError("broken", text))

    def _take(self, data: bytes) -> None:
        answer = self._answer
        if answer is None or answer.done():
            # Nobody asked: the other side says good-bye, or something that belongs to no request.
            self._http.reusable = False
            self.abort()
            return
        self._last_byte = self._loop.time()
        try:
            result = self._http.receive(data)
        except TransportError as error:
            self._fail(error)
        else:
            if result is not None:
                answer.set_result(result)

    def _tick(self, answer: asyncio.Future[Answer], read: float, until: float) -> None:
        now = self._loop.time()
        due = min(self._last_byte + read, until)
        if answer.done():
            return
        if now + 0.001 >= due:
            self._fail(TransportError("timeout", "no complete answer in time"))
        else:
            self._loop.call_at(due, self._tick, answer, read, until)

    def _fail(self, error: TransportError) -> None:
        self._http.reusable = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


class AsyncHttpxTransport:
    """Through an ``httpx.AsyncClient``: the caller's, or one of ours for each running loop, trio's included."""

    def __init__(self, base_url: str, client: httpx.AsyncClient | None) -> None:
        self._origin = origin_of(base_url)
        self._client = client
        self._ours: anyio.lowlevel.RunVar[httpx.AsyncClient] = anyio.lowlevel.RunVar(f"vluna-llm-{id(self)}")

    async def exchange(self, request: WireRequest, patience: Patience) -> Answer:
        """Send and wait; raises ``TransportError`` where no answer came."""
        message = httpx_request(self._origin, request, patience)
        client = self._client or self._client_of_loop()
        try:
            with anyio.fail_after(patience.total), httpx_faults():
                response = await client.send(message, follow_redirects=False)
        except TimeoutError as error:
            raise TransportError("timeout", "no complete answer in time") from error
        return httpx_answer(response, request)

    async def aclose(self) -> None:
        """Close the client of the running loop where it is ours."""
        client = self._ours.get(None)
        if client is not None:
            await client.aclose()

    def _client_of_loop(self) -> httpx.AsyncClient:
        client = self._ours.get(None)
        if client is None or client.is_closed:
            client = httpx.AsyncClient(follow_redirects=False)
            self._ours.set(client)
        return client
