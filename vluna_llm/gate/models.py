"""What the gate answers on the way of every call: leases, commits, cancels.

Frozen, tolerant and light, because they are read for every model call. Unknown members stay in ``raw``. Money is in
XUSD and quantities are in the unit of the meter, both integers (strings on the wire). A 2xx answer that cannot be read
is still an answer (design rule 7): it comes back with ``parsed=False`` and its ``raw``, and nothing is raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..types import Hint

UNPRICED_LINE = "line.unpriced"
"""Reason given where a line shows that its meter has no price although no hint said so."""


@dataclass(frozen=True, slots=True)
class CommitLine:
    """One line of a booking as the gate priced it. ``source`` is ``live`` or ``missing`` (no price)."""

    meter_code: str
    quantity: int | None = None
    amount_xusd: int | None = None
    unit_price_xusd: int | None = None
    unit_quantity: int | None = None
    cost_xusd: int | None = None
    source: str | None = None
    rating_status: str | None = None
    line_id: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def unpriced(self) -> bool:
        """Whether the meter had no price: the line shows 0 and charges nothing."""
        return self.source == "missing" or self.rating_status == "missing_price"


@dataclass(frozen=True, slots=True)
class CommitResult:
    """The gate's answer to a commit. **HTTP 200 does not mean billed**: look at ``quarantined`` (gate contract 9.2).

    Attributes:
        commit_id: the rating's id, readable later through ``rating`` and ``allocations``.
        amount_xusd: the amount shown; charged only where ``charged`` is True.
        cost_xusd: the provider cost as configured at the gate; not for customers.
        quarantined: the gate recorded the commit and charged nothing.
        not_charged_reasons: the hint types (or ``line.unpriced``) that say so.
        unpriced_lines: lines whose meter has no price.
        parsed: whether the answer could be read; where not, only ``status``, ``raw`` and ``request_id`` mean anything.
    """

    status: int
    parsed: bool
    commit_id: str | None = None
    amount_xusd: int | None = None
    cost_xusd: int | None = None
    lines: tuple[CommitLine, ...] = ()
    hints: tuple[Hint, ...] = ()
    quarantined: bool = False
    not_charged_reasons: tuple[str, ...] = ()
    budget_id: str | None = None
    trace_id: str | None = None
    request_id: str | None = None
    raw: Any = field(default=None, repr=False, compare=False)

    @property
    def unpriced_lines(self) -> tuple[CommitLine, ...]:
        """Lines that charge nothing because their meter has no price."""
        return tuple(line for line in self.lines if line.unpriced)

    @property
    def charged(self) -> bool | None:
        """Whether the gate charged ``amount_xusd``; None where the answer could not be read."""
        return not self.quarantined if self.parsed else None

    def hint(self, kind: str) -> Hint | None:
        """The first hint of this type, or None."""
        return next((hint for hint in self.hints if hint.type == kind), None)


@dataclass(frozen=True, slots=True)
class IngestResult(CommitResult):
    """The gate's answer to an ingest: never quarantined, but unpriced lines charge nothing, without any hint.

    Priced lines of the same request are charged (gate contract 7.8), so only ``unpriced_lines`` are to be sent again,
    under a new key, once they have a price. ``charged`` is False only where every line is unpriced.
    """

    @property
    def charged(self) -> bool | None:
        """Whether at least one line was charged; None where the answer could not be read."""
        if not self.parsed:
            return None
        return not self.lines or any(not line.unpriced for line in self.lines)

    @property
    def fully_charged(self) -> bool | None:
        """Whether every line was charged; None where the answer could not be read."""
        return None if not self.parsed else not self.unpriced_lines


@dataclass(frozen=True, slots=True)
class CancelResult:
    """The gate's answer to a cancel.

    ``cancelled`` is True only where the lease was still active; ``lapsed`` where this gate has no cancel and the lease
    simply runs out (design rule 10). Nothing is ever given back: authorizing reserves nothing.
    """

    status: int | None
    parsed: bool
    cancelled: bool = False
    lapsed: bool = False
    hints: tuple[Hint, ...] = ()
    trace_id: str | None = None
    request_id: str | None = None
    raw: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One item of a batch answer. ``status`` is the gate's own: committed, duplicate, invalid or failed."""

    index: int
    status: str
    commit: CommitResult | None = None
    error_type: str | None = None
    error_details: str | None = None


BatchWarning = Literal["rolled_back", "leases_still_active", "hints_hidden"]


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The gate's answer to a batch of commits. Prefer single commits; the settler never sends batches.

    Three things that a batch does not tell (gate contract 7.7), also listed in ``warnings``:

    * ``rolled_back``: an item failed with ``SERVER.ERROR``. All items share one transaction, so **nothing of this
      answer may be trusted**: items said to be committed were undone. All items but the failed one have to go out
      once more, in a request with an idempotency key of its own.
    * ``leases_still_active``: a committed item leaves its lease open; another commit on it under another key is
      charged a second time.
    * ``hints_hidden``: whether an item was charged cannot be seen. Send it again as a single commit under the item's
      key: that answer has the hints.
    """

    status: int
    parsed: bool
    items: tuple[BatchItem, ...] = ()
    committed_count: int | None = None
    failed_count: int | None = None
    warnings: tuple[BatchWarning, ...] = ()
    trace_id: str | None = None
    request_id: str | None = None
    raw: Any = field(default=None, repr=False, compare=False)

    @property
    def trustworthy(self) -> bool:
        """Whether items said to be committed were at least recorded; not that they were charged."""
        return self.parsed and "rolled_back" not in self.warnings
