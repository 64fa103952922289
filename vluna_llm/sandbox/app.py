"""The gate as an ASGI application: routes, envelopes, process cache, faults.

One instance is one server process. Handlers run one after another under the store's lock, so several processes may
share a store and no handler ever sees half of another's work.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from . import auth
from .auth import Caller, KeyRing
from .faults import Fault, Faults
from .fields import iso, parse_json
from .idempotency import Answer, ProcessCache
from .problems import DatabaseFault, FirstCall, Refusal, no_route, unexpected
from .routes import BASE, Call, Outcome, RouteSpec, routes_of
from .world import World

TRANSPORT = "vluna.sandbox.transport"
"""Where the server puts the connection's transport in the ASGI ``state``, so that a fault may cut it."""

_log = logging.getLogger("vluna_llm.sandbox")

_MAX_BODY = 1024 * 1024
_HEADERS = [
    (b"content-type", b"application/json; charset=utf-8"),
    (b"vary", b"Origin"),
    (b"access-control-allow-credentials", b"true"),
    (b"access-control-expose-headers", b"WWW-Authenticate, X-Permissions-Changed, X-Request-Id, traceparent"),
]


@dataclass(frozen=True, slots=True)
class Received:
    """A request that came in, for tests to look at; it holds no signature and no secret."""

    method: str
    path: str
    route: str | None
    realm_id: str | None
    principal_id: str | None
    user_id: str | None
    idempotency_key: str | None
    request_id: str | None
    body: Any
    status: int | None
    fault: str | None
    at_ms: int


class ConnectionDropped(Exception):
    """A fault closed the connection and there is no transport to close (the app is called without a server)."""


class GateApp:
    """One server process of the gate.

    Args:
        world: store, options and clock.
        faults: the script of faults; shared by the processes that are given the same one.
        requests: how many of the latest requests are kept for :attr:`requests`.
    """

    def __init__(self, world: World, faults: Faults | None = None, *, requests: int = 10_000) -> None:
        self.world = world
        self.faults = faults or Faults()
        self.requests: deque[Received] = deque(maxlen=requests)
        self.closing = threading.Event()
        self._cache = ProcessCache(world.clock, reject_collisions=world.options.reject_colliding_keys)
        self._ring = KeyRing(world)
        self._routes = routes_of(world)

    def restart(self) -> None:
        """Forget what a process forgets when it restarts: the idempotency cache and the cached keys."""
        self._cache.clear()
        self._ring.reload()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if scope["type"] != "http":
            raise RuntimeError("the sandbox gate speaks HTTP only")
        request = Request(scope, receive)
        try:
            body = await request.body()
        except ClientDisconnect:
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        method, path = scope["method"], scope["path"]
        spec, path_args = self._route(method, path)
        name = None if spec is None else spec.name
        principal_id = headers.get("x-principal-id")
        delay, fault = self.faults.strike(name, principal_id) if name else (0.0, None)
        if delay > 0:
            await asyncio.sleep(delay)
        answer: Answer | None = None
        if fault is None or fault.kind in ("error_after", "drop_after", "hang_after", "garbage"):
            keep = fault is None or fault.kind != "error_after"
            answer = self._respond(spec, scope, method, path, path_args, headers, body, keep=keep)
        generation = self.faults.generation
        status, response = self._spoil(answer, fault)
        self.requests.append(_received(self.world, scope, headers, body, name, status, fault))
        if response is not None:
            await response(scope, receive, send)
            return
        if fault is not None and fault.kind.startswith("hang"):
            while self.faults.generation == generation and not self.closing.is_set():
                if await request.is_disconnected():
                    return
                await asyncio.sleep(0.01)
        await _cut(scope, receive)

    def _route(self, method: str, path: str) -> tuple[RouteSpec | None, str]:
        path = path.rstrip("/") or "/"
        spec = self._routes.get((method, path))
        if spec is None and method == "GET" and path.startswith(f"{BASE}/ops/ratings/"):
            rest = path.removeprefix(f"{BASE}/ops/ratings/")
            if "/" not in rest:
                return self._routes[("GET", f"{BASE}/ops/ratings/{{id}}")], rest
        return spec, ""

    def _spoil(self, answer: Answer | None, fault: Fault | None) -> tuple[int | None, Response | None]:
        """What goes out instead of the answer when a fault struck; no response means that the connection is cut."""
        if fault is None:
            return _response(answer)
        if fault.kind in ("error_before", "error_after"):
            return _response(self._refuse(unexpected()))
        if fault.kind == "rate_limited":
            until = self.world.now() + round(fault.seconds * 1000)
            hint = {"type": "rate.limit", "seconds": -int(-fault.seconds // 1), "remaining": 0, "until": iso(until)}
            return _response(self._refuse(Refusal(429, "LIMIT.RATE_EXCEEDED", "rate limit exceeded", hints=[hint])))
        if fault.kind == "status":
            return fault.status, Response(fault.body, fault.status, media_type="text/html")
        if fault.kind == "garbage":
            return 200, Response(fault.body, 200, media_type="text/html")
        return None, None

    def _respond(
        self,
        spec: RouteSpec | None,
        scope: Scope,
        method: str,
        path: str,
        path_args: str,
        headers: dict[str, str],
        body: bytes,
        *,
        keep: bool,
    ) -> Answer:
        raw_query: bytes = scope["query_string"]
        raw_path = scope.get("raw_path") or path.encode()
        target = raw_path.decode("latin-1") + (f"?{raw_query.decode('latin-1')}" if raw_query else "")
        parsed: Any = None
        try:
            if spec is None:
                raise no_route(method, path)
            if method == "POST":
                parsed = _parse_body(headers, body)
            if spec.name == "health":
                return self._accept(spec, spec.handler(self.world, Call(Caller("", None), "", None, [], path)))
            with self.world.store.lock:
                return self._serve(spec, method, path, path_args, target, headers, body, parsed, keep)
        except Refusal as refusal:
            return self._refuse(refusal, spec, parsed)
        except DatabaseFault:
            return self._refuse(unexpected())
        except Exception:
            # A mistake of this gate: nothing was kept, and a client meets what it meets on the real one.
            _log.exception("the sandbox gate failed on %s %s", method, path)
            return self._refuse(unexpected())

    def _serve(
        self,
        spec: RouteSpec,
        method: str,
        path: str,
        path_args: str,
        target: str,
        headers: dict[str, str],
        body: bytes,
        parsed: Any,
        keep: bool,
    ) -> Answer:
        store = self.world.store
        first_call = False
        with store.transaction():
            try:
                caller = auth.authenticate(
                    self.world,
                    self._ring,
                    method=method,
                    target=target,
                    headers=headers,
                    body=body,
                    runtime=spec.runtime,
                )
            except FirstCall:
                first_call = True
        if first_call:
            raise unexpected()
        key = headers.get("idempotency-key", "")
        writes = method == "POST"
        if writes and not key:
            raise Refusal(400, "VALIDATION.INVALID_INPUT", "missing_idempotency_key")
        who = f"{caller.realm_id}/{caller.principal_id}/{caller.user_id}"
        scope = f"{who}\x00" if caller.is_bearer else ""
        if writes:
            known = self._cache.find(method, path, key, scope, who, parsed)
            if known is not None:
                return known
        query = parse_qsl(target.partition("?")[2], keep_blank_values=True, encoding="utf-8")
        call = Call(caller, key, parsed, query, path_args)
        with store.transaction():
            try:
                outcome = spec.handler(self.world, call)
            except FirstCall:
                first_call = True
            if spec.dry:
                store.rollback()
        if first_call:
            raise unexpected()
        answer = self._accept(spec, outcome)
        if writes and keep:
            self._cache.keep(method, path, key, scope, who, parsed, answer)
        return answer

    def _accept(self, spec: RouteSpec, outcome: Outcome) -> Answer:
        envelope: dict[str, Any] = {"ok": True, "code": "OK", "data": outcome.data}
        if outcome.meta is not None:
            envelope["meta"] = outcome.meta
        if outcome.hints:
            envelope["hints"] = outcome.hints
        return Answer(spec.status, self._print(envelope))

    def _refuse(self, refusal: Refusal, spec: RouteSpec | None = None, body: Any = None) -> Answer:
        if not self.world.options.production:
            plain = (
                {"statusCode": 500, "message": "Internal server error"}
                if refusal.code == "SERVER.UNEXPECTED" and refusal.status == 500
                else {"code": refusal.code, "message": refusal.message}
            )
            return Answer(refusal.status, self._print(plain))
        envelope: dict[str, Any] = {"ok": False, "code": refusal.code, "message": refusal.message}
        meta = {**refusal.meta, "status": refusal.status}
        if self.world.options.dialect == "lease":
            meta |= self._about(refusal, spec, body)
        if not refusal.bare:
            envelope["meta"] = meta
        if refusal.hints:
            envelope["hints"] = refusal.hints
        return Answer(refusal.status, self._print(envelope))

    def _about(self, refusal: Refusal, spec: RouteSpec | None, body: Any) -> dict[str, Any]:
        """Dialect B: what entitlement and preflight errors tell besides the status (gate contract 14)."""
        out: dict[str, Any] = {}
        named = body.get("feature_code") if isinstance(body, dict) else None
        preflight = spec is not None and spec.name == "preflight"
        if isinstance(named, str) and (preflight or refusal.code.startswith("ENTITLEMENT.")):
            out["feature_code"] = code = named.strip().lower()
            for (_, other), feature in self.world.store.features.rows.items():
                if other == code:
                    out["feature_family_code"] = feature.family
        if preflight:
            out["as_of"] = iso(self.world.now())
        return out

    def _print(self, envelope: dict[str, Any]) -> bytes:
        if self.world.options.dialect == "lease":
            envelope["trace_id"] = secrets.token_hex(16)
        return json.dumps(envelope, separators=(",", ":"), ensure_ascii=False).encode()


def _response(answer: Answer | None) -> tuple[int, Response]:
    if answer is None:
        raise RuntimeError("a handler gave no answer")
    response = Response(answer.body, answer.status)
    response.raw_headers = [*_HEADERS, (b"content-length", str(len(answer.body)).encode())]
    return answer.status, response


def _parse_body(headers: dict[str, str], body: bytes) -> Any:
    """Step 1 of gate contract 3.4: size, content type, JSON."""
    content_type = headers.get("content-type")
    if len(body) > _MAX_BODY:
        raise Refusal(413, "SERVER.UNEXPECTED", "Request body is too large")
    if content_type is None and body:
        raise Refusal(415, "SERVER.UNEXPECTED", "Unsupported Media Type: undefined")
    if content_type is None:
        return None
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "SERVER.UNEXPECTED", f"Unsupported Media Type: {content_type}")
    if not body:
        text = "Body cannot be empty when content-type is set to 'application/json'"
        raise Refusal(400, "VALIDATION.INVALID_INPUT", text)
    try:
        return parse_json(body)
    except (ValueError, RecursionError):
        text = "Body is not valid JSON but content-type is set to 'application/json'"
        raise Refusal(400, "VALIDATION.INVALID_INPUT", text) from None


async def _cut(scope: Scope, receive: Receive) -> None:
    """Close the connection without an answer."""
    transport = scope.get("state", {}).get(TRANSPORT)
    if transport is None:
        raise ConnectionDropped
    transport.abort()
    while (await receive())["type"] != "http.disconnect":
        pass


def _received(
    world: World,
    scope: Scope,
    headers: dict[str, str],
    body: bytes,
    route: str | None,
    status: int | None,
    fault: Fault | None,
) -> Received:
    try:
        parsed = parse_json(body) if body else None
    except (ValueError, RecursionError):
        parsed = None
    return Received(
        method=scope["method"],
        path=scope["path"],
        route=route,
        realm_id=headers.get("x-realm-id"),
        principal_id=headers.get("x-principal-id"),
        user_id=headers.get("x-user-id"),
        idempotency_key=headers.get("idempotency-key"),
        request_id=headers.get("x-request-id"),
        body=parsed,
        status=status,
        fault=None if fault is None else fault.kind,
        at_ms=world.now(),
    )
