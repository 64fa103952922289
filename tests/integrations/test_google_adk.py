"""Google ADK: a real Runner, google-genai over real HTTP against a Gemini of ours, and the embedded gate's books."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("google.adk", reason="Google ADK is not installed: pip install google-adk")

from adk_stage import FEATURE, NAME, Bench, bench_fixture, lookup, stream_fixture  # noqa: F401
from gemini_upstream import Turn, turns
from google.adk.models import Gemini
from google.adk.models.base_llm import BaseLlm
from google.adk.models.llm_request import LlmRequest
from google.adk.models.llm_response import LlmResponse
from google.genai import errors, types
from pydantic import PrivateAttr

from vluna_llm import Vluna, call_context
from vluna_llm.errors import ConfigurationError, GateDenied, MissingPrincipal
from vluna_llm.integrations._google_adk_words import usage_of
from vluna_llm.integrations.google_adk import VlunaLlm, wrap_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

# -- answers -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_charged_once(bench: Bench, stream: bool) -> None:
    """By Gemini's meaning: thoughts beside the candidates, cached inside of the prompt."""
    assert bench.run(bench.said(bench.agent(), stream=stream))
    bench.charged(1)
    assert len(bench.upstream.posts()) == 1
    (entry,) = bench.gate.booked(bench.customer).entries
    assert entry.labels["usage_source"] == "provider"


def test_each_turn_with_a_tool_is_charged(bench: Bench, stream: bool) -> None:
    bench.upstream.script = turns(Turn(calls=[("lookup", {"word": "light"})]), Turn())
    assert bench.run(bench.said(bench.agent(tools=[lookup]), stream=stream))
    bench.charged(2)


def test_usage_in_every_chunk_counts_once(bench: Bench) -> None:
    bench.upstream.script = turns(Turn(usage="each"))
    bench.run(bench.said(bench.agent(), stream=True))
    bench.charged(1)


def test_an_answer_without_usage_is_estimated(bench: Bench, stream: bool) -> None:
    bench.upstream.script = turns(Turn(usage=None))
    bench.run(bench.said(bench.agent(), stream=stream))
    (entry,) = bench.gate.booked(bench.customer).entries
    assert entry.labels["usage_source"] == "estimated"
    assert entry.quantity > 0
    assert bench.leases() == ["closed"]


def test_two_customers_at_the_same_time(bench: Bench, stream: bool) -> None:
    """Each task pays for its own run of the one agent."""
    agent = bench.agent()

    async def of(customer: str) -> None:
        with call_context(principal_id=customer):
            await bench.said(agent, stream=stream)

    async def both() -> None:
        await asyncio.gather(*(of(f"{bench.customer}_{n}") for n in (0, 1, 0)))

    bench.run(both())
    bench.charged(2, f"{bench.customer}_0")
    bench.charged(1, f"{bench.customer}_1")
    assert bench.leases() == []


def test_a_bound_model_bills_its_customer(bench: Bench) -> None:
    model = wrap_model(bench.gemini(), bench.vluna, principal_id=f"{bench.customer}_bound", labels={"team": "sea"})
    bench.run(bench.said(bench.agent(model)))
    bench.charged(1, f"{bench.customer}_bound")
    assert bench.leases() == []
    with pytest.raises(ConfigurationError):
        wrap_model(bench.gemini(), bench.vluna, principal_id="")


def test_wrapped_twice_meters_once(bench: Bench, stream: bool) -> None:
    model = wrap_model(wrap_model(bench.gemini(), bench.vluna), bench.vluna)
    bench.run(bench.said(bench.agent(model), stream=stream))
    bench.charged(1)


def test_a_copied_agent_is_metered_like_the_first(bench: Bench) -> None:
    agent = bench.agent()
    for one in (agent.clone(), agent.model_copy(deep=True), copy.deepcopy(agent)):
        assert one.model.model == NAME
        assert bench.run(bench.said(one))
    bench.charged(3)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_refusal_comes_out_as_it_is(bench: Bench, stream: bool) -> None:
    """The provider is not asked."""
    bench.gate.set_credit(bench.customer, 0)
    with pytest.raises(GateDenied) as denied:
        bench.run(bench.said(bench.agent(), stream=stream))
    assert denied.value.reason == "insufficient_credit"
    assert bench.upstream.posts() == []
    assert bench.books() == []


def test_nobody_pays(bench: Bench) -> None:
    with pytest.raises(MissingPrincipal):
        bench.run(bench.said(bench.agent()), nobody=True)
    assert bench.upstream.posts() == []


def test_a_refusal_after_a_tool_leaves_the_first_turn_charged(bench: Bench, stream: bool) -> None:
    def spend(word: str) -> str:
        """Look up, while the credit runs out."""
        assert bench.vluna.flush(10)
        bench.gate.set_credit(bench.customer, 0)
        return word

    bench.upstream.script = turns(Turn(calls=[("spend", {"word": "light"})]), Turn())
    with pytest.raises(GateDenied):
        bench.run(bench.said(bench.agent(tools=[spend]), stream=stream))
    bench.charged(1)
    assert len(bench.upstream.posts()) == 1


# -- failures and aborts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 500])
def test_the_provider_fails(bench: Bench, stream: bool, status: int) -> None:
    """Its error comes out, and the lease is given back."""
    bench.upstream.script = turns(Turn(status=status))
    with pytest.raises(errors.APIError) as failed:
        bench.run(bench.said(bench.agent(), stream=stream))
    assert failed.value.code == status
    bench.cancelled()


def test_a_stream_breaks(bench: Bench) -> None:
    bench.upstream.behaviour = "cut"
    with pytest.raises(Exception, match=r".*") as broke:
        bench.run(bench.said(bench.agent(), stream=True))
    assert not isinstance(broke.value, AssertionError)
    bench.cancelled()


def test_a_stream_ends_before_the_model_had_finished(bench: Bench) -> None:
    bench.upstream.behaviour = "ends_early"
    bench.run(bench.said(bench.agent(), stream=True))
    bench.cancelled()


def test_an_answer_that_is_an_error_is_cancelled(bench: Bench, stream: bool) -> None:
    """ADK gives it an ``error_code``; what was reported would be charged."""
    bench.upstream.script = turns(Turn(text="", finish="SAFETY", usage=None))
    bench.run(bench.said(bench.agent(), stream=stream))
    bench.cancelled()


def test_an_error_with_usage_is_charged(bench: Bench, stream: bool) -> None:
    bench.upstream.script = turns(Turn(text="", finish="SAFETY"))
    bench.run(bench.said(bench.agent(), stream=stream))
    bench.charged(1)


async def _first(bench: Bench) -> None:
    events = bench.events(bench.agent(), stream=True)
    async for _ in events:
        break
    await events.aclose()
    assert bench.vluna.flush(10)
    assert bench.leases() in (["canceled"], ["closed"]), "not settled at once"


def test_the_consumer_leaves_a_run(bench: Bench) -> None:
    bench.upstream.behaviour = "hang"
    bench.run(_first(bench))
    bench.cancelled()


def test_what_was_reported_before_the_consumer_left_is_charged(bench: Bench) -> None:
    bench.upstream.behaviour = "hang"
    bench.upstream.script = turns(Turn(usage="each"))
    bench.run(_first(bench))
    assert bench.books() == [(FEATURE, 111)]


def test_a_run_left_is_estimated_where_that_is_set(bench: Bench, make_vluna: Callable[..., Vluna]) -> None:
    bench.vluna = make_vluna(on_abort="estimate")
    bench.upstream.behaviour = "hang"
    bench.run(_first(bench))
    (entry,) = bench.gate.booked(bench.customer).entries
    assert entry.labels["usage_source"] == "estimated"


@pytest.mark.parametrize("behaviour", ["silent", "hang"])
def test_the_task_is_cancelled(bench: Bench, behaviour: str) -> None:
    bench.upstream.behaviour = behaviour

    async def program() -> None:
        task = asyncio.create_task(bench.said(bench.agent(), stream=behaviour == "hang"))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    bench.run(program())
    assert len(bench.upstream.posts()) == 1
    bench.cancelled()


def test_off_meters_nothing(bench: Bench, make_vluna: Callable[..., Vluna]) -> None:
    bench.vluna = make_vluna(mode="off")
    assert bench.run(bench.said(bench.agent()))
    assert bench.leases() == []


# -- other models ------------------------------------------------------------------------------------------------------


class Scripted(BaseLlm):
    """A model of somebody's own: one response, and what else is called meanwhile."""

    response: Any
    ask: Any = None

    async def generate_content_async(self, llm_request: Any, stream: bool = False) -> Any:
        if self.ask is not None:
            await self.ask()
        yield self.response


def test_a_metered_client_inside_settles_once(bench: Bench, provider: Any) -> None:
    """As LiteLlm with a metered client or callback is: the client's own numbers are charged."""
    import openai

    client = bench.vluna.wrap(openai.AsyncOpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))

    async def ask() -> None:
        await client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hi"}])

    content = types.Content(role="model", parts=[types.Part(text="hello")])
    usage = types.GenerateContentResponseUsageMetadata(prompt_token_count=1, total_token_count=1)
    response = LlmResponse(content=content, usage_metadata=usage, finish_reason=types.FinishReason.STOP)
    model = wrap_model(Scripted(model="openai/gpt-4o", response=response, ask=ask), bench.vluna)
    assert bench.run(bench.said(bench.agent(model))) == "hello"
    assert bench.books() == [("openai.gpt-4o", 120)]
    assert bench.leases() == ["closed"]


def test_the_numbers_of_other_models() -> None:
    """LiteLlm's candidates include what was thought, Claude's do not; the total tells."""
    made = types.GenerateContentResponseUsageMetadata
    counts = {"prompt_token_count": 100, "total_token_count": 120, "thoughts_token_count": 5}
    for candidates in (20, 15):
        usage = usage_of(made(candidates_token_count=candidates, cached_content_token_count=40, **counts))
        assert usage is not None
        found = (usage.input_tokens, usage.output_tokens, usage.reasoning_tokens, usage.cached_tokens)
        assert found == (100, 20, 5, 40)
        assert usage.contradiction is None
    written = made(prompt_token_count=100, candidates_token_count=20, total_token_count=120)
    object.__setattr__(written, "cache_creation_input_tokens", 30)
    usage = usage_of(written)
    assert usage is not None
    assert usage.cache_write_tokens == 30
    assert usage_of(None) is None
    assert usage_of(made()) is None


class Pairing(Gemini):
    """A model for which ADK keeps the ids of its calls, by its class and one of its fields."""

    use_interactions_api: bool = True
    _asked: list[Any] = PrivateAttr(default_factory=list)

    async def generate_content_async(self, llm_request: Any, stream: bool = False) -> Any:
        self._asked.append([part.function_call and part.function_call.id for part in _parts(llm_request)])
        call = types.Part(function_call=types.FunctionCall(name="lookup", args={"word": "light"}))
        part = types.Part(text="done") if len(self._asked) > 1 else call
        yield LlmResponse(content=types.Content(role="model", parts=[part]), finish_reason=types.FinishReason.STOP)


def _parts(request: Any) -> Any:
    return [part for content in request.contents for part in content.parts]


@pytest.mark.parametrize("wrapped", [True, False])
def test_adk_treats_a_wrapped_model_as_its_class(bench: Bench, wrapped: bool) -> None:
    """It asks which class a model is of, and what only that class has; a wrapped one is what it wraps."""
    inner = Pairing(model=NAME)
    model = wrap_model(wrap_model(inner, bench.vluna), bench.vluna) if wrapped else inner
    bench.run(bench.said(bench.agent(model, tools=[lookup])))
    assert len(inner._asked) == 2
    assert any(call_id and call_id.startswith("adk-") for call_id in inner._asked[1])
    assert isinstance(model, Gemini)
    assert repr(inner) in repr(model)
    assert model.use_interactions_api
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing


def test_live_connections_are_told(bench: Bench, make_vluna: Callable[..., Vluna]) -> None:
    """They pass through unmetered, or are refused where that is set."""
    request = LlmRequest(model=NAME)
    assert wrap_model(bench.gemini(), bench.vluna).connect(request) is not None
    with pytest.raises(ConfigurationError):
        wrap_model(bench.gemini(), make_vluna(on_unmetered="deny")).connect(request)


def test_a_name_is_resolved_by_the_registry(bench: Bench) -> None:
    model = wrap_model(NAME, bench.vluna)
    assert isinstance(model, VlunaLlm)
    assert isinstance(model.wrapped, Gemini)
    assert model.model == NAME
    assert model.capabilities == model.wrapped.capabilities
