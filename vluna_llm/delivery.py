"""One delivery of one settlement: its bytes are composed, stored, sent, and what the gate said is stored.

Everything here runs in the settler's workers and may block. What is written is written through a `Store`: the ledger of
this process for its own rows, a claim of the shared outbox for rows that any host may deliver.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Protocol

from .books import Books, judge_books
from .errors import (
    ConfigurationError,
    GateAuthError,
    GateDenied,
    GateError,
    GateUnavailable,
    IdempotencyConflict,
    InvalidGateRequest,
)
from .failpoints import hit
from .gate.models import CancelResult, CommitResult
from .gate.requests import POST_PATHS, GateRequest
from .operation import OperationState
from .outbox import Row
from .outbox.row import named
from .owed import unpriced
from .pricing import PriceBook
from .reporting import attributes_of, receipt_json, span_of, tell_end, tell_rest
from .settlement import (
    Verdict,
    backoff,
    before_repair,
    compose,
    judge_cancel,
    judge_commit,
    judge_error,
    judge_ingest,
    leased,
    pause,
    receipt_of,
    settle_key,
    slow_backoff,
    wants_lease,
    with_bytes_of_rest,
    withdrawn,
)
from .telemetry import Telemetry
from .types import Lease, Receipt, ReceiptState
from .usage.features import MeterNames
from .usage.meters import MetersMode

_LOUD_AFTER = 3


class Elsewhere(Exception):
    """The row is not delivered from here any more: another host has it, or who has it is not known now."""


class Courier(Protocol):
    """What a delivery needs of a gate client: send stored bytes, once, and read the answer."""

    def settle(
        self, request: GateRequest, *, traceparent: str | None, request_id: str | None
    ) -> CommitResult | CancelResult:
        """Send one settlement; raises `GateError`. No retries of its own."""
        ...

    def lease(self, row: Row) -> Lease:
        """Ask for the lease of a job that ran without one; raises `GateError`."""
        ...

    def books(self, row: Row, commit_id: str | None) -> Books:
        """Read in the gate's own books what it charged for this row; raises `GateUnavailable`."""
        ...


class Store(Protocol):
    """Where a row is kept while it is delivered. Every change is durable, against a crash, when ``apply`` returns.

    Every method may raise `Elsewhere`: nothing more is done about the row, and what the gate said is forgotten.
    """

    def get(self, operation_id: str) -> Row | None:
        """The row as it stands; None where it is not delivered from here. `OutboxUnavailable` where nobody knows."""
        ...

    def apply(self, operation_id: str, change: Callable[[Row], Row]) -> Row | None:
        """Replace the row by ``change(row)``; gives the row as it now stands."""
        ...

    def sync(self) -> None:
        """Make what was applied survive a loss of power, too."""
        ...

    def settled(self, row: Row, receipt: Receipt) -> None:
        """Nothing more will be sent for this row by itself."""
        ...


class Delivery:
    """Delivers settlements, one attempt at a time. Any number of threads may share it.

    Args:
        courier: the way to the gate.
        prices: which meters have a price.
        telemetry: what is told.
        meters: the setting ``VLUNA_LLM_METERS``.
        names: the meters of a feature.
        retry_after: seconds until the next attempt, by the number of attempts and jitter.
        heard: told after each exchange whether the gate could do its work.
        books_denied_jobs: book a job by ingest where the gate denies it the lease that its runs share (observe mode,
            in which nothing is refused). A run of it that gets the lease later is then charged beside it.
    """

    def __init__(
        self,
        courier: Courier,
        prices: PriceBook,
        telemetry: Telemetry,
        *,
        meters: MetersMode,
        names: Callable[[str], MeterNames],
        retry_after: Callable[[int, float], float] = backoff,
        heard: Callable[[bool], None] = lambda works: None,
        books_denied_jobs: bool = False,
    ) -> None:
        self._courier = courier
        self._prices = prices
        self._telemetry = telemetry
        self._meters = meters
        self._names = names
        self._backoff = retry_after
        self._heard = heard
        self._books_denied_jobs = books_denied_jobs

    def deliver(self, operation_id: str, store: Store) -> float | None:
        """Try one settlement once; the seconds until the next attempt, None where there is none."""
        row = store.get(operation_id)
        if row is None or row.stage is not None or row.state.settlement not in ("pending", "sent"):
            return None
        looked = row.state.look_first
        if looked and (verdict := self._look_up(row, before_repair(row), None)).outcome != "repair":
            return self._after(store, row, verdict, None)
        try:
            sent = self._ready_to_send(row, store, looked=looked)
            if sent is None:
                return None
            row = sent
            request = self._stored_request(row)
            result = self._courier.settle(request, traceparent=_traceparent(row), request_id=row.request_id)
        except _NoPrice as error:
            self._prices.forget(row.feature_code)
            return self._after(store, row, Verdict("retry_slowly", detail=str(error)), None)
        except _NoLease as error:
            return self._after(store, row, Verdict("retry_slowly", detail=str(error)), None)
        except ConfigurationError as error:
            return self._after(store, row, Verdict("held", "refused", str(error)), None)
        except GateError as error:
            self._heard(not _cannot_work(error))
            hit("delivery.answered")
            return self._after(store, row, self._settled_doubt(row, judge_error(error, row), None), None, error)
        # A page that answers in the gate's place is no gate that works: the others would fare no better.
        self._heard(result.parsed)
        hit("delivery.answered")
        if isinstance(result, CancelResult):
            return self._after(store, row, judge_cancel(result), None)
        if row.state.route == "commit":
            verdict = judge_commit(result, row)
        else:
            verdict = judge_ingest(result, row, repaired=row.state.is_repair)
        return self._after(store, row, self._settled_doubt(row, verdict, result), result)

    def _settled_doubt(self, row: Row, verdict: Verdict, result: CommitResult | None) -> Verdict:
        return self._look_up(row, verdict, result) if verdict.outcome == "look_up" else verdict

    def _look_up(self, row: Row, doubt: Verdict, result: CommitResult | None) -> Verdict:
        """What the gate's own books make of a doubt; where they cannot be asked now, nothing is decided from that.

        Nothing of it is stored: the same bytes, sent again, are answered the same, and lead to the same question.
        """
        try:
            books = self._courier.books(row, result.commit_id if result is not None else None)
        except GateError as error:
            self._heard(not _cannot_work(error))
            return Verdict("retry", detail=f"{doubt.detail}. The gate's own books could not be asked: {error.message}.")
        return judge_books(row, books, doubt)

    # -- before it is sent -----------------------------------------------------------------------------------------

    def _ready_to_send(self, row: Row, store: Store, *, looked: bool = False) -> Row | None:
        """The row with its bytes composed and stored and its state ``sent``; None where nothing is to be sent now.

        ``looked``: the gate's own books showed that nothing was charged for it.

        The prices are asked for before the state is taken, so that usage which turns up meanwhile is not missed.
        """
        composed: GateRequest | None = None
        if looked:
            row = _unbooked(row)
        if wants_lease(row):
            row = self._late_lease(row, store)
        if row.state.rest and row.state.settlement == "pending" and row.state.route == "ingest":
            self._check_rest(row)
        if row.body is None:
            priced = self._priced(row)
            names = self._names(row.feature_code)
            composed = compose(row, mode=self._meters, names=names, priced=priced)
            if (
                row.state.route == "ingest"
                and priced is not None
                and (missing := unpriced(row, names, priced, self._meters))
            ):
                raise _NoPrice(f"{', '.join(missing)}: no price at the gate, and an ingest would book it as 0. Add it.")
            hit("delivery.composed")
        route = row.state.route

        def send(current: Row) -> Row:
            now = _unbooked(current) if looked else current
            if now.state.route != route or now.state.settlement not in ("pending", "sent"):
                return current
            if settle_key(now) != settle_key(row):
                return current  # composed for a key that is used up
            if current.stage is not None:
                return current  # on its way to the shared outbox since it was read: delivered from there
            changed = now.evolve(state=now.state.sent())
            if composed is not None and now.body is None:
                changed = changed.evolve(path=composed.path, body=composed.body)
            return changed

        sent = store.apply(row.operation_id, send)
        if sent is None or sent.stage is not None:
            return None
        if sent.state.settlement != "sent" or sent.body is None:
            if sent.state.settlement != "pending":
                return None
            return self._ready_to_send(sent, store, looked=looked)
        store.sync()
        hit("delivery.stored")
        return sent

    def _check_rest(self, row: Row) -> None:
        """What an ingest booked as 0 does not leave again before the gate tells a price for all of it."""
        assert row.state.rest
        priced = self._priced(row) or frozenset()
        if missing := [line for line in row.state.rest if line.meter_code not in priced]:
            sofar = sum(part.charged_xusd for part in row.state.parts)
            charged = f"{sofar:,} XUSD are charged for the others" if sofar else "Nothing is charged yet"
            raise _NoPrice(f"{named(missing)}: booked as 0, no price at the gate. Add it. {charged}.")

    def _late_lease(self, row: Row, store: Store) -> Row:
        try:
            lease = self._courier.lease(row)
        except (GateDenied, InvalidGateRequest) as error:
            if self._books_denied_jobs:
                return row
            # That the gate denies it does not mean that there is none: it looks at the credit first (gate contract
            # 7.4). A run that has it may have been charged, or be charged when it gets it; an ingest knows of neither.
            raise _NoLease(f"The job's lease is denied ({_reason_of(error)}), and its usage waits for it") from error
        except IdempotencyConflict as error:
            raise ConfigurationError(
                "Another run of this job asked for its lease with another request and may have been charged; "
                "look at the gate's ratings before you repair it."
            ) from error

        def change(now: Row) -> Row:
            state = now.state.late_lease(lease.dialect)
            return now if state is now.state else leased(now, lease, state)

        found = store.apply(row.operation_id, change) or row
        hit("delivery.leased")
        return found

    def _priced(self, row: Row) -> frozenset[str] | None:
        if row.state.route == "cancel" or (row.state.route == "commit" and self._meters != "auto"):
            return None
        try:
            return frozenset(self._prices.prices(row.feature_code, row.principal_id, row.user_id))
        except (InvalidGateRequest, GateDenied):
            return None

    def _stored_request(self, row: Row) -> GateRequest:
        assert row.state.route is not None
        assert row.body is not None
        assert row.path == POST_PATHS[row.state.route]
        return GateRequest.stored(
            row.state.route,
            row.body,
            idempotency_key=settle_key(row),
            principal_id=row.principal_id,
            user_id=row.user_id,
        )

    # -- after it was sent -----------------------------------------------------------------------------------------

    def _after(
        self, store: Store, row: Row, verdict: Verdict, result: CommitResult | None, error: GateError | None = None
    ) -> float | None:
        phase = row.state.route or "commit"
        if result is not None:
            self._tell_hints(row, phase, result)
        elif error is not None:
            self._telemetry.hints(error.hints, phase, attributes_of(row), span=span_of(row))
        if verdict.outcome in ("retry", "retry_slowly"):
            return self._keep(store, row, verdict, error)
        if verdict.outcome == "repair":
            return self._repair(store, row, verdict)
        if verdict.rest:
            return self._keep_rest(store, row, verdict, result)
        assert verdict.state is not None
        return self._finish(store, row, verdict.state, verdict.shown or result, verdict.detail)

    def _keep(self, store: Store, row: Row, verdict: Verdict, error: GateError | None) -> float:
        attempts = row.attempts + 1
        delay = pause(verdict, attempts, random.random(), self._backoff)
        due = time.time() + delay
        loud = verdict.outcome == "retry_slowly"
        store.apply(
            row.operation_id,
            lambda now: now.evolve(next_attempt_at=due, attempts=attempts, last_error=verdict.detail, held=loud),
        )
        hit("delivery.kept")
        if loud or attempts >= _LOUD_AFTER:
            self._telemetry.emit(
                "vluna.settlement.retrying",
                "error" if loud else "warn",
                {
                    **attributes_of(row),
                    "vluna.attempts": attempts,
                    "error.type": type(error).__name__ if error else None,
                },
                span=span_of(row),
                message=f"{verdict.detail} It is kept and tried again in {delay:.1f} s",
            )
        return delay

    def _repair(self, store: Store, row: Row, verdict: Verdict) -> float | None:
        """Book by ingest, under the derived key, what a commit did not charge."""

        def change(now: Row) -> Row:
            state = now.state.quarantined().repair()
            return withdrawn(now).evolve(state=state, last_error=verdict.detail)

        store.apply(row.operation_id, change)
        hit("delivery.repaired")
        self._telemetry.emit(
            "vluna.settlement.repaired",
            "warn",
            attributes_of(row),
            span=span_of(row),
            message=f"{verdict.detail}; booked by ingest instead",
        )
        return 0.0

    def _keep_rest(self, store: Store, row: Row, verdict: Verdict, result: CommitResult | None) -> float | None:
        """Write down in one step what was charged and what was booked as 0, with the bytes in which that goes out.

        Where this is lost in a crash, the gate answers the same to the same bytes, and it is written then.
        """
        self._prices.forget(row.feature_code)
        waits = verdict.outcome == "held"
        rest = None if verdict.whole else verdict.rest
        open_ = row.state.partly_booked(rest, verdict.parts, round_=verdict.round_, wait=waits)
        left = with_bytes_of_rest(withdrawn(row).with_state(open_))
        receipt = receipt_of(left, "quarantined", None, verdict.detail)
        attempts = row.attempts + 1
        again = not verdict.parts and row.state.used_up > 0
        delay = slow_backoff(attempts, random.random()) if again else 0.0
        due = time.time() + delay
        dropped = False

        def change(now: Row) -> Row:
            nonlocal dropped
            dropped = False
            if now.state.settlement != "sent":
                dropped = now.state.settlement == "lapsed" and bool(verdict.parts)
                return self._charged_in_part(now, verdict) if dropped else now
            state = now.state.partly_booked(rest, verdict.parts, round_=verdict.round_, wait=waits)
            changed = withdrawn(now).evolve(state=state, last_error=verdict.detail, held=True)
            if waits:
                return changed.evolve(receipt=receipt_json(receipt), held=False)
            return changed.evolve(path=left.path, body=left.body, attempts=attempts, next_attempt_at=due)

        ended = store.apply(row.operation_id, change)
        hit("delivery.rest")
        if dropped:
            self._tell_dropped(row)
        if ended is None or ended.state.settlement not in ("pending", "quarantined"):
            return None
        if waits:
            tell_end(self._telemetry, row, receipt)
            store.settled(ended, receipt)
            return None
        tell_rest(self._telemetry, ended, sum(line.quantity for line in verdict.rest), verdict.detail)
        return delay

    @staticmethod
    def _charged_in_part(row: Row, verdict: Verdict) -> Row:
        """What an operator dropped while it was on its way was charged in part; what is left of it is given up."""
        total = sum(part.charged_xusd for part in verdict.parts)
        state = row.state.charged_all_the_same()
        shown = CommitResult(200, True, commit_id=verdict.parts[-1].commit_id, amount_xusd=total)
        receipt = receipt_of(row, "rebooked" if state.is_repair else "booked", shown, f"dropped; {verdict.detail}")
        return row.evolve(state=state, receipt=receipt_json(receipt), last_error=receipt.detail)

    def _tell_dropped(self, row: Row) -> None:
        self._telemetry.emit(
            "vluna.settlement.ordered",
            "error",
            attributes_of(row),
            span=span_of(row),
            message="dropped while it was on its way, and CHARGED all the same: undo what was settled by hand",
        )

    def _finish(
        self, store: Store, row: Row, state: ReceiptState, result: CommitResult | None, detail: str | None
    ) -> float | None:
        receipt = receipt_of(row, state, result, detail)
        stored = receipt_json(receipt)
        dropped = False

        def change(now: Row) -> Row:
            nonlocal dropped
            dropped = False
            if now.state.route != row.state.route:
                return now  # usage outranked the cancel while it was on its way
            if state in ("booked", "rebooked") and (charged := now.state.charged_all_the_same()) is not now.state:
                dropped = True
                return now.evolve(state=charged, receipt=stored)
            return now.evolve(
                state=_machine_step(now.state, state), receipt=stored, last_error=detail or now.last_error
            )

        ended = store.apply(row.operation_id, change)
        hit("delivery.finished")
        if ended is not None and ended.state.settlement == "pending":
            return 0.0
        if dropped:
            self._tell_dropped(row)
        tell_end(self._telemetry, row, receipt)
        store.settled(ended or row, receipt)
        return None

    def _tell_hints(self, row: Row, phase: str, result: CommitResult) -> None:
        self._telemetry.hints(result.hints, phase, attributes_of(row), span=span_of(row))
        if any(hint.type.startswith(("pricing.", "feature.")) for hint in result.hints):
            self._prices.forget(row.feature_code)


class _NoPrice(Exception):
    """An ingest would book a line as 0: it waits for the price."""


class _NoLease(Exception):
    """A job's usage waits until the gate gives it the lease that all runs of the job share."""


def _unbooked(row: Row) -> Row:
    """The row of which the books show no charge: no longer a commit, whose bytes were kept until this was known."""
    return withdrawn(row).with_state(row.state.found_unbooked()) if row.state.look_first else row


def _reason_of(error: GateError) -> str:
    return error.reason if isinstance(error, GateDenied) else error.message


def _cannot_work(error: GateError) -> bool:
    """Whether the gate is away or refuses our key, so that no other settlement could fare better."""
    return isinstance(error, GateAuthError) or (isinstance(error, GateUnavailable) and error.retryable)


def _machine_step(state: OperationState, receipt: ReceiptState) -> OperationState:
    if state.look_first and receipt == "booked":
        return state.found_booked()
    if receipt == "booked":
        return state.booked()
    if receipt == "rebooked":
        return state.rebooked()
    if receipt == "quarantined":
        return state.quarantined()
    if receipt == "refused":
        return state.refused()
    return state.booked() if state.route == "cancel" else state.lapsed()


def _traceparent(row: Row) -> str | None:
    span = span_of(row)
    return span.traceparent if span else None
