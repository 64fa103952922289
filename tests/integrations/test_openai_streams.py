"""However a stream ends, it is settled exactly once: as what it was (design rules 3 and 4)."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import Bill, Colour, MakeVluna, ask, cancelled, each, entered, eventually, gone, settled
from provider import Provider

from vluna_llm import Vluna, call_context
from vluna_llm.sandbox import Sandbox

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"model": "gpt-4o", "messages": MESSAGES}
STREAM = {**CHAT, "stream": True}
RESPONSE = {"model": "gpt-4o", "input": "hi", "stream": True}


class _Consumer(Exception):
    """Raised by the consumer's own code."""


async def _open(client: Any, api: str = "chat") -> Any:
    if api == "chat":
        return await ask(client.chat.completions.create(**STREAM))
    return await ask(client.responses.create(**RESPONSE))


async def _take(stream: Any, count: int) -> None:
    """Read so many items with the stream's own iterator, and leave it open."""
    for _ in range(count):
        await ask(stream.__anext__() if hasattr(stream, "__anext__") else next(stream))


# -- left early: one abort, nothing charged --------------------------------------------------------------------------


async def break_in_with(client: Any, api: str) -> None:
    async with entered(await _open(client, api)) as stream:
        await _take(stream, 2)


async def break_without_with(client: Any, api: str) -> None:
    stream = await _open(client, api)
    await _take(stream, 2)
    del stream
    await gone()


async def exception_in_the_loop(client: Any, api: str) -> None:
    with suppress(_Consumer):
        async with entered(await _open(client, api)) as stream:
            async for _ in each(stream):
                raise _Consumer


async def exception_without_with(client: Any, api: str) -> None:
    async def consume() -> None:
        stream = await _open(client, api)
        await _take(stream, 2)
        raise _Consumer

    with suppress(_Consumer):
        await consume()
    await gone()


async def close_after_two(client: Any, api: str) -> None:
    stream = await _open(client, api)
    await _take(stream, 2)
    await ask(stream.close())


async def close_twice(client: Any, api: str) -> None:
    stream = await _open(client, api)
    await _take(stream, 2)
    await ask(stream.close())
    await ask(stream.close())
    del stream
    await gone()


async def never_iterated_dropped(client: Any, api: str) -> None:
    stream = await _open(client, api)
    del stream
    await gone()


async def never_iterated_closed(client: Any, api: str) -> None:
    await ask((await _open(client, api)).close())


async def raw_never_parsed_dropped(client: Any, api: str) -> None:
    if api == "chat":
        raw = await ask(client.chat.completions.with_raw_response.create(**STREAM))
    else:
        raw = await ask(client.responses.with_raw_response.create(**RESPONSE))
    del raw
    await gone()


async def parsed_stream_dropped_response_kept(client: Any, api: str) -> None:
    """The stream is collected, and closes a response that somebody still holds, from inside the collection."""
    raw = await ask(client.chat.completions.with_raw_response.create(**STREAM))
    stream = await ask(raw.parse())
    await _take(stream, 2)
    response = raw.http_response
    del raw, stream
    await gone()
    assert response.headers  # 2.0 leaves it open; later ones have closed it by now
    del response
    await gone()


async def streaming_response_lines_broken_off(client: Any, api: str) -> None:
    resource = client.chat.completions if api == "chat" else client.responses
    body = STREAM if api == "chat" else RESPONSE
    async with entered(resource.with_streaming_response.create(**body)) as response:
        async for _ in each(response.iter_lines()):
            break


async def helper_left_early(client: Any, api: str) -> None:
    if api == "chat":
        manager = client.chat.completions.stream(**CHAT)
    else:
        manager = client.responses.stream(model="gpt-4o", input="hi")
    async with entered(manager) as stream:
        async for _ in each(stream):
            break


LEFT_EARLY = [
    break_in_with,
    break_without_with,
    exception_in_the_loop,
    exception_without_with,
    close_after_two,
    close_twice,
    never_iterated_dropped,
    never_iterated_closed,
    raw_never_parsed_dropped,
    parsed_stream_dropped_response_kept,
    streaming_response_lines_broken_off,
    helper_left_early,
]

left_early = pytest.mark.parametrize("leave", LEFT_EARLY, ids=lambda leave: leave.__name__)


@left_early
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_leaving_early_cancels_once(
    leave: Any, api: str, colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """A consumer who leaves before the model has finished is charged nothing, and the lease is given back."""
    provider.behaviour = "hang"
    bill: Bill = billed(vluna, lambda: colour.run(lambda client: leave(client, api), vluna.wrap(colour.bare())))
    bill.cancelled_once()


@pytest.mark.parametrize("leave", [break_in_with, break_without_with, close_after_two], ids=lambda one: one.__name__)
def test_leaving_early_is_estimated_on_request(
    leave: Any, colour: Colour, make_vluna: MakeVluna, provider: Provider, billed: Any
) -> None:
    """``on_abort="estimate"`` bills what was generated, labelled."""
    provider.behaviour = "hang"
    vluna = make_vluna(on_abort="estimate")
    bill: Bill = billed(vluna, lambda: colour.run(lambda client: leave(client, "chat"), vluna.wrap(colour.bare())))
    bill.booked_an_estimate()


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("leave", [break_in_with, close_after_two, helper_left_early], ids=lambda one: one.__name__)
def test_leaving_early_is_drained_on_request(
    leave: Any, api: str, colour: Colour, make_vluna: MakeVluna, provider: Provider, billed: Any
) -> None:
    """``on_abort="drain"`` reads the rest behind the consumer's back and bills what the provider reports."""
    provider.behaviour = "slow"
    vluna = make_vluna(on_abort="drain")

    async def program(client: Any) -> None:
        began = time.monotonic()
        await leave(client, api)
        assert time.monotonic() - began < 0.2, "the consumer had to wait for the rest"
        await asyncio.sleep(0.6)

    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.booked_once()


def test_a_drain_is_cut_short_by_the_end_of_the_loop(make_vluna: MakeVluna, provider: Provider, billed: Any) -> None:
    """A loop that ends takes the drain with it: nothing is charged, nothing is left open."""
    provider.behaviour = "hang"
    vluna = make_vluna(on_abort="drain")
    colour = Colour(True, provider)
    bill: Bill = billed(vluna, lambda: colour.run(lambda c: break_in_with(c, "chat"), vluna.wrap(colour.bare())))
    bill.cancelled_once()


# -- read to the end, or far enough --------------------------------------------------------------------------------


async def stop_at_the_finish_reason(client: Any) -> None:
    async with entered(await _open(client)) as stream:
        async for chunk in each(stream):
            if chunk.choices[0].finish_reason:
                break


async def stop_at_the_finish_reason_and_close(client: Any) -> None:
    stream = await _open(client)
    async for chunk in each(stream):
        if chunk.choices[0].finish_reason:
            await ask(stream.close())
            break


async def lines_up_to_the_finish_reason(client: Any) -> None:
    async with entered(client.chat.completions.with_streaming_response.create(**STREAM)) as response:
        async for line in each(response.iter_lines()):
            if '"stop"' in line:
                break


FAR_ENOUGH = [stop_at_the_finish_reason, stop_at_the_finish_reason_and_close, lines_up_to_the_finish_reason]


@pytest.mark.parametrize("program", FAR_ENOUGH, ids=lambda one: one.__name__)
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_stopping_at_the_finish_reason_is_not_an_abort(
    program: Any, encoding: str, colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """The usage chunk behind the finish reason is read on before the connection is closed (design rule 3)."""
    provider.encoding = encoding
    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.booked_once()


def test_a_rest_that_never_comes_is_not_waited_for(
    colour: Colour, vluna: Vluna, provider: Provider, billed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upstream that finishes and then hangs costs the consumer two seconds at most, and is estimated."""
    monkeypatch.setattr("vluna_llm._tap_watch.REST_SECONDS", 0.3)
    provider.behaviour = "hang_after_finish"
    began = time.monotonic()
    bill: Bill = billed(vluna, lambda: colour.run(stop_at_the_finish_reason, vluna.wrap(colour.bare())))
    assert time.monotonic() - began < 3
    bill.booked_an_estimate()


def test_a_finished_answer_that_is_forgotten_is_estimated(
    colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """Nobody can read on in a finalizer; what the model had finished is still never cancelled."""
    provider.behaviour = "hang_after_finish"

    async def program(client: Any) -> None:
        stream = await _open(client)
        await _take(stream, 14)
        del stream
        await gone()

    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.booked_an_estimate()


def test_a_plain_answer_left_early_is_read_and_booked(
    colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """A streaming response that is plain JSON was generated before it was sent: leaving it changes no bill."""
    provider.behaviour = "slow_body"

    async def program(client: Any) -> None:
        async with entered(client.chat.completions.with_streaming_response.create(**CHAT)) as response:
            async for _ in each(response.iter_bytes(10)):
                break

    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.booked_once()


def test_a_plain_answer_never_read_is_booked(colour: Colour, vluna: Vluna, billed: Any) -> None:
    """Opening a streaming response and leaving it unread is the same."""

    async def program(client: Any) -> None:
        async with entered(client.chat.completions.with_streaming_response.create(**CHAT)):
            pass

    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.booked_once()


def test_json_instead_of_a_stream_is_booked(colour: Colour, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """Some servers answer a request for a stream with one JSON object."""
    provider.behaviour = "json"

    async def program(client: Any) -> None:
        async for _ in each(await _open(client)):
            pass

    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.booked_once()


def test_a_stream_that_a_hook_has_read_already(colour: Colour, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """A logging hook of the HTTP client reads every answer: the chunk that nobody asked for is still left out."""
    http = __import__(type(openai.OpenAI(api_key="sk")._client).__mro__[2].__module__.partition(".")[0])

    async def read_async(response: Any) -> None:
        await response.aread()

    hooks = {"response": [read_async if colour.is_async else lambda response: response.read()]}
    client = (http.AsyncClient if colour.is_async else http.Client)(event_hooks=hooks)

    async def program(client: Any) -> None:
        chunks = [chunk async for chunk in each(await _open(client))]
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"

    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare(http_client=client))))
    bill.booked_once()


def test_a_stream_without_usage_is_estimated(colour: Colour, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """No usage is not no work (design rule 5)."""
    provider.behaviour = "no_usage"

    async def program(client: Any) -> None:
        async for _ in each(await _open(client)):
            pass

    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.booked_an_estimate()


@pytest.mark.parametrize("status", ["incomplete", "failed"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_failed_after_spending_is_booked(
    status: str, stream: bool, colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """``response.incomplete`` and ``response.failed`` carry usage: spent and reported."""
    provider.behaviour = status

    async def program(client: Any) -> None:
        answer = await ask(client.responses.create(**{**RESPONSE, "stream": stream}))
        if stream:
            async for _ in each(answer):
                pass

    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.booked_once()


def test_usage_is_written_down_before_the_consumer_sees_the_end(
    colour: Colour, vluna: Vluna, shared_gate: Sandbox, customer: str
) -> None:
    """A product that stops working right after its last chunk has been billed."""

    async def program(client: Any) -> None:
        with call_context(principal_id=customer) as scope:
            stream = await _open(client, "responses")
            await _take(stream, 16)
            assert scope.usage.total_tokens == 120
            await ask(stream.close())

    colour.run(program, vluna.wrap(colour.bare()))


def test_the_receipt_is_there_when_settling_inline(colour: Colour, make_vluna: MakeVluna, customer: str) -> None:
    """``settle="inline"``: whoever has the end of the answer has the receipt."""
    vluna = make_vluna(settle="inline")

    async def program(client: Any) -> None:
        with call_context(principal_id=customer) as scope:
            await ask(client.chat.completions.create(**CHAT))
            assert [receipt.state for receipt in scope.receipts] == ["booked"]
            async for _ in each(await _open(client)):
                pass
            assert [receipt.state for receipt in scope.receipts] == ["booked"] * 2
            async for _ in each(await _open(client, "responses")):
                pass
            assert [receipt.state for receipt in scope.receipts] == ["booked"] * 3

    colour.run(program, vluna.wrap(colour.bare()))


# -- broken on the way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", ["cut", "ends_early", "error_event"])
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_a_stream_that_breaks_is_cancelled_and_raises_as_without_us(
    behaviour: str, api: str, colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """The consumer gets the exception of the unwrapped client (or its clean end); nothing is charged."""
    provider.behaviour = behaviour
    seen: list[Any] = []

    async def program(client: Any) -> None:
        count = 0
        try:
            async for _ in each(await _open(client, api)):
                count += 1
            seen.append((count, None))
        except Exception as error:
            seen.append((count, type(error), type(error.__cause__)))
        await gone()  # some versions of the SDK leave the stream open behind an error event

    colour.run(program, colour.bare())
    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    assert seen[0] == seen[1]
    bill.cancelled_once()


def test_an_error_event_that_carries_usage_is_booked(
    colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """What the provider reported was spent, error or not."""
    provider.behaviour = "error_with_usage"

    async def program(client: Any) -> None:
        try:
            async for _ in each(await _open(client)):
                pass
        except openai.APIError:
            return
        pytest.fail("the error event did not reach the consumer")

    def work() -> None:
        colour.run(program, vluna.wrap(colour.bare()))
        gc.collect()  # as above

    bill: Bill = billed(vluna, work)
    bill.booked_once()


def test_a_read_timeout_is_cancelled_and_raises_as_without_us(
    colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """A stream that stalls past the client's time-out."""
    provider.behaviour = "hang"
    seen: list[Any] = []

    async def program(client: Any) -> None:
        try:
            async for _ in each(await _open(client)):
                pass
        except Exception as error:
            seen.append((type(error), type(error.__cause__)))

    colour.run(program, colour.bare(timeout=0.3))
    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare(timeout=0.3))))
    assert seen[0] == seen[1]
    bill.cancelled_once()


# -- async only: cancellation -----------------------------------------------------------------------------------------


async def cancelled_while_reading(client: Any) -> None:
    async def work() -> None:
        async for _ in await _open(client):
            pass

    await cancelled(work)


async def cancelled_while_reading_in_with(client: Any) -> None:
    async def work() -> None:
        async with await _open(client) as stream:
            async for _ in stream:
                pass

    await cancelled(work)


async def cancelled_in_the_consumer(client: Any) -> None:
    async def work() -> None:
        async for _ in await _open(client):
            await asyncio.sleep(10)

    await cancelled(work)
    await gone()


async def cancelled_in_the_consumer_in_with(client: Any) -> None:
    async def work() -> None:
        async with await _open(client) as stream:
            async for _ in stream:
                await asyncio.sleep(10)

    await cancelled(work)


async def moved_on_by_anyio(client: Any) -> None:
    import anyio

    with anyio.move_on_after(0.15):
        async with await _open(client) as stream:
            async for _ in stream:
                pass


async def broken_off_without_with(client: Any) -> None:
    async for _ in await _open(client):
        break
    await gone()


async def left_to_the_end_of_the_loop(client: Any) -> None:
    stream = await _open(client)
    await _take(stream, 2)
    client._kept = stream


async def generator_of_the_product_dropped(client: Any) -> None:
    async def product() -> AsyncIterator[str]:
        async for chunk in await _open(client):
            yield chunk.choices[0].delta.content or ""

    async for _ in product():
        break
    await gone()


CANCELLED = [
    cancelled_while_reading,
    cancelled_while_reading_in_with,
    cancelled_in_the_consumer,
    cancelled_in_the_consumer_in_with,
    moved_on_by_anyio,
    broken_off_without_with,
    left_to_the_end_of_the_loop,
    generator_of_the_product_dropped,
]


@pytest.mark.parametrize("program", CANCELLED, ids=lambda one: one.__name__)
def test_a_cancelled_consumer_is_charged_nothing(program: Any, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """Wherever the cancellation hits, and also when the loop is torn down with the stream open."""
    provider.behaviour = "hang"
    colour = Colour(True, provider)

    def work() -> None:
        colour.run(program, vluna.wrap(colour.bare()))
        gc.collect()

    bill: Bill = billed(vluna, work)
    bill.cancelled_once()


def test_a_consumer_cancelled_behind_the_finish_reason_is_estimated(
    vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """Cancelled while waiting for the usage chunk: no reading on is possible, and no cancel is right."""
    provider.behaviour = "hang_after_finish"
    colour = Colour(True, provider)
    bill: Bill = billed(vluna, lambda: colour.run(cancelled_while_reading_in_with, vluna.wrap(colour.bare())))
    bill.booked_an_estimate()


def test_a_call_cancelled_before_the_headers_is_given_back(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """The task is cancelled while the provider has not answered at all."""
    provider.behaviour = "silent"
    colour = Colour(True, provider)

    async def program(client: Any) -> None:
        await cancelled(lambda: _open(client))

    bill: Bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.cancelled_once()


def test_a_stream_dropped_in_a_thread_without_a_loop(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """The loop is closed, the stream still referenced, and collected much later."""
    provider.behaviour = "hang"
    colour = Colour(True, provider)
    kept: list[Any] = []

    def work() -> None:
        async def main() -> None:
            kept.append(await _open(vluna.wrap(colour.bare())))

        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
        kept.clear()
        gc.collect()

    bill: Bill = billed(vluna, work)
    bill.cancelled_once()


def test_finished_streams_leave_nothing_behind(vluna: Vluna, provider: Provider, customer: str) -> None:
    """What watched a stream is freed with it."""
    from vluna_llm._tap_watch import Watch

    client = vluna.wrap(openai.OpenAI(base_url=provider.base_url, api_key="sk-test"))

    def run(count: int) -> int:
        with call_context(principal_id=customer):
            for _ in range(count):
                for _ in client.chat.completions.create(**STREAM):
                    pass
        gc.collect()
        return sum(isinstance(thing, Watch) for thing in gc.get_objects())

    assert run(100) <= run(1)
    client.close()


def test_settled_only_when_it_is_over(vluna: Vluna, provider: Provider, shared_gate: Sandbox, customer: str) -> None:
    """While the consumer is still reading, nothing is settled."""
    provider.behaviour = "hang"
    client = vluna.wrap(openai.OpenAI(base_url=provider.base_url, api_key="sk-test"))
    with call_context(principal_id=customer) as scope:
        stream = client.chat.completions.create(**STREAM)
        next(stream)
        assert not eventually(lambda: scope.pending == 0, 0.2)
        stream.close()
    settled(vluna, scope, shared_gate, customer).cancelled_once()
    client.close()


PROCESS_THAT_EXITS = """
import sys
import openai
from vluna_llm import Vluna, call_context

client = Vluna().wrap(openai.OpenAI(base_url=sys.argv[1], api_key="sk", max_retries=0))
with call_context(principal_id=sys.argv[2]):
    stream = client.chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    for _ in range(int(sys.argv[3])):
        next(stream)
"""


@pytest.mark.parametrize(("chunks", "leases", "booked"), [(2, ["canceled"], []), (14, ["closed"], ["commit"])])
def test_a_stream_that_is_open_when_the_process_exits(
    chunks: int, leases: list[str], booked: list[str], provider: Provider, customer: str, tmp_path: Path
) -> None:
    """An ordinary exit settles it: cancelled where it was under way, booked where the model had finished."""
    provider.behaviour = "hang" if chunks == 2 else "hang_after_finish"
    with Sandbox() as gate:
        subprocess.run(
            [sys.executable, "-c", PROCESS_THAT_EXITS, provider.base_url, customer, str(chunks)],
            env={
                **os.environ,
                **gate.env(),
                "VLUNA_LLM_OUTBOX": str(tmp_path),
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            check=True,
            timeout=60,
        )
        assert [lease.state for lease in gate.leases(customer)] == leases
        assert [entry.kind for entry in gate.booked(customer).entries] == booked
