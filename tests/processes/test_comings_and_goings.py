"""Threads, event loops and instances that come and go: nothing piles up, and what they leave is paid."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import CALL, USED, begin, charged, eventually, files

from vluna_llm import Vluna, call_context
from vluna_llm.process import _alive
from vluna_llm.sandbox import Sandbox


def ours() -> list[str]:
    """Our threads that live."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vluna-llm-")]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def a_request(make: Callable[[], Vluna], customer: str = "ann") -> None:
    """What an application does that makes an instance for every request and holds none."""
    begin(make(), customer).finish(USED)


@pytest.fixture
def fresh(gate: Sandbox, tmp_path: Path) -> Callable[[], Vluna]:
    """Makes instances that nobody but the test holds."""

    def make(outbox: str = str(tmp_path / "outbox")) -> Vluna:
        return Vluna(
            base_url=gate.base_url,
            realm_id=gate.realm_id,
            key_id=gate.key_id,
            key_secret=gate.key_secret,
            outbox=outbox,
        )

    return make


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_an_instance_for_every_request_piles_up_nothing(
    gate: Sandbox, fresh: Callable[..., Vluna], tmp_path: Path, where: str
) -> None:
    """Threads, descriptors and files go as soon as an instance that nobody holds has delivered."""
    make = (lambda: fresh("memory")) if where == "memory" else fresh
    a_request(make)
    assert eventually(lambda: not _alive, 10)
    before = descriptors() if sys.platform == "linux" else 0
    most = 0
    for _ in range(25):
        a_request(make)
        most = max(most, len(ours()))
    assert eventually(lambda: not _alive and not ours(), 10), ours()
    assert charged(gate) == [120] * 26
    assert most < 25, "as many threads as instances"
    assert files(tmp_path / "outbox") == []
    if sys.platform == "linux":
        gc.collect()
        assert eventually(lambda: descriptors() <= before + 12), descriptors()


def test_an_instance_that_is_still_held_by_a_call_is_not_closed_under_it(
    gate: Sandbox, fresh: Callable[..., Vluna], tmp_path: Path
) -> None:
    """The stream outlives the client, the instance and everything else of the request."""
    operation = begin(fresh())
    gc.collect()
    time.sleep(0.3)
    assert len(_alive) == 1
    operation.finish(USED)
    del operation
    assert eventually(lambda: not _alive, 10)
    assert charged(gate) == [120]
    assert files(tmp_path / "outbox") == []


def test_forgotten_instances_whose_gate_is_away_gather_in_one_that_lives(
    gate: Sandbox, fresh: Callable[..., Vluna], tmp_path: Path
) -> None:
    """The gate is away for as long as fifteen requests: their settlements wait in few hands, and none is lost."""
    gate.faults.add("drop_before", "commits", times=None)
    for _ in range(15):
        a_request(fresh)
    assert charged(gate) == []
    living = fresh()
    living._running()
    assert eventually(lambda: len(_alive) == 1, 20), [life.process() for life in _alive]
    gate.faults.clear()
    living._running()._adopt()
    assert eventually(lambda: len(charged(gate)) == 15, 20)
    assert living.close(10)
    assert charged(gate) == [120] * 15
    assert files(tmp_path / "outbox") == []


def test_a_forgotten_instance_whose_gate_is_away_goes_on_where_no_other_would(
    gate: Sandbox, fresh: Callable[..., Vluna]
) -> None:
    gate.faults.add("drop_before", "commits", times=None)
    a_request(lambda: fresh("memory"))
    a_request(lambda: fresh())
    gc.collect()
    time.sleep(0.5)
    assert len(_alive) == 2
    gate.faults.clear()
    assert eventually(lambda: len(charged(gate)) == 2 and not _alive, 30)


def test_many_threads_that_die_leave_nothing_of_theirs(vluna: Vluna, gate: Sandbox) -> None:
    begin(vluna).finish(USED)
    assert vluna.flush(10)

    def work(n: int) -> None:
        for _ in range(10):
            operation = begin(vluna, f"customer_{n}")
            if n % 2:
                operation.finish(USED)
            else:
                operation.fail()

    for _ in range(4):
        threads = [threading.Thread(target=work, args=(n,)) for n in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert vluna.flush(30)
    assert len(charged(gate, None)) == 1 + 200
    assert len(ours()) <= 1 + 8
    assert vluna._running().settler.outstanding == 0


def test_many_event_loops_one_after_another(vluna: Vluna, gate: Sandbox) -> None:
    """Each ``asyncio.run`` has connections of its own; those of loops that are gone are not used, and not kept."""

    async def main(n: int) -> None:
        with call_context(principal_id="ann") as scope:
            operations = [await vluna.abegin(CALL) for _ in range(2)]
            for operation in operations:
                assert operation is not None
                operation.finish(USED)
            if n % 5 == 0:
                assert await scope.wait_async(10)

    for n in range(30):
        asyncio.run(main(n))
    assert vluna.flush(10)
    assert charged(gate) == [120] * 60
    transport = vluna.async_gate._transport
    assert len(transport._pools) <= 2  # type: ignore[attr-defined]


def test_event_loops_in_many_threads_at_once(vluna: Vluna, gate: Sandbox) -> None:
    failed: list[BaseException] = []

    async def main(n: int) -> None:
        with call_context(principal_id=f"customer_{n}"):
            operations = await asyncio.gather(*(vluna.abegin(CALL) for _ in range(5)))
        for operation in operations:
            assert operation is not None
            operation.finish(USED)

    def run(n: int) -> None:
        try:
            for _ in range(3):
                asyncio.run(main(n))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    assert vluna.flush(20)
    assert [len(charged(gate, f"customer_{n}")) for n in range(6)] == [15] * 6


def test_a_loop_that_is_closed_while_its_calls_are_being_admitted(vluna: Vluna, gate: Sandbox) -> None:
    """The loop goes while the gate is being asked: the lease that comes is nobody's and is given back or lapses."""
    gate.faults.add("latency", "authorize", times=None, seconds=0.3)

    async def main() -> None:
        with call_context(principal_id="ann"):
            tasks = [asyncio.ensure_future(vluna.abegin(CALL)) for _ in range(10)]
            await asyncio.sleep(0.1)
        assert not any(task.done() for task in tasks)

    asyncio.run(main())
    gate.faults.clear()
    assert vluna.flush(10)
    begin(vluna).finish(USED)
    assert vluna.flush(10)
    assert charged(gate) == [120]
    rows = vluna._running().ledger.journal.rows("none", "pending", "sent")
    assert rows == [], "somebody would have to look at them"
