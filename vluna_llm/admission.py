"""Admission: what the gate's answer, or its silence, means for one call. Acts on what `vluna_llm.policy` decides."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .context import CallContext
from .errors import GateError, GateUnavailable, OutboxUnavailable
from .ledger import Watch, ended
from .lifecycle import Operation
from .operation import OperationState
from .outbox import Row
from .policy import Breaker, Decision, RecentDenials, UngatedCap, counts_as_down, decide, not_asked
from .runtime import Runtime
from .settings import Mode, Settings
from .settler import attributes_of, span_of
from .telemetry import Telemetry
from .types import Lease
from .usage.estimate import Estimate
from .usage.features import FeatureMap


@dataclass(slots=True)
class Prepared:
    """A call that is about to be admitted: its row, who waits for it, and what was estimated."""

    row: Row
    context: CallContext
    estimate: Estimate | None
    watch: Watch | None = None

    def with_state(self, state: OperationState, response_id: str | None = None) -> Prepared:
        """The same call in another state."""
        row = dataclasses.replace(ended(self.row), state=state, response_id=response_id)
        return Prepared(row, self.context, self.estimate)

    def authorize(self, deadline: float) -> Mapping[str, Any]:
        """The arguments of the gate's authorize; nothing in its body differs between runs of one job (rule 17)."""
        row = self.row
        quantity = row.estimated_input + row.estimated_output
        return {
            "principal_id": row.principal_id,
            "user_id": row.user_id,
            "feature_code": row.feature_code,
            "feature_family_code": row.feature_family_code,
            "estimated_quantity": quantity,
            "budget_id": row.budget_id,
            "lease": row.settle_key,
            "idempotency_key": row.authorize_key,
            "deadline": deadline,
            "request_id": row.request_id,
        }


class Admissions:
    """Turns answers of the gate into operations or refusals; remembers denials and how the gate is doing."""

    def __init__(self, settings: Settings, telemetry: Telemetry) -> None:
        self._settings = settings
        self._telemetry = telemetry
        self._breaker = Breaker()
        self._cap = UngatedCap()
        self._denials = RecentDenials()

    def store(self, runtime: Runtime, prepared: Prepared, features: FeatureMap) -> Watch:
        """Keep the row before anything is asked of anybody.

        Raises:
            OutboxUnavailable: it cannot be kept, and ``on_outbox_unavailable="deny"``.
        """
        row, scopes = prepared.row, prepared.context.scopes
        guess = 0
        if scopes:
            names = features.names(row.feature_code)
            guess = runtime.prices.guess(row.feature_code, names, row.estimated_input, row.estimated_output)
        failure = runtime.outbox_failure
        if failure is None:
            try:
                return runtime.ledger.open(row, scopes, guess)
            except OutboxUnavailable as error:
                failure = error
        if self._settings.on_outbox_unavailable == "deny":
            raise OutboxUnavailable(f"{failure}; VLUNA_LLM_ON_OUTBOX_UNAVAILABLE is 'deny', so the call is not made.")
        self._telemetry.emit(
            "vluna.internal_error",
            "error",
            {**attributes_of(row), "error.type": "OutboxUnavailable"},
            message=f"{failure}; this operation is kept in memory only",
        )
        return runtime.ledger.keep_in_memory(row, scopes, guess)

    def without_asking(self) -> GateError | None:
        """What is known without a round trip: a gate that is down is not asked again and again (rule 9)."""
        return None if self._breaker.admit(time.monotonic()) else not_asked()

    def decide(
        self,
        runtime: Runtime,
        prepared: Prepared,
        outcome: Lease | GateError,
        mode: Mode,
        running: Callable[[], Runtime],
    ) -> Operation | None:
        """Admit the call, or raise the refusal."""
        row = prepared.row
        now = time.monotonic()
        customer = (row.principal_id, row.user_id, row.feature_code)
        decision = decide(
            outcome,
            mode=mode,
            on_gate_unavailable=self._settings.on_gate_unavailable,
            recent_denial=self._denials.of(customer, now),
            ungated_room=self._cap.has_room(row.principal_id, now),
        )
        self._learn(row.principal_id, customer, outcome, decision, now)
        if outcome.hints:
            self._telemetry.hints(outcome.hints, "authorize", attributes_of(row), span=span_of(row))
        if decision.action == "refuse":
            self._refused(runtime, prepared, decision)
            assert decision.error is not None
            raise decision.error
        if isinstance(outcome, Lease):
            return self._operation(runtime, prepared, outcome, running)
        self._tell_ungated(row, decision)
        return self.admit_ungated(runtime, prepared, running)

    def admit_ungated(self, runtime: Runtime, prepared: Prepared, running: Callable[[], Runtime]) -> Operation:
        """Let the call run without a lease; its usage is booked by ingest."""
        self._cap.count(prepared.row.principal_id, time.monotonic())
        return self._operation(runtime, prepared, None, running)

    def give_up(self, runtime: Runtime, prepared: Prepared) -> None:
        """The caller was cancelled while the gate was asked: nothing ran, nothing is owed, the lease lapses."""
        row = runtime.ledger.apply(
            prepared.row.operation_id,
            lambda now: dataclasses.replace(ended(now), state=now.state.outcome_unknown().lapsed()),
        )
        runtime.ledger.settled(row or prepared.row, None)

    # -- plumbing --------------------------------------------------------------------------------------------------

    def _operation(
        self, runtime: Runtime, prepared: Prepared, lease: Lease | None, running: Callable[[], Runtime]
    ) -> Operation:
        def admitted(row: Row) -> Row:
            if lease is None:
                return row.with_state(row.state.ungated().started())
            state = row.state.leased(lease.dialect).started()
            return dataclasses.replace(
                row,
                state=state,
                lease_token=lease.token,
                lease_id=lease.lease_id,
                feature_code=lease.feature_code,
                feature_family_code=lease.feature_family_code or row.feature_family_code,
            )

        row = runtime.ledger.apply(prepared.row.operation_id, admitted, fallback=prepared.row)
        assert prepared.watch is not None
        return Operation(
            running,
            row or prepared.row,
            watch=prepared.watch,
            lease=lease,
            estimate=prepared.estimate,
            on_abort=self._settings.on_abort,
            settle_inline=self._settings.settle == "inline",
        )

    def _refused(self, runtime: Runtime, prepared: Prepared, decision: Decision) -> None:
        row = runtime.ledger.apply(
            prepared.row.operation_id, lambda now: dataclasses.replace(ended(now), state=now.state.denied())
        )
        runtime.ledger.settled(row or prepared.row, None)
        error = decision.error
        self._telemetry.emit(
            "vluna.operation.denied",
            "info" if decision.severity == "quiet" else "warn" if decision.severity == "warn" else "error",
            {
                **attributes_of(prepared.row),
                "error.type": type(error).__name__,
                "vluna.denial.reason": getattr(error, "reason", None),
            },
            span=span_of(prepared.row),
            message=decision.reason,
        )

    def _tell_ungated(self, row: Row, decision: Decision) -> None:
        self._telemetry.emit(
            "vluna.operation.ungated",
            "error" if decision.severity == "loud" else "warn",
            {**attributes_of(row), "error.type": type(decision.error).__name__ if decision.error else None},
            span=span_of(row),
            message=decision.reason,
        )

    def _learn(
        self,
        principal_id: str,
        customer: tuple[str, str, str],
        outcome: Lease | GateError,
        decision: Decision,
        now: float,
    ) -> None:
        if counts_as_down(outcome):
            if not (isinstance(outcome, GateUnavailable) and outcome.meta.get("transport") == "breaker"):
                self._breaker.failed(now)
            return
        self._breaker.succeeded()
        if decision.denial is not None:
            self._denials.note(customer, decision.denial, now)
        elif isinstance(outcome, Lease):
            self._denials.clear(customer)
            self._cap.reset(principal_id)
