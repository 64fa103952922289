"""What becomes of the connection below a stream of LiteLLM: it is given back, without waiting and without a collection.

The upstream says what it sees: how many connections are open, and whether the client hung up on an answer that is held.
"""

from __future__ import annotations

import asyncio
import gc
import select
import time
from collections.abc import Iterator
from typing import Any

import litellm
import pytest
from books import MESSAGES, Books, eventually
from streaming import Api, Reader, run, settled_without_collecting, two, whole
from upstream import Upstream, _UpstreamHandler

from vluna_llm import Vluna

COLOURS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
HELD_SECONDS = 8.0
APIS = [
    pytest.param(Api("completion", {"model": model, "messages": MESSAGES, "max_tokens": 100}), id=name)
    for name, model in {
        "deepseek": "deepseek/deepseek-chat",
        "openrouter": "openrouter/openai/gpt-4o",
        "anthropic": "anthropic/claude-sonnet-4-5",
    }.items()
]
DEEPSEEK = APIS[0].values[0]


class Line(Upstream):
    """The end of an answer comes with its last event, or is ``held`` back until the client hangs up."""

    def __init__(self) -> None:
        super().__init__()
        self.held = False
        self.hung_up = 0
        self.open: set[Any] = set()
        self._server.RequestHandlerClass = type("Handler", (_LineHandler,), {"owner": self})


class _LineHandler(_UpstreamHandler):
    owner: Line

    def setup(self) -> None:
        super().setup()
        self.owner.open.add(self)

    def finish(self) -> None:
        self.owner.open.discard(self)
        super().finish()

    def _events(self, events: Iterator[str]) -> None:
        if self.owner.behaviour == "slow":
            return super()._events(events)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        pieces = [event.encode() for event in events]
        data = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces)
        if not self.owner.held:
            self.wfile.write(data + b"0\r\n\r\n")
            return None
        self.wfile.write(data)
        if select.select([self.connection], [], [], HELD_SECONDS)[0]:
            self.owner.hung_up += 1
        self.close_connection = True
        return None


@pytest.fixture
def line() -> Iterator[Line]:
    with Line() as line:
        yield line


@pytest.fixture(params=[True, False], ids=["aiohttp", "httpx"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both transports that LiteLLM has for async calls; clients of its own cache are made anew."""
    monkeypatch.setattr(litellm, "disable_aiohttp_transport", not request.param)
    litellm.in_memory_llm_clients_cache.flush_cache()


def base(api: Api, line: Line) -> str:
    return line.anthropic_base if "anthropic" in api.arguments["model"] else line.base_url


@COLOURS
@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("api", APIS)
def test_streams_read_to_their_end_leave_one_connection_at_most(
    api: Api, is_async: bool, metered: Vluna, line: Line, books: Books
) -> None:
    """The next call takes the same connection, or the last one was closed; none waits for the collector."""

    async def three(reader: Reader) -> None:
        items = await whole(reader)
        for _ in range(2):
            arguments = api.asked(line, api_base=base(api, line))
            again = await litellm.acompletion(**arguments) if is_async else litellm.completion(**arguments)
            assert len(await whole(Reader(again, is_async))) == len(items)
        assert len(line.posts()) == 3
        assert await asyncio.to_thread(eventually, lambda: len(line.open) <= 1)

    settled_without_collecting(
        metered, books, lambda: run(api, three, line, is_async=is_async, api_base=base(api, line))
    )
    assert len(books.charged) == 3


@COLOURS
@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("api", APIS)
def test_an_upstream_that_keeps_the_connection_open_delays_nothing(
    api: Api, is_async: bool, metered: Vluna, line: Line, books: Books
) -> None:
    """The protocol has ended, the bytes have not: the stream ends at once, and the connection is closed soon."""
    line.held = True

    async def timed(reader: Reader) -> None:
        started = time.monotonic()
        await whole(reader)
        assert time.monotonic() - started < HELD_SECONDS / 4
        assert await asyncio.to_thread(eventually, lambda: line.hung_up == 1, HELD_SECONDS / 2)

    gc.collect()
    settled_without_collecting(
        metered, books, lambda: run(api, timed, line, is_async=is_async, api_base=base(api, line))
    )
    assert len(books.charged) == 1


def test_reading_again_after_the_end_ends_again(metered: Vluna, line: Line, books: Books) -> None:
    """Nobody reads a connection that was given back: it may carry somebody else's answer by now."""

    async def again(reader: Reader) -> None:
        await whole(reader)
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(StopAsyncIteration):
                await reader.next()
        assert time.monotonic() - started < 1

    settled_without_collecting(metered, books, lambda: run(DEEPSEEK, again, line, is_async=False))
    assert len(books.charged) == 1


def test_a_stream_that_is_dropped_lets_go_of_its_connection(metered: Vluna, line: Line, books: Books) -> None:
    """As without us, where LiteLLM's stream is no cycle; the operation ends with it."""
    line.behaviour = "slow"
    line.pause = 0.1
    settled_without_collecting(metered, books, lambda: run(DEEPSEEK, two, line, is_async=False))
    books.cancelled("deepseek.deepseek-chat")
    assert eventually(lambda: not line.open)
