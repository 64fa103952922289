"""What a row on meters that its caller named bears when it is handed to other hosts, some of which may be older.

A host of version 2 of the shared outbox does not know ``meters``: it would charge the total by the primary meter, when
it composes such a row itself, and when it repairs its commit by an ingest. So the row is handed over with its bytes,
and with the lines of these bytes as its ``rest``, which that version sends alone, line by line, whatever it does.
"""

from __future__ import annotations

from ..outbox import Row
from ..owed import lines_sent
from ..settlement import compose, wants_lease
from ..usage.features import DEFAULT_NAMES
from ..usage.meters import MetersMode


def handed(row: Row, mode: MetersMode) -> Row:
    """The row as any host may have it. No price has to be known for it: the lines are given.

    Raises:
        ConfigurationError: it holds a value that cannot be sent.
    """
    if not row.state.meters or row.state.rest is not None:
        return row
    if row.body is None:
        request = compose(row, mode=mode, names=DEFAULT_NAMES, priced=None)
        row = row.evolve(path=request.path, body=request.body)
    return row.with_state(row.state.by_lines(lines_sent(row)))


def stays(row: Row) -> bool:
    """Whether the row is delivered from here. No money is in a cancel.

    A job that has yet to ask for its lease has no bytes, and version 2 would book it by ingest beside that lease.
    """
    return row.state.route == "cancel" or bool(row.state.meters and row.state.rest is None and wants_lease(row))
