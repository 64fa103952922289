"""The ways out of a process: how long they take, what is said on them, and that nothing is lost or doubled."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable

import pytest
from programs import Program, charged, eventually, files, starts_threads_at_the_end

from vluna_llm import Vluna
from vluna_llm.sandbox import Sandbox

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


@starts_threads_at_the_end
def test_threads_that_go_on_after_the_main_thread_have_paid(gate: Sandbox, program: Program) -> None:
    gate.faults.add("latency", "commits", times=None, seconds=0.1)
    ended = program.run(
        """
        vluna = Vluna()

        def work(n):
            for _ in range(3):
                call(vluna, f"customer_{n}")
                time.sleep(0.05)

        for n in range(4):
            threading.Thread(target=work, args=(n,)).start()
        """
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert charged(gate, None) == [120] * 12
    assert files(program.outbox) == []


@pytest.mark.parametrize("milliseconds", [0, 7])
def test_an_exit_in_the_middle_of_the_work_of_daemon_threads_is_silent_and_loses_nothing(
    gate: Sandbox, program: Program, heir: Callable[[], Vluna], milliseconds: int
) -> None:
    """Each thread says when a call has ended; what was said is charged, by this process or the next."""
    ended = program.run(
        """
        vluna = Vluna()
        told = os.open("told", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

        def work(n):
            while True:
                call(vluna, f"customer_{n % 3}")
                os.write(told, b"x")
                time.sleep(0.1)

        for n in range(12):
            threading.Thread(target=work, args=(n,), daemon=True).start()
        time.sleep(0.3 + int(sys.argv[1]) / 1000)
        """,
        str(milliseconds),
    )
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr
    assert "rror" not in ended.stderr
    heir()
    said = (program.directory / "told").stat().st_size
    assert said > 12
    # Each of the threads may have been stopped between its call and its word.
    assert said <= len(charged(gate, None)) <= said + 12
    assert {entry.quantity for entry in gate.booked().entries} == {120}


@pytest.mark.slow
def test_many_instances_whose_gate_hangs_hold_up_the_exit_no_longer_than_one(
    gate: Sandbox, program: Program, heir: Callable[[], Vluna]
) -> None:
    gate.faults.add("hang", "commits", times=None)
    started = time.monotonic()
    ended = program.run("kept = [Vluna() for _ in range(5)]\nfor vluna in kept:\n    call(vluna)")
    assert ended.returncode == 0
    assert time.monotonic() - started < 9
    gate.faults.clear()
    heir()
    assert charged(gate) == [120] * 5


@pytest.mark.slow
def test_an_instance_whose_gate_is_away_costs_another_nothing(gate: Sandbox, program: Program) -> None:
    """While the exit waits for the one, the other delivers too."""
    gate.faults.add("latency", "commits", times=None, seconds=0.3)
    ended = program.run(
        """
        away = Vluna(base_url="http://127.0.0.1:9/mgt/v1", outbox=os.environ["VLUNA_LLM_OUTBOX"] + "-of-another")
        call(away)
        call(Vluna())
        """
    )
    assert ended.returncode == 0
    assert charged(gate) == [120]


@pytest.mark.parametrize("how", ["cancelled", "stopped", "closed"])
def test_an_event_loop_that_is_torn_down_in_the_middle(gate: Sandbox, program: Program, how: str) -> None:
    """Calls that had begun when their loop went: none is doubled, and the exit neither hangs nor complains."""
    ended = program.run(
        """
        vluna, admitted = Vluna(), []

        async def one(n):
            with call_context(principal_id="ann"):
                operation = await vluna.abegin(CALL)
            admitted.append(operation)
            try:
                await asyncio.sleep(0.02 * n)
            except BaseException:
                operation.fail()
                raise
            operation.finish(USED)

        async def main():
            tasks = [asyncio.ensure_future(one(n)) for n in range(30)]
            while len(admitted) < 30:
                await asyncio.sleep(0.01)
            return tasks

        how = sys.argv[1]
        if how == "cancelled":
            asyncio.run(main())
        else:
            loop = asyncio.new_event_loop()
            kept = loop.run_until_complete(main())
            if how == "closed":
                import logging
                logging.getLogger("asyncio").disabled = True  # it tells of tasks that nobody awaited, as it should
                loop.close()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2) if how == "closed" else None
        """,
        how,
    )
    assert ended.returncode == 0
    assert "vluna" not in ended.stderr
    states = [lease.state for lease in gate.leases("ann")]
    assert len(states) == 30
    assert len(charged(gate)) == states.count("closed") > 0
    if how == "cancelled":
        assert states.count("active") == 0
        assert files(program.outbox) == []


@posix
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGTERM handled", "os._exit", "SIGKILL"])
def test_what_ended_is_charged_however_the_process_ends(
    gate: Sandbox, program: Program, heir: Callable[[], Vluna], how: str
) -> None:
    """Ctrl-C and a handler that raises SystemExit go through the exit; the others leave it to the next process."""
    gate.faults.add("latency", "commits", times=None, seconds=0.3)
    running = program.start(
        """
        how = sys.argv[1]
        if how == "SIGTERM handled":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        vluna = Vluna()
        call(vluna)
        begin(vluna)
        say("ready")
        if how == "os._exit":
            os._exit(0)
        time.sleep(30)
        """,
        how,
    )
    assert running.stdout.readline() == "ready\n"
    if how != "os._exit":
        running.send_signal(getattr(signal, how.split()[0]))
    ended = program.ended(running)
    delivers = how in ("SIGINT", "SIGTERM handled")
    assert charged(gate) == ([120] if delivers else [])
    assert ended.returncode == (0 if how in ("SIGTERM handled", "os._exit") else -getattr(signal, how.split()[0]))
    vluna = heir()
    assert charged(gate) == [120]
    # The call that was in flight: nobody knows its usage, so it is charged nothing and listed.
    assert len(vluna._running().ledger.journal.rows("lost")) == 1


@starts_threads_at_the_end
def test_an_open_answer_at_exit_is_given_back_at_once(gate: Sandbox, program: Program) -> None:
    """No thread may have been needed before, and some Pythons start none while they end."""
    started = time.monotonic()
    ended = program.run(
        """
        import weakref
        import vluna_llm.tap
        vluna = Vluna()
        operation = begin(vluna)

        class Open:
            class _watch:
                forgotten = staticmethod(lambda: operation.abandon(lambda: Ending("abandoned")))

        kept = Open()
        vluna_llm.tap.note_open(kept)
        """
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [lease.state for lease in gate.leases("ann")] == ["canceled"]
    assert time.monotonic() - started < 4


@posix
def test_a_process_that_adopts_while_it_ends_says_nothing_and_loses_nothing(
    gate: Sandbox, program: Program, heir: Callable[[], Vluna]
) -> None:
    """A big backlog of a process that was killed, and one after another that hardly live: all is charged in the end."""
    gate.faults.add("hang", "meters", times=None)
    killed = program.run(
        """
        vluna = Vluna()
        for n in range(150):
            call(vluna, f"customer_{n % 7}")
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert killed.returncode == -signal.SIGKILL
    gate.faults.clear()
    for wait in (0, 0.02):
        ended = program.run(
            "vluna = Vluna()\nvluna._running()\ntime.sleep(float(sys.argv[1]))\nvluna.close(0.0)", str(wait)
        )
        assert ended.returncode == 0
        assert "Traceback" not in ended.stderr
        assert "cannot be taken over" not in ended.stderr
    vluna = heir()
    assert eventually(lambda: vluna.flush(1) and len(charged(gate, None)) == 150, 30)
    assert charged(gate, None) == [120] * 150
