"""``vluna-llm outbox``: what this machine's journals hold that is not settled. Reads only, adopts nothing."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import ConfigurationError
from ..operation import Settlement
from ..outbox.reading import JournalFile, journals_below, read_journal
from ..outbox.row import NEXT_STEP, Row
from ..settings import journal_root

LISTED: tuple[Settlement, ...] = ("pending", "sent", "quarantined", "refused", "lost")
"""The settlements that are listed: on their way, or waiting for somebody."""

_STYLES = {"pending": "yellow", "sent": "yellow", "quarantined": "bold red", "refused": "bold red", "lost": "red"}


def list_outbox(console: Console, directory: Path | None, environ: Mapping[str, str], *, as_json: bool) -> int:
    """List the operations below ``directory``; gives the exit code.

    Raises:
        ConfigurationError: there is no such directory, or the outbox is configured to be in memory.
    """
    where = _place(directory, environ)
    journals = [read_journal(path) for path in journals_below(where)]
    listed = [(journal, row) for journal in journals for row in journal.rows if row.state.settlement in LISTED]
    broken = [journal for journal in journals if journal.problem is not None]
    if as_json:
        data = {
            "directory": str(where),
            "journals": len(journals),
            "unreadable": [{"journal": str(journal.path), "problem": journal.problem} for journal in broken],
            "in_flight": sum(_in_flight(row) for journal in journals for row in journal.rows),
            "operations": [_as_json(journal, row) for journal, row in listed],
        }
        console.file.write(json.dumps(data, indent=2) + "\n")
    else:
        _show(console, where, journals, [row for _, row in listed])
    return 1 if broken else 0


def _place(directory: Path | None, environ: Mapping[str, str]) -> Path:
    if directory is None:
        given = environ.get("VLUNA_LLM_OUTBOX")
        if given == "memory":
            raise ConfigurationError(
                "VLUNA_LLM_OUTBOX is 'memory', so there is nothing on disk to list; name a directory to look there."
            )
        if not given:
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


def _in_flight(row: Row) -> bool:
    return row.state.settlement == "none" and row.state.admission != "denied" and row.state.work != "parked"


def _as_json(journal: JournalFile, row: Row) -> dict[str, Any]:
    """What may be shown of a row: neither the lease nor the bytes that go to the gate."""
    usage = row.state.usage
    return {
        "operation_id": row.operation_id,
        "state": row.state.settlement,
        "admission": row.state.admission,
        "work": row.state.work,
        "route": row.state.route,
        "principal_id": row.principal_id,
        "user_id": row.user_id,
        "feature_code": row.feature_code,
        "model": row.model,
        "usage": None if usage is None else dict(usage.counts()),
        "usage_source": row.state.usage_source,
        "created_at": row.created_at,
        "ended_at": row.ended_at,
        "attempts": row.attempts,
        "next_attempt_at": row.next_attempt_at or None,
        "last_error": row.last_error,
        "next_step": NEXT_STEP[row.state.settlement],
        "lease_id": row.lease_id,
        "response_id": row.response_id,
        "request_id": row.request_id,
        "base_url": row.base_url,
        "realm_id": row.realm_id,
        "pid": row.pid,
        "journal": str(journal.path),
    }


def _show(console: Console, where: Path, journals: list[JournalFile], rows: list[Row]) -> None:
    for journal in journals:
        if journal.problem is not None:
            console.print(Text(f"cannot read {journal.path}: {journal.problem}", style="red"))
    busy = sum(_in_flight(row) for journal in journals for row in journal.rows)
    if not rows:
        readable = sum(journal.problem is None for journal in journals)
        console.print(
            f"Nothing waits: {readable} journal(s) below {where}, {busy} operation(s) in flight.",
            highlight=False,
            soft_wrap=True,
        )
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("state", "operation", "customer", "feature"):
        table.add_column(name, overflow="fold")
    for name in ("tokens", "age", "tries"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what is next", ratio=1, overflow="fold")
    now = time.time()
    for row in rows:
        state, usage = row.state.settlement, row.state.usage
        table.add_row(
            Text(state, style=_STYLES[state]),
            row.operation_id.rpartition(":")[2][:8],
            row.principal_id,
            row.feature_code,
            "-" if usage is None else f"{usage.total_tokens:,}",
            _age(now - row.created_at),
            str(row.attempts),
            row.last_error or NEXT_STEP[state],
        )
    console.print(table)
    counts = Counter(row.state.settlement for row in rows)
    summary = ", ".join(f"{counts[state]} {state}" for state in LISTED if counts[state])
    console.print(
        f"{len(rows)} operation(s) below {where}: {summary}; {busy} in flight.", highlight=False, soft_wrap=True
    )


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"
