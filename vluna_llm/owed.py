"""What a settlement asks the gate to charge, line by line. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection

from .outbox import Row
from .usage.features import MeterNames
from .usage.meters import MeterLine, MetersMode, compose_lines


def lines_of(row: Row, mode: MetersMode, names: MeterNames, priced: Collection[str] | None) -> tuple[MeterLine, ...]:
    """The ``meters[]`` of all of a row's usage; empty where the total is priced by the primary meter.

    What the caller named goes as it is, also where a meter has no price: nothing is known of one above it, and the
    quarantine that follows names what to price. Anything else is split (`compose_lines`), a plain quantity never.
    """
    state = row.state
    if state.meters and mode != "never":
        return state.meters
    assert state.usage is not None
    known = None if priced is None else frozenset(priced)
    return compose_lines(
        state.usage, row.feature_code, mode="never" if row.unsplit else mode, names=names, priced=known
    )


def lines_sent(row: Row) -> tuple[MeterLine, ...]:
    """What the row's stored bytes ask for; where they have no lines, the total on the primary meter."""
    assert row.body is not None
    body = json.loads(row.body)
    sent = tuple(MeterLine(str(line["meter_code"]), int(line["quantity_minor"])) for line in body.get("meters", ()))
    return sent or (MeterLine(row.feature_code, int(body["quantity_minor"])),)


def unpriced(row: Row, names: MeterNames, priced: Collection[str], mode: MetersMode = "auto") -> list[str]:
    """The meters to which what is still to be charged would go and which have no price."""
    lines = row.state.rest or lines_of(row, mode, names, priced)
    codes = [line.meter_code for line in lines] or [row.feature_code]
    return [code for code in codes if code not in priced]
