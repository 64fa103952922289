"""What the gate's own books say about an operation whose answer does not tell (gate contract 13).

A commit may be charged although the answer that we have says nothing of it, or says that it was refused: an earlier
answer was lost, another run of the same job was there first, somebody else used the lease. So ratings and allocations
are read back, and `judge_books` decides from what was read: never to book by ingest what may have been charged.

A gate shows its books to a service key that sends ``X-Realm-Admin``, and an empty list to everybody else. So an empty
list proves nothing: our own rating has to be in it, or, where the gate recorded none, anything else of the realm.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Protocol

from .errors import GateAuthError, GateDenied, GateUnavailable, InvalidGateRequest
from .gate.failures import instant
from .gate.models import CommitResult
from .gate.readings import Allocation, Listing, Rating
from .outbox import Row
from .settlement import PRICE_IS_MISSING, Verdict
from .types import ReceiptState

LOOK_TIMEOUT = 3.0
"""Seconds for one exchange of a look-up."""
MOST_RATINGS = 20
"""Ratings whose allocations are asked for; a lease with more of them is for a person to look at."""
_PAGE = 200
_AROUND = timedelta(milliseconds=5)
_CLOSED = "lease_closed_at_commit"


class Reader(Protocol):
    """What a look-up needs of a gate client; every method raises `GateError`."""

    def ratings(
        self,
        *,
        principal_id: str,
        user_id: str | None = None,
        source_ref: str | None = None,
        feature_code: str | None = None,
        rating_kind: str | None = None,
        rated_after: datetime | None = None,
        rated_before: datetime | None = None,
        limit: int = 200,
        timeout: float | None = None,
    ) -> Listing[Rating]:
        """What was recorded."""

    def rating(
        self, *, principal_id: str, rating_id: str, user_id: str | None = None, lines: bool = True, timeout: float
    ) -> Rating | None:
        """One recorded commit or ingest."""

    def allocations(
        self,
        *,
        principal_id: str,
        user_id: str | None = None,
        rating_id: str | None = None,
        limit: int = 200,
        timeout: float | None = None,
    ) -> Listing[Allocation]:
        """What was charged."""


@dataclass(frozen=True, slots=True)
class Booking:
    """One commit or ingest in the gate's books.

    Attributes:
        commit_id: the rating's id.
        operation_id: the label by which we know it; None where it is nobody's that we know.
        quarantined: recorded, and charged nothing.
        reasons: the gate's reason codes.
        shown_xusd: the amount rated.
        charged_xusd: the sum of its allocations; None where the books contradict themselves.
    """

    commit_id: str
    operation_id: str | None
    quarantined: bool
    reasons: tuple[str, ...]
    shown_xusd: int
    charged_xusd: int | None

    @property
    def free(self) -> bool:
        """Whether it was carried out and cost nothing."""
        return not self.quarantined and self.shown_xusd == 0 and self.charged_xusd == 0

    @property
    def charged(self) -> bool:
        """Whether this took money, or was free."""
        return self.free or self.charged_xusd != 0


@dataclass(frozen=True, slots=True)
class Books:
    """Everything that the gate shows of an operation's lease and of its ingest.

    ``gap`` says why this may not be everything; None where it is. ``may_read``: something was shown to us, be it of
    another operation, so that what is not shown is not there.
    """

    bookings: tuple[Booking, ...] = ()
    gap: str | None = None
    may_read: bool = False


# -- reading -----------------------------------------------------------------------------------------------------------


def read_books(gate: Reader, row: Row, commit_id: str | None = None) -> Books:
    """Ask the gate what it booked on the row's lease, and for its ingest where it has one.

    Args:
        gate: a gate client.
        row: the operation.
        commit_id: a commit of ours that the gate answered; where the gate gives its leases no id, it leads to them.

    Raises:
        GateUnavailable: no answer, or none that can be read: to be asked again later.
        GateAuthError: the key is refused as a whole.
    """
    try:
        ratings: dict[str, Rating] = {}
        may_read = False
        source = _source_of(gate, row, commit_id)
        for page in _pages(gate, row, source):
            may_read = may_read or len(_read(page)) > 0
            if page.has_more or len(page) >= _PAGE:
                return Books(gap="there are more ratings than the gate shows at once")
            ratings.update(
                (rating.rating_id, rating) for rating in page if rating.rating_id and _concerns(rating, row, source)
            )
        if len(ratings) > MOST_RATINGS:
            return Books(gap=f"there are {len(ratings)} ratings")
        if not may_read:
            page = gate.ratings(principal_id=row.principal_id, user_id=row.user_id, limit=1, timeout=LOOK_TIMEOUT)
            may_read = len(_read(page)) > 0
        found = tuple(_booking(rating, _allocated(gate, row, rating)) for rating in ratings.values())
        return Books(found, may_read=may_read)
    except (GateAuthError, GateDenied, InvalidGateRequest) as error:
        if error.status == 401:
            raise  # our key as a whole, not what it may read
        return Books(gap=f"the gate does not show them ({error.status}: {error.message})")


def _read(page: Listing[Rating]) -> Listing[Rating]:
    if not page.parsed:
        raise GateUnavailable("the answer to ops/ratings is no list of ratings", status=page.status, retryable=True)
    return page


def _pages(gate: Reader, row: Row, source: str | None) -> Iterator[Listing[Rating]]:
    if source is not None:
        yield gate.ratings(
            principal_id=row.principal_id,
            user_id=row.user_id,
            source_ref=source,
            limit=_PAGE,
            timeout=LOOK_TIMEOUT,
        )
    if row.state.route == "ingest" and row.body is not None:
        # An ingest has no source; it is rated at the time at which its usage occurred (gate contract 13).
        occurred = _occurred(row)
        yield gate.ratings(
            principal_id=row.principal_id,
            user_id=row.user_id,
            feature_code=row.feature_code,
            rating_kind="ingest",
            rated_after=occurred - _AROUND,
            rated_before=occurred + _AROUND,
            limit=_PAGE,
            timeout=LOOK_TIMEOUT,
        )


def _concerns(rating: Rating, row: Row, source: str | None) -> bool:
    """Whether it is on the row's lease, or its own; ingests of others happened at the same time.

    Looked at here, too: what does not know a filter gives what others were charged for.
    """
    if rating.rating_kind == "ingest":
        return rating.labels.get("operation_id") == row.operation_id
    return rating.source_ref in (source, None)


def _source_of(gate: Reader, row: Row, commit_id: str | None) -> str | None:
    if row.lease_id is not None:
        return f"gate_lease:{row.lease_id}"
    if commit_id is None or not row.lease_token:
        return None
    own = gate.rating(
        principal_id=row.principal_id, user_id=row.user_id, rating_id=commit_id, lines=False, timeout=LOOK_TIMEOUT
    )
    return None if own is None else own.source_ref


def _occurred(row: Row) -> datetime:
    assert row.body is not None
    sent = instant(json.loads(row.body).get("occurred_at"))
    return sent or datetime.fromtimestamp(row.ended_at or row.created_at, timezone.utc)


def _allocated(gate: Reader, row: Row, rating: Rating) -> int:
    page = gate.allocations(
        principal_id=row.principal_id,
        user_id=row.user_id,
        rating_id=rating.rating_id,
        limit=_PAGE,
        timeout=LOOK_TIMEOUT,
    )
    if not page.parsed:
        raise GateUnavailable("the answer to ops/allocations is no list of them", status=page.status, retryable=True)
    own = (part for part in page if part.rating_id in (rating.rating_id, None))
    return sum(part.allocated_xusd or 0 for part in own if part.direction != "credit")


def _booking(rating: Rating, allocated: int) -> Booking:
    label = rating.labels.get("operation_id")
    shown = rating.canonical_amount_xusd
    contradicts = shown is None or rating.application_status is None or (not rating.quarantined and shown > allocated)
    return Booking(
        commit_id=rating.rating_id or "",
        operation_id=label if isinstance(label, str) else None,
        quarantined=rating.quarantined,
        reasons=rating.reason_codes,
        shown_xusd=shown or 0,
        charged_xusd=None if contradicts and not allocated else allocated,
    )


# -- judging -----------------------------------------------------------------------------------------------------------


def judge_books(row: Row, books: Books, doubt: Verdict) -> Verdict:
    """Decide what becomes of a settlement in doubt. Pure.

    =====================================================  ===========================================================
    the books show                                         then
    =====================================================  ===========================================================
    a charge for this very operation                       booked, with that amount
    a charge for another run of the same job               already settled: nothing more is sent (design rule 17)
    a charge for anything else, or a contradiction         held for an operator
    our own rating (where there must be one), no charge    ``doubt.uncharged``
    nothing of ours (nothing at all, or not everything)    ``doubt.unproven``
    =====================================================  ===========================================================

    Args:
        row: the operation as it was sent.
        books: what was read.
        doubt: the verdict ``look_up`` that made us read it.
    """
    assert doubt.uncharged is not None
    assert doubt.unproven is not None
    charged = [booking for booking in books.bookings if booking.charged]
    ours = [booking for booking in charged if booking.operation_id == row.operation_id]
    if any(booking.charged_xusd is None for booking in charged):
        return _held(doubt, "The gate's own books contradict themselves: a commit is applied and has no allocation")
    if ours:
        return _booked(row, ours)
    if charged:
        return _somebody_elses(row, charged[0], doubt)
    if books.gap is not None:
        return _unproven(doubt, books.gap)
    # What is recorded on a job's lease is of a run of that job, and so proves as much as a rating of our own.
    if not any(row.derived or booking.operation_id == row.operation_id for booking in books.bookings) and (
        doubt.recorded or not books.may_read
    ):
        return _unproven(doubt, _NOTHING_SHOWN)
    if doubt.uncharged.outcome in ("retry", "retry_slowly"):
        return _quarantined_unseen(row, books, doubt.uncharged)
    return doubt.uncharged


_NOTHING_SHOWN = "they show nothing of it (has the service key the right? does a proxy remove X-Realm-Admin?)"


def _booked(row: Row, ours: list[Booking]) -> Verdict:
    state: ReceiptState = "rebooked" if row.state.is_repair else "booked"
    detail = "found charged in the gate's own books"
    if len(ours) > 1:
        ids = ", ".join(booking.commit_id for booking in ours)
        detail = f"found charged {len(ours)} times in the gate's own books: refund all but one of {ids}"
    total = sum(booking.charged_xusd or 0 for booking in ours)
    return Verdict("done", state, detail, shown=CommitResult(200, True, commit_id=ours[0].commit_id, amount_xusd=total))


def _somebody_elses(row: Row, found: Booking, doubt: Verdict) -> Verdict:
    if row.derived:
        return Verdict("done", "lapsed", f"already settled by another run of this job (commit {found.commit_id})")
    whose = f"operation {found.operation_id}" if found.operation_id else "a commit that is none of ours"
    return _held(
        doubt,
        f"Its lease was charged {found.charged_xusd} XUSD for {whose} (commit {found.commit_id}): "
        "compare the two, then repair this one or drop it",
    )


def _held(doubt: Verdict, detail: str) -> Verdict:
    state: ReceiptState = "refused" if doubt.unproven and doubt.unproven.state == "refused" else "quarantined"
    return Verdict("held", state, f"{doubt.detail}. {detail}")


def _unproven(doubt: Verdict, gap: str) -> Verdict:
    found = doubt.unproven
    assert found is not None
    if found.outcome != "held" or found == doubt.uncharged:
        return found
    return Verdict("held", found.state, f"{found.detail}. The gate's own books do not tell: {gap}")


def _quarantined_unseen(row: Row, books: Books, otherwise: Verdict) -> Verdict:
    """Our commit is in the books and charged nothing, which its answer could not tell."""
    reasons = {
        code for booking in books.bookings if booking.operation_id == row.operation_id for code in booking.reasons
    }
    if row.state.route != "commit":
        return otherwise
    if reasons & PRICE_IS_MISSING and _CLOSED not in reasons:
        codes = ", ".join(sorted(reasons))
        return Verdict("held", "quarantined", f"{codes}: add the missing price or meter at the gate, then repair")
    return Verdict("repair", detail=f"{', '.join(sorted(reasons)) or 'quarantined'}: nothing was charged")
