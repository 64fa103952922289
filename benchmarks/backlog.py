"""What an outage leaves behind, and how it drains: memory, speed beside the gate's own limit, and calls meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vluna_llm import Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.gate.client import GateClient
from vluna_llm.lifecycle import ModelCall
from vluna_llm.settler import MAX_WORKERS
from vluna_llm.usage.types import TokenUsage

from .figures import Figure, Profile, percentile
from .memory import resident
from .servers import MODEL, OUTPUT_TOKENS, PROMPT_TOKENS, World, world

SETTLEMENTS, CUSTOMERS = 100_000, 1_000
DIRECT = 2_000
CALL = ModelCall("chat.completions", "openai", MODEL, {"messages": []}, True)
USED = Ending("complete", TokenUsage(input_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS), finished=True)
TOKENS = PROMPT_TOKENS + OUTPUT_TOKENS


def backlog(profile: Profile, customers: int) -> list[Figure]:
    """An outage during which 100,000 calls of so many customers ended, and its end."""
    logging.getLogger("vluna_llm").setLevel(logging.CRITICAL)  # an outage is told for each call; here it is counted
    count = SETTLEMENTS // 50 if profile.quick else SETTLEMENTS
    group = f"backlog of {count:,}, {customers:,} customer{'s' if customers > 1 else ''}"
    with world() as around, Vluna(**around.settings(mode="observe", authorize_deadline=0.5)) as vluna:
        limit = _direct(around, profile.some(DIRECT), customers)
        quiet = _Caller(vluna, "quiet")
        with quiet.calling():
            time.sleep(1 if profile.quick else 5)
        around.gate.ask({"away": True})
        memory = _Peak()
        with memory.watched():
            started = time.perf_counter()
            for number in range(count):
                _ended_call(vluna, f"backlog_{number % customers}")
            arrived = time.perf_counter() - started
            piled_up = memory.peak
            around.gate.ask({"away": False})
            busy = _Caller(vluna, "busy")
            started = time.perf_counter()
            with busy.calling():
                _until_drained(vluna)
            took = time.perf_counter() - started
        errors = vluna.telemetry.counts["vluna.internal_error"]
        alarms = vluna.telemetry.counts["vluna.outbox.backlog"]
        booked = around.gate.ask({"booked": "backlog_"})
        rate = count / took
    return [
        Figure(group, "settlements lost or doubled", "", abs(count - booked["applied"]), budget=0, exact=True),
        Figure(
            group,
            "tokens that the gate's books are off",
            "",
            abs(count * TOKENS - booked["quantity"]) + booked["quarantined"],
            budget=0,
            exact=True,
        ),
        Figure(group, "errors of our own", "", errors, budget=0, exact=True),
        Figure(group, "calls a second while the gate is away", "1/s", count / arrived, note="one thread"),
        Figure(group, "drain", "1/s", rate, note=f"{took:.0f} s from the first answer of the gate to the last"),
        Figure(group, "the gate's own limit", "1/s", limit, note=f"the same requests, {_threads(customers)} at a time"),
        Figure(group, "drain, of the gate's limit", "%", 100 * rate / limit),
        Figure(group, "alarms told", "", alarms, note="arrivals outran the drain for a minute; and that it was over"),
        Figure(group, "memory while it piles up", "MB", piled_up / 1e6),
        Figure(group, "memory at its peak", "MB", memory.peak / 1e6, budget=50.0, note="flat: a bounded window"),
        Figure(group, "authorize p99, idle", "ms", quiet.authorize_p99),
        Figure(group, "authorize p99, while it drains", "ms", busy.authorize_p99, note="of new calls, one at a time"),
        Figure(group, "new call settled within p99, idle", "ms", quiet.settled_p99),
        Figure(group, "new call settled within p99, while it drains", "ms", busy.settled_p99),
        Figure(group, "new calls without a lease while it drains", "", busy.ungated, note=f"of {busy.calls}"),
    ]


def _ended_call(vluna: Vluna, principal: str) -> Any:
    with call_context(principal_id=principal):
        operation = vluna.begin(CALL)
    assert operation is not None
    operation.finish(USED)
    return operation


def _threads(customers: int) -> int:
    return min(MAX_WORKERS, customers)


def _direct(around: World, count: int, customers: int) -> float:
    """Ingests a second that the gate takes of a bare client, as many at a time as the settler sends."""
    settings = around.settings()
    numbers = itertools.count()

    def one(number: int) -> None:
        client.ingest(
            principal_id=f"direct_{number % customers}",
            user_id=f"direct_{number % customers}",
            feature_code=f"openai.{MODEL}",
            quantity=TOKENS,
            meters={f"openai.{MODEL}.tokens.input": PROMPT_TOKENS, f"openai.{MODEL}.tokens.output": OUTPUT_TOKENS},
            labels={"operation_id": "00000000-0000-0000-0000-000000000000", "usage_source": "provider", "model": MODEL},
            idempotency_key=f"direct-{next(numbers)}",
        )

    with Vluna(**settings) as vluna:
        client: GateClient = vluna.gate
        with ThreadPoolExecutor(_threads(customers)) as pool:
            list(pool.map(one, range(min(customers, count))))  # every customer's first request is a slower one
            started = time.perf_counter()
            list(pool.map(one, range(count)))
            return count / (time.perf_counter() - started)


def _until_drained(vluna: Vluna) -> None:
    path = vluna._running().ledger.journal.path
    assert path is not None
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        waiting = (
            "SELECT count(*) FROM operations WHERE settlement IN ('pending', 'sent') AND principal_id LIKE 'backlog%'"
        )
        while db.execute(waiting).fetchone()[0]:
            time.sleep(0.1)


class _Peak:
    """The most memory that was in use, above what there was at first."""

    def __init__(self) -> None:
        self.peak = 0
        self._first = resident() or 0
        self._ended = threading.Event()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        watcher = threading.Thread(target=self._watch)
        watcher.start()
        try:
            yield
        finally:
            self._ended.set()
            watcher.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self.peak = max(self.peak, (resident() or 0) - self._first)


class _Caller:
    """A customer who makes a call every 50 ms while something else goes on."""

    def __init__(self, vluna: Vluna, name: str) -> None:
        self._vluna, self._name = vluna, name
        self._authorize: list[float] = []
        self._settled: list[float] = []
        self.ungated = 0

    @property
    def calls(self) -> int:
        return len(self._authorize)

    @property
    def authorize_p99(self) -> float:
        return 1e3 * percentile(self._authorize, 0.99)

    @property
    def settled_p99(self) -> float:
        return 1e3 * percentile(self._settled, 0.99)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        ended = threading.Event()
        caller = threading.Thread(target=self._call, args=(ended,))
        caller.start()
        try:
            yield
        finally:
            ended.set()
            caller.join()

    def _call(self, ended: threading.Event) -> None:
        number = itertools.count()
        while not ended.wait(0.05):
            started = time.perf_counter()
            with call_context(principal_id=f"{self._name}_{next(number) % 20}"):
                operation = self._vluna.begin(CALL)
            assert operation is not None
            self._authorize.append(time.perf_counter() - started)
            self.ungated += operation.lease is None
            operation.finish(USED)
            finished = time.perf_counter()
            operation.wait(30)
            if operation.lease is not None:  # else it is part of the outage
                self._settled.append(time.perf_counter() - finished)
