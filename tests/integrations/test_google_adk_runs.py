"""Whole runs of Google ADK under the plugin: handoffs, parallel agents, refusals, failures, and runs that are left."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("google.adk", reason="Google ADK is not installed: pip install google-adk")

from adk_stage import FEATURE, NAME, QUESTION, Bench, bench_fixture, lookup, stream_fixture, text_of  # noqa: F401
from conftest import cancelled
from gemini_upstream import Turn, turns
from google.adk.agents import LlmAgent, LoopAgent, ParallelAgent, SequentialAgent
from google.adk.agents.live_request_queue import LiveRequestQueue
from google.adk.agents.run_config import RunConfig
from google.adk.apps import App
from google.adk.apps.app import EventsCompactionConfig
from google.adk.apps.llm_event_summarizer import LlmEventSummarizer
from google.adk.models import Gemini
from google.adk.models.base_llm import BaseLlm
from google.adk.models.llm_request import LlmRequest
from google.adk.models.llm_response import LlmResponse
from google.adk.plugins.base_plugin import BasePlugin
from google.adk.runners import InMemoryRunner
from google.genai import errors, types

from vluna_llm import Vluna
from vluna_llm.errors import ConfigurationError, GateDenied, GateRateLimited
from vluna_llm.integrations.google_adk import wrap_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

PRO = "gemini-2.5-pro"
MODEL, SOLD = (FEATURE, 120), ("tools.lookup", 1)


def staff(bench: Bench, **options: Any) -> LlmAgent:
    """A clerk who looks things up and hands over to a writer, who has a model of another kind."""
    writer = LlmAgent(name="writer", model=bench.gemini(PRO), description="Writes.")
    clerk = turns(
        Turn(calls=[("lookup", {"word": "light"})]), Turn(calls=[("transfer_to_agent", {"agent_name": "writer"})])
    )
    bench.upstream.script = lambda body: Turn() if body["model"] == PRO else clerk(body)
    return bench.agent(bench.gemini(), tools=[lookup], sub_agents=[writer], **options)


def sold(bench: Bench) -> Any:
    return bench.plugin(tools={"lookup": "tools.lookup"})


# -- what is charged ---------------------------------------------------------------------------------------------------


def test_a_run_with_a_tool_and_a_handoff(bench: Bench, stream: bool) -> None:
    """Each request under its own model's feature and its agent's name, the tool under its own; one run."""
    assert bench.run(bench.said(staff(bench), sold(bench), user=bench.customer, stream=stream), nobody=True)
    labels = bench.labels("agent", "run_id")
    told = sorted((feature, agent) for feature, agent, _ in labels)
    clerk, writer = (FEATURE, "helper"), (f"google.{PRO}", "writer")
    assert told == sorted([clerk, ("tools.lookup", "helper"), clerk, writer])
    assert len({run for *_, run in labels}) == 1
    assert next(run for *_, run in labels).startswith("e-")
    assert bench.leases() == ["closed"] * 4
    assert sum(quantity for _, quantity in bench.books()) == 3 * 120 + 1


def test_a_conversation_of_several_messages(bench: Bench, stream: bool) -> None:
    """The second message goes to the agent that was handed over to; each message is a run of its own."""
    agent, plugin = staff(bench), sold(bench)

    async def program() -> None:
        runner = InMemoryRunner(app=App(name="tests", root_agent=agent, plugins=[plugin]))
        session = await runner.session_service.create_session(app_name="tests", user_id=bench.customer)
        for script in (bench.upstream.script, turns(Turn())):
            bench.upstream.script = script
            async for _ in runner.run_async(user_id=bench.customer, session_id=session.id, new_message=QUESTION):
                pass
            assert await bench.vluna.aflush(10)

    bench.run(program(), nobody=True)
    labels = bench.labels("agent", "run_id")
    assert [feature for feature, *_ in labels].count(f"google.{PRO}") == 2
    assert len({run for *_, run in labels}) == 2
    assert labels[-1][:2] == (f"google.{PRO}", "writer")


def test_agents_in_a_row_and_in_a_loop(bench: Bench, stream: bool) -> None:
    """A sub agent without a model of its own has its ancestor's."""
    loop = LoopAgent(name="loop", sub_agents=[LlmAgent(name="again", model=bench.gemini())], max_iterations=2)
    row = SequentialAgent(name="row", sub_agents=[LlmAgent(name="first", model=bench.gemini()), loop])
    bench.run(bench.said(row, bench.plugin(), user=bench.customer, stream=stream), nobody=True)
    bench.charged(3)
    assert sorted(agent for _, agent in bench.labels("agent")) == ["again", "again", "first"]


def test_a_workflow(bench: Bench) -> None:
    """ADK's graphs: agents and tools as their nodes."""
    from google.adk.tools import FunctionTool
    from google.adk.workflow import Workflow

    agents = [LlmAgent(name=name, model=bench.gemini()) for name in ("first", "last")]

    def note(text: str) -> str:
        """Note."""
        return text

    flow = Workflow(name="flow", edges=[("START", agents[0], FunctionTool(note), agents[1])])
    plugin = bench.plugin(tools={"note": "tools.note"})

    async def program() -> None:
        runner = InMemoryRunner(app=App(name="tests", root_agent=flow, plugins=[plugin]))
        session = await runner.session_service.create_session(app_name="tests", user_id=bench.customer)
        async for _ in runner.run_async(user_id=bench.customer, session_id=session.id, new_message=QUESTION):
            pass

    bench.run(program(), nobody=True)
    assert sorted(bench.books()) == sorted([MODEL, MODEL, ("tools.note", 1)])
    assert {"first", "last"} <= {agent for _, agent in bench.labels("agent")}


def test_a_model_of_an_ancestor(bench: Bench) -> None:
    said: list[Turn] = [Turn(calls=[("transfer_to_agent", {"agent_name": "child"})]), Turn()]
    bench.upstream.script = lambda body: said.pop(0)
    agent = bench.agent(bench.gemini(), sub_agents=[LlmAgent(name="child", description="Answers.")])
    bench.run(bench.said(agent, bench.plugin(), user=bench.customer), nobody=True)
    bench.charged(2)
    assert sorted(agent for _, agent in bench.labels("agent")) == ["child", "helper"]


def test_an_agent_that_looks_its_model_up_itself(bench: Bench) -> None:
    """By the run, as subclasses may: that model is metered, and the one of the agent is not asked."""

    class Picky(LlmAgent):
        async def canonical_model_async(self, ctx: Any) -> Any:
            await asyncio.sleep(0)
            return models[ctx.state.get("tier", "low")]

    models = {"low": wrap_model(bench.gemini(), bench.vluna, labels={"tier": "low"})}
    agent = Picky(name="picky", model=Gemini(model=NAME))
    bench.run(bench.said(agent, bench.plugin(), user=bench.customer), nobody=True)
    bench.charged(1)
    assert bench.labels("agent", "tier") == [(FEATURE, "picky", "low")]


def test_an_answer_of_a_callback_costs_nothing(bench: Bench) -> None:
    """The request after it is metered as ever, and the agents are their own again."""
    answers = [LlmResponse(content=types.Content(role="model", parts=[types.Part(text="kept")])), None]
    agent = bench.agent(bench.gemini(), before_model_callback=lambda **_: answers.pop(0))
    plugin = bench.plugin()
    assert bench.run(bench.said(agent, plugin, user=bench.customer), nobody=True) == "kept"
    assert bench.leases() == []
    bench.run(bench.said(agent, plugin, user=bench.customer), nobody=True)
    bench.charged(1)


def test_a_callback_that_sets_the_agents_model(bench: Bench, stream: bool) -> None:
    """The model that it has set is asked, and sold, as without us."""

    def choose(callback_context: Any, llm_request: Any) -> None:
        callback_context._invocation_context.agent.model = bench.gemini("gemini-2.5-pro")
        llm_request.model = "gemini-2.5-pro"

    agent = bench.agent(bench.gemini(), before_model_callback=choose)
    chosen: list[Any] = []

    def look(callback_context: Any, llm_response: Any) -> None:
        chosen.append(callback_context._invocation_context.agent.model.model)

    agent.after_model_callback = look
    bench.run(bench.said(agent, bench.plugin(), user=bench.customer, stream=stream), nobody=True)
    assert {*chosen} == {"gemini-2.5-pro"}
    assert bench.books() == [("google.gemini-2.5-pro", 120)]


def test_a_model_that_is_not_looked_up_is_told(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A flow of somebody's own: nobody is billed, and that is no secret."""

    async def elsewhere(self: Any, invocation: Any) -> Any:
        return bare

    from google.adk.flows.llm_flows.base_llm_flow import BaseLlmFlow

    bare = bench.gemini()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BaseLlmFlow, "_get_llm", elsewhere)
        bench.run(bench.said(bench.agent(bench.gemini()), bench.plugin(), user=bench.customer), nobody=True)
    assert "google_adk.helper (its model is not looked up by its agent) costs money and is not metered" in caplog.text
    assert bench.leases() == []


def test_nothing_of_a_run_is_kept(bench: Bench) -> None:
    """Agents, tools and models of a run are gone when it is, though the plugin stays."""
    plugin = sold(bench)

    def once() -> Any:
        agent = staff(bench)
        bench.run(bench.said(agent, plugin, user=bench.customer), nobody=True)
        return weakref.ref(agent)

    gone = once()
    gc.collect()
    assert gone() is None


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_refused_at_first(bench: Bench, stream: bool) -> None:
    bench.gate.set_credit(bench.customer, 0)
    with pytest.raises(GateDenied) as denied:
        bench.run(bench.said(staff(bench), sold(bench), user=bench.customer, stream=stream), nobody=True)
    assert denied.value.reason == "insufficient_credit"
    assert bench.upstream.posts() == []
    assert bench.books() == []


@pytest.mark.parametrize("feature", [f"google.{PRO}", "tools.lookup"])
def test_refused_in_the_middle(bench: Bench, stream: bool, feature: str) -> None:
    """The model that was handed over to, or the tool: what came before stays charged."""
    bench.gate.quota(0, feature=feature, principal_id=bench.customer)
    with pytest.raises(GateDenied) as denied:
        bench.run(bench.said(staff(bench), sold(bench), user=bench.customer, stream=stream), nobody=True)
    assert denied.value.reason == "quota"
    earlier = [MODEL] if feature == "tools.lookup" else [MODEL, MODEL, SOLD]
    assert sorted(bench.books()) == sorted(earlier)
    assert len(bench.upstream.posts()) == earlier.count(MODEL)


def test_the_products_own_callback_may_answer_a_refused_model(bench: Bench) -> None:
    """As ADK means it: the customer gets a polite word, and no request is made."""
    bench.gate.set_credit(bench.customer, 0)
    seen: list[BaseException] = []

    def polite(callback_context: Any, llm_request: Any, error: Exception) -> LlmResponse:
        seen.append(error)
        return LlmResponse(content=types.Content(role="model", parts=[types.Part(text="Please top up.")]))

    agent = bench.agent(bench.gemini(), on_model_error_callback=polite)
    assert bench.run(bench.said(agent, bench.plugin(), user=bench.customer), nobody=True) == "Please top up."
    assert [type(error) for error in seen] == [GateDenied]
    assert bench.upstream.posts() == []


def test_parallel_agents_one_of_them_refused(bench: Bench, stream: bool) -> None:
    """Our exception comes out; ADK stops the others: nobody pays for what was not answered."""
    bench.gate.quota(0, feature=f"google.{PRO}", principal_id=bench.customer)
    agents = [LlmAgent(name="one", model=bench.gemini()), LlmAgent(name="two", model=bench.gemini(PRO))]
    parallel = ParallelAgent(name="both", sub_agents=agents)
    with pytest.raises(GateDenied):
        bench.run(bench.said(parallel, bench.plugin(), user=bench.customer, stream=stream), nobody=True)
    assert f"google.{PRO}" not in dict(bench.books())
    assert set(bench.books()) <= {MODEL}
    assert set(bench.leases()) <= {"closed", "canceled"}
    assert bench.leases().count("closed") == len(bench.books())


def test_parallel_agents_that_all_answer(bench: Bench, stream: bool) -> None:
    agents = [LlmAgent(name=name, model=bench.gemini(), tools=[lookup]) for name in ("one", "two", "three")]
    bench.upstream.script = turns(Turn(calls=[("lookup", {"word": "light"})]), Turn())
    parallel = ParallelAgent(name="all", sub_agents=agents)
    bench.run(bench.said(parallel, sold(bench), user=bench.customer, stream=stream), nobody=True)
    told = sorted(bench.labels("agent"))
    assert told == sorted(
        [(FEATURE, name) for name in ("one", "two", "three")] * 2
        + [("tools.lookup", name) for name in ("one", "two", "three")]
    )
    assert set(bench.leases()) == {"closed"}


# -- failures and aborts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 500])
def test_the_provider_fails(bench: Bench, stream: bool, status: int) -> None:
    """In the middle of a run: its error comes out, and only what was answered is charged."""
    bench.upstream.script = turns(Turn(calls=[("lookup", {"word": "light"})]), Turn(status=status))
    agent = bench.agent(bench.gemini(), tools=[lookup])
    with pytest.raises(errors.APIError) as failed:
        bench.run(bench.said(agent, sold(bench), user=bench.customer, stream=stream), nobody=True)
    assert failed.value.code == status
    assert sorted(bench.books()) == sorted([MODEL, SOLD])
    assert sorted(bench.leases()) == ["canceled", "closed", "closed"]


@pytest.mark.parametrize("behaviour", ["silent", "hang"])
def test_the_task_is_cancelled(bench: Bench, behaviour: str) -> None:
    bench.upstream.behaviour = behaviour
    agent, plugin = bench.agent(bench.gemini()), bench.plugin()
    bench.run(
        cancelled(lambda: bench.said(agent, plugin, user=bench.customer, stream=behaviour == "hang"), after=0.5),
        nobody=True,
    )
    assert len(bench.upstream.posts()) == 1
    bench.cancelled()


def test_the_consumer_leaves_a_run(bench: Bench) -> None:
    """After the first words: settled at once, nothing charged but what came before."""
    bench.upstream.script = turns(Turn(calls=[("lookup", {"word": "light"})]), Turn())
    agent, plugin = bench.agent(bench.gemini(), tools=[lookup]), sold(bench)

    async def program() -> None:
        events = bench.events(agent, plugin, user=bench.customer, stream=True)
        async for event in events:
            if event.get_function_responses():
                bench.upstream.behaviour = "hang"
            elif event.partial and event.content.parts[0].text:
                break
        await events.aclose()
        assert await bench.vluna.aflush(10)
        assert "canceled" in bench.leases(), "not settled at once"

    bench.run(program(), nobody=True)
    assert sorted(bench.books()) == sorted([MODEL, SOLD])
    assert sorted(bench.leases()) == ["canceled", "closed", "closed"]


def test_too_many_requests_of_a_run(bench: Bench) -> None:
    """ADK's own limit: what was answered is charged, what it forbids is not asked for."""
    bench.upstream.script = turns(Turn(calls=[("lookup", {"word": "light"})]), Turn())
    agent, plugin = bench.agent(bench.gemini(), tools=[lookup]), bench.plugin()

    async def program() -> None:
        runner = InMemoryRunner(app=App(name="tests", root_agent=agent, plugins=[plugin]))
        session = await runner.session_service.create_session(app_name="tests", user_id=bench.customer)
        with pytest.raises(Exception, match="Max number of"):
            async for _ in runner.run_async(
                user_id=bench.customer,
                session_id=session.id,
                new_message=QUESTION,
                run_config=RunConfig(max_llm_calls=1),
            ):
                pass

    bench.run(program(), nobody=True)
    bench.charged(1)


# -- several models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", ["plugin", "whole", "members", "twice"])
def test_the_second_model_answers(bench: Bench, stream: bool, wrapped: str) -> None:
    """Each model that is tried is an operation under its own feature; the one that failed costs nothing."""
    agent = bench.agent(fallback(bench, wrapped))
    bench.upstream.script = lambda body: Turn(status=503) if body["model"] == PRO else Turn()
    bench.run(bench.said(agent, bench.plugin(), user=bench.customer, stream=stream), nobody=True)
    assert bench.books() == [MODEL]
    assert sorted(bench.leases()) == ["canceled", "closed"]


@pytest.mark.parametrize("kind", ["quota", "rate"])
@pytest.mark.parametrize("wrapped", ["plugin", "whole", "members", "twice"])
def test_a_refusal_is_no_reason_to_fall_back(bench: Bench, stream: bool, wrapped: str, kind: str) -> None:
    """Not even that of a rate, for whose status ADK would move on: the gate is not asked for the second model."""
    limit = getattr(bench.gate, kind)
    limit(0, feature=f"google.{PRO}", principal_id=bench.customer)
    agent = bench.agent(fallback(bench, wrapped))
    with pytest.raises(GateDenied if kind == "quota" else GateRateLimited):
        bench.run(bench.said(agent, bench.plugin(), user=bench.customer, stream=stream), nobody=True)
    assert bench.upstream.posts() == []
    assert bench.leases() == []


def test_the_consumer_leaves_a_fallback(bench: Bench) -> None:
    """The model that answers is settled at once, not when the loop comes to close what was dropped."""
    bench.upstream.behaviour = "hang"

    async def program() -> None:
        asked = LlmRequest(model=PRO, contents=[QUESTION])
        answers = fallback(bench, "whole").generate_content_async(asked, stream=True)
        await anext(answers)
        await answers.aclose()
        assert bench.vluna.flush(10)  # the loop does nothing meanwhile
        assert bench.leases() == ["canceled"]

    bench.run(program())


def fallback(bench: Bench, wrapped: str) -> BaseLlm:
    from google.adk.models import FallbackModel

    models: list[Any] = [bench.gemini(PRO), bench.gemini()]
    if wrapped == "members":
        models = [wrap_model(model, bench.vluna) for model in models]
    whole: BaseLlm = FallbackModel(models=models)
    for _ in range({"whole": 1, "twice": 2}.get(wrapped, 0)):
        whole = wrap_model(whole, bench.vluna)
    return whole


# -- what is not metered -----------------------------------------------------------------------------------------------


class LiveConnection:
    """As much of a live connection as a run needs to end at once."""

    async def __aenter__(self) -> Any:
        raise EOFError("nobody there")

    async def __aexit__(self, *exc: object) -> None:
        pass


class Live(BaseLlm):
    """A model that is talked to live."""

    async def generate_content_async(self, llm_request: Any, stream: bool = False) -> Any:
        yield LlmResponse()

    def connect(self, llm_request: Any) -> Any:
        return LiveConnection()


async def live(bench: Bench, agent: Any) -> None:
    runner = InMemoryRunner(app=App(name="tests", root_agent=agent, plugins=[bench.plugin()]))
    session = await runner.session_service.create_session(app_name="tests", user_id=bench.customer)
    events = runner.run_live(user_id=bench.customer, session_id=session.id, live_request_queue=LiveRequestQueue())
    async for _ in events:
        pass


@pytest.mark.parametrize("wrapped", [True, False])
def test_live_runs_are_told(bench: Bench, caplog: pytest.LogCaptureFixture, wrapped: bool) -> None:
    """Once, whether the model is wrapped or not."""
    model: Any = Live(model="gemini-live")
    agent = bench.agent(wrap_model(model, bench.vluna) if wrapped else model)
    with pytest.raises(EOFError):
        bench.run(live(bench, agent))
    assert caplog.text.count("google_adk.live costs money and is not metered") == 1
    assert bench.leases() == []


def test_live_runs_are_refused_where_that_is_set(bench: Bench, make_vluna: Callable[..., Vluna]) -> None:
    """By our own exception."""
    bench.vluna = make_vluna(on_unmetered="deny")
    with pytest.raises(ConfigurationError, match=r"google_adk\.live"):
        bench.run(live(bench, bench.agent(Live(model="gemini-live"))))


def test_code_that_is_run_over_a_live_connection_is_told(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """ADK's ``support_cfc`` makes a live run of an ordinary one."""
    agent = bench.agent(Live(model=NAME))

    async def program() -> None:
        runner = InMemoryRunner(app=App(name="tests", root_agent=agent, plugins=[bench.plugin()]))
        session = await runner.session_service.create_session(app_name="tests", user_id=bench.customer)
        config = RunConfig(support_cfc=True)
        async for _ in runner.run_async(
            user_id=bench.customer, session_id=session.id, new_message=QUESTION, run_config=config
        ):
            pass

    with pytest.raises(EOFError):
        bench.run(program())
    assert caplog.text.count("google_adk.live costs money and is not metered") == 1
    assert bench.leases() == []


@pytest.mark.parametrize("setting", ["warn", "deny"])
def test_hosted_agents_are_told(
    bench: Bench, make_vluna: Callable[..., Vluna], caplog: pytest.LogCaptureFixture, setting: str
) -> None:
    """What a plugin raises there is a RuntimeError of ADK's, with ours as its cause."""
    from google.adk.agents import ManagedAgent
    from google.genai import Client

    bench.vluna = make_vluna(on_unmetered=setting)
    client = Client(api_key="none", http_options=types.HttpOptions(base_url=bench.upstream.host))
    agent = ManagedAgent(name="hosted", agent_id="agents/1", api_client=client)
    run = bench.said(agent, bench.plugin(), user=bench.customer)
    if setting == "warn":
        bench.run(run)
        assert "google_adk.managed_agent hosted costs money and is not metered" in caplog.text
        assert bench.upstream.posts() != []
        return
    with pytest.raises(RuntimeError, match="hosted") as raised:
        bench.run(run)
    assert isinstance(raised.value.__cause__, ConfigurationError)
    assert bench.upstream.posts() == []


def compacted(summarizer: Any) -> Any:
    return EventsCompactionConfig(summarizer=summarizer, compaction_interval=1, overlap_size=0)


def test_summaries_by_a_bare_model_are_told(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """ADK has them made by the root agent's model, behind the plugin's back."""
    agent = bench.agent(bench.gemini())
    options = {"events_compaction_config": compacted(None)}
    bench.run(bench.said(agent, bench.plugin(), user=bench.customer, **options), nobody=True)
    assert "google_adk.compaction (give its summarizer a model of wrap_model) costs money" in caplog.text
    assert len(bench.upstream.posts()) == 2
    bench.charged(1)


def test_summaries_by_a_wrapped_model_are_charged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """To whoever pays around the run."""
    summarizer = LlmEventSummarizer(llm=wrap_model(bench.gemini(PRO), bench.vluna))
    options = {"events_compaction_config": compacted(summarizer)}
    bench.run(bench.said(bench.agent(bench.gemini()), bench.plugin(identity=None), **options))
    assert bench.books() == [MODEL, (f"google.{PRO}", 120)]
    assert "not metered" not in caplog.text


def test_summaries_are_refused_where_that_is_set(bench: Bench, make_vluna: Callable[..., Vluna]) -> None:
    bench.vluna = make_vluna(on_unmetered="deny")
    options = {"events_compaction_config": compacted(None)}
    with pytest.raises(ConfigurationError, match="compaction"):
        bench.run(bench.said(bench.agent(bench.gemini()), bench.plugin(), user=bench.customer, **options))
    assert bench.upstream.posts() == []


# -- beside other plugins ----------------------------------------------------------------------------------------------


def test_other_plugins_see_what_they_saw(bench: Bench, stream: bool) -> None:
    """The agent itself, the same requests and the same responses, with ours and without."""

    class Witness(BasePlugin):
        def __init__(self) -> None:
            super().__init__(name="witness")
            self.seen: list[Any] = []

        async def after_model_callback(self, *, callback_context: Any, llm_response: Any) -> None:
            agent = callback_context._invocation_context.agent
            self.seen.append((vars(agent).keys(), agent.canonical_model, text_of(llm_response), llm_response.partial))

        async def before_tool_callback(self, *, tool: Any, tool_args: Any, tool_context: Any) -> None:
            agent = tool_context._invocation_context.agent
            self.seen.append((vars(agent).keys(), type(tool).__name__, tool_args))

    bench.upstream.script = turns(Turn(calls=[("lookup", {"word": "light"})]), Turn())
    root = bench.agent(bench.gemini(), tools=[lookup])
    seen = []
    for ours in ([], [sold(bench)]):
        witness = Witness()
        bench.run(bench.said(root, *ours, witness, user=bench.customer, stream=stream), nobody=True)
        seen.append(witness.seen)
    assert seen[0] == seen[1]
    assert sum(model is root.model for _, model, *_ in seen[1]) >= 2
