"""What a `Vluna` runs on in one process: journal, ledger, settler and gate clients, made on first need.

A forked child gets its own (it must not touch its parent's journal, threads or connections); so does a process that
goes on after ``close``.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

from .errors import OutboxUnavailable
from .gate import answers
from .gate.client import GateClient
from .gate.client_async import AsyncGateClient
from .gate.models import CancelResult, CommitResult
from .gate.requests import GateRequest
from .ledger import Ledger
from .outbox import Journal
from .pricing import Price, PriceBook, Prices
from .settings import Settings
from .settler import Settler
from .telemetry import Telemetry, log
from .usage.estimate import Estimate, Estimator
from .usage.features import MeterNames
from .usage.types import TokenUsage

SETTLE_TIMEOUT = 5.0
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
    ) -> None:
        self.pid = os.getpid()
        self.settings = settings
        self.gate = gate
        self.async_gate = async_gate
        self.estimator = estimator
        self.telemetry = telemetry
        self.forgone: Counter[str] = Counter()
        self._lessons: deque[tuple[str, Estimate, TokenUsage]] = deque(maxlen=1_000)
        self.closed = False
        self._guard = threading.Lock()
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
            before_delivery=self._apply_lessons,
        )
        self.settler.start()
        self._adopt()

    def _adopt(self) -> None:
        """Take over what dead processes left behind in the same directory, for the same gate and realm."""
        base_url, realm_id, _, _ = self.settings.require_credentials()
        try:
            adopted = self.ledger.journal.adopt(base_url, realm_id)
        except OutboxUnavailable:
            self.telemetry.internal_error("runtime.adopt")
            return
        lost = 0
        for row in adopted:
            if row.state.settlement in ("pending", "sent"):
                self.settler.enqueue(row, due=row.next_attempt_at)
            lost += row.state.settlement == "lost"
        if adopted:
            log.warning(
                "Took over %d unsettled operation(s) of processes that ended: %d to deliver, %d lost in flight.",
                len(adopted),
                sum(row.state.settlement in ("pending", "sent") for row in adopted),
                lost,
            )

    def _fetch_prices(self, feature_code: str, principal_id: str, user_id: str) -> Prices:
        meters = self.gate.meters(
            principal_id=principal_id,
            user_id=user_id,
            feature_code=feature_code,
            expand=("pricing",),
            timeout=SETTLE_TIMEOUT,
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
        with contextlib.suppress(IndexError):
            while True:
                self.estimator.update(*self._lessons.popleft())

    def count_forgone(self, principal_id: str, tokens: int) -> None:
        """Remember the generated tokens that an aborted call gives away, by principal."""
        if tokens:
            with self._guard:
                if principal_id in self.forgone or len(self.forgone) < _MAX_COUNTED_PRINCIPALS:
                    self.forgone[principal_id] += tokens

    def flush(self, timeout: float | None) -> bool:
        """Deliver what is pending; False where something is left after ``timeout`` seconds."""
        return self.settler.flush(timeout)

    def close(self, timeout: float) -> bool:
        """Deliver for at most ``timeout`` seconds, then stop; what is left waits in the journal."""
        with self._guard:
            if self.closed:
                return True
            self.closed = True
        started = time.monotonic()
        delivered = self.settler.flush(timeout)
        self.settler.stop(max(0.2, timeout - (time.monotonic() - started)))
        left = self.settler.outstanding
        self.ledger.journal.close()
        if not delivered and left:
            where = self.ledger.journal.path
            log.warning(
                "%d settlement(s) are not delivered yet: %s",
                left,
                f"they wait in {where} and go out with the next process"
                if where
                else "they were in memory and are LOST",
            )
        return delivered
