"""The observing byte stream: bytes pass untouched, and one ending is told, whatever happens."""

from __future__ import annotations

import asyncio
import gc
import gzip
import importlib
import json
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Literal

import httpx
import pytest

from vluna_llm import _tap_watch
from vluna_llm._tap_watch import REST_CHUNKS
from vluna_llm._tap_wire import http_module
from vluna_llm.ending import Ending
from vluna_llm.tap import tap

MODULES = ["httpx", "httpx2"]


@pytest.fixture(params=MODULES)
def http(request: pytest.FixtureRequest) -> Any:
    """Both HTTP libraries that the SDKs use."""
    return pytest.importorskip(request.param, reason=f"{request.param} is not installed (openai 3.x brings httpx2)")


class Recorder:
    """A sink that remembers what it was told."""

    def __init__(self, on_abort: Literal["cancel", "estimate", "drain"] = "cancel") -> None:
        self.on_abort: Literal["cancel", "estimate", "drain"] = on_abort
        self.settle_inline = False
        self.endings: list[Ending] = []
        self.queued: list[Callable[[], Ending]] = []
        self.faults: list[str] = []

    def finish(self, ending: Ending) -> None:
        """Told at once."""
        self.endings.append(ending)

    def abandon(self, ending: Callable[[], Ending]) -> None:
        """Queued."""
        self.queued.append(ending)

    def wait(self, timeout: float | None = None) -> object:
        """No receipts here."""
        return None

    def wait_async(self, timeout: float | None = None) -> Awaitable[object]:
        """No receipts here."""
        raise NotImplementedError

    @property
    def only(self) -> Ending:
        """The one ending."""
        assert len(self.endings) + len(self.queued) == 1
        return self.endings[0] if self.endings else self.queued[0]()


def chunk(content: str = "", finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
    return f"data: {json.dumps({'id': 'c1', 'model': 'm', 'choices': [choice]})}\n\n".encode()


USAGE = b'data: {"id":"c1","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}\n\n'
DONE = b"data: [DONE]\n\n"
ANSWER = [chunk("a"), chunk("b"), chunk("c"), chunk(finish="stop"), USAGE, DONE]


class Source:
    """Gives its pieces and counts what was taken and how often it was closed."""

    def __init__(self, pieces: list[bytes | BaseException]) -> None:
        self.pieces = pieces
        self.taken = 0
        self.closed = 0

    def _next(self) -> Iterator[bytes]:
        while self.taken < len(self.pieces):
            piece = self.pieces[self.taken]
            self.taken += 1
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def opened(
    http: Any,
    source: Source,
    sink: Recorder,
    *,
    hide: bool = False,
    is_async: bool = False,
    headers: dict[str, str] | None = None,
) -> Any:
    """A tapped response over the source."""

    class Sync(http.SyncByteStream):  # type: ignore[name-defined,misc]
        elapsed = "as the inner stream has it"

        def __iter__(self) -> Iterator[bytes]:
            return source._next()

        def close(self) -> None:
            source.closed += 1

    class Async(http.AsyncByteStream):  # type: ignore[name-defined,misc]
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for piece in source._next():
                await asyncio.sleep(0)
                yield piece

        async def aclose(self) -> None:
            source.closed += 1

    response = http.Response(
        200,
        headers={"content-type": "text/event-stream", **(headers or {})},
        stream=Async() if is_async else Sync(),
        request=http.Request("POST", "http://127.0.0.1/v1/chat/completions"),
    )
    tap(
        response,
        sink,
        url="/chat/completions",
        hide_usage_chunk=hide,
        report=sink.faults.append,
        is_async=is_async,
    )
    return response


def test_every_byte_passes_as_it_came(http: Any) -> None:
    """In the pieces in which it came."""
    sink = Recorder()
    assert list(opened(http, Source([*ANSWER]), sink).iter_raw()) == ANSWER
    assert sink.only.usage is not None
    assert sink.only.usage.total_tokens == 10
    assert sink.only.how == "complete"


def test_the_usage_chunk_alone_is_hidden(http: Any) -> None:
    """All other bytes stay, however the pieces are cut."""
    whole = b"".join(ANSWER)
    expected = whole.replace(USAGE, b"")
    for size in (1, 7, 50, len(whole)):
        pieces: list[Any] = [whole[start : start + size] for start in range(0, len(whole), size)]
        sink = Recorder()
        assert b"".join(opened(http, Source(pieces), sink, hide=True).iter_bytes()) == expected
        assert sink.only.usage is not None


def test_the_end_is_told_before_it_is_handed_on(http: Any) -> None:
    """Whoever reads the last event can rely on the bill being written."""
    sink = Recorder()
    for piece in opened(http, Source([*ANSWER]), sink).iter_raw():
        assert bool(sink.endings) == (piece == DONE)


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_bytes_are_decoded_for_reading(hide: bool, encoding: str, http: Any) -> None:
    """The consumer's decoded bytes are right either way; where nothing has to be hidden even the raw ones are."""
    packer = zlib.compressobj(wbits=31 if encoding == "gzip" else 15)
    packed: list[Any] = [packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) for piece in ANSWER]
    packed.append(packer.flush())
    headers = {"content-encoding": encoding}
    expected = b"".join(ANSWER).replace(USAGE, b"" if hide else USAGE)
    sink = Recorder()
    assert b"".join(opened(http, Source([*packed]), sink, hide=hide, headers=headers).iter_bytes()) == expected
    assert sink.only.usage is not None
    if not hide:
        assert list(opened(http, Source([*packed]), Recorder(), headers=headers).iter_raw()) == packed


def test_corrupt_compression_breaks_as_it_would_without_us(http: Any) -> None:
    """The response's own error reaches the consumer, and the answer counts as broken."""
    pieces: list[Any] = [gzip.compress(b"".join(ANSWER))[:40], b"\x00garbage" * 20]
    for hide in (False, True):
        sink = Recorder()
        response = opened(http, Source([*pieces]), sink, hide=hide, headers={"content-encoding": "gzip"})
        with pytest.raises(http.DecodingError):
            for _ in response.iter_bytes():
                pass
        response.close()
        assert sink.only.usage is None


def test_an_error_below_passes_and_is_told(http: Any) -> None:
    """The very object."""
    error = http.ReadTimeout("slow")
    sink = Recorder()
    with pytest.raises(http.ReadTimeout) as caught:
        for _ in opened(http, Source([chunk("a"), error]), sink).iter_bytes():
            pass
    assert caught.value is error
    assert sink.only.how == "error"


def test_a_cut_is_not_an_end(http: Any) -> None:
    """The end of bytes without the protocol's own end is an error (design rule 4)."""
    sink = Recorder()
    list(opened(http, Source([chunk("a"), chunk("b")]), sink).iter_bytes())
    assert sink.only.how == "error"
    assert not sink.only.finished


def test_closing_tells_once(http: Any) -> None:
    """Close, close again, drop: one ending, and the inner stream is closed as often as it was asked."""
    source, sink = Source([*ANSWER]), Recorder()
    response = opened(http, source, sink)
    next(response.iter_raw())
    response.close()
    response.close()
    assert source.closed == 1
    del response
    gc.collect()
    assert sink.only.how == "closed"


def test_leaving_after_the_finish_reason_reads_on(http: Any) -> None:
    """Up to the usage, and no further than it takes."""
    source, sink = Source([*ANSWER]), Recorder()
    response = opened(http, source, sink)
    pieces = response.iter_raw()
    for _ in range(4):
        next(pieces)
    response.close()
    assert source.taken == 5
    assert sink.only.usage is not None


def test_reading_on_is_bounded(http: Any) -> None:
    """At most eight pieces."""
    source, sink = Source([chunk("a"), chunk(finish="stop"), *[b": keep-alive\n\n"] * 50]), Recorder()
    response = opened(http, source, sink)
    pieces = response.iter_raw()
    next(pieces)
    next(pieces)
    response.close()
    assert source.taken == 2 + REST_CHUNKS
    assert sink.only.usage is None
    assert sink.only.finish_reason_seen


def test_reading_on_into_an_error_is_swallowed(http: Any) -> None:
    """The consumer has left and asked for nothing more."""
    source, sink = Source([chunk(finish="stop"), http.ReadError("gone")]), Recorder()
    response = opened(http, source, sink)
    next(response.iter_raw())
    response.close()
    assert source.closed == 1
    assert sink.only.finish_reason_seen
    assert sink.faults == []


def test_leaving_before_the_finish_reason_reads_nothing(http: Any) -> None:
    """An abort stops the provider; it does not go on reading."""
    source, sink = Source([*ANSWER]), Recorder()
    response = opened(http, source, sink)
    next(response.iter_raw())
    response.close()
    assert source.taken == 1
    assert sink.only.output_tokens == 1


def test_a_forgotten_stream_is_only_queued(http: Any) -> None:
    """The finalizer tells nothing itself."""
    sink = Recorder()
    response = opened(http, Source([*ANSWER]), sink)
    del response
    gc.collect()
    assert sink.endings == []
    assert sink.only.how == "abandoned"


def test_a_collection_inside_a_lock_of_ours_does_not_deadlock(http: Any) -> None:
    """A stream may be collected, and so closed, in the middle of our own write in the same thread."""

    class Locked(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

        def finish(self, ending: Ending) -> None:
            with self.lock:
                super().finish(ending)

    def consume() -> Iterator[bytes]:
        try:
            yield from response.iter_raw()
        finally:
            response.close()  # as the SDK's own stream does

    sink = Locked()
    response = opened(http, Source([*ANSWER]), sink)
    cycle: dict[str, Any] = {"pieces": consume()}
    cycle["self"] = cycle
    next(cycle["pieces"])
    del cycle  # the iterator is garbage in a cycle; the response is still held, so no finalizer of ours comes first
    done = threading.Event()

    def collect() -> None:
        with sink.lock:
            gc.collect()
        done.set()

    threading.Thread(target=collect, daemon=True).start()
    assert done.wait(5), "the collection waits for a lock that its own thread holds"
    assert response.is_closed
    assert sink.endings == []
    assert sink.only.how == "abandoned"


def test_what_else_the_stream_has_stays_reachable(http: Any) -> None:
    """httpx2 asks it for the elapsed time."""
    response = opened(http, Source([*ANSWER]), Recorder())
    assert response.stream.elapsed == "as the inner stream has it"
    with pytest.raises(AttributeError):
        response.stream.nothing_of_the_kind  # noqa: B018


def test_a_fault_of_the_reader_is_reported_and_the_bytes_pass(http: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading stops, the stream does not."""

    def broken(self: object, data: bytes) -> bytes:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("vluna_llm.usage.stream.StreamReader.pass_through", broken)
    sink = Recorder()
    assert list(opened(http, Source([*ANSWER]), sink).iter_raw()) == ANSWER
    assert sink.faults == ["tap.read"]
    assert sink.only.usage is None


# -- async -------------------------------------------------------------------------------------------------------------


def test_async_bytes_pass_and_are_read(http: Any) -> None:
    """As in the other colour."""

    async def main() -> list[bytes]:
        return [piece async for piece in opened(http, Source([*ANSWER]), sink, is_async=True).aiter_raw()]

    sink = Recorder()
    assert asyncio.run(main()) == ANSWER
    assert sink.only.usage is not None


def test_async_reading_on_and_reading_again(http: Any) -> None:
    """openai 3.x reads the rest through a second iteration of the stream; both go on where the first stopped."""

    async def main() -> None:
        response = opened(http, Source([*ANSWER]), sink, is_async=True)
        pieces = response.aiter_raw()
        await pieces.__anext__()
        async for _ in response.stream:
            pass
        await response.aclose()
        await pieces.aclose()

    sink = Recorder()
    asyncio.run(main())
    assert sink.only.usage is not None


@pytest.mark.parametrize("on_abort", ["cancel", "drain"])
def test_a_cancelled_read_is_told_as_closed(on_abort: Any, http: Any) -> None:
    """No further read is tried: the connection is gone."""

    async def main() -> None:
        response = opened(http, source, sink, is_async=True)
        with pytest.raises(asyncio.CancelledError):
            async for _ in response.aiter_raw():
                pass
        await response.aclose()

    sink = Recorder(on_abort)
    source = Source([chunk("a"), asyncio.CancelledError(), *ANSWER])
    asyncio.run(main())
    assert source.taken == 2
    assert source.closed == 1
    assert sink.only.how == "closed"


def test_an_async_drain_outlives_the_consumer(http: Any) -> None:
    """``on_abort="drain"`` on a loop: the rest is read by a task of its own."""

    async def main() -> None:
        response = opened(http, source, sink, is_async=True)
        pieces = response.aiter_raw()
        await pieces.__anext__()
        await response.aclose()
        assert sink.endings == []
        for _ in range(50):
            await asyncio.sleep(0)
        assert source.closed == 1

    sink, source = Recorder("drain"), Source([*ANSWER])
    asyncio.run(main())
    assert sink.only.usage is not None


def test_trio_reads_on_too(http: Any) -> None:
    """Reading on needs no asyncio."""
    trio = pytest.importorskip("trio", reason="trio is not installed")
    source, sink = Source([*ANSWER]), Recorder()

    class Async(http.AsyncByteStream):  # type: ignore[name-defined,misc]
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for piece in source._next():
                await trio.sleep(0)
                yield piece

    async def main() -> None:
        response = http.Response(
            200,
            headers={"content-type": "text/event-stream"},
            stream=Async(),
            request=http.Request("POST", "http://127.0.0.1"),
        )
        tap(response, sink, url="/", hide_usage_chunk=False, report=sink.faults.append, is_async=True)
        pieces = response.aiter_raw()
        for _ in range(4):
            await pieces.__anext__()
        await response.aclose()

    trio.run(main)
    assert sink.only.usage is not None


# -- the end of the process --------------------------------------------------------------------------------------------


def test_a_stream_that_is_open_at_exit_is_told(http: Any) -> None:
    """The interpreter exits with a stream open: it is queued before whatever was registered earlier runs at exit."""
    code = f"""
        import atexit, sys
        sys.path.insert(0, {str(importlib.import_module("pathlib").Path(__file__).parent)!r})
        from test_tap import *
        sink = Recorder()
        atexit.register(lambda: print([ending().how for ending in sink.queued], sink.endings))
        kept = opened(__import__({http.__name__!r}), Source([*ANSWER]), sink)
        pieces = kept.iter_raw()
        next(pieces)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "['abandoned'] []"


def test_one_collector_callback_however_many_streams(http: Any) -> None:
    """The process-wide part is one callback."""
    for _ in range(3):
        opened(http, Source([]), Recorder())
    assert gc.callbacks.count(_tap_watch._on_collection) == 1


def test_strange_responses_are_refused() -> None:
    """Only httpx's kind has a stream that can be replaced."""
    with pytest.raises(TypeError):
        http_module(object())
    assert http_module(httpx.Response(200)) == "httpx"


class _Chain(Source):
    """A source that tells when the reading of it was given up, as httpcore's gives its connection back."""

    given_up = 0

    def _next(self) -> Iterator[bytes]:
        try:
            yield from super()._next()
        except GeneratorExit:
            self.given_up += 1
            raise


@pytest.mark.parametrize("read", [1, 4, 6], ids=["middle", "finished", "whole"])
def test_a_dropped_reading_drops_the_source(read: int, http: Any) -> None:
    """Without a collection, although the response is still held: so httpcore lets go of the connection without us."""
    sink, source = Recorder(), _Chain([*ANSWER, b": more\n\n"])
    response = opened(http, source, sink)
    gc.disable()
    try:
        pieces = response.iter_raw()
        for _ in range(read):
            next(pieces)
        pieces.close()
        assert source.given_up == 1
    finally:
        gc.enable()
    response.close()
    assert sink.only.how == ("complete" if read == 6 else "closed")
    assert (sink.only.usage is not None) is (read > 1)


def test_a_reading_dropped_before_the_response_is_closed_can_be_drained(http: Any) -> None:
    """``on_abort="drain"``: the source is kept for the close that may follow."""
    sink, source = Recorder("drain"), Source([*ANSWER])
    response = opened(http, source, sink)
    pieces = response.iter_raw()
    next(pieces)
    pieces.close()
    response.close()
    assert _soon(lambda: bool(sink.endings))
    assert sink.only.usage is not None


@pytest.mark.parametrize("read", [1, 4, 6], ids=["middle", "finished", "whole"])
def test_a_dropped_async_reading_drops_the_source(read: int, http: Any) -> None:
    """The loop closes it, and what is below it, by and by."""

    async def main() -> None:
        response = opened(http, source, sink, is_async=True)
        pieces = response.aiter_raw()
        for _ in range(read):
            await pieces.__anext__()
        del pieces
        for _ in range(50):
            await asyncio.sleep(0)
        assert source.given_up == 1
        await response.aclose()

    sink, source = Recorder(), _Chain([*ANSWER, b": more\n\n"])
    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()
    assert (sink.only.usage is not None) is (read > 1)


def test_an_async_reading_dropped_while_the_response_is_closed_is_read_on_once(http: Any) -> None:
    """The loop closes what was dropped while the consumer's close reads the rest: it is told when that is done."""

    async def main() -> None:
        response = opened(http, source, sink, is_async=True, headers={"content-type": "application/json"})
        pieces = response.aiter_raw()
        await pieces.__anext__()
        del pieces
        await response.aclose()

    sink = Recorder()
    source = Source([b'{"id":"c1","choices":[{"index":0,', b'"message":{}}],', b'"usage":', b"{}", b"}"])
    source.pieces[3] = b'{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}'
    asyncio.run(main())
    assert sink.only.usage is not None


def _soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()
