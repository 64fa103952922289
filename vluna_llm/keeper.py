"""The thread that does what no caller may wait for: the notes of finalizers, and chores that come round.

It is a daemon and owns nothing that the journal lacks. Where no thread can be started (the interpreter is ending), what
it would have done is done by `Keeper.flush`, or by the next process.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .ledger import LedgerClosed
from .telemetry import Telemetry

Note = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _InTurn:
    """A note that is not done before those that came before it, nor in the middle of a chore."""

    act: Note

    def __call__(self) -> None:
        self.act()


@dataclass(slots=True)
class _Chore:
    name: str
    act: Note
    every: float | None
    due: float


class Keeper:
    """Runs notes at once and chores when they are due, one after another.

    Args:
        notes: shared with the runtimes before and after: a note outlives the runtime in which it was taken.
        telemetry: where a failure is told; no chore keeps the others from running.
    """

    def __init__(self, notes: queue.SimpleQueue[Note], telemetry: Telemetry) -> None:
        self._notes = notes
        self._telemetry = telemetry
        self._thread: threading.Thread | None = None
        self._chores: list[_Chore] = []
        self._put_off: deque[_InTurn] = deque()
        self._guard = threading.RLock()
        self._stopping = False

    @property
    def lock(self) -> object:
        """The lock of the keeper's own critical sections (`vluna_llm.reentry`)."""
        return self._guard

    def start(self) -> bool:
        """Start the thread; False where there can be none."""
        with self._guard:
            if self._thread is None and not self._stopping:
                self._thread = started(self._run, "vluna-llm-keeper")
            return self._thread is not None

    def note(self, act: Note) -> None:
        """Run ``act`` soon. Safe in a finalizer, in any thread, inside any lock: it only queues."""
        self._notes.put(act)

    def in_turn(self, act: Note) -> None:
        """Run ``act``, which may take its time, when everything before it is done."""
        self._notes.put(_InTurn(act))

    def catch_up(self) -> None:
        """Do the notes that wait: what a finalizer knows of a call's usage is nowhere else until then.

        Called between the steps of whatever takes its time on this keeper's thread; elsewhere it does nothing.
        """
        if threading.current_thread() is self._thread:
            for _ in range(self._notes.qsize()):
                self._do_next(self._put_off.append)

    def give_up(self) -> None:
        """Do the notes that the thread has not come to: it was stopped, and may be busy with something long."""
        for _ in range(self._notes.qsize()):
            self._do_next(lambda act: None)

    def _do_next(self, other: Callable[[_InTurn], None]) -> None:
        with contextlib.suppress(queue.Empty):
            act = self._notes.get_nowait()
            if isinstance(act, _InTurn):
                other(act)
            else:
                self._do("note", act)

    def every(self, seconds: float, name: str, act: Note) -> None:
        """Run ``act`` every so many seconds, first after that time."""
        with self._guard:
            self._chores.append(_Chore(name, act, seconds, time.monotonic() + seconds))
        self._notes.put(nothing)

    def once(self, seconds: float, name: str, act: Note) -> None:
        """Run ``act`` once, after ``seconds``."""
        with self._guard:
            self._chores.append(_Chore(name, act, None, time.monotonic() + seconds))
        self._notes.put(nothing)

    def flush(self, timeout: float | None) -> bool:
        """Wait at most ``timeout`` seconds until all notes that were taken before are done."""
        if not self.start():
            with contextlib.suppress(queue.Empty):
                while True:
                    self._do("note", self._notes.get_nowait())
            return True
        noted = threading.Event()
        self.in_turn(noted.set)
        return noted.wait(timeout)

    def stop(self) -> threading.Thread | None:
        """End the thread after the note at hand; gives it, to be joined."""
        with self._guard:
            self._stopping = True
        self._notes.put(nothing)
        return self._thread

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            try:
                act = self._put_off.popleft() if self._put_off else self._notes.get(timeout=self._until_next())
            except queue.Empty:
                pass
            else:
                self._do("note", act)
            while not self._stopping and (chore := self._due()) is not None:
                self._do(chore.name, chore.act)

    def _until_next(self) -> float | None:
        with self._guard:
            due = min((chore.due for chore in self._chores), default=None)
        return None if due is None else max(0.0, due - time.monotonic())

    def _due(self) -> _Chore | None:
        now = time.monotonic()
        with self._guard:
            for chore in self._chores:
                if chore.due <= now:
                    if chore.every is None:
                        self._chores.remove(chore)
                    else:
                        chore.due = now + chore.every
                    return chore
        return None

    def _do(self, name: str, act: Note) -> None:
        try:
            act()
        except LedgerClosed:
            pass  # what it was about is in the journal, for the next runtime
        except Exception:
            self._telemetry.internal_error(f"keeper.{name}")


def started(target: Callable[[], None], name: str) -> threading.Thread | None:
    """A daemon thread; None where there can be no more of them, or the interpreter is ending.

    What it would have done is in the journal, and is tried again with the next settlement or by the next process.
    """
    if sys.is_finalizing():
        return None  # up to Python 3.11 the start would wait for ever
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def nothing() -> None:
    """Wakes the thread."""
