"""What one `Vluna` has in this process: its runtime, its gate clients and the notes that finalizers leave.

A forked child gets all of it anew and touches nothing of its parent's; a process that goes on after ``close`` gets a
new runtime, which first takes over what the one before left in its journal. What nobody can use any more is closed as
soon as it has delivered, so that an instance for every request piles up neither threads nor files.

How a process may end, and who delivers then:

============================================ =========================================================================
it ends                                      what it still owes
============================================ =========================================================================
by itself, or by an exception                is delivered at exit, for at most 5 seconds in all; the rest stays on disk
as a child of ``multiprocessing``            the same, after its results have gone to the parent
by SIGTERM (``Pool.terminate``), SIGKILL,    stays on disk; a process that runs with the same outbox takes it over, as
or ``os._exit``                              does the next one that starts, and a parent of such children at its exit
============================================ =========================================================================
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from .gate.client import GateClient
from .gate.client_async import AsyncGateClient
from .gate.credentials import GateCredentials
from .keeper import started
from .ledger import LedgerClosed
from .outbox.reading import journals_below
from .reentry import held
from .runtime import PATIENCE, Runtime
from .settings import Settings
from .tap import forget_open
from .telemetry import Telemetry
from .usage.estimate import Estimator
from .usage.features import FeatureMap

T = TypeVar("T")

EXIT_SECONDS = 5.0
"""Seconds that all of a process's instances together deliver at its exit."""
_WRITE_ATTEMPTS = 5
_AFTER_RESULTS = -50
"""Among the finalizers of ``multiprocessing``: after those (-5) that send a child's results to its parent."""


class _Life:
    """What a `Process` has running. It outlives the `Process` itself until it has delivered."""

    def __init__(self, process: Process) -> None:
        self.process = weakref.ref(process)
        self.guard = threading.RLock()
        self.runtime: Runtime | None = None
        self.left: Path | None = None
        self.notes: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def forgotten(self) -> None:
        """Nobody can use the `Process` any more. In a finalizer: it only queues."""
        if self.runtime is not None:
            self.notes.put(partial(_retirement.add, self))

    def close(self, timeout: float, patience: float = PATIENCE) -> bool:
        """Deliver for at most ``timeout`` seconds, then stop; what is left waits in the journal."""
        runtime = self.runtime
        if runtime is None:
            return True
        done = runtime.stop(timeout, patience)
        with self.guard:
            if self.runtime is runtime:
                self.left = runtime.close()
                self.runtime = None
                _alive.discard(self)
                runtime.gate.close()
        return done

    def may_close(self) -> bool:
        """Whether all is delivered, or will be by another instance that runs on the same directory."""
        runtime = self.runtime
        if runtime is None or not runtime.settler.outstanding:
            return True
        here = runtime.ledger.journal.directory
        return here is not None and any(
            other is not self and (process := other.process()) is not None and process.delivers_for(here, runtime)
            for other in list(_alive)
        )


class _Retirement:
    """One thread, while there is anything to do, that closes what is not used any more."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._lives: list[_Life] = []
        self._runs = False

    def add(self, life: _Life) -> None:
        """Close it when it has delivered. Called where a thread may be started: by the keeper of its notes."""
        with self._guard:
            self._lives.append(life)
            if self._runs:
                return
            self._runs = True
        if started(self._run, "vluna-llm-retirement") is None:
            self._runs = False  # it is closed at exit, or when the next one comes

    def _run(self) -> None:
        pause = 0.02
        while True:
            with self._guard:
                lives = list(self._lives)
                if not lives:
                    self._runs = False
                    return
            ready = [life for life in lives if life.may_close()]
            for life in ready:
                with contextlib.suppress(Exception):
                    life.close(0.0)
            with self._guard:
                self._lives = [life for life in self._lives if life not in ready]
            pause = 0.02 if ready else min(2 * pause, 2.0)
            time.sleep(pause)


_made: weakref.WeakSet[Process] = weakref.WeakSet()
_alive: set[_Life] = set()
"""Everything that has to be closed at interpreter exit, also where nobody holds the `Vluna` any more: an application
that made it in a function has to pay all the same."""
_left_to_parents: list[_Life] = []
"""Kept for ever in a forked child: its parent's database is not its own to close."""
_retirement = _Retirement()
_forks = False
_ends_with_multiprocessing = 0


class Process:
    """Makes and keeps the runtime. Every method may be called from any thread."""

    def __init__(self, settings: Settings, telemetry: Telemetry, estimator: Estimator, features: FeatureMap) -> None:
        self._settings = settings
        self._telemetry = telemetry
        self._estimator = estimator
        self._features = features
        self._gate: GateClient | None = None
        self._async_gate: AsyncGateClient | None = None
        self.tell_back: Callable[[], None] = _nobody
        """Called when a settlement finds the gate back: calls need not wait until they find out themselves."""
        self._begin()
        _made.add(self)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._life = _Life(self)
        self._finalizer = weakref.finalize(self, self._life.forgotten)
        self._finalizer.atexit = False

    # -- the gate --------------------------------------------------------------------------------------------------

    def credentials(self) -> GateCredentials:
        """The settings of the gate; raises `ConfigurationError` where one is missing or wrong."""
        base_url, realm_id, key_id, secret = self._settings.require_credentials()
        return GateCredentials(base_url, realm_id, key_id, secret, allow_plaintext=self._settings.allow_plaintext)

    @property
    def gate(self) -> GateClient:
        """The gate client for threads."""
        with self._life.guard:
            if self._gate is None:
                self._gate = GateClient(self.credentials())
            return self._gate

    @property
    def async_gate(self) -> AsyncGateClient:
        """The gate client for event loops."""
        with self._life.guard:
            if self._async_gate is None:
                self._async_gate = AsyncGateClient(self.credentials())
            return self._async_gate

    async def aclose_gate(self) -> None:
        """Close the connections of the running loop."""
        if self._async_gate is not None:
            await self._async_gate.aclose()

    # -- the runtime -----------------------------------------------------------------------------------------------

    def running(self) -> Runtime:
        """The runtime of this process: a forked child gets its own, and so does an instance that was closed."""
        life = self._life
        runtime = life.runtime
        if runtime is not None and not runtime.closed and self._pid == os.getpid():
            return runtime
        with life.guard:
            runtime = life.runtime
            if runtime is None or runtime.closed:
                runtime = life.runtime = Runtime(
                    self._settings,
                    self.gate,
                    self.async_gate,
                    self._estimator,
                    self._telemetry,
                    self._features.names,
                    notes=life.notes,
                    predecessor=life.left,
                    tell_back=self.tell_back,
                )
                life.left = None
                _alive.add(life)
                _end_with_multiprocessing()
            return runtime

    def write(self, act: Callable[[Runtime], T]) -> T:
        """Run ``act`` on the runtime, and again on the next one where that was closed in between."""
        for _ in range(_WRITE_ATTEMPTS):
            try:
                return act(self.running())
            except LedgerClosed:
                continue
        return act(self.running())

    def later(self, act: Callable[[], None]) -> None:
        """Run ``act`` soon, on another thread. Safe in a finalizer, in any thread, inside any lock: it only queues."""
        life = self._life
        life.notes.put(act)
        _alive.add(life)

    @property
    def entered(self) -> bool:
        """Whether this thread is inside one of our critical sections: then only `later` may be called."""
        runtime = self._life.runtime
        return held(self._life.guard) or (runtime is not None and runtime.entered())

    def gate_is_back(self) -> None:
        """A call found the gate back: settlements need not wait until they find out themselves."""
        runtime = self._life.runtime
        if runtime is not None:
            runtime.settler.gate_is_back()

    def internal_error(self, where: str) -> None:
        """An exception of ours is being handled: logged and counted."""
        self._telemetry.internal_error(where)

    def flush(self, timeout: float | None) -> bool:
        """Deliver what is pending; False where something is left after ``timeout`` seconds."""
        self._run_for_notes()
        runtime = self._life.runtime
        return runtime is None or runtime.flush(timeout)

    def close(self, timeout: float, patience: float = PATIENCE) -> bool:
        """Deliver for at most ``timeout`` seconds, then stop; what is left waits in the journal."""
        self._run_for_notes()
        return self._life.close(timeout, patience)

    def _run_for_notes(self) -> None:
        """A note may have been taken after ``close``: somebody has to act on it."""
        if self._life.runtime is None and not self._life.notes.empty():
            self.running()

    # -- other processes -------------------------------------------------------------------------------------------

    def delivers_for(self, directory: Path, runtime: Runtime) -> bool:
        """Whether this instance will take over what that runtime leaves in its directory."""
        mine, here, there = self._life.runtime, self._settings, runtime.settings
        return (
            mine is not None
            and not mine.closed
            and mine.ledger.journal.directory == directory
            and (here.base_url, here.realm_id) == (there.base_url, there.realm_id)
        )

    def take_over_from_children(self) -> None:
        """At exit: look once more for what children left that were killed or that ended by ``os._exit``."""
        runtime = self._life.runtime
        if runtime is not None:
            runtime.settler.keeper.in_turn(runtime._adopt)
            return
        settings = self._settings
        if settings.mode == "off" or settings.missing_credentials():
            return
        directory = settings.outbox_directory()
        if directory is not None and journals_below(directory):
            self.running()

    def after_fork(self) -> None:
        """In a forked child: nothing of the parent's is used again, and its lock is not held for it."""
        life = self._life
        self._finalizer.detach()
        self._begin()
        if life.runtime is not None:
            _left_to_parents.append(life)
            life.runtime.left_to_parent()


def _nobody() -> None:
    """Nobody wants to know."""


# -- the end of the process ------------------------------------------------------------------------------------------


@atexit.register
def _close_all() -> None:
    """Deliver for a few seconds in all: while one instance is waited for, the others deliver too."""
    forget_open()
    if _forks or _spawned():
        for process in list(_made):
            with contextlib.suppress(Exception):
                process.take_over_from_children()
    deadline = time.monotonic() + EXIT_SECONDS
    for life in list(_alive):
        left = deadline - time.monotonic()
        # Threads that do not come are waited for once, however many instances have some.
        patience = min(PATIENCE, max(0.0, left + PATIENCE))
        with contextlib.suppress(Exception):
            process_of = life.process()
            if process_of is not None:
                process_of.close(max(0.0, left), patience)
            else:
                life.close(max(0.0, left), patience)


def _spawned() -> bool:
    """Whether ``multiprocessing`` started a process in another way than by a fork."""
    return any(f"multiprocessing.popen_{how}" in sys.modules for how in ("spawn_posix", "spawn_win32", "forkserver"))


def _end_with_multiprocessing() -> None:
    """See to it that a child of ``multiprocessing`` delivers: it ends by ``os._exit``, and ``atexit`` never runs."""
    global _ends_with_multiprocessing
    process, util = sys.modules.get("multiprocessing.process"), sys.modules.get("multiprocessing.util")
    if process is None or util is None or process.parent_process() is None:
        return
    if _ends_with_multiprocessing != os.getpid():
        _ends_with_multiprocessing = os.getpid()
        util.Finalize(None, _child_ends, exitpriority=_AFTER_RESULTS)


def _child_ends() -> None:
    """A child has done its work. Up to Python 3.12 its other threads are waited for only after this."""
    if not _other_threads():
        _close_all()
        return
    try:
        threading.Thread(target=_close_after_threads, name="vluna-llm-exit", daemon=False).start()
    except RuntimeError:
        _close_all()


def _other_threads() -> list[threading.Thread]:
    mine = (threading.current_thread(), threading.main_thread())
    return [thread for thread in threading.enumerate() if not thread.daemon and thread not in mine]


def _close_after_threads() -> None:
    while others := _other_threads():
        for thread in others:
            thread.join()
    _close_all()


# -- forks -----------------------------------------------------------------------------------------------------------


def _forked_a_child() -> None:
    global _forks
    _forks = True


def _forked() -> None:
    global _forks, _retirement
    _forks = False
    _retirement = _Retirement()
    _alive.clear()
    for process in list(_made):
        process.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=_forked_a_child, after_in_child=_forked)
