"""Bad habits on demand: what a test lets the gate do wrong, how often and to whom."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Literal, get_args

FaultKind = Literal[
    "error_before",
    "error_after",
    "drop_before",
    "drop_after",
    "hang",
    "hang_after",
    "latency",
    "status",
    "garbage",
    "rate_limited",
]
"""What goes wrong.

* ``error_before``: 500, nothing was booked (a deadlock).
* ``error_after``: booked, then 500.
* ``drop_before``, ``drop_after``: the connection is closed without an answer, before or after booking.
* ``hang``, ``hang_after``: no answer until :meth:`Faults.release`, then the connection is closed;
  before or after booking.
* ``latency``: the answer comes ``seconds`` later.
* ``status``: ``status`` with ``body``, nothing was booked (a proxy's 502, 503, 504).
* ``garbage``: booked, then 200 with ``body`` that is not the gate's.
* ``rate_limited``: 429 with a ``rate.limit`` hint until ``seconds`` from now.
"""

ROUTES = (
    "health",
    "token",
    "balance",
    "adjustments",
    "consume",
    "budgets",
    "authorize",
    "preflight",
    "commits",
    "batch",
    "cancel",
    "ingest",
    "limits",
    "meters",
    "ratings",
    "rated-records",
    "allocations",
)


@dataclass(slots=True, eq=False)
class Fault:
    """One scripted fault; ``remaining`` None means for ever, ``hits`` counts how often it struck."""

    kind: FaultKind
    route: str | None = None
    remaining: int | None = 1
    skip: int = 0
    principal_id: str | None = None
    seconds: float = 0.0
    status: int = 503
    body: bytes = b""
    hits: int = field(default=0, init=False)

    def matches(self, route: str, principal_id: str | None) -> bool:
        """Whether it concerns a request to ``route`` for this customer."""
        return self.route in (None, route) and self.principal_id in (None, principal_id)


class Faults:
    """The script of faults of one gate; may be changed from any thread while the gate runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._script: list[Fault] = []
        self._generation = 0

    def add(
        self,
        kind: FaultKind,
        route: str | None = None,
        *,
        times: int | None = 1,
        skip: int = 0,
        principal_id: str | None = None,
        seconds: float = 0.0,
        status: int = 503,
        body: bytes | str = b"",
    ) -> Fault:
        """Script one fault.

        Args:
            kind: what goes wrong, see :data:`FaultKind`.
            route: where, one of :data:`ROUTES`; None means everywhere.
            times: how often, None for ever.
            skip: how many matching requests pass unharmed before.
            principal_id: only for this customer.
            seconds: the delay of ``latency``, the wait that ``rate_limited`` tells.
            status: the HTTP status of ``status``.
            body: the body of ``status`` and ``garbage``.

        Raises:
            ValueError: an unknown kind or route.
        """
        if kind not in get_args(FaultKind):
            raise ValueError(f"unknown fault {kind!r}; one of {', '.join(get_args(FaultKind))}")
        if route is not None and route not in ROUTES:
            raise ValueError(f"unknown route {route!r}; one of {', '.join(ROUTES)}")
        raw = body.encode() if isinstance(body, str) else body
        fault = Fault(kind, route, times, skip, principal_id, seconds, status, raw)
        with self._lock:
            self._script.append(fault)
        return fault

    def remove(self, fault: Fault) -> None:
        """Take one fault out of the script."""
        with self._lock:
            if fault in self._script:
                self._script.remove(fault)

    def clear(self) -> None:
        """Forget the whole script and let hanging requests go."""
        with self._lock:
            self._script.clear()
            self._generation += 1

    def release(self) -> None:
        """Close the connection of every request that hangs."""
        with self._lock:
            self._generation += 1

    @property
    def generation(self) -> int:
        """Grows with every release; a hanging request waits for it."""
        return self._generation

    def strike(self, route: str, principal_id: str | None) -> tuple[float, Fault | None]:
        """For one request: the seconds to wait, and the first other fault that matches; both are used up."""
        if not self._script:
            return 0.0, None
        delay = 0.0
        chosen: Fault | None = None
        with self._lock:
            for fault in list(self._script):
                if not fault.matches(route, principal_id) or (fault.kind != "latency" and chosen is not None):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.hits += 1
                if fault.remaining is not None:
                    fault.remaining -= 1
                    if fault.remaining <= 0:
                        self._script.remove(fault)
                if fault.kind == "latency":
                    delay += fault.seconds
                else:
                    chosen = fault
        return delay, chosen
