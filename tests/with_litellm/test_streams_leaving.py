"""Streams that are left: at once where somebody closes or cancels, else when the garbage collector finds them."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import litellm
import pytest
from books import Books, eventually
from provider import Provider
from streaming import (
    APIS,
    CHAT,
    RESPONSES,
    Api,
    Reader,
    Reading,
    collected,
    never,
    run,
    settled,
    settled_without_collecting,
    two,
    until_finish,
)

from vluna_llm import Vluna, call_context
from vluna_llm.integrations._litellm_call import LogicalCall
from vluna_llm.integrations._litellm_models import model_call_of
from vluna_llm.integrations._litellm_stream import watch

COLOURS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
CHAT_API = Api("completion", CHAT)
RESPONSES_API = Api("responses", RESPONSES)


@COLOURS
@pytest.mark.parametrize("reading", [never, two])
@pytest.mark.parametrize("api", APIS)
def test_a_stream_that_is_dropped_costs_nothing(
    api: Api, reading: Reading, is_async: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """Never iterated, or left in the middle without closing: found by the collector."""
    provider.behaviour = "slow"
    settled(metered, books, lambda: run(api, reading, provider, is_async=is_async))
    books.cancelled()


@COLOURS
def test_a_dropped_stream_is_held_by_nobody(is_async: bool, metered: Vluna, provider: Provider, books: Books) -> None:
    """Neither we nor LiteLLM's own globals keep the stream alive once the consumer has let go."""
    provider.behaviour = "slow"
    held: list[weakref.ref[Any]] = []

    async def look(reader: Reader) -> None:
        await two(reader)
        held.append(weakref.ref(reader.stream))

    settled(metered, books, lambda: run(CHAT_API, look, provider, is_async=is_async))

    def gone() -> bool:
        gc.collect()
        return held[0]() is None

    assert eventually(gone)


async def close(reader: Reader) -> None:
    """Read a little and close, as LiteLLM's proxy does."""
    await two(reader)
    await reader.stream.aclose()


def test_aclose_settles_at_once(metered: Vluna, provider: Provider, books: Books) -> None:
    """No garbage collection is needed."""
    provider.behaviour = "slow"
    gc.disable()
    try:
        books.run(metered, lambda: run(CHAT_API, close, provider, is_async=True))
    finally:
        gc.enable()
    books.cancelled()


def test_aclose_before_the_first_read_settles_at_once(metered: Vluna, provider: Provider, books: Books) -> None:
    """The answer has begun and nobody has looked at it."""
    provider.behaviour = "slow"

    async def only_close(reader: Reader) -> None:
        await reader.stream.aclose()

    gc.disable()
    try:
        books.run(metered, lambda: run(CHAT_API, only_close, provider, is_async=True))
    finally:
        gc.enable()
    books.cancelled()


@pytest.mark.parametrize("api", APIS)
def test_a_task_cancelled_in_its_read_settles(api: Api, metered: Vluna, provider: Provider, books: Books) -> None:
    """The task waits for the next chunk when it is cancelled, and the cancellation is not swallowed."""
    provider.behaviour = "hang"
    _cancelled(api, provider, metered, books, _reads)


async def _reads(reader: Reader, started: asyncio.Event) -> None:
    started.set()
    async for _ in reader:
        pass


async def _thinks(reader: Reader, started: asyncio.Event) -> None:
    await reader.next()
    started.set()
    await asyncio.sleep(30)


@pytest.mark.parametrize("api", APIS)
def test_a_task_cancelled_in_its_own_work_settles(api: Api, metered: Vluna, provider: Provider, books: Books) -> None:
    """The stream hears nothing of it: it is dropped with the task's frame."""
    provider.behaviour = "slow"
    provider.pause = 0.1
    _cancelled(api, provider, metered, books, _thinks)


def _cancelled(api: Api, provider: Provider, vluna: Vluna, books: Books, consumer: Callable[..., Any]) -> None:
    async def main() -> None:
        started = asyncio.Event()

        async def work() -> None:
            stream = await getattr(litellm, f"a{api.name}")(**api.asked(provider))
            await consumer(Reader(stream, True), started)

        task = asyncio.create_task(work())
        await started.wait()
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task

    settled(vluna, books, lambda: asyncio.run(main()))
    books.cancelled()


@pytest.mark.parametrize("api", APIS)
def test_a_task_cancelled_before_the_answer_settles(api: Api, metered: Vluna, provider: Provider, books: Books) -> None:
    """The provider has not answered yet when the task is cancelled."""
    provider.behaviour = "silent"

    async def main() -> None:
        async def work() -> None:
            stream = await getattr(litellm, f"a{api.name}")(**api.asked(provider))
            async for _ in stream:
                pass

        task = asyncio.create_task(work())
        assert await asyncio.to_thread(eventually, lambda: bool(provider.requests))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    settled(metered, books, lambda: asyncio.run(main()))
    books.cancelled()


@pytest.mark.parametrize("api", APIS)
def test_a_stream_that_outlives_its_loop_settles(api: Api, metered: Vluna, provider: Provider, books: Books) -> None:
    """The loop is gone, the stream is still held, then it is dropped."""
    provider.behaviour = "slow"
    kept: list[Any] = []

    async def keep(reader: Reader) -> None:
        await reader.next()
        kept.append(reader)

    with call_context(principal_id=books.customer) as scope:
        run(api, keep, provider, is_async=True)
    kept.clear()
    collected(scope)
    assert metered.flush(10)
    books.cancelled()


@COLOURS
def test_leaving_at_the_finish_reason_is_no_abort(
    is_async: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """The model had finished: what it did is charged, by an estimate where the usage could not be read any more."""
    provider.behaviour = "hang_after_finish"
    settled(metered, books, lambda: run(CHAT_API, until_finish, provider, is_async=is_async))
    books.estimated_once()


def test_closing_at_the_finish_reason_reads_the_usage(metered: Vluna, provider: Provider, books: Books) -> None:
    """The chunk with the usage follows at once, and is read on the way out."""
    provider.behaviour = "slow"

    async def leave(reader: Reader) -> None:
        await until_finish(reader)
        await reader.stream.aclose()

    books.run(metered, lambda: run(CHAT_API, leave, provider, is_async=True))
    books.once()


def test_closing_waits_two_seconds_at_most(metered: Vluna, provider: Provider, books: Books) -> None:
    """The model had finished and the usage does not come: the consumer gets on, and an estimate is charged."""
    provider.behaviour = "hang_after_finish"
    took: list[float] = []

    async def leave(reader: Reader) -> None:
        async for chunk in reader:
            if chunk.choices[0].delta.content and "word11" in chunk.choices[0].delta.content:
                break
        await asyncio.sleep(0.1)
        started = asyncio.get_running_loop().time()
        await reader.stream.aclose()
        took.append(asyncio.get_running_loop().time() - started)

    settled(metered, books, lambda: run(CHAT_API, leave, provider, is_async=True))
    assert took[0] < 3
    assert books.leases[0][1] in ("closed", "canceled")


# -- on_abort ----------------------------------------------------------------------------------------------------------


@COLOURS
@pytest.mark.parametrize("api", APIS)
def test_on_abort_estimate_charges_what_was_generated(
    api: Api, is_async: bool, make_vluna: Any, make_callback: Any, provider: Provider, books: Books
) -> None:
    """Labelled as an estimate."""
    vluna = make_vluna(on_abort="estimate")
    make_callback(vluna)
    provider.behaviour = "slow"
    settled(vluna, books, lambda: run(api, two, provider, is_async=is_async))
    books.estimated_once()


def test_on_abort_drain_reads_on_in_the_background(
    make_vluna: Any, make_callback: Any, provider: Provider, books: Books
) -> None:
    """Closed in the middle; a task of the loop reads the rest, and the provider's own numbers are charged."""
    vluna = make_vluna(on_abort="drain")
    make_callback(vluna)
    provider.behaviour = "slow"
    provider.pause = 0.01

    async def leave(reader: Reader) -> None:
        await close(reader)
        await asyncio.sleep(1)

    books.run(vluna, lambda: run(CHAT_API, leave, provider, is_async=True))
    books.once()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_on_abort_drain_cannot_read_a_dropped_stream(
    is_async: bool, make_vluna: Any, make_callback: Any, provider: Provider, books: Books
) -> None:
    """What the collector finds is gone: it is given up, as with ``cancel``."""
    vluna = make_vluna(on_abort="drain")
    make_callback(vluna)
    provider.behaviour = "slow"
    settled(vluna, books, lambda: run(CHAT_API, two, provider, is_async=is_async))
    books.cancelled()


@pytest.mark.parametrize("api", APIS[2:])
@COLOURS
def test_a_text_stream_that_was_never_asked_for_costs_nothing(
    api: Api, is_async: bool, make_vluna: Any, make_callback: Any, provider: Provider, books: Books
) -> None:
    """LiteLLM sends the request at the first read; without one there is nothing to estimate."""
    vluna = make_vluna(on_abort="estimate")
    make_callback(vluna)
    settled(vluna, books, lambda: run(api, never, provider, is_async=is_async))
    assert provider.requests == []
    books.cancelled()


@pytest.mark.parametrize("ending", ["closed", "read"])
def test_a_bare_generator_that_is_closed_settles_at_once(ending: str, metered: Vluna, books: Books) -> None:
    """An async generator of LiteLLM's with no response below it: ``aclose()`` closes what it reads from, too."""
    closed: list[bool] = []

    async def items() -> AsyncIterator[dict[str, Any]]:
        try:
            for index in range(4):
                yield {"choices": [{"delta": {"content": f"word{index} "}, "finish_reason": None}]}
            yield {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": USAGE}
        finally:
            closed.append(True)

    async def main() -> None:
        call, model_call = LogicalCall(metered), model_call_of("chat.completions", {**CHAT, "stream": True})
        with call.running():
            await call.aadmit(model_call)
        stream = watch(items(), call, model_call, asked_usage=False, is_async=True)
        await stream.__anext__()
        if ending == "closed":
            await stream.aclose()
        else:
            assert [item async for item in stream]
        assert closed == [True]
        assert call.operation is not None
        assert call.operation.ended

    settled_without_collecting(metered, books, lambda: asyncio.run(main()))
    if ending == "closed":
        books.cancelled()
    else:
        books.once()
