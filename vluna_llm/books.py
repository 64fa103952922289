"""What the gate's own books say about an operation whose answer does not tell (gate contract 13).

A commit may be charged although the answer that we have says nothing of it, or says that it was refused: an earlier
answer was lost, another run of the same job was there first, somebody else used the lease. So ratings and allocations
are read back, and `judge_books` decides from what was read: never to book by ingest what may have been charged.

A gate shows its books to a service key that sends ``X-Realm-Admin``, and an empty list to everybody else. So an empty
list proves nothing: our own rating has to be in it, or, where the gate recorded none, anything else of the realm.

An ingest books lines without a price as 0. Which these are is read from the lines of its rating, and what is left of a
settlement is what the ingest with the highest number of all that share its key left: each books what the one before it
could not. So whoever reads the books comes to the same lines under the same next key, and they are charged once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import Protocol

from .errors import GateAuthError, GateDenied, GateUnavailable, InvalidGateRequest
from .gate.failures import instant
from .gate.models import CommitResult
from .gate.readings import Allocation, Listing, RatedRecord, Rating, WalletBalance
from .operation import Part
from .outbox import Row
from .outbox.row import unbilled as total_unbilled
from .settlement import PRICE_IS_MISSING, ROUND_LABEL, SETTLEMENT_LABEL, Verdict, unbilled
from .types import ReceiptState
from .usage.meters import MeterLine

LOOK_TIMEOUT = 3.0
"""Seconds for one exchange of a look-up."""
MOST_RATINGS = 20
"""Ratings whose allocations are asked for; a lease with more of them is for a person to look at."""
MOST_PAGES = 10
"""Pages of a customer's ingests that are looked through for those of other runs of a job, the newest first."""
_PAGE = 200
_AROUND = timedelta(milliseconds=5)
_CLOSED = "lease_closed_at_commit"
_DIGITS = 10  # of the number of a key: what is longer is none of ours


class Reader(Protocol):
    """What a look-up needs of a gate client; every method raises `GateError`."""

    def ratings(
        self,
        *,
        principal_id: str,
        user_id: str | None = None,
        source_ref: str | None = None,
        billing_user_id: str | None = None,
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

    def wallet_balance(
        self, *, principal_id: str, user_id: str | None = None, timeout: float | None = None
    ) -> WalletBalance:
        """Whose purse it is in the gate's own ids."""


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
        round_: of an ingest the number of its key, 0 for the first one; None for a commit.
        at: when it was rated; of an ingest, when its usage occurred.
        unpriced: its lines that were booked as 0 for want of a price.
        untold: such lines there are, and the books do not show which.
    """

    commit_id: str
    operation_id: str | None
    quarantined: bool
    reasons: tuple[str, ...]
    shown_xusd: int
    charged_xusd: int | None
    round_: int | None = None
    at: datetime | None = None
    unpriced: tuple[MeterLine, ...] = ()
    untold: bool = False

    @property
    def free(self) -> bool:
        """Whether it was carried out and cost nothing, by its prices."""
        if self.unpriced or self.untold:
            return False
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
        gap = None
        if row.derived and row.state.route == "ingest" and row.body is not None:
            of_the_job, gap = _of_the_job(gate, row)
            may_read = may_read or bool(of_the_job)
            ratings.update((rating.rating_id or "", rating) for rating in of_the_job)
        if len(ratings) > MOST_RATINGS:
            return Books(gap=f"there are {len(ratings)} ratings")
        if not may_read:
            page = gate.ratings(principal_id=row.principal_id, user_id=row.user_id, limit=1, timeout=LOOK_TIMEOUT)
            may_read = len(_read(page)) > 0
        found = tuple(
            _booking(rating, _allocated(gate, row, rating), _lines(gate, row, rating)) for rating in ratings.values()
        )
        return Books(found, gap, may_read=may_read)
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


def _of_the_job(gate: Reader, row: Row) -> tuple[list[Rating], str | None]:
    """The ingests under this key of all runs of a job, whenever they ran, and why there may be more.

    The gate shows no keys, so a label tells them. Pages are turned by time: its cursor skips a row per page.
    """
    user = gate.wallet_balance(principal_id=row.principal_id, user_id=row.user_id, timeout=LOOK_TIMEOUT)
    before: datetime | None = None
    found: dict[str, Rating] = {}
    for _ in range(MOST_PAGES):
        page = _read(
            gate.ratings(
                principal_id=row.principal_id,
                user_id=row.user_id,
                billing_user_id=user.billing_user_id,
                feature_code=row.feature_code,
                rating_kind="ingest",
                rated_before=before,
                limit=_PAGE,
                timeout=LOOK_TIMEOUT,
            )
        )
        for rating in page:
            if rating.rating_id and rating.labels.get(SETTLEMENT_LABEL) == row.settle_key:
                found[rating.rating_id] = rating
        times = [rating.rated_at for rating in page if rating.rated_at is not None]
        if (not page.has_more and len(page) < _PAGE) or not times:
            return list(found.values()), None
        oldest = min(times) + timedelta(milliseconds=1)
        if oldest == before:
            break
        before = oldest
    return list(found.values()), "there are more ingests of this customer than are looked through"


def _concerns(rating: Rating, row: Row, source: str | None) -> bool:
    """Whether it is on the row's lease, or its own; ingests of others happened at the same time.

    Looked at here, too: what does not know a filter gives what others were charged for.
    """
    if rating.rating_kind == "ingest":
        labels = rating.labels
        return row.operation_id == labels.get("operation_id") or row.settle_key == labels.get(SETTLEMENT_LABEL)
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


def _lines(gate: Reader, row: Row, rating: Rating) -> tuple[RatedRecord, ...]:
    """The lines of an ingest: only they tell that some had no price. Those of a commit are charged as a whole."""
    if rating.rating_kind != "ingest" or not rating.rating_id:
        return ()
    whole = gate.rating(
        principal_id=row.principal_id, user_id=row.user_id, rating_id=rating.rating_id, timeout=LOOK_TIMEOUT
    )
    return whole.rated_records if whole is not None else ()


def _booking(rating: Rating, allocated: int, lines: tuple[RatedRecord, ...]) -> Booking:
    label = rating.labels.get("operation_id")
    missing = [line for line in lines if line.unpriced]
    unpriced = tuple(
        MeterLine(line.meter_code, line.quantity_minor) for line in missing if line.meter_code and line.quantity_minor
    )
    some = bool(missing) or "pricing_not_configured" in rating.reason_codes
    shown = rating.canonical_amount_xusd
    contradicts = shown is None or rating.application_status is None or (not rating.quarantined and shown > allocated)
    return Booking(
        commit_id=rating.rating_id or "",
        operation_id=label if isinstance(label, str) else None,
        quarantined=rating.quarantined,
        reasons=rating.reason_codes,
        shown_xusd=shown or 0,
        charged_xusd=None if contradicts and not allocated else allocated,
        round_=_round(rating),
        at=rating.rated_at,
        unpriced=tuple(sorted(unpriced, key=lambda line: line.meter_code)),
        untold=rating.rating_kind == "ingest" and some and (not unpriced or len(unpriced) < len(missing)),
    )


def _round(rating: Rating) -> int | None:
    if rating.rating_kind != "ingest":
        return None
    number = rating.labels.get(ROUND_LABEL)
    return int(number) if isinstance(number, str) and number.isdecimal() and len(number) < _DIGITS else 0


# -- judging -----------------------------------------------------------------------------------------------------------


def judge_books(row: Row, books: Books, doubt: Verdict) -> Verdict:
    """Decide what becomes of a settlement in doubt. Pure.

    =====================================================  ===========================================================
    the books show                                         then
    =====================================================  ===========================================================
    an ingest under our key, or a later one of the same    as it was answered: booked, or what it booked as 0 is sent
                                                           again, alone, by whoever is first
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
    if row.state.route == "ingest":
        rounds = [booking for booking in books.bookings if booking.round_ is not None]
        commits = tuple(booking for booking in books.bookings if booking.round_ is None)
        since = [booking for booking in rounds if (booking.round_ or 0) >= row.state.used_up]
        if since and not any(booking.charged for booking in commits):
            return _rounds(row, since, doubt)
        books = replace(books, bookings=(*commits, *since))  # what came before is known
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


def _rounds(row: Row, rounds: list[Booking], doubt: Verdict) -> Verdict:
    """The ingests under our key and later ones: what they charged, and what the last of them left."""
    last = max(rounds, key=lambda booking: booking.round_ or 0)
    if last.untold:
        return _unproven(doubt, f"they do not show which lines of {last.commit_id} had no price")
    if any(booking.charged_xusd is None for booking in rounds):
        return _held(doubt, "The gate's own books contradict themselves: an ingest is applied and has no allocation")
    ours = [booking for booking in rounds if _is_ours(booking, row)]
    parts = tuple(Part(one.commit_id, one.charged_xusd or 0) for one in ours if one.charged_xusd)
    if last.unpriced:
        left = sum(line.quantity for line in last.unpriced)
        alone = len(rounds) == 1 and row.state.rest is None and not row.derived
        whole = alone and left == total_unbilled(row)
        return unbilled(row, last.unpriced, parts, last.round_ or 0, whole=whole)
    if not ours and not row.state.parts:
        return _somebody_elses(row, last, doubt)
    state: ReceiptState = "rebooked" if row.state.is_repair else "booked"
    detail = "found charged in the gate's own books"
    if last not in ours:
        detail += f", the rest by another run of this job ({last.commit_id})"
    total = sum(part.charged_xusd for part in parts)
    return Verdict("done", state, detail, shown=CommitResult(200, True, commit_id=last.commit_id, amount_xusd=total))


def _is_ours(booking: Booking, row: Row) -> bool:
    """Whether this run booked it. Runs in the background have one operation id on all hosts, and times of their own."""
    if booking.operation_id != row.operation_id:
        return False
    return not row.derived or booking.at is None or abs(booking.at - _occurred(row)) <= _AROUND


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
