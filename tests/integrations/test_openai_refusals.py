"""What the gate refuses never reaches the provider; what is not metered never passes in silence."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Colour, MakeVluna, ask, each, entered, settled
from provider import Provider

from vluna_llm import Vluna, call_context
from vluna_llm.errors import (
    ConfigurationError,
    GateDenied,
    GateRateLimited,
    GateUnavailable,
    MissingPrincipal,
    VlunaError,
)
from vluna_llm.sandbox import Sandbox

CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**CHAT, "stream": True}


@pytest.fixture
def gate() -> Iterator[Sandbox]:
    """A gate of the test's own, to be set up and broken."""
    with Sandbox() as gate:
        yield gate


async def chat(client: Any) -> Any:
    return await ask(client.chat.completions.create(**CHAT))


async def stream(client: Any) -> Any:
    return [chunk async for chunk in each(await ask(client.chat.completions.create(**STREAM)))]


async def streaming_response(client: Any) -> Any:
    async with entered(client.chat.completions.with_streaming_response.create(**CHAT)) as response:
        return await ask(response.read())


async def helper(client: Any) -> Any:
    async with entered(client.chat.completions.stream(**CHAT)) as events:
        return [event async for event in each(events)]


async def response(client: Any) -> Any:
    return await ask(client.responses.create(model="gpt-4o", input="hi"))


async def embedding(client: Any) -> Any:
    return await ask(client.embeddings.create(model="text-embedding-3-small", input="hi"))


programs = pytest.mark.parametrize(
    "program", [chat, stream, streaming_response, helper, response, embedding], ids=lambda one: one.__name__
)


@programs
def test_a_customer_without_credit_is_refused_before_the_provider(
    program: Any, colour: Colour, gate: Sandbox, make_vluna: MakeVluna, provider: Provider
) -> None:
    """`GateDenied` itself reaches the product: not wrapped, not retried, with its reason and hints."""
    gate.set_credit("broke", 0)
    client = make_vluna(gate).bind(colour.bare(max_retries=3), principal_id="broke")
    with pytest.raises(GateDenied) as caught:
        colour.run(program, client)
    assert caught.value.reason == "insufficient_credit"
    assert caught.value.__cause__ is None or isinstance(caught.value.__cause__, VlunaError)
    assert provider.requests == []
    assert len([seen for seen in gate.requests if "authorize" in seen.path]) == 1


def test_a_rate_limited_customer_is_told_when_to_come_back(
    colour: Colour, gate: Sandbox, make_vluna: MakeVluna, provider: Provider
) -> None:
    """429 of the gate is not the provider's 429: the SDK does not retry it."""
    gate.faults.add("rate_limited", "authorize", seconds=7, times=None)
    with pytest.raises(GateRateLimited) as caught:
        colour.run(chat, make_vluna(gate).bind(colour.bare(max_retries=3), principal_id="alice"))
    assert caught.value.retry_after
    assert provider.requests == []


def test_nobody_to_bill_is_said_before_anything_is_spent(colour: Colour, vluna: Vluna, provider: Provider) -> None:
    """No principal, no call."""
    with pytest.raises(MissingPrincipal):
        colour.run(chat, vluna.wrap(colour.bare()))
    assert provider.requests == []


def test_observe_never_refuses(colour: Colour, gate: Sandbox, make_vluna: MakeVluna, provider: Provider) -> None:
    """``mode="observe"`` asks and books, and lets a customer without credit through."""
    gate.set_credit("broke", 0)
    vluna = make_vluna(gate, mode="observe")
    colour.run(chat, vluna.bind(colour.bare(), principal_id="broke"))
    assert len(provider.requests) == 1


def test_no_gate_no_harm(colour: Colour, gate: Sandbox, make_vluna: MakeVluna, provider: Provider) -> None:
    """With the gate away the call runs, and is booked by ingest when it is back (design rule 9)."""
    vluna = make_vluna(gate, authorize_deadline=0.5)
    gate.stop()
    colour.run(stream, vluna.bind(colour.bare(), principal_id="alice"))
    gate.start()
    assert vluna.flush(20)
    assert [(entry.kind, entry.quantity) for entry in gate.booked("alice").entries] == [("ingest", 120)]


def test_no_gate_no_call_on_request(colour: Colour, gate: Sandbox, make_vluna: MakeVluna, provider: Provider) -> None:
    """``on_gate_unavailable="deny"``."""
    vluna = make_vluna(gate, authorize_deadline=0.5, on_gate_unavailable="deny")
    gate.stop()
    with pytest.raises(GateUnavailable):
        colour.run(chat, vluna.bind(colour.bare(), principal_id="alice"))
    assert provider.requests == []


# -- not metered -----------------------------------------------------------------------------------------------------


async def speech(client: Any) -> Any:
    answer = await ask(client.audio.speech.create(model="tts-1", voice="alloy", input="hi"))
    return answer.content


async def batch(client: Any) -> Any:
    return await ask(client.batches.create(input_file_id="f", endpoint="/v1/responses", completion_window="24h"))


async def unknown_model_path(client: Any) -> Any:
    import openai

    with pytest.raises(openai.NotFoundError):
        await ask(client.post("/rerank", body={"model": "reranker", "query": "q"}, cast_to=object))


UNMETERED = [(speech, "audio.speech"), (batch, "batches"), (unknown_model_path, "rerank")]


@pytest.mark.parametrize(("program", "what"), UNMETERED, ids=[what for _, what in UNMETERED])
def test_what_is_not_metered_is_said(
    program: Any, what: str, colour: Colour, vluna: Vluna, caplog: pytest.LogCaptureFixture, billed: Any
) -> None:
    """``on_unmetered="warn"``: the call runs, and a warning names the endpoint (design rule 18)."""
    with caplog.at_level(logging.WARNING):
        bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.nothing()
    assert what in caplog.text


@pytest.mark.parametrize(("program", "what"), UNMETERED, ids=[what for _, what in UNMETERED])
def test_what_is_not_metered_is_refused_on_request(
    program: Any, what: str, colour: Colour, make_vluna: MakeVluna, provider: Provider, customer: str
) -> None:
    """``on_unmetered="deny"``: nothing is sent."""
    vluna = make_vluna(on_unmetered="deny")
    with pytest.raises(ConfigurationError, match=what.replace(".", r"\.")):
        colour.run(program, vluna.bind(colour.bare(), principal_id=customer))
    assert provider.requests == []


@pytest.mark.parametrize("name", ["realtime", "responses"])
def test_a_websocket_is_not_metered_and_said(name: str, colour: Colour, make_vluna: MakeVluna, customer: str) -> None:
    """What does not pass through ``request`` follows ``on_unmetered`` all the same."""
    client = make_vluna(on_unmetered="deny").bind(colour.bare(), principal_id=customer)
    if not hasattr(getattr(client, name), "connect"):
        pytest.skip(f"this SDK has no client.{name}.connect")
    with pytest.raises(ConfigurationError, match=rf"{name}\.connect"):
        getattr(client, name).connect(model="gpt-realtime")


# -- background ------------------------------------------------------------------------------------------------------


def test_a_background_response_is_booked_when_it_is_retrieved(
    colour: Colour, vluna: Vluna, provider: Provider, shared_gate: Sandbox, customer: str
) -> None:
    """Parked when created, booked once by ingest however often it is retrieved, not booked while it works."""

    async def program(client: Any) -> None:
        created = await ask(client.responses.create(model="gpt-4o", input="hi", background=True))
        provider.behaviour = "in_progress"
        await ask(client.responses.retrieve(created.id))
        assert shared_gate.booked(customer).entries == ()
        provider.behaviour = "ok"
        for _ in range(3):
            await ask(client.responses.retrieve(created.id))
        async for _ in each(await ask(client.responses.retrieve(created.id, stream=True))):
            pass

    provider.responses = {str(index): {} for index in range(abs(hash((customer, colour.is_async))) % 1000)}
    colour.run(program, vluna.bind(colour.bare(), principal_id=customer))
    assert vluna.flush(10)
    entries = shared_gate.booked(customer).entries
    assert [(entry.kind, entry.quantity) for entry in entries] == [("ingest", 120)]
    assert [lease.state for lease in shared_gate.leases(customer)] == ["active"]


@pytest.mark.parametrize("leave", [False, True])
def test_a_background_stream_is_booked_once(
    leave: bool, colour: Colour, vluna: Vluna, provider: Provider, shared_gate: Sandbox, customer: str
) -> None:
    """Read to its end or left: what a retrieve says later is the same booking."""

    async def program(client: Any) -> None:
        made = await ask(client.responses.create(model="gpt-4o", input="hi", background=True, stream=True))
        async for event in each(made):
            if event.type == "response.created":
                response_id = event.response.id
            if leave:
                break
        await ask(made.close())
        again = await ask(client.responses.retrieve(response_id, stream=True))
        async for _ in each(again):
            pass
        await ask(client.responses.retrieve(response_id))

    provider.responses = {str(index): {} for index in range(1000 + abs(hash((customer, leave))) % 1000)}
    colour.run(program, vluna.bind(colour.bare(), principal_id=customer))
    assert vluna.flush(10)
    entries = shared_gate.booked(customer).entries
    assert [(entry.kind, entry.quantity) for entry in entries] == [("ingest", 120)]


def test_retrieving_an_ordinary_response_books_nothing(
    colour: Colour, vluna: Vluna, shared_gate: Sandbox, customer: str
) -> None:
    """The usage that a retrieve repeats was billed when the response was created."""

    async def program(client: Any) -> None:
        created = await ask(client.responses.create(model="gpt-4o", input="hi"))
        await ask(client.responses.retrieve(created.id))
        async for _ in each(await ask(client.responses.retrieve(created.id, stream=True))):
            pass

    with call_context(principal_id=customer) as scope:
        colour.run(program, vluna.wrap(colour.bare()))
    settled(vluna, scope, shared_gate, customer).booked_once()


# -- authorize="overlap" ---------------------------------------------------------------------------------------------


@programs
def test_overlap_books_as_strict_does(
    program: Any, colour: Colour, gate: Sandbox, make_vluna: MakeVluna, provider: Provider
) -> None:
    """One lease, one commit."""
    vluna = make_vluna(gate, authorize="overlap")
    colour.run(program, vluna.bind(colour.bare(), principal_id="alice"))
    assert vluna.flush(10)
    assert [entry.status for entry in gate.booked("alice").entries] == ["applied"]
    assert [lease.state for lease in gate.leases("alice")] == ["closed"]


@programs
def test_overlap_hands_nothing_out_before_the_lease(
    program: Any, colour: Colour, gate: Sandbox, make_vluna: MakeVluna, provider: Provider
) -> None:
    """The provider is asked at once; a denial that comes later still reaches the product, and no answer does."""
    gate.set_credit("broke", 0)
    gate.faults.add("latency", "authorize", seconds=0.3, times=None)
    vluna = make_vluna(gate, authorize="overlap")
    with pytest.raises(GateDenied):
        colour.run(program, vluna.bind(colour.bare(max_retries=2), principal_id="broke"))
    assert len(provider.requests) == 1
    assert gate.booked("broke").entries == ()


def test_overlap_stops_the_provider_when_the_gate_says_no(
    colour: Colour, gate: Sandbox, make_vluna: MakeVluna, provider: Provider
) -> None:
    """The answer that nobody will get is closed at once, not when it is collected."""
    gate.set_credit("broke", 0)
    gate.faults.add("latency", "authorize", seconds=0.2, times=None)
    provider.behaviour = "hang"
    vluna = make_vluna(gate, authorize="overlap")
    caught: list[BaseException] = []

    async def program(client: Any) -> None:
        try:
            await stream(client)
        except GateDenied as error:
            caught.append(error)  # holds the frames, and so the answer
        assert client._client._transport._pool.connections == []

    colour.run(program, vluna.bind(colour.bare(), principal_id="broke"))
    assert caught


def test_overlap_costs_no_time_while_the_gate_is_faster(
    colour: Colour, gate: Sandbox, make_vluna: MakeVluna, provider: Provider
) -> None:
    """The two waits lie over each other."""
    gate.faults.add("latency", "authorize", seconds=0.4, times=None)
    provider.behaviour = "slow_body"
    provider.pause = 0.12
    vluna = make_vluna(gate, authorize="overlap")

    async def program(client: Any) -> float:
        began = time.monotonic()
        await chat(client)
        return time.monotonic() - began

    bare = colour.run(program, colour.bare())
    assert bare > 0.45, bare
    assert colour.run(program, vluna.bind(colour.bare(), principal_id="alice")) < bare + 0.25


@pytest.mark.parametrize("behaviour", ["bad", "down"])
def test_overlap_gives_the_lease_back_when_the_provider_fails_first(
    behaviour: str, colour: Colour, gate: Sandbox, make_vluna: MakeVluna, provider: Provider
) -> None:
    """The lease comes after the failure and is cancelled then."""
    gate.faults.add("latency", "authorize", seconds=0.2, times=None)
    provider.behaviour = behaviour
    vluna = make_vluna(gate, authorize="overlap")

    async def program(client: Any) -> None:
        import openai

        with pytest.raises(openai.APIStatusError):
            await chat(client)
        await asyncio.sleep(0.5)

    colour.run(program, vluna.bind(colour.bare(), principal_id="alice"))
    assert vluna.flush(10)
    assert [lease.state for lease in gate.leases("alice")] == ["canceled"]


def test_overlap_cancelled_while_the_gate_is_asked(gate: Sandbox, make_vluna: MakeVluna, provider: Provider) -> None:
    """The caller goes away with the answer there and the lease not: it is given back when it comes."""
    gate.faults.add("latency", "authorize", seconds=0.5, times=None)
    vluna = make_vluna(gate, authorize="overlap")
    colour = Colour(True, provider)

    async def program(client: Any) -> None:
        task = asyncio.create_task(chat(client))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.6)

    colour.run(program, vluna.bind(colour.bare(), principal_id="alice"))
    assert vluna.flush(10)
    assert [lease.state for lease in gate.leases("alice")] == ["canceled"]


def test_threads_and_tasks_do_not_see_each_others_calls(
    colour: Colour, vluna: Vluna, provider: Provider, shared_gate: Sandbox
) -> None:
    """Many calls at once, each billed to its own customer."""
    provider.behaviour = "slow"
    provider.pause = 0.005
    names = [f"many_{colour.is_async}_{index}" for index in range(24)]
    client = vluna.wrap(colour.bare())

    async def one(name: str) -> None:
        with call_context(principal_id=name):
            await stream(client)

    if colour.is_async:

        async def main() -> None:
            await asyncio.gather(*(one(name) for name in names))
            await client.close()

        asyncio.run(main())
    else:
        threads = [threading.Thread(target=lambda name=name: asyncio.run(one(name))) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client.close()
    assert vluna.flush(20)
    assert [[entry.quantity for entry in shared_gate.booked(name).entries] for name in names] == [[120]] * len(names)


def test_an_image_edit_reads_its_files_once(colour: Colour, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """Files are never read by us."""

    class Once(io.BytesIO):
        reads = 0

        def read(self, *args: Any) -> bytes:
            type(self).reads += 1
            return super().read(*args)

    async def program(client: Any) -> None:
        await ask(client.images.edit(model="gpt-image-1", image=("a.png", Once(b"png"), "image/png"), prompt="p"))

    Once.reads = 0
    colour.run(program, colour.bare())
    bare, Once.reads = Once.reads, 0
    billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    assert Once.reads == bare
