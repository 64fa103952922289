"""Who pays in Pydantic AI: by the run's own dependencies, with tools, nested agents and several models."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import eventually
from pydantic_ai_agents import Bench, VlunaCapability, VlunaModel, bench_fixture, pydantic_ai, scripted_fixture  # noqa: F401
from scripted_chat import Step, turns

from vluna_llm import Vluna, call_context
from vluna_llm.context import CallContext
from vluna_llm.errors import ConfigurationError, GateDenied
from vluna_llm.integrations.pydantic_ai import BillableTool

fallbacks = pytest.importorskip("pydantic_ai.models.fallback")
capabilities = pytest.importorskip("pydantic_ai.capabilities")

TWO_TURNS = turns(Step(calls=[("weather", {})]), Step(text="sunny"))


def failing(*names: str) -> Any:
    """A script in which these models are down."""
    return lambda body: Step(status=500) if body["model"] in names else Step(text="fine")


# -- identity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_the_dependencies_name_who_pays(is_async: bool, bench: Bench) -> None:
    """They win over the surrounding context; labels tell the run and the agent."""

    async def later(ctx: Any) -> dict[str, Any]:
        return {"principal_id": ctx.deps, "end_user": "eve", "labels": {"team": "blue"}}

    def now(ctx: Any) -> dict[str, Any]:
        return {"principal_id": ctx.deps, "end_user": "eve", "labels": {"team": "blue"}}

    capability = bench.capability(identity=later if is_async else now)
    agent = pydantic_ai.Agent(bench.model(), deps_type=str, name="support", capabilities=[capability])
    run_ids: list[str] = []

    async def program() -> None:
        with call_context(principal_id="somebody_else"):
            run_ids.append((await agent.run("hi", deps=bench.customer)).run_id)

    bench.run(program)
    bench.charged(1)
    (labels,) = bench.labels()
    told = {name: labels[name] for name in ("run_id", "agent", "team", "end_user")}
    assert told == {"run_id": run_ids[0], "agent": "support", "team": "blue", "end_user": "eve"}


@pytest.mark.parametrize("give", [str, lambda name: CallContext(principal_id=name)], ids=["text", "CallContext"])
def test_who_pays_may_be_named_in_other_ways(give: Any, bench: Bench) -> None:
    """As in the other frameworks."""
    capability = bench.capability(identity=lambda ctx: give(ctx.deps))
    agent = pydantic_ai.Agent(bench.model(), deps_type=str, capabilities=[capability])

    async def program() -> None:
        with call_context(principal_id="somebody_else"):
            await agent.run("hi", deps=bench.customer)

    bench.run(program)
    bench.charged(1)


def test_parallel_runs_are_never_mixed_up(bench: Bench) -> None:
    """One agent, many runs at once, with tools that take turns."""
    bench.provider.script = lambda body: TWO_TURNS(body)
    agent = bench.agent()
    customers = [f"{bench.customer}_{index}" for index in range(8)]

    @agent.tool_plain
    async def weather() -> str:
        await asyncio.sleep(0.05)
        return "sun"

    async def program() -> None:
        half = len(customers) // 2
        await asyncio.gather(*(agent.run("hi", deps=customer) for customer in customers[:half]))

        async def streamed(customer: str) -> None:
            async with agent.run_stream("hi", deps=customer) as result:
                await result.get_output()

        await asyncio.gather(*(streamed(customer) for customer in customers[half:]))

    bench.run(program)
    for customer in customers:
        bench.charged(2, customer)
    assert bench.books() == []


def test_runs_that_take_turns_in_one_task(bench: Bench) -> None:
    """Two streams read alternately by the same task: a context variable would follow the last one that began."""
    bench.provider.script = TWO_TURNS
    agent = bench.agent()
    ann, bob = f"{bench.customer}_ann", f"{bench.customer}_bob"

    @agent.tool_plain
    def weather() -> str:
        return "sun"

    async def program() -> None:
        one, two = agent.run_stream_events("hi", deps=ann), agent.run_stream_events("hi", deps=bob)
        async with one as first, two as second:
            streams = [aiter(first), aiter(second)]
            while streams:
                for stream in list(streams):
                    try:
                        await anext(stream)
                    except StopAsyncIteration:
                        streams.remove(stream)

    bench.run(program)
    bench.charged(2, ann)
    bench.charged(2, bob)
    assert bench.books() == []


def test_an_identity_that_cannot_be_billed(bench: Bench) -> None:
    """It is refused before the provider is called; what the function raises itself comes out as it is."""

    def lost(ctx: Any) -> dict[str, Any]:
        raise LookupError("no such customer")

    async def program() -> None:
        for identity, error in (
            (lambda ctx: {"principal_id": " blank "}, ConfigurationError),
            (lambda ctx: {"customer": "x"}, ConfigurationError),
            (lost, LookupError),
        ):
            agent = pydantic_ai.Agent(bench.model(), capabilities=[bench.capability(identity=identity)])
            with pytest.raises(error):
                await agent.run("hi")

    bench.run(program)
    assert bench.provider.requests == []


def test_observe_goes_on_for_whoever_pays_around(bench: Bench) -> None:
    """An identity that cannot be billed, or that raises, refuses nothing then."""

    def lost(ctx: Any) -> dict[str, Any]:
        raise LookupError("no such customer")

    async def program() -> None:
        for identity in (lambda ctx: {"principal_id": " blank "}, lost):
            agent = pydantic_ai.Agent(bench.model(), capabilities=[bench.capability(identity=identity)])
            await agent.run("hi")

    bench.vluna.mode = "observe"
    bench.run(program)
    bench.charged(2)


def test_a_model_inside_that_bills_somebody_else(bench: Bench) -> None:
    """A client bound to another customer: that one pays, and what was asked for here is given back."""
    other = f"{bench.customer}_other"
    client = bench.vluna.bind(bench.client(), principal_id=other)
    agent = pydantic_ai.Agent(bench.model(client=client), deps_type=str, capabilities=[bench.capability()])

    async def program() -> None:
        await agent.run("hi", deps=bench.customer)
        async with agent.run_stream("hi", deps=bench.customer) as result:
            await result.get_output()

    bench.run(program)
    bench.charged(2, other)
    bench.cancelled(2)


def test_the_capability_may_be_given_to_one_run(bench: Bench) -> None:
    """``agent.run(..., capabilities=[...])``."""
    agent = pydantic_ai.Agent(bench.model(), deps_type=str)
    bench.run(lambda: agent.run("hi", deps=bench.customer, capabilities=[bench.capability()]))
    bench.charged(1)


def test_two_capabilities_meter_once(bench: Bench) -> None:
    """One of the agent, one of the run, whole and streamed."""
    agent = bench.agent("both")

    async def program() -> None:
        await agent.run("hi", deps=bench.customer, capabilities=[bench.capability()])
        async with agent.run_stream("hi", deps=bench.customer, capabilities=[bench.capability()]) as result:
            await result.get_output()

    bench.run(program)
    bench.charged(2)


def test_models_made_for_tests_are_free(bench: Bench) -> None:
    """`TestModel` asks no provider: a product's own tests need no gate."""
    from pydantic_ai.models.test import TestModel

    async def program() -> None:
        agent = bench.agent()
        with agent.override(model=TestModel()):
            await agent.run("hi")
            async with agent.run_stream("hi") as result:
                await result.get_output()

    bench.run(program)
    assert (bench.books(), bench.leases()) == ([], [])


def test_a_job_that_runs_again_is_charged_once(bench: Bench) -> None:
    """``idempotency_key`` in the identity: the second run's requests meet the first one's bookings."""
    bench.provider.script = TWO_TURNS

    def identity(ctx: Any) -> dict[str, Any]:
        return {"principal_id": ctx.deps, "idempotency_key": f"job-{ctx.deps}"}

    agent = pydantic_ai.Agent(bench.model(), deps_type=str, capabilities=[bench.capability(identity=identity)])

    @agent.tool_plain
    def weather() -> str:
        return "sun"

    async def program() -> None:
        for _ in range(2):
            await agent.run("hi", deps=bench.customer)
            assert await bench.vluna.aflush(10)

    bench.run(program)
    assert len(bench.provider.posts()) == 4
    assert bench.books() == [("openai.gpt-4o", 120)] * 2


# -- tools and nested agents -------------------------------------------------------------------------------------------


def sold(bench: Bench, work: Any, price: Any = "tools.weather", **options: Any) -> Any:
    """An agent whose tool `weather` has a price of its own."""
    bench.provider.script = TWO_TURNS
    capability = bench.capability(tools={"weather": price})
    agent = pydantic_ai.Agent(bench.model(), deps_type=str, capabilities=[capability], **options)
    agent.tool_plain(work, name="weather")
    return agent


def test_a_tool_that_is_sold(bench: Bench) -> None:
    """One operation for each execution, for the run's customer."""
    bench.run(lambda: sold(bench, lambda: "sun").run("hi", deps=bench.customer))
    assert sorted(bench.books()) == [("openai.gpt-4o", 120), ("openai.gpt-4o", 120), ("tools.weather", 1)]


def test_a_sold_tool_whose_result_says_how_much_it_was(bench: Bench) -> None:
    """As in the other frameworks."""
    billable = BillableTool("tools.weather", estimate=9, quantity=len)
    bench.run(lambda: sold(bench, lambda: "sunny", billable).run("hi", deps=bench.customer))
    assert sorted(bench.books()) == [("openai.gpt-4o", 120), ("openai.gpt-4o", 120), ("tools.weather", 5)]


def test_a_sold_tool_that_fails(bench: Bench) -> None:
    """It is not charged; the model's request before it is."""

    def broken() -> str:
        raise LookupError("no weather")

    async def program() -> None:
        with pytest.raises(LookupError):
            await sold(bench, broken).run("hi", deps=bench.customer)

    bench.run(program)
    assert bench.books() == [("openai.gpt-4o", 120)]
    assert sorted(bench.leases()) == ["canceled", "closed"]


@pytest.mark.parametrize("how", ["run", "run_stream"])
def test_a_sold_tool_that_is_refused(how: str, bench: Bench) -> None:
    """`GateDenied` comes out of the run, and the tool is not run."""
    ran: list[int] = []
    bench.gate.quota(0, feature="tools.weather", principal_id=bench.customer)

    async def program() -> None:
        agent = sold(bench, lambda: str(ran.append(1)))
        with pytest.raises(GateDenied) as denied:
            await ask(agent, bench.customer, how == "run_stream")
        assert denied.value.reason == "quota"

    bench.run(program)
    assert ran == []
    assert bench.books() == [("openai.gpt-4o", 120)]


def test_a_wrong_feature_code_is_said_at_once(bench: Bench) -> None:
    """When the capability is made."""
    with pytest.raises(ConfigurationError, match="feature_code"):
        bench.capability(tools={"weather": "no such code!"})


@pytest.mark.parametrize("inner", ["own_customer", "same_customer"])
def test_an_agent_as_a_tool(inner: str, bench: Bench) -> None:
    """The inner agent bills whom its own identity names, else the customer of the run around it."""
    other = f"{bench.customer}_inner"
    helper = pydantic_ai.Agent(
        bench.model("gpt-4o-mini"), deps_type=str, name="helper", capabilities=[bench.capability()]
    )

    async def ask_helper() -> str:
        return (await helper.run("hi", deps=other if inner == "own_customer" else "")).output

    def script(body: dict[str, Any]) -> Step:
        return Step(text="sun") if body["model"] == "gpt-4o-mini" else TWO_TURNS(body)

    agent = sold(bench, ask_helper)
    bench.provider.script = script

    async def program() -> None:
        with call_context(principal_id="somebody_else"):
            await agent.run("hi", deps=bench.customer)

    bench.run(program)
    mini = [("openai.gpt-4o-mini", 120)]
    ours = [("openai.gpt-4o", 120)] * 2 + [("tools.weather", 1)]
    assert sorted(bench.books()) == sorted(ours + (mini if inner == "same_customer" else []))
    assert bench.books(other) == (mini if inner == "own_customer" else [])
    tool = next(e for e in bench.gate.booked(bench.customer).entries if e.feature == "tools.weather")
    payer = other if inner == "own_customer" else bench.customer
    nested = next(e for e in bench.gate.booked(payer).entries if e.feature == "openai.gpt-4o-mini")
    assert nested.labels["parent_operation_id"] == tool.labels["operation_id"]
    assert nested.labels["agent"] == "helper"


def test_a_refusal_of_the_inner_agent(bench: Bench) -> None:
    """It comes out of the outer run as it is; what the outer one has spent stays charged."""
    poor = f"{bench.customer}_poor"
    bench.gate.set_credit(poor, 0)
    helper = pydantic_ai.Agent(bench.model(), deps_type=str, capabilities=[bench.capability()])
    agent = bench.agent()
    bench.provider.script = TWO_TURNS

    @agent.tool_plain
    async def weather() -> str:
        return (await helper.run("hi", deps=poor)).output

    async def program() -> None:
        with pytest.raises(GateDenied):
            await agent.run("hi", deps=bench.customer)

    bench.run(program)
    bench.charged(1)
    assert bench.books(poor) == []


def test_what_an_output_function_asks_is_billed_too(bench: Bench) -> None:
    """A metered client in an output validator, and in a tool, bills the run's customer."""
    client = bench.vluna.wrap(bench.client())
    agent = bench.agent()
    bench.provider.script = TWO_TURNS

    async def judge() -> None:
        await client.chat.completions.create(model="judge", messages=[{"role": "user", "content": "good?"}])

    @agent.output_validator
    async def validate(output: str) -> str:
        await judge()
        return output

    @agent.tool_plain
    async def weather() -> str:
        await judge()
        return "sun"

    def script(body: dict[str, Any]) -> Step:
        return Step(text="yes") if body["model"] == "judge" else TWO_TURNS(body)

    bench.provider.script = script

    async def program() -> None:
        with call_context(principal_id="somebody_else"):
            await agent.run("hi", deps=bench.customer)

    bench.run(program)
    assert sorted(bench.books()) == [("openai.gpt-4o", 120)] * 2 + [("openai.judge", 120)] * 2


# -- several models ----------------------------------------------------------------------------------------------------


def several(bench: Bench, kind: str, fallback_on: Any = None) -> Any:
    """An agent that tries model a, then b."""
    options = {} if fallback_on is None else {"fallback_on": fallback_on}
    a, b = bench.model("a"), bench.model("b")
    capability = bench.capability()
    if kind == "capability":
        return pydantic_ai.Agent(fallbacks.FallbackModel(a, b, **options), deps_type=str, capabilities=[capability])
    if kind == "whole":
        return pydantic_ai.Agent(VlunaModel(fallbacks.FallbackModel(a, b, **options), bench.vluna), deps_type=str)
    if kind == "members":
        members = VlunaModel(a, bench.vluna), VlunaModel(b, bench.vluna)
        return pydantic_ai.Agent(fallbacks.FallbackModel(*members, **options), deps_type=str)
    if kind == "twice":
        whole = VlunaModel(fallbacks.FallbackModel(VlunaModel(a, bench.vluna), b, **options), bench.vluna)
        return pydantic_ai.Agent(whole, deps_type=str, capabilities=[capability])
    other = capabilities.ModelFallback(b, **options)
    return pydantic_ai.Agent(a, deps_type=str, capabilities=[other, capability])


KINDS = pytest.mark.parametrize("kind", ["capability", "whole", "members", "twice", "model_fallback"])
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["run", "streamed"])


async def ask(agent: Any, customer: str, streamed: bool) -> str:
    if not streamed:
        return str((await agent.run("hi", deps=customer)).output)
    async with agent.run_stream("hi", deps=customer) as result:
        return str(await result.get_output())


@KINDS
@STREAMED
def test_the_second_model_answers(kind: str, streamed: bool, bench: Bench) -> None:
    """Each model that is tried is an operation under its own feature; the one that failed costs nothing."""
    bench.provider.script = failing("a")

    async def program() -> None:
        assert "fine" in await ask(several(bench, kind), bench.customer, streamed)

    bench.run(program)
    assert bench.books() == [("openai.b", 120)]
    assert sorted(bench.leases()) == ["canceled", "closed"]


@KINDS
@STREAMED
def test_all_models_fail(kind: str, streamed: bool, bench: Bench) -> None:
    """Pydantic AI's own group of errors; nothing is charged."""
    bench.provider.script = failing("a", "b")

    async def program() -> None:
        with pytest.raises(pydantic_ai.exceptions.FallbackExceptionGroup):
            await ask(several(bench, kind), bench.customer, streamed)

    bench.run(program)
    bench.cancelled(2)


@KINDS
@STREAMED
@pytest.mark.parametrize("fallback_on", ["default", "everything"])
def test_a_refusal_is_no_reason_to_fall_back(kind: str, streamed: bool, fallback_on: str, bench: Bench) -> None:
    """It comes out as it is, and the gate is asked once, though the second model's feature would be admitted.

    The exception: members that are wrapped one by one, under a rule of the product's own that names every exception.
    """
    bench.gate.quota(0, feature="openai.a", principal_id=bench.customer)
    agent = several(bench, kind, None if fallback_on == "default" else (Exception,))
    falls_back = kind == "members" and fallback_on == "everything"

    async def program() -> None:
        if falls_back:
            assert await ask(agent, bench.customer, streamed)
        else:
            with pytest.raises(GateDenied) as denied:
                await ask(agent, bench.customer, streamed)
            assert denied.value.reason == "quota"

    bench.run(program)
    assert [seen.body["model"] for seen in bench.provider.posts()] == (["b"] if falls_back else [])
    assert bench.books() == ([("openai.b", 120)] if falls_back else [])


def test_an_answer_that_a_rule_rejects_was_spent(bench: Bench) -> None:
    """A response handler of `FallbackModel` moves on from an answer: both are charged."""

    def rejects(response: pydantic_ai.ModelResponse) -> bool:
        return response.model_name == "a"

    rejects.__annotations__["response"] = pydantic_ai.ModelResponse
    bench.provider.script = failing()
    bench.run(lambda: several(bench, "capability", [rejects]).run("hi", deps=bench.customer))
    assert bench.books() == [("openai.a", 120), ("openai.b", 120)]


def test_a_shared_fallback_keeps_refusals_apart(bench: Bench) -> None:
    """One wrapped model, many requests at once: one customer's refusal is nobody else's."""
    poor = f"{bench.customer}_poor"
    bench.gate.set_credit(poor, 0)
    bench.provider.script = lambda body: Step(text="fine", pause=0.1)
    agent = several(bench, "whole")

    async def for_whom(customer: str) -> Any:
        with call_context(principal_id=customer):
            return await agent.run("hi")

    async def program() -> None:
        outcomes = await asyncio.gather(
            *(for_whom(who) for who in (bench.customer, poor, bench.customer, poor)), return_exceptions=True
        )
        assert [type(outcome).__name__ for outcome in outcomes] == ["AgentRunResult", "GateDenied"] * 2

    bench.run(program)
    assert bench.books() == [("openai.a", 120)] * 2


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_without_an_agent(bench: Bench) -> None:
    """`pydantic_ai.direct` with a wrapped model."""
    from pydantic_ai import direct

    messages = [pydantic_ai.ModelRequest.user_text_prompt("hi")]

    async def program() -> None:
        model = VlunaModel(bench.model(), bench.vluna)
        assert (await direct.model_request(model, messages)).text == "hello world"
        async with direct.model_request_stream(model, messages) as stream:
            assert len([event async for event in stream]) > 5

    bench.run(program)
    bench.charged(2)


def test_a_response_in_the_background(bench: Bench) -> None:
    """Created, polled, and booked once under its own id; the polls cost nothing by themselves."""
    bench.provider.behaviour = "queued"
    settings = {"openai_background": True}

    async def program() -> None:
        async def done() -> None:
            await asyncio.to_thread(eventually, lambda: len(bench.provider.requests) > 1)
            bench.provider.behaviour = "ok"

        agent = bench.agent(responses=True)
        await asyncio.gather(agent.run("hi", model_settings=settings), done())

    bench.run(program)
    entries = bench.gate.booked(bench.customer).entries
    assert [(entry.kind, entry.feature, entry.quantity) for entry in entries] == [("ingest", "openai.gpt-4o", 120)]


def test_batches_are_not_passed_over(bench: Bench, make_vluna: Any) -> None:
    """They follow ``on_unmetered``."""
    model = VlunaModel(bench.model(), make_vluna(on_unmetered="deny"))

    async def program() -> None:
        with pytest.raises(ConfigurationError, match="batch"):
            await model.batch_create([])

    bench.run(program)


def test_the_environment_is_enough(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a `Vluna` the process's own is used."""
    import vluna_llm.vluna

    monkeypatch.setattr(vluna_llm.vluna, "_default", bench.vluna)
    assert VlunaCapability().vluna is VlunaModel(bench.model()).vluna is Vluna.default() is bench.vluna
