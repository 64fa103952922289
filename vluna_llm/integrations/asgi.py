"""Web applications: an ASGI middleware that binds each request's customer, and answers refusals as HTTP.

::

    from vluna_llm.integrations.asgi import VlunaMiddleware

    app.add_middleware(VlunaMiddleware, identity=lambda scope: {"principal_id": scope["user"].customer}, vluna=vluna)

Works with FastAPI, Starlette and every other ASGI application; needs none of them. What the application does for the
request is billed to that customer: handlers in threads, streaming responses whose generator runs after the handler has
returned, background tasks of the response. What it spawns for later (a task queue, a thread of its own) is not: use
`Vluna.bind` there.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

from ..context import afresh, call_context, current_context
from ..errors import BudgetExceeded, GateError, VlunaError
from ._answer import answer_to
from ._payer import tell_nobody

if TYPE_CHECKING:
    from ..vluna import Vluna

__all__ = ["SCOPE_KEY", "VlunaMiddleware"]

HTTPScope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[HTTPScope, Receive, Send], Awaitable[None]]
Identity = Callable[[HTTPScope], "Mapping[str, Any] | Awaitable[Mapping[str, Any] | None] | None"]

SCOPE_KEY: Final = "vluna"
"""Under this name the request's `vluna_llm.Scope` is in the ASGI ``state``: ``request.state.vluna`` in Starlette."""


class VlunaMiddleware:
    """Binds the customer of each HTTP request and WebSocket connection.

    Args:
        app: the application inside.
        identity: given the ASGI scope, names who pays by the arguments of `call_context`, e.g. ``{"principal_id":
            ...}``; may be a coroutine function. None binds nobody: a metered call then raises `MissingPrincipal`. Read
            it from what your authentication has established, never from a header that the client writes. Inside of
            another such middleware None leaves it to that one, whose limits hold for all that is inside.
        vluna: closed when the server shuts down, so that everything is delivered; left alone where not given. In its
            modes ``observe`` and ``off`` a request whose customer could not be billed is served for nobody.
        refusals: answer a refusal of the gate that the application lets through: 402, 403 or 429 with ``Retry-After``,
            and the gate's code and hints in OpenAI's error shape. Off: it goes on to the server, which answers 500.

    Errors of ``identity`` go to the server as they are: nobody is served for nothing.
    """

    def __init__(self, app: App, *, identity: Identity, vluna: Vluna | None = None, refusals: bool = True) -> None:
        self.app = app
        self.identity = identity
        self.vluna = vluna
        self.refusals = refusals

    async def __call__(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] in ("http", "websocket"):
            await self._serve(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _live(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        """The server waits for the answer to its shutdown: until then what is owed is delivered."""

        async def sent(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown.") and self.vluna is not None:
                await self.vluna.aclose()
            await send(message)

        await self.app(scope, receive, sent)

    async def _serve(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        outer = (scope.get("state") or {}).get(SCOPE_KEY)
        # Within a middleware of ours around this one the request has its customer and limits already.
        with nullcontext() if outer in current_context().scopes else afresh():
            await self._serve_for_its_customer(scope, receive, send)

    async def _serve_for_its_customer(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        payer = self.identity(scope)
        if inspect.isawaitable(payer):
            payer = await payer
        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        async with self._context(payer or {}) as spent:
            scope.setdefault("state", {})[SCOPE_KEY] = spent
            try:
                await self.app(scope, receive, sent)
            except (GateError, BudgetExceeded) as error:
                if not self.refusals or begun or scope["type"] != "http":
                    raise
                await _refuse(error, send)

    def _context(self, payer: Mapping[str, Any]) -> call_context:
        try:
            return call_context(**payer)
        except (VlunaError, TypeError) as error:
            if self.vluna is None or self.vluna.mode == "enforce":
                raise
            if self.vluna.mode == "observe":
                tell_nobody(self.vluna, error)
            return call_context()


async def _refuse(error: VlunaError, send: Send) -> None:
    answer = answer_to(error)
    body = json.dumps({"error": answer.error()}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **answer.headers()}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
