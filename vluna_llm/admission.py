"""Admission: what the gate's answer, or its silence, means for one call. Acts on what `vluna_llm.policy` decides."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from .budget import Amount
from .context import CallContext, Scope
from .errors import BudgetExceeded, GateDenied, GateError, GateUnavailable, OutboxUnavailable, VlunaError
from .failpoints import hit
from .ledger import Watch, ended
from .lifecycle import Operation
from .operation import OperationState
from .outbox import Row
from .policy import Breaker, BreakerState, Decision, RecentDenials, UngatedCap, counts_as_down, decide, not_asked
from .process import Process
from .reporting import attributes_of, span_of
from .runtime import Runtime
from .settings import Mode, Settings
from .settlement import leased
from .telemetry import Severity, Telemetry
from .types import Lease
from .usage.estimate import Estimate
from .usage.features import FeatureMap

_PRICE_PAUSE = 10.0
"""Seconds for which the gate is not asked for a price again that it did not tell."""


@dataclass(slots=True)
class Prepared:
    """A call that is about to be admitted: its row, who waits for it, and what was estimated."""

    row: Row
    context: CallContext
    estimate: Estimate | None
    watch: Watch | None = None

    def with_state(self, state: OperationState, response_id: str | None = None) -> Prepared:
        """The same call in another state."""
        row = ended(self.row).evolve(state=state, response_id=response_id)
        return Prepared(row, self.context, self.estimate)


class Admissions:
    """Turns answers of the gate into operations or refusals; remembers denials and how the gate is doing."""

    def __init__(self, settings: Settings, telemetry: Telemetry) -> None:
        self._settings = settings
        self._telemetry = telemetry
        self._breaker = Breaker(changed=self._tell_breaker)
        self._away_since = 0.0
        self._not_asked = 0
        self._cap = UngatedCap()
        self._denials = RecentDenials()
        self._price_from = 0.0

    def gate_is_back(self) -> None:
        """A settlement found the gate back: the next call asks it."""
        self._breaker.probe_now(time.monotonic())

    def store(self, process: Process, prepared: Prepared, mode: Mode, features: FeatureMap) -> None:
        """Keep the row before anything is asked of anybody.

        Raises:
            BudgetExceeded: the task that it belongs to has no room for it; never in observe mode.
            OutboxUnavailable: it cannot be kept, and ``on_outbox_unavailable="deny"``; never in observe mode.
        """
        reserved = self._reserve(process, prepared, mode, features)
        try:
            prepared.watch = process.write(lambda runtime: self._store(runtime, prepared, mode, features))
        except BaseException:
            _give_back(reserved, prepared.row.operation_id)
            raise
        hit("admission.stored")

    def lacks_price(self, process: Process, prepared: Prepared) -> bool:
        """Whether a task of the call is limited in money, and nobody has asked for the feature's price yet."""
        limits = [scope.limits for scope in prepared.context.scopes]
        if all(limit is None or limit.max_amount_xusd is None for limit in limits):
            return False
        now = time.monotonic()
        if now < self._price_from or self._breaker.state(now) != "closed":
            return False
        return not process.running().prices.knows(prepared.row.feature_code)

    def ask_price(self, process: Process, prepared: Prepared) -> None:
        """Ask the gate, on this thread; what it does not tell is not counted before it is settled."""
        row = prepared.row
        try:
            process.running().prices.prices(row.feature_code, row.principal_id, row.user_id)
        except GateError:
            self._price_from = time.monotonic() + _PRICE_PAUSE

    def _reserve(self, process: Process, prepared: Prepared, mode: Mode, features: FeatureMap) -> list[Scope]:
        """Count the call in the tasks that are limited; in observe mode one that is over its limit is only told."""
        limited = [scope for scope in prepared.context.scopes if scope.limits is not None]
        if not limited:
            return []
        row = prepared.row
        xusd = process.write(lambda runtime: self.guess(runtime, prepared, features))
        estimate = Amount(xusd, row.estimated_input + row.estimated_output)
        reserved: list[Scope] = []
        try:
            for scope in limited:
                scope.reserve(row.operation_id, estimate)
                reserved.append(scope)
        except BudgetExceeded as error:
            _give_back(reserved, row.operation_id)
            self._telemetry.emit(
                "vluna.operation.denied",
                "info",
                {**attributes_of(row), "error.type": "BudgetExceeded", "vluna.denial.reason": error.limit},
                span=span_of(row),
                message=str(error),
            )
            if mode == "enforce":
                self._telemetry.gauges.admitted("denied")
                raise
            return []
        return reserved

    def guess(self, runtime: Runtime, prepared: Prepared, features: FeatureMap) -> int:
        """What the call will cost by its estimate, in XUSD; asked only where a scope shows it."""
        row = prepared.row
        if not prepared.context.scopes:
            return 0
        names = None if row.unsplit else features.names(row.feature_code)
        return runtime.prices.guess(row.feature_code, names, row.estimated_input, row.estimated_output)

    def _store(self, runtime: Runtime, prepared: Prepared, mode: Mode, features: FeatureMap) -> Watch:
        row, scopes = prepared.row, prepared.context.scopes
        guess = self.guess(runtime, prepared, features)
        failure = runtime.outbox_failure
        if failure is None:
            try:
                return runtime.ledger.open(row, scopes, guess)
            except OutboxUnavailable as error:
                failure = error
        if self._settings.on_outbox_unavailable == "deny" and mode == "enforce":
            raise OutboxUnavailable(
                f"{failure}; VLUNA_LLM_ON_OUTBOX_UNAVAILABLE is 'deny', so the call is not made: "
                "set VLUNA_LLM_OUTBOX to a directory that can be written."
            )
        self._telemetry.emit(
            "vluna.internal_error",
            "error",
            {**attributes_of(row), "error.type": "OutboxUnavailable"},
            message=f"{failure}; this operation is kept in memory only",
        )
        return runtime.ledger.keep_in_memory(row, scopes, guess)

    def without_asking(self) -> GateError | None:
        """What is known without a round trip: a gate that is down is not asked again and again (rule 9)."""
        if self._breaker.admit(time.monotonic()):
            return None
        self._not_asked += 1
        return not_asked()

    def decide(
        self,
        process: Process,
        prepared: Prepared,
        outcome: Lease | GateError,
        mode: Mode,
    ) -> Operation:
        """Admit the call, or raise the refusal."""
        hit("admission.answered")
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
        was_away = self._breaker.state(now) != "closed"
        self._learn(row.principal_id, customer, outcome, decision, now)
        if was_away and self._breaker.state(now) == "closed":
            process.gate_is_back()
        if outcome.hints:
            self._telemetry.hints(outcome.hints, "authorize", attributes_of(row), span=span_of(row))
        if decision.action == "refuse":
            self._refused(process, prepared, decision)
            assert decision.error is not None
            raise decision.error
        if isinstance(outcome, Lease):
            return self._operation(process, prepared, outcome)
        self._tell_ungated(row, decision, outcome)
        return self._admit_ungated(process, prepared)

    def rescue(self, process: Process, prepared: Prepared, error: BaseException, mode: Mode) -> Operation | None:
        """What becomes of a call whose admission raised: refused, run without a lease, or given up.

        Whoever waits for it is told in each case, and only what the caller should see is raised.
        """
        if isinstance(error, VlunaError):
            if prepared.watch is not None and not prepared.watch.closed:
                self._end(process, prepared, lambda state: state.denied())
            if mode == "enforce":
                raise error
            self.tell_unmetered(error)
            return None
        if not isinstance(error, Exception):
            # The caller was cancelled while the gate was asked: nothing ran, nothing is owed, the lease lapses. Should
            # it have been the one that was to find out how the gate is doing, the next one is.
            self._breaker.unused(time.monotonic())
            self._end(process, prepared, lambda state: state.outcome_unknown().lapsed())
            raise error
        self._telemetry.internal_error("vluna.begin")
        try:
            if prepared.watch is not None:
                return self._admit_ungated(process, prepared)
        except Exception:
            self._telemetry.internal_error("vluna.begin")
        return None

    def tell_unmetered(self, error: VlunaError) -> None:
        """In observe mode a call that could not be billed as it is asked for runs all the same."""
        self._telemetry.emit(
            "vluna.endpoint.unmetered",
            "error",
            {"error.type": type(error).__name__},
            message=f"{error} The call goes on and nobody is billed for it, since the mode is 'observe'",
        )

    # -- plumbing --------------------------------------------------------------------------------------------------

    def _admit_ungated(self, process: Process, prepared: Prepared) -> Operation:
        """Let the call run without a lease; its usage is booked by ingest."""
        self._cap.count(prepared.row.principal_id, time.monotonic())
        return self._operation(process, prepared, None)

    def _end(self, process: Process, prepared: Prepared, step: Callable[[OperationState], OperationState]) -> None:
        def end(runtime: Runtime) -> None:
            row = runtime.ledger.apply(prepared.row.operation_id, lambda now: ended(now).evolve(state=step(now.state)))
            runtime.ledger.settled(row or prepared.row, None)

        try:
            process.write(end)
        except Exception:
            self._telemetry.internal_error("vluna.begin")
        if prepared.watch is not None:
            prepared.watch.close(prepared.row.operation_id, None)

    def _operation(self, process: Process, prepared: Prepared, lease: Lease | None) -> Operation:
        watch = prepared.watch
        assert watch is not None
        self._telemetry.gauges.admitted("ungated" if lease is None else "leased")
        row: Row | None
        if lease is not None:
            # Not written: should this process die, its call is lost with or without a lease. The row that ends the
            # call holds both, and the caller is spared a write.
            row = leased(prepared.row, lease, prepared.row.state.leased(lease.dialect).started())
        else:
            row = process.write(
                lambda runtime: runtime.ledger.apply(
                    prepared.row.operation_id,
                    lambda now: now.with_state(now.state.ungated().started()),
                    fallback=prepared.row,
                    watch=watch,
                )
            )
            hit("admission.ungated")
        return Operation(
            process,
            row or prepared.row,
            watch=watch,
            lease=lease,
            estimate=prepared.estimate,
            on_abort=self._settings.on_abort,
            settle_inline=self._settings.settle == "inline",
        )

    def _tell_breaker(self, state: BreakerState) -> None:
        """Tell that the gate is left alone, is asked by one call, is asked again by all."""
        first = state == "open" and not self._away_since
        attributes: dict[str, object] = {"vluna.breaker.state": state}
        if state == "closed":
            attributes["vluna.breaker.seconds"] = round(time.monotonic() - self._away_since, 3)
            attributes["vluna.breaker.not_asked"] = self._not_asked
            message = (
                f"the gate answers again after {attributes['vluna.breaker.seconds']} s, in which it was not asked for "
                f"{self._not_asked} call(s)"
            )
            self._away_since, self._not_asked = 0.0, 0
        elif first:
            self._away_since = time.monotonic()
            message = (
                "the gate did not answer the last calls: it is left alone, and one call every few seconds finds out "
                f"whether it is back. Other calls follow VLUNA_LLM_ON_GATE_UNAVAILABLE, which is "
                f"{self._settings.on_gate_unavailable!r}. Check that VLUNA_SERVICE_BASE_URL points to a running gate"
            )
        else:
            message = "still away" if state == "open" else "one call asks whether the gate is back"
        severity: Severity = "error" if first else "warn" if state == "closed" else "debug"
        self._telemetry.emit("vluna.gate.breaker", severity, attributes, message=message)

    def _refused(self, process: Process, prepared: Prepared, decision: Decision) -> None:
        self._end(process, prepared, lambda state: state.denied())
        hit("admission.denied")
        self._telemetry.gauges.admitted("denied")
        error = decision.error
        if error is not None:
            for scope in prepared.context.scopes:
                scope.denied(error)
        self._telemetry.emit(
            "vluna.operation.denied",
            "info" if decision.severity == "quiet" else "warn" if decision.severity == "warn" else "error",
            {
                **attributes_of(prepared.row),
                "error.type": type(error).__name__,
                "vluna.denial.reason": _reason(error),
            },
            span=span_of(prepared.row),
            message=decision.reason,
        )

    def _tell_ungated(self, row: Row, decision: Decision, outcome: GateError) -> None:
        self._telemetry.emit(
            "vluna.operation.ungated",
            "error" if decision.severity == "loud" else "warn",
            {**attributes_of(row), "error.type": type(outcome).__name__, "vluna.denial.reason": _reason(outcome)},
            span=span_of(row),
            message=f"{decision.reason}. {outcome.message.rstrip('.')}. {outcome.advice}",
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
        self._cap.answered(now)
        if decision.denial is not None:
            self._denials.note(customer, decision.denial, now)
        elif isinstance(outcome, Lease):
            self._denials.clear(customer)
            self._cap.reset(principal_id)


def _give_back(scopes: list[Scope], operation_id: str) -> None:
    for scope in scopes:
        scope.closed(operation_id, None)


def _reason(error: GateError | None) -> str | None:
    return error.reason if isinstance(error, GateDenied) else None
