"""An exclusive lock that the operating system frees when its process dies, however it dies."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from . import forks


class _Taking:
    """Held while a lock is taken or freed, so that no fork happens in between: all that a child inherits is known."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.held: set[FileLock] = set()


_taking = _Taking()
forks.watch(_taking)


class FileLock:
    """A whole-file lock on ``path``, never waited for.

    It is ``flock``, not POSIX record locks: those are lost when any descriptor of the file is closed. It belongs to the
    process that took it and ends with it: a forked child inherits the descriptor, and closes it at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        self._pid = 0

    def acquire(self) -> bool:
        """Take the lock; False where another holder has it."""
        with _taking.lock:
            fd = os.open(self._path, os.O_CREAT | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o600)
            try:
                _lock(fd)
                # The holder before us may have removed the file between our open and our lock.
                if os.fstat(fd).st_nlink == 0 or not self._path.exists():
                    os.close(fd)
                    return False
            except OSError:
                os.close(fd)
                return False
            self._fd, self._pid = fd, os.getpid()
            _taking.held.add(self)
        return True

    def release(self, *, remove: bool = False) -> None:
        """Free the lock, and remove its file where nobody will need it again."""
        with _taking.lock:
            if self._fd is None:
                return
            if remove:
                with contextlib.suppress(OSError):
                    os.unlink(self._path)
            fd, self._fd = self._fd, None
            _taking.held.discard(self)
            if self._pid == os.getpid():
                with contextlib.suppress(OSError):
                    _unlock(fd)  # also where somebody forked without telling Python, and holds a copy
            os.close(fd)

    def forget(self) -> None:
        """Close the descriptor that a fork inherited, without freeing the lock for its owner."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None


if os.name == "nt":  # pragma: no cover - not run on Windows
    import importlib

    _msvcrt = importlib.import_module("msvcrt")

    def _lock(fd: int) -> None:
        _msvcrt.locking(fd, _msvcrt.LK_NBLCK, 1)

    def _unlock(fd: int) -> None:
        _msvcrt.locking(fd, _msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _lock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _after_in_child() -> None:
    global _taking
    inherited, _taking = _taking.held, _Taking()
    forks.watch(_taking)
    for lock in inherited:
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
