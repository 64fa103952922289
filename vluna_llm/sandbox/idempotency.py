"""The first of the gate's two idempotency layers: the process cache, blind to who is calling (gate contract 5).

The second layer is the store: leases by (user, key), commits by (realm, lease, key), ingests by (realm, user, key).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from .clock import Clock
from .problems import Refusal

_KEPT_MS = 24 * 3600 * 1000
_CAPACITY = 200_000


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer as it went out."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class _Entry:
    printed: str
    caller: str
    answer: Answer
    at_ms: int


class ProcessCache:
    """Successful answers of one process by method, path and key.

    Neither realm nor customer nor user nor lease takes part in the key of the real server's cache, so a colliding
    key hands one customer's answer to another. With ``reject_collisions`` such a request is refused loudly instead:
    409 with a message that names the mistake.
    """

    def __init__(self, clock: Clock, *, reject_collisions: bool = False) -> None:
        self._clock = clock
        self._reject = reject_collisions
        self._entries: OrderedDict[tuple[str, str, str], _Entry] = OrderedDict()

    def find(self, method: str, path: str, key: str, scope: str, caller: str, body: Any) -> Answer | None:
        """The answer that this key already got.

        Args:
            scope: empty for service keys; bearers have a scope of their own.
            caller: who asks, only looked at when collisions are rejected.

        Raises:
            Refusal: 409, the key was used with another body.
        """
        entry = self._entries.get((method, path, scope + key))
        if entry is None:
            return None
        if self._clock.now_ms() - entry.at_ms > _KEPT_MS:
            del self._entries[(method, path, scope + key)]
            return None
        if self._reject and entry.caller != caller:
            raise Refusal(
                409,
                "WRITE.INVALID_PAYLOAD",
                f"idempotency key collision: {key!r} was used by another caller; keys must be globally unique",
            )
        if entry.printed != reprint(body):
            raise Refusal(409, "WRITE.INVALID_PAYLOAD", "idempotency_conflict")
        return entry.answer

    def keep(self, method: str, path: str, key: str, scope: str, caller: str, body: Any, answer: Answer) -> None:
        """Remember a successful answer."""
        self._entries[(method, path, scope + key)] = _Entry(reprint(body), caller, answer, self._clock.now_ms())
        if len(self._entries) > _CAPACITY:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything, as a restart of the process does."""
        self._entries.clear()


def reprint(body: Any) -> str:
    """The body parsed and printed again: white space is gone, the order of members stays."""
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False)
