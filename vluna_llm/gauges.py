"""What this package counts and measures, as OpenTelemetry metrics. Without a meter provider nothing is measured.

================================ ============== ========= ==========================================================
instrument                       kind           unit      what it says
================================ ============== ========= ==========================================================
``vluna.outbox.depth``           gauge          operation what this process's journal holds that is not settled, by
                                                          ``vluna.outbox.state``
``vluna.outbox.oldest_age``      gauge          s         seconds since the oldest of these ended, by the same
``vluna.outbox.arrivals``        counter        settlement settlements that came in
``vluna.outbox.deliveries``      counter        settlement settlements that went out: nothing more is sent for them
``vluna.outbox.arrival_rate``    gauge          settlement/s the same over the last minute
``vluna.outbox.drain_rate``      gauge          settlement/s the same over the last minute
``vluna.settlements``            counter        settlement how they ended, by ``vluna.settlement.outcome`` and
                                                          ``vluna.settlement.route``
``vluna.settlement.delay``       histogram      s         from the end of the work until it was charged
``vluna.operations``             counter        operation how calls were admitted, by ``vluna.operation.admission``
``vluna.tokens.forgone``         counter        token     generated for calls that were given up, and not charged
================================ ============== ========= ==========================================================

States are ``pending``, ``held``, ``dead``, ``quarantined`` and ``lost``; outcomes those of `vluna_llm.types.Receipt`;
admissions ``leased``, ``ungated`` and ``denied``. No customer is named: an attribute has a handful of values.

What is counted on a caller's path is counted in our own integers and read from there when metrics are collected, so
that no call of the product ever waits for a lock of a metrics SDK, not even one that the garbage collector ends.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Meter, Observation

log = logging.getLogger("vluna_llm")

Admitted = Literal["leased", "ungated", "denied"]
Waiting = Literal["pending", "held", "dead", "quarantined", "lost"]

WAITING: tuple[Waiting, ...] = ("pending", "held", "dead", "quarantined", "lost")
"""What an operation that is not settled waits as, by the names that people are shown."""

Depths = Mapping[Waiting, tuple[int, float]]
"""How many operations wait in each state, and when the oldest of them ended (seconds since the epoch)."""

RATE_WINDOW = 60
"""Seconds over which rates are taken."""

_FRESH = 1.0
"""Seconds for which what a journal said is taken again: two instruments ask for it at once."""
_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 21600.0, 86400.0)

_ARRIVALS = "vluna.outbox.arrivals"
_DELIVERIES = "vluna.outbox.deliveries"
_SETTLEMENTS = "vluna.settlements"
_OPERATIONS = "vluna.operations"
_FORGONE = "vluna.tokens.forgone"
_RATES = {_ARRIVALS: "vluna.outbox.arrival_rate", _DELIVERIES: "vluna.outbox.drain_rate"}

Key = tuple[str, tuple[tuple[str, str], ...]]


class Rate:
    """How often something happened within the last minute. Not thread-safe by itself."""

    def __init__(self, started: float, window: int = RATE_WINDOW) -> None:
        self._window = window
        self._started = started
        self._seconds: deque[tuple[int, int]] = deque()

    def count(self, now: float, number: int = 1) -> None:
        """It happened ``number`` times at ``now`` (seconds, monotonic)."""
        self._forget(now)
        second = int(now)
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1] = second, self._seconds[-1][1] + number
        else:
            self._seconds.append((second, number))

    def per_second(self, now: float) -> float:
        """The rate over the last minute, or since the start where that was later."""
        self._forget(now)
        return sum(number for _, number in self._seconds) / min(self._window, max(1.0, now - self._started))

    def _forget(self, now: float) -> None:
        while self._seconds and self._seconds[0][0] <= now - self._window:
            self._seconds.popleft()


class Gauges:
    """The instruments of a process and the numbers that they tell. Every method is safe in any thread, and quick.

    Args:
        meter: makes the instruments.
        clock: seconds, monotonic.
    """

    def __init__(self, meter: Meter, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._totals: Counter[Key] = Counter()
        self._rates: dict[str, Rate] = {}
        self._sources: dict[int, Callable[[], Depths]] = {}
        self._seen: tuple[float, list[Depths]] | None = None
        self._next = 0
        self.begin_anew()
        for name, tell, unit, description in (
            ("vluna.outbox.depth", self._depth, "{operation}", "Operations in the outbox that are not settled"),
            ("vluna.outbox.oldest_age", self._age, "s", "Age of the oldest operation in the outbox"),
            (_RATES[_ARRIVALS], self._rate_of(_ARRIVALS), "{settlement}/s", "Settlements that came in, last minute"),
            (_RATES[_DELIVERIES], self._rate_of(_DELIVERIES), "{settlement}/s", "Settlements done with, last minute"),
        ):
            meter.create_observable_gauge(name, [tell], unit, description)
        for name, unit, description in (
            (_ARRIVALS, "{settlement}", "Settlements that came in"),
            (_DELIVERIES, "{settlement}", "Settlements for which nothing more is sent"),
            (_SETTLEMENTS, "{settlement}", "How settlements ended"),
            (_OPERATIONS, "{operation}", "How calls were admitted"),
            (_FORGONE, "{token}", "Generated for calls that were given up, and not charged"),
        ):
            meter.create_observable_counter(name, [self._total_of(name)], unit, description)
        self._delay = meter.create_histogram(
            "vluna.settlement.delay",
            "s",
            "From the end of the work until it was charged",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )

    # -- counting --------------------------------------------------------------------------------------------------

    def admitted(self, how: Admitted) -> None:
        """A call was let through, or refused."""
        self._add(_OPERATIONS, 1, {"vluna.operation.admission": how})

    def arrived(self) -> None:
        """A settlement waits to be delivered."""
        self._flow(_ARRIVALS)

    def delivered(self, outcome: str, route: str | None, delay: float | None = None) -> None:
        """Nothing more is sent for a settlement. Only called on the settler's threads.

        Args:
            outcome: how it ended, as its receipt says.
            route: ``commit``, ``cancel`` or ``ingest``.
            delay: seconds since the end of the work, where it was charged.
        """
        self._flow(_DELIVERIES)
        attributes = {"vluna.settlement.outcome": outcome}
        if route is not None:
            attributes["vluna.settlement.route"] = route
        self._add(_SETTLEMENTS, 1, attributes)
        if delay is not None:
            self._delay.record(max(0.0, delay))

    def forgone(self, tokens: int) -> None:
        """These tokens were generated for a call that was given up, and nobody is charged for them."""
        self._add(_FORGONE, tokens, {})

    def watch(self, depths: Callable[[], Depths]) -> Callable[[], None]:
        """Ask ``depths`` when metrics are collected, until what this gives is called.

        It is asked on the thread that collects, so it must not hold up callers; where it raises, nothing is told.
        """
        with self._guard:
            self._next += 1
            number = self._next
            self._sources[number] = depths
            self._seen = None

        def forget() -> None:
            with self._guard:
                if self._sources.get(number) is depths:
                    del self._sources[number]
                    self._seen = None

        return forget

    def begin_anew(self) -> None:
        """Forget everything: a forked child counts for itself."""
        self._guard = threading.RLock()  # reentrant: the garbage collector may end a call while it is held
        self._started = self._clock()
        self._totals, self._rates, self._sources, self._seen = Counter(), {}, {}, None

    def _add(self, name: str, number: int, attributes: Mapping[str, str]) -> None:
        if number > 0:
            key = (name, tuple(attributes.items()))
            with self._guard:
                self._totals[key] += number

    def _flow(self, name: str) -> None:
        now = self._clock()
        with self._guard:
            self._totals[name, ()] += 1
            if name not in self._rates:
                self._rates[name] = Rate(self._started)
            self._rates[name].count(now)

    # -- telling ---------------------------------------------------------------------------------------------------

    def _total_of(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def tell(options: CallbackOptions) -> Iterable[Observation]:
            with self._guard:
                found = [(key, number) for key, number in self._totals.items() if key[0] == name]
            return [Observation(number, dict(attributes)) for (_, attributes), number in found]

        return tell

    def _rate_of(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def tell(options: CallbackOptions) -> Iterable[Observation]:
            with self._guard:
                rate = self._rates.get(name)
                value = 0.0 if rate is None else rate.per_second(self._clock())
                silent = rate is None and not self._sources
            return [] if silent else [Observation(value)]

        return tell

    def _depth(self, options: CallbackOptions) -> Iterable[Observation]:
        seen = self._ask()
        for state in WAITING if seen else ():
            number = sum(depths[state][0] for depths in seen if state in depths)
            yield Observation(number, {"vluna.outbox.state": state})

    def _age(self, options: CallbackOptions) -> Iterable[Observation]:
        seen, now = self._ask(), time.time()
        for state in WAITING if seen else ():
            oldest = min((depths[state][1] for depths in seen if depths.get(state, (0, 0.0))[0]), default=now)
            yield Observation(max(0.0, now - oldest), {"vluna.outbox.state": state})

    def _ask(self) -> list[Depths]:
        with self._guard:
            now = self._clock()
            if self._seen is not None and now - self._seen[0] < _FRESH:
                return self._seen[1]
            sources = list(self._sources.values())
        # Not under the lock: a journal of 100,000 rows takes its time.
        found = []
        for depths in sources:
            try:
                found.append(depths())
            except Exception:
                log.debug("an outbox could not be measured", exc_info=True)
        with self._guard:
            self._seen = now, found
        return found


@functools.lru_cache(maxsize=1)
def of_this_process() -> Gauges:
    """Those of this process, made on first use; they serve a meter provider also where that is set only later."""
    from . import __version__

    gauges = Gauges(metrics.get_meter("vluna_llm", __version__))
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=gauges.begin_anew)
    return gauges
