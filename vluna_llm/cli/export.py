"""What waits, as a file for an accountant: JSON lines or CSV. No lease, no key, none of the bytes for the gate."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigurationError
from ..outbox.row import unbilled, unbilled_lines
from ..outbox.waiting import since
from .selection import Entry

Format = Literal["jsonl", "csv"]

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def record(entry: Entry) -> dict[str, Any]:
    """One operation: who, what, when, how much, and why it waits. Times are UTC, amounts XUSD, the rest tokens.

    ``charged_by`` are the bookings that charged a part of it; ``unbilled`` is what is left. ``meters`` is what was
    recorded on meters that the caller named, in their units.
    """
    row, usage = entry.row, entry.row.state.usage
    receipt = _receipt(row.receipt)
    return {
        "operation_id": row.operation_id,
        "state": entry.state,
        "principal_id": row.principal_id,
        "user_id": row.user_id,
        "feature_code": row.feature_code,
        "model": row.model,
        "occurred_at": _utc(since(row)),
        "quantity": None if usage is None else usage.total_tokens,
        "input_tokens": None if usage is None else usage.input_tokens,
        "cached_tokens": None if usage is None else usage.cached_tokens,
        "output_tokens": None if usage is None else usage.output_tokens,
        "unbilled": unbilled(row),
        "unbilled_lines": {line.meter_code: line.quantity for line in unbilled_lines(row)},
        "charged_xusd": sum(part.charged_xusd for part in row.state.parts),
        "charged_by": {part.commit_id: part.charged_xusd for part in row.state.parts},
        "usage_source": row.state.usage_source,
        "estimated_input": row.estimated_input,
        "estimated_output": row.estimated_output,
        "shown_xusd": receipt.get("amount_xusd"),
        "commit_id": receipt.get("commit_id"),
        "lease_id": row.lease_id,
        "response_id": row.response_id,
        "request_id": row.request_id,
        "attempts": row.attempts,
        "reason": row.last_error,
        "labels": dict(row.labels or {}),
        "base_url": row.base_url,
        "realm_id": row.realm_id,
        "where": entry.where,
        "meters": {line.meter_code: line.quantity for line in row.state.meters},
    }


def text_of(entries: Sequence[Entry], form: Format) -> str:
    """The whole export."""
    records = [record(entry) for entry in entries]
    if form == "jsonl":
        return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
    out = io.StringIO()
    writer = csv.DictWriter(out, _NAMES, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in one.items()} for one in records)
    return out.getvalue()


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads (mode 0600), as a whole or not at all, and durably.

    Raises:
        ConfigurationError: it cannot be written.
    """
    try:
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(fd, "w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise ConfigurationError(f"Cannot write {path}: {error.strerror or error}.") from None


def drop_file(directory: Path) -> Path:
    """Where dropped operations are written before they are dropped; a new name each time."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
    return directory / f"dropped-{stamp}-{os.getpid()}.jsonl"


def _cell(value: Any) -> Any:
    """A value as a spreadsheet takes it: a text that it would run as a formula begins with an apostrophe."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False) if value else ""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _receipt(stored: str | None) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(stored or "{}")
        if isinstance(found, dict):
            return found
    return {}


def _utc(moment: float) -> str:
    return datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


_NAMES = (
    "operation_id",
    "state",
    "principal_id",
    "user_id",
    "feature_code",
    "model",
    "occurred_at",
    "quantity",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "unbilled",
    "unbilled_lines",
    "charged_xusd",
    "charged_by",
    "usage_source",
    "estimated_input",
    "estimated_output",
    "shown_xusd",
    "commit_id",
    "lease_id",
    "response_id",
    "request_id",
    "attempts",
    "reason",
    "labels",
    "base_url",
    "realm_id",
    "where",
    "meters",
)
