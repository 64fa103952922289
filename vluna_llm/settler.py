"""The background worker that delivers settlements: one a process, started on first need.

Each (principal, user) is a lane with one delivery at a time: a real gate answers parallel ones with deadlocks (design
rule 16). Lanes are served side by side, and what waits for another attempt steps out of its lane meanwhile.
"""

from __future__ import annotations

import contextlib
import heapq
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from .errors import ConfigurationError, GateDenied, GateError, IdempotencyConflict, InvalidGateRequest
from .gate.models import CancelResult, CommitResult
from .gate.requests import POST_PATHS, GateRequest
from .ledger import Ledger, LedgerClosed
from .operation import OperationState
from .outbox import Row
from .pricing import PriceBook
from .reporting import attributes_of, receipt_json, span_of, tell_end
from .settlement import (
    LONGEST_WAIT,
    Verdict,
    backoff,
    compose,
    judge_cancel,
    judge_commit,
    judge_error,
    judge_ingest,
    leased,
    receipt_of,
    settle_key,
    slow_backoff,
    unpriced,
    wants_lease,
    withdrawn,
)
from .telemetry import Telemetry
from .types import Lease, ReceiptState
from .usage.features import MeterNames
from .usage.meters import MetersMode

MAX_WORKERS = 8
_PRUNE_EVERY = 300.0
_KEEP_SETTLED = 3600.0
_TIDY_EVERY = 60.0
_LOUD_AFTER = 3

Lane = tuple[str, str]


class Courier(Protocol):
    """What the settler needs of a gate client: send stored bytes, once, and read the answer."""

    def settle(
        self, request: GateRequest, *, traceparent: str | None, request_id: str | None
    ) -> CommitResult | CancelResult:
        """Send one settlement; raises `GateError`. No retries of its own."""
        ...

    def lease(self, row: Row) -> Lease:
        """Ask for the lease of a job that ran without one; raises `GateError`."""
        ...


class Settler:
    """Delivers what the ledger holds. Thread-safe; its threads are daemons and own no state that the journal lacks."""

    def __init__(
        self,
        ledger: Ledger,
        courier: Courier,
        prices: PriceBook,
        telemetry: Telemetry,
        *,
        meters: MetersMode,
        names: Callable[[str], MeterNames],
        notes: queue.SimpleQueue[Callable[[], None]] | None = None,
        before_delivery: Callable[[], None] = lambda: None,
        retry_after: Callable[[int, float], float] = backoff,
    ) -> None:
        self._ledger = ledger
        self._courier = courier
        self._prices = prices
        self._telemetry = telemetry
        self._meters = meters
        self._names = names
        self._before_delivery = before_delivery
        self._backoff = retry_after
        self._guard = threading.RLock()
        self._changed = threading.Condition(self._guard)  # work came, or the end
        self._drained = threading.Condition(self._guard)  # something was delivered
        self._lanes: dict[Lane, deque[str]] = {}
        self._ready: deque[Lane] = deque()
        self._busy: set[Lane] = set()
        self._timers: list[tuple[float, int, Lane, str]] = []
        self._sequence = 0
        self._known: set[str] = set()
        self._again: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._stopping = False
        # Shared with the runtimes before and after: a note outlives the runtime in which it was taken.
        self._notes: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue() if notes is None else notes
        self._reaper: threading.Thread | None = None
        self._pruned_at = time.monotonic()

    # -- taking work -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread that takes the notes of finalizers. Called before the first operation."""
        with self._changed:
            if self._reaper is None and not self._stopping:
                self._reaper = _started(self._reap, "vluna-llm-abandoned")

    @property
    def lock(self) -> object:
        """The lock of the settler's own critical sections (`vluna_llm.reentry`)."""
        return self._guard

    def abandoned(self, act: Callable[[], None]) -> None:
        """Run ``act`` soon, on another thread. Safe in a finalizer, in any thread, inside any lock: it only queues."""
        self._notes.put(act)

    def enqueue(self, row: Row, *, due: float = 0.0) -> None:
        """Deliver this row's settlement, not before ``due`` (seconds since the epoch)."""
        with self._changed:
            if row.operation_id in self._known:
                # It is being delivered at this moment: look at it once more when that has ended.
                self._again.add(row.operation_id)
                return
            self._known.add(row.operation_id)
            delay = due - time.time()
            if due and delay > 0:
                # The clock may have jumped since ``due`` was stored; to look early costs one request.
                self._later(row.lane, row.operation_id, min(delay, LONGEST_WAIT))
            else:
                self._now(row.lane, row.operation_id)
            self._staff()

    def _now(self, lane: Lane, operation_id: str) -> None:
        waiting = self._lanes.get(lane)
        if waiting is None:
            waiting = self._lanes[lane] = deque()
        waiting.append(operation_id)
        if len(waiting) == 1 and lane not in self._busy:
            self._ready.append(lane)
        self._changed.notify()

    def _later(self, lane: Lane, operation_id: str, delay: float) -> None:
        self._sequence += 1
        heapq.heappush(self._timers, (time.monotonic() + delay, self._sequence, lane, operation_id))
        self._changed.notify()

    def _staff(self) -> None:
        wanted = len(self._ready) + bool(self._timers)
        if self._idle < wanted and len(self._threads) < MAX_WORKERS and not self._stopping:
            thread = _started(self._work, f"vluna-llm-settler-{len(self._threads)}")
            if thread is not None:
                self._threads.append(thread)

    # -- waiting and ending ----------------------------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        """How many settlements this process still has to deliver, those that wait for another attempt included."""
        with self._changed:
            return len(self._known)

    def flush(self, timeout: float | None) -> bool:
        """Wait at most ``timeout`` seconds until everything is delivered; False where something is left."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.start()
        if self._reaper is None:
            self._take_notes()
        else:
            noted = threading.Event()
            self._notes.put(noted.set)
            if not noted.wait(timeout):
                return False
        with self._changed:
            while self._known and not self._stopping:
                self._staff()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and (left <= 0 or self._nothing_within(left)):
                    return False
                self._drained.wait(left)
            return not self._known

    def _nothing_within(self, seconds: float) -> bool:
        """Whether all that is left waits for a later attempt, so that waiting for it is in vain."""
        if self._ready or self._busy or not self._timers:
            return False
        return self._timers[0][0] > time.monotonic() + seconds

    def stop(self, timeout: float = 1.0) -> None:
        """End the threads; what is not delivered stays in the journal."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._drained.notify_all()
            threads = list(self._threads)
        self._notes.put(_nothing)
        deadline = time.monotonic() + timeout
        for thread in (*threads, *([self._reaper] if self._reaper else [])):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    # -- the threads -----------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        while not self._stopping:
            try:
                act = self._notes.get(timeout=_TIDY_EVERY)
            except queue.Empty:
                self._house_keeping()
            else:
                self._run(act)

    def _take_notes(self) -> None:
        """What `_reap` does, where no thread could be started for it."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._run(self._notes.get_nowait())

    def _run(self, act: Callable[[], None]) -> None:
        try:
            act()
        except LedgerClosed:
            pass  # what it was about is in the journal, for the next runtime
        except Exception:
            self._telemetry.internal_error("settler.abandoned")

    def _work(self) -> None:
        while True:
            with self._changed:
                lane = self._next_lane()
                if lane is None:
                    return
                operation_id = self._lanes[lane].popleft()
            delay: float | None = None
            try:
                self._before_delivery()
                delay = self._deliver(operation_id)
            except LedgerClosed:
                delay = LONGEST_WAIT  # the journal was given up meanwhile: the next runtime delivers it
            except Exception:
                self._telemetry.internal_error("settler.deliver")
                delay = 60.0
            with self._changed:
                self._busy.discard(lane)
                if self._lanes[lane]:
                    self._ready.append(lane)
                else:
                    del self._lanes[lane]
                if operation_id in self._again:
                    # Another settlement took the place of the one that was delivered: it owes nothing to its delays.
                    self._later(lane, operation_id, 0.0)
                elif delay is not None:
                    self._later(lane, operation_id, delay)
                else:
                    self._known.discard(operation_id)
                    self._drained.notify_all()
                self._again.discard(operation_id)
                if delay is not None:
                    self._drained.notify_all()  # who waits may see that waiting is in vain
            self._house_keeping()

    def _next_lane(self) -> Lane | None:
        while not self._stopping:
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                _, _, lane, operation_id = heapq.heappop(self._timers)
                self._now(lane, operation_id)
            if self._ready:
                lane = self._ready.popleft()
                self._busy.add(lane)
                return lane
            self._idle += 1
            self._changed.wait(self._timers[0][0] - now if self._timers else None)
            self._idle -= 1
        return None

    def _house_keeping(self) -> None:
        with contextlib.suppress(Exception):
            self._ledger.journal.checkpoint()
            if time.monotonic() - self._pruned_at > _PRUNE_EVERY:
                self._pruned_at = time.monotonic()
                self._ledger.journal.prune(time.time() - _KEEP_SETTLED)

    # -- one delivery ----------------------------------------------------------------------------------------------

    def _deliver(self, operation_id: str) -> float | None:
        """Deliver one settlement once; the seconds until the next attempt, None where there is none."""
        row = self._ledger.get(operation_id)
        if row is None or row.state.settlement not in ("pending", "sent"):
            return None
        try:
            sent = self._ready_to_send(row)
            if sent is None:
                return None
            row = sent
            request = self._stored_request(row)
            result = self._courier.settle(request, traceparent=_traceparent(row), request_id=row.request_id)
        except _NoPrice as error:
            self._prices.forget(row.feature_code)
            return self._after(row, Verdict("retry_slowly", detail=str(error)), None)
        except ConfigurationError as error:
            return self._after(row, Verdict("held", "refused", str(error)), None)
        except GateError as error:
            return self._after(row, judge_error(error, row), None, error)
        if isinstance(result, CancelResult):
            return self._after(row, judge_cancel(result), None)
        if row.state.route == "commit":
            return self._after(row, judge_commit(result, row), result)
        return self._after(row, judge_ingest(result, row, repaired=row.state.is_repair), result)

    def _ready_to_send(self, row: Row) -> Row | None:
        """The row with its bytes composed and stored and its state ``sent``; None where nothing is to be sent now.

        The prices are asked for before the state is taken, so that usage which turns up meanwhile is not missed.
        """
        composed: GateRequest | None = None
        if wants_lease(row):
            row = self._late_lease(row)
        if row.body is None:
            priced = self._priced(row)
            names = self._names(row.feature_code)
            composed = compose(row, mode=self._meters, names=names, priced=priced)
            if row.state.route == "ingest" and priced is not None and (missing := unpriced(row, names, priced)):
                raise _NoPrice(f"{', '.join(missing)}: no price at the gate, and an ingest would book it as 0. Add it.")
        route = row.state.route

        def send(current: Row) -> Row:
            if current.state.route != route or current.state.settlement not in ("pending", "sent"):
                return current
            changed = current.evolve(state=current.state.sent())
            if composed is not None and current.body is None:
                changed = changed.evolve(path=composed.path, body=composed.body)
            return changed

        sent = self._ledger.apply(row.operation_id, send)
        if sent is None or sent.state.settlement != "sent" or sent.body is None:
            return self._ready_to_send(sent) if sent is not None and sent.state.settlement == "pending" else None
        return sent

    def _late_lease(self, row: Row) -> Row:
        try:
            lease = self._courier.lease(row)
        except (GateDenied, InvalidGateRequest):
            return row  # no lease to share: booked by ingest, as any call that ran without one
        except IdempotencyConflict as error:
            raise ConfigurationError(
                "Another run of this job asked for its lease with another request and may have been charged; "
                "look at the gate's ratings before you repair it."
            ) from error

        def change(now: Row) -> Row:
            state = now.state.late_lease(lease.dialect)
            return now if state is now.state else leased(now, lease, state)

        return self._ledger.apply(row.operation_id, change) or row

    def _priced(self, row: Row) -> frozenset[str] | None:
        if row.state.route == "cancel" or self._meters != "auto":
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

    # -- after a delivery ------------------------------------------------------------------------------------------

    def _after(
        self, row: Row, verdict: Verdict, result: CommitResult | None, error: GateError | None = None
    ) -> float | None:
        phase = row.state.route or "commit"
        if result is not None:
            self._tell_hints(row, phase, result)
        elif error is not None:
            self._telemetry.hints(error.hints, phase, attributes_of(row), span=span_of(row))
        if verdict.outcome in ("retry", "retry_slowly"):
            return self._keep(row, verdict, error)
        if verdict.outcome == "repair":
            return self._repair(row, verdict)
        assert verdict.state is not None
        return self._finish(row, verdict.state, result, verdict.detail)

    def _keep(self, row: Row, verdict: Verdict, error: GateError | None) -> float:
        jitter = random.random()
        attempts = row.attempts + 1
        delay = self._backoff(attempts, jitter) if verdict.outcome == "retry" else slow_backoff(attempts, jitter)
        if verdict.delay is not None:
            delay = max(delay, min(verdict.delay, LONGEST_WAIT))
        due = time.time() + delay
        self._ledger.apply(
            row.operation_id,
            lambda now: now.evolve(next_attempt_at=due, attempts=attempts, last_error=verdict.detail),
        )
        loud = verdict.outcome == "retry_slowly"
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

    def _repair(self, row: Row, verdict: Verdict) -> float | None:
        """Book by ingest, under the derived key, what a commit did not charge."""

        def change(now: Row) -> Row:
            state = now.state.quarantined().repair()
            return withdrawn(now).evolve(state=state, last_error=verdict.detail)

        self._ledger.apply(row.operation_id, change)
        self._telemetry.emit(
            "vluna.settlement.repaired",
            "warn",
            attributes_of(row),
            span=span_of(row),
            message=f"{verdict.detail}; booked by ingest instead",
        )
        return 0.0

    def _finish(self, row: Row, state: ReceiptState, result: CommitResult | None, detail: str | None) -> float | None:
        receipt = receipt_of(row, state, result, detail)
        stored = receipt_json(receipt)

        def change(now: Row) -> Row:
            if now.state.route != row.state.route:
                return now  # usage outranked the cancel while it was on its way
            return now.evolve(
                state=_machine_step(now.state, state), receipt=stored, last_error=detail or now.last_error
            )

        ended = self._ledger.apply(row.operation_id, change)
        if ended is not None and ended.state.settlement == "pending":
            return 0.0
        tell_end(self._telemetry, row, receipt)
        self._ledger.settled(ended or row, receipt)
        return None

    def _tell_hints(self, row: Row, phase: str, result: CommitResult) -> None:
        self._telemetry.hints(result.hints, phase, attributes_of(row), span=span_of(row))
        if any(hint.type.startswith(("pricing.", "feature.")) for hint in result.hints):
            self._prices.forget(row.feature_code)


class _NoPrice(Exception):
    """An ingest would book a line as 0: it waits for the price."""


def _started(target: Callable[[], None], name: str) -> threading.Thread | None:
    """A daemon thread; None where there can be no more of them, or the interpreter is ending.

    What it would have done is in the journal, and is tried again with the next settlement or by the next process.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def _nothing() -> None:
    """Wakes the thread that takes notes."""


def _machine_step(state: OperationState, receipt: ReceiptState) -> OperationState:
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
