"""Plays recorded requests through a metered client and notes what the caller saw of each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..context import Scope, call_context
from ..errors import GateDenied, GateRateLimited, VlunaError
from ..sandbox.recordings import Recording
from ..types import Receipt
from .stage import Stage

Outcome = Literal["answered", "left early", "broke off", "refused"]

_KINDS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/embeddings": "embeddings",
    "/v1/completions": "completions",
}


@dataclass(slots=True)
class Call:
    """One model call as its caller saw it.

    ``request_id`` is ours and goes along to the gate; ``served_id`` is the upstream's, None where it was never asked.
    ``upstream_requests`` counts what reached the upstream meanwhile, None where calls ran side by side.
    """

    request_id: str
    step: str
    customer: str
    kind: str
    model: str
    streamed: bool
    outcome: Outcome = "answered"
    served_id: str | None = None
    detail: str | None = None
    upstream_requests: int | None = None
    scope: Scope | None = None

    @property
    def receipt(self) -> Receipt | None:
        """What the gate said about it; None before it is settled, and for a call that was refused."""
        receipts = self.scope.receipts if self.scope is not None else []
        return receipts[-1] if receipts else None


class Player:
    """Makes the calls. Its synchronous and its asynchronous half differ in ``await`` alone."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._numbers = itertools.count(1)
        self.step = ""
        self.calls: list[Call] = []

    def play(self, customer: str, recording: str, *, leave_after: int | None = None) -> Call:
        """Ask what was asked in this recording, as this customer; read the answer, or leave after so many events."""
        found = self._stage.recordings[recording]
        call = self._note(customer, found)
        before = len(self._stage.upstream.served)
        with call_context(principal_id=customer, request_id=call.request_id) as call.scope:
            try:
                answer = _resource(self._stage.client, found).create(**_arguments(found))
                call.served_id = _served_id(answer)
                if call.streamed:
                    with answer:
                        for _ in itertools.islice(answer, leave_after):
                            pass
                    call.outcome = "answered" if leave_after is None else "left early"
            except VlunaError as error:
                call.outcome, call.detail = "refused", _why(error)
            except Exception as error:
                # Two majors of the SDK on two HTTP libraries: what a broken connection raises has several names.
                call.outcome, call.detail = "broke off", type(error).__name__
        call.upstream_requests = len(self._stage.upstream.served) - before
        return call

    async def play_async(self, client: Any, customer: str, recording: str) -> Call:
        """`play` on an event loop, many at a time."""
        found = self._stage.recordings[recording]
        call = self._note(customer, found)
        async with call_context(principal_id=customer, request_id=call.request_id) as call.scope:
            answer = await _resource(client, found).create(**_arguments(found))
            call.served_id = _served_id(answer)
            if call.streamed:
                async with answer:
                    async for _ in answer:
                        pass
        return call

    def _note(self, customer: str, recording: Recording) -> Call:
        kind = _KINDS[recording.path]
        request_id = f"demo-{next(self._numbers):03d}"
        call = Call(request_id, self.step, customer, kind, recording.model or "", recording.stream)
        self.calls.append(call)
        return call


def _resource(client: Any, recording: Recording) -> Any:
    kind = _KINDS[recording.path]
    return client.chat.completions if kind == "chat" else getattr(client, kind)


def _arguments(recording: Recording) -> dict[str, Any]:
    """The recorded request as a caller would write it: usage on a stream is the wrapper's wish, not theirs."""
    return {name: value for name, value in (recording.request or {}).items() if name != "stream_options"}


def _served_id(answer: Any) -> str | None:
    response = getattr(answer, "response", None)
    headers = getattr(response, "headers", None)
    found = headers.get("x-request-id") if headers is not None else getattr(answer, "_request_id", None)
    return str(found) if found else None


def _why(error: VlunaError) -> str:
    if isinstance(error, GateDenied):
        return f"denied: {error.reason}"
    if isinstance(error, GateRateLimited):
        return "rate limited"
    return type(error).__name__
