"""Hints and losses come out as OpenTelemetry events, tied to the span of the model call, also when told later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the OpenTelemetry SDK is not installed")

from opentelemetry import _logs
from opentelemetry._logs import SeverityNumber
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.trace import TracerProvider

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.errors import GateDenied
from vluna_llm.lifecycle import ModelCall
from vluna_llm.sandbox import Sandbox

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": [{"content": "a secret prompt"}]})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True, response_id="resp_1")

_exporter = InMemoryLogRecordExporter()


@pytest.fixture(scope="module", autouse=True)
def _sdk() -> None:
    provider = LoggerProvider()
    provider.add_log_record_processor(SimpleLogRecordProcessor(_exporter))
    _logs.set_logger_provider(provider)


@pytest.fixture
def events() -> Iterator[Callable[[str], list[Any]]]:
    _exporter.clear()

    def named(name: str) -> list[Any]:
        found = [entry.log_record for entry in _exporter.get_finished_logs()]
        return [record for record in found if record.event_name == name]

    yield named
    _exporter.clear()


def test_a_hint_of_authorize_is_an_event_with_its_fields(
    vluna: Vluna, gate: Sandbox, events: Callable[[str], list[Any]]
) -> None:
    gate.set_credit("ann", 1)
    with call_context(principal_id="ann", request_id="req-1"):
        operation = vluna.begin(CALL)
    assert operation is not None
    operation.fail()
    found = {event.attributes["vluna.hint.type"]: event for event in events("vluna.hint")}
    shortfall = found["funding.xusd_shortfall"]
    assert shortfall.attributes["vluna.hint.shortfall_xusd"] > 0
    assert shortfall.attributes["vluna.phase"] == "authorize"
    assert shortfall.attributes["vluna.principal.id"] == "ann"
    assert shortfall.attributes["vluna.operation.id"] == operation.operation_id
    assert shortfall.attributes["vluna.feature.code"] == "openai.gpt-4o-mini"
    assert shortfall.attributes["vluna.request.id"] == "req-1"
    assert shortfall.attributes["gen_ai.request.model"] == "gpt-4o-mini"


def test_a_commit_delivered_later_is_tied_to_the_span_of_the_call(
    vluna: Vluna, gate: Sandbox, events: Callable[[str], list[Any]]
) -> None:
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("chat gpt-4o-mini") as span, call_context(principal_id="ann"):
        operation = vluna.begin(CALL)
        assert operation is not None
    gate.clock.advance(12 * 3600 + 30)
    operation.finish(USED)
    assert vluna.flush(5)
    (late,) = [e for e in events("vluna.hint") if e.attributes["vluna.hint.type"] == "lease.expired"]
    context = span.get_span_context()
    assert (late.trace_id, late.span_id) == (context.trace_id, context.span_id)
    assert late.attributes["vluna.phase"] == "commit"
    assert late.attributes["vluna.hint.exceeded_grace"] is False
    (booked,) = events("vluna.settlement.booked")
    assert booked.trace_id == context.trace_id
    assert booked.attributes["gen_ai.usage.input_tokens"] == 100
    assert booked.attributes["vluna.amount_xusd"] == gate.booked("ann").charged_xusd


def test_what_loses_money_is_an_error(vluna: Vluna, gate: Sandbox, events: Callable[[str], list[Any]]) -> None:
    with call_context(principal_id="ann"):
        operation = vluna.begin(CALL)
    assert operation is not None
    for meter in ("", ".tokens.input", ".tokens.cached", ".tokens.output"):
        gate.unprice(f"openai.gpt-4o-mini{meter}")
    operation.finish(USED)
    assert vluna.flush(5)
    (loud,) = events("vluna.settlement.quarantined")
    assert loud.severity_number == SeverityNumber.ERROR
    assert "NOT CHARGED" in str(loud.body)
    assert {e.attributes["vluna.hint.type"]: e.severity_number for e in events("vluna.hint")}[
        "pricing.not_configured"
    ] == SeverityNumber.ERROR


def test_a_denial_is_an_event_and_no_error(vluna: Vluna, gate: Sandbox, events: Callable[[str], list[Any]]) -> None:
    gate.set_credit("poor", 0)
    with call_context(principal_id="poor"), pytest.raises(GateDenied):
        vluna.begin(CALL)
    (denied,) = events("vluna.operation.denied")
    assert denied.severity_number == SeverityNumber.INFO
    assert denied.attributes["vluna.denial.reason"] == "insufficient_credit"


def test_no_prompt_and_no_key_is_in_any_event(vluna: Vluna, gate: Sandbox, events: Callable[[str], list[Any]]) -> None:
    with call_context(principal_id="ann"):
        operation = vluna.begin(CALL)
    assert operation is not None
    operation.finish(USED)
    assert vluna.flush(5)
    records = [entry.log_record for entry in _exporter.get_finished_logs()]
    everything = repr([(record.body, dict(record.attributes or {})) for record in records])
    assert "vluna.settlement.booked" in [record.event_name for record in records]
    assert "secret prompt" not in everything
    assert gate.key_secret not in everything
    assert operation.lease is not None
    assert operation.lease.token not in everything


def test_a_broken_exporter_never_reaches_the_call(vluna: Vluna, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def emit(self, **_: Any) -> None:
            raise RuntimeError("exporter")

    monkeypatch.setattr(vluna.telemetry, "_logger", Broken())
    with call_context(principal_id="ann") as scope:
        operation = vluna.begin(CALL)
        assert operation is not None
        operation.finish(USED)
        assert scope.wait(5)


@pytest.mark.parametrize(("sampler", "sampled"), [("always_on", True), ("always_off", False)])
def test_a_span_that_is_not_sampled_stays_unsampled_at_the_gate_and_in_events(
    vluna: Vluna,
    events: Callable[[str], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    sampled: bool,
) -> None:
    from opentelemetry.sdk.trace import sampling

    chosen = sampling.ALWAYS_ON if sampler == "always_on" else sampling.ALWAYS_OFF
    tracer = TracerProvider(sampler=chosen).get_tracer("test")
    send, sent = vluna.gate.send, {}

    def sending(request: Any, **how: Any) -> Any:
        sent[request.kind] = how.get("traceparent")
        return send(request, **how)

    monkeypatch.setattr(vluna.gate, "send", sending)
    with tracer.start_as_current_span("chat") as span, call_context(principal_id="ann"):
        operation = vluna.begin(CALL)
    assert operation is not None
    operation.finish(USED)
    assert vluna.flush(5)
    call = span.get_span_context()
    (booked,) = events("vluna.settlement.booked")
    assert booked.trace_id == call.trace_id
    assert booked.trace_flags == call.trace_flags
    assert call.trace_flags.sampled == sampled
    expected = f"00-{call.trace_id:032x}-{call.span_id:016x}-{int(call.trace_flags):02x}"
    assert sent["commit"] == expected


def test_hints_that_come_with_a_refused_settlement_are_told(
    vluna: Vluna, gate: Sandbox, events: Callable[[str], list[Any]]
) -> None:
    with call_context(principal_id="ann"):
        operation = vluna.begin(CALL)
    assert operation is not None
    gate.faults.add("rate_limited", "commits", times=1, seconds=1)
    operation.finish(USED)
    assert operation.wait(10) is not None
    phases = {(event.attributes["vluna.hint.type"], event.attributes["vluna.phase"]) for event in events("vluna.hint")}
    assert ("rate.limit", "commit") in phases
