"""How signed bytes travel, for event loops."""

from __future__ import annotations

import asyncio
import os
import weakref
from typing import Protocol
from urllib.parse import urlsplit

import httpx

from .transport import KEEPALIVE_SECONDS, MAX_CONNECTIONS, httpx_faults, httpx_request
from .wire import Answer, Patience, TransportError, WireRequest


class AsyncTransport(Protocol):
    """Sends one request and brings back one answer; usable from any event loop."""

    async def exchange(self, request: WireRequest, patience: Patience) -> Answer:
        """Send and wait; raises ``TransportError`` where no answer came."""
        ...

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        ...


def open_async_transport(base_url: str, client: httpx.AsyncClient | None = None) -> AsyncTransport:
    """The transport for this address."""
    return AsyncHttpxTransport(base_url, client)


class AsyncHttpxTransport:
    """Through an ``httpx.AsyncClient``: the caller's, or one of ours for each running loop."""

    def __init__(self, base_url: str, client: httpx.AsyncClient | None) -> None:
        parts = urlsplit(base_url)
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._client = client
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )
        self._pid = os.getpid()

    async def exchange(self, request: WireRequest, patience: Patience) -> Answer:
        """Send and wait; raises ``TransportError`` where no answer came."""
        message = httpx_request(self._origin, request, patience)
        client = self._client or self._client_of_loop()
        with httpx_faults():
            try:
                response = await asyncio.wait_for(client.send(message, follow_redirects=False), patience.total)
            except asyncio.TimeoutError as error:
                raise TransportError("timeout", "the time for the whole exchange is over") from error
        return Answer(response.status_code, dict(response.headers.items()), response.content, request.request_id)

    async def aclose(self) -> None:
        """Close the client of the running loop where it is ours."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None and self._pid == os.getpid():
            await client.aclose()

    def _client_of_loop(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if self._pid != os.getpid():
            self._clients, self._pid = weakref.WeakKeyDictionary(), os.getpid()
        client = self._clients.get(loop)
        if client is None:
            for other in [known for known in self._clients if known.is_closed()]:
                del self._clients[other]
            limits = httpx.Limits(
                max_connections=MAX_CONNECTIONS,
                max_keepalive_connections=MAX_CONNECTIONS,
                keepalive_expiry=KEEPALIVE_SECONDS,
            )
            client = self._clients[loop] = httpx.AsyncClient(limits=limits, follow_redirects=False)
        return client
