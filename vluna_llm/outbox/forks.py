"""No fork in the middle of SQLite.

A forked child has one thread, and every lock as it stood: where another thread was inside SQLite at that moment, the
child hangs in its own first use of it (SQLite's allocator has one lock for the whole process). So a fork waits until
our threads have come out, and they wait outside until it has happened. Neither waits for the network or for long.

Who uses a connection under a lock of its own has that lock watched (`watch`), at no price; who opens another, beside
that lock, uses it within `inside`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

PATIENCE = 2.0
"""Seconds that a fork waits at most; then it happens all the same, as it would without us."""


class HasLock(Protocol):
    """Something that uses SQLite only under its lock."""

    @property
    def lock(self) -> Any:
        """A `threading.RLock`, within which nobody enters `inside`."""


class _Door:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.forking = threading.RLock()
        self.forker = 0
        self.inside = 0
        self.shut = False
        self.taken: list[Any] = []


_door = _Door()
_watched: weakref.WeakSet[HasLock] = weakref.WeakSet()


def watch(user: HasLock) -> None:
    """Take the lock of this user of SQLite before every fork, as long as the user exists."""
    _watched.add(user)


@contextlib.contextmanager
def inside() -> Iterator[None]:
    """Within this, SQLite may be used beside the watched locks. Never entered under one of them."""
    door, deadline = _door, time.monotonic() + 2 * PATIENCE
    with door.changed:
        while door.shut and (left := deadline - time.monotonic()) > 0:
            door.changed.wait(left)
        door.inside += 1
    try:
        yield
    finally:
        with door.changed:
            door.inside -= 1
            door.changed.notify_all()


def _before() -> None:
    door, deadline = _door, time.monotonic() + PATIENCE
    if not door.forking.acquire(timeout=PATIENCE):
        return  # another thread forks, and takes its time
    door.forker = threading.get_ident()
    with door.changed:
        door.shut = True
        while door.inside and (left := deadline - time.monotonic()) > 0:
            door.changed.wait(left)
    for user in _users():
        if user.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            door.taken.append(user.lock)


def _after_in_parent() -> None:
    door = _door
    if door.forker != threading.get_ident():
        return
    while door.taken:
        door.taken.pop().release()
    with door.changed:
        door.shut = False
        door.changed.notify_all()
    door.forker = 0
    door.forking.release()


def _users() -> list[HasLock]:
    for _ in range(10):
        with contextlib.suppress(RuntimeError):  # another thread made one meanwhile
            return list(_watched)
    return []


def _after_in_child() -> None:
    global _door
    _door = _Door()
    _watched.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
