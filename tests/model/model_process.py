"""Many processes in one thread: each has the package's own `Vluna`, journal and settler, and may die at any write.

What is simulated is the operating system and nothing else: clocks, threads (there are none; the settler's loops are run
step by step), the death of a process (its files are closed as the kernel would: an open transaction is gone, its locks
are free, nothing that it still holds in memory can write or send any more) and the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sqlite3
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from model_gate import AsyncWire, Network, Wire, pause

import vluna_llm.outbox.lock
import vluna_llm.process
import vluna_llm.runtime
import vluna_llm.settler
from vluna_llm import Vluna, failpoints
from vluna_llm.failpoints import Crash
from vluna_llm.gate.client import GateClient
from vluna_llm.gate.client_async import AsyncGateClient

START = 1_800_000_000.0


class Clock:
    """Stands in for the module ``time``: a wall clock that jumps and a monotonic one that does not."""

    def __init__(self) -> None:
        self.wall = START
        self.steady = 1_000.0

    def time(self) -> float:
        self.wall += 1e-6
        return self.wall

    def time_ns(self) -> int:
        return int(self.time() * 1e9)

    def monotonic(self) -> float:
        self.steady += 1e-6
        return self.steady

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds

    def jump(self, seconds: float) -> None:
        """Somebody set the wall clock."""
        self.wall += seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class Kernel:
    """What the operating system does for the simulated processes; one is running at a time, others within it."""

    def __init__(self) -> None:
        self.running: list[SimProcess] = []
        self.boundaries = 0

    def boundary(self, name: str) -> None:
        """Two things that the outside can see are just being done, one after the other: here one may die."""
        self.boundaries += 1
        if self.running:
            self.running[-1].boundary(name)

    @property
    def current(self) -> SimProcess | None:
        """Who is running."""
        return self.running[-1] if self.running else None


_WRITES = ("INSERT", "UPDATE", "DELETE", "COMMIT", "BEGIN", "ROLLBACK", "CREATE", "ALTER", "DROP", "REPLACE")


class _Connection(sqlite3.Connection):
    """A database connection of the process that opened it: closed when that dies, and every write is a boundary."""

    owner: SimProcess | None = None
    kernel: Kernel

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        self._alive()
        writes = sql.lstrip().upper().startswith(_WRITES)
        if writes and self.owner is not None:
            self.kernel.boundary(f"before {sql[:40]}")
        cursor = super().execute(sql, *args)
        if writes and self.owner is not None:
            self.kernel.boundary(f"after {sql[:40]}")
        return cursor

    def executemany(self, sql: str, *args: Any) -> sqlite3.Cursor:
        self._alive()
        if self.owner is not None:
            self.kernel.boundary(f"before {sql[:40]}")
        cursor = super().executemany(sql, *args)
        if self.owner is not None:
            self.kernel.boundary(f"after {sql[:40]}")
        return cursor

    def _alive(self) -> None:
        if self.owner is not None and self.owner.dead:
            raise Crash(self.owner.name)


def _in_transaction(connection: sqlite3.Connection) -> bool:
    try:
        return connection.in_transaction
    except sqlite3.ProgrammingError:  # it was closed
        return False


class _Shim:
    """A module with some of its functions replaced."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Idle(Exception):
    """The settler would wait now."""


class _NoWaiting:
    """A condition on which nobody can wait, since nobody else runs."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock

    def __enter__(self) -> Any:
        return self._lock.__enter__()

    def __exit__(self, *args: Any) -> Any:
        return self._lock.__exit__(*args)

    def wait(self, timeout: float | None = None) -> bool:
        raise _Idle

    def notify(self, n: int = 1) -> None:
        return None

    notify_all = notify


class SteppedSettler(vluna_llm.settler.Settler):
    """The settler whose loops are run by hand, one settlement at a time."""

    _allowed = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._changed = _NoWaiting(self._guard)  # type: ignore[assignment]
        self._drained = _NoWaiting(self._guard)  # type: ignore[assignment]

    def step(self, deliveries: int = 1) -> int:
        """Do what a worker would, for at most so many settlements that are due; how many were done."""
        mine, self._this_thread = self._this_thread, threading.local()
        before, self._allowed = self._allowed, deliveries
        idle = self._idle
        try:
            self._work()
        except _Idle:
            pass
        finally:
            left, self._allowed = self._allowed, before
            self._this_thread, self._idle = mine, idle
        return deliveries - left

    def _next(self) -> Any:
        if self._allowed <= 0:
            raise _Idle
        found = super()._next()
        self._allowed -= 1
        return found

    def chores(self) -> None:
        """Do what the keeper's thread would do now."""
        self.keeper.flush(0)
        for _ in range(20):
            chore = self.keeper._due()
            if chore is None:
                return
            self.keeper._do(chore.name, chore.act)

    def flush(self, timeout: float | None) -> bool:
        self.keeper.flush(0)
        for _ in range(50):
            if not self.step(10):
                break
        return not len(self._backlog) and not self._backlog.more


@contextlib.contextmanager
def simulated(kernel: Kernel, clock: Clock, seed: int = 0) -> Iterator[None]:
    """Put the simulated clocks, ids and files under the package; put the real ones back."""
    with contextlib.ExitStack() as undo:
        dice = random.Random(seed)

        def replace(where: Any, name: str, value: Any) -> None:
            undo.callback(setattr, where, name, getattr(where, name))
            setattr(where, name, value)

        def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            owner = kernel.current
            if owner is not None and owner.dead:
                raise Crash(owner.name)
            made: Any = sqlite3.connect(*args, **{**kwargs, "factory": _Connection})
            made.kernel = kernel
            if owner is not None and str(args[0]) != ":memory:":
                made.owner = owner
                owner.connections.append(made)
            return made

        def opened(path: Any, *args: Any, **kwargs: Any) -> int:
            owner = kernel.current
            if owner is not None and owner.dead:
                raise Crash(owner.name)
            fd = os.open(path, *args, **kwargs)
            if owner is not None:
                owner.files.add(fd)
            return fd

        def closed(fd: int) -> None:
            owner = kernel.current
            if owner is not None:
                if owner.dead:
                    raise Crash(owner.name)
                owner.files.discard(fd)
            os.close(fd)

        def unlinked(path: Any, *args: Any, **kwargs: Any) -> None:
            kernel.boundary(f"before unlink {os.path.splitext(str(path))[1]}")
            owner = kernel.current
            if owner is not None and owner.dead:
                raise Crash(owner.name)
            os.unlink(path, *args, **kwargs)
            kernel.boundary("after unlink")

        async def anyio_sleep(seconds: float) -> None:
            clock.sleep(seconds)
            await pause("sleeping")

        def started(target: Callable[[], None], name: str) -> None:
            return None

        files = _Shim(os, open=opened, close=closed, unlink=unlinked)
        for name, module in list(sys.modules.items()):
            if not name.startswith("vluna_llm.") or name.startswith(("vluna_llm.sandbox", "vluna_llm.cli")):
                continue
            if getattr(module, "time", None) is time:
                replace(module, "time", clock)
            if name.startswith("vluna_llm.outbox"):
                if getattr(module, "sqlite3", None) is sqlite3:
                    replace(module, "sqlite3", _Shim(sqlite3, connect=connect))
                if getattr(module, "os", None) is os:
                    replace(module, "os", files)
            if hasattr(module, "started") and name in ("vluna_llm.keeper", "vluna_llm.settler"):
                replace(module, "started", started)
        replace(sys.modules["vluna_llm.gate.client_async"], "anyio", types.SimpleNamespace(sleep=anyio_sleep))
        replace(vluna_llm.runtime, "Settler", SteppedSettler)
        replace(uuid, "uuid4", lambda: uuid.UUID(int=dice.getrandbits(128), version=4))
        failpoints.arm(kernel.boundary)
        undo.callback(failpoints.arm, None)
        yield


class SimProcess:
    """One process of the product.

    ``act`` runs something in it, which may kill it at the n-th boundary from there.
    """

    def __init__(self, kernel: Kernel, network: Network, directory: Path, name: str, **settings: Any) -> None:
        self.kernel = kernel
        self.name = name
        self.dead = False
        self.asleep = False
        self.connections: list[Any] = []
        self.files: set[int] = set()
        self.countdowns: list[int | None] = []
        self.died_at: str | None = None
        gate = network.gate.sandbox
        self.vluna = Vluna(
            base_url="http://127.0.0.1:9/mgt/v1",
            realm_id=gate.realm_id,
            key_id=gate.key_id,
            key_secret=gate.key_secret,
            outbox=str(directory),
            **settings,
        )
        process = self.vluna._process
        self._credentials = process.credentials()
        self._wire = _Guarded(self, Wire(network, name))
        process._gate = GateClient(self._credentials)
        process._gate._transport = self._wire
        process._async_gate = AsyncGateClient(self._credentials)
        process._async_gate._transport = _GuardedAsync(self, AsyncWire(network, name))
        self.breaker_off()

    def breaker_off(self) -> None:
        """Calls are not kept from asking the gate because earlier ones got no answer; a hundred of them is enough."""
        self.vluna._admissions._breaker._threshold = 100

    # -- running and dying -----------------------------------------------------------------------------------------

    def act(self, what: Callable[[], Any], crash_at: int | None = None) -> tuple[bool, Any]:
        """Run ``what`` in this process; False where the process died in it."""
        if self.dead:
            return False, None
        self.kernel.running.append(self)
        self.countdowns.append(crash_at)
        try:
            return True, what()
        except Crash:
            if not self.dead:
                raise
            return False, None
        finally:
            self.countdowns.pop()
            self.kernel.running.pop()

    def boundary(self, name: str) -> None:
        """Called at each boundary while this process runs."""
        if self.dead:
            raise Crash(self.name)
        if self.countdowns and self.countdowns[-1] is not None:
            self.countdowns[-1] -= 1
            if self.countdowns[-1] < 0:
                self.die(name)
                raise Crash(name)

    def die(self, where: str = "killed") -> None:
        """The process is gone: what it had open is closed, uncommitted transactions never were."""
        if self.dead:
            return
        self.dead, self.died_at = True, where
        process = self.vluna._process
        # Nothing of it is done at the exit of the process that runs the tests.
        vluna_llm.process._made.discard(process)
        vluna_llm.process._alive.discard(process._life)
        process._finalizer.detach()
        for connection in self.connections:
            with contextlib.suppress(sqlite3.Error):
                sqlite3.Connection.rollback(connection)
            with contextlib.suppress(sqlite3.Error):
                sqlite3.Connection.close(connection)
        self.connections.clear()
        # The operating system closes its locks, and so they are nobody's to close: a forked child of the tests would
        # close what has the same number by then.
        held = vluna_llm.outbox.lock._taking.held
        for lock in [each for each in held if each._fd in self.files]:
            held.discard(lock)
            lock._fd = None
        for fd in self.files:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.files.clear()

    @property
    def runs(self) -> bool:
        """Whether it does anything at all at present."""
        return not self.dead and not self.asleep

    @property
    def busy(self) -> bool:
        """Whether it is within a critical section or a transaction, where its other threads would have to wait."""
        return self.vluna._process.entered or any(map(_in_transaction, self.connections))

    # -- its background threads ------------------------------------------------------------------------------------

    @property
    def settler(self) -> SteppedSettler:
        """Its settler; a runtime is started where there is none."""
        settler: Any = self.vluna._process.running().settler
        return settler

    def deliver(self, deliveries: int = 1) -> None:
        """Its workers deliver what is due."""
        self.settler.step(deliveries)

    def chores(self) -> None:
        """Its keeper takes notes and does what comes round (adoption among it)."""
        self.settler.chores()

    def adopt(self) -> None:
        """It looks for what dead processes left behind, now."""
        self.settler.keeper.flush(0)
        self.vluna._process.running()._adopt()


class _Guarded:
    def __init__(self, process: SimProcess, wire: Wire) -> None:
        self._process, self._wire = process, wire

    def exchange(self, request: Any, patience: Any) -> Any:
        self._process.boundary("before sending")
        answer = self._wire.exchange(request, patience)
        self._process.boundary("before the answer is read")
        return answer

    def close(self) -> None:
        return None


class _GuardedAsync:
    def __init__(self, process: SimProcess, wire: AsyncWire) -> None:
        self._process, self._wire = process, wire

    async def exchange(self, request: Any, patience: Any) -> Any:
        self._process.boundary("before sending")
        answer = await self._wire.exchange(request, patience)
        self._process.boundary("before the answer is read")
        return answer

    async def aclose(self) -> None:
        return None


class Waiting:
    """A coroutine of a process that is suspended at an await."""

    def __init__(self, process: SimProcess, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.process = process
        self._coroutine = coroutine
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.died = False

    def step(self, crash_at: int | None = None, *, cancel: bool = False) -> None:
        """Let it run to its next await, or throw the loop's cancellation into it."""
        alive, _ = self.process.act(lambda: self._step(cancel), crash_at)
        if not alive:
            self.died = self.done = True

    def _step(self, cancel: bool) -> None:
        try:
            if cancel:
                self._coroutine.throw(asyncio.CancelledError())
            else:
                self._coroutine.send(None)
        except StopIteration as ended:
            self.done, self.result = True, ended.value
        except Crash:
            raise
        except BaseException as error:
            self.done, self.error = True, error

    def abandon(self) -> None:
        """Its process is gone: nothing of it runs any more."""
        self.process.kernel.running.append(self.process)
        self.process.countdowns.append(None)
        try:
            with contextlib.suppress(BaseException):
                self._coroutine.close()
        finally:
            self.process.countdowns.pop()
            self.process.kernel.running.pop()
            self.done = True
