"""Layers that meter around layers that meter: each model call is asked for, and settled, once. By the gate's own books.

Each cell of the table is an outer layer around an inner one, both metered: what the outer one tells of the usage is
wrong on purpose, so that the books show which of the two has settled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # LiteLLM otherwise asks the network for its price list
pytest.importorskip("agents", reason="openai-agents is not installed: this needs all frameworks")
pytest.importorskip("anthropic", reason="anthropic is not installed: this needs all frameworks")
pytest.importorskip("langchain_litellm", reason="langchain-litellm is not installed: this needs all frameworks")
pytest.importorskip("langchain_openai", reason="langchain-openai is not installed: this needs all frameworks")
pytest.importorskip("langgraph", reason="langgraph is not installed: this needs all frameworks")
pytest.importorskip("pydantic_ai", reason="pydantic-ai-slim is not installed: this needs all frameworks")

import nested_frameworks as frameworks
import nested_stage as stages
from agent_provider import TEXT, has_results
from agent_provider import call as tool_call
from agents.models import _openai_shared
from nested_frameworks import OUTERS, over
from nested_stage import (
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
"""They hold up the loop: nobody can leave or cancel them in the middle."""
NAMES_NOBODY = {"agents over litellm"}
"""Has no place where a customer could be named."""
NAMED_BELOW = {"litellm over openai", "pydantic_ai over transport", "pydantic_ai over openai"}
"""Names the customer in the lower of two layers: the upper one has asked for whoever pays for the surrounding work."""


@pytest.fixture(scope="module")
def _stage(shared_gate: Sandbox) -> Iterator[Stage]:
    """Everything that is installed for a whole process is, at once."""
    with stages.staged(shared_gate) as stage, stages.litellm_callback(stage.vluna):
        default = stage.client(http_client=stage.http_client())
        stage.closing.clear()
        before = _openai_shared.get_default_openai_client()
        _openai_shared.set_default_openai_client(default)
        openai_agents.install(stage.vluna)
        yield stage
        openai_agents.uninstall()
        _openai_shared.set_default_openai_client(before)
        stage.loop.run_until_complete(default.close())


@pytest.fixture
def stage(_stage: Stage, caplog: pytest.LogCaptureFixture) -> Iterator[Stage]:
    with stages.one_test(_stage, caplog) as stage:
        yield stage


def streams(function: Any) -> Any:
    return pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])(function)


def pairs(inners: Any, outers: Any) -> Any:
    """Each outer layer around each inner one."""
    found = [pytest.param(outer, inner, id=f"{outer}-{inner}") for outer in outers for inner in inners]
    return pytest.mark.parametrize(("outer", "inner"), found)


SAME = ("agents.VlunaModelProvider", "pydantic_ai.VlunaModel")
"""The provider makes `VlunaModel`s, and `VlunaCapability` puts one around: how a call ends they tell as those do."""
DISTINCT = [name for name in OUTERS if name not in SAME]
every_pair = pairs(INNERS, OUTERS)
distinct_pairs = pairs(INNERS, DISTINCT)
waiting_pairs = pairs([name for name in INNERS if name not in BLOCKING], DISTINCT)
named_pairs = pairs([name for name in INNERS if name not in NAMES_NOBODY], DISTINCT)


def extra(outer: str, inner: str) -> int:
    """How many leases more are asked for, and given back: where LiteLLM calls itself for a model of another feature."""
    return int(outer == "litellm.VlunaCallback" and inner.startswith("litellm"))


@every_pair
@streams
def test_an_answer_is_charged_once(outer: str, inner: str, stream: bool, stage: Stage) -> None:
    customer = stage.customer()
    call = over(OUTERS[outer], INNERS[inner])
    assert stage.run(lambda: all_of(call(stage, stream, None)), customer)
    assert stage.books(customer) == charged(TOKENS, canceled=extra(outer, inner))
    assert len(stage.upstream.posts()) == 1


@every_pair
@streams
def test_a_refusal_comes_out_before_the_provider_is_asked(outer: str, inner: str, stream: bool, stage: Stage) -> None:
    customer = stage.customer(credit=0)
    call = over(OUTERS[outer], INNERS[inner])
    with pytest.raises(GateDenied):
        stage.run(lambda: all_of(call(stage, stream, None)), customer)
    assert stage.books(customer) == REFUSED
    assert stage.upstream.posts() == []


@distinct_pairs
@pytest.mark.parametrize(("stream", "how"), [(False, "bad"), (True, "bad"), (True, "cut")])
def test_a_provider_that_fails_costs_nothing(outer: str, inner: str, stream: bool, how: str, stage: Stage) -> None:
    customer = stage.customer()
    call = over(OUTERS[outer], INNERS[inner])
    stage.upstream.behaviour = how  # 400, which nobody tries again, or a stream that is cut
    with pytest.raises(Exception) as raised:  # noqa: PT011 - each framework's own
        stage.run(lambda: all_of(call(stage, stream, None)), customer)
    assert refusal_in(raised.value) is None
    assert stage.books(customer) == charged(canceled=1 + extra(outer, inner))


@waiting_pairs
def test_an_answer_that_is_left_costs_nothing(outer: str, inner: str, stage: Stage) -> None:
    customer = stage.customer()
    call = over(OUTERS[outer], INNERS[inner])
    stage.upstream.behaviour = "slow"
    stage.run(lambda: left(call(stage, True, None)), customer)
    assert stage.books(customer) == charged(canceled=1 + extra(outer, inner))


@waiting_pairs
def test_a_call_that_is_cancelled_costs_nothing(outer: str, inner: str, stage: Stage) -> None:
    customer = stage.customer()
    call = over(OUTERS[outer], INNERS[inner])
    stage.upstream.behaviour = "silent"
    stage.run(lambda: cancelled(stage, call(stage, False, None)), customer)
    assert stage.books(customer) == charged(canceled=1 + extra(outer, inner))


@named_pairs
@streams
def test_the_inner_one_may_bill_somebody_else(outer: str, inner: str, stream: bool, stage: Stage) -> None:
    """Whoever is named nearest to the provider pays; what was admitted for the other one is given back."""
    customer, other = stage.customer(), stage.customer()
    call = over(OUTERS[outer], INNERS[inner])
    assert stage.run(lambda: all_of(call(stage, stream, other)), customer)
    assert stage.books(other) == charged(TOKENS)
    assert stage.books(customer) == charged(canceled=1 + (extra(outer, inner) and inner in NAMED_BELOW))


BINDING = [name for name in OUTERS if name != "agents.VlunaModel"]


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("outer", BINDING)
def test_the_outer_ones_customer_pays_for_what_is_inside(outer: str, inner: str, stage: Stage) -> None:
    """Where the inner one names nobody: whoever pays for the work around both is not asked."""
    around, payer = stage.customer(), stage.customer()
    source: Source = INNERS[inner]
    call = OUTERS[outer](stage, lambda stream: source(stage, stream, None), False, payer)
    assert stage.run(lambda: all_of(call), around)
    assert stage.books(around) == NOTHING
    assert stage.books(payer) == charged(TOKENS, canceled=extra(outer, inner))


@streams
def test_a_transport_below_a_client_is_silent_whoever_it_is_bound_to(stream: bool, stage: Stage) -> None:
    around, payer, other = stage.customer(), stage.customer(), stage.customer()
    for named, pays in ((None, around), (payer, payer)):
        client = stage.metered(stage.client(http_client=stage.http_client(other)), named)
        assert stage.run(lambda client=client: all_of(stages.chat(client, stream)), around)  # type: ignore[misc]
        assert stage.books(pays) == charged(TOKENS)
    assert stage.books(other) == NOTHING


@named_pairs
@streams
def test_somebody_else_who_is_refused(outer: str, inner: str, stream: bool, stage: Stage) -> None:
    """Our own exception comes out of the outermost layer, and nobody pays."""
    customer, other = stage.customer(), stage.customer(credit=0)
    call = over(OUTERS[outer], INNERS[inner])
    with pytest.raises(Exception) as raised:  # noqa: PT011
        stage.run(lambda: all_of(call(stage, stream, other)), customer)
    assert isinstance(refusal_in(raised.value), GateDenied)
    assert stage.books(other) == REFUSED
    assert stage.books(customer) == charged(canceled=1 + (extra(outer, inner) and inner in NAMED_BELOW))
    assert stage.upstream.posts() == []


@pytest.mark.parametrize("inner", ["bare", "openai"])
@pytest.mark.parametrize("outer", OUTERS)
def test_an_embedding_before_the_answer_is_charged_by_itself(outer: str, inner: str, stage: Stage) -> None:
    """Under a feature of its own; the lease of the answer is left for the answer, whoever settles that."""

    async def embeds_first(stage: Stage, stream: bool, payer: str | None) -> Texts:
        client = stage.metered(stage.client())
        await client.embeddings.create(model="text-embedding-3-small", input=["hi"])
        async for text in {**INNERS, "bare": stages.bare}[inner](stage, stream, payer):
            yield text

    customer = stage.customer()
    assert stage.run(lambda: all_of(over(OUTERS[outer], embeds_first)(stage, False, None)), customer)
    booked = {entry.feature: entry.quantity for entry in stage.gate.booked(customer).entries}
    assert booked.pop("openai.text-embedding-3-small") == 8
    assert list(booked.values()) == [OWN_TOKENS if inner == "bare" else TOKENS]
    assert stage.books(customer).leases == ["closed", "closed"]


# -- with nothing around, and in work that is sold by itself -----------------------------------------------------------

ALONE: dict[str, Source] = {
    **INNERS,
    "agents, installed": frameworks.agents_installed,
    "agents over litellm, bare": frameworks.agents_litellm_bare,
    "langchain over litellm, bare": frameworks.langchain_litellm_bare,
    "bare langchain over transport": frameworks.langchain_transport,
}
FEATURES = {
    "anthropic": "anthropic.claude-sonnet-5",
    "pydantic_ai over transport": "litellm.gpt-4o",
    "pydantic_ai over openai": "litellm.gpt-4o",
}
"""As the client would name it, but for a provider that Pydantic AI knows by its own name at a host that we do not."""
alone = pytest.mark.parametrize("name", ALONE)


@alone
@streams
def test_with_nothing_around(name: str, stream: bool, stage: Stage) -> None:
    """What is installed for the process, a client and a transport: one of them meters, all naming it alike."""
    customer, poor = stage.customer(), stage.customer(credit=0)
    assert stage.run(lambda: all_of(ALONE[name](stage, stream, None)), customer)
    assert stage.books(customer) == charged(TOKENS)
    (entry,) = stage.gate.booked(customer).entries
    assert entry.feature == FEATURES.get(name, "openai.gpt-4o")
    assert len(stage.upstream.posts()) == 1
    with pytest.raises(Exception) as raised:  # noqa: PT011
        stage.run(lambda: all_of(ALONE[name](stage, stream, None)), poor)
    assert isinstance(refusal_in(raised.value), GateDenied)
    assert stage.books(poor) == REFUSED
    assert len(stage.upstream.posts()) == 1


@alone
@streams
def test_in_work_that_is_sold_by_itself(name: str, stream: bool, stage: Stage) -> None:
    """``vluna.operation`` has a charge of its own, and what is inside names it as its parent."""
    customer, poor = stage.customer(), stage.customer(credit=0)
    call = over(frameworks.sold_work, ALONE[name])
    assert stage.run(lambda: all_of(call(stage, stream, None)), customer)
    assert sorted(stage.books(customer).charged) == [1, TOKENS]
    assert stage.books(customer).leases == ["closed"] * 2
    by_feature = {entry.feature: entry.labels for entry in stage.gate.booked(customer).entries}
    sold = by_feature.pop("tools.write")
    (inside,) = by_feature.values()
    assert inside["parent_operation_id"] == sold["operation_id"]
    with pytest.raises(GateDenied):
        stage.run(lambda: all_of(call(stage, stream, None)), poor)
    assert stage.books(poor) == REFUSED


# -- in the tools and nodes of a run -----------------------------------------------------------------------------------

runs = pytest.mark.parametrize("run", frameworks.RUNS)
INSIDE = [name for name in INNERS if name not in BLOCKING]


def asks_its_tool(body: dict[str, Any]) -> Any:
    """The model calls the tool that it has, once."""
    return tool_call("inquire") if body.get("tools") and not has_results(body) else TEXT


@runs
@pytest.mark.parametrize("name", INSIDE)
def test_a_call_in_a_run_is_charged_beside_the_runs_own(run: str, name: str, stage: Stage) -> None:
    stage.upstream.script = asks_its_tool
    customer = stage.customer()
    inner: Source = INNERS[name]
    assert stage.run(lambda: all_of(frameworks.RUNS[run](stage, lambda s: inner(stage, s, None), None)), customer)
    assert stage.books(customer) == charged(TOKENS, TOKENS, TOKENS)
    assert len(stage.upstream.posts()) == 3


@runs
@pytest.mark.parametrize("name", [name for name in INSIDE if name not in NAMES_NOBODY])
def test_a_call_in_a_run_that_bills_somebody_else(run: str, name: str, stage: Stage) -> None:
    """Charged to whom it is bound; refused, the run ends with that, and what was answered before stays charged."""
    stage.upstream.script = asks_its_tool
    customer, other, poor = stage.customer(), stage.customer(), stage.customer(credit=0)
    inner: Source = INNERS[name]
    assert stage.run(lambda: all_of(frameworks.RUNS[run](stage, lambda s: inner(stage, s, other), None)), customer)
    upper = int(name in NAMED_BELOW)
    assert stage.books(customer) == charged(TOKENS, TOKENS, canceled=upper)
    assert stage.books(other) == charged(TOKENS)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        stage.run(lambda: all_of(frameworks.RUNS[run](stage, lambda s: inner(stage, s, poor), None)), customer)
    assert isinstance(refusal_in(raised.value), GateDenied)
    assert stage.books(poor) == REFUSED
    assert stage.books(customer) == charged(TOKENS, TOKENS, TOKENS, canceled=2 * upper)


@runs
@pytest.mark.parametrize("name", ["openai", "litellm", "langchain", "agents", "pydantic_ai"])
def test_who_pays_in_a_run_that_is_bound(run: str, name: str, stage: Stage) -> None:
    """The customer of a run of Pydantic AI pays for its tools; a model of the others is bound by itself alone, and what
    its tools use is billed to whoever pays for the surrounding work."""
    stage.upstream.script = asks_its_tool
    around, payer = stage.customer(), stage.customer()
    inner: Source = INNERS[name]
    assert stage.run(lambda: all_of(frameworks.RUNS[run](stage, lambda s: inner(stage, s, None), payer)), around)
    if run == "pydantic_ai tool":
        assert (stage.books(payer), stage.books(around)) == (charged(TOKENS, TOKENS, TOKENS), NOTHING)
    else:
        assert (stage.books(payer), stage.books(around)) == (charged(TOKENS, TOKENS), charged(TOKENS))
