"""The background worker that delivers settlements: one a process, started on first need.

Settlements of one (principal, user) go one after another, because parallel ones deadlock the gate (design rule 16);
many customers are served at once. A settlement that waits for its next attempt never blocks its lane.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import json
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from .errors import ConfigurationError, GateDenied, GateError, InvalidGateRequest
from .gate.models import CancelResult, CommitResult
from .gate.requests import POST_PATHS, GateRequest
from .ledger import Ledger
from .operation import OperationState
from .outbox import Row
from .pricing import PriceBook
from .settlement import (
    Verdict,
    backoff,
    compose,
    judge_cancel,
    judge_commit,
    judge_error,
    judge_ingest,
    receipt_of,
    settle_key,
    slow_backoff,
    unpriced,
    withdrawn,
)
from .telemetry import SpanRef, Telemetry
from .types import Receipt, ReceiptState
from .usage.features import MeterNames
from .usage.meters import MetersMode

MAX_WORKERS = 8
_PRUNE_EVERY = 300.0
_KEEP_SETTLED = 3600.0
_LOUD_AFTER = 3

Lane = tuple[str, str]


class Courier(Protocol):
    """What the settler needs of a gate client: send stored bytes, once, and read the answer."""

    def settle(
        self, request: GateRequest, *, traceparent: str | None, request_id: str | None
    ) -> CommitResult | CancelResult:
        """Send one settlement; raises `GateError`. No retries of its own."""
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
        guard = threading.RLock()
        self._changed = threading.Condition(guard)  # work came, or the end
        self._drained = threading.Condition(guard)  # something was delivered
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
        self._orphans: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._reaper: threading.Thread | None = None
        self._pruned_at = time.monotonic()

    # -- taking work -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread that takes abandoned operations from finalizers. Called before the first operation."""
        with self._changed:
            if self._reaper is None and not self._stopping:
                self._reaper = threading.Thread(target=self._reap, name="vluna-llm-abandoned", daemon=True)
                self._reaper.start()

    def abandoned(self, act: Callable[[], None]) -> None:
        """Run ``act`` soon, on another thread. Safe in a finalizer, in any thread, inside any lock: it only queues."""
        self._orphans.put(act)

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
                self._later(row.lane, row.operation_id, delay)
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
            thread = threading.Thread(target=self._work, name=f"vluna-llm-settler-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    # -- waiting and ending ----------------------------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        """How many settlements this process still has to deliver, those that wait for another attempt included."""
        with self._changed:
            return len(self._known)

    def flush(self, timeout: float | None) -> bool:
        """Wait at most ``timeout`` seconds until everything is delivered; False where something is left."""
        drained = threading.Event()
        if self._reaper is not None:
            self._orphans.put(drained.set)
            deadline = None if timeout is None else time.monotonic() + timeout
            if not drained.wait(timeout):
                return False
        else:
            deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while self._known and not self._stopping:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._drained.wait(left)
            return not self._known

    def stop(self, timeout: float = 1.0) -> None:
        """End the threads; what is not delivered stays in the journal."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._drained.notify_all()
            threads = list(self._threads)
        self._orphans.put(None)
        deadline = time.monotonic() + timeout
        for thread in (*threads, *([self._reaper] if self._reaper else [])):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    # -- the threads -----------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        while True:
            act = self._orphans.get()
            if act is None:
                return
            try:
                act()
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
            except Exception:
                self._telemetry.internal_error("settler.deliver")
                delay = 60.0
            with self._changed:
                self._busy.discard(lane)
                if self._lanes[lane]:
                    self._ready.append(lane)
                else:
                    del self._lanes[lane]
                if delay is None and operation_id not in self._again:
                    self._known.discard(operation_id)
                    self._drained.notify_all()
                else:
                    self._later(lane, operation_id, delay or 0.0)
                self._again.discard(operation_id)
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
        self._ledger.journal.checkpoint()
        if time.monotonic() - self._pruned_at > _PRUNE_EVERY:
            self._pruned_at = time.monotonic()
            with contextlib.suppress(Exception):
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
        return self._after(
            row, judge_ingest(result, row, repaired=row.last_error is not None and _was_repair(row)), result
        )

    def _ready_to_send(self, row: Row) -> Row | None:
        """The row with its bytes composed and stored and its state ``sent``; None where nothing is to be sent now.

        The prices are asked for before the state is taken, so that usage which turns up meanwhile is not missed.
        """
        composed: GateRequest | None = None
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
            changed = dataclasses.replace(current, state=current.state.sent())
            if composed is not None and current.body is None:
                changed = dataclasses.replace(changed, path=composed.path, body=composed.body)
            return changed

        sent = self._ledger.apply(row.operation_id, send)
        if sent is None or sent.state.settlement != "sent" or sent.body is None:
            return self._ready_to_send(sent) if sent is not None and sent.state.settlement == "pending" else None
        return sent

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
            delay = max(delay, verdict.delay)
        due = time.time() + delay
        self._ledger.apply(
            row.operation_id,
            lambda now: dataclasses.replace(
                now, next_attempt_at=due, attempts=attempts, last_error=_note(now, verdict.detail)
            ),
        )
        loud = verdict.outcome == "retry_slowly"
        if loud or attempts >= _LOUD_AFTER:
            self._telemetry.emit(
                "vluna.settlement.retrying",
                "error" if loud else "warn",
                {**attributes_of(row), "vluna.attempts": attempts, "error.type": type(error).__name__},
                span=span_of(row),
                message=f"{verdict.detail} It is kept and tried again in {delay:.1f} s",
            )
        return delay

    def _repair(self, row: Row, verdict: Verdict) -> float | None:
        """Book by ingest, under the derived key, what a commit did not charge."""

        def change(now: Row) -> Row:
            state = now.state.quarantined().repair()
            return dataclasses.replace(withdrawn(now), state=state, last_error=f"{_REPAIR}{verdict.detail}")

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
        stored = _receipt_json(receipt)

        def change(now: Row) -> Row:
            if now.state.route != row.state.route:
                return now  # usage outranked the cancel while it was on its way
            return dataclasses.replace(
                now, state=_machine_step(now.state, state), receipt=stored, last_error=detail or now.last_error
            )

        ended = self._ledger.apply(row.operation_id, change)
        if ended is not None and ended.state.settlement == "pending":
            return 0.0
        self._tell_end(row, state, receipt)
        self._ledger.settled(ended or row, receipt)
        return None

    def _tell_hints(self, row: Row, phase: str, result: CommitResult) -> None:
        self._telemetry.hints(result.hints, phase, attributes_of(row), span=span_of(row))
        if any(hint.type.startswith(("pricing.", "feature.")) for hint in result.hints):
            self._prices.forget(row.feature_code)

    def _tell_end(self, row: Row, state: ReceiptState, receipt: Receipt) -> None:
        extra = {
            "vluna.commit.id": receipt.commit_id,
            "vluna.amount_xusd": receipt.amount_xusd,
            "vluna.usage.source": receipt.usage_source,
            "gen_ai.usage.input_tokens": receipt.input_tokens,
            "gen_ai.usage.output_tokens": receipt.output_tokens,
        }
        attributes = {**attributes_of(row), **extra}
        if state in ("booked", "rebooked"):
            self._telemetry.emit(
                "vluna.settlement.booked",
                "warn" if receipt.detail else "debug",
                attributes,
                span=span_of(row),
                message=receipt.detail,
            )
        elif state == "quarantined":
            self._telemetry.emit(
                "vluna.settlement.quarantined",
                "error",
                attributes,
                span=span_of(row),
                message=f"NOT CHARGED: {receipt.detail}",
            )
        elif state == "refused":
            self._telemetry.emit(
                "vluna.settlement.refused",
                "error",
                attributes,
                span=span_of(row),
                message=f"NOT CHARGED: {receipt.detail}",
            )


_REPAIR = "repair: "


def _was_repair(row: Row) -> bool:
    return (row.last_error or "").startswith(_REPAIR)


def _note(row: Row, detail: str | None) -> str | None:
    """The error to keep with a row; that it is a repair is never forgotten."""
    return f"{_REPAIR}{detail}" if _was_repair(row) else detail


class _NoPrice(Exception):
    """An ingest would book a line as 0: it waits for the price."""


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


def _receipt_json(receipt: Receipt) -> str:
    kept: dict[str, Any] = {
        "state": receipt.state,
        "amount_xusd": receipt.amount_xusd,
        "charged_xusd": receipt.charged_xusd,
        "commit_id": receipt.commit_id,
        "hints": [hint.as_dict() for hint in receipt.hints],
        "detail": receipt.detail,
    }
    return json.dumps({name: value for name, value in kept.items() if value not in (None, [])}, default=str)


def _traceparent(row: Row) -> str | None:
    span = span_of(row)
    return span.traceparent if span else None


def span_of(row: Row) -> SpanRef | None:
    """The span in which the model call ran."""
    return SpanRef(row.trace_id, row.span_id) if row.trace_id and row.span_id else None


def attributes_of(row: Row) -> Mapping[str, Any]:
    """The telemetry attributes that identify an operation."""
    return {
        "vluna.operation.id": row.operation_id,
        "vluna.principal.id": row.principal_id,
        "vluna.feature.code": row.feature_code,
        "vluna.lease.id": row.lease_id,
        "vluna.request.id": row.request_id,
        "gen_ai.request.model": row.model,
        "gen_ai.response.id": row.response_id,
    }
