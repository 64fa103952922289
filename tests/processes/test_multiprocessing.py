"""Children of ``multiprocessing`` end by ``os._exit``, where ``atexit`` never runs: what they owe is paid anyway."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable

import pytest
from programs import Program, charged, eventually, files, starts_threads_at_the_end

from vluna_llm import Vluna
from vluna_llm.sandbox import Sandbox

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="children that are forked, or killed by a signal")

WORKERS = """
import concurrent.futures, multiprocessing
vluna = Vluna()

def work(n):
    call(vluna)
    return n

if __name__ == "__main__":
    how, with_what, *gone = sys.argv[1:]
    context = multiprocessing.get_context(how)
    if with_what == "process":
        children = [context.Process(target=work, args=(n,)) for n in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        say([child.exitcode for child in children])
    elif with_what == "pool":
        pool = context.Pool(2, maxtasksperchild=1)
        say(pool.map(work, range(2), chunksize=1))
        pool.close()
        pool.join()
    elif with_what == "executor":
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            say(list(pool.map(work, range(2))))
    if gone:
        os._exit(0)
    say(left())
"""


@pytest.mark.parametrize(
    ("how", "with_what"),
    [
        ("fork", "process"),
        ("fork", "pool"),
        ("fork", "executor"),
        ("forkserver", "process"),
        pytest.param("forkserver", "pool", marks=pytest.mark.slow),
        pytest.param("forkserver", "executor", marks=pytest.mark.slow),
        pytest.param("spawn", "process", marks=pytest.mark.slow),
        pytest.param("spawn", "executor", marks=pytest.mark.slow),
    ],
)
def test_a_child_that_has_done_its_work_has_paid(gate: Sandbox, program: Program, how: str, with_what: str) -> None:
    """However it was started; the gate is slow, so that nothing is paid in passing."""
    gate.faults.add("latency", "commits", times=None, seconds=0.3)
    ended = program.run(WORKERS, how, with_what)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[-1] == "[]", "it was the parent that paid"
    assert charged(gate) == [120, 120]


def test_the_results_of_a_child_are_not_kept_waiting_for_the_gate(gate: Sandbox, program: Program) -> None:
    gate.faults.add("latency", "commits", times=None, seconds=1.2)
    ended = program.run(
        """
        import multiprocessing
        vluna = Vluna()

        def work(queue):
            call(vluna)
            queue.put("x" * 1_000_000)

        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=work, args=(queue,))
        child.start()
        started = time.monotonic()
        queue.get()
        waited = time.monotonic() - started
        child.join()
        say(waited < 1.0, child.exitcode)
        """
    )
    assert ended.stdout.split() == ["True", "0"], ended.stderr
    assert charged(gate) == [120]


def test_threads_of_a_child_that_work_on_after_its_main_function_have_paid(gate: Sandbox, program: Program) -> None:
    """Threads that are no daemons and a pool of threads that nobody shut down: the child waits for them at its end."""
    gate.faults.add("latency", "commits", times=None, seconds=0.2)
    ended = program.run(
        """
        import concurrent.futures, multiprocessing
        vluna = Vluna()

        def slowly():
            operation = begin(vluna)
            time.sleep(0.9)
            operation.finish(USED)

        def work():
            call(vluna)
            threading.Thread(target=slowly).start()
            pool = concurrent.futures.ThreadPoolExecutor(1)
            pool.submit(slowly)

        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join()
        say(child.exitcode, left())
        """
    )
    assert (ended.stdout, ended.stderr) == ("0 []\n", "")
    assert charged(gate) == [120] * 3


@pytest.mark.slow
def test_a_child_whose_gate_hangs_ends_within_seconds_and_loses_nothing(
    gate: Sandbox, program: Program, heir: Callable[[], Vluna]
) -> None:
    gate.faults.add("hang", "commits", times=None)
    started = time.monotonic()
    ended = program.run(WORKERS, "fork", "process", "and nobody delivers for them")
    assert time.monotonic() - started < 9
    assert (ended.returncode, ended.stdout) == (0, "[0, 0]\n")
    assert "not delivered yet" in ended.stderr
    assert charged(gate) == []
    gate.faults.clear()
    heir()
    assert charged(gate) == [120, 120]


def test_a_child_that_fails_has_paid_for_what_it_used(gate: Sandbox, program: Program) -> None:
    gate.faults.add("latency", "commits", times=None, seconds=0.3)
    ended = program.run(
        """
        import multiprocessing
        vluna = Vluna()

        def work(how):
            call(vluna)
            raise SystemExit(3) if how == "exit" else ValueError("wrong")

        context = multiprocessing.get_context("fork")
        children = [context.Process(target=work, args=(how,)) for how in ("exit", "error")]
        for child in children:
            child.start()
        for child in children:
            child.join()
        say([child.exitcode for child in children], left())
        """
    )
    assert ended.stdout == "[3, 1] []\n"
    assert charged(gate) == [120, 120]


def test_a_stream_that_a_child_leaves_open_is_given_back(gate: Sandbox, program: Program) -> None:
    """As at the exit of a program: the lease of an answer that nobody will read to its end is cancelled, not lost."""
    ended = program.run(
        """
        import multiprocessing, httpx
        from vluna_llm.tap import tap
        vluna = Vluna()

        class Body(httpx.SyncByteStream):
            def __iter__(self):
                while True:
                    yield b'data: {"choices": [{"index": 0, "delta": {"content": "word"}}]}\\n\\n'

        def work():
            global kept
            asked = httpx.Request("POST", "http://127.0.0.1/v1/chat/completions")
            response = httpx.Response(200, request=asked, headers={"content-type": "text/event-stream"}, stream=Body())
            tap(response, begin(vluna), url="/v1/chat/completions", hide_usage_chunk=False, report=say, is_async=False)
            kept = response.iter_raw()
            next(kept)

        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join()
        say(child.exitcode, left())
        """
    )
    assert (ended.stdout, ended.stderr) == ("0 []\n", "")
    assert [lease.state for lease in gate.leases("ann")] == ["canceled"]


TERMINATED = """
import multiprocessing
vluna = Vluna()

def work(n):
    call(vluna)
    return n

if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        pool.map(work, range(4), chunksize=1)
        say(sum(name.endswith(".sqlite3") for name in left()))
"""


@starts_threads_at_the_end
@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_what_a_terminated_pool_left_is_delivered_by_its_parent_at_exit(
    gate: Sandbox, program: Program, how: str
) -> None:
    """``with Pool()`` ends its workers by SIGTERM as soon as their results are in; the parent made no call itself."""
    gate.faults.add("latency", "meters", times=None, seconds=0.4)
    ended = program.run(TERMINATED, how)
    assert ended.returncode == 0
    assert int(ended.stdout) >= 1
    assert charged(gate) == [120] * 4
    assert files(program.outbox) == []


def test_what_terminated_children_left_is_delivered_by_a_living_process_of_the_same_outbox(
    gate: Sandbox, program: Program, heir: Callable[[], Vluna]
) -> None:
    gate.faults.add("hang", "commits", times=None)
    living = heir()
    terminated = program.start(
        """
        vluna = Vluna()
        for _ in range(3):
            call(vluna)
        say("ready")
        time.sleep(60)
        """
    )
    assert terminated.stdout.readline() == "ready\n"
    terminated.terminate()
    assert terminated.wait(10) == -signal.SIGTERM
    assert charged(gate) == []
    gate.faults.clear()
    living._running()._adopt()  # what it does by itself every ten seconds
    assert eventually(lambda: charged(gate) == [120] * 3)


def test_a_child_without_a_call_costs_nothing(gate: Sandbox, program: Program) -> None:
    ended = program.run(
        """
        import multiprocessing
        vluna = Vluna()
        call(vluna)
        vluna.flush(10)

        def work():
            return threading.active_count()

        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join()
        say(child.exitcode, sum(name.endswith(".sqlite3") for name in left()))
        """
    )
    assert ended.stdout.split() == ["0", "1"]
    assert charged(gate) == [120]
    assert files(program.outbox) == []
