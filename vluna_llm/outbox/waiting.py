"""What an operation that is not settled waits as, in words for people.

=========== =============================================================================================
pending     on its way, or tried again soon
held        kept and tried slowly: somebody has to mend something first (a key, a realm, a price)
dead        the gate refused it and nothing is tried: mended and retried, or repaired, or dropped
quarantined the gate took it and charged nothing: repaired once the price or meter is there
lost        its process died in the middle of the call: usage unknown, nothing charged
=========== =============================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from ..operation import Settlement
from .row import Row
from .schema import Total

Waiting = Literal["pending", "held", "dead", "quarantined", "lost"]

STATES: tuple[Waiting, ...] = get_args(Waiting)

_AS: Mapping[Settlement, Waiting] = {
    "pending": "pending",
    "sent": "pending",
    "refused": "dead",
    "quarantined": "quarantined",
    "lost": "lost",
}


def waiting_as(row: Row) -> Waiting | None:
    """The word for this row; None where it is in flight or settled."""
    return _word(row.state.settlement, row.held)


def since(row: Row) -> float:
    """When its work ended, or began where that is not known (seconds since the epoch)."""
    return row.ended_at or row.created_at


def needs_person(row: Row, now: float, max_age: float) -> bool:
    """Whether somebody should look at it; at what is pending only where it is older than ``max_age`` seconds."""
    word = waiting_as(row)
    return word is not None and (word != "pending" or now - since(row) > max_age)


def depths(totals: Iterable[Total]) -> dict[Waiting, tuple[int, float]]:
    """How many wait in each state and since when, of what `Journal.totals` says."""
    found: dict[Waiting, tuple[int, float]] = {}
    for total in totals:
        word = _word(total.settlement, total.held)
        if word is not None and total.count:
            began = total.oldest_created_at if total.oldest_ended_at is None else total.oldest_ended_at
            count, oldest = found.get(word, (0, began))
            found[word] = count + total.count, min(oldest, began)
    return found


def _word(settlement: Settlement, held: bool) -> Waiting | None:
    word = _AS.get(settlement)
    return "held" if word == "pending" and held else word
