"""What the shared stage needs of those who deliver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..outbox import Row


class Workers(Protocol):
    """What the coordinator needs of the settler."""

    def feed(self, rows: Sequence[Row]) -> None:
        """Deliver these rows, which are claimed."""
        ...

    def deliver_here(self, rows: Sequence[Row]) -> None:
        """Deliver these rows of the journal from here."""
        ...

    def read_again(self) -> None:
        """The journal holds rows that are to be delivered from here and are not in memory."""
        ...

    def delivering(self, operation_id: str) -> bool:
        """Whether this row is being delivered at this moment."""
        ...

    def gate_away_for(self) -> float | None:
        """None where the gate answers; else the seconds until one settlement may find out whether it is back."""
        ...

    def settled_elsewhere(self) -> None:
        """A row of this process was settled, by whoever had the claim."""
        ...
