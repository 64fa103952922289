"""Pydantic AI's runs, whole and streamed, with tools and retries: each model request is one operation."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic_ai_agents import WAYS, Bench, bench_fixture, pydantic_ai, scripted_fixture  # noqa: F401
from scripted_chat import Step, turns

from vluna_llm import call_context
from vluna_llm.errors import BudgetExceeded, GateDenied, GateRateLimited, GateUnavailable, MissingPrincipal
from vluna_llm.sandbox import Sandbox

pytestmark = pytest.mark.parametrize("way", WAYS)

TWO_TURNS = turns(Step(calls=[("weather", {"city": "Bern"})]), Step(text="sunny"))


def with_tool(bench: Bench, way: str, **options: Any) -> Any:
    """An agent with one tool, and a provider that calls it once."""
    bench.provider.script = TWO_TURNS
    agent = bench.agent(way, **options)

    @agent.tool_plain
    def weather(city: str) -> str:
        return f"sun over {city}"

    return agent


async def events_of(agent: Any, **options: Any) -> list[Any]:
    stream = agent.run_stream_events("hi", **options)
    async with stream as events:
        return [event async for event in events]


# -- what is charged ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
@pytest.mark.parametrize("how", ["run", "streamed"])
def test_each_request_is_charged_once(way: str, how: str, responses: bool, bench: Bench) -> None:
    """On both APIs of OpenAI, whole and streamed; cached tokens and reasoning are told as parts."""

    async def program() -> None:
        agent = bench.agent(way, responses=responses)
        if how == "run":
            assert (await agent.run("hi")).output == "hello world"
        else:
            async with agent.run_stream("hi") as result:
                assert len([part async for part in result.stream_text(debounce_by=None)]) > 5

    with call_context() as scope:
        bench.run(program)
    bench.charged(1)
    usage = scope.usage
    assert (usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.reasoning_tokens) == (100, 20, 40, 5)
    (labels,) = bench.labels()
    assert (labels["usage_source"], labels["model"]) == ("provider", "gpt-4o")
    assert labels["response_id"] == ("resp_1" if responses else "chatcmpl-1")


def test_run_sync(way: str, bench: Bench) -> None:
    """The context of the caller reaches the loop that Pydantic AI runs."""
    with call_context(principal_id=bench.customer):
        assert bench.agent(way).run_sync("hi").output == "hello world"
    assert bench.vluna.flush(10)
    bench.charged(1)


@pytest.mark.parametrize("how", ["run", "run_stream", "events", "iter", "iter_streamed"])
def test_turns_with_a_tool(way: str, how: str, bench: Bench) -> None:
    """Two model requests, two operations, whichever way the run is driven."""
    agent = with_tool(bench, way)

    async def program() -> None:
        if how == "run":
            assert (await agent.run("hi")).output == "sunny"
        elif how == "run_stream":
            async with agent.run_stream("hi") as result:
                assert "sunny11" in await result.get_output()
        elif how == "events":
            assert any(type(event).__name__ == "AgentRunResultEvent" for event in await events_of(agent))
        else:
            async with agent.iter("hi") as run:
                async for node in run:
                    if how == "iter_streamed" and pydantic_ai.Agent.is_model_request_node(node):
                        async with node.stream(run.ctx) as stream:
                            assert [event async for event in stream]
            assert "sunny" in run.result.output

    bench.run(program)
    bench.charged(2)


def test_output_that_is_tried_again(way: str, bench: Bench) -> None:
    """An output validator that is not content: the request that it causes is an operation of its own."""
    bench.provider.script = turns(Step(text="no"), Step(text="still no"), Step(text="yes"))
    agent = bench.agent(way, retries=3)

    @agent.output_validator
    def only_yes(output: str) -> str:
        if output != "yes":
            raise pydantic_ai.ModelRetry("say yes")
        return output

    async def program() -> None:
        assert (await agent.run("hi")).output == "yes"

    bench.run(program)
    bench.charged(3)


def test_no_usage_is_not_no_work(way: str, bench: Bench) -> None:
    """An answer without usage is estimated, whole and streamed."""
    bench.provider.behaviour = "no_usage"

    async def program() -> None:
        agent = bench.agent(way)
        await agent.run("hi")
        async with agent.run_stream("hi") as result:
            await result.get_output()

    bench.run(program)
    assert [label["usage_source"] for label in bench.labels()] == ["estimated", "estimated"]
    assert bench.leases() == ["closed", "closed"]


# -- refusals ----------------------------------------------------------------------------------------------------------


async def ask(agent: Any, how: str) -> None:
    if how == "run":
        await agent.run("hi")
    elif how == "events":
        await events_of(agent)
    else:
        async with agent.run_stream("hi") as result:
            await result.get_output()


HOWS = pytest.mark.parametrize("how", ["run", "run_stream", "events"])


@HOWS
def test_a_denial_comes_out_as_it_is(way: str, how: str, bench: Bench) -> None:
    """Our own exception, before the provider is called."""
    bench.gate.set_credit(bench.customer, 0)

    async def program() -> None:
        with pytest.raises(GateDenied) as denied:
            await ask(bench.agent(way), how)
        assert denied.value.reason == "insufficient_credit"

    bench.run(program)
    assert bench.provider.requests == []
    assert bench.books() == []


@HOWS
def test_a_denial_in_the_middle(way: str, how: str, bench: Bench) -> None:
    """The turn before stays charged; the provider is not asked for the second one."""
    bench.provider.script = TWO_TURNS
    agent = bench.agent(way)

    @agent.tool_plain
    def weather(city: str) -> str:
        assert bench.vluna.flush(10)
        bench.gate.set_credit(bench.customer, 0)
        return "rain"

    async def program() -> None:
        with pytest.raises(GateDenied):
            await ask(agent, how)

    bench.run(program)
    assert len(bench.provider.posts()) == 1
    bench.charged(1)


@HOWS
def test_rate_limited(way: str, how: str, bench: Bench) -> None:
    """429: the seconds to wait; the provider is not asked for the second turn, and nothing is tried again."""
    bench.gate.rate(1, window="hour", principal_id=bench.customer)
    agent = with_tool(bench, way)

    async def program() -> None:
        with pytest.raises(GateRateLimited) as limited:
            await ask(agent, how)
        assert limited.value.retry_after

    bench.run(program)
    assert len(bench.provider.posts()) == 1
    bench.charged(1)


@pytest.mark.parametrize("gone", ["allow", "deny"])
def test_the_gate_is_away(way: str, gone: str, bench: Bench, make_vluna: Any) -> None:
    """By default the run goes on and is booked when the gate is back; with ``deny`` the provider is not asked."""
    with Sandbox() as gate:
        bench.gate, bench.vluna = gate, make_vluna(gate, on_gate_unavailable=gone, authorize_deadline=0.5)
        gate.stop()
        agent = with_tool(bench, way)

        async def program() -> None:
            if gone == "deny":
                with pytest.raises(GateUnavailable):
                    await agent.run("hi")
            else:
                assert (await agent.run("hi")).output == "sunny"
            gate.restart()

        bench.run(program)
        entries = gate.booked(bench.customer).entries
    assert [(entry.kind, entry.quantity) for entry in entries] == [("ingest", 120)] * (2 if gone == "allow" else 0)
    assert len(bench.provider.posts()) == (2 if gone == "allow" else 0)


def test_nobody_pays(way: str, bench: Bench) -> None:
    """Without a customer the provider is not asked, and the text names the fix."""

    async def program() -> None:
        with pytest.raises(MissingPrincipal, match="call_context"):
            await bench.agent(way).run("hi")

    asyncio.run(program())
    assert bench.provider.requests == []


def test_a_task_has_a_limit(way: str, bench: Bench) -> None:
    """`call_context(max_tokens=...)` around a run ends it where it would go beyond."""
    agent = with_tool(bench, way)

    async def program() -> None:
        with call_context(max_tokens=150), pytest.raises(BudgetExceeded):
            await agent.run("hi")

    bench.run(program)
    assert bench.books() == [("openai.gpt-4o", 120)] * len(bench.provider.posts())
    assert len(bench.provider.posts()) < 2


@pytest.mark.parametrize("mode", ["observe", "off"])
def test_modes_that_refuse_nothing(way: str, mode: str, bench: Bench) -> None:
    """Asked and booked, or left alone; the run is that of the bare agent."""
    bench.vluna.mode = mode
    bench.gate.set_credit(bench.customer, 0)
    agent = with_tool(bench, way)

    async def program() -> None:
        assert (await agent.run("hi")).output == "sunny"
        async with agent.run_stream("hi") as result:
            assert "sunny" in await result.get_output()

    bench.run(program)
    assert len(bench.provider.posts()) == 4
    assert bench.books() == [("openai.gpt-4o", 120)] * (4 if mode == "observe" else 0)


def test_the_receipt_is_there_with_the_answer(way: str, bench: Bench, make_vluna: Any) -> None:
    """``settle="inline"``."""
    bench.vluna = make_vluna(settle="inline")

    async def program() -> None:
        with call_context() as scope:
            await bench.agent(way).run("hi")
            assert [receipt.state for receipt in scope.receipts] == ["booked"]
            async with bench.agent(way).run_stream("hi") as result:
                await result.get_output()
            assert [receipt.state for receipt in scope.receipts] == ["booked", "booked"]

    bench.run(program)
