"""A metered agent of Pydantic AI is the bare one: its events, answers, errors, history and traces."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pydantic_ai_agents import Bench, VlunaModel, bench_fixture, pydantic_ai, scripted_fixture  # noqa: F401
from scripted_chat import Step, turns

models = pytest.importorskip("pydantic_ai.models")
concurrency = pytest.importorskip("pydantic_ai.models.concurrency")
fallbacks = pytest.importorskip("pydantic_ai.models.fallback")
instrumented = pytest.importorskip("pydantic_ai.models.instrumented")

WAYS = pytest.mark.parametrize("way", ["capability", "model", "both", "with_metered_client"])
_OF_THE_RUN = {"timestamp", "tool_call_id", "run_id", "conversation_id", "provider_url"}


def plain(value: Any) -> Any:
    """An object of Pydantic AI without what every run makes anew."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        members = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name[0] != "_"}
        return type(value).__name__, {name: member for name, member in members.items() if name not in _OF_THE_RUN}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(member) for name, member in value.items() if name not in _OF_THE_RUN}
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


def with_tool(agent: Any) -> Any:
    @agent.tool_plain
    def weather() -> str:
        return "sun"

    return agent


async def everything(agent: Any) -> Any:
    """What a consumer sees of one run, streamed and whole."""
    async with agent.run_stream_events("hi") as events:
        streamed = [plain(event) async for event in events]
    whole = await agent.run("hi")
    return streamed, plain(whole.all_messages()), plain(whole.usage), whole.output


@WAYS
def test_events_answers_and_history(way: str, bench: Bench) -> None:
    """Event by event, with a tool."""
    bench.provider.script = turns(Step(calls=[("weather", {})]), Step(text="sunny"))
    seen: list[Any] = []

    async def program() -> None:
        bare = pydantic_ai.Agent(bench.model(), deps_type=str, name="tester")
        for agent in (bare, bench.agent(way)):
            seen.append(await everything(with_tool(agent)))

    bench.run(program)
    assert len(seen[0][0]) > 10
    assert seen[0] == seen[1]
    bench.charged(4)


@WAYS
@pytest.mark.parametrize("behaviour", ["down", "bad", "cut", "error_event", "error200", "html", "broken"])
def test_errors(way: str, behaviour: str, bench: Bench) -> None:
    """Type, text and cause, whole and streamed; what failed is not charged."""
    bench.provider.behaviour = behaviour
    seen: list[Any] = []

    async def tried(work: Any) -> Any:
        try:
            await work
        except Exception as error:
            return type(error), str(error), type(error.__cause__), type(error.__context__)
        return None

    async def streamed(agent: Any) -> None:
        async with agent.run_stream("hi") as result:
            await result.get_output()

    async def program() -> None:
        bare = pydantic_ai.Agent(bench.model(), deps_type=str, name="tester")
        for agent in (bare, bench.agent(way)):
            seen.append([await tried(agent.run("hi")), await tried(streamed(agent))])

    bench.run(program)
    assert any(seen[0])
    assert seen[0] == seen[1]
    if way != "with_metered_client":  # it is told by the bytes, and has tests of its own
        answered = sum(outcome is None for outcome in seen[1])  # a whole answer is not cut
        assert bench.books() == [("openai.gpt-4o", 120)] * answered


def test_traces_tell_of_the_same_model(bench: Bench) -> None:
    """OpenTelemetry's spans of Pydantic AI, also around several models of which the second answers."""
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    simple = pytest.importorskip("opentelemetry.sdk.trace.export")
    capabilities = pytest.importorskip("pydantic_ai.capabilities")
    bench.provider.script = lambda body: Step(status=500) if body["model"] == "a" else Step(text="fine")
    seen: list[Any] = []

    async def program() -> None:
        for metered in (False, True):
            exporter = export.InMemorySpanExporter()
            provider = sdk.TracerProvider()
            provider.add_span_processor(simple.SimpleSpanProcessor(exporter))
            settings = instrumented.InstrumentationSettings(tracer_provider=provider)
            traces = capabilities.Instrumentation(settings=settings)
            model = fallbacks.FallbackModel(bench.model("a"), bench.model("b"))
            chain = [traces, bench.capability()] if metered else [traces]
            await pydantic_ai.Agent(model, deps_type=str, name="tester", capabilities=chain).run("hi")
            spans = exporter.get_finished_spans()
            names = ("gen_ai.request.model", "gen_ai.response.model", "gen_ai.usage.input_tokens", "gen_ai.system")
            seen.append([(s.name, [(s.attributes or {}).get(name) for name in names]) for s in spans])

    bench.run(program)
    assert len(seen[0]) > 1
    assert seen[0] == seen[1]
    assert bench.books() == [("openai.b", 120)]


def test_wrappers_of_the_framework_inside(bench: Bench) -> None:
    """A limit on concurrency and traces around several models: each that is tried is still an operation of its own."""
    bench.provider.script = lambda body: Step(status=500) if body["model"] == "a" else Step(text="fine")
    several = fallbacks.FallbackModel(
        bench.model("a"), concurrency.ConcurrencyLimitedModel(bench.model("b"), limiter=2)
    )
    model = instrumented.InstrumentedModel(concurrency.ConcurrencyLimitedModel(several, limiter=2))

    async def program() -> None:
        agent = pydantic_ai.Agent(model, deps_type=str, capabilities=[bench.capability()])
        async with agent:
            assert (await agent.run("hi")).output == "fine"
            async with agent.run_stream("hi") as result:
                assert "fine" in await result.get_output()

    bench.run(program)
    assert bench.books() == [("openai.b", 120)] * 2
    assert sorted(bench.leases()) == ["canceled", "canceled", "closed", "closed"]


def test_a_history_that_is_compacted(bench: Bench) -> None:
    """OpenAI's compaction is a request that costs: one operation of the wrapped model."""
    model = VlunaModel(bench.model(responses=True), bench.vluna)
    messages = [pydantic_ai.ModelRequest.user_text_prompt("a long story")]

    async def program() -> None:
        parameters = models.ModelRequestParameters()
        context = models.ModelRequestContext(
            model=model, messages=messages, model_settings=None, model_request_parameters=parameters
        )
        assert (await model.compact_messages(context)).parts

    bench.run(program)
    bench.charged(1)
