"""What a `Vluna` runs on in one process: journal, ledger, settler and gate clients, made on first need.

A forked child gets its own (it must not touch its parent's journal, threads or connections); so does a process that
goes on after ``close``.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .books import Books, read_books
from .errors import GateUnavailable, OutboxUnavailable
from .gate import answers
from .gate.client import GateClient
from .gate.client_async import AsyncGateClient
from .gate.models import CancelResult, CommitResult
from .gate.requests import GateRequest
from .ledger import Ledger
from .obey import AT_ONCE, carry_out
from .outbox import Journal, Row
from .outbox.waiting import depths
from .pricing import Price, PriceBook, Prices
from .reentry import any_held
from .settings import Settings
from .settlement import authorize_arguments
from .settler import Settler
from .sharing import Sharing, open_shared
from .telemetry import Telemetry, log
from .types import Lease
from .usage.estimate import Estimate, Estimator
from .usage.features import MeterNames
from .usage.types import TokenUsage

SETTLE_TIMEOUT = 5.0
PATIENCE = 0.2
"""Seconds for which threads are waited for that end: those in the middle of an exchange do not come."""
_ORDERS_EVERY = 2.0
_ADOPT_AT_ONCE = 500
_ALL = sys.maxsize
_ADOPT_EVERY = 10.0
"""Seconds between two looks for journals of processes that died meanwhile."""
_MAX_COUNTED_PRINCIPALS = 10_000


class _Courier:
    """The settler's way to the gate."""

    def __init__(self, client: GateClient) -> None:
        self._client = client

    def settle(
        self, request: GateRequest, *, traceparent: str | None, request_id: str | None
    ) -> CommitResult | CancelResult:
        answer = self._client.send(request, timeout=SETTLE_TIMEOUT, traceparent=traceparent, request_id=request_id)
        return _PARSERS[request.kind](answer, now=time.time())

    def lease(self, row: Row) -> Lease:
        return self._client.authorize(**authorize_arguments(row), deadline=SETTLE_TIMEOUT)

    def books(self, row: Row, commit_id: str | None) -> Books:
        return read_books(self._client, row, commit_id)


_PARSERS: Mapping[str, Callable[..., CommitResult | CancelResult]] = {
    "commit": answers.parse_commit,
    "ingest": answers.parse_ingest,
    "cancel": answers.parse_cancel,
}


class Runtime:
    """The parts of one process, wired. Made by `Vluna`, which alone decides when a new one is needed."""

    def __init__(
        self,
        settings: Settings,
        gate: GateClient,
        async_gate: AsyncGateClient,
        estimator: Estimator,
        telemetry: Telemetry,
        names: Callable[[str], MeterNames],
        *,
        notes: queue.SimpleQueue[Callable[[], None]],
        predecessor: Path | None = None,
        tell_back: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.gate = gate
        self.async_gate = async_gate
        self.estimator = estimator
        self.telemetry = telemetry
        self.names = names
        self.forgone: Counter[str] = Counter()
        self._lessons: deque[tuple[str, Estimate, TokenUsage]] = deque(maxlen=1_000)
        self.closed = False
        self._looked_for_shared = False
        self._guard = threading.RLock()
        self.outbox_failure: OutboxUnavailable | None = None
        try:
            journal = Journal(settings.outbox_directory())
        except OutboxUnavailable as error:
            self.outbox_failure = error
            journal = Journal(None)
            log.error(
                "%s; operations are kept in memory only, so a crash loses them. Set VLUNA_LLM_OUTBOX to a directory "
                "that can be written.",
                error,
            )
        self.ledger = Ledger(journal, telemetry)
        self.prices = PriceBook(self._fetch_prices)
        self.settler = Settler(
            self.ledger,
            _Courier(gate),
            self.prices,
            telemetry,
            meters=settings.meters,
            names=names,
            notes=notes,
            before_delivery=self._apply_lessons,
            tell_back=tell_back,
            books_denied_jobs=settings.mode == "observe",
            sharing=self._shared_stage(),
        )
        # Whether this thread is inside a critical section of this runtime.
        self.entered = any_held(self._guard, *self.ledger.locks, *self.settler.locks)
        if predecessor is not None:
            # At once: operations that began before ``close`` end in this runtime, and must find their rows.
            self._adopt([predecessor])
        # Not on the caller's path: a directory may hold the backlog of a long outage.
        self.settler.keeper.in_turn(self._adopt)
        self.settler.keeper.every(_ADOPT_EVERY * random.uniform(0.8, 1.2), "adopt", self._adopt)
        self.settler.keeper.note(self._carry_out_orders)
        self.settler.keeper.every(_ORDERS_EVERY, "orders", self._carry_out_orders)
        self._unwatch = telemetry.gauges.watch(lambda: depths(journal.totals()))
        self.settler.start()

    def _shared_stage(self) -> Sharing | None:
        url = self.settings.outbox_shared
        if url is None:
            return None
        base_url, realm_id, _, _ = self.settings.require_credentials()
        shared = open_shared(url.get_secret_value(), base_url, realm_id)
        return Sharing(shared, self.ledger, self.telemetry, margin=SETTLE_TIMEOUT + 1.0, meters=self.settings.meters)

    def _adopt(self, paths: Sequence[Path] | None = None) -> None:
        """Take over what dead processes left behind in the same directory, for the same gate and realm."""
        base_url, realm_id, _, _ = self.settings.require_credentials()
        waiting = lost = total = 0
        adopted = self.ledger.adopt(base_url, realm_id, paths)
        try:
            while batch := list(itertools.islice(adopted, _ADOPT_AT_ONCE)):
                total += len(batch)
                # An operator's orders first, which arrived with the rows: what was dropped is not delivered.
                ordered = carry_out(self.ledger, self.settler, self.telemetry, _ALL)
                for row in batch:
                    now = (self.ledger.known(row.operation_id) or row) if ordered else row
                    if now.state.settlement in ("pending", "sent"):
                        waiting += 1
                        self.settler.enqueue(now, due=now.next_attempt_at)
                    lost += row.state.settlement == "lost"
                self.settler.keeper.catch_up()
        except Exception:
            self.settler.read_again()  # what has moved is in this journal, and in nobody's memory
            raise
        if paths is None and (self.settings.outbox_shared is not None or not self._looked_for_shared):
            self._looked_for_shared = True
            self.settler.recall()
        if total and paths is None:
            log.warning(
                "Took over %d unsettled operation(s) of processes that ended: %d to deliver, %d lost in flight.",
                total,
                waiting,
                lost,
            )

    def _carry_out_orders(self) -> None:
        if carry_out(self.ledger, self.settler, self.telemetry) >= AT_ONCE:
            self.settler.keeper.note(self._carry_out_orders)  # behind the notes that came meanwhile

    def _fetch_prices(self, feature_code: str, principal_id: str, user_id: str) -> Prices:
        meters = self.gate.meters(
            principal_id=principal_id,
            user_id=user_id,
            feature_code=feature_code,
            expand=("pricing",),
            timeout=SETTLE_TIMEOUT,
        )
        if not meters.parsed:
            # A page of something on the way must not be taken for "no meter has a price".
            raise GateUnavailable(
                "the answer to gate/meters is no list of meters",
                status=meters.status,
                request_id=meters.request_id,
                retryable=True,
            )
        return {
            meter.meter_code: Price(meter.pricing.unit_price_xusd, meter.pricing.unit_quantity_minor or 1)
            for meter in meters
            if meter.meter_code and meter.pricing is not None and meter.pricing.unit_price_xusd is not None
        }

    def learn(self, feature_code: str, estimate: Estimate, usage: TokenUsage) -> None:
        """Teach the estimator what the call really used; done by the settler, off the caller's path."""
        self._lessons.append((feature_code, estimate, usage))

    def _apply_lessons(self) -> None:
        try:
            with contextlib.suppress(IndexError):
                while True:
                    self.estimator.update(*self._lessons.popleft())
        except Exception:
            self.telemetry.internal_error("runtime.learn")  # an estimate is worse for it, a settlement never later

    def count_forgone(self, principal_id: str, tokens: int) -> None:
        """Remember the generated tokens that an aborted call gives away, by principal."""
        if tokens:
            self.telemetry.gauges.forgone(tokens)
            with self._guard:
                if principal_id in self.forgone or len(self.forgone) < _MAX_COUNTED_PRINCIPALS:
                    self.forgone[principal_id] += tokens

    def flush(self, timeout: float | None) -> bool:
        """Deliver what is pending; False where something is left after ``timeout`` seconds."""
        return self.settler.flush(timeout)

    def stop(self, timeout: float, patience: float = PATIENCE) -> bool:
        """Deliver for at most ``timeout`` seconds, then end the threads; False where something is left.

        ``patience``: seconds for which the threads are waited for at least.
        """
        started = time.monotonic()
        delivered = self.settler.flush(timeout)
        self.settler.stop(max(patience, timeout - (time.monotonic() - started)))
        self.settler.keeper.give_up()
        return delivered

    def close(self) -> Path | None:
        """Give up the journal; its file where something is left in it. Who waits is told that it is held."""
        self.closed = True
        self._unwatch()
        left = self.settler.outstanding
        path = self.ledger.journal.path
        kept = self.ledger.close()
        lost = left if path is None else self.ledger.forgotten
        if left - lost > 0:
            log.warning(
                "%d settlement(s) are not delivered yet: they wait in %s and go out with the next process",
                left - lost,
                path,
            )
        if lost:
            log.error("%d settlement(s) were in memory only, could not be delivered and are LOST", lost)
        return path if kept else None

    def left_to_parent(self) -> None:
        """In a forked child: free the copy of the parent's lock, so that it does not outlive the parent."""
        self.ledger.journal.left_to_parent()
