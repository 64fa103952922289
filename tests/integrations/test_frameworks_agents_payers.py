"""Who pays for the runs of the OpenAI Agents SDK: the surrounding context, or the run's own context object."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from agent_provider import TEXT, Say, call, has_results

pytest.importorskip("agents", reason="openai-agents is not installed: pip install 'vluna-llm[agents]'")

import agents
from agent_bench import Bench, run

from vluna_llm import call_context
from vluna_llm.context import CallContext
from vluna_llm.errors import ConfigurationError, MissingPrincipal
from vluna_llm.integrations.openai_agents import VlunaRunHooks, gated_tool, surface_refusals

pytest_plugins = ["agent_fixtures"]

BIG, SMALL = "openai.gpt-4o", "openai.gpt-4o-mini"


@dataclass
class Person:
    """The application's own idea of a customer."""

    account: str


def identity(person: Person) -> dict[str, str]:
    return {"principal_id": person.account, "end_user": "somebody"}


@agents.function_tool
async def look_up() -> str:
    """Looks it up."""
    await asyncio.sleep(0.01)
    return "found"


def writer(**options: Any) -> Any:
    return agents.Agent(**{"name": "writer", "model": "gpt-4o", "tools": [look_up], **options})


def people(bench: Bench, number: int) -> list[Person]:
    return [Person(f"{bench.customer}_{index}") for index in range(number)]


def everything_settled(bench: Bench) -> None:
    assert bench.vluna.flush(10)


def test_the_runs_context_object_pays(both: Bench, streamed: bool) -> None:
    """It wins over the surrounding context, for this run alone."""
    (person,) = people(both, 1)
    both.upstream.says(call("look_up"))

    async def work() -> None:
        options = {"context": person, "hooks": VlunaRunHooks(), "streamed": streamed}
        await run(writer(), both.config(identity=identity), **options)
        await run(writer(), both.config(), streamed=streamed)  # in the same task: nothing of the run before is left

    both.bill(work).are(BIG)
    both.books(person.account).are(BIG, BIG)
    (label,) = {entry.labels["end_user"] for entry in both.gate.booked(person.account).entries}
    assert label == "somebody"


def test_many_runs_at_once_never_mix_customers(both: Bench, streamed: bool) -> None:
    """Each with turns, tools and a handoff, of one agent, one provider and one hooks object."""
    customers = people(both, 8)
    both.upstream.pause = 0.003
    both.upstream.behaviour = "slow"

    def script(body: dict[str, Any]) -> Say:
        if body["model"] == "gpt-4o-mini":
            return TEXT
        return call("transfer_to_editor") if has_results(body) else call("look_up")

    both.upstream.script = script
    agent = writer(handoffs=[agents.Agent(name="editor", model="gpt-4o-mini")])
    config, hooks = both.config(identity=identity), VlunaRunHooks()

    async def work() -> None:
        runs = (run(agent, config, context=one, hooks=hooks, streamed=streamed) for one in customers)
        await asyncio.gather(*runs)

    both.bill(work).are()
    everything_settled(both)
    for one in customers:
        both.books(one.account).are(BIG, BIG, SMALL)


def test_contexts_around_runs_at_once(both: Bench, streamed: bool) -> None:
    """``call_context`` in tasks of their own; a streamed run takes it along when it is begun."""
    customers = people(both, 6)
    both.upstream.script = lambda body: TEXT if has_results(body) else call("look_up")
    config = both.config()

    async def one_run(person: Person) -> None:
        with call_context(principal_id=person.account):
            if not streamed:
                await run(writer(), config)
                return
            result = agents.Runner.run_streamed(writer(), "hi", run_config=config)
        async for _ in result.stream_events():
            pass

    async def work() -> None:
        await asyncio.gather(*(one_run(person) for person in customers))

    both.do(work)
    everything_settled(both)
    for one in customers:
        both.books(one.account).are(BIG, BIG)


def test_a_run_that_goes_on_in_the_background(bench: Bench) -> None:
    """Its later turns are its own customer's, whatever the consumer does meanwhile."""
    first, second = people(bench, 2)
    bench.upstream.script = lambda body: TEXT if has_results(body) else call("look_up")
    config = bench.config(identity=identity)

    async def work() -> None:
        hooks = VlunaRunHooks()
        left = agents.Runner.run_streamed(writer(), "hi", run_config=config, context=first, hooks=hooks)
        async for _ in left.stream_events():
            break
        await run(writer(), config, context=second, hooks=hooks)
        await asyncio.wait([left.run_loop_task], timeout=10)

    bench.bill(work).are()
    everything_settled(bench)
    for one in (first, second):
        bench.books(one.account).are(BIG, BIG)


def test_a_run_inside_a_run(bench: Bench) -> None:
    """Its model calls are the outer run's customer's: by the hooks it is given, or by the tool it is wrapped in."""
    (person,) = people(bench, 1)
    config, hooks = bench.config(identity=identity), VlunaRunHooks()
    helper = agents.Agent(name="helper", model="gpt-4o-mini")
    tools = [
        helper.as_tool("by_hooks", "Asks.", hooks=hooks),
        surface_refusals(helper.as_tool("by_tool", "Asks.")),
        gated_tool(feature_code="tools.help", vluna=bench.vluna)(helper.as_tool("sold", "Asks.")),
    ]
    bench.upstream.says(call("by_hooks", "by_tool", "sold", input="what?"))
    bench.bill(lambda: run(writer(tools=tools), config, context=person, hooks=hooks)).are()
    everything_settled(bench)
    bench.books(person.account).are(BIG, SMALL, SMALL, SMALL, "tools.help", BIG)


def test_hooks_of_the_applications_own(bench: Bench, streamed: bool) -> None:
    """A subclass; other hooks work as ever."""
    (person,) = people(bench, 1)
    seen: list[str] = []

    class Hooks(VlunaRunHooks):
        async def on_llm_start(self, context: Any, agent: Any, system_prompt: Any, input_items: Any) -> None:
            await super().on_llm_start(context, agent, system_prompt, input_items)
            seen.append("start")

        async def on_llm_end(self, context: Any, agent: Any, response: Any) -> None:
            seen.append("end")

    config = bench.config(identity=lambda one: CallContext(principal_id=one.account))
    bench.bill(lambda: run(writer(), config, context=person, hooks=Hooks(), streamed=streamed)).are()
    assert seen == ["start", "end"]
    bench.books(person.account).are(BIG)


def test_an_identity_that_names_nobody(bench: Bench, streamed: bool) -> None:
    """None leaves it to the surrounding context; without one the call is refused."""
    config = bench.config(identity=lambda context: None)
    bench.bill(lambda: run(writer(), config, hooks=VlunaRunHooks(), streamed=streamed)).are(BIG)
    with pytest.raises(MissingPrincipal):
        bench.do(lambda: run(writer(), config, hooks=VlunaRunHooks(), streamed=streamed))
    assert len(bench.upstream.posts()) == 1


@pytest.mark.parametrize("given", [{"principal": "x"}, {"principal_id": " x"}])
def test_an_identity_that_cannot_be_right(given: Any, bench: Bench, streamed: bool) -> None:
    """It is said before anything is spent."""
    config = bench.config(identity=lambda context: given)

    async def work() -> None:
        with pytest.raises(ConfigurationError, match="principal"):
            await run(writer(), config, hooks=VlunaRunHooks(), streamed=streamed)

    bench.bill(work).are()
    assert bench.upstream.requests == []


def test_an_identity_without_hooks(bench: Bench, streamed: bool) -> None:
    """The surrounding customer is not billed for what may be somebody else's: it is said what is missing."""

    async def work() -> None:
        with pytest.raises(ConfigurationError, match=r"hooks=VlunaRunHooks\(\)"):
            await run(writer(), bench.config(identity=identity), context=Person("x"), streamed=streamed)

    bench.bill(work).are()
    assert bench.upstream.requests == []


def test_hooks_without_an_identity(bench: Bench) -> None:
    """A model object is not asked of the provider, and the hooks would name nobody: that is said, too."""
    model = agents.OpenAIResponsesModel("gpt-4o", bench.client())
    bench.upstream.says(
        call("look_up")
    )  # the runner takes later turns in the caller's own task, where they leave traces

    async def work() -> None:
        hooks = VlunaRunHooks()
        await run(writer(), bench.config(identity=identity), context=Person(bench.customer), hooks=hooks)
        with pytest.raises(ConfigurationError, match="VlunaModelProvider"):
            await run(writer(model=model), bench.config(identity=identity), context=Person("x"), hooks=hooks)

    bench.bill(work).are(BIG, BIG)
    assert len(bench.upstream.posts()) == 2


def test_retries_and_time_limits_keep_the_customer(both: Bench, streamed: bool) -> None:
    """With a time limit the SDK calls the model in tasks of its own."""
    (person,) = people(both, 1)
    retry = agents.ModelRetrySettings(max_retries=2, policy=lambda context: True, backoff={"initial_delay": 0.01})
    settings = agents.ModelSettings(retry=retry, timeout=5)
    both.upstream.says(Say(behaviour="down"), call("look_up"))
    agent, config = writer(model_settings=settings), both.config(identity=identity)
    both.bill(lambda: run(agent, config, context=person, hooks=VlunaRunHooks(), streamed=streamed)).are()
    everything_settled(both)
    both.books(person.account).are(BIG, BIG, canceled=1)


def lost(person: Any) -> dict[str, str]:
    raise LookupError("no such customer")


@pytest.mark.parametrize("mode", ["observe", "off"])
@pytest.mark.parametrize("unusable", [lost, lambda person: {"principal_id": " x"}, lambda person: 5])
def test_an_identity_that_names_nobody_refuses_nothing_unless_in_enforce(
    bench: Bench, streamed: bool, mode: Any, unusable: Any
) -> None:
    """Not for a model, and not in a tool: in ``observe`` the surrounding customer pays, and ``off`` asks nobody."""
    bench.vluna.mode = mode
    search = surface_refusals(look_up)
    sold = agents.function_tool(name_override="sold")(lambda word: word)
    sold = gated_tool(feature_code="tools.search", vluna=bench.vluna)(sold)
    bench.upstream.says(call("look_up"), call("sold", word="sea"))

    async def work() -> None:
        options = {"context": Person("x"), "hooks": VlunaRunHooks(), "streamed": streamed}
        result = await run(writer(tools=[search, sold]), bench.config(identity=unusable), **options)
        assert result.final_output == "hello world"

    books = bench.bill(work)
    books.are(*[BIG, BIG, BIG, "tools.search"] * (mode == "observe"))
    assert len(bench.upstream.posts()) == 3
