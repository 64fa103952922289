"""The shared outbox: what is offered is there once, claims exclude each other, and a lost claim changes nothing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from vluna_llm.errors import ConfigurationError
from vluna_llm.operation import OperationState, Part
from vluna_llm.outbox import Row
from vluna_llm.outbox.row import COLUMNS
from vluna_llm.outbox.waiting import depths
from vluna_llm.usage import TokenUsage
from vluna_llm.usage.meters import MeterLine

pytest.importorskip("psycopg", reason="psycopg (the extra 'postgres') is not installed")


from vluna_llm.outbox.postgres import Claim, ClaimLost, SharedAway, SharedOutbox, Unstorable
from vluna_llm.outbox.postgres_sql import LOCAL

GATE, REALM = "https://gate/mgt/v1", "realm"
PENDING = OperationState().leased("lease_token").started().completed(TokenUsage(10, 5, cached_tokens=4), "provider")
TTL = 30.0

Make = Callable[..., SharedOutbox]


def row(operation_id: str = "op-1", principal: str = "ann", **changes: object) -> Row:
    made = Row(
        operation_id=operation_id,
        base_url=GATE,
        realm_id=REALM,
        pid=7,
        principal_id=principal,
        user_id=principal,
        feature_code="openai.gpt-4o",
        created_at=1000.25,
        authorize_key=f"{operation_id}:auth",
        settle_key=operation_id,
        state=PENDING,
        lease_token="lease.x.y",
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def make(database: str) -> Iterator[Make]:
    made: list[SharedOutbox] = []

    def outbox(base_url: str = GATE, realm_id: str = REALM, **options: Any) -> SharedOutbox:
        made.append(SharedOutbox(database, base_url, realm_id, **options))
        return made[-1]

    yield outbox
    for one in made:
        one.close()


@pytest.fixture
def outbox(make: Make) -> SharedOutbox:
    return make()


def expire(psql: Any) -> None:
    """Every claim runs out now, on the database's clock."""
    psql.execute("UPDATE vluna_llm_lanes SET expires_at = now() - interval '1 second' WHERE owner IS NOT NULL")


# -- sharing ---------------------------------------------------------------------------------------------------------


def test_a_row_comes_back_as_it_was_offered(outbox: SharedOutbox) -> None:
    offered = row(
        labels={"team": "kävl"},
        budget_id="b-1",
        derived=True,
        unsplit=True,
        held=True,
        estimated_input=7,
        body=b'{"a":"\x00\xff"}',
        path="/gate/commits",
        trace_id="a" * 32,
        span_id="b" * 16,
        trace_flags=1,
        ended_at=1001.123456,
        attempts=3,
        last_error="why",
    )
    outbox.offer([offered], "host-a")
    assert outbox.get("op-1") == offered
    assert outbox.get("nobody") is None


def test_what_is_left_of_a_partly_charged_ingest_is_written_and_comes_back(outbox: SharedOutbox) -> None:
    """With the mark that it is held, which goes as a number."""
    ungated = OperationState().ungated().started().completed(PENDING.usage or TokenUsage(1, 1), "provider")
    before = row(state=ungated.sent(), body=b"all", path="/gate/ingest")
    outbox.offer([before], "host-a")
    (claim,) = outbox.claim("me", 8, TTL)
    state = before.state.partly_booked((MeterLine("m.output", 5), MeterLine("m.input", 3)), (Part("c-1", 40),))
    left = before.evolve(state=state, body=b"the rest", held=True, attempts=1)
    outbox.update(claim, before, left)
    assert outbox.get("op-1") == left
    done = left.evolve(state=left.state.sent().booked(), held=False)
    outbox.update(claim, left, done)
    assert outbox.get("op-1") == done
    assert done.state.rest == ()


def test_every_column_of_the_journal_is_there_but_the_local_ones(outbox: SharedOutbox, psql: Any) -> None:
    outbox.totals()
    found = psql.execute("SELECT column_name FROM information_schema.columns WHERE table_name = 'vluna_llm_operations'")
    assert {name for (name,) in found} - {"seq", "origin", "changed_by", "updated_at"} == set(COLUMNS) - set(LOCAL)


def test_offering_again_changes_nothing(outbox: SharedOutbox) -> None:
    outbox.offer([row()], "host-a")
    (claim,) = outbox.claim("me", 8, TTL)
    sent = row().evolve(state=PENDING.sent(), body=b"{}", path="/gate/commits")
    outbox.update(claim, row(), sent)
    outbox.offer([row(), row("op-2")], "host-b")
    assert outbox.get("op-1") == sent
    assert outbox.get("op-2") == row("op-2")


def test_a_value_that_cannot_be_stored_stores_nothing_of_the_batch(outbox: SharedOutbox) -> None:
    for bad in (row("op-2", model="a\0b"), row("op-2", model="\ud800")):
        with pytest.raises(Unstorable):
            outbox.offer([row(), bad], "host-a")
    assert outbox.ended(["op-1", "op-2"]).missing == ("op-1", "op-2")


def test_another_gate_or_realm_sees_and_touches_nothing(outbox: SharedOutbox, make: Make) -> None:
    outbox.offer([row()], "host-a")
    for other in (make(base_url="https://other/mgt/v1"), make(realm_id="other")):
        assert other.claim("other", 8, TTL) == []
        assert other.get("op-1") is None
        assert other.totals() == other.listed("pending") == []
        assert other.ended(["op-1"]).missing == ("op-1",)
        with pytest.raises(ValueError, match="another gate or realm"):
            other.offer([row()], "host-a")
        (claim,) = outbox.claim("me", 8, TTL)
        with pytest.raises(ClaimLost):
            other.update(claim, row(), row(attempts=1))
        other.release([claim])
        assert other.renew("me", [claim], TTL) == []
        outbox.update(claim, row(), row())
        outbox.release([claim])
    twin = make(realm_id="other")
    twin.offer([row(realm_id="other")], "host-a")
    assert len(twin.claim("other", 8, TTL)) == len(outbox.claim("me", 8, TTL)) == 1


# -- claims ----------------------------------------------------------------------------------------------------------


def test_the_longest_waiting_lanes_come_first_and_rows_oldest_first(outbox: SharedOutbox) -> None:
    for number in range(6):
        outbox.offer([row(f"op-{number}", f"customer-{number % 3}")], "host-a")
    first = outbox.claim("me", 2, TTL)
    assert {claim.principal_id for claim in first} == {"customer-0", "customer-1"}
    (zero,) = (claim for claim in first if claim.principal_id == "customer-0")
    assert [one.operation_id for one in outbox.rows_of([zero], 9)] == ["op-0", "op-3"]
    assert [one.operation_id for one in outbox.rows_of([zero], 1)] == ["op-0"]
    assert [one.operation_id for one in outbox.rows_of(first, 1)] == ["op-0", "op-1"]
    assert [one.operation_id for one in outbox.rows_of(first, 9)] == ["op-0", "op-1", "op-3", "op-4"]
    assert [claim.principal_id for claim in outbox.claim("you", 9, TTL)] == ["customer-2"]
    assert outbox.claim("you", 9, TTL) == []


def test_two_owners_never_hold_one_lane(make: Make) -> None:
    hosts = [make() for _ in range(4)]
    hosts[0].offer([row(f"op-{number}", f"customer-{number}") for number in range(200)], "host-a")

    def take(number: int) -> list[Claim]:
        found: list[Claim] = []
        while taken := hosts[number].claim(f"host-{number}", 7, TTL):
            found += taken
        return found

    with ThreadPoolExecutor(4) as pool:
        claims = [claim for taken in pool.map(take, range(4)) for claim in taken]
    assert len(claims) == len({claim.lane for claim in claims}) == len({claim.epoch for claim in claims}) == 200


def test_what_is_offered_to_a_claimed_lane_waits_for_its_owner_or_the_release(outbox: SharedOutbox) -> None:
    outbox.offer([row()], "host-a")
    (claim,) = outbox.claim("me", 8, TTL)
    outbox.update(claim, row(), row(state=PENDING.sent().booked()))
    outbox.offer([row("op-2")], "host-b")
    assert outbox.claim("you", 8, TTL) == []
    assert [one.operation_id for one in outbox.rows_of([claim], 9)] == ["op-2"]
    outbox.release([claim])
    (next_claim,) = outbox.claim("you", 8, TTL)
    assert next_claim.epoch > claim.epoch


def test_a_lane_that_had_become_idle_is_given_out_for_what_is_new(outbox: SharedOutbox) -> None:
    outbox.offer([row()], "host-a")
    (claim,) = outbox.claim("me", 8, TTL)
    outbox.update(claim, row(), row(state=PENDING.sent().booked()))
    outbox.release([claim])
    assert outbox.claim("me", 8, TTL) == []
    outbox.offer([row("op-2")], "host-a")
    assert len(outbox.claim("me", 8, TTL)) == 1


def test_a_lane_without_anything_due_is_not_given_out(outbox: SharedOutbox) -> None:
    outbox.offer([row(), row("op-2", "bob", next_attempt_at=time.time() + 0.4)], "host-a")
    (claim,) = outbox.claim("me", 8, TTL)
    outbox.update(claim, row(), row(attempts=1, next_attempt_at=time.time() + 0.4, last_error="503"))
    assert outbox.rows_of([claim], 9) == []
    outbox.release([claim])
    assert outbox.claim("me", 8, TTL) == []
    time.sleep(0.5)
    assert {claim.principal_id for claim in outbox.claim("me", 8, TTL)} == {"ann", "bob"}


def test_a_due_time_is_a_delay_whatever_the_clocks_of_the_hosts_say(
    outbox: SharedOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One host is a day ahead, the other a day behind: the delay holds for both."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 86_400)
    outbox.offer([row()], "host-a")
    (claim,) = outbox.claim("me", 8, TTL)
    outbox.update(claim, row(), row(next_attempt_at=time.time() + 60))
    monkeypatch.setattr(time, "time", lambda: real() - 86_400)
    found = outbox.get("op-1")
    assert found is not None
    assert 58 < found.next_attempt_at - time.time() <= 60
    assert outbox.rows_of([claim], 9) == []


def test_a_lost_claim_changes_nothing(outbox: SharedOutbox, make: Make, psql: Any) -> None:
    """Run out, taken over, taken back by the same owner, given back: only the present claim writes."""
    sleeper = make()
    outbox.offer([row()], "host-a")
    (old,) = sleeper.claim("sleeper", 8, TTL)
    sent = row().evolve(state=PENDING.sent(), body=b"{}", path="/gate/commits")
    expire(psql)
    with pytest.raises(ClaimLost):
        sleeper.update(old, row(), sent)
    assert sleeper.renew("sleeper", [old], TTL) == []
    (new,) = outbox.claim("me", 8, TTL)
    with pytest.raises(ClaimLost):
        sleeper.update(old, row(), sent)
    with pytest.raises(ClaimLost):
        sleeper.update(old, row(), row())  # nothing differs, and the answer is no all the same
    sleeper.release([old])
    outbox.update(new, row(), sent)
    expire(psql)
    (again,) = sleeper.claim("sleeper", 8, TTL)
    with pytest.raises(ClaimLost):
        sleeper.update(old, sent, row(attempts=9))
    sleeper.update(again, sent, row(attempts=1))
    sleeper.release([again])
    with pytest.raises(ClaimLost):
        sleeper.update(again, row(), row(attempts=2))
    assert outbox.get("op-1") == row(attempts=1)


def test_a_claim_only_writes_into_its_own_lane(outbox: SharedOutbox, psql: Any) -> None:
    outbox.offer([row(), row("op-2", "bob")], "host-a")
    claims = {claim.principal_id: claim for claim in outbox.claim("me", 8, TTL)}
    with pytest.raises(ValueError, match="another lane"):
        outbox.update(claims["ann"], row("op-2", "bob"), row("op-2", "bob", attempts=1))
    with pytest.raises(ClaimLost):
        outbox.update(claims["ann"], row("op-2"), row("op-2", attempts=1))
    assert outbox.get("op-2") == row("op-2", "bob")


def test_a_write_that_waited_while_its_lane_was_taken_over_changes_nothing(
    outbox: SharedOutbox, make: Make, psql: Any
) -> None:
    """The fence is looked at under a lock, not in an older picture of the lane."""
    outbox.offer([row()], "host-a")
    (old,) = outbox.claim("sleeper", 8, TTL)
    with psql.transaction():
        psql.execute("UPDATE vluna_llm_lanes SET owner = 'thief', epoch = epoch + 100")
        failures: list[BaseException] = []

        def write() -> None:
            try:
                outbox.update(old, row(), row(attempts=1))
            except ClaimLost as error:
                failures.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(0.3)
        assert writer.is_alive()
    writer.join(5)
    assert len(failures) == 1
    assert make().get("op-1") == row()


def test_an_offer_during_a_release_is_not_forgotten(outbox: SharedOutbox, make: Make, psql: Any) -> None:
    """The lane is due although its new row was not yet to be seen when the release began."""
    outbox.offer([row()], "host-a")
    (claim,) = outbox.claim("me", 8, TTL)
    outbox.update(claim, row(), row(state=PENDING.sent().booked()))
    with psql.transaction():  # an offer that has locked the lane and is not committed
        psql.execute("UPDATE vluna_llm_lanes SET due_at = least(due_at, clock_timestamp())")
        psql.execute(
            "UPDATE vluna_llm_operations SET settlement = 'booked'"  # something else in the same transaction
        )
        releaser = threading.Thread(target=outbox.release, args=([claim],))
        releaser.start()
        time.sleep(0.3)
        assert releaser.is_alive()
    releaser.join(5)
    assert len(make().claim("you", 8, TTL)) == 1


def test_renewing_keeps_what_is_known_and_gives_back_what_is_not(outbox: SharedOutbox, make: Make) -> None:
    """A claim whose answer got lost does not keep its lane from others until it runs out."""
    outbox.offer([row(), row("op-2", "bob")], "host-a")
    first, forgotten = outbox.claim("me", 8, TTL)
    (kept,) = outbox.renew("me", [first], 60.0)
    assert (kept.epoch, kept.lane) == (first.epoch, first.lane)
    assert kept.until > first.until
    assert [claim.lane for claim in make().claim("you", 8, TTL)] == [forgotten.lane]
    with pytest.raises(ClaimLost):
        outbox.update(forgotten, row("op-2", forgotten.principal_id), row("op-2", forgotten.principal_id))


# -- looking and mending ---------------------------------------------------------------------------------------------


def test_ended_gives_what_nobody_delivers_and_what_is_not_there(outbox: SharedOutbox) -> None:
    rows = [row(f"op-{number}", f"customer-{number}") for number in range(4)]
    outbox.offer(rows, "host-a")
    claims = {claim.principal_id: claim for claim in outbox.claim("me", 8, TTL)}
    states = (PENDING, PENDING.sent(), PENDING.sent().booked(), PENDING.sent().quarantined())
    for one, state in zip(rows, states, strict=True):
        outbox.update(claims[one.principal_id], one, one.evolve(state=state, receipt='{"state": "x"}'))
    found = outbox.ended(["op-0", "op-1", "op-2", "op-3", "op-9"])
    assert {one.operation_id: one.state.settlement for one in found.rows} == {"op-2": "booked", "op-3": "quarantined"}
    assert all(one.receipt for one in found.rows)
    assert found.missing == ("op-9",)
    assert outbox.ended([]).missing == ()


def test_totals_and_lists_by_state(outbox: SharedOutbox) -> None:
    outbox.offer([row(), row("op-2", created_at=5.0, held=True), row("op-3", created_at=7.0, held=True)], "host-a")
    totals = {(one.settlement, one.held): (one.count, one.oldest_created_at) for one in outbox.totals()}
    assert totals == {("pending", False): (1, 1000.25), ("pending", True): (2, 5.0)}
    assert depths(outbox.totals()) == {"pending": (1, 1000.25), "held": (2, 5.0)}
    assert [one.operation_id for one in outbox.listed("pending", "sent")] == ["op-2", "op-3", "op-1"]
    assert [one.operation_id for one in outbox.listed("pending", limit=1)] == ["op-2"]
    assert outbox.listed("refused") == []


def test_an_operator_reopens_what_nobody_delivers(outbox: SharedOutbox, psql: Any) -> None:
    outbox.offer([row()], "host-a")
    (claim,) = outbox.claim("me", 8, TTL)
    refused = row(state=PENDING.sent().refused(), attempts=2)
    outbox.update(claim, row(), refused)
    pending = refused.evolve(state=PENDING, attempts=0)
    assert not outbox.reopen(refused, pending)  # its lane is being delivered
    outbox.release([claim])
    assert outbox.claim("me", 8, TTL) == []
    assert not outbox.reopen(row(attempts=1), pending)  # not as it was seen
    assert outbox.reopen(refused, pending)
    assert outbox.get("op-1") == pending
    assert not outbox.reopen(refused, pending)
    assert len(outbox.claim("me", 8, TTL)) == 1


def test_an_operator_reopens_a_row_whose_lane_was_pruned(outbox: SharedOutbox, psql: Any) -> None:
    refused = row(state=PENDING.sent().refused())
    outbox.offer([refused], "host-a")
    psql.execute("DELETE FROM vluna_llm_lanes")
    assert outbox.reopen(refused, row())
    assert len(outbox.claim("me", 8, TTL)) == 1


def test_what_is_done_is_pruned_after_a_day_and_nothing_else(outbox: SharedOutbox, psql: Any) -> None:
    states = {
        "op-0": PENDING.sent().booked(),
        "op-1": PENDING.sent().refused(),
        "op-2": PENDING.sent().quarantined(),
        "op-3": PENDING,
    }
    rows = {name: row(name, f"customer-{name}") for name in states}
    beside = row("op-9", "customer-op-9", state=PENDING.sent().booked())
    outbox.offer([*rows.values(), beside, row("op-8", "customer-op-9")], "host-a")
    claims = {claim.principal_id: claim for claim in outbox.claim("me", 8, TTL)}
    for name, state in states.items():
        outbox.update(claims[f"customer-{name}"], rows[name], rows[name].evolve(state=state))
    outbox.release(claims.values())
    assert outbox.prune() == 0
    psql.execute("UPDATE vluna_llm_operations SET updated_at = now() - interval '25 hours'")
    assert outbox.prune() == 2
    assert outbox.ended([*states, "op-9"]).missing == ("op-0", "op-9")
    lanes = {name for (name,) in psql.execute("SELECT principal_id FROM vluna_llm_lanes").fetchall()}
    assert lanes == {"customer-op-1", "customer-op-2", "customer-op-3", "customer-op-9"}
    assert {claim.principal_id for claim in outbox.claim("me", 8, TTL)} == {"customer-op-3", "customer-op-9"}
    assert outbox.prune() == 0


# -- the database ----------------------------------------------------------------------------------------------------


def test_ten_processes_start_at_once_on_an_empty_database(database: str, psql: Any) -> None:
    program = textwrap.dedent(
        f"""
        import sys, time
        from vluna_llm.outbox.postgres import SharedOutbox
        outbox = SharedOutbox({database!r}, "https://gate/mgt/v1", "realm")
        time.sleep(max(0.0, float(sys.argv[1]) - time.time()))
        outbox.totals()
        print(len(outbox.claim(sys.argv[1], 8, 30.0)))
        """
    )
    at = str(time.time() + 3.0)
    command = [sys.executable, "-c", program, at]
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(10)
    ]
    for process in started:
        assert process.communicate(timeout=60) == ("0\n", "")
    assert psql.execute("SELECT count(*) FROM vluna_llm_schema").fetchone() == (1,)


def test_a_database_of_an_older_version_gets_the_new_columns(make: Make, psql: Any) -> None:
    make().offer([row()], "host-a")
    psql.execute("ALTER TABLE vluna_llm_operations DROP COLUMN held, DROP COLUMN unsplit")
    psql.execute("ALTER TABLE vluna_llm_operations DROP COLUMN rest, DROP COLUMN parts, DROP COLUMN meters")
    psql.execute("UPDATE vluna_llm_schema SET version = 0")
    assert make().get("op-1") == row()


def test_a_host_of_the_first_version_that_is_connected_sends_what_is_left_as_it_was_composed(
    make: Make, psql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not know the columns, leaves them as they are, and finds the bytes. It may not connect again."""
    ungated = OperationState().ungated().started().completed(TokenUsage(10, 5), "provider").sent()
    left = row(state=ungated.partly_booked((MeterLine("m", 5),), (Part("c-1", 40),)), body=b"rest", path="/gate/ingest")
    old = make()
    old.ready()
    make().offer([left], "host-a")
    (readable_from,) = psql.execute("SELECT max(readable_from) FROM vluna_llm_schema").fetchone()
    assert readable_from == 2
    monkeypatch.setattr("vluna_llm.outbox.postgres_sql.SCHEMA_VERSION", 1)
    with pytest.raises(SharedAway, match="schema 2"):
        make().totals()
    monkeypatch.setattr("vluna_llm.outbox.postgres_sql.SCHEMA_VERSION", 2)
    assert make().get("op-1") is not None
    (claim,) = old.claim("old", 8, TTL)
    (found,) = old.rows_of([claim], 5)
    as_old = found.evolve(state=dataclasses.replace(found.state, rest=None, parts=()))
    assert (as_old.body, as_old.state.used_up, as_old.state.settlement) == (b"rest", 1, "pending")
    old.update(claim, as_old, as_old.evolve(state=as_old.state.sent()))
    again = make().get("op-1")
    assert again is not None
    assert (again.state.rest, again.state.parts) == ((MeterLine("m", 5),), (Part("c-1", 40),))


def test_a_database_of_a_newer_version_is_left_alone(make: Make, psql: Any) -> None:
    make().totals()
    psql.execute("INSERT INTO vluna_llm_schema VALUES (99, 1)")
    assert make().totals() == []  # it only added something
    psql.execute("INSERT INTO vluna_llm_schema VALUES (100, 100)")
    with pytest.raises(SharedAway, match="schema 100"):
        make().totals()


def test_a_role_that_may_not_create_tables_works_where_they_are(make: Make, database: str, psql: Any) -> None:
    make().totals()
    psql.execute("DROP ROLE IF EXISTS app_role")
    psql.execute("CREATE ROLE app_role LOGIN")
    psql.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO app_role")
    psql.execute("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO app_role")
    app = SharedOutbox(database.replace("//postgres:", "//app_role:"), GATE, REALM)
    app.offer([row()], "host-a")
    assert len(app.claim("me", 8, TTL)) == 1
    app.close()
    psql.execute("DROP OWNED BY app_role")
    psql.execute("DROP ROLE app_role")


def test_a_cut_connection_is_made_anew(outbox: SharedOutbox, psql: Any) -> None:
    outbox.offer([row()], "host-a")
    psql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'vluna-llm' "
        "AND datname = current_database()"
    )
    assert outbox.get("op-1") == row()


def test_a_server_that_is_silent_is_given_up(make: Make, psql: Any) -> None:
    outbox = make(patience=0.5)
    outbox.totals()
    started = time.monotonic()
    with psql.transaction():
        psql.execute("LOCK TABLE vluna_llm_operations")
        with pytest.raises(SharedAway):
            outbox.totals()
    assert time.monotonic() - started < 3
    assert outbox.totals() == []


def test_after_close_nothing_is_asked(outbox: SharedOutbox) -> None:
    outbox.totals()
    outbox.close()
    with pytest.raises(SharedAway):
        outbox.totals()


def test_a_password_that_the_server_repeats_is_taken_out(database: str) -> None:
    """The server names the role; here it is called as its password."""
    outbox = SharedOutbox(database.replace("//postgres:", "//s3cret:s3cret"), GATE, REALM)
    with pytest.raises(SharedAway, match=r'role "\*\*\*" does not exist'):
        outbox.totals()


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql://me:x@db.example.com:5432/app?sslmode=verify-full", "db.example.com:5432/app"),
        ("postgresql://me:x@one:5432,two:5433/app", "one:5432,two:5433/app"),
        ("postgresql://me:x@[::1]:5432/app", "[::1]:5432/app"),
        ("postgresql:///app?host=/run/postgresql", "a local socket/app"),
        ("postgresql://me:1/2@db/app", "a URL that cannot be read"),
    ],
)
def test_people_are_told_where_it_is(url: str, place: str) -> None:
    assert SharedOutbox(url, GATE, REALM).where == place


def test_the_password_never_shows(caplog: pytest.LogCaptureFixture) -> None:
    """Not in a repr, not in an error, not in its chain, for URLs good and bad."""
    secret = "s3cr%2Ft-p4ss"
    for url in (
        f"postgresql://me:{secret}@127.0.0.1:1/db",
        f"postgresql://127.0.0.1:1/db?user=me&password={secret}",
        f"postgresql://me:{secret}@127.0.0.1:port/db",
        f"postgresql://me:{secret}%zz@127.0.0.1:1/db",
        f"postgresql://me:{secret}@[::1/db",
        f"postgresql://127.0.0.1:1/db?passwd={secret}",
        "postgresql://me:12/s3cr@t-p4ss@127.0.0.1:1/db",
        "postgresql://me:s3cr/t-p4ss@127.0.0.1:1/db",
        "postgresql://me:s3cr#t-p4ss@127.0.0.1:1/db",
        "postgresql://me:s3cr?t-p4ss@127.0.0.1:1/db",
    ):
        outbox = SharedOutbox(url, GATE, REALM, patience=1.0)
        with pytest.raises((SharedAway, ConfigurationError)) as raised:
            outbox.totals()
        error: BaseException | None = raised.value
        shown = repr(outbox) + outbox.where + str(raised.value) + repr(raised.value)
        assert error is not None
        assert error.__suppress_context__
        assert "s3cr" not in shown, url
        assert "p4ss" not in shown, url
    assert "p4ss" not in caplog.text
