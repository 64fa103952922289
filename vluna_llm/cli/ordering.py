"""Orders of an operator, from the command line to the operation: placed, waited for, and what became of each.

A row belongs to the process that owns its journal, so an order is left there and carried out by it within seconds.
Where that process is dead, this one takes its journal over as any next process would, with the credentials of the
environment; without them the order waits in the file. What is in the shared outbox is changed there.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import OutboxUnavailable
from ..outbox.orders import What, find, ordered, owner_lives, place, waiting_in, why_not
from ..outbox.reading import journals_below
from ..outbox.row import Row
from ..outbox.waiting import waiting_as
from ..process import Process
from ..settings import Settings
from ..settlement import with_bytes_of_rest
from ..telemetry import Telemetry, log
from ..usage.estimate import Estimator
from ..usage.features import FeatureMap
from .listing import CANNOT_READ, NOTHING_WAITS, SOMETHING_WAITS
from .selection import Entry, shared_outbox, short_ids

_LOOK_EVERY = 0.2
_CLOSE_WITHIN = 2.0
_SHOWN = 100

End = Literal["settled", "waits", "not done", "unreadable"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one order."""

    operation_id: str
    end: End
    said: str


def give_orders(entries: Sequence[Entry], what: What, environ: Mapping[str, str], timeout: float) -> list[Outcome]:
    """Have this done with these operations; waits at most ``timeout`` seconds for what comes of it.

    Raises:
        ConfigurationError: the settings of the gate are wrong (none at all is no mistake).
    """
    outcomes: dict[str, Outcome] = {}
    local: list[Entry] = []
    shared: list[Entry] = []
    for entry in entries:
        reason = why_not(entry.row, what)
        if reason is not None:
            outcomes[entry.row.operation_id] = Outcome(entry.row.operation_id, "not done", reason)
        else:
            (shared if entry.journal is None else local).append(entry)
    deadline = time.monotonic() + timeout
    if shared:
        outcomes.update(_in_shared(shared, what, environ, deadline))
    if local:
        outcomes.update(_in_journals(local, what, deadline))
    return [outcomes[entry.row.operation_id] for entry in entries]


def show_outcomes(console: Console, outcomes: Sequence[Outcome], *, as_json: bool) -> int:
    """Print what became of each order; gives the exit code."""
    if as_json:
        data = [{"operation_id": one.operation_id, "end": one.end, "said": one.said} for one in outcomes]
        console.file.write(json.dumps(data, indent=2) + "\n")
    elif not outcomes:
        console.print("Nothing waits that is meant by this.")
    else:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        shown = sorted(outcomes, key=lambda one: one.end == "settled")[:_SHOWN]
        table.add_column("operation", no_wrap=True)
        table.add_column("now", no_wrap=True)
        table.add_column("what became of it", overflow="fold", ratio=1)
        ids = short_ids([one.operation_id for one in outcomes])
        for one in shown:
            style = "green" if one.end == "settled" else "yellow"
            table.add_row(ids[one.operation_id], Text(one.end, style=style), Text(one.said))
        console.print(table)
        counts = Counter(one.end for one in outcomes)
        more = f"... and {len(outcomes) - len(shown)} more. " if len(outcomes) > len(shown) else ""
        summary = ", ".join(f"{number} {end}" for end, number in counts.items())
        console.print(f"{more}{len(outcomes)} ordered: {summary}.", highlight=False)
    if any(one.end == "unreadable" for one in outcomes):
        return CANNOT_READ
    return NOTHING_WAITS if all(one.end == "settled" for one in outcomes) else SOMETHING_WAITS


# -- in journals -------------------------------------------------------------------------------------------------------


def _in_journals(entries: Sequence[Entry], what: What, deadline: float) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    by_journal: dict[Path, list[Entry]] = defaultdict(list)
    for entry in entries:
        assert entry.journal is not None
        by_journal[entry.journal].append(entry)
    placed: dict[str, Entry] = {}
    orphans: dict[Path, list[Entry]] = defaultdict(list)
    for path, its in by_journal.items():
        try:
            place(path, [(entry.row.operation_id, what) for entry in its])
        except OutboxUnavailable as error:
            outcomes.update((e.row.operation_id, Outcome(e.row.operation_id, "unreadable", str(error))) for e in its)
            continue
        placed.update((entry.row.operation_id, entry) for entry in its)
        if not owner_lives(path):
            orphans[path.parent] += its
    why: dict[str, str] = {}
    in_vain: set[str] = set()
    with ExitStack() as heirs:
        for directory, its in orphans.items():
            reason = _adopt(heirs, directory, its)
            if reason is not None:
                why.update((entry.row.operation_id, reason) for entry in its)
                if not any(owner_lives(path) for path in journals_below(directory)):
                    in_vain.update(entry.row.operation_id for entry in its)
        outcomes.update(_Wait(what, why).until(deadline, {n: e for n, e in placed.items() if n not in in_vain}))
        outcomes.update(_Wait(what, why).until(0.0, {n: e for n, e in placed.items() if n in in_vain}))
    return outcomes


def _adopt(heirs: ExitStack, directory: Path, entries: Sequence[Entry]) -> str | None:
    """Be the process that takes over what dead ones left in this directory; why not, where that cannot be."""
    settings = Settings(outbox=str(directory))
    missing = settings.missing_credentials()
    if missing:
        return f"ordered; the next process carries it out (to have it done here, set {', '.join(missing)})"
    others = {(e.row.base_url, e.row.realm_id) for e in entries} - {(settings.base_url, settings.realm_id)}
    if others:
        url, realm = min(others)
        return (
            "ordered; the next process of its own gate carries it out (to have it done here, set "
            f"VLUNA_SERVICE_BASE_URL={url} and VLUNA_REALM_ID={realm})"
        )
    heirs.enter_context(_heir(settings))
    return None


@contextmanager
def _heir(settings: Settings) -> Iterator[None]:
    process = Process(settings, Telemetry(), Estimator(), FeatureMap.from_dict(settings.load_features()))
    log.addFilter(_is_trouble)  # what becomes of each operation is shown in the end
    try:
        process.running()  # it takes over, carries out and delivers, as every process does
        yield
    finally:
        process.close(_CLOSE_WITHIN)
        log.removeFilter(_is_trouble)


def _is_trouble(record: logging.LogRecord) -> bool:
    """Whether a log line is of an error of ours, or of a journal that cannot be used."""
    event = record.args[0] if isinstance(record.args, tuple) and record.args else ""
    return record.levelno >= logging.ERROR and (event == "vluna.internal_error" or not str(event).startswith("vluna."))


class _Wait:
    """Watches the journals until orders came to an end.

    Rows and orders move between journals when one is taken over, and are read from one after the other: what was seen
    once may be half of a move, what was seen twice in a row is not.
    """

    def __init__(self, what: What, why: Mapping[str, str]) -> None:
        self._what: What = what
        self._why = why
        self._seen: dict[str, Outcome] = {}

    def until(self, deadline: float, entries: Mapping[str, Entry]) -> dict[str, Outcome]:
        outcomes: dict[str, Outcome] = {}
        left = dict(entries)
        while left:
            last = time.monotonic() >= deadline
            outcomes.update(self._look(left, last))
            left = {name: entry for name, entry in left.items() if name not in outcomes}
            if left:
                time.sleep(_LOOK_EVERY)
        return outcomes

    def _look(self, entries: Mapping[str, Entry], last: bool) -> dict[str, Outcome]:
        found: dict[str, Outcome] = {}
        directories: dict[Path, list[str]] = defaultdict(list)
        for name, entry in entries.items():
            assert entry.journal is not None
            directories[entry.journal.parent].append(name)
        for directory, names in directories.items():
            paths = journals_below(directory)
            try:
                open_orders = {order.operation_id for path in paths for order in waiting_in(path)}
            except OutboxUnavailable as error:
                found.update((name, Outcome(name, "unreadable", str(error))) for name in names if last)
                continue
            rows = find(paths, names)
            for name in names:
                row = rows.get(name)
                end = None if name in open_orders else _end(name, row, self._what)
                certain = end is not None and (end.end == "settled" or self._seen.get(name) == end)
                if end is not None:
                    self._seen[name] = end
                if end is not None and (certain or last):
                    found[name] = end
                elif last:
                    found[name] = _so_far(name, row, entries[name], self._why.get(name), name in open_orders)
        return found


def _end(name: str, row: Row | None, what: What) -> Outcome | None:
    """How a carried-out order ended; None while it may still end otherwise."""
    if row is None:
        return Outcome(name, "settled", "settled, and its journal was cleared")
    word = waiting_as(row)
    if what == "drop" and row.state.settlement in ("booked", "rebooked"):
        return Outcome(name, "not done", "it was CHARGED before it could be dropped: undo what you settled by hand")
    if word is None:
        return Outcome(name, "settled", _settled(row))
    if word in ("dead", "quarantined", "lost") or (word == "held" and row.attempts):
        return Outcome(name, "waits", f"{word}: {row.last_error}")
    return None


def _so_far(name: str, row: Row | None, entry: Entry, why: str | None, still_ordered: bool) -> Outcome:
    if still_ordered or row is None:
        pid = re.match(r"journal-(\d+)-", entry.journal.name if entry.journal is not None else "")
        owner = f"process {pid[1]}" if pid else "its process"
        return Outcome(name, "waits", why or f"ordered; {owner} has not carried it out yet")
    return Outcome(name, "waits", f"{waiting_as(row)}, {_tried(row)}")


def _tried(row: Row) -> str:
    if not row.attempts:
        return "not answered yet"
    return f"tried {'once' if row.attempts == 1 else f'{row.attempts} times'}: {row.last_error}"


def _settled(row: Row) -> str:
    said = {"booked": "charged", "rebooked": "charged by ingest"}.get(row.state.settlement)
    return said or row.last_error or "nothing is owed"


# -- in the shared outbox ----------------------------------------------------------------------------------------------


def _in_shared(entries: Sequence[Entry], what: What, environ: Mapping[str, str], deadline: float) -> dict[str, Outcome]:
    """Change the rows where they are; whichever host claims their lane next delivers them."""
    shared = shared_outbox(environ)
    assert shared is not None
    outcomes: dict[str, Outcome] = {}
    todo = {entry.row.operation_id: entry.row for entry in entries}
    reopened: set[str] = set()
    try:
        while todo:
            last = time.monotonic() >= deadline
            for name, row in list(todo.items()):
                end: Outcome | None = None
                if name not in reopened:
                    reason = why_not(row, what)
                    if reason is not None:
                        end = Outcome(name, "not done", reason)
                    elif shared.reopen(row, with_bytes_of_rest(ordered(row, what))):
                        reopened.add(name)
                now = shared.get(name)
                if end is None and name in reopened:
                    end = _end(name, now, what)
                if end is None and last:
                    end = _so_far_shared(name, now, name in reopened)
                if end is not None:
                    outcomes[name] = end
                    del todo[name]
                elif now is not None:
                    todo[name] = now
            if todo:
                time.sleep(_LOOK_EVERY)
    except OutboxUnavailable as error:
        outcomes.update((name, Outcome(name, "unreadable", str(error))) for name in todo)
    finally:
        shared.close()
    return outcomes


def _so_far_shared(name: str, row: Row | None, reopened: bool) -> Outcome:
    if not reopened:
        return Outcome(name, "not done", "a host is delivering for this customer at this moment: order it again")
    tried = f"; {_tried(row)}" if row is not None and row.attempts else ""
    return Outcome(name, "waits", f"ordered; the next host that claims this customer delivers it{tried}")
