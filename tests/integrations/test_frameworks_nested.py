"""Layers that meter around layers that meter: each model call is asked for, and settled, once. By the gate's own books.

Each cell of the table is an outer layer around an inner one, both metered: what the outer one tells of the usage is
wrong on purpose, so that the books show which of the two has settled.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # LiteLLM otherwise asks the network for its price list
for module in ("agents", "litellm", "langchain_litellm", "langchain_openai", "langgraph", "pydantic_ai", "anthropic"):
    pytest.importorskip(module, reason=f"{module} is not installed: this needs all frameworks")

import nested_frameworks as frameworks
import nested_stage as stages
from conftest import eventually
from nested_frameworks import OUTERS, over
from nested_stage import (
    GIVEN_BACK,
    NOTHING,
    OWN_TOKENS,
    REFUSED,
    TOKENS,
    NestedProvider,
    Source,
    Stage,
    all_of,
    cancelled,
    charged,
    left,
    refusal_in,
)

from vluna_llm import Vluna
from vluna_llm.errors import GateDenied
from vluna_llm.integrations import openai_agents
from vluna_llm.sandbox import Sandbox

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

INNERS: dict[str, Source] = {
    "openai": stages.wrapped,
    "openai sync": stages.wrapped_sync,
    "anthropic": stages.claude,
    "transport": stages.transport,
    "openai over transport": stages.wrapped_over_transport,
    "litellm": stages.lite,
    "litellm sync": stages.lite_sync,
    "litellm over openai": stages.lite_over_client,
    "langchain": frameworks.langchain_openai,
    "langchain over transport": frameworks.langchain_both,
    "langchain over litellm": frameworks.langchain_litellm,
    "agents": frameworks.agents_chat,
    "agents over litellm": frameworks.agents_litellm,
    "pydantic_ai": frameworks.pydantic_openai,
    "pydantic_ai over transport": frameworks.pydantic_litellm,
    "pydantic_ai over openai": frameworks.pydantic_wrapped,
}
BLOCKING = {"openai sync", "litellm sync"}
"""A thread that blocks cannot be cancelled, and a sync stream of LiteLLM cannot be closed."""


@pytest.fixture(scope="module")
def _stage(shared_gate: Sandbox) -> Iterator[Stage]:
    """Everything that is installed for a whole process is, at once."""
    gate = shared_gate
    vluna = Vluna(
        base_url=gate.base_url, realm_id=gate.realm_id, key_id=gate.key_id, key_secret=gate.key_secret, outbox="memory"
    )
    loop = asyncio.new_event_loop()
    with NestedProvider() as upstream, stages.litellm_callback(vluna):
        yield Stage(vluna, gate, upstream, loop)
    vluna.close()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


@pytest.fixture
def stage(_stage: Stage, caplog: pytest.LogCaptureFixture) -> Iterator[Stage]:
    """The stage, with nothing asked yet. Nobody of ours has anything to complain about in the end."""
    _stage.upstream.reset()
    caplog.set_level(logging.WARNING, "vluna_llm")
    yield _stage
    _stage.upstream.released.set()
    told = [one.getMessage() for one in caplog.get_records("call") if one.name.startswith("vluna_llm")]
    assert told == []


def streams(function: Any) -> Any:
    return pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])(function)


PAIRS = [pytest.param(outer, inner, id=f"{outer}-{inner}") for outer in OUTERS for inner in INNERS]
pairs = pytest.mark.parametrize(("outer", "inner"), PAIRS)


@pairs
@streams
def test_an_answer_is_charged_once(outer: str, inner: str, stream: bool, stage: Stage) -> None:
    customer = stage.customer()
    call = over(OUTERS[outer], INNERS[inner])
    assert stage.run(lambda: all_of(call(stage, stream, None)), customer)
    assert stage.books(customer) == charged(TOKENS)
    assert len(stage.upstream.posts()) == 1


@pairs
@streams
def test_a_refusal_comes_out_before_the_provider_is_asked(outer: str, inner: str, stream: bool, stage: Stage) -> None:
    customer = stage.customer(credit=0)
    call = over(OUTERS[outer], INNERS[inner])
    with pytest.raises(GateDenied):
        stage.run(lambda: all_of(call(stage, stream, None)), customer)
    assert stage.books(customer) == REFUSED
    assert stage.upstream.posts() == []


@pairs
@streams
def test_a_provider_that_fails_costs_nothing(outer: str, inner: str, stream: bool, stage: Stage) -> None:
    customer = stage.customer()
    call = over(OUTERS[outer], INNERS[inner])
    stage.upstream.behaviour = "cut" if stream else "down"
    with pytest.raises(Exception) as raised:  # noqa: PT011 - each framework's own
        stage.run(lambda: all_of(call(stage, stream, None)), customer)
    assert refusal_in(raised.value) is None
    assert stage.books(customer) == GIVEN_BACK


@pairs
def test_an_answer_that_is_left_costs_nothing(outer: str, inner: str, stage: Stage) -> None:
    customer = stage.customer()
    call = over(OUTERS[outer], INNERS[inner])
    stage.upstream.behaviour = "slow"
    stage.run(lambda: left(call(stage, True, None)), customer)
    assert stage.books(customer) == GIVEN_BACK


@pairs
def test_a_call_that_is_cancelled_costs_nothing(outer: str, inner: str, stage: Stage) -> None:
    if inner in BLOCKING:
        pytest.skip("a thread that blocks cannot be cancelled")
    customer = stage.customer()
    call = over(OUTERS[outer], INNERS[inner])
    stage.upstream.behaviour = "silent"
    stage.run(lambda: cancelled(stage, call(stage, False, None)), customer)
    assert stage.books(customer) == GIVEN_BACK


@pairs
@streams
def test_the_inner_one_may_bill_somebody_else(outer: str, inner: str, stream: bool, stage: Stage) -> None:
    """Whoever is named nearest to the provider pays; what was admitted for the other one is given back."""
    customer, other = stage.customer(), stage.customer()
    call = over(OUTERS[outer], INNERS[inner])
    assert stage.run(lambda: all_of(call(stage, stream, other)), customer)
    assert stage.books(other) == charged(TOKENS)
    assert stage.books(customer) == GIVEN_BACK


@pairs
@streams
def test_somebody_else_who_is_refused(outer: str, inner: str, stream: bool, stage: Stage) -> None:
    """Our own exception comes out of the outermost layer, and nobody pays."""
    customer, other = stage.customer(), stage.customer(credit=0)
    call = over(OUTERS[outer], INNERS[inner])
    with pytest.raises(Exception) as raised:  # noqa: PT011
        stage.run(lambda: all_of(call(stage, stream, other)), customer)
    assert isinstance(refusal_in(raised.value), GateDenied)
    assert stage.books(other) == REFUSED
    assert stage.books(customer) == GIVEN_BACK
    assert stage.upstream.posts() == []
