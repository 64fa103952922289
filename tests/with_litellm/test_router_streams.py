"""Streams through a Router: however they end, and where a fallback continues them, each operation is settled once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from books import FEATURE, MESSAGES, TOKENS, Books
from litellm.utils import CustomStreamWrapper
from routers import NEW, Pair, claude, deployment, router, two_providers

from vluna_llm import Scope, Vluna, call_context
from vluna_llm.context import current_context
from vluna_llm.errors import GateDenied

OLD_SYNC = "LiteLLM 1.83 asks the group that broke again and again, until its recursion ends (without us, too)"
COLOURS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
MINI = "openai.gpt-4o-mini"
OPUS = "anthropic.claude-opus-5"
SONNET = "anthropic.claude-sonnet-5"


@pytest.fixture(scope="module")
def _pair() -> Iterator[Pair]:
    with two_providers() as pair:
        yield pair


@pytest.fixture
def pair(_pair: Pair) -> Pair:
    """Two providers."""
    return _pair.fresh()


def with_fallback(pair: Pair, **settings: Any) -> Any:
    """The group ``chat`` on the first provider, the group ``other`` (another model) on the second."""
    deployments = [deployment(pair.first), deployment(pair.second, "other", "openai/gpt-4o-mini")]
    return router(deployments, **{"fallbacks": [{"chat": ["other"]}], "num_retries": 0, **settings})


class Open:
    """A stream of a Router in one of the two colours, read by hand."""

    def __init__(self, target: Any, is_async: bool, **arguments: Any) -> None:
        self.is_async = is_async
        self.loop = asyncio.new_event_loop()
        self.arguments = {"model": "chat", "messages": MESSAGES, "stream": True, **arguments}
        if is_async:
            self.stream = self.loop.run_until_complete(target.acompletion(**self.arguments))
        else:
            self.stream = target.completion(**self.arguments)

    def read(self, count: int) -> list[Any]:
        """The next items."""
        if not self.is_async:
            return [next(self.stream) for _ in range(count)]

        async def some() -> list[Any]:
            return [await self.stream.__anext__() for _ in range(count)]

        return self.loop.run_until_complete(some())

    def rest(self) -> list[Any]:
        """All that is left."""
        if not self.is_async:
            return list(self.stream)

        async def all_of_it() -> list[Any]:
            return [item async for item in self.stream]

        return self.loop.run_until_complete(all_of_it())

    def close(self) -> None:
        """Close it, as LiteLLM lets a caller do so in this version."""
        if self.is_async:
            self.loop.run_until_complete(self.stream.aclose())
        elif hasattr(self.stream, "close"):
            self.stream.close()
        else:
            self.stream._sync_generator.close()

    def drop(self) -> None:
        """Let go of it, unread; LiteLLM's logging threads hold it a little longer."""
        self.stream = None
        (scope,) = current_context().scopes
        for _ in range(100):
            gc.collect()
            self.loop.run_until_complete(asyncio.sleep(0.02))
            if not scope.pending:
                return

    def done(self) -> None:
        """Close the loop."""
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., Open]]:
    """Opens streams and tidies up after them."""
    made: list[Open] = []

    def make(*args: Any, **kwargs: Any) -> Open:
        made.append(Open(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.done()


# -- however it ends ---------------------------------------------------------------------------------------------------


@COLOURS
def test_a_stream_that_is_read_is_charged(
    is_async: bool, pair: Pair, metered: Vluna, books: Books, opened: Callable[..., Open]
) -> None:
    """By the provider's own numbers, which the caller did not ask for and does not see."""
    target = router([deployment(pair.first)])

    def work() -> None:
        one = opened(target, is_async)
        assert isinstance(one.stream, CustomStreamWrapper)
        items = one.rest()
        assert "".join(item.choices[0].delta.content or "" for item in items if item.choices).startswith("word0 word1")
        assert all(getattr(item, "usage", None) is None for item in items)

    books.run(metered, work)
    books.once()


@COLOURS
@pytest.mark.parametrize("how", ["close", "drop", "never_read"])
def test_a_stream_that_is_left_gives_its_lease_back(
    how: str, is_async: bool, pair: Pair, metered: Vluna, books: Books, opened: Callable[..., Open]
) -> None:
    """Closed, dropped, or never read: once, and at once."""
    pair.first.behaviour = "hang"
    target = router([deployment(pair.first)])

    def work() -> None:
        one = opened(target, is_async)
        if how != "never_read":
            one.read(2)
        if how == "close":
            one.close()
        one.drop()

    books.run(metered, work)
    books.cancelled()


@COLOURS
def test_a_stream_that_is_left_after_its_end_is_charged(
    is_async: bool, pair: Pair, metered: Vluna, books: Books, opened: Callable[..., Open]
) -> None:
    """An early stop is no abort: the finish reason was seen. Where LiteLLM cannot close the stream, nobody reads on."""
    target = router([deployment(pair.first)])
    closable = is_async or hasattr(CustomStreamWrapper, "close")

    def work() -> None:
        one = opened(target, is_async)
        while not any(item.choices and item.choices[0].finish_reason for item in one.read(1)):
            pass
        one.close()
        one.drop()

    books.run(metered, work)
    if closable:
        books.once()
    else:
        books.estimated_once()


def test_a_task_that_is_cancelled_while_it_reads(pair: Pair, metered: Vluna, books: Books) -> None:
    """The operation ends with the task."""
    pair.first.behaviour = "hang"
    target = router([deployment(pair.first)])

    async def read(seen: asyncio.Event) -> None:
        async for _ in await target.acompletion(model="chat", messages=MESSAGES, stream=True):
            seen.set()

    async def main() -> None:
        seen = asyncio.Event()
        task = asyncio.create_task(read(seen))
        await seen.wait()
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    books.run(metered, lambda: asyncio.run(main()))
    books.cancelled()


@pytest.mark.parametrize("stop", ["break", "end"])
def test_responses_of_a_router(stop: str, pair: Pair, metered: Vluna, books: Books) -> None:
    """``router.aresponses(stream=True)``, read to the end or broken off and dropped."""
    if stop == "break":
        pair.first.behaviour = "hang"
    target = router([deployment(pair.first)])

    async def main() -> None:
        stream = await target.aresponses(model="chat", input="hi", stream=True)
        async for _ in stream:
            if stop == "break":
                break
        if stop == "break" and hasattr(stream, "aclose"):
            with contextlib.suppress(Exception):
                await stream.aclose()
        del stream, _
        await asyncio.sleep(0.02)
        gc.collect()
        await asyncio.sleep(0.02)

    books.run(metered, lambda: asyncio.run(main()))
    gc.collect()
    books.settled(metered)
    if stop == "break":
        books.cancelled()
    else:
        books.once()


@pytest.fixture
def continued(is_async: bool) -> None:
    """Skips what this version of LiteLLM cannot do."""
    if not NEW and not is_async:
        pytest.skip(OLD_SYNC)


# -- a fallback continues it -------------------------------------------------------------------------------------------


@COLOURS
@pytest.mark.usefixtures("continued")
def test_a_fallback_before_the_first_word(
    is_async: bool, pair: Pair, metered: Vluna, books: Books, opened: Callable[..., Open]
) -> None:
    """The stream breaks before any content: the first lease is given back, the other model is charged.

    The caller reads when it has left its call context: who pays is known all the same.
    """
    pair.first.behaviour = "error_first"
    target = with_fallback(pair)
    with call_context(principal_id=books.customer):
        one = opened(target, is_async)
    items = one.rest()
    assert "".join(item.choices[0].delta.content or "" for item in items if item.choices).startswith("word0 word1")
    books.settled(metered)
    assert books.leases == [(FEATURE, "canceled"), (MINI, "closed")]
    assert books.charged == [(MINI, TOKENS)]
    assert pair.asked == (1, 1)


@COLOURS
@pytest.mark.usefixtures("continued")
def test_a_fallback_to_the_same_model_before_the_first_word(
    is_async: bool, pair: Pair, metered: Vluna, books: Books, opened: Callable[..., Open]
) -> None:
    """The first stream has ended its operation: the second has one of its own. One charge."""
    pair.first.behaviour = "error_first"
    deployments = [deployment(pair.first), deployment(pair.second, "other")]
    target = router(deployments, fallbacks=[{"chat": ["other"]}], num_retries=0)
    books.run(metered, lambda: opened(target, is_async).rest())
    assert sorted(books.leases) == [(FEATURE, "canceled"), (FEATURE, "closed")]
    assert books.charged == [(FEATURE, TOKENS)]


@COLOURS
@pytest.mark.usefixtures("continued")
def test_a_fallback_in_the_midst(
    is_async: bool, pair: Pair, metered: Vluna, books: Books, opened: Callable[..., Open]
) -> None:
    """1.83 lets another model go on with what was said; 1.106 tells the caller. The broken stream costs nothing."""
    pair.first.behaviour = "error_last"
    target = with_fallback(pair)

    def work() -> None:
        one = opened(target, is_async)
        if NEW:
            with pytest.raises(openai.APIError):
                one.rest()
        else:
            one.rest()

    books.run(metered, work)
    books.settled(metered)
    if NEW:
        books.cancelled()
    else:
        assert books.leases == [(FEATURE, "canceled"), (MINI, "closed")]
        assert books.charged == [(MINI, TOKENS)]


@COLOURS
@pytest.mark.usefixtures("continued")
def test_a_fallback_that_the_customer_may_not_use_is_refused_in_the_stream(
    is_async: bool, pair: Pair, metered: Vluna, books: Books, opened: Callable[..., Open]
) -> None:
    """The reader gets the gate's own error, and no other model is tried."""
    books.gate.quota(0, feature=MINI, principal_id=books.customer)
    pair.first.behaviour = "error_first"
    target = with_fallback(pair, fallbacks=[{"chat": ["other", "chat"]}])
    scopes: list[Scope] = []

    def work() -> None:
        with call_context(principal_id=books.customer) as scope:
            scopes.append(scope)
            one = opened(target, is_async)  # from 1.109 on the Router looks at the beginning before it returns
        one.rest()

    with pytest.raises(GateDenied) as caught:
        work()
    assert caught.value.reason == "quota"
    assert scopes[0].last_denial is caught.value
    books.settled(metered)
    assert books.leases == [(FEATURE, "canceled")]
    assert pair.asked == (1, 0)


@COLOURS
@pytest.mark.usefixtures("continued")
def test_a_fallback_that_fails_too_costs_nothing(
    is_async: bool, pair: Pair, metered: Vluna, books: Books, opened: Callable[..., Open]
) -> None:
    """Both leases are given back."""
    pair.first.behaviour, pair.second.behaviour = "error_first", "down"
    target = with_fallback(pair)

    def work() -> None:
        with pytest.raises(openai.APIError):
            opened(target, is_async).rest()

    books.run(metered, work)
    assert books.leases == [(FEATURE, "canceled"), (MINI, "canceled")]
    assert books.charged == []


@COLOURS
@pytest.mark.usefixtures("continued")
def test_a_continued_stream_that_is_left(
    is_async: bool, pair: Pair, metered: Vluna, books: Books, opened: Callable[..., Open]
) -> None:
    """Closing the Router's stream reaches the one below it that a fallback has opened."""
    pair.first.behaviour, pair.second.behaviour = "error_first", "hang"
    target = with_fallback(pair)

    def work() -> None:
        one = opened(target, is_async)
        one.read(2)
        one.close()
        one.drop()

    books.run(metered, work)
    assert books.leases == [(FEATURE, "canceled"), (MINI, "canceled")]


@COLOURS
def test_a_stream_that_breaks_once(
    is_async: bool, pair: Pair, metered: Vluna, books: Books, opened: Callable[..., Open]
) -> None:
    """What LiteLLM tries then differs (1.83, sync: the same group again): one charge, for the customer of the call."""
    pair.first.behaviour = "error_once"
    target = with_fallback(pair)
    with call_context(principal_id=books.customer):
        one = opened(target, is_async)
    assert one.rest()
    books.settled(metered)
    second = MINI if NEW or is_async else FEATURE
    assert books.leases == [(FEATURE, "canceled"), (second, "closed")]
    assert books.charged == [(second, TOKENS)]


def test_a_sync_stream_read_on_a_loop_is_continued_for_its_customer(pair: Pair, metered: Vluna, books: Books) -> None:
    """LiteLLM continues it in another thread then."""
    pair.first.behaviour = "error_once"
    target = with_fallback(pair)

    async def main() -> None:
        with call_context(principal_id=books.customer):
            stream = target.completion(model="chat", messages=MESSAGES, stream=True)
        assert list(stream)

    asyncio.run(main())
    books.settled(metered)
    assert books.leases == [(FEATURE, "canceled"), (MINI if NEW else FEATURE, "closed")]


@pytest.mark.skipif(not NEW, reason="LiteLLM 1.83 continues only chats")
def test_responses_continued_by_a_fallback(pair: Pair, metered: Vluna, books: Books) -> None:
    """``router.aresponses(stream=True)`` breaks before its first word, and another model answers."""
    pair.first.behaviour = "error_first"
    target = with_fallback(pair)

    async def main() -> None:
        with call_context(principal_id=books.customer):
            stream = await target.aresponses(model="chat", input="hi", stream=True)
        assert [item async for item in stream]

    asyncio.run(main())
    books.settled(metered)
    assert books.leases == [(FEATURE, "canceled"), (MINI, "closed")]
    assert books.charged == [(MINI, TOKENS)]


@pytest.mark.skipif(not NEW, reason="LiteLLM 1.83 continues only chats")
@pytest.mark.parametrize("retries", [0, 1], ids=["fallback", "retry"])
def test_messages_continued_by_a_retry_or_a_fallback(retries: int, pair: Pair, metered: Vluna, books: Books) -> None:
    """``router.aanthropic_messages(stream=True)`` breaks before its first word."""
    pair.first.behaviour = "error_first"
    deployments = [claude(pair.first), claude(pair.second, "other", "claude-opus-5")]
    target = router(deployments, fallbacks=[{"chat": ["other"]}], num_retries=retries, disable_cooldowns=True)

    async def main() -> None:
        with call_context(principal_id=books.customer):
            stream = await target.aanthropic_messages(model="chat", messages=MESSAGES, max_tokens=9, stream=True)
        assert b"message_stop" in b"".join([item async for item in stream])

    asyncio.run(main())
    books.settled(metered)
    assert pair.asked == (1 + retries, 1)
    assert books.leases[-1] == (OPUS, "closed")
    assert set(books.leases[:-1]) == {(SONNET, "canceled")}
    assert books.charged == [(OPUS, TOKENS)]


@pytest.mark.skipif(not NEW, reason="LiteLLM 1.83 continues only chats")
def test_messages_continued_by_a_retry_that_answers(pair: Pair, metered: Vluna, books: Books) -> None:
    """The second attempt at the same model is what is charged."""
    pair.first.behaviour = "error_once"
    target = router([claude(pair.first)], num_retries=1, disable_cooldowns=True)

    async def main() -> Scope:
        with call_context(principal_id=books.customer) as scope:
            stream = await target.aanthropic_messages(model="chat", messages=MESSAGES, max_tokens=9, stream=True)
        assert b"message_stop" in b"".join([item async for item in stream])
        return scope

    scope = asyncio.run(main())
    gc.collect()
    assert scope.wait(5)
    assert pair.asked == (2, 0)
    assert books.charged == [(SONNET, TOKENS)]
    assert books.leases == [(SONNET, "canceled"), (SONNET, "closed")]


@pytest.mark.skipif(not NEW, reason="LiteLLM 1.83 continues only chats")
def test_messages_whose_fallback_is_refused(pair: Pair, metered: Vluna, books: Books) -> None:
    """The gate's own error, out of the stream."""
    books.gate.quota(0, feature=OPUS, principal_id=books.customer)
    pair.first.behaviour = "error_first"
    deployments = [claude(pair.first), claude(pair.second, "other", "claude-opus-5")]
    target = router(deployments, fallbacks=[{"chat": ["other"]}], num_retries=0)

    async def main() -> None:
        with call_context(principal_id=books.customer):
            stream = await target.aanthropic_messages(model="chat", messages=MESSAGES, max_tokens=9, stream=True)
        with pytest.raises(GateDenied):
            assert [item async for item in stream]

    asyncio.run(main())
    books.settled(metered)
    assert books.charged == []
    assert pair.asked == (1, 0)
