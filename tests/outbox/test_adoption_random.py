"""Whatever dies when, in whatever order: every row ends in exactly one file, as it was, and may be delivered there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outbox_rows import (
    DONE,
    GATE,
    REALM,
    adopt_and_die_at,
    assert_each_is_somewhere,
    at_hit,
    child,
    dead_journal,
    die,
    fast_directory,
    killed,
    row,
    where_rows_are,
)

from vluna_llm import failpoints
from vluna_llm.outbox import Journal, Row, adoption

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

Event = tuple[str, int]

MOMENTS = st.integers(0, 14)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("leave"), st.integers(1, 8)),
        st.tuples(st.just("leave in the log"), st.integers(1, 5)),
        st.tuples(st.just("adopt, die at"), MOMENTS),
        st.tuples(st.just("adopt, die at"), MOMENTS),
        st.tuples(st.just("adopt, fail at, again, die"), MOMENTS),
        st.tuples(st.just("adopt, fail at, live on"), MOMENTS),
        st.tuples(st.just("live on"), st.just(0)),
        st.tuples(st.just("kill one that lives"), st.integers(0, 3)),
    ),
    min_size=3,
    max_size=9,
)
"""What happens in one directory. Numbers are of rows, or of a failpoint that is met."""


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(adoption, "_BATCH", adoption._BATCH.replace(f"LIMIT {adoption.AT_ONCE}", "LIMIT 3"))
    monkeypatch.setattr(adoption, "_COPIES", adoption._COPIES.replace(f"LIMIT {adoption.AT_ONCE}", "LIMIT 2"))
    monkeypatch.setattr(adoption, "_SLICE", 2)
    yield
    failpoints.arm(None)


def no_room(_: str) -> None:
    raise OSError(28, "No space left on device")


@dataclass
class World:
    """One directory, what was put into it, and the processes that live there."""

    directory: Path
    rows: list[Row] = field(default_factory=list)
    living: list[int] = field(default_factory=list)

    def happens(self, what: str, number: int) -> None:
        if what.startswith("leave"):
            rows = [
                row(f"op-{len(self.rows) + n:03d}", state=DONE, body=os.urandom(40), attempts=n) for n in range(number)
            ]
            dead_journal(self.directory, *rows, kept_log=what != "leave")
            self.rows += rows
        elif what == "adopt, die at":
            assert killed(lambda: adopt_and_die_at(self.directory, number))
        elif what == "adopt, fail at, again, die":
            assert killed(lambda: self._fail_at(number, again=True))
        elif what == "kill one that lives":
            if self.living:
                self._kill(self.living.pop(number % len(self.living)))
        else:
            self._live_on(number if what == "adopt, fail at, live on" else -1)

    def _fail_at(self, number: int, *, again: bool) -> None:
        heir = Journal(self.directory)
        at_hit(number, no_room)
        heir.adopt(GATE, REALM)
        failpoints.arm(None)
        if again:
            heir.adopt(GATE, REALM)
            at_hit(0, die)

    def _live_on(self, number: int) -> None:
        reading, writing = os.pipe()

        def live() -> None:
            self._fail_at(number, again=False)
            os.write(writing, b".")
            signal.pause()

        self.living.append(child(live))
        assert os.read(reading, 1) == b"."
        os.close(reading)
        os.close(writing)

    def _kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def end(self) -> None:
        for pid in self.living:
            self._kill(pid)
        self.living = []

    def check(self) -> None:
        assert_each_is_somewhere(self.directory, {each.operation_id for each in self.rows})


def play(events: Sequence[Event]) -> None:
    with fast_directory() as directory:
        world = World(directory)
        try:
            for what, number in events:
                world.happens(what, number)
                world.check()
        finally:
            world.end()
        world.check()
        heir = Journal(directory)
        heir.adopt(GATE, REALM)
        heir.adopt(GATE, REALM)  # a file whose second one came later in the directory
        rows, copies = where_rows_are(directory)
        assert rows == {each.operation_id: 1 for each in world.rows}
        assert not copies
        assert {each.operation_id: each for each in heir.rows()} == {each.operation_id: each for each in world.rows}
        assert {found[0] for found in heir.due(1_000, 1_000, time.time())} == rows.keys()
        assert [*directory.glob("*.sqlite3")] == [heir.path]
        heir.close()


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(EVENTS)
def test_every_row_ends_in_exactly_one_file(events: list[Event]) -> None:
    play(events)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(EVENTS)
def test_every_row_ends_in_exactly_one_file_at_length(events: list[Event]) -> None:
    play(events)
