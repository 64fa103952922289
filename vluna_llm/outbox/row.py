"""One operation as it is stored. No prompt, no answer and no key of the gate is ever part of it."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..operation import Admission, OperationState, Part, Route, Settlement, Work
from ..types import Dialect, UsageSource
from ..usage.meters import MeterLine
from ..usage.types import TokenUsage

NEXT_STEP: Mapping[str, str] = {
    "none": "in flight in its process",
    "pending": "to be delivered",
    "sent": "sent, answer not seen yet; delivered again with the same key and bytes",
    "booked": "done: charged",
    "quarantined": "not charged: fix the price or meter at the gate, then repair",
    "rebooked": "done: charged by ingest",
    "refused": "the gate will not take it: look at last_error",
    "lapsed": "done: nothing owed",
    "lost": "owner died in flight: usage unknown, charged nothing",
}
"""What happens next with a row in this settlement state, where nothing else about it says more (`next_step`)."""

Stage = Literal["sharing", "shared"]
"""Where a row is delivered from: ``sharing`` on its way to the shared outbox, ``shared`` there; None from here."""


_NEW = OperationState()


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the journal; ``state`` is the operation's machine, the rest never changes its meaning.

    Times are seconds since the epoch. ``body`` holds the settlement's exact bytes once composed; ``settle_key`` is the
    base of its idempotency key; ``authorize_key`` is empty where the gate is never asked. ``derived`` marks a key that
    another run of the same job arrives at too (design rule 17). ``unsplit`` marks a plain quantity, priced as a whole
    and never split into token meters. ``base_url`` and ``realm_id`` say where the row may be delivered, and nowhere
    else.

    ``held`` says that the last delivery needs an operator's hand first and is tried slowly. ``arrived_from`` names the
    journal of which this is a copy that nobody may deliver yet (`vluna_llm.outbox.adoption`).
    """

    operation_id: str
    base_url: str
    realm_id: str
    pid: int
    principal_id: str
    user_id: str
    feature_code: str
    created_at: float
    authorize_key: str
    settle_key: str
    state: OperationState = _NEW
    feature_family_code: str | None = None
    budget_id: str | None = None
    labels: Mapping[str, str] | None = None
    model: str | None = None
    estimated_input: int = 0
    estimated_output: int = 0
    lease_token: str | None = None
    lease_id: str | None = None
    response_id: str | None = None
    request_id: str | None = None
    trace_id: str | None = None
    span_id: str | None = None
    trace_flags: int | None = None
    ended_at: float | None = None
    path: str | None = None
    body: bytes | None = None
    attempts: int = 0
    next_attempt_at: float = 0.0
    last_error: str | None = None
    receipt: str | None = None
    derived: bool = False
    unsplit: bool = False
    held: bool = False
    arrived_from: str | None = None
    stage: Stage | None = None

    @property
    def lane(self) -> tuple[str, str]:
        """Settlements of one (principal, user) go one after another (design rule 16)."""
        return self.principal_id, self.user_id

    def with_state(self, state: OperationState) -> Row:
        """The row with another state."""
        return self.evolve(state=state)

    def evolve(self, **changes: Any) -> Row:
        """The row with these fields changed: `dataclasses.replace`, at a third of its price on the caller's path."""
        row = object.__new__(Row)
        for put, value in zip(_PUTS.values(), _VALUES(self), strict=True):
            put(row, value)
        for name, value in changes.items():
            _PUTS[name](row, value)
        return row


_PUTS: Mapping[str, Callable[[Row, Any], None]] = {
    name: getattr(Row, name).__set__ for name in Row.__dataclass_fields__
}
_VALUES = operator.attrgetter(*_PUTS)

COLUMNS: Mapping[str, str] = {
    "operation_id": "TEXT PRIMARY KEY",
    "base_url": "TEXT NOT NULL",
    "realm_id": "TEXT NOT NULL",
    "pid": "INTEGER NOT NULL",
    "principal_id": "TEXT NOT NULL",
    "user_id": "TEXT NOT NULL",
    "feature_code": "TEXT NOT NULL",
    "created_at": "REAL NOT NULL",
    "authorize_key": "TEXT NOT NULL",
    "settle_key": "TEXT NOT NULL",
    "admission": "TEXT NOT NULL",
    "work": "TEXT NOT NULL",
    "settlement": "TEXT NOT NULL",
    "route": "TEXT",
    "dialect": "TEXT NOT NULL",
    "cancel_sent": "INTEGER NOT NULL DEFAULT 0",
    "look_first": "INTEGER NOT NULL DEFAULT 0",
    "used_up": "INTEGER NOT NULL DEFAULT 0",
    "usage": "TEXT",
    "usage_source": "TEXT",
    "next_step": "TEXT NOT NULL",
    "feature_family_code": "TEXT",
    "budget_id": "TEXT",
    "labels": "TEXT",
    "model": "TEXT",
    "estimated_input": "INTEGER NOT NULL DEFAULT 0",
    "estimated_output": "INTEGER NOT NULL DEFAULT 0",
    "lease_token": "TEXT",
    "lease_id": "TEXT",
    "response_id": "TEXT",
    "request_id": "TEXT",
    "trace_id": "TEXT",
    "span_id": "TEXT",
    "trace_flags": "INTEGER",
    "ended_at": "REAL",
    "path": "TEXT",
    "body": "BLOB",
    "attempts": "INTEGER NOT NULL DEFAULT 0",
    "next_attempt_at": "REAL NOT NULL DEFAULT 0",
    "last_error": "TEXT",
    "receipt": "TEXT",
    "derived": "INTEGER NOT NULL DEFAULT 0",
    "unsplit": "INTEGER NOT NULL DEFAULT 0",
    "held": "INTEGER NOT NULL DEFAULT 0",
    "arrived_from": "TEXT",
    "stage": "TEXT",
    "rest": "TEXT",
    "parts": "TEXT",
    "meters": "TEXT",
}
"""The columns of the table ``operations``. New ones are added at the end, each with what older rows have in it."""


def is_done(row: Row) -> bool:
    """Whether nobody has to look at the row any more (`vluna_llm.outbox.schema.DONE`)."""
    state = row.state
    done = state.settlement in ("booked", "rebooked", "lapsed") and state.work != "parked"
    return done or state.admission == "denied"


def next_step(row: Row) -> str:
    """What happens next with this row, for a person who opens the file with ``sqlite3``."""
    state = row.state
    if row.arrived_from is not None:
        return f"being taken over from {row.arrived_from}"
    if state.admission == "denied":
        return "done: the gate refused the call"
    if state.work == "parked" and state.settlement == "lapsed":
        return "works in the background: booked when its response is retrieved"
    if state.settlement in ("pending", "sent"):
        if row.stage == "shared":
            return "in the shared outbox, and delivered from there"
        if row.stage == "sharing":
            return "on its way to the shared outbox; whether it is there is not known yet"
        if state.look_first:
            return "the gate's own books are looked at before it is sent"
        if state.rest and state.used_up:
            return f"tokens that were booked as 0 wait for their price and are sent again: {named(state.rest)}"
        if row.held:
            return "kept and tried slowly: look at last_error"
    return NEXT_STEP[state.settlement]


def unbilled(row: Row) -> int | None:
    """The tokens of a row that nobody was charged for yet, be it that they never will be; None where not known.

    On meters that the caller named, their units.
    """
    state = row.state
    if state.rest is not None or state.meters:
        return sum(line.quantity for line in unbilled_lines(row))
    return None if state.usage is None else state.usage.total_tokens


def unbilled_lines(row: Row) -> tuple[MeterLine, ...]:
    """The same by meter, where that is fixed; empty where the split is made when it is sent."""
    return row.state.meters if row.state.rest is None else row.state.rest


def named(lines: Iterable[MeterLine]) -> str:
    """Lines in words: the meters, and how many tokens each."""
    return ", ".join(f"{line.meter_code} ({line.quantity:,})" for line in lines)


def insert_values(row: Row) -> dict[str, Any]:
    """The columns of a new row that are not empty."""
    found = {name: value for name in _PLAIN if (value := getattr(row, name)) is not None}
    if row.labels:
        found["labels"] = json.dumps(dict(row.labels))
    found.update(_state_values(row.state))
    found["next_step"] = next_step(row)
    found.update((name, 1) for name in _FLAGS if getattr(row, name))
    return found


def changed_values(old: Row, new: Row) -> dict[str, Any]:
    """The columns in which two states of one row differ; what identifies it and what it was made with never change."""
    pairs = zip(_CHANGING, _CHANGING_VALUES(old), _CHANGING_VALUES(new), strict=True)
    found = {name: value for name, before, value in pairs if value is not before}
    if "held" in found:
        found["held"] = int(found["held"])  # PostgreSQL takes no boolean for a number
    told = not _TELLING.isdisjoint(found)
    if new.state is not old.state:
        before = _state_values(old.state)
        found.update((name, value) for name, value in _state_values(new.state).items() if value != before.get(name))
        told = told or "settlement" in found or found.get("admission") == "denied"
    if told:
        found["next_step"] = next_step(new)
    return found


def _state_values(state: OperationState) -> dict[str, Any]:
    found: dict[str, Any] = {
        "admission": state.admission,
        "work": state.work,
        "settlement": state.settlement,
        "route": state.route,
        "dialect": state.dialect,
        "cancel_sent": int(state.cancel_sent),
        "look_first": int(state.look_first),
        "used_up": state.used_up,
    }
    usage = state.usage
    if usage is not None:
        stored: dict[str, Any] = dict(usage.counts())
        if usage.audio_seconds is not None:
            stored["audio_seconds"] = usage.audio_seconds
        found["usage"] = json.dumps(stored)
        found["usage_source"] = state.usage_source
        if state.meters:
            found["meters"] = _stored_lines(state.meters)
    if state.rest is not None:
        found["rest"] = _stored_lines(state.rest)
        found["parts"] = json.dumps({part.commit_id: part.charged_xusd for part in state.parts})
    return found


_FLAGS = ("derived", "unsplit", "held")
_PLAIN = tuple(name for name in Row.__dataclass_fields__ if name in COLUMNS and name not in ("labels", *_FLAGS))
_CHANGING = (
    "feature_code",
    "feature_family_code",
    "lease_token",
    "lease_id",
    "response_id",
    "ended_at",
    "path",
    "body",
    "attempts",
    "next_attempt_at",
    "last_error",
    "receipt",
    "held",
    "arrived_from",
    "stage",
)
_TELLING = frozenset(("held", "arrived_from", "stage"))
"""Beside the state, what `next_step` looks at."""
_CHANGING_VALUES = operator.attrgetter(*_CHANGING)


def from_values(values: Mapping[str, Any]) -> Row:
    """A row from what the database holds; columns that this version does not know are left alone."""
    there = set(values.keys())  # a file of an older version lacks the columns that were added since
    admission: Admission = values["admission"]
    work: Work = values["work"]
    settlement: Settlement = values["settlement"]
    route: Route | None = values["route"]
    dialect: Dialect = values["dialect"]
    source: UsageSource | None = values["usage_source"]
    usage = None if values["usage"] is None else TokenUsage(**json.loads(values["usage"]))
    state = OperationState(
        admission=admission,
        work=work,
        settlement=settlement,
        route=route,
        dialect=dialect,
        usage=usage,
        usage_source=source,
        cancel_sent=bool(values["cancel_sent"]),
        look_first=bool(values["look_first"]) if "look_first" in there else False,
        used_up=values["used_up"] if "used_up" in there else 0,
        rest=_lines(values["rest"]) if "rest" in there and values["rest"] is not None else None,
        parts=_parts(values["parts"]) if "parts" in there and values["parts"] is not None else (),
        meters=_lines(values["meters"]) if "meters" in there and values["meters"] is not None else (),
    )
    plain = {name: values[name] for name in _PLAIN if name in there}
    labels = json.loads(values["labels"]) if values["labels"] else None
    derived, unsplit, held = (name in there and bool(values[name]) for name in _FLAGS)
    return Row(**plain, state=state, labels=labels, derived=derived, unsplit=unsplit, held=held)


def _stored_lines(lines: Iterable[MeterLine]) -> str:
    return json.dumps({line.meter_code: line.quantity for line in lines})


def _lines(stored: str) -> tuple[MeterLine, ...]:
    return tuple(MeterLine(code, quantity) for code, quantity in json.loads(stored).items())


def _parts(stored: str) -> tuple[Part, ...]:
    return tuple(Part(commit_id, charged) for commit_id, charged in json.loads(stored).items())
