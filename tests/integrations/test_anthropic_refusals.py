"""What the gate refuses never reaches Anthropic; modes, a gate that is away, and an authorize that overlaps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from claude import MESSAGE, STREAM, Claude, anthropic
from conftest import Bill, MakeVluna, ask, each, entered
from upstream import Upstream

from vluna_llm import Vluna, call_context
from vluna_llm.errors import GateDenied, GateRateLimited, GateUnavailable, MissingPrincipal, VlunaError
from vluna_llm.sandbox import Sandbox


@pytest.fixture
def gate() -> Iterator[Sandbox]:
    """A gate of the test's own, to be set up and broken."""
    with Sandbox() as gate:
        yield gate


async def create(client: Any) -> Any:
    return await ask(client.messages.create(**MESSAGE))


async def stream(client: Any) -> Any:
    return [event async for event in each(await ask(client.messages.create(**STREAM)))]


async def helper(client: Any) -> Any:
    async with entered(client.messages.stream(**MESSAGE)) as events:
        return await ask(events.get_final_text())


async def streaming_response(client: Any) -> Any:
    async with entered(client.messages.with_streaming_response.create(**MESSAGE)) as response:
        return await ask(response.read())


async def beta(client: Any) -> Any:
    return await ask(client.beta.messages.create(**MESSAGE))


async def tool_runner(client: Any) -> Any:
    return await ask(client.beta.messages.tool_runner(**MESSAGE, tools=[]).until_done())


programs = pytest.mark.parametrize(
    "program", [create, stream, helper, streaming_response, beta, tool_runner], ids=lambda one: one.__name__
)


@programs
def test_a_customer_without_credit_is_refused_before_the_provider(
    program: Any, claude: Claude, gate: Sandbox, make_vluna: MakeVluna, provider: Upstream
) -> None:
    """`GateDenied` itself reaches the product: not wrapped, not retried, with its reason."""
    gate.set_credit("broke", 0)
    client = make_vluna(gate).bind(claude.bare(max_retries=3), principal_id="broke")
    with pytest.raises(GateDenied) as caught:
        claude.run(program, client)
    assert caught.value.reason == "insufficient_credit"
    assert not isinstance(caught.value, anthropic.AnthropicError)
    assert caught.value.__cause__ is None or isinstance(caught.value.__cause__, VlunaError)
    assert provider.requests == []
    assert len([seen for seen in gate.requests if "authorize" in seen.path]) == 1


@programs
def test_a_rate_limited_customer_is_told_when_to_come_back(
    program: Any, claude: Claude, gate: Sandbox, make_vluna: MakeVluna, provider: Upstream
) -> None:
    """429 of the gate is not the provider's 429: the SDK does not retry it."""
    gate.faults.add("rate_limited", "authorize", seconds=7, times=None)
    with pytest.raises(GateRateLimited) as caught:
        claude.run(program, make_vluna(gate).bind(claude.bare(max_retries=3), principal_id="alice"))
    assert caught.value.retry_after
    assert provider.requests == []


@programs
def test_nobody_to_bill_is_said_before_anything_is_spent(
    program: Any, claude: Claude, vluna: Vluna, provider: Upstream
) -> None:
    """No principal, no call."""
    with pytest.raises(MissingPrincipal):
        claude.run(program, vluna.wrap(claude.bare(max_retries=3)))
    assert provider.requests == []


def test_observe_never_refuses(claude: Claude, gate: Sandbox, make_vluna: MakeVluna, provider: Upstream) -> None:
    """Neither a customer without credit nor a call for nobody."""
    gate.set_credit("broke", 0)
    vluna = make_vluna(gate, mode="observe")
    claude.run(create, vluna.bind(claude.bare(), principal_id="broke"))
    claude.run(stream, vluna.wrap(claude.bare()))
    assert len(provider.requests) == 2


def test_off_does_nothing_and_can_be_switched(claude: Claude, vluna: Vluna, provider: Upstream, billed: Any) -> None:
    """A kill switch at run time."""
    vluna.mode = "off"
    client = vluna.wrap(claude.bare())
    bill: Bill = billed(vluna, lambda: claude.run(create, client))
    bill.nothing()
    vluna.mode = "enforce"
    bill = billed(vluna, lambda: claude.run(create, vluna.wrap(claude.bare())))
    bill.booked_once()


def test_no_gate_no_harm(claude: Claude, gate: Sandbox, make_vluna: MakeVluna, provider: Upstream) -> None:
    """With the gate away the call runs, and is booked by ingest when it is back (design rule 9)."""
    vluna = make_vluna(gate, authorize_deadline=0.5)
    gate.stop()
    claude.run(stream, vluna.bind(claude.bare(), principal_id="alice"))
    gate.start()
    assert vluna.flush(20)
    assert [(entry.kind, entry.quantity) for entry in gate.booked("alice").entries] == [("ingest", 120)]


def test_no_gate_no_call_on_request(claude: Claude, gate: Sandbox, make_vluna: MakeVluna, provider: Upstream) -> None:
    """``on_gate_unavailable="deny"``."""
    vluna = make_vluna(gate, authorize_deadline=0.5, on_gate_unavailable="deny")
    gate.stop()
    with pytest.raises(GateUnavailable):
        claude.run(create, vluna.bind(claude.bare(max_retries=3), principal_id="alice"))
    assert provider.requests == []


def test_a_denial_is_on_the_scope(claude: Claude, gate: Sandbox, make_vluna: MakeVluna) -> None:
    """Also where the product throws the exception away."""
    gate.set_credit("broke", 0)
    client = make_vluna(gate).wrap(claude.bare())

    async def program(client: Any) -> None:
        with call_context(principal_id="broke") as scope:
            with pytest.raises(GateDenied) as caught:
                await create(client)
            assert scope.last_denial is caught.value

    claude.run(program, client)


# -- authorize="overlap" -----------------------------------------------------------------------------------------------


@programs
def test_overlap_books_as_strict_does(program: Any, claude: Claude, make_vluna: MakeVluna, billed: Any) -> None:
    """The same lease and the same charge."""
    vluna = make_vluna(authorize="overlap")
    bill: Bill = billed(vluna, lambda: claude.run(program, vluna.wrap(claude.bare())))
    bill.booked_once()


@pytest.mark.parametrize("program", [create, stream, helper], ids=lambda one: one.__name__)
def test_overlap_hands_nothing_out_that_the_gate_denies(
    program: Any, claude: Claude, gate: Sandbox, make_vluna: MakeVluna, provider: Upstream
) -> None:
    """The provider was asked; its answer is closed, and the SDK does not try again."""
    gate.set_credit("broke", 0)
    vluna = make_vluna(gate, authorize="overlap")
    with pytest.raises(GateDenied):
        claude.run(program, vluna.bind(claude.bare(max_retries=3), principal_id="broke"))
    assert len(provider.requests) <= 1


def test_overlap_gives_the_lease_back_when_the_provider_fails_first(
    claude: Claude, gate: Sandbox, make_vluna: MakeVluna, provider: Upstream
) -> None:
    """Admitted after the call had failed: nothing is left open."""
    provider.behaviour = "bad"
    gate.faults.add("latency", "authorize", seconds=0.3, times=None)
    vluna = make_vluna(gate, authorize="overlap")

    async def program(client: Any) -> None:
        with pytest.raises(anthropic.BadRequestError):
            await create(client)
        await asyncio.sleep(0.6)

    claude.run(program, vluna.bind(claude.bare(), principal_id="alice"))
    time.sleep(0.1)
    assert vluna.flush(10)
    assert [lease.state for lease in gate.leases("alice")] == ["canceled"]
    assert gate.booked("alice").entries == ()
