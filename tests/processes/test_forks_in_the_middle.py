"""Forks at bad moments: while other threads are inside our locks, inside SQLite, or waiting for the gate."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import Program, charged, eventually, files, starts_threads_at_the_end

from vluna_llm import Vluna
from vluna_llm.outbox import Journal, forks
from vluna_llm.sandbox import Sandbox

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

CHILD = """
def child(act, seconds=20):
    '''Fork, run act in the child and end it by os._exit; gives its exit code, negative where it hung.'''
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        code = 1
        try:
            code = act() or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def test_children_forked_while_threads_use_everything_can_do_all_of_it_at_once(gate: Sandbox, program: Program) -> None:
    """Six threads call, settle and give up without a pause; every child makes a call of its own and delivers it."""
    done = program.run(
        CHILD
        + """
vluna = Vluna()
stop = False
made = [0] * 6

def work(n):
    while not stop:
        operation = begin(vluna, f"parent_{n}")
        if made[n] % 3:
            operation.finish(USED)
        else:
            operation.fail()
        made[n] += 1

def first_call():
    call(vluna, "children")
    return 0 if vluna.flush(15) else 2

threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(6)]
for thread in threads:
    thread.start()
codes = []
for _ in range(8):
    time.sleep(0.02)
    codes.append(ended(child(first_call)))
stop = True
for thread in threads:
    thread.join()
assert vluna.flush(30)
say(codes)
say([n - (n + 2) // 3 for n in made])
""",
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    codes, of_parent = map(eval, done.stdout.splitlines())
    assert codes == [0] * 8
    assert charged(gate, "children") == [120] * 8
    assert [len(charged(gate, f"parent_{n}")) for n in range(6)] == of_parent
    assert "internal_error" not in done.stderr


@pytest.mark.slow
def test_no_child_of_hundreds_hangs_in_sqlite(tmp_path: Path) -> None:
    """Threads write, read beside the writers and open files of their own; each child opens a journal of its own.

    Where nobody waits for them to come out of SQLite, three children in a hundred hang for ever.
    """
    journal, stop = Journal(tmp_path), False

    def write(name: int) -> None:
        count = 0
        while not stop:
            count += 1
            row = a_row(f"{name}-{count}")
            journal.insert(row)
            journal.update(row, row.evolve(attempts=1))
            if count % 100 == 0:
                journal.checkpoint()
                journal.prune(time.time())

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    hung = []
    try:
        for n in range(120):
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(5)
                Journal(tmp_path).insert(a_row("child"))
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if code:
                hung.append((n, code))
    finally:
        stop = True
        for thread in threads:
            thread.join()
        journal.close()
    assert hung == []


def a_row(operation_id: str):  # type: ignore[no-untyped-def]
    from vluna_llm.outbox import Row

    return Row(operation_id, "http://127.0.0.1:9/mgt/v1", "realm", 1, "ann", "ann", "f", time.time(), "k", "s")


def test_a_fork_waits_until_nobody_is_inside_sqlite_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "PATIENCE", 0.5)
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with forks.inside():
            entered.set()
            leave.wait(20)

    for opens, least, most in ((0.2, 0.2, 0.45), (5.0, 0.5, 1.5)):
        entered.clear()
        leave.clear()
        thread = threading.Thread(target=stay)
        thread.start()
        entered.wait()
        threading.Timer(opens, leave.set).start()
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            forked = time.monotonic()
            with forks.inside():  # nobody is inside any more, as far as the child is concerned
                os._exit(0 if time.monotonic() - forked < 0.3 else 1)
        took = time.monotonic() - started
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        leave.set()
        thread.join()
        assert least <= took < most


def test_nobody_goes_inside_sqlite_while_a_fork_is_about_to_happen() -> None:
    entered = threading.Event()

    def enter() -> None:
        with forks.inside():
            entered.set()

    thread = threading.Thread(target=enter)
    forks._before()
    try:
        thread.start()
        assert not entered.wait(0.2)
    finally:
        forks._after_in_parent()
    assert entered.wait(5)
    thread.join()


def test_two_threads_that_fork_at_once_do_not_wait_for_each_other_for_ever(vluna: Vluna) -> None:
    vluna._running()
    codes: list[int] = []

    def fork() -> None:
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                os._exit(7)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    threads = [threading.Thread(target=fork) for _ in range(3)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert codes == [7] * 30
    assert time.monotonic() - started < 10
    assert forks._door.inside == 0
    assert not forks._door.shut
    with forks.inside():
        pass


def test_what_the_parent_was_sending_at_the_fork_is_sent_by_the_parent_alone(gate: Sandbox, program: Program) -> None:
    """The child has the parent's rows, its notes and its answers in memory, and touches none of them."""
    gate.faults.add("latency", "commits", times=None, seconds=0.2)
    done = program.run(
        CHILD
        + """
vluna = Vluna()
open_in_parent = [begin(vluna) for _ in range(3)]
for _ in range(3):
    call(vluna)
time.sleep(0.1)  # the first is being sent

def end_what_is_not_mine():
    before = left()
    open_in_parent[0].finish(USED)
    open_in_parent[1].fail()
    open_in_parent[2].abandon(lambda: USED)
    assert vluna.flush(5) and left() == before, "the child made a journal without a call of its own"
    call(vluna, "child")
    assert vluna.flush(10)
    os.kill(os.getppid(), 0)

pid = child(end_what_is_not_mine)
for operation in open_in_parent:
    operation.finish(USED)
say(ended(pid), vluna.flush(20))
"""
    )
    assert (done.stdout.strip(), done.stderr) == ("0 True", "")
    assert charged(gate, "child") == [120]
    assert charged(gate) == [120] * 6
    assert "cancel" not in {request.route for request in gate.requests}
    commits = [request for request in gate.requests if request.route == "commits"]
    assert len(commits) == 7, "something was sent twice"


def test_a_child_that_exits_by_itself_leaves_its_parents_journal_alone(gate: Sandbox, program: Program) -> None:
    """Its interpreter ends in the usual way and throws all away, the inherited connection to SQLite included."""
    gate.faults.add("hang", "commits", times=None)
    running = program.start(
        """
        vluna = Vluna()
        for _ in range(50):
            call(vluna)
        for _ in range(4):
            if os.fork() == 0:
                call(vluna, "child") if _ % 2 else None
                if _ % 2:
                    vluna.close(0.1)
                del vluna
                sys.exit(0)
        codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(4)]
        for _ in range(50):
            call(vluna)
        say(codes)
        time.sleep(30)
        """
    )
    assert running.stdout.readline() == "[0, 0, 0, 0]\n"
    (path,) = (p for p in program.outbox.glob(f"journal-{running.pid}-*.sqlite3"))
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT count(*) FROM operations").fetchone() == (100,)
    db.close()
    gate.faults.clear()
    assert eventually(lambda: len(charged(gate)) == 100, 30)
    running.terminate()


def test_children_of_children_pay_for_themselves(gate: Sandbox, program: Program) -> None:
    done = program.run(
        CHILD
        + """
vluna = Vluna()
call(vluna, "0")

def descend(depth):
    call(vluna, str(depth))
    code = ended(child(lambda: descend(depth + 1))) if depth < 3 else 0
    return code or (0 if vluna.flush(10) else 2)

say(ended(child(lambda: descend(1))), vluna.flush(10))
"""
    )
    assert (done.stdout.strip(), done.stderr) == ("0 True", "")
    assert [charged(gate, str(depth)) for depth in range(4)] == [[120]] * 4


def test_forks_from_a_pool_of_threads(gate: Sandbox, program: Program) -> None:
    """Each child's only thread is the one that forked, with the context of its call and without those of the others."""
    done = program.run(
        CHILD
        + """
import concurrent.futures
vluna = Vluna()

def work(n):
    call(vluna, f"thread_{n}")
    with call_context(principal_id=f"context_{n}"):
        def act():
            operation = vluna.begin(CALL)
            operation.finish(USED)
            return 0 if vluna.flush(15) else 2
        return ended(child(act))

with concurrent.futures.ThreadPoolExecutor(4) as pool:
    say(sorted(pool.map(work, range(8))))
""",
        timeout=90,
    )
    assert done.stdout.strip() == str([0] * 8), done.stderr
    assert [charged(gate, f"thread_{n}") for n in range(8)] == [[120]] * 8
    assert [charged(gate, f"context_{n}") for n in range(8)] == [[120]] * 8


@starts_threads_at_the_end
def test_what_a_child_left_by_os_exit_is_paid_by_its_parent_at_exit(gate: Sandbox, program: Program) -> None:
    """As a queue's work horse does it: a fork for each job, ended by ``os._exit`` as soon as the job is done."""
    gate.faults.add("latency", "meters", times=None, seconds=0.3)
    done = program.run(
        CHILD
        + """
vluna = Vluna()
say([ended(child(lambda: call(vluna) and 0)) for _ in range(3)])
say(len(left()) > 0)
"""
    )
    assert done.stdout.split("\n")[:2] == ["[0, 0, 0]", "True"]
    assert charged(gate) == [120] * 3
    assert files(program.outbox) == []


# -- connections -----------------------------------------------------------------------------------------------------


class _Connections:
    """Stands before the gate and notes on which connection which process spoke."""

    def __init__(self, gate: Sandbox) -> None:
        self.heard: list[tuple[int, str]] = []
        self._gate = gate
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            number += 1
            host, port = self._gate.base_url.split("/")[2].split(":")
            far = socket.create_connection((host, int(port)))
            threading.Thread(target=self._pump, args=(near, far, number), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, None), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, number: int | None) -> None:
        try:
            while data := source.recv(65536):
                if number is not None:
                    for line in data.decode("latin-1").split("\r\n"):
                        if line.lower().startswith("x-principal-id:"):
                            self.heard.append((number, line.partition(":")[2].strip()))
                target.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, target):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def connections(gate: Sandbox) -> Iterator[_Connections]:
    between = _Connections(gate)
    yield between
    between.close()


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_no_connection_to_the_gate_is_shared_with_a_child(
    gate: Sandbox, program: Program, connections: _Connections, colour: str
) -> None:
    """Parent and child speak over the same time, with the parent's connections open and idle at the fork."""
    done = program.run(
        CHILD
        + """
colour = sys.argv[1]
vluna = Vluna()

async def abegin(principal):
    with call_context(principal_id=principal):
        return await vluna.abegin(CALL)

def some(principal, loop=None):
    for _ in range(5):
        if colour == "sync":
            operation = begin(vluna, principal)
        else:
            operation = (loop or asyncio.new_event_loop()).run_until_complete(abegin(principal))
        operation.finish(USED)
    return 0 if vluna.flush(15) else 2

loop = asyncio.new_event_loop()
some("parent", loop)
pids = [child(lambda n=n: some(f"child_{n}")) for n in range(2)]
some("parent", loop)
say([ended(pid) for pid in pids])
loop.close()
""",
        colour,
        VLUNA_SERVICE_BASE_URL=f"http://127.0.0.1:{connections.port}/mgt/v1",
    )
    assert done.stdout.strip() == "[0, 0]", done.stderr
    assert [len(charged(gate, who)) for who in ("parent", "child_0", "child_1")] == [10, 5, 5]
    speakers: dict[int, set[str]] = {}
    for number, who in connections.heard:
        speakers.setdefault(number, set()).add(who)
    assert {who for them in speakers.values() for who in them} == {"parent", "child_0", "child_1"}
    assert all(len(them) == 1 for them in speakers.values()), speakers


# -- the SDK ---------------------------------------------------------------------------------------------------------


def test_a_child_uses_its_parents_wrapped_client_at_once(
    gate: Sandbox, program: Program, heir: Callable[[], Vluna]
) -> None:
    """The client was used in the parent before, and is in use by another of its threads at the fork."""
    pytest.importorskip("openai", reason="the OpenAI SDK is not installed")
    from provider import Provider

    with Provider() as provider:
        provider.behaviour = "slow"
        done = program.run(
            CHILD
            + """
import openai
vluna = Vluna()
client = vluna.wrap(openai.OpenAI(base_url=sys.argv[1], api_key="sk-test", max_retries=0))

def ask(principal):
    with call_context(principal_id=principal):
        stream = client.chat.completions.create(model="gpt-4o-mini", messages=[], stream=True)
        return sum(1 for _ in stream)

def of_child():
    assert ask("child") > 10
    return 0 if vluna.flush(10) else 2

ask("parent")
thread = threading.Thread(target=ask, args=("parent",))
thread.start()
time.sleep(0.1)
pid = child(of_child)
thread.join()
say(ended(pid), vluna.flush(10))
""",
            provider.base_url,
        )
        assert done.stdout.strip() == "0 True", done.stderr
        assert charged(gate, "parent") == [120, 120]
        assert charged(gate, "child") == [120]
        assert len(provider.posts()) == 3
