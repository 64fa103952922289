"""Whether this thread is inside one of our own locks right now.

The garbage collector runs finalizers wherever it strikes, also in the middle of our own critical sections: a generator
that is collected there runs its ``finally``, closes the answer it was reading and so ends an operation. Such an ending
must neither wait for a lock that its own thread holds nor see half a change; it is noted and done by another thread.

The locks are reentrant ones, so that a path that forgot to look cannot hang its thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast


class _Owned(Protocol):
    def _is_owned(self) -> bool: ...


def held(lock: object) -> bool:
    """Whether the running thread holds this `threading.RLock` (what `threading.Condition` asks of it, too)."""
    return cast(_Owned, lock)._is_owned()


def any_held(*locks: object) -> Callable[[], bool]:
    """Asks whether the running thread holds one of these locks; made once, since every ending asks."""
    owned = tuple(cast(_Owned, lock)._is_owned for lock in locks)

    def ask() -> bool:
        return any(held_here() for held_here in owned)

    return ask
