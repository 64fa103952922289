"""Rows, journals of dead processes, and processes that are really killed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sqlite3
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from vluna_llm import failpoints
from vluna_llm.operation import OperationState
from vluna_llm.outbox import Journal, Row
from vluna_llm.usage import TokenUsage

GATE = "https://gate/mgt/v1"
REALM = "realm"

RUNNING = OperationState().leased("lease_token").started()
DONE = RUNNING.completed(TokenUsage(10, 5, cached_tokens=4), "provider")
PARKED = RUNNING.parked()


def row(operation_id: str = "op-1", **changes: object) -> Row:
    """A row of an operation that has just begun."""
    base = Row(
        operation_id=operation_id,
        base_url=GATE,
        realm_id=REALM,
        pid=os.getpid(),
        principal_id="ann",
        user_id="ann",
        feature_code="openai.gpt-4o",
        created_at=1000.0,
        authorize_key=f"{operation_id}:auth",
        settle_key=operation_id,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@contextlib.contextmanager
def fast_directory() -> Iterator[Path]:
    """A directory in memory where there is one: what is killed here are processes, not the machine."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where, prefix="vluna-outbox-") as made:
        yield Path(made)


def dead_journal(directory: Path, *rows: Row, kept_log: bool = False) -> Path:
    """The journal that a process left behind; with ``kept_log`` as a killed one leaves it, all in its log."""
    if kept_log:
        before = {*directory.glob("*.sqlite3")}
        assert killed(lambda: [*map(Journal(directory).insert, rows)])
        (path,) = {*directory.glob("*.sqlite3")} - before
        return path
    journal = Journal(directory)
    for each in rows:
        journal.insert(each)
    assert journal.close()
    assert journal.path is not None
    return journal.path


def child(act: Callable[[], object]) -> int:
    """A forked process that does this and is killed; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    return pid


def killed(act: Callable[[], object]) -> bool:
    """Do this in a process that is killed: by ``act`` itself, or when it is done. False where it failed instead."""
    _, status = os.waitpid(child(act), 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def at_hit(number: int, act: Callable[[str], object], names: tuple[str, ...] = ("adoption.",)) -> list[str]:
    """Arm this process's failpoints: ``act`` at the ``number``-th, from 0. Gives the list of those that were met."""
    met: list[str] = []

    def handler(name: str) -> None:
        if name.startswith(names):
            met.append(name)
            if len(met) == number + 1:
                act(name)

    failpoints.arm(handler)
    return met


def die(_: str = "") -> None:
    """As ``kill -9`` does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def adopt_and_die_at(directory: Path, number: int) -> None:
    """What a process does that is killed at the ``number``-th moment of its taking over."""
    at_hit(number, die)
    Journal(directory).adopt(GATE, REALM)


def where_rows_are(directory: Path) -> tuple[Counter[str], Counter[str]]:
    """In how many files each operation is one that may be delivered, and in how many it is a copy."""
    rows: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    for path in directory.glob("*.sqlite3"):
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
            if not db.execute("PRAGMA user_version").fetchone()[0]:
                continue
            for operation_id, origin in db.execute("SELECT operation_id, arrived_from FROM operations").fetchall():
                (copies if origin else rows)[operation_id] += 1
    return rows, copies


def assert_each_is_somewhere(directory: Path, ids: set[str]) -> None:
    """Nothing is lost, and nothing is deliverable from two files; true at every moment."""
    rows, copies = where_rows_are(directory)
    assert rows.keys() | copies.keys() == ids
    assert max(rows.values(), default=0) <= 1


def in_child(act: Callable[[], object]) -> None:
    """Do this in a forked process, with limits or rights of its own; what fails there fails here."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-4000:])
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8", errors="replace") as pipe:
        told = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0, told or "the child died"
