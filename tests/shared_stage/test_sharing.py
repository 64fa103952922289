"""The coordinator of one process, against a real PostgreSQL and workers that only take notes."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psycopg", reason="psycopg (the extra 'postgres') is not installed")

import psycopg

from vluna_llm import Vluna, call_context, failpoints
from vluna_llm.context import Scope
from vluna_llm.delivery import Delivery, Elsewhere
from vluna_llm.ending import Ending
from vluna_llm.errors import ConfigurationError, OutboxUnavailable
from vluna_llm.ledger import Ledger
from vluna_llm.lifecycle import ModelCall
from vluna_llm.operation import OperationState
from vluna_llm.outbox import Journal, Row
from vluna_llm.outbox.postgres import Claim, SharedOutbox
from vluna_llm.pricing import PriceBook
from vluna_llm.sandbox import Sandbox
from vluna_llm.sharing import Sharing, copying, following, rows, stage
from vluna_llm.sharing.claims import Claims
from vluna_llm.telemetry import Telemetry
from vluna_llm.types import Receipt
from vluna_llm.usage import TokenUsage
from vluna_llm.usage.features import MeterNames

GATE, REALM = "https://gate/mgt/v1", "realm"
CREDENTIALS = {"base_url": GATE, "realm_id": REALM, "key_id": "pk-1", "key_secret": "A" * 43 + "="}
PENDING = OperationState().leased("lease_token").started().completed(TokenUsage(10, 5), "provider")
WITHOUT_LEASE = OperationState().ungated().started().completed(TokenUsage(10, 5), "provider")
BOOKED = json.dumps({"state": "booked", "amount_xusd": 42, "charged_xusd": 42, "commit_id": "c-1"})


def row(operation_id: str = "op-1", principal: str = "ann", **changes: object) -> Row:
    made = Row(
        operation_id=operation_id,
        base_url=GATE,
        realm_id=REALM,
        pid=7,
        principal_id=principal,
        user_id=principal,
        feature_code="openai.gpt-4o",
        created_at=1000.0,
        authorize_key=f"{operation_id}:auth",
        settle_key=operation_id,
        state=PENDING,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def until(true: Callable[[], bool], what: str = "", seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what or "not in time"
        time.sleep(0.01)


class Workers:
    """Takes notes of what it is to deliver."""

    def __init__(self) -> None:
        self.fed: list[Row] = []
        self.here: list[Row] = []
        self.busy: set[str] = set()
        self.away: float | None = None
        self.settled = 0
        self.reads = 0

    def feed(self, rows: Sequence[Row]) -> None:
        self.fed += rows

    def deliver_here(self, rows: Sequence[Row]) -> None:
        self.here += rows

    def read_again(self) -> None:
        self.reads += 1

    def delivering(self, operation_id: str) -> bool:
        return operation_id in self.busy

    def gate_away_for(self) -> float | None:
        return self.away

    def settled_elsewhere(self) -> None:
        self.settled += 1


class Process:
    """One process: its ledger, its coordinator, its workers, and a look into PostgreSQL from outside."""

    def __init__(self, directory: Path | None, database: str) -> None:
        self.telemetry = Telemetry()
        self.ledger = Ledger(Journal(directory), self.telemetry)
        self.workers = Workers()
        self.sharing = Sharing(SharedOutbox(database, GATE, REALM), self.ledger, self.telemetry, ttl=2.0)
        self.other = SharedOutbox(database, GATE, REALM)

    def add(self, *rows: Row) -> None:
        for one in rows:
            self.ledger.open(one, (), 0)
            assert self.sharing.take(one)

    def stage(self, operation_id: str = "op-1") -> tuple[str | None, str]:
        found = self.ledger.get(operation_id)
        assert found is not None
        return found.stage, found.state.settlement

    def elsewhere(self, operation_id: str, state: OperationState, receipt: str | None = BOOKED) -> None:
        """Another host delivers the row."""
        claims: list[Claim] = []
        until(lambda: bool(claims.extend(self.other.claim("other", 16, 30.0)) or claims), "the other host has the lane")
        found = self.other.get(operation_id)
        assert found is not None
        (claim,) = (one for one in claims if one.lane == found.lane)
        self.other.update(claim, found, found.evolve(state=state, receipt=receipt))
        self.other.release(claims)

    def end(self) -> None:
        self.sharing.stop(10)
        self.ledger.close()
        self.other.close()


@pytest.fixture
def process(tmp_path: Path, database: str) -> Iterator[Process]:
    made = Process(tmp_path, database)
    made.sharing.start(made.workers)
    yield made
    made.end()


@pytest.fixture
def idle(tmp_path: Path, database: str) -> Iterator[Process]:
    """A process whose gate is away, so that it claims nothing and others deliver."""
    made = Process(tmp_path, database)
    made.workers.away = 60.0
    made.sharing.start(made.workers)
    yield made
    made.end()


def lanes_held(psql: Any) -> int:
    return int(psql.execute("SELECT count(*) FROM vluna_llm_lanes WHERE owner IS NOT NULL").fetchone()[0])


# -- sharing ---------------------------------------------------------------------------------------------------------


def test_a_row_is_shared_and_fed_to_the_workers_under_a_claim(process: Process, psql: Any) -> None:
    process.add(row(), row("op-2"), row("op-3", "bob"))
    until(lambda: len(process.workers.fed) == 3)
    assert [process.stage(key) for key in ("op-1", "op-2", "op-3")] == [("shared", "pending")] * 3
    assert all(one.stage is None for one in process.workers.fed)
    assert lanes_held(psql) == 2
    assert process.sharing.outstanding == 3
    process.end()
    assert lanes_held(psql) == 0


def test_a_row_without_money_or_without_a_journal_is_delivered_from_here(process: Process) -> None:
    cancelled = OperationState().leased("lease_token").started().failed()
    assert cancelled.route == "cancel"
    assert not process.sharing.take(row(state=cancelled))
    process.ledger.keep_in_memory(row("op-2"), (), 0)
    assert not process.sharing.take(row("op-2"))


def test_a_row_that_is_being_sent_from_here_is_not_shared(process: Process) -> None:
    """It had been delivered from here while PostgreSQL was away; the worker is waiting for the gate's answer."""
    process.workers.busy.add("op-1")
    process.add(row(state=PENDING.sent(), body=b"{}", path="/gate/commits"))
    process.add(row("op-2"))
    until(lambda: process.stage("op-2")[0] == "shared")
    assert process.stage("op-1") == (None, "sent")
    assert process.other.get("op-1") is None
    # It may have seen the mark that was taken back, and given the row up: it has to look again.
    assert {one.operation_id for one in process.workers.here} == {"op-1"}
    process.workers.busy.clear()
    found = process.ledger.get("op-1")
    assert found is not None
    assert process.sharing.take(found)
    until(lambda: process.stage("op-1")[0] == "shared")
    shared = process.other.get("op-1")
    assert shared is not None
    assert shared.body == b"{}"


def test_what_is_being_copied_at_this_moment_is_not_delivered_yet(process: Process) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait(name: str) -> None:
        if name == "sharing.marked":
            reached.set()
            go_on.wait(10)

    failpoints.arm(wait)
    try:
        process.add(row(), row("op-2"))
        assert reached.wait(10)
        assert process.sharing.outstanding == 2
        assert not process.sharing.in_vain(1.0, 60.0)
    finally:
        go_on.set()
        failpoints.arm(None)
    until(lambda: process.stage("op-2")[0] == "shared")


def test_an_error_of_ours_in_the_middle_of_a_batch_leaves_no_row_behind(process: Process) -> None:
    struck: list[str] = []

    def strike(name: str) -> None:
        if name == "sharing.offered" and not struck:
            struck.append(name)
            raise RuntimeError("a mistake")

    failpoints.arm(strike)
    try:
        process.add(row(), row("op-2", "bob"))
        until(lambda: process.stage("op-1")[0] == process.stage("op-2")[0] == "shared")
    finally:
        failpoints.arm(None)
    assert struck == ["sharing.offered"]
    assert process.telemetry.counts["vluna.internal_error"] == 1


class Stolen:
    """A row that goes to the shared outbox between two looks of a worker."""

    def __init__(self, row: Row, looks: int) -> None:
        self.row = row
        self.looks = looks

    def get(self, operation_id: str) -> Row:
        return self._look()

    def apply(self, operation_id: str, change: Callable[[Row], Row]) -> Row:
        self.row = change(self._look())
        return self.row

    def _look(self) -> Row:
        self.looks -= 1
        if self.looks < 0:
            self.row = self.row.evolve(stage="sharing")
        return self.row

    def sync(self) -> None:
        raise AssertionError("nothing was stored")

    def settled(self, row: Row, receipt: Receipt) -> None:
        raise AssertionError("nothing was settled")


@pytest.mark.parametrize(
    ("looks", "state"), [(0, WITHOUT_LEASE), (0, PENDING.sent()), (1, PENDING), (1, PENDING.sent())]
)
def test_a_worker_does_not_send_what_has_gone_to_the_shared_outbox(looks: int, state: OperationState) -> None:
    class Courier:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError("nothing is asked of the gate")

    prices = PriceBook(lambda feature, principal, user: {})
    delivery = Delivery(Courier(), prices, Telemetry(), meters="never", names=lambda feature: MeterNames())
    sent = {"body": b"{}", "path": "/gate/commits"} if state.settlement == "sent" else {}
    of_a_job = row(state=state, lease_token="lease.x.y", derived=True, **sent)
    store = Stolen(of_a_job, looks)
    assert delivery.deliver("op-1", store) is None
    assert store.row == of_a_job.evolve(stage="sharing")


def test_a_row_that_postgresql_cannot_hold_is_delivered_from_here(process: Process) -> None:
    process.add(row("op-1", model="a\0b"), row("op-2"))
    until(lambda: process.stage("op-2")[0] == "shared")
    until(lambda: [one.operation_id for one in process.workers.here] == ["op-1"])
    assert process.stage("op-1") == (None, "pending")
    assert process.sharing.outstanding == 1


def test_more_rows_than_memory_holds_are_shared_and_followed_all_the_same(
    idle: Process, monkeypatch: pytest.MonkeyPatch, psql: Any
) -> None:
    monkeypatch.setattr(copying, "_HELD_IN_MEMORY", 20)
    monkeypatch.setattr(copying, "_BATCH", 10)
    monkeypatch.setattr(following, "_HELD_IN_MEMORY", 20)
    monkeypatch.setattr(rows, "PAGE", 10)
    idle.add(*(row(f"op-{number}", f"customer-{number % 7}") for number in range(100)))
    keys = [f"op-{number}" for number in range(100)]
    until(lambda: not idle.other.ended(keys).missing)
    assert len(idle.sharing._following._waiting) <= 30
    psql.execute("UPDATE vluna_llm_operations SET settlement = 'booked'")
    until(lambda: idle.workers.settled == 100, "all followed")
    until(lambda: idle.sharing.outstanding == 0, "nothing is left")


class Unreadable:
    """A journal that cannot be read for a moment: no file descriptor is left, say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stage_of: str | None) -> None:
        self.hits = 0
        self.broken = True
        real = rows.staged

        def staged(path: Path, which: Any, *rest: Any, **options: Any) -> list[tuple[int, str]]:
            if which == stage_of and self.broken:
                self.hits += 1
                raise sqlite3.OperationalError("unable to open database file")
            return real(path, which, *rest, **options)

        monkeypatch.setattr(rows, "staged", staged)


def test_rows_beyond_memory_are_copied_although_the_journal_could_not_be_read_at_first(
    idle: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else delivers them: what found no room in memory is in the journal alone."""
    monkeypatch.setattr(stage, "_FOLLOW_EVERY", 0.2)
    monkeypatch.setattr(copying, "_HELD_IN_MEMORY", 5)
    keys = [f"op-{number}" for number in range(20)]
    idle.sharing._follow_at = 0.0
    trouble = Unreadable(monkeypatch, None)
    idle.add(*map(row, keys))
    until(lambda: trouble.hits > 0 and not idle.sharing._copying._new, "it was looked for more")
    trouble.broken = False
    until(lambda: not idle.other.ended(keys).missing, "all are copied")


def test_rows_beyond_memory_are_followed_although_the_journal_could_not_be_read_at_first(
    idle: Process, monkeypatch: pytest.MonkeyPatch, psql: Any
) -> None:
    """Callers that wait for their receipts are told in the end, and a journal in trouble is not read in a loop."""
    monkeypatch.setattr(following, "_HELD_IN_MEMORY", 5)
    monkeypatch.setattr(following, "_LOOK_EVERY", (0.1, 0.2))
    trouble = Unreadable(monkeypatch, "shared")
    keys = [f"op-{number}" for number in range(20)]
    idle.add(*map(row, keys))
    until(lambda: not idle.other.ended(keys).missing, "all are copied")
    psql.execute("UPDATE vluna_llm_operations SET settlement = 'booked'")
    until(lambda: trouble.hits > 0, "it was looked for more")
    for _ in range(50):
        idle.sharing._wake.set()
        time.sleep(0.01)
    assert trouble.hits < 12
    assert idle.sharing.outstanding
    trouble.broken = False
    until(lambda: idle.workers.settled == 20, "all followed")
    until(lambda: idle.sharing.outstanding == 0, "nothing is left")


def test_what_came_with_the_journal_of_the_dead_is_copied_although_it_could_not_be_read_at_first(
    idle: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_FOLLOW_EVERY", 0.2)
    trouble = Unreadable(monkeypatch, "sharing")
    idle.ledger.open(row(stage="sharing"), (), 0)
    idle.sharing._follow_at = 0.0
    idle.sharing.recall()
    assert trouble.hits == 1
    trouble.broken = False
    until(lambda: idle.other.get("op-1") is not None, "it is copied")


def test_rows_in_memory_are_shared_too(database: str) -> None:
    """The journal is in memory: the shared outbox is all that outlives the process."""
    process = Process(None, database)
    process.sharing.start(process.workers)
    process.add(row())
    until(lambda: process.other.get("op-1") is not None)
    process.end()


def test_what_memory_holds_of_a_journal_in_memory_is_bounded_too(
    database: str, psql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids that find no room are read back from it, those that were never copied and those that are waited for."""
    monkeypatch.setattr(copying, "_HELD_IN_MEMORY", 20)
    monkeypatch.setattr(copying, "_BATCH", 10)
    monkeypatch.setattr(following, "_HELD_IN_MEMORY", 20)
    monkeypatch.setattr(rows, "PAGE", 10)
    process = Process(None, database)
    process.workers.away = 60.0
    try:
        process.add(*(row(f"op-{number}", f"customer-{number % 7}") for number in range(100)))
        assert len(process.sharing._copying._new) == 20
        process.sharing.start(process.workers)
        until(lambda: not process.other.ended([f"op-{number}" for number in range(100)]).missing, "all copied")
        assert len(process.sharing._following._waiting) <= 30
        psql.execute("UPDATE vluna_llm_operations SET settlement = 'booked'")
        until(lambda: process.workers.settled == 100, "all followed")
        until(lambda: process.sharing.outstanding == 0, "nothing is left")
        assert process.telemetry.counts["vluna.internal_error"] == 0
    finally:
        process.end()


# -- the gate is away ------------------------------------------------------------------------------------------------


def test_a_host_that_does_not_reach_the_gate_gives_its_lanes_back(process: Process, psql: Any) -> None:
    process.add(row())
    until(lambda: len(process.workers.fed) == 1)
    process.workers.away = 30.0
    until(lambda: lanes_held(psql) == 0, "given back")
    assert len(process.other.claim("other", 8, 30.0)) == 1
    assert process.sharing.store_of("op-1", ("ann", "ann")) is None


def test_one_row_finds_out_whether_the_gate_is_back(idle: Process, psql: Any) -> None:
    idle.add(*(row(f"op-{number}", f"customer-{number % 3}") for number in range(9)))
    until(lambda: idle.stage("op-8")[0] == "shared")
    assert idle.workers.fed == []
    idle.workers.away = 0.0
    until(lambda: len(idle.workers.fed) == 1)
    time.sleep(1.5)
    assert len(idle.workers.fed) == 1
    assert lanes_held(psql) <= 1
    idle.workers.away = None
    (probe,) = idle.workers.fed
    assert idle.sharing.store_of(probe.operation_id, probe.lane) is not None
    idle.sharing.attempted(probe.operation_id, probe.lane, None)
    until(lambda: len({one.operation_id for one in idle.workers.fed}) == 9)


def test_a_lane_of_which_something_is_on_its_way_is_not_given_back(process: Process, psql: Any) -> None:
    process.add(row(), row("op-2", "bob"))
    until(lambda: len(process.workers.fed) == 2)
    assert process.sharing.store_of("op-1", ("ann", "ann")) is not None
    process.workers.away = 30.0
    until(lambda: lanes_held(psql) == 1)
    time.sleep(1.5)
    assert psql.execute("SELECT principal_id FROM vluna_llm_lanes WHERE owner IS NOT NULL").fetchall() == [("ann",)]
    process.sharing.attempted("op-1", ("ann", "ann"), None)
    until(lambda: lanes_held(psql) == 0)


def test_a_delivery_does_not_begin_at_the_end_of_a_claim(process: Process) -> None:
    """What is sent must be answered before another host may have the lane."""
    claims = Claims(process.other, 1.0, settled=lambda row, receipt: None, lost=lambda row, claim: None)
    for left, begins in ((5.0, True), (0.5, False)):
        claims.take([Claim("ann", "ann", "me", 1, time.monotonic() + left)])
        claims.in_hand([row()])
        store = claims.store_of("op-1", ("ann", "ann"))
        assert store is not None
        if begins:
            assert store.get("op-1") == row()
        else:
            with pytest.raises(Elsewhere):
                store.get("op-1")
        claims.attempted("op-1", ("ann", "ann"))


def test_a_row_that_waits_for_another_attempt_waits_in_postgresql(
    make_vluna: Callable[..., Vluna], gate: Sandbox, database: str, psql: Any
) -> None:
    gate.faults.add("status", "commits", times=None, status=503)
    vluna = make_vluna(outbox_shared=database)
    with call_context(principal_id="ann"):
        operation = vluna.begin(ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []}))
    assert operation is not None
    operation.finish(Ending("complete", usage=TokenUsage(10, 5), finished=True))
    settler = vluna._running().settler
    until(lambda: settler.outstanding == 1)

    def attempts() -> int:
        found = psql.execute("SELECT attempts FROM vluna_llm_operations").fetchone()
        return 0 if found is None else int(found[0])

    until(lambda: _there(psql) and attempts() >= 2)
    assert settler.outstanding == 1
    psql.execute("UPDATE vluna_llm_operations SET next_attempt_at = next_attempt_at + 3600")
    time.sleep(0.3)
    until(lambda: len(settler._backlog) == 0, "nothing is left in memory")
    gate.faults.clear()
    psql.execute("UPDATE vluna_llm_operations SET next_attempt_at = 0")
    psql.execute("UPDATE vluna_llm_lanes SET due_at = now()")
    assert vluna.flush(10)
    assert [entry.quantity for entry in gate.booked("ann").entries] == [15]


def _there(psql: Any) -> bool:
    return psql.execute("SELECT to_regclass('vluna_llm_operations')").fetchone() != (None,)


# -- what becomes of rows --------------------------------------------------------------------------------------------


def test_the_receipt_of_another_host_reaches_who_waits(idle: Process) -> None:
    scope = Scope()
    waiting = row()
    idle.ledger.open(waiting, (scope,), 7)
    assert idle.sharing.take(waiting)
    until(lambda: idle.stage() == ("shared", "pending"))
    hint = {"type": "quota.remaining", "remaining": 5}
    told = {**json.loads(BOOKED), "detail": "no price for x: these lines were booked as 0", "hints": [hint]}
    idle.elsewhere("op-1", PENDING.sent().booked(), json.dumps(told))
    until(lambda: idle.stage() == ("shared", "booked"))
    assert scope.wait(5)
    (receipt,) = scope.receipts
    assert (receipt.state, receipt.charged_xusd, receipt.commit_id) == ("booked", 42, "c-1")
    assert (receipt.input_tokens, receipt.output_tokens) == (10, 5)
    assert [one.as_dict() for one in receipt.hints] == [hint]
    assert receipt.detail == told["detail"]
    assert (idle.workers.settled, idle.sharing.outstanding) == (1, 0)


def test_what_another_host_put_aside_is_followed_until_it_is_mended(
    idle: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_FOLLOW_EVERY", 0.2)
    idle.sharing._follow_at = 0.0
    idle.add(row())
    until(lambda: idle.stage()[0] == "shared")
    quarantined = PENDING.sent().quarantined()
    idle.elsewhere("op-1", quarantined, json.dumps({"state": "quarantined", "charged_xusd": 0}))
    until(lambda: idle.stage() == ("shared", "quarantined"))
    there = idle.other.get("op-1")
    assert there is not None
    mended = dataclasses.replace(quarantined, settlement="rebooked", route="ingest")
    assert idle.other.reopen(there, there.evolve(state=mended, receipt=BOOKED))
    until(lambda: idle.stage() == ("shared", "rebooked"))


def test_an_operator_reopens_a_row_where_it_is_delivered(idle: Process) -> None:
    idle.add(row())
    until(lambda: idle.stage()[0] == "shared")
    idle.elsewhere("op-1", PENDING.sent().refused(), json.dumps({"state": "refused"}))
    until(lambda: idle.stage() == ("shared", "refused"))
    reopened = idle.sharing.reopen("op-1", lambda now: now.evolve(state=now.state.retry(), attempts=0))
    assert reopened is not None
    before, after = reopened
    assert (before.state.settlement, after.state.settlement) == ("refused", "pending")
    assert idle.stage() == ("shared", "pending")
    assert idle.sharing.outstanding == 1
    idle.elsewhere("op-1", PENDING.sent().booked())
    until(lambda: idle.stage() == ("shared", "booked"))
    assert idle.sharing.reopen("op-9", lambda now: now.evolve(attempts=1)) is None
    done = idle.other.get("op-1")
    assert idle.sharing.reopen("op-1", lambda now: now) == (done, done)


def test_an_operators_change_waits_while_the_lane_is_being_delivered(process: Process) -> None:
    process.add(row())
    until(lambda: len(process.workers.fed) == 1)
    with pytest.raises(OutboxUnavailable, match="being delivered"):
        process.sharing.reopen("op-1", lambda now: now.evolve(attempts=9))


def test_what_is_no_longer_in_the_shared_outbox_is_not_settled_by_what_ended_there(idle: Process) -> None:
    """Another row of the same operation has taken its place since it was read: it is delivered from here."""
    ended = row(state=PENDING.sent().booked(), receipt=BOOKED)
    idle.ledger.open(row(state=PENDING.sent(), stage="shared"), (), 0)
    idle.ledger.journal.replace(row())
    assert not idle.sharing._following.close(ended, following.receipt_from(ended))
    assert idle.stage() == (None, "pending")
    assert idle.workers.settled == 0


def test_a_database_that_was_set_back_gets_the_rows_again(idle: Process, psql: Any) -> None:
    idle.add(row())
    until(lambda: idle.stage()[0] == "shared")
    psql.execute("TRUNCATE vluna_llm_operations, vluna_llm_lanes")
    until(lambda: idle.other.get("op-1") is not None)
    idle.elsewhere("op-1", PENDING.sent().booked())
    until(lambda: idle.stage() == ("shared", "booked"))


# -- PostgreSQL is away ----------------------------------------------------------------------------------------------


SILENT = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


class Outage:
    """Nobody may connect to the database, and nobody is."""

    def __init__(self, server: Any, database: str) -> None:
        self._uri = server.get_uri()
        self._name = database.partition("@/")[2].partition("?")[0]

    def __enter__(self) -> None:
        self._allow("false")
        with psycopg.connect(self._uri, autocommit=True) as db:
            # Who waits for a lock goes first, and not on with what it waited for when its holder has gone.
            db.execute(
                "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity WHERE datname = %s "
                "ORDER BY wait_event_type = 'Lock' DESC NULLS LAST) AS backend",
                (self._name,),
            )

    def __exit__(self, *_: object) -> None:
        self._allow("true")

    def _allow(self, what: str) -> None:
        with psycopg.connect(self._uri, autocommit=True) as db:
            db.execute(f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS {what}")


def test_an_outage_is_told_once_and_ends(
    process: Process, postgres: Any, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that come in meanwhile are delivered from here; those that nobody delivered by its end are shared then."""
    monkeypatch.setattr(stage, "_AWAY", (0.2, 0.2))
    process.add(row())
    until(lambda: len(process.workers.fed) == 1)
    with Outage(postgres, database):
        until(lambda: process.telemetry.counts["vluna.outbox.shared_away"] == 1)
        process.ledger.open(row("op-2"), (), 0)
        assert not process.sharing.take(row("op-2"))
        process.ledger.open(row("op-3", stage="sharing"), (), 0)
        assert process.sharing.take(row("op-3", stage="sharing"))  # whether PostgreSQL has it is not known: it waits
        time.sleep(1.0)
        assert process.telemetry.counts["vluna.outbox.shared_away"] == 1
        assert process.telemetry.counts["vluna.outbox.shared_back"] == 0
        assert process.workers.reads >= 1
    until(lambda: process.stage("op-2")[0] == process.stage("op-3")[0] == "shared")
    assert process.telemetry.counts["vluna.outbox.shared_back"] == 1
    assert process.telemetry.counts["vluna.internal_error"] == 0


def test_what_comes_back_from_an_outage_has_arrived_once(
    make_vluna: Callable[..., Vluna],
    gate: Sandbox,
    postgres: Any,
    database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The alarm compares what came with what went: a settlement that changes its way has come before."""
    monkeypatch.setattr(stage, "_AWAY", (0.2, 0.2))
    vluna = make_vluna(outbox_shared=database, outbox=str(tmp_path))

    def complete(principal: str) -> None:
        with call_context(principal_id=principal):
            operation = vluna.begin(ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []}))
        assert operation is not None
        operation.finish(Ending("complete", usage=TokenUsage(10, 5), finished=True))

    complete("ann")
    assert vluna.flush(10)
    settler = vluna._running().settler
    assert settler._sharing is not None
    held = settler._sharing._copying
    locker, look = psycopg.connect(database), psycopg.connect(database, autocommit=True)
    locker.execute("LOCK TABLE vluna_llm_lanes")
    until(lambda: look.execute(SILENT).fetchone() != (0,), "PostgreSQL is silent")
    for name in ("bob", "cid", "dee"):
        complete(name)
    until(lambda: len(held._new) == 3, "waiting for their turn")
    assert settler.arrived == 4
    with Outage(postgres, database):
        until(lambda: all(gate.booked(name).entries for name in ("bob", "cid", "dee")), "delivered from here")
        assert settler.arrived == 4
    locker.close()
    look.close()
    assert vluna.flush(10)


def test_the_end_does_not_wait_for_a_server_that_is_silent(
    make_vluna: Callable[..., Vluna], database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is left to deliver: what PostgreSQL owes is an answer about lanes, which run out by themselves."""
    vluna = make_vluna(outbox_shared=database)
    with call_context(principal_id="ann"):
        operation = vluna.begin(ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []}))
    assert operation is not None
    operation.finish(Ending("complete", usage=TokenUsage(10, 5), finished=True))
    assert vluna.flush(10)
    with psycopg.connect(database) as locker, psycopg.connect(database, autocommit=True) as look:
        locker.execute("LOCK TABLE vluna_llm_lanes")
        until(lambda: look.execute(SILENT).fetchone() != (0,), "PostgreSQL is silent")
        began = time.monotonic()
        assert vluna.close(timeout=6.0)
        assert time.monotonic() - began < 3.0
    assert "has not answered within 1 s at the end" in caplog.text


def test_lanes_that_were_forgotten_in_an_outage_are_free_at_once(
    process: Process, postgres: Any, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL took a claim for us whose answer never came; nobody waits until it runs out."""
    monkeypatch.setattr(stage, "_AWAY", (0.2, 0.2))
    until(lambda: process.other.totals() == [])
    process.other.offer([row()], "host")
    process.other.claim(process.sharing.owner, 8, 3_600.0)
    with Outage(postgres, database):
        until(lambda: process.telemetry.counts["vluna.outbox.shared_away"] == 1)
    until(lambda: len(process.workers.fed) == 1)


def test_what_is_settled_here_under_a_claim_is_settled_in_the_journal(process: Process) -> None:
    from vluna_llm.settlement import receipt_of

    process.add(row())
    until(lambda: len(process.workers.fed) == 1)
    store = process.sharing.store_of("op-1", ("ann", "ann"))
    assert store is not None
    ended = store.apply("op-1", lambda now: now.evolve(state=PENDING.sent().booked(), receipt=BOOKED))
    assert ended is not None
    store.settled(ended, receipt_of(ended, "booked", None, None))
    process.sharing.attempted("op-1", ("ann", "ann"), None)
    assert process.stage() == ("shared", "booked")
    assert process.sharing.outstanding == 0


def test_a_missing_driver_is_one_sentence_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigurationError, match=r'pip install "vluna-llm\[postgres\]"'):
        Vluna(**CREDENTIALS, outbox_shared="postgresql://db/x")


@pytest.mark.parametrize("rest", ["db:port/x", "db/x?nonsense=1", "db%zz/x", "db/x?connect_timeout=5&sslmode=%zz"])
def test_a_url_that_the_driver_cannot_use_is_refused_at_once_without_a_word_of_it(rest: str) -> None:
    with pytest.raises(ConfigurationError, match="VLUNA_LLM_OUTBOX_SHARED is not a URL that PostgreSQL") as error:
        Vluna(**CREDENTIALS, outbox_shared=f"postgresql://user:hunter2@{rest}")
    assert "hunter2" not in f"{error.value!r} {error.value.__cause__!r}"


@pytest.mark.parametrize("rest", ["db/x", "one:5432,two:5433/x?target_session_attrs=read-write", "/x?host=/run/pg"])
def test_whatever_the_driver_can_use_is_taken(rest: str) -> None:
    Vluna(**CREDENTIALS, outbox_shared=f"postgresql://user:hunter2@{rest}")
