"""What the outbox of this machine holds, and which of it a command means."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..outbox.orders import owner_lives
from ..outbox.reading import journals_below, read_journal
from ..outbox.row import Row
from ..outbox.waiting import Waiting, since, waiting_as
from ..settings import Settings, journal_root

if TYPE_CHECKING:
    from ..outbox.postgres import SharedOutbox

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One operation that waits. ``journal`` is None where it is in the shared outbox, which ``where`` names."""

    row: Row
    journal: Path | None
    where: str

    @property
    def state(self) -> Waiting:
        """The word for people."""
        word = waiting_as(self.row)
        assert word is not None
        return word


@dataclass(frozen=True, slots=True)
class Problem:
    """A journal, or the shared outbox, that could not be read."""

    where: str
    problem: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that was found below a directory and in the shared outbox, oldest first."""

    directory: Path
    journals: int
    in_flight: int
    entries: tuple[Entry, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Filter:
    """What of it is meant; an empty filter means all of it."""

    states: frozenset[Waiting] = frozenset()
    principal: str | None = None
    feature: str | None = None
    older_than: float | None = None

    def takes(self, row: Row, now: float) -> bool:
        """Whether this row is meant."""
        return (
            (not self.states or waiting_as(row) in self.states)
            and (self.principal is None or row.principal_id == self.principal)
            and (self.feature is None or row.feature_code == self.feature)
            and (self.older_than is None or now - since(row) > self.older_than)
        )


def seconds(text: str) -> float:
    """Seconds in a duration like ``90``, ``90s``, ``15min``, ``1h`` or ``2d``. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"{text!r} is no duration; write 90s, 15min, 1h or 2d")
    return float(found[1]) * _UNITS[found[2]]


def look(directory: Path | None, environ: Mapping[str, str]) -> Snapshot:
    """Read every journal below ``directory`` (by default where the settings say) and the shared outbox.

    Raises:
        ConfigurationError: there is no such directory, or the outbox is configured to be in memory.
    """
    shared = shared_outbox(environ)
    place = _place(directory, environ, shared is not None)
    found: dict[str, Entry] = {}
    problems = []
    in_flight = 0
    paths = journals_below(place)
    for path in paths:
        read = read_journal(path)
        if read.problem is not None and path.exists():
            problems.append(Problem(str(path), read.problem))
        ended = None
        for row in read.rows:
            if _in_flight(row):
                ended = not owner_lives(path) if ended is None else ended
                if not ended:
                    in_flight += 1
                    continue
                row = row.with_state(row.state.owner_died())  # as whoever takes it over will write it
            # A row that is being taken over is in two files for a moment, and delivered from one of them.
            if waiting_as(row) is not None and (row.arrived_from is None or row.operation_id not in found):
                found[row.operation_id] = Entry(row, path, str(path))
    if shared is not None:
        problems += _look_at_shared(shared, found)
    entries = sorted(found.values(), key=lambda entry: since(entry.row))
    return Snapshot(place, len(paths), in_flight, tuple(entries), tuple(problems))


def shared_outbox(environ: Mapping[str, str]) -> SharedOutbox | None:
    """The shared outbox that the environment names; None where it names none.

    Raises:
        ConfigurationError: the gate or the realm is not named, or psycopg is not installed.
    """
    url = environ.get("VLUNA_LLM_OUTBOX_SHARED")
    if not url:
        return None
    settings = Settings()
    if not settings.base_url or not settings.realm_id:
        raise ConfigurationError(
            "VLUNA_LLM_OUTBOX_SHARED is set: set VLUNA_SERVICE_BASE_URL and VLUNA_REALM_ID, too, to say which rows of "
            "the shared outbox are meant."
        )
    from ..outbox.postgres import SharedOutbox

    return SharedOutbox(url, settings.base_url, settings.realm_id)


def chosen(snapshot: Snapshot, ids: Sequence[str], wanted: Filter) -> list[Entry]:
    """The entries with these ids, or where none are given, those that the filter takes.

    Raises:
        ConfigurationError: an id is of no entry, or a shortened one of several.
    """
    now = time.time()
    if not ids:
        return [entry for entry in snapshot.entries if wanted.takes(entry.row, now)]
    found: dict[str, Entry] = {}
    for given in ids:
        exact = [entry for entry in snapshot.entries if entry.row.operation_id == given]
        matches = exact or [entry for entry in snapshot.entries if _starts(entry.row.operation_id, given)]
        if not matches:
            raise ConfigurationError(f"Nothing that waits has the id {given}; look with: vluna-llm outbox")
        if len(matches) > 1:
            raise ConfigurationError(f"{given} is short for {len(matches)} operations; write more of it.")
        found[matches[0].row.operation_id] = matches[0]
    return [entry for entry in found.values() if wanted.takes(entry.row, now)]


def short_ids(ids: Collection[str]) -> dict[str, str]:
    """Each id as people are shown it: its shortest end that is not another one's, at least eight characters."""
    length = _SHOWN
    while True:
        shown = {name: name.rpartition(":")[2][:length] for name in ids}
        if len(set(shown.values())) == len(shown) or length > 64:
            return shown
        length += 4


def _starts(operation_id: str, given: str) -> bool:
    return operation_id.startswith(given) or operation_id.rpartition(":")[2].startswith(given)


def _look_at_shared(shared: SharedOutbox, found: dict[str, Entry]) -> list[Problem]:
    from ..outbox.postgres import SharedAway

    try:
        rows = shared.listed("pending", "sent", "quarantined", "refused", "lost")
    except SharedAway as error:
        return [Problem(shared.where, str(error))]
    for name in [name for name, entry in found.items() if entry.row.stage == "shared"]:
        del found[name]  # what it is now is written there
    for row in rows:
        if waiting_as(row) is not None:
            found[row.operation_id] = Entry(row, None, shared.where)
    return []


def _in_flight(row: Row) -> bool:
    return row.state.settlement == "none" and row.state.admission != "denied" and row.state.work != "parked"


def _place(directory: Path | None, environ: Mapping[str, str], shared: bool) -> Path:
    if directory is None:
        given = environ.get("VLUNA_LLM_OUTBOX")
        if given == "memory" and not shared:
            raise ConfigurationError(
                "VLUNA_LLM_OUTBOX is 'memory', so there is nothing on disk to list; name a directory to look there."
            )
        if not given or given == "memory":
            return journal_root()
        directory = Path(given).expanduser()
        if not directory.is_dir():
            raise ConfigurationError(
                f"VLUNA_LLM_OUTBOX names {directory}, which is no directory (it is made with the first call); "
                "name another one to look there."
            )
    if not directory.is_dir():
        raise ConfigurationError(f"There is no directory {directory}.")
    return directory
