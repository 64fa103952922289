"""Every row of the README's table of streams that end early, for each ``on_abort``, also where the lease is over."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Bill, Colour, MakeVluna, ask, each, entered, eventually
from provider import Provider

from vluna_llm import Vluna, call_context
from vluna_llm.context import current_context
from vluna_llm.sandbox import Sandbox

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"model": "gpt-4o", "messages": MESSAGES, "stream": True}
RESPONSE = {"model": "gpt-4o", "input": "hi", "stream": True}
BACKGROUND = {"model": "gpt-4o", "input": "hi", "background": True}

apis = pytest.mark.parametrize("api", ["chat", "responses"])


async def opened(client: Any, api: str, items: int = 2) -> Any:
    """A stream of which so many items were read."""
    if api == "chat":
        stream = await ask(client.chat.completions.create(**CHAT))
    else:
        stream = await ask(client.responses.create(**RESPONSE))
    for _ in range(items):
        await ask(stream.__anext__() if hasattr(stream, "__anext__") else next(stream))
    return stream


# -- the table: how the stream ends, by on_abort -----------------------------------------------------------------------

Way = Callable[[Colour, Any, str], None]


def closed(colour: Colour, client: Any, api: str) -> None:
    async def program(client: Any) -> None:
        async with entered(await opened(client, api)):
            pass
        for _ in range(100):  # a drain goes on behind the consumer's back, as long as there is a loop
            if not current_context().scopes[-1].pending:
                break
            await asyncio.sleep(0.01)

    colour.run(program, client)


def collected(colour: Colour, client: Any, api: str) -> None:
    async def program(client: Any) -> None:
        stream = await opened(client, api)
        del stream
        for _ in range(3):
            gc.collect()
            await asyncio.sleep(0.01)

    colour.run(program, client)


def task_cancelled(colour: Colour, client: Any, api: str) -> None:
    async def read(client: Any) -> None:
        async with await opened(client, api) as stream:
            async for _ in stream:
                pass

    async def program(client: Any) -> None:
        task = asyncio.ensure_future(read(client))
        await asyncio.sleep(0.15)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    colour.run(program, client)


def scope_cancelled(colour: Colour, client: Any, api: str) -> None:
    async def program(client: Any) -> None:
        import anyio

        with anyio.move_on_after(0.15):
            async with await opened(client, api) as stream:
                async for _ in stream:
                    pass

    colour.run(program, client)


def loop_gone(colour: Colour, client: Any, api: str) -> None:
    kept: list[Any] = []

    async def program() -> None:
        kept.append(await opened(client, api))

    loop = asyncio.new_event_loop()
    loop.run_until_complete(program())
    loop.close()
    kept.clear()
    gc.collect()


SYNC_WAYS: list[Way] = [closed, collected]
ASYNC_WAYS: list[Way] = [closed, collected, task_cancelled, scope_cancelled, loop_gone]
ENDS = [(way, False) for way in SYNC_WAYS] + [(way, True) for way in ASYNC_WAYS]


@apis
@pytest.mark.parametrize("on_abort", ["cancel", "estimate", "drain"])
@pytest.mark.parametrize(
    ("way", "is_async"), ENDS, ids=[f"{way.__name__}-{'async' if is_async else 'sync'}" for way, is_async in ENDS]
)
def test_a_stream_that_is_left_is_billed_as_the_readme_says(
    way: Way, is_async: bool, on_abort: str, api: str, make_vluna: MakeVluna, provider: Provider, billed: Any
) -> None:
    """``cancel``: nothing. ``estimate``: what was generated, labelled. ``drain``: what the provider reports, where
    somebody is left to read on: not after a collection, a cancelled task or scope, or the end of the loop."""
    drained = on_abort == "drain" and way is closed
    provider.behaviour, provider.pause = "slow" if drained else "hang", 0.005
    vluna = make_vluna(on_abort=on_abort)
    colour = Colour(is_async, provider)
    bill: Bill = billed(vluna, lambda: way(colour, vluna.wrap(colour.bare()), api))
    if on_abort == "estimate":
        bill.booked_an_estimate()
    elif drained:
        bill.booked_once()
    else:
        bill.cancelled_once()


@apis
def test_a_drain_survives_a_consumer_that_was_cancelled_in_its_own_code(
    api: str, make_vluna: MakeVluna, provider: Provider, billed: Any
) -> None:
    """Nobody was reading at that moment, so the rest can be read, and what the provider reports is billed."""
    provider.behaviour, provider.pause = "slow", 0.005
    vluna = make_vluna(on_abort="drain")
    colour = Colour(True, provider)

    async def read(client: Any) -> None:
        async with await opened(client, api):
            await asyncio.sleep(10)

    async def program(client: Any) -> None:
        task = asyncio.ensure_future(read(client))
        await asyncio.sleep(0.15)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.3)

    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.booked_once()


def test_what_is_given_away_is_counted_for_its_customer(
    colour: Colour, vluna: Vluna, provider: Provider, customer: str, billed: Any
) -> None:
    """ "word0 word1 " is three tokens of about four characters."""
    provider.behaviour = "hang"
    billed(vluna, lambda: colour.run(lambda client: _left(client, 3), vluna.wrap(colour.bare())))
    assert vluna._running().forgone == {customer: 3}


async def _left(client: Any, items: int) -> None:
    stream = await opened(client, "chat", items)
    await ask(stream.close())


@apis
def test_an_estimate_grows_with_what_was_generated(
    api: str, colour: Colour, make_vluna: MakeVluna, provider: Provider, billed: Any
) -> None:
    """Who read more before leaving is billed more; the input is billed in any case."""
    provider.behaviour, provider.pause = "slow", 0.005
    vluna = make_vluna(on_abort="estimate")
    quantities: list[int] = []

    async def program(client: Any) -> None:
        for items in (5, 12):
            with call_context() as scope:
                stream = await opened(client, api, items)
                await ask(stream.close())
                assert await scope.wait_async(10)
            quantities.extend(receipt.quantity for receipt in scope.receipts)

    billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    assert 0 < quantities[0] < quantities[1]


# -- the limits of a drain ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "value"), [("DRAIN_SECONDS", 0.3), ("DRAIN_BYTES", 500)])
@apis
def test_a_drain_has_an_end_and_then_costs_nothing(
    limit: str,
    value: float,
    api: str,
    colour: Colour,
    make_vluna: MakeVluna,
    provider: Provider,
    billed: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A provider that hangs, or never stops talking, is not read for ever."""
    monkeypatch.setattr(f"vluna_llm.tap.{limit}", value)
    provider.behaviour = "hang" if limit == "DRAIN_SECONDS" else "slow"
    vluna = make_vluna(on_abort="drain")

    async def program(client: Any) -> None:
        stream = await opened(client, api)
        await ask(stream.close())
        await asyncio.sleep(0.6)

    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.cancelled_once()


@pytest.mark.parametrize("behaviour", ["cut", "ends_early"])
def test_a_drain_that_breaks_costs_nothing(
    behaviour: str, colour: Colour, make_vluna: MakeVluna, provider: Provider, billed: Any
) -> None:
    provider.behaviour = behaviour
    vluna = make_vluna(on_abort="drain")

    async def program(client: Any) -> None:
        stream = await opened(client, "chat", 1)
        await ask(stream.close())
        await asyncio.sleep(0.3)

    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.cancelled_once()


def test_a_drain_that_meets_an_error_with_usage_is_booked(
    colour: Colour, make_vluna: MakeVluna, provider: Provider, billed: Any
) -> None:
    """Spent and reported, so committed (design rule 4)."""
    provider.behaviour = "error_with_usage"
    vluna = make_vluna(on_abort="drain")

    async def program(client: Any) -> None:
        stream = await opened(client, "chat", 1)
        await ask(stream.close())
        await asyncio.sleep(0.3)

    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.booked_once()


# -- streams that outlive their lease ----------------------------------------------------------------------------------


@pytest.fixture
def gate() -> Iterator[Sandbox]:
    """A gate of one's own, whose clock may be moved."""
    with Sandbox() as running:
        yield running


WITHIN_GRACE, BEYOND_GRACE = 12 * 3600 + 30, 13 * 3600


def entries_of(gate: Sandbox, customer: str) -> list[tuple[str, bool, str | None]]:
    return [
        (entry.kind, entry.charged_xusd > 0, entry.labels.get("usage_source"))
        for entry in gate.booked(customer).entries
    ]


@apis
@pytest.mark.parametrize("late", [WITHIN_GRACE, BEYOND_GRACE], ids=["within the grace", "beyond the grace"])
@pytest.mark.parametrize("end", ["read", "cancel", "estimate", "drain"])
def test_a_stream_that_outlives_its_lease_is_charged_once_or_not_at_all(
    end: str,
    late: int,
    api: str,
    colour: Colour,
    make_vluna: MakeVluna,
    provider: Provider,
    gate: Sandbox,
    customer: str,
) -> None:
    """Within the grace the commit is charged; beyond it it is quarantined, and the usage booked by ingest (rule 6)."""
    provider.behaviour, provider.pause = "slow", 0.005
    vluna = make_vluna(gate, on_abort="cancel" if end == "read" else end)

    async def program(client: Any) -> None:
        stream = await opened(client, api)
        gate.clock.advance(late)
        if end == "read":
            async for _ in each(stream):
                pass
        await ask(stream.close())
        if end == "drain":
            await asyncio.sleep(0.3)

    with call_context(principal_id=customer) as scope:
        colour.run(program, vluna.wrap(colour.bare()))
    assert scope.wait(10)
    source = "estimated" if end == "estimate" else "provider"
    if end == "cancel":
        expected = []
    elif late == WITHIN_GRACE:
        expected = [("commit", True, source)]
    else:
        expected = [("commit", False, source), ("ingest", True, source)]
    assert entries_of(gate, customer) == expected
    (receipt,) = scope.receipts
    assert receipt.charged is (end != "cancel")
    assert (receipt.charged_xusd or 0) == gate.booked(customer).charged_xusd


def test_an_answer_that_is_not_streamed_outlives_its_lease_too(
    colour: Colour, make_vluna: MakeVluna, provider: Provider, gate: Sandbox, customer: str
) -> None:
    provider.behaviour = "slow_body"
    vluna = make_vluna(gate)

    async def program(client: Any) -> None:
        call = client.chat.completions.with_streaming_response.create(**{**CHAT, "stream": False})
        async with entered(call) as response:
            gate.clock.advance(BEYOND_GRACE)
            async for _ in each(response.iter_bytes(10)):
                pass

    with call_context(principal_id=customer) as scope:
        colour.run(program, vluna.wrap(colour.bare()))
    assert scope.wait(10)
    assert entries_of(gate, customer) == [("commit", False, "provider"), ("ingest", True, "provider")]


# -- background responses ----------------------------------------------------------------------------------------------


def ingests(gate: Sandbox, customer: str) -> list[tuple[str, int]]:
    return [(entry.kind, entry.quantity) for entry in gate.booked(customer).entries if entry.charged_xusd > 0]


@pytest.mark.parametrize("on_abort", ["cancel", "estimate", "drain"])
@pytest.mark.parametrize("leave", ["closed", "collected", "closed at once", "collected at once"])
def test_leaving_a_background_stream_never_bills_what_a_retrieve_will_bill(
    leave: str, on_abort: str, colour: Colour, make_vluna: MakeVluna, provider: Provider, gate: Sandbox, customer: str
) -> None:
    """The provider works on: an estimate for what was seen and the booking of the whole would be two charges."""
    vluna = make_vluna(gate, on_abort=on_abort)
    provider.behaviour, provider.pause = "slow", 0.005

    async def program(client: Any) -> None:
        stream = await ask(client.responses.create(**BACKGROUND, stream=True))
        if "at once" not in leave:
            for _ in range(4):
                await ask(stream.__anext__() if hasattr(stream, "__anext__") else next(stream))
        if leave.startswith("closed"):
            await ask(stream.close())
        del stream
        for _ in range(3):
            gc.collect()
            await asyncio.sleep(0.01)
        provider.behaviour = "ok"
        await ask(client.responses.retrieve(next(reversed(provider.responses))))

    colour.run(program, vluna.bind(colour.bare(), principal_id=customer))
    assert vluna.flush(10)
    assert ingests(gate, customer) == [("ingest", 120)]


def test_a_background_response_that_is_retrieved_on_two_hosts_is_booked_once(
    colour: Colour, make_vluna: MakeVluna, provider: Provider, gate: Sandbox, customer: str
) -> None:
    """Also where the gate was restarted in between, and the second host knows only the dated model name."""
    first, second = make_vluna(gate), make_vluna(gate)

    async def create(client: Any) -> None:
        created.append((await ask(client.responses.create(**BACKGROUND))).id)

    async def retrieve(client: Any) -> None:
        await ask(client.responses.retrieve(created[0]))

    created: list[str] = []
    colour.run(create, first.bind(colour.bare(), principal_id=customer))
    for vluna in (second, first):
        colour.run(retrieve, vluna.bind(colour.bare(), principal_id=customer))
        assert vluna.flush(10)
        gate.restart()
    assert ingests(gate, customer) == [("ingest", 120)]


@pytest.mark.parametrize("status", ["failed", "incomplete"])
def test_a_background_response_that_failed_after_spending_is_booked(
    status: str, colour: Colour, make_vluna: MakeVluna, provider: Provider, gate: Sandbox, customer: str
) -> None:
    vluna = make_vluna(gate)

    async def program(client: Any) -> None:
        created = await ask(client.responses.create(**BACKGROUND))
        provider.behaviour = status
        stream = await ask(client.responses.retrieve(created.id, stream=True))
        async for _ in each(stream):
            pass

    colour.run(program, vluna.bind(colour.bare(), principal_id=customer))
    assert vluna.flush(10)
    assert ingests(gate, customer) == [("ingest", 120)]


def test_a_background_response_outlives_every_lease(
    colour: Colour, make_vluna: MakeVluna, provider: Provider, gate: Sandbox, customer: str
) -> None:
    """Retrieved the next day; its lease has lapsed, and nothing was to be repaired."""
    vluna = make_vluna(gate)

    async def program(client: Any) -> None:
        created = await ask(client.responses.create(**BACKGROUND))
        gate.clock.advance(86_400)
        await ask(client.responses.retrieve(created.id))

    colour.run(program, vluna.bind(colour.bare(), principal_id=customer))
    assert vluna.flush(10)
    assert [entry.kind for entry in gate.booked(customer).entries] == ["ingest"]
    assert [lease.state for lease in gate.leases(customer)] == ["active"]


def test_a_background_response_is_booked_though_the_gate_is_away_when_it_is_retrieved(
    colour: Colour, make_vluna: MakeVluna, provider: Provider, gate: Sandbox, customer: str
) -> None:
    vluna = make_vluna(gate)

    async def program(client: Any) -> None:
        created = await ask(client.responses.create(**BACKGROUND))
        gate.stop()
        for _ in range(2):
            await ask(client.responses.retrieve(created.id))

    colour.run(program, vluna.bind(colour.bare(), principal_id=customer))
    assert not vluna.flush(0.3)
    gate.start()
    assert vluna.flush(15)
    assert ingests(gate, customer) == [("ingest", 120)]


# -- a process that exits ----------------------------------------------------------------------------------------------

EXITS_WHILE_DRAINING = """
import sys
import openai
from vluna_llm import Vluna, call_context

client = Vluna().wrap(openai.OpenAI(base_url=sys.argv[1], api_key="sk", max_retries=0))
with call_context(principal_id=sys.argv[2]):
    stream = client.chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    next(stream), next(stream)
    stream.close()
"""


def test_a_process_that_exits_while_it_drains_leaves_nothing_open(
    provider: Provider, gate: Sandbox, customer: str, tmp_path: Path
) -> None:
    """The drain ends with its process: nothing is charged, the lease is given back, and the exit is not held up."""
    provider.behaviour = "hang"
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", EXITS_WHILE_DRAINING, provider.base_url, customer],
        env={
            **os.environ,
            **gate.env(),
            "VLUNA_LLM_OUTBOX": str(tmp_path),
            "VLUNA_LLM_ON_ABORT": "drain",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        check=True,
        timeout=60,
    )
    assert time.monotonic() - began < 15
    assert entries_of(gate, customer) == []
    assert eventually(lambda: [lease.state for lease in gate.leases(customer)] == ["canceled"])
