"""Who pays in Google ADK: the plugin's identity, the surrounding context, what is bound, in runs at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("google.adk", reason="Google ADK is not installed: pip install google-adk")

from adk_stage import FEATURE, QUESTION, Bench, bench_fixture, lookup, stream_fixture, text_of  # noqa: F401
from gemini_upstream import Turn, turns
from google.adk.agents import LlmAgent
from google.adk.apps import App
from google.adk.models import Gemini
from google.adk.runners import InMemoryRunner

from vluna_llm import Vluna, call_context
from vluna_llm.context import make_context
from vluna_llm.errors import ConfigurationError, GateDenied, MissingPrincipal
from vluna_llm.integrations.google_adk import VlunaPlugin, wrap_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

SEARCHES = turns(Turn(calls=[("lookup", {"word": "light"})]), Turn())


@pytest.mark.parametrize("is_async", [False, True])
def test_the_context_names_who_pays(bench: Bench, stream: bool, is_async: bool) -> None:
    """It wins over the surrounding context; labels tell the run and the agent. The model is not wrapped by anybody."""

    def now(ctx: Any) -> Any:
        return {"principal_id": ctx.user_id, "end_user": "eve", "labels": {"team": "sea"}}

    async def later(ctx: Any) -> Any:
        return now(ctx)

    async def program() -> set[str]:
        with call_context(principal_id="somebody_else", labels={"outer": "kept"}):
            events = bench.events(
                bench.agent(bench.gemini(), tools=[lookup]),
                bench.plugin(identity=later if is_async else now),
                user=bench.customer,
                stream=stream,
            )
            return {event.invocation_id async for event in events}

    bench.upstream.script = SEARCHES
    (invocation,) = bench.run(program())
    bench.charged(2)
    told = bench.labels("run_id", "agent", "end_user", "team", "outer")
    assert told == [(FEATURE, invocation, "helper", "eve", "sea", "kept")] * 2


def test_a_scope_around_adds_up_what_others_pay(bench: Bench) -> None:
    async def program() -> int:
        with call_context() as scope:
            await bench.said(bench.agent(bench.gemini()), bench.plugin(), user=bench.customer)
        assert await scope.wait_async(10)
        return scope.settled_xusd

    charged = bench.run(program(), nobody=True)
    assert charged == bench.gate.booked(bench.customer).charged_xusd > 0


def test_a_text_is_the_customer(bench: Bench) -> None:
    bench.run(bench.said(bench.agent(bench.gemini()), bench.plugin(identity=lambda ctx: bench.customer)), nobody=True)
    bench.charged(1)


@pytest.mark.parametrize("identity", [None, lambda ctx: None], ids=["no identity", "None"])
def test_none_is_whoever_pays_around(bench: Bench, identity: Any) -> None:
    agent = bench.agent(bench.gemini(), tools=[lookup])
    bench.upstream.script = SEARCHES
    bench.run(bench.said(agent, bench.plugin(identity=identity)))
    bench.charged(2)
    with pytest.raises(MissingPrincipal):
        bench.run(bench.said(agent, bench.plugin(identity=identity)), nobody=True)
    assert len(bench.upstream.posts()) == 2


def test_a_call_context_may_be_given(bench: Bench) -> None:
    context = make_context(principal_id=bench.customer, feature_code="chat.answer")
    bench.run(bench.said(bench.agent(bench.gemini()), bench.plugin(identity=lambda ctx: context)), nobody=True)
    assert bench.books() == [("chat.answer", 120)]


def test_the_state_of_the_session_may_name_who_pays(bench: Bench) -> None:
    """It is asked for each request: who logs in by a tool pays from then on."""

    def login(tool_context: Any) -> str:
        """Log in."""
        tool_context.state["customer"] = bench.customer
        return "welcome"

    def identity(ctx: Any) -> Any:
        return {"principal_id": ctx.state.get("customer", f"{bench.customer}_guest")}

    login.__annotations__["tool_context"] = __import__("google.adk.tools", fromlist=["ToolContext"]).ToolContext
    bench.upstream.script = turns(Turn(calls=[("login", {})]), Turn())
    bench.run(bench.said(bench.agent(bench.gemini(), tools=[login]), bench.plugin(identity=identity)))
    bench.charged(1)
    bench.charged(1, f"{bench.customer}_guest")


# -- identities that cannot be billed ----------------------------------------------------------------------------------


def _lost(ctx: Any) -> Any:
    raise LookupError("no such customer")


async def _lost_later(ctx: Any) -> Any:
    raise LookupError("no such customer")


BAD = [
    (_lost, LookupError),
    (_lost_later, LookupError),
    (lambda ctx: {"principal_id": " blank "}, ConfigurationError),
    (lambda ctx: {"customer": "x"}, ConfigurationError),
    (lambda ctx: ["customer"], ConfigurationError),
    (lambda ctx: 7, ConfigurationError),
    (lambda ctx: {"principal_id": "x", "idempotency_key": "job"}, ConfigurationError),
]


@pytest.mark.parametrize(("identity", "error"), BAD)
def test_an_identity_that_cannot_be_billed(bench: Bench, stream: bool, identity: Any, error: Any) -> None:
    """Its own error comes out of the run, and nobody is asked. No callback makes an answer of it."""
    agent = bench.agent(bench.gemini(), on_model_error_callback=lambda **_: pytest.fail("asked"))
    with pytest.raises(error) as raised:
        bench.run(bench.said(agent, bench.plugin(identity=identity), stream=stream))
    assert type(raised.value) is error
    assert bench.upstream.posts() == []
    assert bench.leases() == []


@pytest.mark.parametrize(("identity", "error"), BAD)
def test_observe_goes_on_for_whoever_pays_around(
    bench: Bench, make_vluna: Callable[..., Vluna], identity: Any, error: Any
) -> None:
    """Nothing is refused then; a tool runs, too."""
    bench.vluna = make_vluna(mode="observe")
    bench.upstream.script = SEARCHES
    bench.run(bench.said(bench.agent(bench.gemini(), tools=[lookup]), bench.plugin(identity=identity)))
    bench.charged(2)


def test_an_identity_that_is_lost_before_a_tool(bench: Bench) -> None:
    """The tool is not run for anybody."""
    ran: list[str] = []

    def spend(word: str) -> str:
        """Spend."""
        ran.append(word)
        return word

    def identity(ctx: Any) -> Any:
        if getattr(ctx, "function_call_id", None):
            raise LookupError("no such customer")
        return {"principal_id": bench.customer}

    bench.upstream.script = turns(Turn(calls=[("spend", {"word": "light"})]), Turn())
    with pytest.raises(LookupError):
        bench.run(bench.said(bench.agent(bench.gemini(), tools=[spend]), bench.plugin(identity=identity)))
    assert ran == []
    bench.charged(1)


# -- at the same time --------------------------------------------------------------------------------------------------


def test_runs_at_the_same_time_are_never_mixed_up(bench: Bench, stream: bool) -> None:
    """One agent, one plugin, eight customers, tools that take turns and what is metered in them."""
    client = wrap_model(bench.gemini(), bench.vluna)

    async def ponder(word: str) -> str:
        """Ponder."""
        await asyncio.sleep(0.02)
        async for answer in client.generate_content_async(_request("inside")):
            return str(answer.content.parts[0].text)
        return ""

    agent = bench.agent(bench.gemini(), tools=[ponder])
    plugin = bench.plugin()
    customers = [f"{bench.customer}_{index}" for index in range(8)]

    def script(body: dict[str, Any]) -> Turn:
        if body["contents"][0]["parts"][0]["text"] == "inside":
            return Turn()
        return turns(Turn(calls=[("ponder", {"word": "light"})]), Turn())(body)

    bench.upstream.script = script

    async def program() -> None:
        await asyncio.gather(*(bench.said(agent, plugin, user=customer, stream=stream) for customer in customers))

    bench.run(program())
    for customer in customers:
        bench.charged(3, customer)
        assert {run for _, run in bench.labels("run_id", customer=customer)} != {""}
        assert len({run for _, run in bench.labels("run_id", customer=customer)}) == 1
    assert bench.leases() == []
    assert agent.model.__class__ is Gemini


def _request(text: str) -> Any:
    from google.adk.models.llm_request import LlmRequest
    from google.genai import types

    return LlmRequest(model="gemini-2.5-flash", contents=[types.Content(role="user", parts=[types.Part(text=text)])])


def test_runs_that_take_turns_in_one_task(bench: Bench) -> None:
    """Two runs read alternately by the same task: a context variable would follow the last one that began."""
    ann, bob = f"{bench.customer}_ann", f"{bench.customer}_bob"
    agent, plugin = bench.agent(bench.gemini(), tools=[lookup]), bench.plugin()
    bench.upstream.script = SEARCHES

    async def program() -> None:
        runs = [bench.events(agent, plugin, user=who, stream=True) for who in (ann, bob)]
        while runs:
            for run in list(runs):
                try:
                    await anext(run)
                except StopAsyncIteration:
                    runs.remove(run)
        assert current() is None

    from vluna_llm.context import current_context

    def current() -> str | None:
        return current_context().principal_id

    bench.run(program(), nobody=True)
    bench.charged(2, ann)
    bench.charged(2, bob)


def test_one_agent_in_a_runner_with_the_plugin_and_in_one_without(bench: Bench) -> None:
    """The agent stays as it is: the other runner's requests are nobody's business here, also at the same time."""
    agent = bench.agent(bench.gemini())

    async def program() -> None:
        await asyncio.gather(
            *(bench.said(agent, *([bench.plugin()] if n % 2 else []), user=bench.customer) for n in range(6))
        )

    bench.run(program(), nobody=True)
    assert len(bench.upstream.posts()) == 6
    bench.charged(3)


# -- with models that are wrapped --------------------------------------------------------------------------------------


def test_a_wrapped_model_is_metered_once(bench: Bench, stream: bool) -> None:
    """For the plugin's customer."""
    bench.run(bench.said(bench.agent(), bench.plugin(), user=bench.customer, stream=stream), nobody=True)
    bench.charged(1)
    assert bench.labels("agent") == [(FEATURE, "helper")]


def test_who_is_bound_to_a_model_pays(bench: Bench) -> None:
    model = wrap_model(bench.gemini(), bench.vluna, principal_id=f"{bench.customer}_bound")
    bench.run(bench.said(bench.agent(model), bench.plugin(), user=bench.customer))
    bench.charged(1, f"{bench.customer}_bound")
    assert bench.labels("agent", customer=f"{bench.customer}_bound") == [(FEATURE, "helper")]
    assert bench.leases() == []


def test_two_plugins_meter_once(bench: Bench, stream: bool) -> None:
    """The last one says who pays: it is the innermost."""
    first = bench.plugin(identity=lambda ctx: {"principal_id": f"{bench.customer}_first"})
    last = bench.plugin(name="second")
    bench.upstream.script = SEARCHES
    bench.run(bench.said(bench.agent(bench.gemini(), tools=[lookup]), first, last, user=bench.customer, stream=stream))
    bench.charged(2)
    assert bench.leases(f"{bench.customer}_first") == []


# -- ways to run -------------------------------------------------------------------------------------------------------


def test_a_synchronous_run(bench: Bench) -> None:
    """`Runner.run` works in a thread of its own, which sees the caller's context; identity needs none."""
    agent = bench.agent(bench.gemini(), tools=[lookup])
    bench.upstream.script = SEARCHES
    for plugin in (bench.plugin(), bench.plugin(identity=None)):
        runner = InMemoryRunner(app=App(name="tests", root_agent=agent, plugins=[plugin]))
        service = runner.session_service
        session = asyncio.run(service.create_session(app_name="tests", user_id=bench.customer))
        with call_context(principal_id=bench.customer if plugin.identity is None else "somebody_else"):
            events = list(runner.run(user_id=bench.customer, session_id=session.id, new_message=QUESTION))
        assert text_of(events[-1])
    assert bench.vluna.flush(10)
    bench.charged(4)


def test_a_synchronous_run_that_is_refused(bench: Bench) -> None:
    bench.gate.set_credit(bench.customer, 0)
    runner = InMemoryRunner(app=App(name="tests", root_agent=bench.agent(bench.gemini()), plugins=[bench.plugin()]))
    session = asyncio.run(runner.session_service.create_session(app_name="tests", user_id=bench.customer))
    with pytest.raises(GateDenied):
        list(runner.run(user_id=bench.customer, session_id=session.id, new_message=QUESTION))
    assert bench.upstream.posts() == []


def test_a_model_by_its_name(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README shows it: ADK makes the client itself, of the environment."""
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", bench.upstream.host)
    monkeypatch.setenv("GOOGLE_API_KEY", "none")
    parent = LlmAgent(name="parent", model="gemini-2.5-flash", sub_agents=[])
    bench.run(bench.said(parent, bench.plugin(), user=bench.customer), nobody=True)
    bench.charged(1)


def test_off_meters_nothing(bench: Bench, make_vluna: Callable[..., Vluna]) -> None:
    """And asks nobody who pays."""
    bench.vluna = make_vluna(mode="off")
    bench.upstream.script = SEARCHES
    asked: list[Any] = []
    plugin = bench.plugin(identity=asked.append, tools={"lookup": "tools.lookup"})
    assert bench.run(bench.said(bench.agent(bench.gemini(), tools=[lookup]), plugin), nobody=True)
    assert bench.leases() == []
    assert asked == []


def test_the_environment_is_enough(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import vluna_llm.vluna

    monkeypatch.setattr(vluna_llm.vluna, "_default", bench.vluna)
    assert VlunaPlugin().vluna is Vluna.default() is bench.vluna
