"""Owners that were only asleep, and clocks that jump: what is alive is never taken for dead, and nothing is stuck."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import USED, Program, begin, charged, eventually, files

from vluna_llm import Vluna
from vluna_llm.sandbox import Sandbox
from vluna_llm.settlement import LONGEST_WAIT

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

SLEEPER = """
vluna = Vluna()
moment = sys.argv[1]
in_flight = begin(vluna)
if moment == "sending":
    call(vluna)
say("ready")
while not os.path.exists("go"):
    time.sleep(0.01)
if moment == "flight":
    in_flight.finish(USED)
else:
    in_flight.fail()
say(vluna.flush(15))
"""


@posix
@pytest.mark.parametrize("moment", ["flight", "sending"])
def test_an_owner_that_was_stopped_is_not_taken_for_dead_and_books_once(
    gate: Sandbox, program: Program, heir: Callable[[], Vluna], moment: str
) -> None:
    """While it sleeps, in flight or with a settlement on the wire, others look for dead processes again and again."""
    if moment == "sending":
        gate.faults.add("latency", "commits", seconds=0.6)
    sleeper = program.start(SLEEPER, moment)
    assert sleeper.stdout.readline() == "ready\n"
    if moment == "sending":
        assert eventually(lambda: any(request.route == "commits" for request in gate.requests))
    sleeper.send_signal(signal.SIGSTOP)
    others = [heir() for _ in range(2)]
    for _ in range(3):
        for other in others:
            other._running()._adopt()
        time.sleep(0.1)
    assert all(other._running().ledger.journal.rows() == [] for other in others)
    assert charged(gate) == ([] if moment == "flight" else [120])
    (program.directory / "go").touch()
    sleeper.send_signal(signal.SIGCONT)
    assert program.ended(sleeper).stdout == "True\n"
    assert charged(gate) == [120]
    assert sorted(lease.state for lease in gate.leases("ann")) == (
        ["closed"] if moment == "flight" else ["canceled", "closed"]
    )
    assert all(other.close(5) for other in others)
    assert files(program.outbox) == []


@posix
@pytest.mark.slow
def test_an_owner_that_sleeps_longer_than_others_take_to_look_for_the_dead(
    gate: Sandbox, program: Program, heir: Callable[[], Vluna]
) -> None:
    """By themselves they look about every ten seconds."""
    sleeper = program.start(SLEEPER, "flight")
    assert sleeper.stdout.readline() == "ready\n"
    sleeper.send_signal(signal.SIGSTOP)
    other = heir()
    killed = program.start("vluna = Vluna()\ncall(vluna, 'dead')\nos.kill(os.getpid(), signal.SIGKILL)")
    assert killed.wait(20) == -signal.SIGKILL
    assert eventually(lambda: charged(gate, "dead") == [120], 20), "it has not looked"
    assert other._running().ledger.journal.rows("lost") == []
    (program.directory / "go").touch()
    sleeper.send_signal(signal.SIGCONT)
    assert program.ended(sleeper).stdout == "True\n"
    assert charged(gate) == [120]


@posix
def test_a_suspended_machine_wakes_up_with_dead_connections(gate: Sandbox, program: Program) -> None:
    """The gate has closed every connection meanwhile, and moved its clock on by an hour: leases are past their time."""
    sleeper = program.start(SLEEPER, "flight")
    assert sleeper.stdout.readline() == "ready\n"
    sleeper.send_signal(signal.SIGSTOP)
    gate.stop()
    gate.clock.advance(seconds=3600)
    gate.start()
    (program.directory / "go").touch()
    sleeper.send_signal(signal.SIGCONT)
    assert program.ended(sleeper).stdout == "True\n"
    assert charged(gate) == [120], "an expired lease is repaired by ingest, once"


# -- clocks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes the wall clock of this process jump; monotonic time goes on."""
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])

    def jump(seconds: float) -> None:
        offset[0] += seconds

    return jump


HOURS = 5 * 3600.0


@pytest.mark.parametrize("jump", [HOURS, -HOURS])
def test_a_clock_that_jumps_between_two_attempts_delays_nothing(
    gate: Sandbox, make_vluna: Callable[..., Vluna], outbox: Path, wall: Callable[[float], None], jump: float
) -> None:
    vluna = make_vluna(outbox=str(outbox))
    gate.faults.add("status", "commits", times=2, status=503)
    begin(vluna).finish(USED)
    assert eventually(lambda: any(request.route == "commits" for request in gate.requests))
    gate.clock.advance(seconds=jump)
    wall(jump)
    assert vluna.flush(10)
    assert charged(gate) == [120]


@pytest.mark.parametrize("jump", [HOURS, -HOURS])
def test_a_clock_that_jumps_while_a_call_is_in_flight_changes_nothing(
    gate: Sandbox, make_vluna: Callable[..., Vluna], outbox: Path, wall: Callable[[float], None], jump: float
) -> None:
    vluna = make_vluna(outbox=str(outbox))
    operation = begin(vluna)
    wall(jump)
    gate.clock.advance(seconds=jump)
    operation.finish(USED)
    assert vluna.flush(10)
    assert [entry.quantity for entry in gate.booked("ann").entries if entry.charged_xusd] == [120]
    assert vluna.close(10)
    assert files(outbox) == []


def test_a_time_far_ahead_in_the_journal_is_not_waited_for(
    gate: Sandbox, program: Program, make_vluna: Callable[..., Vluna], wall: Callable[[float], None]
) -> None:
    """The next attempt was planned by a clock that was a day ahead: nobody waits longer for it than `LONGEST_WAIT`."""
    gate.faults.add("status", "commits", times=None, status=503)
    wall(86_400.0)
    gate.clock.advance(seconds=86_400.0)
    ahead = make_vluna(outbox=str(program.outbox))
    begin(ahead).finish(USED)
    assert eventually(lambda: any(request.route == "commits" for request in gate.requests))
    ahead.close(0.2)
    assert charged(gate) == []
    wall(-86_400.0)
    gate.clock.advance(seconds=-86_400.0)
    gate.faults.clear()
    vluna = make_vluna(outbox=str(program.outbox))
    settler = vluna._running().settler
    assert settler.keeper.flush(10)
    (row,) = vluna._running().ledger.journal.rows("pending", "sent")
    assert row.next_attempt_at > time.time() + 80_000
    due = settler._backlog.next_due()
    assert due is not None
    assert due - time.monotonic() <= LONGEST_WAIT


def test_the_deadline_of_a_flush_is_not_moved_by_the_wall_clock(
    gate: Sandbox, make_vluna: Callable[..., Vluna], wall: Callable[[float], None]
) -> None:
    gate.faults.add("hang", "commits", times=None)
    vluna = make_vluna()
    begin(vluna).finish(USED)
    threading.Timer(0.2, lambda: wall(-HOURS)).start()
    started = time.monotonic()
    assert not vluna.flush(0.8)
    assert 0.7 < time.monotonic() - started < 2
