"""Google ADK around metered clients, and its real ``LiteLlm``: each model call is asked for, and settled, once.

``LiteLlm`` puts OpenAI's numbers under Gemini's names; whichever layer settles, the provider's own are charged.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, aclosing
from typing import Any

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # LiteLLM otherwise asks the network for its price list
pytest.importorskip("google.adk", reason="Google ADK is not installed: pip install google-adk")
pytest.importorskip("litellm", reason="LiteLLM is not installed: pip install litellm")

import nested_stage as stages
from agent_provider import TEXT, has_results
from agent_provider import call as tool_call
from google.adk.agents import LlmAgent
from google.adk.agents.run_config import RunConfig, StreamingMode
from google.adk.models.base_llm import BaseLlm
from google.adk.models.lite_llm import LiteLlm
from google.adk.models.llm_response import LlmResponse
from google.adk.runners import Runner
from google.adk.sessions import InMemorySessionService
from google.genai import types
from nested_stage import (
    GIVEN_BACK,
    NOTHING,
    OWN_TOKENS,
    REFUSED,
    TOKENS,
    Source,
    Stage,
    Texts,
    all_of,
    cancelled,
    charged,
    left,
    refusal_in,
)

from vluna_llm.errors import GateDenied
from vluna_llm.integrations.google_adk import wrap_model
from vluna_llm.sandbox import Sandbox

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

FEATURE = "openai.gpt-4o"
SSE = RunConfig(streaming_mode=StreamingMode.SSE)


@pytest.fixture(scope="module")
def _stage(shared_gate: Sandbox) -> Iterator[Stage]:
    with stages.staged(shared_gate) as stage:
        yield stage


@pytest.fixture
def stage(_stage: Stage, caplog: pytest.LogCaptureFixture) -> Iterator[Stage]:
    with stages.one_test(_stage, caplog) as stage:
        yield stage


def streams(function: Any) -> Any:
    return pytest.mark.parametrize("stream", [False, True], ids=["whole", "sse"])(function)


async def said(agent: Any, stream: bool) -> Texts:
    """What an agent says to one message: of a stream its pieces, else its texts."""
    sessions = InMemorySessionService()  # type: ignore[no-untyped-call]
    session = await sessions.create_session(app_name="tests", user_id="ann")
    runner = Runner(app_name="tests", agent=agent, session_service=sessions)
    message = types.Content(role="user", parts=[types.Part(text="hi")])
    events = runner.run_async(
        user_id="ann", session_id=session.id, new_message=message, run_config=SSE if stream else None
    )
    async with aclosing(events):
        async for event in events:
            for part in (event.content.parts if event.content else None) or ():
                if part.text and bool(event.partial) is stream:
                    yield part.text


# -- any metered client inside -----------------------------------------------------------------------------------------


class Over(BaseLlm):
    """A model of an application's own, whose own numbers are wrong on purpose: the books show who has settled."""

    inner: Any

    async def generate_content_async(self, llm_request: Any, stream: bool = False) -> AsyncIterator[Any]:  # type: ignore[override]
        whole = ""
        async with aclosing(self.inner(stream)) as texts:
            async for text in texts:
                whole += text
                if stream:
                    yield LlmResponse(content=_content(text), partial=True)
        usage = types.GenerateContentResponseUsageMetadata(
            prompt_token_count=OWN_TOKENS - 3, candidates_token_count=3, total_token_count=OWN_TOKENS
        )
        stop = types.FinishReason.STOP
        yield LlmResponse(content=_content(whole), usage_metadata=usage, finish_reason=stop, partial=False)


def _content(text: str) -> Any:
    return types.Content(role="model", parts=[types.Part(text=text)])


INNERS: dict[str, Source] = {
    "openai": stages.wrapped,
    "openai sync": stages.wrapped_sync,
    "transport": stages.transport,
    "openai over transport": stages.wrapped_over_transport,
    "litellm": stages.lite,
    "litellm over openai": stages.lite_over_client,
}
inners = pytest.mark.parametrize("name", INNERS)


@pytest.fixture
def everywhere(stage: Stage) -> Iterator[Stage]:
    """The stage with LiteLLM's callback."""
    with stages.litellm_callback(stage.vluna):
        yield stage


def over(stage: Stage, source: Source, stream: bool, payer: str | None = None, **bound: str) -> Texts:
    """An agent whose model, metered, makes that call."""
    model = wrap_model(Over(model="own/model", inner=lambda s: source(stage, s, payer)), stage.vluna, **bound)
    return said(LlmAgent(name="helper", model=model), stream)


@inners
@streams
def test_what_is_metered_inside_settles_once(name: str, stream: bool, everywhere: Stage) -> None:
    stage = everywhere
    customer, poor = stage.customer(), stage.customer(credit=0)
    assert stage.run(lambda: all_of(over(stage, INNERS[name], stream)), customer)
    assert stage.books(customer) == charged(TOKENS)
    with pytest.raises(GateDenied):
        stage.run(lambda: all_of(over(stage, INNERS[name], stream)), poor)
    assert stage.books(poor) == REFUSED
    assert len(stage.upstream.posts()) == 1


def test_what_is_not_metered_inside_is_settled_around_it(everywhere: Stage) -> None:
    customer = everywhere.customer()
    assert everywhere.run(lambda: all_of(over(everywhere, stages.bare, False)), customer)
    assert everywhere.books(customer) == charged(OWN_TOKENS)


@inners
@streams
def test_a_failure_inside_costs_nothing(name: str, stream: bool, everywhere: Stage) -> None:
    stage, customer = everywhere, everywhere.customer()
    stage.upstream.behaviour = "cut" if stream else "down"
    with pytest.raises(Exception) as raised:  # noqa: PT011
        stage.run(lambda: all_of(over(stage, INNERS[name], stream)), customer)
    assert refusal_in(raised.value) is None
    assert stage.books(customer) == GIVEN_BACK


@pytest.mark.parametrize("name", [name for name in INNERS if name != "openai sync"])
def test_an_answer_that_is_left_or_cancelled_costs_nothing(name: str, everywhere: Stage) -> None:
    stage, leaver, other = everywhere, everywhere.customer(), everywhere.customer()
    stage.upstream.behaviour = "slow"
    stage.run(lambda: left(over(stage, INNERS[name], True)), leaver)
    assert stage.books(leaver) == GIVEN_BACK
    stage.upstream.reset()
    stage.upstream.behaviour = "silent"
    stage.run(lambda: cancelled(stage, over(stage, INNERS[name], False)), other)
    assert stage.books(other) == GIVEN_BACK


@inners
@streams
def test_the_inner_one_may_bill_somebody_else(name: str, stream: bool, everywhere: Stage) -> None:
    """Whoever is named nearest to the provider pays; what was admitted for the other one is given back."""
    stage = everywhere
    around, payer, other, poor = (stage.customer(credit) for credit in (None, None, None, 0))
    assert stage.run(lambda: all_of(over(stage, INNERS[name], stream, principal_id=payer)), around)
    assert (stage.books(payer), stage.books(around)) == (charged(TOKENS), NOTHING)
    assert stage.run(lambda: all_of(over(stage, INNERS[name], stream, other)), around)
    assert (stage.books(other), stage.books(around)) == (charged(TOKENS), GIVEN_BACK)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        stage.run(lambda: all_of(over(stage, INNERS[name], stream, poor)), other)
    assert isinstance(refusal_in(raised.value), GateDenied)
    assert stage.books(poor) == REFUSED
    assert stage.books(other).charged == [TOKENS]


# -- ADK's own model over LiteLLM --------------------------------------------------------------------------------------

Way = Callable[[Stage, Any], Any]
WAYS: dict[str, Way] = {
    "wrap_model": lambda stage, model: wrap_model(model(), stage.vluna),
    "VlunaCallback": lambda stage, model: model(),
    "both": lambda stage, model: wrap_model(model(), stage.vluna),
    "wrap_model over a wrapped client": lambda stage, model: wrap_model(
        model(client=stage.metered(stage.client())), stage.vluna
    ),
    "all three": lambda stage, model: wrap_model(model(client=stage.metered(stage.client())), stage.vluna),
}


@pytest.fixture(params=WAYS)
def agent(request: pytest.FixtureRequest, stage: Stage) -> Iterator[Callable[..., Any]]:
    """Makes an agent whose model is a real ``LiteLlm``, metered in one of the ways."""

    def lite_llm(**options: Any) -> LiteLlm:
        where = {"api_base": stage.upstream.base_url, "api_key": "sk", "max_retries": 0}
        return LiteLlm(model="openai/gpt-4o", **where, **options)

    with ExitStack() as stack:
        if request.param in ("VlunaCallback", "both", "all three"):
            stack.enter_context(stages.litellm_callback(stage.vluna))
        yield lambda **options: LlmAgent(name="helper", model=WAYS[request.param](stage, lite_llm), **options)


@streams
def test_litellm_below_is_charged_once(stream: bool, agent: Any, stage: Stage) -> None:
    """With the provider's numbers, cached tokens and all, and under the name that LiteLLM's own integration gives."""
    customer = stage.customer()
    assert "wor" in stage.run(lambda: all_of(said(agent(), stream)), customer)
    assert stage.books(customer) == charged(TOKENS)
    assert len(stage.upstream.posts()) == 1
    (entry,) = stage.gate.booked(customer).entries
    parts = {"input": 60, "cached": 40, "output": 20}
    assert dict(entry.lines) == {f"{FEATURE}.tokens.{part}": count for part, count in parts.items()}
    assert entry.labels["usage_source"] == "provider"


@streams
def test_litellm_below_calls_a_tool(stream: bool, agent: Any, stage: Stage) -> None:
    """Each turn of the model is an operation of its own."""

    def look_up(word: str) -> str:
        """Look a word up."""
        return f"found {word}"

    stage.upstream.script = lambda body: TEXT if has_results(body) else tool_call("look_up", word="tide")
    customer = stage.customer()
    assert stage.run(lambda: all_of(said(agent(tools=[look_up]), stream)), customer)
    assert stage.books(customer) == charged(TOKENS, TOKENS)
    assert any("found tide" in str(seen.body) for seen in stage.upstream.posts())


@streams
def test_litellm_below_is_refused(stream: bool, agent: Any, stage: Stage) -> None:
    poor = stage.customer(credit=0)
    with pytest.raises(GateDenied) as raised:
        stage.run(lambda: all_of(said(agent(), stream)), poor)
    assert raised.value.reason == "insufficient_credit"
    assert stage.books(poor) == REFUSED
    assert stage.upstream.posts() == []


@streams
def test_litellm_below_fails(stream: bool, agent: Any, stage: Stage) -> None:
    customer = stage.customer()
    stage.upstream.behaviour = "cut" if stream else "down"
    with pytest.raises(Exception) as raised:  # noqa: PT011
        stage.run(lambda: all_of(said(agent(), stream)), customer)
    assert refusal_in(raised.value) is None
    assert stage.books(customer) == GIVEN_BACK


def test_litellm_below_is_left(agent: Any, stage: Stage) -> None:
    customer = stage.customer()
    stage.upstream.behaviour = "slow"
    stage.run(lambda: left(said(agent(), True)), customer)
    assert stage.books(customer) == GIVEN_BACK


def test_litellm_below_is_cancelled(agent: Any, stage: Stage) -> None:
    customer = stage.customer()
    stage.upstream.behaviour = "silent"
    stage.run(lambda: cancelled(stage, said(agent(), False)), customer)
    assert stage.books(customer) == GIVEN_BACK
