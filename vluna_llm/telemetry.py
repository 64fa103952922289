"""What the gate and the settler have to say, as OpenTelemetry events (Logs API) and log lines.

Events are tied to the span in which the model call ran, also when the settlement is delivered later, by the trace and
span id that the journal keeps. Attributes never hold a prompt, an answer or a secret.

==================================== ========= =====================================================================
event name                           severity  when
==================================== ========= =====================================================================
``vluna.hint``                       INFO/WARN a hint came with an answer of the gate
``vluna.gate.breaker``               ERROR     the gate is left alone after calls without an answer; WARN when it
                                               answers again, DEBUG for the probes in between
``vluna.operation.denied``           INFO      the gate refused a call (402, 403, 429); ERROR where it never can (422)
``vluna.operation.ungated``          WARN      a call ran without a lease; its usage is booked by ingest
``vluna.operation.aborted``          INFO      a call was given up or failed; the lease is cancelled
``vluna.usage.estimated``            WARN      a completed call brought no usage; an estimate is billed
``vluna.settlement.booked``          DEBUG     the gate charged
``vluna.settlement.quarantined``     ERROR     the gate answered 200 and charged nothing
``vluna.settlement.unpriced``        ERROR     lines without a price were booked as 0; sent again when they have one
``vluna.settlement.repaired``        WARN      usage of a quarantined commit was booked by ingest
``vluna.settlement.refused``         ERROR     the gate will not take a settlement; an operator has to look
``vluna.settlement.retrying``        WARN      a settlement is kept and tried again; ERROR where somebody has to act
``vluna.settlement.ordered``         INFO      an operator ordered a retry, repair or drop
``vluna.outbox.backlog``             ERROR     settlements come in faster than they go out; INFO when that is over
``vluna.outbox.shared_away``         ERROR     PostgreSQL cannot be used; settlements are delivered from their hosts;
                                               WARN where it is silent while the process ends
``vluna.outbox.shared_back``         INFO      PostgreSQL answers again
``vluna.outbox.claim_lost``          WARN      this host was away for longer than its claim: another one delivers
``vluna.endpoint.unmetered``         WARN      a call that costs money went through unbilled; ERROR where it was meant
                                               to be billed
``vluna.internal_error``             ERROR     an error of this package; the product's call went on
==================================== ========= =====================================================================

Attributes: ``vluna.operation.id``, ``vluna.principal.id``, ``vluna.feature.code``, ``vluna.lease.id``,
``vluna.commit.id``, ``vluna.request.id``, ``vluna.amount_xusd``, ``vluna.usage.source``, ``vluna.phase``
(``authorize``, ``commit``, ``ingest``, ``cancel``), ``vluna.hint.type`` and ``vluna.hint.<field>``,
``vluna.attempts``, ``vluna.breaker.state`` (``open``, ``half_open``, ``closed``), ``vluna.breaker.seconds``,
``vluna.breaker.not_asked`` (calls), ``vluna.order``, ``vluna.denial.reason``, ``vluna.forgone_tokens``,
``vluna.endpoint``, ``vluna.audio_seconds``, ``gen_ai.request.model``, ``gen_ai.response.id``,
``gen_ai.usage.input_tokens``, ``gen_ai.usage.output_tokens``, ``error.type``. Metrics: `vluna_llm.gauges`.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from opentelemetry import trace
from opentelemetry._logs import Logger, SeverityNumber, get_logger
from opentelemetry.context import Context

from .gauges import of_this_process
from .types import Hint

log = logging.getLogger("vluna_llm")

Severity = Literal["debug", "info", "warn", "error"]

_SEVERITY: dict[Severity, tuple[SeverityNumber, int]] = {
    "debug": (SeverityNumber.DEBUG, logging.DEBUG),
    "info": (SeverityNumber.INFO, logging.DEBUG),
    "warn": (SeverityNumber.WARN, logging.WARNING),
    "error": (SeverityNumber.ERROR, logging.ERROR),
}

_WARNING_HINTS = frozenset(
    {
        "lease.expired",
        "pricing.changed",
        "pricing.contract_term_invalid",
        "pricing.meter_price_missing",
        "budget.shortfall",
        "funding.xusd_shortfall",
    }
)


@dataclass(frozen=True, slots=True)
class SpanRef:
    """Trace and span id of the model call, as the journal keeps them (hexadecimal), and whether it is sampled."""

    trace_id: str
    span_id: str
    flags: int = 0

    @classmethod
    def current(cls) -> SpanRef | None:
        """The span that is current now; None where there is none."""
        context = trace.get_current_span().get_span_context()
        if not context.is_valid:
            return None
        return cls(format(context.trace_id, "032x"), format(context.span_id, "016x"), int(context.trace_flags))

    def context(self) -> Context:
        """An OpenTelemetry context that links an event to that span."""
        return trace.set_span_in_context(
            trace.NonRecordingSpan(
                trace.SpanContext(
                    int(self.trace_id, 16),
                    int(self.span_id, 16),
                    is_remote=True,
                    trace_flags=trace.TraceFlags(self.flags),
                )
            )
        )

    @property
    def traceparent(self) -> str:
        """The W3C ``traceparent`` header value."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


class Telemetry:
    """Emits events and counts them. Never raises into the caller. ``gauges`` are the metrics of the process."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.gauges = of_this_process()
        self._logger: Logger | None = None

    def emit(
        self,
        name: str,
        severity: Severity,
        attributes: Mapping[str, Any],
        *,
        span: SpanRef | None = None,
        message: str | None = None,
    ) -> None:
        """Emit one event; ``message`` also goes to the ``vluna_llm`` log where it is a warning or an error."""
        try:
            self.counts[name] += 1
            number, level = _SEVERITY[severity]
            clean = {key: value for key, value in attributes.items() if value is not None}
            # The log first: a logger provider of the application that fails must not swallow what loses money.
            if log.isEnabledFor(level):
                log.log(level, "%s%s %s", name, f": {message}" if message else "", _short(clean))
            if self._logger is None:
                self._logger = get_logger("vluna_llm")
            self._logger.emit(
                event_name=name,
                severity_number=number,
                severity_text=severity.upper(),
                attributes=clean,
                body=message,
                context=span.context() if span else None,
            )
        except Exception:
            log.debug("telemetry failed", exc_info=True)

    def hints(
        self, hints: Iterable[Hint], phase: str, attributes: Mapping[str, Any], *, span: SpanRef | None = None
    ) -> None:
        """Emit one ``vluna.hint`` event for each hint."""
        for hint in hints:
            fields = {f"vluna.hint.{name}": _plain(value) for name, value in hint.fields.items()}
            loses = phase == "commit" and hint.means_not_charged
            severity: Severity = "error" if loses else "warn" if hint.type in _WARNING_HINTS else "info"
            self.emit(
                "vluna.hint",
                severity,
                {**attributes, "vluna.phase": phase, "vluna.hint.type": hint.type, **fields},
                span=span,
            )

    def internal_error(self, where: str) -> None:
        """An exception of ours is being handled: log its place and type (never its values) and count it."""
        import sys

        kind = sys.exc_info()[0]
        name = kind.__name__ if kind else "unknown"
        self.emit(
            "vluna.internal_error",
            "error",
            {"error.type": name, "code.function.name": where},
            message=f"{name} in {where}; the call goes on. Please report it",
        )
        log.debug("internal error in %s", where, exc_info=True)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(value, default=str)


def _short(attributes: Mapping[str, Any]) -> str:
    return " ".join(f"{key.removeprefix('vluna.')}={value}" for key, value in attributes.items())
