"""The gate on a real socket: a uvicorn server in a thread, and a blocking one for the command line."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ConfigurationError
from .app import TRANSPORT, GateApp

if TYPE_CHECKING:
    from .config import SandboxConfig
    from .sandbox import Sandbox

_START_SECONDS = 10.0


class _Protocol(H11Protocol):
    """HTTP/1.1 that lets the app reach its own connection, so that a fault may cut it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, TRANSPORT: transport}


class _Server(uvicorn.Server):
    """A server that starts and stops at once, and that leaves the process's signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    async def main_loop(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.ready.set()
        await self._stop.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        for connection in list(self.server_state.connections):
            transport: Any = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=2)

    def stop(self) -> None:
        """Ask for the end, from any thread."""
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)


class Listener:
    """One app on one loopback port. It may be stopped and started again; the port stays the same.

    Args:
        app: the gate.
        host: a loopback address.
        port: 0 for a free one.

    Raises:
        ConfigurationError: ``host`` is not a loopback address. The gate hands out money to whoever has its key and
            stores it in clear text, so it is never offered to a network.
    """

    def __init__(self, app: GateApp, host: str = "127.0.0.1", port: int = 0) -> None:
        if not _is_loopback(host):
            raise ConfigurationError(
                f"The sandbox gate only listens on a loopback address, not on {host!r}: use 127.0.0.1."
            )
        self._app = app
        self.host = host
        self.port = port
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether it listens."""
        return self._server is not None

    def start(self) -> None:
        """Listen, and return when requests are served. Raises ConfigurationError where the port is taken."""
        if self._server is not None:
            return
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        # With the protocol named, asyncio switches Nagle off: an answer in two writes must not wait for an ACK.
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((self.host, self.port))
        except OSError as error:
            sock.close()
            raise ConfigurationError(
                f"The sandbox gate cannot listen on {self.host}:{self.port} ({error.strerror}); choose another port."
            ) from error
        sock.listen(2048)
        self.port = sock.getsockname()[1]
        config = uvicorn.Config(
            self._app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=72,
        )
        self._app.closing.clear()
        server = _Server(config)
        thread = threading.Thread(
            target=lambda: asyncio.run(server.serve([sock])), name="vluna-sandbox-gate", daemon=True
        )
        thread.start()
        if not server.ready.wait(_START_SECONDS):
            raise ConfigurationError("The sandbox gate did not start within 10 seconds.")
        self._server, self._thread = server, thread

    def stop(self) -> None:
        """Close the port and cut every connection; requests that hang are let go."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        if server is None or thread is None:
            return
        self._app.closing.set()
        server.stop()
        thread.join(5)


def serve(
    config: SandboxConfig,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    ready: Callable[[Sandbox], None] | None = None,
) -> None:
    """Serve the gate until SIGINT or SIGTERM; must be called from the main thread. Prints nothing.

    Args:
        config: see :mod:`vluna_llm.sandbox.config`.
        host: a loopback address.
        port: 0 for a free one.
        ready: called once when requests are served, with the gate: its ``env()`` is what a client needs.

    Raises:
        ConfigurationError: the address cannot be used.
    """
    from .sandbox import Sandbox

    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Sandbox(config, host=host, port=port) as gate:
            if ready is not None:
                ready(gate)
            while not stop.wait(0.5):
                pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
