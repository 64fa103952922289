"""A lock belongs to the process that took it: it ends with that one, and neither a fork nor a leftover keeps it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from outbox_rows import in_child

from vluna_llm.outbox import Journal
from vluna_llm.outbox.lock import FileLock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "l"), FileLock(tmp_path / "l")
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    first.release()
    assert not FileLock(tmp_path / "l").acquire(), "a second release frees nobody else's lock"
    second.release(remove=True)
    assert not (tmp_path / "l").exists()


def _forked_sleeper() -> int:
    """A forked child that does nothing, and goes on doing so."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, b".")
        signal.pause()
        os._exit(0)
    assert os.read(reading, 1) == b"."
    os.close(reading)
    os.close(writing)
    return pid


def test_a_killed_process_leaves_its_lock_although_a_child_of_it_lives_on(tmp_path: Path) -> None:
    """A pre-fork server's master dies; its workers must not keep its journal from being taken over."""
    reading, writing = os.pipe()
    owner = os.fork()
    if owner == 0:
        journal = Journal(tmp_path)
        other = FileLock(tmp_path / "taken-over.lock")
        assert other.acquire()
        sleeper = _forked_sleeper()
        os.write(writing, f"{sleeper} {journal.path}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writing)
    with open(reading) as pipe:
        sleeper, path = pipe.readline().split()
    try:
        os.waitpid(owner, 0)
        for lock in (Path(path).with_suffix(".lock"), tmp_path / "taken-over.lock"):
            mine = FileLock(lock)
            assert mine.acquire()
            mine.release()
    finally:
        os.kill(int(sleeper), signal.SIGKILL)


def test_a_forked_child_cannot_free_its_parents_lock(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "l")
    assert lock.acquire()

    def free() -> None:
        lock.release(remove=True)
        lock.forget()

    in_child(free)
    assert not FileLock(tmp_path / "l").acquire()
    assert (tmp_path / "l").exists()
    lock.release()


_FORK_BEHIND_ITS_BACK = """
import ctypes, os, sys
from pathlib import Path
from vluna_llm.outbox.lock import FileLock

lock = FileLock(Path(sys.argv[1]))
assert lock.acquire()
pid = ctypes.PyDLL(None).fork()
if pid == 0:
    lock.release()
    os._exit(0)
os.waitpid(pid, 0)
print("free" if FileLock(Path(sys.argv[1])).acquire() else "held", flush=True)
lock.release()
"""


def test_a_child_that_was_forked_behind_pythons_back_cannot_free_it_either(tmp_path: Path) -> None:
    """Some servers fork by themselves, and no hook of Python's runs.

    In a process of its own with one thread: where another thread waits for the interpreter at the moment of such a
    fork, the child hands it over to a thread that is not there, and waits for ever.
    """
    if getattr(ctypes.PyDLL(None), "fork", None) is None:
        pytest.skip("no C library to call")
    done = subprocess.run(
        [sys.executable, "-c", _FORK_BEHIND_ITS_BACK, str(tmp_path / "l")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "held"), done.stderr


def test_forks_while_locks_are_taken_leave_no_lock_with_a_child(tmp_path: Path) -> None:
    """Whenever the fork strikes, no descriptor goes unnoticed into the child."""
    stop = threading.Event()
    paths = [tmp_path / f"l-{n}" for n in range(3)]

    def take(path: Path) -> None:
        while not stop.is_set():
            lock = FileLock(path)
            assert lock.acquire(), "a child holds it"
            lock.release()

    threads = [threading.Thread(target=take, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    sleepers = [_forked_sleeper() for _ in range(20)]
    stop.set()
    for thread in threads:
        thread.join()
    try:
        for path in paths:
            lock = FileLock(path)
            assert lock.acquire()
            lock.release()
    finally:
        for pid in sleepers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_lock_whose_file_was_removed_is_not_one(tmp_path: Path) -> None:
    """Who opened it before it was removed must not believe to hold what the next one makes anew."""
    path = tmp_path / "l"
    lock = FileLock(path)
    real = os.open

    def removed_meanwhile(*args: object) -> int:
        fd = real(*args)  # type: ignore[call-overload]
        path.unlink()
        return int(fd)

    os.open = removed_meanwhile  # type: ignore[assignment]
    try:
        assert not lock.acquire()
    finally:
        os.open = real
    assert lock.acquire()
    lock.release()
