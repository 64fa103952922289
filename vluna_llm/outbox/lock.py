"""An exclusive lock that the operating system frees when its process dies, however it dies."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class FileLock:
    """A whole-file lock on ``path``, never waited for.

    It is ``flock``, not POSIX record locks: those are lost when any descriptor of the file is closed. A forked child
    inherits the descriptor and with it the lock, which is freed when the last of the two ends.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def acquire(self) -> bool:
        """Take the lock; False where another holder has it."""
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
        self._fd = fd
        return True

    def release(self, *, remove: bool = False) -> None:
        """Free the lock, and remove its file where nobody will need it again."""
        if self._fd is None:
            return
        if remove:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        os.close(self._fd)
        self._fd = None

    def forget(self) -> None:
        """Close the descriptor that a fork inherited, without touching the file."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None


if os.name == "nt":  # pragma: no cover - not run on Windows
    import importlib

    _msvcrt = importlib.import_module("msvcrt")

    def _lock(fd: int) -> None:
        _msvcrt.locking(fd, _msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
