"""Tools of the OpenAI Agents SDK that cost money: `gated_tool` and `surface_refusals`."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
from agent_provider import TEXT, call, has_results

pytest.importorskip("agents", reason="openai-agents is not installed: pip install 'vluna-llm[agents]'")

import agents
from agent_bench import Bench, run

from vluna_llm.errors import ConfigurationError, GateDenied, InvalidGateRequest
from vluna_llm.integrations.openai_agents import gated_tool, surface_refusals
from vluna_llm.sandbox import Sandbox

pytest_plugins = ["agent_fixtures"]

BIG, SMALL, SEARCH = "openai.gpt-4o", "openai.gpt-4o-mini", "tools.search"


def writer(*tools: Any, **options: Any) -> Any:
    return agents.Agent(name="writer", model="gpt-4o", tools=list(tools), **options)


@pytest.fixture
def poor(bench: Bench, own_gate: Sandbox, make_vluna: Any) -> Bench:
    """A bench with a gate of its own, which does not let anybody search."""
    own_gate.feature(SEARCH, entitlement=True)
    own_gate.customer(bench.customer, deny=(SEARCH,))
    return Bench(make_vluna(own_gate), bench.upstream, own_gate, bench.customer)


def as_async_tool(seen: list[str]) -> Any:
    @agents.function_tool
    async def search(word: str) -> str:
        """Searches."""
        seen.append(word)
        return f"found {word}"

    return search


def as_sync_tool(seen: list[str]) -> Any:
    @agents.function_tool(failure_error_function=lambda context, error: f"sorry: {error}")
    def search(word: str) -> str:
        """Searches."""
        seen.append(word)
        return f"found {word}"

    return search


def as_function(seen: list[str]) -> Any:
    def search(word: str) -> str:
        """Searches."""
        seen.append(word)
        return f"found {word}"

    return search


def as_own_tool(seen: list[str]) -> Any:
    async def invoke(context: Any, arguments: str) -> str:
        import json

        word = json.loads(arguments)["word"]
        seen.append(word)
        return f"found {word}"

    schema = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
    return agents.FunctionTool(name="search", description="Searches.", params_json_schema=schema, on_invoke_tool=invoke)


KINDS = pytest.mark.parametrize("make", [as_async_tool, as_sync_tool, as_function, as_own_tool])


@KINDS
def test_each_use_is_an_operation(make: Any, bench: Bench, streamed: bool) -> None:
    """Under its own feature code, by the estimate; the model is told what the tool says."""
    seen: list[str] = []
    tool = gated_tool(feature_code=SEARCH, estimate=2, vluna=bench.vluna)(make(seen))
    bench.upstream.says(call("search", "search", word="sea"))

    bench.bill(lambda: run(writer(tool), bench.config(), streamed=streamed)).are(BIG, SEARCH, SEARCH, BIG)
    assert seen == ["sea", "sea"]
    assert [one["output"] for one in bench.upstream.posts()[-1].body["input"] if "output" in one] == ["found sea"] * 2
    quantities = [entry.quantity for entry in bench.gate.booked(bench.customer).entries if entry.feature == SEARCH]
    assert quantities == [2, 2]


def test_what_it_took_is_read_from_its_result(bench: Bench) -> None:
    """``quantity``; a use that took nothing costs nothing."""
    results = iter([["a", "b", "c"], []])

    @gated_tool(feature_code=SEARCH, estimate=10, quantity=len, vluna=bench.vluna)
    @agents.function_tool
    async def search() -> list[str]:
        """Searches."""
        return next(results)

    bench.upstream.says(call("search"), call("search"))
    bench.bill(lambda: run(writer(search), bench.config())).are(BIG, SEARCH, BIG, BIG, canceled=1)
    assert [one.quantity for one in bench.gate.booked(bench.customer).entries if one.feature == SEARCH] == [3]


@KINDS
def test_a_refusal_ends_the_run(make: Any, poor: Bench, streamed: bool) -> None:
    """It is ours, of our type, and never a text for the model; the tool did not work, and the turn stays charged."""
    seen: list[str] = []
    tool = gated_tool(feature_code=SEARCH, vluna=poor.vluna)(make(seen))
    poor.upstream.says(call("search", word="sea"))

    async def work() -> None:
        with pytest.raises(GateDenied) as caught:
            await run(writer(tool), poor.config(), streamed=streamed)
        assert caught.value.reason == "entitlement"
        assert type(caught.value).__name__ == "GateDenied"
        assert str(caught.value).startswith("403 ")
        assert caught.value.run_data is not None  # what the run had done, as the SDK tells with its own exceptions

    poor.bill(work).are(BIG)
    assert seen == []
    assert len(poor.upstream.posts()) == 1


def test_a_refusal_beside_another_tool(poor: Bench) -> None:
    """The other use is cancelled with the run, and costs nothing."""

    @gated_tool(feature_code="tools.slow", vluna=poor.vluna)
    @agents.function_tool
    async def slow() -> str:
        """Takes long."""
        await asyncio.sleep(30)
        return "done"

    @gated_tool(feature_code=SEARCH, vluna=poor.vluna)
    @agents.function_tool
    async def search() -> str:
        """Searches."""
        return "found"

    poor.upstream.says(call("slow", "search"))

    async def work() -> None:
        with pytest.raises(GateDenied):
            await run(writer(slow, search), poor.config())

    books = poor.bill(work)
    assert books.charged == [BIG]
    assert sorted(books.leases) in (["canceled", "closed"], ["active", "closed"])  # or cancelled while being asked for


def test_a_tool_that_fails_costs_nothing(both: Bench, streamed: bool) -> None:
    """The model is told by the SDK's own words, and the run goes on."""

    @gated_tool(feature_code=SEARCH, vluna=both.vluna)
    @agents.function_tool
    async def search() -> str:
        """Searches."""
        raise ValueError("no such word")

    @gated_tool(feature_code=SEARCH, vluna=both.vluna)
    @agents.function_tool(failure_error_function=None)
    async def strict() -> str:
        """Searches."""
        raise ValueError("no such word")

    both.upstream.says(call("search"), TEXT, call("strict"))
    both.bill(lambda: run(writer(search), both.config(), streamed=streamed)).are(BIG, BIG, canceled=1)

    async def work() -> None:
        with pytest.raises(agents.UserError, match="no such word"):
            await run(writer(strict), both.config(), streamed=streamed)

    both.bill(work).are(BIG, BIG, BIG, canceled=2)


def test_a_tool_that_takes_too_long(bench: Bench) -> None:
    """The SDK's time limit ends it: nothing is charged for the use, and the run goes on."""

    @gated_tool(feature_code=SEARCH, vluna=bench.vluna)
    @agents.function_tool(timeout=0.3)
    async def search() -> str:
        """Searches."""
        await asyncio.sleep(30)
        return "found"

    bench.upstream.says(call("search"))
    bench.bill(lambda: run(writer(search), bench.config())).are(BIG, BIG, canceled=1)


@pytest.mark.parametrize("failure", ["default", "own", "none"])
def test_a_refusal_inside_a_run_that_is_a_tool(failure: str, poor: Bench, streamed: bool) -> None:
    """The outer model is never told "an error occurred": the run ends with the refusal."""
    poor.gate.feature(SMALL, entitlement=True)
    poor.gate.customer(poor.customer, deny=(SMALL,))
    options: dict[str, Any] = {
        "default": {},
        "own": {"failure_error_function": lambda context, error: "sorry"},
        "none": {"failure_error_function": None},
    }[failure]
    helper = agents.Agent(name="helper", model="gpt-4o-mini")
    tool = surface_refusals(helper.as_tool("ask", "Asks.", **options))
    poor.upstream.says(call("ask", input="what?"))

    async def work() -> None:
        with pytest.raises(GateDenied):
            await run(writer(tool), poor.config(), streamed=streamed)

    poor.bill(work).are(BIG)
    assert len(poor.upstream.posts()) == 1


def test_a_metered_client_inside_a_tool(poor: Bench) -> None:
    """The same for a function that calls a model by itself."""
    poor.gate.feature(SMALL, entitlement=True)
    poor.gate.customer(poor.customer, deny=(SMALL,))

    @surface_refusals
    @agents.function_tool
    async def ask() -> str:
        """Asks."""
        async with poor.vluna.wrap(poor.client()) as client:
            answer = await client.responses.create(model="gpt-4o-mini", input="what?")
        return str(answer.output_text)

    poor.upstream.says(call("ask"))

    async def work() -> None:
        with pytest.raises(GateDenied):
            await run(writer(ask), poor.config())

    poor.bill(work).are(BIG)


def test_a_sold_run_inside_a_run(both: Bench, streamed: bool) -> None:
    """The tool has a price, and its model calls have theirs."""
    helper = agents.Agent(name="helper", model="gpt-4o-mini").as_tool("ask", "Asks.")
    tool = gated_tool(feature_code="tools.research", vluna=both.vluna)(helper)
    both.upstream.says(call("ask", input="what?"))
    both.bill(lambda: run(writer(tool), both.config(), streamed=streamed)).are(BIG, "tools.research", SMALL, BIG)


def test_the_framework_finds_the_tool_as_it_was(bench: Bench) -> None:
    """The original stays free; copies stay gated; approval by arguments and the wrapped function work."""
    seen: list[str] = []
    free = as_async_tool(seen)
    tool = gated_tool(feature_code=SEARCH, vluna=bench.vluna)(free)
    assert (tool.name, tool.description, tool.params_json_schema) == (
        free.name,
        free.description,
        free.params_json_schema,
    )
    assert tool.__wrapped__ is free.__wrapped__
    assert free.on_invoke_tool is not tool.on_invoke_tool
    bench.upstream.script = lambda body: TEXT if has_results(body) else call("search", word="sea")
    bench.bill(lambda: run(writer(free), bench.config())).are(BIG, BIG)
    bench.bill(lambda: run(writer(copy.copy(tool)), bench.config())).are(BIG, BIG, BIG, SEARCH, BIG)

    async def needs_approval(context: Any, arguments: dict[str, Any], call_id: str) -> bool:
        return arguments["word"] == "sea"

    tool.needs_approval = needs_approval
    results: list[Any] = []

    async def work() -> None:
        result = await run(writer(tool), bench.config())
        state = result.to_state()
        assert [one.name for one in result.interruptions] == ["search"]
        state.approve(result.interruptions[0])
        results.append(await run(writer(tool), bench.config(), state))

    bench.bill(work).are(*[BIG] * 6, SEARCH, SEARCH)
    assert results[0].interruptions == []
    assert seen == ["sea"] * 3


def test_what_cannot_be_gated(bench: Bench) -> None:
    """It is said where it is written, not where it is used."""
    gate = gated_tool(feature_code=SEARCH, vluna=bench.vluna)
    with pytest.raises(ConfigurationError, match="WebSearchTool"):
        gate(agents.WebSearchTool())
    with pytest.raises(ConfigurationError, match="price already"):
        gate(gate(as_async_tool([])))
    with pytest.raises(ConfigurationError):
        gated_tool(feature_code="")
    assert gate(surface_refusals(as_async_tool([]))).name == "search"


def test_a_feature_that_is_not_sold(poor: Bench) -> None:
    """Every kind of refusal ends the run, not denials alone."""
    poor.gate.feature("tools.old", active=False)
    tool = gated_tool(feature_code="tools.old", vluna=poor.vluna)(as_async_tool([]))
    poor.upstream.says(call("search", word="sea"))

    async def work() -> None:
        with pytest.raises(InvalidGateRequest):
            await run(writer(tool), poor.config())

    poor.bill(work).are(BIG)
    assert len(poor.upstream.posts()) == 1


def test_mode_off(bench: Bench) -> None:
    """Gated tools work, and nobody is asked."""
    bench.vluna.mode = "off"
    tool = gated_tool(feature_code=SEARCH, vluna=bench.vluna)(as_async_tool([]))
    bench.upstream.says(call("search", word="sea"))
    result = bench.do(lambda: run(writer(tool), bench.config()))
    assert result.final_output == "hello world"
    bench.books().are()
