"""Tools of Google ADK that are sold by themselves: each use is asked for, and charged when it has done its work."""

from __future__ import annotations

import asyncio
import copy
import pickle
from typing import Any

import pytest

pytest.importorskip("google.adk", reason="Google ADK is not installed: pip install google-adk")

from adk_stage import FEATURE, QUESTION, SSE, Bench, bench_fixture, lookup, stream_fixture, text_of  # noqa: F401
from conftest import cancelled
from gemini_upstream import Turn, turns
from google.adk.agents import LlmAgent, SequentialAgent
from google.adk.apps import App, ResumabilityConfig
from google.adk.plugins import ReflectAndRetryToolPlugin
from google.adk.runners import InMemoryRunner
from google.adk.tools import FunctionTool, LongRunningFunctionTool, ToolContext
from google.adk.tools.agent_tool import AgentTool
from google.adk.tools.base_tool import BaseTool
from google.genai import types

from vluna_llm import call_context
from vluna_llm.errors import ConfigurationError, GateDenied
from vluna_llm.integrations.google_adk import BillableTool, wrap_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

SEARCHES = turns(Turn(calls=[("search", {"word": "light"})]), Turn())
MODEL = (FEATURE, 120)
SOLD = ("tools.search", 1)


def run(bench: Bench, tool: Any, *plugins: Any, sold: Any = "tools.search", stream: bool = False, **own: Any) -> Any:
    """One run of an agent with this tool, which is sold under the name of `search`."""
    agent = bench.agent(bench.gemini(), tools=[tool], **own)
    plugin = bench.plugin(tools={"search": sold})
    return bench.run(bench.said(agent, plugin, *plugins, user=bench.customer, stream=stream), nobody=True)


def search(word: str) -> dict[str, Any]:
    """Search."""
    return {"found": [word, word]}


async def search_later(word: str) -> dict[str, Any]:
    """Search."""
    await asyncio.sleep(0.01)
    return search(word)


def named_search(function: Any) -> Any:
    """A tool named `search`."""
    function.__name__ = "search"
    return function


class Search(BaseTool):
    """A tool of somebody's own, which keeps count."""

    def __init__(self) -> None:
        super().__init__(name="search", description="Search.")
        self.uses = 0

    def _get_declaration(self) -> Any:
        return types.FunctionDeclaration(name="search", description="Search.")

    async def run_async(self, *, args: dict[str, Any], tool_context: Any) -> Any:
        self.uses += 1
        return search(**args)


@pytest.mark.parametrize("kind", ["function", "coroutine", "object"])
def test_each_use_is_an_operation(bench: Bench, stream: bool, kind: str) -> None:
    """For the run's customer, under a feature of its own, with the labels of the run."""
    tool = {"function": search, "coroutine": named_search(search_later), "object": Search()}[kind]
    bench.upstream.script = SEARCHES
    assert run(bench, tool, stream=stream)
    assert sorted(bench.books()) == sorted([MODEL, SOLD, MODEL])
    assert bench.leases() == ["closed"] * 3
    labels = bench.labels("run_id", "agent")
    assert len({run_id for _, run_id, _ in labels}) == 1
    assert {agent for *_, agent in labels} == {"helper"}


def test_how_much_it_was_may_be_read_from_the_result(bench: Bench) -> None:
    bench.upstream.script = SEARCHES
    sold = BillableTool("tools.search", estimate=5, quantity=lambda result: len(result["found"]))
    run(bench, search, sold=sold)
    assert sorted(bench.books()) == sorted([MODEL, ("tools.search", 2), MODEL])


def test_nothing_found_is_free(bench: Bench) -> None:
    bench.upstream.script = SEARCHES
    run(bench, search, sold=BillableTool("tools.search", quantity=lambda result: 0))
    assert bench.books() == [MODEL, MODEL]
    assert sorted(bench.leases()) == ["canceled", "closed", "closed"]


def test_two_uses_at_once_are_two_operations(bench: Bench) -> None:
    """Of one tool object, which keeps its own state and class."""
    tool = Search()
    calls = [("search", {"word": word}) for word in ("light", "house")]
    bench.upstream.script = turns(Turn(calls=calls), Turn())
    run(bench, tool)
    assert sorted(bench.books()) == sorted([MODEL, SOLD, SOLD, MODEL])
    assert tool.uses == 2
    assert isinstance(tool, Search)
    assert type(tool).__name__ == "Search"


def test_what_a_tool_uses_is_billed_also_where_the_tool_itself_cannot_be_sold(bench: Bench) -> None:
    """A class that nobody may derive from: its own use is free, and an error is told; the run goes on."""

    class Final(Search):
        def __init_subclass__(cls) -> None:
            raise TypeError("nobody derives from this")

        async def run_async(self, *, args: dict[str, Any], tool_context: Any) -> Any:
            with bench.vluna.operation(feature_code="tools.inner") as op:
                op.record(quantity=2)
            return await super().run_async(args=args, tool_context=tool_context)

    bench.upstream.script = SEARCHES
    assert run(bench, Final())
    assert sorted(bench.books()) == sorted([MODEL, ("tools.inner", 2), MODEL])


def test_a_tool_that_was_used_can_be_pickled_and_copied_as_before(bench: Bench) -> None:
    """Whoever hands it to another process finds a tool of its own class there."""
    tool = Search()
    bench.upstream.script = SEARCHES
    run(bench, tool)
    for made in (pickle.loads(pickle.dumps(tool)), copy.deepcopy(tool), copy.copy(tool)):
        assert type(made) is Search
        assert made.uses == 1
    again = bench.gate.booked(bench.customer).entries
    run(bench, pickle.loads(pickle.dumps(tool)))
    assert len(bench.books()) == 2 * len(again) == 6


def test_a_tool_inside_of_a_tool_is_part_of_it(bench: Bench) -> None:
    """Also one that is sold itself where the model calls it: who hands its context on sells its own use alone."""
    inner = Search()

    async def deep(word: str, tool_context: ToolContext) -> Any:
        """Search deeply."""
        return await inner.run_async(args={"word": word}, tool_context=tool_context)

    bench.upstream.script = turns(
        Turn(calls=[("search", {"word": "light"})]), Turn(calls=[("deep", {"word": "light"})]), Turn()
    )
    agent = bench.agent(bench.gemini(), tools=[inner, deep])
    plugin = bench.plugin(tools={"search": "tools.search", "deep": "tools.deep"})
    bench.run(bench.said(agent, plugin, user=bench.customer), nobody=True)
    assert inner.uses == 2
    assert sorted(bench.books()) == sorted([MODEL] * 3 + [SOLD, ("tools.deep", 1)])


def test_a_tool_in_a_runner_without_the_plugin_is_as_before(bench: Bench) -> None:
    """Also one that was sold elsewhere, and at the same time."""
    tool = Search()
    agent = bench.agent(bench.gemini(), tools=[tool])
    plugin = bench.plugin(tools={"search": "tools.search"})
    bench.upstream.script = SEARCHES

    async def program() -> None:
        await asyncio.gather(*(bench.said(agent, *([plugin] if n % 2 else []), user=bench.customer) for n in range(4)))

    bench.run(program(), nobody=True)
    assert tool.uses == 4
    assert sorted(bench.books()) == sorted([MODEL, SOLD, MODEL] * 2)


def test_a_wrong_feature_code_is_said_at_once(bench: Bench) -> None:
    with pytest.raises(ConfigurationError, match="feature_code"):
        bench.plugin(tools={"search": "no such code!"})
    with pytest.raises(ConfigurationError, match="estimate"):
        bench.plugin(tools={"search": BillableTool("tools.search", estimate=-1)})


# -- what costs nothing ------------------------------------------------------------------------------------------------


def test_a_tool_that_raises_costs_nothing(bench: Bench, stream: bool) -> None:
    """Its own error comes out of the run; what the model used stays charged."""

    def broken(word: str) -> str:
        """Search."""
        raise LookupError(word)

    bench.upstream.script = SEARCHES
    with pytest.raises(LookupError):
        run(bench, named_search(broken), stream=stream)
    assert bench.books() == [MODEL]
    assert sorted(bench.leases()) == ["canceled", "closed"]


def test_a_tool_that_answers_with_an_error_costs_nothing(bench: Bench) -> None:
    """As ADK itself does for arguments that are missing."""
    bench.upstream.script = turns(Turn(calls=[("search", {})]), Turn())
    run(bench, search)
    assert bench.books() == [MODEL, MODEL]
    assert sorted(bench.leases()) == ["canceled", "closed", "closed"]


def test_a_tool_that_the_model_made_up_costs_nothing(bench: Bench) -> None:
    bench.upstream.script = SEARCHES
    run(bench, lookup)
    bench.charged(2)


def test_a_callback_that_answers_in_the_place_of_the_tool_costs_nothing(bench: Bench) -> None:
    """The gate is not asked."""
    bench.upstream.script = SEARCHES
    run(bench, search, before_tool_callback=lambda **_: {"found": []})
    bench.charged(2)


def test_a_tool_that_is_cancelled_costs_nothing(bench: Bench) -> None:
    entered: list[str] = []

    async def slow(word: str) -> str:
        """Search."""
        entered.append(word)
        await asyncio.sleep(30)
        return word

    agent = bench.agent(bench.gemini(), tools=[named_search(slow)])
    plugin = bench.plugin(tools={"search": "tools.search"})
    bench.upstream.script = SEARCHES
    bench.run(cancelled(lambda: bench.said(agent, plugin, user=bench.customer), after=0.5), nobody=True)
    assert entered
    assert bench.books() == [MODEL]
    assert sorted(bench.leases()) == ["canceled", "closed"]


def test_a_sibling_that_fails_cancels_a_tool(bench: Bench) -> None:
    """ADK cancels what runs beside a tool that raises: it costs nothing, either."""

    async def slow(word: str) -> str:
        """Search."""
        await asyncio.sleep(30)
        return word

    async def broken() -> str:
        """Break."""
        await asyncio.sleep(0.2)
        raise LookupError("broken")

    calls: list[Any] = [("search", {"word": "light"}), ("broken", {})]
    bench.upstream.script = turns(Turn(calls=calls), Turn())
    agent = bench.agent(bench.gemini(), tools=[named_search(slow), broken])
    plugin = bench.plugin(tools={"search": "tools.search"})
    with pytest.raises(LookupError):
        bench.run(bench.said(agent, plugin, user=bench.customer), nobody=True)
    assert bench.books() == [MODEL]
    assert sorted(bench.leases()) == ["canceled", "closed"]


# -- refusals ----------------------------------------------------------------------------------------------------------


def refuse_searches(bench: Bench) -> None:
    bench.gate.quota(0, feature="tools.search", principal_id=bench.customer)


def test_a_refused_tool_is_not_run(bench: Bench, stream: bool) -> None:
    """Our exception comes out of the run, and the model is not asked again."""
    tool = Search()
    refuse_searches(bench)
    bench.upstream.script = SEARCHES
    with pytest.raises(GateDenied) as denied:
        run(bench, tool, stream=stream)
    assert denied.value.reason == "quota"
    assert tool.uses == 0
    assert len(bench.upstream.posts()) == 1
    bench.charged(1)


@pytest.mark.parametrize("who", ["plugin", "agent"])
def test_no_text_for_the_model_takes_the_place_of_a_refusal(bench: Bench, who: str) -> None:
    """Whoever makes answers of the errors of tools: the model is not asked again, and neither is the gate."""
    refuse_searches(bench)
    bench.upstream.script = SEARCHES
    plugins = [ReflectAndRetryToolPlugin()] if who == "plugin" else []
    options: Any = {"on_tool_error_callback": lambda **_: {"sorry": "no"}} if who == "agent" else {}
    with pytest.raises(GateDenied):
        run(bench, Search(), *plugins, **options)
    assert len(bench.upstream.posts()) == 1
    bench.charged(1)


def test_a_model_that_is_refused_inside_a_tool(bench: Bench) -> None:
    """The same for a tool that is free itself."""
    poor = f"{bench.customer}_poor"
    bench.gate.set_credit(poor, 0)
    inner = wrap_model(bench.gemini(), bench.vluna, principal_id=poor)
    advisor = LlmAgent(name="search", model=inner, description="Searches.")
    bench.upstream.script = turns(Turn(calls=[("search", {"request": "light"})]), Turn())
    agent = bench.agent(bench.gemini(), tools=[AgentTool(advisor)], on_tool_error_callback=lambda **_: {"sorry": "no"})
    with pytest.raises(GateDenied):
        bench.run(bench.said(agent, bench.plugin(), user=bench.customer), nobody=True)
    bench.charged(1)
    assert len(bench.upstream.posts()) == 1


def test_a_refused_tool_beside_one_that_runs(bench: Bench) -> None:
    """What is done is charged, and the run ends with our exception."""
    refuse_searches(bench)
    calls: list[Any] = [("lookup", {"word": "light"}), ("search", {"word": "light"})]
    bench.upstream.script = turns(Turn(calls=calls), Turn())
    agent = bench.agent(bench.gemini(), tools=[lookup, search])
    plugin = bench.plugin(tools={"search": "tools.search", "lookup": "tools.lookup"})
    with pytest.raises(GateDenied):
        bench.run(bench.said(agent, plugin, user=bench.customer), nobody=True)
    assert set(bench.books()) <= {MODEL, ("tools.lookup", 1)}
    assert bench.books()[0] == MODEL
    assert "tools.search" not in dict(bench.books())


# -- tools that come back later ----------------------------------------------------------------------------------------


class Talk:
    """A session that goes on over several messages."""

    def __init__(self, bench: Bench, tool: Any, *, resumable: bool) -> None:
        self.bench = bench
        app = App(
            name="tests",
            root_agent=bench.agent(bench.gemini(), tools=[tool]),
            plugins=[bench.plugin(tools={"search": "tools.search"})],
            resumability_config=ResumabilityConfig(is_resumable=resumable),
        )
        self.runner = InMemoryRunner(app=app)
        self.session: Any = None

    async def say(self, *parts: types.Part, **options: Any) -> list[Any]:
        if self.session is None:
            service = self.runner.session_service
            self.session = await service.create_session(app_name="tests", user_id=self.bench.customer)
        message = types.Content(role="user", parts=list(parts)) if parts else QUESTION
        events = self.runner.run_async(
            user_id=self.bench.customer, session_id=self.session.id, new_message=message, **options
        )
        return [event async for event in events]


def call_in(events: list[Any], name: str) -> Any:
    """The call of this function, with the invocation that it was made in."""
    return next(
        (call, event.invocation_id) for event in events for call in event.get_function_calls() if call.name == name
    )


def answer_to(call: Any, response: dict[str, Any]) -> types.Part:
    return types.Part(function_response=types.FunctionResponse(id=call.id, name=call.name, response=response))


RESUMABLE = pytest.mark.parametrize("resumable", [False, True], ids=["again", "resumed"])


@RESUMABLE
@pytest.mark.parametrize("pending", [None, {"status": "pending"}], ids=["nothing", "pending"])
def test_a_long_running_tool_is_charged_once(bench: Bench, resumable: bool, pending: Any) -> None:
    """When it is started; its answer, which somebody sends later, is not another use."""
    started: list[str] = []

    def begin(word: str) -> Any:
        """Search."""
        started.append(word)
        return pending

    bench.upstream.script = turns(Turn(calls=[("search", {"word": "light"})]), Turn())

    async def program() -> None:
        talk = Talk(bench, LongRunningFunctionTool(func=named_search(begin)), resumable=resumable)
        call, invocation = call_in(await talk.say(), "search")
        options = {"invocation_id": invocation} if resumable else {}
        events = await talk.say(answer_to(call, {"found": "a lighthouse"}), **options)
        assert text_of(events[-1]) or events[-1].actions.end_of_agent

    bench.run(program(), nobody=True)
    assert started == ["light"]
    assert bench.books().count(SOLD) == 1
    assert set(bench.books()) == {MODEL, SOLD}
    assert len(bench.books()) == 1 + len(bench.upstream.posts())


def careful(word: str, tool_context: ToolContext) -> Any:
    """Search."""
    if tool_context.tool_confirmation is None:
        tool_context.request_confirmation(hint="May I?")
        return None
    return search(word) if tool_context.tool_confirmation.confirmed else {"error": "forbidden"}


@RESUMABLE
@pytest.mark.parametrize("confirmed", [True, False])
@pytest.mark.parametrize("by_itself", [True, False])
def test_a_tool_that_asks_for_leave(bench: Bench, resumable: bool, confirmed: bool, by_itself: bool) -> None:
    """Nothing while it waits; once when it may, and nothing when it may not."""
    tool = FunctionTool(named_search(careful) if by_itself else search, require_confirmation=not by_itself)
    bench.upstream.script = SEARCHES

    async def program() -> None:
        talk = Talk(bench, tool, resumable=resumable)
        call, invocation = call_in(await talk.say(), "adk_request_confirmation")
        assert await bench.vluna.aflush(10)
        assert SOLD not in bench.books()
        options = {"invocation_id": invocation} if resumable else {}
        events = await talk.say(answer_to(call, {"confirmed": confirmed}), **options)
        assert any(text_of(event) for event in events)

    bench.run(program(), nobody=True)
    assert bench.books().count(SOLD) == confirmed
    assert len(bench.books()) == confirmed + len(bench.upstream.posts())


@RESUMABLE
def test_a_tool_that_asks_for_a_credential(bench: Bench, resumable: bool) -> None:
    """The first use only asks; the second one, after the user has answered, is charged."""
    from fastapi.openapi.models import OAuth2, OAuthFlowAuthorizationCode, OAuthFlows
    from google.adk.auth.auth_credential import AuthCredential, AuthCredentialTypes, OAuth2Auth
    from google.adk.auth.auth_tool import AuthConfig

    flow = OAuthFlowAuthorizationCode(authorizationUrl="http://127.0.0.1:9/a", tokenUrl="http://127.0.0.1:9/t")
    config = AuthConfig(
        auth_scheme=OAuth2(flows=OAuthFlows(authorizationCode=flow)),
        raw_auth_credential=AuthCredential(
            auth_type=AuthCredentialTypes.OAUTH2, oauth2=OAuth2Auth(client_id="a", client_secret="b")
        ),
    )
    uses: list[str] = []

    def private(word: str, tool_context: ToolContext) -> Any:
        """Search."""
        uses.append(word)
        if len(uses) == 1:
            tool_context.request_credential(config)
            return None
        return search(word)

    bench.upstream.script = SEARCHES

    async def program() -> None:
        talk = Talk(bench, named_search(private), resumable=resumable)
        call, invocation = call_in(await talk.say(), "adk_request_credential")
        assert await bench.vluna.aflush(10)
        assert SOLD not in bench.books()
        granted = config.model_copy(deep=True)
        granted.exchanged_auth_credential = AuthCredential(
            auth_type=AuthCredentialTypes.OAUTH2, oauth2=OAuth2Auth(access_token="c")
        )
        options = {"invocation_id": invocation} if resumable else {}
        await talk.say(answer_to(call, granted.model_dump(mode="json", exclude_none=True, by_alias=True)), **options)

    bench.run(program(), nobody=True)
    assert len(uses) == 2
    assert bench.books().count(SOLD) == 1
    assert len(bench.books()) == 1 + len(bench.upstream.posts())


# -- agents as tools ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inherits", [True, False], ids=["plugins", "none"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "bare"])
def test_an_agent_as_a_tool(bench: Bench, stream: bool, inherits: bool, wrapped: bool) -> None:
    """Its requests are billed to the run's customer under its own name; without plugins, where its model is wrapped."""
    model = wrap_model(bench.gemini(), bench.vluna) if wrapped else bench.gemini()
    advisor = LlmAgent(name="search", model=model, description="Searches.")
    team = SequentialAgent(
        name="search", sub_agents=[advisor.clone({"name": "first"}), advisor.clone({"name": "last"})]
    )
    bench.upstream.script = turns(Turn(calls=[("search", {"request": "light"})]), Turn())

    def script(body: dict[str, Any]) -> Turn:
        own = "tools" in body
        return turns(Turn(calls=[("search", {"request": "light"})]), Turn())(body) if own else Turn()

    bench.upstream.script = script

    async def program() -> None:
        with call_context(principal_id="somebody_else"):
            tool = AgentTool(team, include_plugins=inherits)
            agent = bench.agent(bench.gemini(), tools=[tool])
            plugin = bench.plugin(tools={"search": "tools.search"})
            await bench.said(agent, plugin, user=bench.customer, stream=stream)

    bench.run(program(), nobody=True)
    inner = 2 if inherits or wrapped else 0
    assert sorted(bench.books()) == sorted([MODEL, MODEL, SOLD] + [MODEL] * inner)
    agents = sorted(agent for feature, agent in bench.labels("agent") if feature == FEATURE)
    assert agents == sorted(["helper", "helper"] + (["first", "last"] if inherits else ["helper"] * inner))
    (sold,) = (entry for entry in bench.gate.booked(bench.customer).entries if entry.feature == "tools.search")
    within = [parent for _, parent in bench.labels("parent_operation_id") if parent]
    assert within == [sold.labels["operation_id"]] * inner


def test_what_a_tool_asks_is_billed_to_the_runs_customer(bench: Bench, provider: Any) -> None:
    """A metered client in a tool that is not sold; in the thread that ADK may run it in, too."""
    import openai
    from google.adk.agents.run_config import RunConfig, ToolThreadPoolConfig

    client = bench.vluna.wrap(openai.OpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))

    def ask(word: str) -> str:
        """Search."""
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": word}])
        return word

    bench.upstream.script = SEARCHES

    async def program() -> None:
        agent = bench.agent(bench.gemini(), tools=[named_search(ask)])
        runner = InMemoryRunner(app=App(name="tests", root_agent=agent, plugins=[bench.plugin()]))
        for config in (None, RunConfig(tool_thread_pool_config=ToolThreadPoolConfig(max_workers=2))):
            session = await runner.session_service.create_session(app_name="tests", user_id=bench.customer)
            async for _ in runner.run_async(
                user_id=bench.customer, session_id=session.id, new_message=QUESTION, run_config=config
            ):
                pass

    bench.run(program(), nobody=True)
    assert sorted(bench.books()) == sorted([MODEL, MODEL, ("openai.gpt-4o", 120)] * 2)
    assert {agent for _, agent in bench.labels("agent")} == {"helper"}
