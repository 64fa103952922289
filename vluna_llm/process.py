"""What one `Vluna` has in this process: its runtime, its gate clients and the notes that finalizers leave.

A forked child gets all of it anew and touches nothing of its parent's; a process that goes on after ``close`` gets a
new runtime, which first takes over what the one before left in its journal.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .gate.client import GateClient
from .gate.client_async import AsyncGateClient
from .gate.credentials import GateCredentials
from .ledger import LedgerClosed
from .reentry import held
from .runtime import Runtime
from .settings import Settings
from .telemetry import Telemetry
from .usage.estimate import Estimator
from .usage.features import FeatureMap

T = TypeVar("T")

EXIT_SECONDS = 5.0
_WRITE_ATTEMPTS = 5

_made: weakref.WeakSet[Process] = weakref.WeakSet()
_running: set[Process] = set()
"""Everything that has to be closed at interpreter exit, also where nobody holds the `Vluna` any more: an application
that made it in a function has to pay all the same."""


class Process:
    """Makes and keeps the runtime. Every method may be called from any thread."""

    def __init__(self, settings: Settings, telemetry: Telemetry, estimator: Estimator, features: FeatureMap) -> None:
        self._settings = settings
        self._telemetry = telemetry
        self._estimator = estimator
        self._features = features
        self._pid = os.getpid()
        self._guard = threading.RLock()
        self._runtime: Runtime | None = None
        self._left: Path | None = None
        self._left_to_parent: list[Runtime] = []
        self._notes: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gate: GateClient | None = None
        self._async_gate: AsyncGateClient | None = None
        _made.add(self)

    # -- the gate --------------------------------------------------------------------------------------------------

    def credentials(self) -> GateCredentials:
        """The settings of the gate; raises `ConfigurationError` where one is missing or wrong."""
        base_url, realm_id, key_id, secret = self._settings.require_credentials()
        return GateCredentials(base_url, realm_id, key_id, secret, allow_plaintext=self._settings.allow_plaintext)

    @property
    def gate(self) -> GateClient:
        """The gate client for threads."""
        with self._guard:
            if self._gate is None:
                self._gate = GateClient(self.credentials())
            return self._gate

    @property
    def async_gate(self) -> AsyncGateClient:
        """The gate client for event loops."""
        with self._guard:
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
        runtime = self._runtime
        if runtime is not None and not runtime.closed and self._pid == os.getpid():
            return runtime
        with self._guard:
            runtime = self._runtime
            if runtime is None or runtime.closed:
                runtime = self._runtime = Runtime(
                    self._settings,
                    self.gate,
                    self.async_gate,
                    self._estimator,
                    self._telemetry,
                    self._features.names,
                    notes=self._notes,
                    predecessor=self._left,
                )
                self._left = None
                _running.add(self)
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
        self._notes.put(act)
        _running.add(self)

    @property
    def entered(self) -> bool:
        """Whether this thread is inside one of our critical sections: then only `later` may be called."""
        runtime = self._runtime
        return held(self._guard) or (runtime is not None and runtime.entered())

    def internal_error(self, where: str) -> None:
        """An exception of ours is being handled: logged and counted."""
        self._telemetry.internal_error(where)

    def flush(self, timeout: float | None) -> bool:
        """Deliver what is pending; False where something is left after ``timeout`` seconds."""
        runtime = self._runtime
        if runtime is None and not self._notes.empty():
            runtime = self.running()
        return runtime is None or runtime.flush(timeout)

    def close(self, timeout: float) -> bool:
        """Deliver for at most ``timeout`` seconds, then stop; what is left waits in the journal."""
        runtime = self._runtime
        if runtime is None and not self._notes.empty():
            runtime = self.running()
        if runtime is None:
            return True
        done = runtime.stop(timeout)
        with self._guard:
            if self._runtime is runtime:
                self._left = runtime.close()
                self._runtime = None
                _running.discard(self)
                if self._gate is not None:
                    self._gate.close()
        return done

    def after_fork(self) -> None:
        """In a forked child: nothing of the parent's is used again, and its lock is not held for it."""
        self._pid = os.getpid()
        self._guard = threading.RLock()
        self._notes = queue.SimpleQueue()
        self._left = None
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            # Kept for ever: closing its database here would free the parent's record locks.
            self._left_to_parent.append(runtime)
            runtime.left_to_parent()


@atexit.register
def _close_all() -> None:
    for process in list(_running):
        with contextlib.suppress(Exception):
            process.close(EXIT_SECONDS)


def _forked() -> None:
    _running.clear()
    for process in list(_made):
        process.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
