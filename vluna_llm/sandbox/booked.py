"""What the gate charged, for tests and demos to look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Literal

from .records import Rating


@dataclass(frozen=True, slots=True)
class BookedEntry:
    """One commit or ingest as it was rated; ``lines`` is quantity by meter. Money is XUSD."""

    kind: Literal["commit", "ingest"]
    commit_id: str
    lease_id: str | None
    principal_id: str
    user_id: str
    feature: str
    quantity: int
    lines: Mapping[str, int]
    status: Literal["applied", "quarantined"]
    reason_codes: tuple[str, ...]
    shown_xusd: int
    charged_xusd: int
    cost_xusd: int
    labels: Mapping[str, str]
    rated_at: datetime
    recorded_at: datetime
    idempotency_key: str
    budget_id: str | None = None
    unpriced: tuple[str, ...] = field(default=())

    @property
    def occurred_at(self) -> datetime:
        """When the usage happened: what an ingest said, else when it was rated."""
        return self.rated_at

    @classmethod
    def of(cls, rating: Rating) -> BookedEntry:
        """The entry of one rating."""
        lines: dict[str, int] = {}
        for line in rating.lines:
            lines[line.meter] = lines.get(line.meter, 0) + line.quantity
        return cls(
            kind="commit" if rating.kind == "gate" else "ingest",
            commit_id=rating.rating_id,
            lease_id=rating.lease_id,
            principal_id=rating.principal_id,
            user_id=rating.user_id,
            feature=rating.feature,
            quantity=rating.quantity,
            lines=lines,
            status="applied" if rating.applied else "quarantined",
            reason_codes=rating.reason_codes,
            shown_xusd=rating.amount_xusd,
            charged_xusd=rating.charged_xusd,
            cost_xusd=rating.cost_xusd,
            labels=dict(rating.labels),
            rated_at=_moment(rating.rated_at),
            recorded_at=_moment(rating.created_at),
            idempotency_key=rating.idempotency_key,
            budget_id=rating.budget_id,
            unpriced=tuple(dict.fromkeys(line.meter for line in rating.lines if not line.priced)),
        )


@dataclass(frozen=True, slots=True)
class Booked:
    """Everything that was rated for one customer or a whole realm, in the order in which it was recorded."""

    entries: tuple[BookedEntry, ...]

    @classmethod
    def of(cls, ratings: Iterable[Rating]) -> Booked:
        """The view over these ratings."""
        return cls(tuple(BookedEntry.of(rating) for rating in ratings))

    @property
    def charged_xusd(self) -> int:
        """What was charged; quarantined commits count nothing."""
        return sum(entry.charged_xusd for entry in self.entries)

    @property
    def applied(self) -> tuple[BookedEntry, ...]:
        """The entries that were charged (or were free)."""
        return tuple(entry for entry in self.entries if entry.status == "applied")

    @property
    def quarantined(self) -> tuple[BookedEntry, ...]:
        """The entries that were shown with an amount and not charged."""
        return tuple(entry for entry in self.entries if entry.status == "quarantined")

    @property
    def commits(self) -> tuple[BookedEntry, ...]:
        """The entries that came through a lease."""
        return tuple(entry for entry in self.entries if entry.kind == "commit")

    @property
    def ingests(self) -> tuple[BookedEntry, ...]:
        """The entries that came without a lease."""
        return tuple(entry for entry in self.entries if entry.kind == "ingest")

    @property
    def lines(self) -> Mapping[str, int]:
        """Charged quantity by meter."""
        out: dict[str, int] = {}
        for entry in self.applied:
            for meter, quantity in entry.lines.items():
                out[meter] = out.get(meter, 0) + quantity
        return out

    def __len__(self) -> int:
        return len(self.entries)


def _moment(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, tz=timezone.utc)
