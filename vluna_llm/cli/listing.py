"""``vluna-llm outbox``: what this machine's journals hold that is not settled. Reads only, adopts nothing."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..outbox.row import next_step, unbilled
from ..outbox.waiting import STATES, Waiting, needs_person, since
from .selection import Entry, Snapshot, short_ids

NOTHING_WAITS, SOMETHING_WAITS, CANNOT_READ = 0, 1, 3
"""Exit codes, for cron; 2 is a mistake in the settings or on the command line."""

DEFAULT_MAX_AGE = 3_600.0
"""Seconds for which a pending settlement is nobody's business."""

_STYLES: Mapping[Waiting, str] = {
    "pending": "yellow",
    "held": "bold yellow",
    "dead": "bold red",
    "quarantined": "bold red",
    "lost": "red",
}


def exit_code(snapshot: Snapshot, entries: Sequence[Entry], max_age: float) -> int:
    """What cron is told. What could not be read comes first: nobody knows what waits there."""
    if snapshot.problems:
        return CANNOT_READ
    now = time.time()
    return SOMETHING_WAITS if any(needs_person(entry.row, now, max_age) for entry in entries) else NOTHING_WAITS


def show_json(console: Console, snapshot: Snapshot, entries: Sequence[Entry], max_age: float) -> None:
    """Print everything as JSON."""
    now = time.time()
    data = {
        "directory": str(snapshot.directory),
        "journals": snapshot.journals,
        "unreadable": [{"journal": one.where, "problem": one.problem} for one in snapshot.problems],
        "in_flight": snapshot.in_flight,
        "counts": _counts(entries),
        "needs_person": sum(needs_person(entry.row, now, max_age) for entry in entries),
        "operations": [as_json(entry, now) for entry in entries],
    }
    console.file.write(json.dumps(data, indent=2) + "\n")


def as_json(entry: Entry, now: float) -> dict[str, Any]:
    """What may be shown of an operation: neither the lease nor the bytes that go to the gate."""
    row = entry.row
    usage = row.state.usage
    return {
        "operation_id": row.operation_id,
        "state": entry.state,
        "settlement": row.state.settlement,
        "admission": row.state.admission,
        "work": row.state.work,
        "route": row.state.route,
        "principal_id": row.principal_id,
        "user_id": row.user_id,
        "feature_code": row.feature_code,
        "model": row.model,
        "usage": None if usage is None else dict(usage.counts()),
        "meters": {line.meter_code: line.quantity for line in row.state.meters},
        "unbilled": unbilled(row),
        "charged_xusd": sum(part.charged_xusd for part in row.state.parts),
        "usage_source": row.state.usage_source,
        "estimated_input": row.estimated_input,
        "estimated_output": row.estimated_output,
        "created_at": row.created_at,
        "ended_at": row.ended_at,
        "age_seconds": round(max(0.0, now - since(row)), 3),
        "attempts": row.attempts,
        "next_attempt_at": row.next_attempt_at or None,
        "last_error": row.last_error,
        "next_step": next_step(row),
        "lease_id": row.lease_id,
        "response_id": row.response_id,
        "request_id": row.request_id,
        "base_url": row.base_url,
        "realm_id": row.realm_id,
        "pid": row.pid,
        "journal": None if entry.journal is None else str(entry.journal),
        "where": entry.where,
    }


def show_table(console: Console, snapshot: Snapshot, entries: Sequence[Entry], max_age: float, *, limit: int) -> None:
    """Print a table for people, its last rows only where there are more than ``limit``, and what to do about it."""
    for problem in snapshot.problems:
        console.print(Text(f"cannot read {problem.where}: {problem.problem}", style="red"), soft_wrap=True)
    if not entries:
        readable = snapshot.journals - sum(one.where.endswith(".sqlite3") for one in snapshot.problems)
        what = "Nothing that is asked for waits" if snapshot.entries else "Nothing waits"
        console.print(
            f"{what}: {readable} journal(s) below {snapshot.directory}, {snapshot.in_flight} operation(s) in flight.",
            highlight=False,
            soft_wrap=True,
        )
        return
    show_entries(console, entries[:limit] if limit else entries)
    if limit and len(entries) > limit:
        console.print(f"... and {len(entries) - limit} more: --limit 0 shows all, --json too.", highlight=False)
    counts = _counts(entries)
    summary = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    console.print(
        f"{len(entries)} operation(s) below {snapshot.directory}: {summary}; {snapshot.in_flight} in flight.",
        highlight=False,
        soft_wrap=True,
    )
    now = time.time()
    for advice in _advice({entry.state for entry in entries if needs_person(entry.row, now, max_age)}):
        console.print(advice, style="cyan", highlight=False, soft_wrap=True)


def show_entries(console: Console, entries: Sequence[Entry]) -> None:
    """Print the table itself."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("state", "operation", "customer", "feature"):
        table.add_column(name, overflow="fold")
    for name in ("tokens", "age", "tries"):
        table.add_column(name, justify="right", no_wrap=True)
    somewhere_else = any(entry.journal is None for entry in entries)
    if somewhere_else:
        table.add_column("where", overflow="fold")
    table.add_column("what is next", ratio=1, overflow="fold")
    ids = short_ids([entry.row.operation_id for entry in entries])
    now = time.time()
    for entry in entries:
        row, usage = entry.row, entry.row.state.usage
        table.add_row(
            Text(entry.state, style=_STYLES[entry.state]),
            ids[row.operation_id],
            Text(row.principal_id),
            Text(row.feature_code),
            "-" if usage is None else f"{unbilled(row):,}" + (" left" if row.state.parts else ""),
            _age(now - since(row)),
            str(row.attempts),
            *([Text("here" if entry.journal else entry.where)] if somewhere_else else []),
            Text(row.last_error or next_step(row)),
        )
    console.print(table)


def _advice(states: set[Waiting]) -> list[str]:
    """What a person does next."""
    said = {
        "held": "held: mend what the gate complains of (vluna-llm verify), then: vluna-llm outbox retry --state held",
        "dead": "dead: mend it, then: vluna-llm outbox retry ID, or repair ID, or settle it by hand and drop ID",
        "quarantined": "quarantined: add the price or meter at the gate, then: vluna-llm outbox repair --all",
        "lost": "lost: nobody knows their usage; vluna-llm outbox export --state lost, then drop ID",
        "pending": "pending for long: is a process of yours running? vluna-llm outbox retry --state pending delivers",
    }
    return [text for state, text in said.items() if state in states]


def _counts(entries: Sequence[Entry]) -> dict[Waiting, int]:
    counts = Counter(entry.state for entry in entries)
    return {state: counts[state] for state in STATES}


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"
