"""Runs of the OpenAI Agents SDK with `VlunaModelProvider`: what becomes of each model call, by the gate's own books."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from agent_provider import TEXT, Say, call
from conftest import eventually

pytest.importorskip("agents", reason="openai-agents is not installed: pip install 'vluna-llm[agents]'")

import agents
from agent_bench import Bench, run

from vluna_llm.errors import GateDenied, GateRateLimited, GateUnavailable
from vluna_llm.integrations.openai_agents import VlunaModel
from vluna_llm.sandbox import Sandbox

pytest_plugins = ["agent_fixtures"]

BIG, SMALL = "openai.gpt-4o", "openai.gpt-4o-mini"


@agents.function_tool
async def look_up(word: str = "x") -> str:
    """Looks a word up."""
    return f"{word} is a word"


def writer(**options: Any) -> Any:
    return agents.Agent(**{"name": "writer", "model": "gpt-4o", "tools": [look_up], **options})


# -- what is charged ---------------------------------------------------------------------------------------------------


def test_each_turn_is_an_operation(both: Bench, streamed: bool) -> None:
    """Two turns, two leases, two settlements; the answer is the framework's own."""
    both.upstream.says(call("look_up", word="sea"))
    results: list[Any] = []

    async def work() -> None:
        results.append(await run(writer(), both.config(), streamed=streamed))

    both.bill(work).are(BIG, BIG)
    (result,) = results
    assert [item.type for item in result.new_items] == [
        "tool_call_item",
        "tool_call_output_item",
        "message_output_item",
    ]
    assert result.new_items[1].output == "sea is a word"
    # In streams of Chat Completions the SDK asks only OpenAI itself for usage: what we ask for in its place stays ours.
    assert result.context_wrapper.usage.total_tokens == (0 if streamed and not both.responses else 240)


def test_a_handoff_goes_to_another_model(both: Bench, streamed: bool) -> None:
    """Each agent's calls are billed under its own model's feature."""
    both.upstream.script = lambda body: call("transfer_to_editor") if body["model"] == "gpt-4o" else TEXT
    editor = agents.Agent(name="editor", model="gpt-4o-mini")

    both.bill(lambda: run(writer(handoffs=[editor]), both.config(), streamed=streamed)).are(BIG, SMALL)


def test_an_agent_as_a_tool(both: Bench, streamed: bool) -> None:
    """The run inside the run takes the provider along."""
    helper = agents.Agent(name="helper", model="gpt-4o-mini").as_tool("ask_helper", "Asks.")
    both.upstream.says(call("ask_helper", input="what?"))

    both.bill(lambda: run(writer(tools=[helper]), both.config(), streamed=streamed)).are(BIG, SMALL, BIG)


def test_parallel_tools_that_run_agents(both: Bench) -> None:
    """Two runs at once inside a turn: none of them takes the lease of another."""
    one, two = (agents.Agent(name=name, model="gpt-4o-mini").as_tool(name, "Asks.") for name in ("one", "two"))
    both.upstream.says(call("one", "two", input="what?"))

    both.bill(lambda: run(writer(tools=[one, two]), both.config())).are(BIG, SMALL, SMALL, BIG)


def test_an_input_guardrail_that_trips_beside_the_call(both: Bench, streamed: bool) -> None:
    """``run`` cancels the call, which is given back; ``run_streamed`` lets the model finish, which is charged."""

    @agents.input_guardrail
    async def no(context: Any, agent: Any, given: Any) -> Any:
        await asyncio.to_thread(eventually, lambda: len(both.upstream.posts()) == 1)
        return agents.GuardrailFunctionOutput(output_info=None, tripwire_triggered=True)

    both.upstream.behaviour = "slow" if streamed else "silent"

    async def work() -> None:
        with pytest.raises(agents.InputGuardrailTripwireTriggered):
            await run(writer(input_guardrails=[no]), both.config(), streamed=streamed)

    if streamed:
        both.bill(work).are(BIG)
    else:
        both.bill(work).are(canceled=1)


def test_an_input_guardrail_that_is_waited_for(both: Bench, streamed: bool) -> None:
    """Nothing is asked of gate and provider."""

    @agents.input_guardrail(run_in_parallel=False)
    async def no(context: Any, agent: Any, given: Any) -> Any:
        return agents.GuardrailFunctionOutput(output_info=None, tripwire_triggered=True)

    async def work() -> None:
        with pytest.raises(agents.InputGuardrailTripwireTriggered):
            await run(writer(input_guardrails=[no]), both.config(), streamed=streamed)

    both.bill(work).are()
    assert both.upstream.requests == []


def test_an_output_guardrail_that_trips(both: Bench, streamed: bool) -> None:
    """The answer that nobody sees was made, and is charged."""

    @agents.output_guardrail
    async def no(context: Any, agent: Any, given: Any) -> Any:
        return agents.GuardrailFunctionOutput(output_info=None, tripwire_triggered=True)

    async def work() -> None:
        with pytest.raises(agents.OutputGuardrailTripwireTriggered):
            await run(writer(output_guardrails=[no]), both.config(), streamed=streamed)

    both.bill(work).are(BIG)


def test_too_many_turns(both: Bench, streamed: bool) -> None:
    """All turns that were made are charged."""
    both.upstream.script = lambda body: call("look_up")

    async def work() -> None:
        with pytest.raises(agents.MaxTurnsExceeded):
            await run(writer(), both.config(), streamed=streamed, max_turns=3)

    both.bill(work).are(BIG, BIG, BIG)


# -- how a run is left -------------------------------------------------------------------------------------------------


def test_result_cancel_in_the_second_turn(both: Bench) -> None:
    """The call under way is given back, the first one stays charged."""
    both.upstream.says(call("look_up"), Say(behaviour="hang"))

    async def work() -> None:
        result = agents.Runner.run_streamed(writer(), "hi", run_config=both.config())
        async for event in result.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                result.cancel()

    both.bill(work).are(BIG, canceled=1)


def test_result_cancel_after_the_turn(both: Bench) -> None:
    """The turn under way is finished and charged, and no other one is begun."""
    both.upstream.script = lambda body: call("look_up")

    async def work() -> None:
        result = agents.Runner.run_streamed(writer(), "hi", run_config=both.config())
        async for _ in result.stream_events():
            result.cancel(mode="after_turn")

    both.bill(work).are(BIG)


def test_a_consumer_that_leaves(both: Bench) -> None:
    """The run works on in the background: all its turns are charged."""
    both.upstream.says(call("look_up"))

    async def work() -> None:
        result = agents.Runner.run_streamed(writer(), "hi", run_config=both.config())
        async for _ in result.stream_events():
            break
        assert result.run_loop_task is not None
        await asyncio.wait([result.run_loop_task], timeout=10)

    both.bill(work).are(BIG, BIG)


def test_a_task_that_is_cancelled(both: Bench, streamed: bool) -> None:
    """The call under way is given back."""
    both.upstream.says(call("look_up"), Say(behaviour="hang" if streamed else "silent"))

    async def work() -> None:
        task = asyncio.ensure_future(run(writer(), both.config(), streamed=streamed))
        await asyncio.to_thread(eventually, lambda: len(both.upstream.posts()) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    both.bill(work).are(BIG, canceled=1)


# -- what the provider does --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["incomplete", "failed"])
def test_a_response_that_did_not_complete(status: str, bench: Bench, streamed: bool) -> None:
    """The framework raises; the provider reported what it took, and that is charged."""
    bench.upstream.behaviour = status

    async def work() -> None:
        with pytest.raises(agents.ModelBehaviorError):
            await run(writer(), bench.config(), streamed=streamed)

    bench.bill(work).are(BIG)


def test_the_clients_retries_belong_to_the_call(both: Bench, streamed: bool) -> None:
    """500, then an answer: one lease."""
    both.upstream.behaviour = "flaky"
    both.bill(lambda: run(writer(), both.config(both.bare(max_retries=2)), streamed=streamed)).are(BIG)
    assert len(both.upstream.posts()) == 2


def test_an_upstream_that_is_down(both: Bench, streamed: bool) -> None:
    """The SDK's own error, and the lease is given back."""
    both.upstream.says(call("look_up"), Say(behaviour="down"), Say(behaviour="down"))

    async def work() -> None:
        with pytest.raises(openai.InternalServerError):
            await run(writer(), both.config(both.bare(max_retries=1)), streamed=streamed)

    both.bill(work).are(BIG, canceled=1)


def test_the_runners_retries_are_calls_of_their_own(both: Bench, streamed: bool) -> None:
    """``ModelSettings.retry``: what failed is given back, what answered is charged."""
    retry = agents.ModelRetrySettings(
        max_retries=2, policy=lambda context: True, backoff={"initial_delay": 0.01, "jitter": False}
    )
    both.upstream.says(Say(behaviour="down"))
    agent = writer(model_settings=agents.ModelSettings(retry=retry))
    both.bill(lambda: run(agent, both.config(), streamed=streamed)).are(BIG, canceled=1)


def test_a_stream_that_is_cut(both: Bench) -> None:
    """The SDK's own error, and the lease is given back."""
    both.upstream.behaviour = "cut"

    async def work() -> None:
        with pytest.raises(openai.APIConnectionError):
            await run(writer(), both.config(), streamed=True)

    both.bill(work).are(canceled=1)


def test_a_model_timeout(both: Bench, streamed: bool) -> None:
    """``ModelSettings.timeout`` works in tasks of its own; the call is given back."""
    both.upstream.behaviour = "hang" if streamed else "silent"
    agent = writer(model_settings=agents.ModelSettings(timeout=0.3))

    async def work() -> None:
        with pytest.raises(agents.ModelTimeoutError):
            await run(agent, both.config(), streamed=streamed)

    both.bill(work).are(canceled=1)


# -- what the gate says ------------------------------------------------------------------------------------------------


@pytest.fixture
def poor(bench: Bench, own_gate: Sandbox, make_vluna: Any) -> Bench:
    """A bench with a gate of its own, which a test may change."""
    return Bench(make_vluna(own_gate), bench.upstream, own_gate, bench.customer)


async def _refused(kind: type[Exception], bench: Bench, streamed: bool, agent: Any = None, **options: Any) -> Any:
    with pytest.raises(kind) as caught:
        await run(agent or writer(), bench.config(**options), streamed=streamed)
    assert type(caught.value) is kind
    return caught.value


@pytest.mark.parametrize("api", [True, False], ids=["responses", "chat"])
def test_a_refusal_at_the_first_call(api: bool, poor: Bench, streamed: bool) -> None:
    """It comes out as it is, and the provider was asked for nothing."""
    poor.responses = api
    poor.gate.set_credit(poor.customer, 0)
    errors: list[Any] = []

    async def work() -> None:
        errors.append(await _refused(GateDenied, poor, streamed))

    poor.bill(work).are()
    assert errors[0].reason == "insufficient_credit"
    assert poor.upstream.requests == []


@pytest.mark.parametrize("api", [True, False], ids=["responses", "chat"])
def test_a_refusal_in_the_middle_of_a_run(api: bool, poor: Bench, streamed: bool) -> None:
    """Earlier turns stay charged, and the provider is not asked again."""
    poor.responses = api
    poor.upstream.script = lambda body: call("take_the_money")

    @agents.function_tool
    async def take_the_money() -> str:
        """Takes it."""
        await asyncio.to_thread(eventually, lambda: len(poor.gate.booked(poor.customer).entries) == 1)
        poor.gate.set_credit(poor.customer, 0)
        return "done"

    poor.bill(lambda: _refused(GateDenied, poor, streamed, writer(tools=[take_the_money]))).are(BIG)
    assert len(poor.upstream.posts()) == 1


def test_a_model_that_the_plan_does_not_have(poor: Bench, streamed: bool) -> None:
    """A handoff to it is refused."""
    poor.gate.customer(poor.customer, deny=(SMALL,))
    poor.gate.feature(SMALL, entitlement=True)
    poor.upstream.script = lambda body: call("transfer_to_editor")
    agent = writer(handoffs=[agents.Agent(name="editor", model="gpt-4o-mini")])

    poor.bill(lambda: _refused(GateDenied, poor, streamed, agent)).are(BIG)
    assert [seen.body["model"] for seen in poor.upstream.posts()] == ["gpt-4o"]


def test_a_full_rate_window(poor: Bench, streamed: bool) -> None:
    """The second turn comes too soon: it says when to come again."""
    poor.gate.rate(1, principal_id=poor.customer)
    poor.upstream.script = lambda body: call("look_up")
    errors: list[Any] = []

    async def work() -> None:
        errors.append(await _refused(GateRateLimited, poor, streamed))

    poor.bill(work).are(BIG)
    assert errors[0].retry_after > 0
    assert len(poor.upstream.posts()) == 1


@pytest.mark.parametrize("api", [True, False], ids=["responses", "chat"])
@pytest.mark.parametrize("how", ["provider", "client"])
def test_a_refusal_is_never_retried(how: str, api: bool, poor: Bench, streamed: bool) -> None:
    """Whatever the runner's retry policy says, with our models and with the SDK's own over a metered client."""
    poor.responses = api
    poor.gate.rate(1, principal_id=poor.customer)
    poor.upstream.script = lambda body: call("look_up")
    retry = agents.ModelRetrySettings(max_retries=3, policy=lambda context: True, backoff={"initial_delay": 0.01})
    agent = writer(model_settings=agents.ModelSettings(retry=retry))
    config = poor.config()
    if how == "client":
        metered = agents.OpenAIProvider(openai_client=poor.vluna.wrap(poor.client()), use_responses=api)
        config = agents.RunConfig(model_provider=metered, tracing_disabled=True)

    async def work() -> None:
        with pytest.raises(GateRateLimited):
            await run(agent, config, streamed=streamed)

    poor.bill(work).are(BIG)
    asked = [one for one in poor.gate.requests if one.path.endswith("/gate/authorize")]
    assert len(asked) == 2


def test_without_a_gate(poor: Bench, make_vluna: Any, streamed: bool) -> None:
    """``deny``: our exception, and the provider is not asked; ``allow``: the run goes on, and is booked later."""
    poor.upstream.says(call("look_up"))
    poor.vluna = make_vluna(poor.gate, on_gate_unavailable="deny", authorize_deadline=0.3)
    poor.gate.faults.add("status", "authorize", times=None)
    poor.bill(lambda: _refused(GateUnavailable, poor, streamed)).are()
    assert poor.upstream.requests == []

    poor.vluna = make_vluna(poor.gate, authorize_deadline=0.3)

    async def work() -> None:
        await run(writer(), poor.config(), streamed=streamed)
        poor.gate.faults.clear()

    from vluna_llm import call_context

    with call_context(principal_id=poor.customer) as scope:
        poor.do(work)
    assert scope.wait(10)
    entries = poor.gate.booked(poor.customer).entries
    assert [(entry.kind, entry.quantity, entry.status) for entry in entries] == [("ingest", 120, "applied")] * 2


def test_the_kill_switch(bench: Bench, streamed: bool) -> None:
    """Mode ``off``: nobody is asked and nobody named; ``observe``: a run without a customer goes on."""
    bench.vluna.mode = "off"
    bench.do(lambda: run(writer(), bench.config(), streamed=streamed))
    bench.vluna.mode = "observe"
    config = bench.config(identity=lambda context: {"principal_id": context})
    bench.do(lambda: run(writer(), config, streamed=streamed))
    assert len(bench.upstream.posts()) == 2
    bench.books().are()


# -- one agent ---------------------------------------------------------------------------------------------------------


def test_a_model_of_one_agent(both: Bench, streamed: bool) -> None:
    """`VlunaModel` needs no provider; wrapping it again, by a provider or by hand, meters once."""
    kind = agents.OpenAIResponsesModel if both.responses else agents.OpenAIChatCompletionsModel
    bare = kind(model="gpt-4o", openai_client=both.client())
    model = VlunaModel(VlunaModel(bare, both.vluna))
    assert isinstance(model, kind)
    assert model.model == "gpt-4o"
    both.upstream.says(call("look_up"))

    plain = agents.RunConfig(tracing_disabled=True)
    both.bill(lambda: run(writer(model=model), plain, streamed=streamed)).are(BIG, BIG)
    assert type(bare._client) is openai.AsyncOpenAI


def test_a_client_that_is_metered_already(both: Bench, streamed: bool) -> None:
    """One settlement, and a client that is bound to a customer stays bound."""
    both.upstream.says(call("look_up"))
    inner = agents.OpenAIProvider(openai_client=both.vluna.wrap(both.client()), use_responses=both.responses)
    both.bill(lambda: run(writer(), both.config(inner), streamed=streamed)).are(BIG, BIG)

    other = f"{both.customer}_bound"
    mine = both.vluna.bind(both.client(), principal_id=other)
    inner = agents.OpenAIProvider(openai_client=mine, use_responses=both.responses)
    both.bill(lambda: run(writer(), both.config(inner), streamed=streamed)).are(BIG, BIG)
    both.books(other).are(BIG)


def test_output_guardrails_and_a_conversation_of_the_servers(bench: Bench) -> None:
    """The runner forbids both together for Responses models and allows them for Chat Completions: so do our models."""

    @agents.output_guardrail
    async def fine(context: Any, agent: Any, given: Any) -> Any:
        return agents.GuardrailFunctionOutput(output_info=None, tripwire_triggered=False)

    agent = writer(output_guardrails=[fine])
    bench.responses = False
    bench.bill(lambda: run(agent, bench.config(), conversation_id="conv_1")).are(BIG)
