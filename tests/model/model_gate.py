"""The embedded gate without sockets, and a network in front of it that a test can make misbehave.

A request goes through the package's own clients, signing and parsing, and through the embedded gate's own application;
only the bytes on the wire are handed over by a function call. What the network does to a request is its `Fate`.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, Literal

from vluna_llm.gate.wire import Answer, Patience, TransportError, WireRequest
from vluna_llm.sandbox import Sandbox
from vluna_llm.sandbox.app import GateApp

Fate = Literal[
    "ok",
    "refused_connection",
    "request_lost",
    "answer_lost",
    "late",
    "twice",
    "twice_answer_lost",
    "error_before",
    "error_after",
    "bad_gateway",
    "garbage_before",
    "garbage_after",
    "too_many",
    "key_refused",
    "realm_unknown",
    "misconfigured",
]
"""What happens to one request.

* ``request_lost``, ``answer_lost``: no answer; before or after the gate worked on it.
* ``late``: no answer now, and the gate gets the request some time later, after others.
* ``twice``: the gate gets it twice; the client the second answer, or none.
* ``error_before``, ``error_after``, ``bad_gateway``, ``garbage_*``: an answer that is not the gate's usual one.
* ``too_many``, ``key_refused``, ``realm_unknown``, ``misconfigured``: refused, nothing was worked on.
"""

NO_ANSWER: frozenset[Fate] = frozenset(
    {"refused_connection", "request_lost", "answer_lost", "late", "twice_answer_lost"}
)
ALL_FATES: tuple[Fate, ...] = Fate.__args__  # type: ignore[attr-defined]

_ERROR_500 = b'{"ok":false,"code":"SERVER.UNEXPECTED","message":"Unexpected server error. Please try again later."}'
_CANNED: dict[Fate, tuple[int, bytes]] = {
    "error_before": (500, _ERROR_500),
    "error_after": (500, _ERROR_500),
    "bad_gateway": (502, b"<html>bad gateway</html>"),
    "garbage_before": (200, b"<html>welcome</html>"),
    "garbage_after": (200, b"<html>welcome</html>"),
    "too_many": (
        429,
        b'{"ok":false,"code":"LIMIT.RATE_EXCEEDED","message":"rate limit exceeded","meta":{"status":429}}',
    ),
    "key_refused": (
        401,
        b'{"ok":false,"code":"AUTH.INVALID_SERVICE_SIGNATURE","message":"Signature mismatch","meta":{"status":401}}',
    ),
    "realm_unknown": (
        404,
        b'{"ok":false,"code":"AUTH.UNKNOWN_REALM","message":"unknown_realm","meta":{"status":404}}',
    ),
    "misconfigured": (
        500,
        b'{"ok":false,"code":"SERVER.CONFIG","message":"value exceeds numeric range","meta":{"status":500}}',
    ),
}
_WORKED_ON: frozenset[Fate] = frozenset(
    {"ok", "answer_lost", "twice", "twice_answer_lost", "error_after", "garbage_after"}
)


@types.coroutine
def pause(what: str) -> Generator[str, None, None]:
    """A point at which a coroutine under test can be cancelled, crashed or overtaken."""
    yield what


@dataclass(frozen=True, slots=True)
class Sent:
    """One request as it left a process."""

    process: str
    route: str
    key: str
    fate: Fate
    body: bytes


class GateBox:
    """The embedded gate, several server processes of it where wanted, without a listener."""

    def __init__(self, **config: Any) -> None:
        self.sandbox = Sandbox(**config)
        self.apps = [self.sandbox.app, GateApp(self.sandbox._world, self.sandbox.faults)]
        self.turn = 0

    def answer(self, wire: WireRequest) -> tuple[int, bytes]:
        """Let one of the gate's processes work on a request, to its end."""
        app = self.apps[self.turn % len(self.apps)]
        path, _, query = wire.target.partition("?")
        scope: dict[str, Any] = {
            "type": "http",
            "http_version": "1.1",
            "method": wire.method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in wire.headers],
        }
        told = [{"type": "http.request", "body": wire.body, "more_body": False}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return told.pop() if told else {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        run(app(scope, receive, send))  # type: ignore[arg-type]
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

    def restart(self) -> None:
        """Both processes forget their caches; the database is kept."""
        for app in self.apps:
            app.restart()


class Network:
    """Between the processes and the gate. ``fates`` are used up one by one; afterwards every request is served."""

    def __init__(self, gate: GateBox) -> None:
        self.gate = gate
        self.fates: deque[Fate] = deque()
        self.outage: Fate | None = None
        self.late: list[WireRequest] = []
        self.log: deque[Sent] = deque(maxlen=400)
        self.requests = 0
        self.before: Callable[[str, WireRequest], None] = lambda process, wire: None
        """Called when a request has left its process and has not arrived."""
        self.after: Callable[[str, WireRequest], None] = lambda process, wire: None
        """Called when the gate has answered and the answer has not arrived."""

    def exchange(self, process: str, wire: WireRequest) -> Answer:
        """One request and its answer, or none."""
        fate = self._send(process, wire)
        status, body = self._worked_on(wire, fate)
        self.after(process, wire)
        return self._arrive(wire, fate, status, body)

    async def exchange_async(self, process: str, wire: WireRequest) -> Answer:
        """The same with a point of suspension before the gate has it and one before its answer is there."""
        await pause("sending")
        fate = self._send(process, wire)
        status, body = self._worked_on(wire, fate)
        self.after(process, wire)
        await pause("waiting")
        return self._arrive(wire, fate, status, body)

    def deliver_late(self, index: int) -> None:
        """A request that was on the way all the time arrives; its answer goes nowhere."""
        if self.late:
            self.gate.answer(self.late.pop(index % len(self.late)))

    def calm(self) -> None:
        """From now on everything arrives; what was on its way arrives first."""
        self.fates.clear()
        self.outage = None
        while self.late:
            self.deliver_late(0)

    def _send(self, process: str, wire: WireRequest) -> Fate:
        self.requests += 1
        fate: Fate = self.outage or (self.fates.popleft() if self.fates else "ok")
        if wire.method == "GET" and fate in ("late", "twice", "twice_answer_lost"):
            fate = "request_lost"
        route = wire.target.partition("?")[0].rpartition("/gate/")[2]
        key = next((value for name, value in wire.headers if name == "idempotency-key"), "")
        self.log.append(Sent(process, route, key, fate, wire.body))
        self.before(process, wire)
        return fate

    def _worked_on(self, wire: WireRequest, fate: Fate) -> tuple[int, bytes]:
        if fate == "late":
            self.late.append(wire)
        answer = (0, b"")
        if fate in _WORKED_ON:
            answer = self.gate.answer(wire)
        if fate in ("twice", "twice_answer_lost"):
            self.gate.turn += 1
            answer = self.gate.answer(wire)
        return answer

    def _arrive(self, wire: WireRequest, fate: Fate, status: int, body: bytes) -> Answer:
        if fate == "refused_connection":
            raise TransportError("connect", "refused")
        if fate in NO_ANSWER:
            raise TransportError("timeout", "no answer in time")
        status, body = _CANNED.get(fate, (status, body))
        return Answer(status, {"content-type": "application/json; charset=utf-8"}, body, wire.request_id)


class Wire:
    """A process's way to the network, for threads."""

    def __init__(self, network: Network, process: str) -> None:
        self._network, self._process = network, process

    def exchange(self, request: WireRequest, patience: Patience) -> Answer:
        return self._network.exchange(self._process, request)

    def close(self) -> None:
        return None


class AsyncWire:
    """A process's way to the network, for coroutines."""

    def __init__(self, network: Network, process: str) -> None:
        self._network, self._process = network, process

    async def exchange(self, request: WireRequest, patience: Patience) -> Answer:
        return await self._network.exchange_async(self._process, request)

    async def aclose(self) -> None:
        return None


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end without an event loop."""
    while True:
        try:
            coroutine.send(None)
        except StopIteration as ended:
            return ended.value
