"""The observing byte stream: it stands in the place of ``response.stream``, sees every byte once and changes none.

The SDK goes on to decode, parse and type what it reads, so its own classes, chunks and errors stay as they are. What
the reader learned is told to the operation exactly once: at the end of the protocol, when the stream is closed, when it
breaks, when its task is cancelled, or from a finalizer when it is forgotten.

Sync and async share everything but the reading. `Watch` holds what is known and never refers to the stream, so that the
stream can be collected; it may be asked from any thread. A garbage collection can run the finalizers of streams in the
middle of anything, our own journal's write included: whatever ends a stream from inside one is only queued.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from ._tap_watch import REST_CHUNKS, REST_SECONDS, Sink, Watch, collecting, watch_collector
from ._tap_wire import Decoder, Wire, http_module
from .usage.stream import StreamReader

if TYPE_CHECKING:
    import anyio

__all__ = ["INLINE_SECONDS", "Sink", "arelease", "release", "tap"]

INLINE_SECONDS = 5.0
"""How long ``settle="inline"`` waits for the receipt, in seconds: the receipt is never worth more than the answer."""
DRAIN_SECONDS = 60.0
"""How long ``on_abort="drain"`` reads on behind the consumer's back, in seconds."""
DRAIN_BYTES = 16 * 1024 * 1024
"""How much ``on_abort="drain"`` reads at most, in bytes."""
_MANY = 1 << 40


def tap(
    response: Any,
    sink: Sink,
    *,
    url: str,
    hide_usage_chunk: bool,
    report: Callable[[str], None],
    is_async: bool,
    reader: StreamReader | None = None,
) -> None:
    """Put an observing stream in the place of ``response.stream``.

    Args:
        response: an open response of httpx or httpx2.
        sink: is told the ending, once.
        url: the path of the request, for rules that depend on the endpoint.
        hide_usage_chunk: leave the chunk out that ``include_usage`` added and the caller did not ask for.
        report: called inside an ``except`` block where our own code failed.
        is_async: the colour of the client.
        reader: reads the answer, where the ordinary reader will not do.
    """
    content_type = response.headers.get("content-type", "")
    plain = content_type.partition(";")[0].strip().lower()
    event_stream = plain in ("", "text/event-stream") or "stream" in plain or "ndjson" in plain or "jsonl" in plain
    reader = reader or StreamReader(url, content_type or None, hide_usage_chunk=hide_usage_chunk)
    watch = Watch(reader, sink, report, event_stream=event_stream, page=plain == "text/html")
    decoder = Decoder.of(response)
    rewrite = decoder is not None and hide_usage_chunk
    if decoder is not None and rewrite:
        decoder.take_over(response)
    kind = _stream_class(http_module(response), is_async)
    response.stream = kind(response.stream, watch, decoder, rewrite=rewrite, wire=Wire(response))


def release(response: Any) -> None:
    """Give the connection back: the consumer has the whole answer and reads no more. Waits for nothing.

    What has arrived by now is read, so that the connection can serve again; where bytes are still to come it is closed.
    """
    stream = _tapped(response)
    if stream is not None:
        stream.read_out()
        response.close()


async def arelease(response: Any) -> None:
    """As `release`; a connection that a transport of somebody's own gives back by itself has time to do so."""
    stream = _tapped(response)
    if stream is None:
        return
    if stream.is_on_httpcore or stream.settles_inline:
        await stream.read_out()
        await response.aclose()
    else:
        with suppress(RuntimeError):  # another event loop than asyncio's
            asyncio.get_running_loop().call_later(REST_SECONDS, _close_late, weakref.ref(response))


def _tapped(response: Any) -> Any:
    stream = getattr(response, "__dict__", {}).get("stream")
    return stream if isinstance(stream, _Tap) and not response.is_closed else None


def _close_late(reference: weakref.ref[Any]) -> None:
    response = reference()
    if response is not None and not response.is_closed:
        _keep(asyncio.get_running_loop().create_task(_close_quietly(response), name="vluna-release"))


async def _close_quietly(response: Any) -> None:
    with suppress(Exception):
        await response.aclose()


class _Tap:
    """What both colours share. ``see`` takes a piece and gives what the consumer may have of it."""

    _inner: Any
    _watch: Watch

    def __init__(self, inner: Any, watch: Watch, decoder: Decoder | None, *, rewrite: bool, wire: Wire) -> None:
        self._inner = inner
        self._watch = watch
        self._decoder = decoder
        self._rewrite = rewrite
        self._wire = wire
        self._source: Any = None
        self._handed_over = False
        watch_collector()
        weakref.finalize(self, watch.forgotten).atexit = False
        note_open(self)

    def __getattr__(self, name: str) -> Any:
        # httpx2 asks the stream for the elapsed time; whatever else was reachable stays reachable.
        if name.startswith("__") or name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def _see(self) -> Callable[[bytes], bytes]:
        """How a piece is read and what of it is handed on.

        Encoded bytes are decoded on the side and handed on as they came, unless an event has to be left out: then the
        consumer gets decoded bytes, and the response was told so.
        """
        read = self._watch.reader.pass_through
        decoder = self._decoder
        if decoder is None or self._rewrite:
            return read

        def see(data: bytes) -> bytes:
            read(decoder.decode(data))
            return data

        return see

    def _read(self, data: bytes) -> None:
        """Read a piece that nobody will get."""
        reader, decoder = self._watch.reader, self._decoder
        reader.feed(data if decoder is None else decoder.decode(data))

    def _rest_limits(self) -> tuple[float, int]:
        seconds = self._watch.wants_rest()
        return seconds, REST_CHUNKS if self._watch.streams else _MANY

    @property
    def is_on_httpcore(self) -> bool:
        """Whether the connection is one of httpcore's, which is given back when its response is closed."""
        return self._wire.is_open_to_us

    @property
    def settles_inline(self) -> bool:
        """Whether the consumer waits for the receipt."""
        return self._watch.sink.settle_inline

    def _is_needed(self) -> bool:
        """Whether the source is still read, or may be, after the consumer's reading was dropped: for a drain."""
        return self._handed_over or self._wants_drain()

    def _wants_drain(self) -> bool:
        watch = self._watch
        if watch.told or watch.cancelled or watch.rest_is_known() or sys.is_finalizing():
            return False
        return watch.sink.on_abort == "drain"


class _SyncTap(_Tap):
    def __iter__(self) -> Generator[bytes, None, None]:
        watch = self._watch
        reader = watch.reader
        see = self._see()
        decoder = self._decoder if self._rewrite else None
        source = self._source = iter(self._inner)
        try:
            for data in source:
                if decoder is not None:
                    data = decoder.decode(data)
                try:
                    data = see(data)
                except Exception:
                    watch.report("tap.read")
                    see = _same
                if reader.finished and not watch.told:
                    watch.settle("complete")
                if data:
                    yield data
            if tail := _tail(watch, self._decoder, self._rewrite):
                yield tail
        except GeneratorExit:
            self._dropped()
            raise
        except BaseException as error:
            watch.broke(error)
            raise
        watch.end_of_bytes()

    def _dropped(self) -> None:
        """The consumer's reading was dropped, which nobody can take up again: so is the source, as it is without us.

        With it httpcore lets go of the connection. What the rest is worth is had before.
        """
        watch = self._watch
        try:
            if not watch.told and not collecting():
                if self._is_needed():
                    return
                self._before_leaving()
                watch.settle("closed")
        except Exception:
            watch.report("tap.dropped")
        self._source = None

    def read_out(self) -> None:
        """Read what has arrived of an answer whose end is known, and let nobody read the connection after that."""
        source = self._source
        if source is None:
            return
        with suppress(Exception):
            with self._wire.without_waiting() as is_possible:
                for _ in range(REST_CHUNKS if is_possible else 0):
                    if next(source, None) is None:
                        break
            source.close()

    def close(self) -> None:
        watch = self._watch
        try:
            if not watch.told and not collecting():
                self._before_leaving()
        except Exception:
            watch.report("tap.close")
        finally:
            if not self._handed_over:
                watch.settle("closed")
                self._inner.close()
        if watch.sink.settle_inline and not self._handed_over and not watch.cancelled and not collecting():
            try:
                watch.sink.wait(INLINE_SECONDS)
            except Exception:
                watch.report("tap.wait")

    def _before_leaving(self) -> None:
        seconds, pieces = self._rest_limits()
        if seconds:
            self._read_on(seconds, pieces, DRAIN_BYTES if self._watch.streams else _MANY)
        elif self._wants_drain():
            with suppress(RuntimeError):  # no new thread can be started while the interpreter exits
                threading.Thread(target=self._drain, name="vluna-drain", daemon=True).start()
                self._handed_over = True

    def _drain(self) -> None:
        try:
            self._read_on(DRAIN_SECONDS, _MANY, DRAIN_BYTES)
        except Exception:
            self._watch.report("tap.drain")
        finally:
            self._watch.settle("closed")
            with suppress(Exception):
                self._inner.close()

    def _read_on(self, seconds: float, pieces: int, size: int) -> None:
        """Read more of the answer; what breaks it only ends it."""
        watch = self._watch
        source: Iterator[bytes] = self._source if self._source is not None else iter(self._inner)
        deadline = time.monotonic() + seconds
        try:
            with self._wire.cut_after(seconds):
                for _ in range(pieces):
                    data = next(source, None)
                    if data is None:
                        watch.end_of_bytes()
                        return
                    self._read(data)
                    size -= len(data)
                    if watch.rest_is_known() or size < 0 or time.monotonic() > deadline:
                        return
        except Exception:
            pass


class _AsyncTap(_Tap):
    _leaving: anyio.Event | None = None

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        watch = self._watch
        reader = watch.reader
        see = self._see()
        decoder = self._decoder if self._rewrite else None
        source = self._source = self._inner.__aiter__()
        try:
            async for data in source:
                if decoder is not None:
                    data = decoder.decode(data)
                try:
                    data = see(data)
                except Exception:
                    watch.report("tap.read")
                    see = _same
                if reader.finished and not watch.told:
                    watch.settle("complete")
                if data:
                    yield data
            if tail := _tail(watch, self._decoder, self._rewrite):
                yield tail
        except GeneratorExit:
            await self._dropped()
            raise
        except BaseException as error:
            watch.broke(error)
            raise
        watch.end_of_bytes()

    async def _dropped(self) -> None:
        """The consumer's reading was dropped, which nobody can take up again: so is the source, as it is without us."""
        if not self._watch.told and not collecting():
            if self._is_needed() or self._leaving is not None:
                return
            try:
                await self._leave()
            finally:
                self._watch.settle("closed")
        self._source = None

    async def read_out(self) -> None:
        """Read what has arrived of an answer whose end is known, and let nobody read the connection after that."""
        source = self._source
        if source is None:
            return
        with suppress(Exception):
            with self._wire.without_waiting() as is_possible:
                for _ in range(REST_CHUNKS if is_possible else 0):
                    if await anext(source, None) is None:
                        break
            await source.aclose()

    async def aclose(self) -> None:
        watch = self._watch
        try:
            if not watch.told and not collecting():
                await self._leave()
        except Exception:
            watch.report("tap.close")
        finally:
            if not self._handed_over:
                watch.settle("closed")
                await self._inner.aclose()
        if watch.sink.settle_inline and not self._handed_over and not watch.cancelled and not collecting():
            try:
                await watch.sink.wait_async(INLINE_SECONDS)
            except Exception:
                watch.report("tap.wait")

    async def _leave(self) -> None:
        """What is done before leaving, once: a loop has a dropped reading closed while somebody closes the response."""
        import anyio  # with httpx; works on every event loop that httpx works on

        if self._leaving is not None:
            return await self._leaving.wait()
        self._leaving = anyio.Event()
        try:
            await self._before_leaving()
        finally:
            self._leaving.set()

    async def _before_leaving(self) -> None:
        seconds, pieces = self._rest_limits()
        if seconds:
            await self._read_on(seconds, pieces, DRAIN_BYTES if self._watch.streams else _MANY)
        elif self._wants_drain():
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:  # another event loop than asyncio's: no task of ours can outlive the consumer's there
                return
            _keep(loop.create_task(self._drain(), name="vluna-drain"))
            self._handed_over = True

    async def _drain(self) -> None:
        try:
            await self._read_on(DRAIN_SECONDS, _MANY, DRAIN_BYTES)
        finally:
            self._watch.settle("closed")
            with suppress(Exception):
                await self._inner.aclose()

    async def _read_on(self, seconds: float, pieces: int, size: int) -> None:
        import anyio

        watch = self._watch
        source: AsyncIterator[bytes] = self._source if self._source is not None else self._inner.__aiter__()
        try:
            with anyio.move_on_after(seconds):
                for _ in range(pieces):
                    try:
                        data = await source.__anext__()
                    except StopAsyncIteration:
                        watch.end_of_bytes()
                        return
                    self._read(data)
                    size -= len(data)
                    if watch.rest_is_known() or size < 0:
                        return
        except Exception:
            pass


class _Watched(Protocol):
    @property
    def _watch(self) -> Watch: ...


_open_streams: weakref.WeakSet[_Watched] = weakref.WeakSet()


def note_open(stream: _Watched) -> None:
    """Remember the stream for the end of the process, as long as somebody holds it.

    Not left to ``weakref.finalize``, which runs at exit at a moment that depends on who first used it in this process:
    this hook is registered after that of `vluna_llm.vluna` and so runs before it, while there is somebody to deliver.
    """
    global _at_exit
    if not _at_exit:
        _at_exit = True
        atexit.register(forget_open)
    _open_streams.add(stream)


def forget_open() -> None:
    """The process ends: what is read no further is told as abandoned, while there is somebody to deliver it."""
    for stream in list(_open_streams):
        stream._watch.forgotten()


_at_exit = False

_kept: set[asyncio.Task[None]] = set()


def _keep(task: asyncio.Task[None]) -> None:
    """Hold on to a task of ours until it is done: a loop keeps only weak references to its tasks."""
    _kept.add(task)
    task.add_done_callback(_kept.discard)


@lru_cache(maxsize=4)
def _stream_class(module: str, is_async: bool) -> type[Any]:
    """A tap that is a byte stream of that module: closing a response checks it."""
    http = importlib.import_module(module)
    if is_async:
        return type("TappedAsyncStream", (_AsyncTap, http.AsyncByteStream), {"__module__": __name__})
    return type("TappedStream", (_SyncTap, http.SyncByteStream), {"__module__": __name__})


def _tail(watch: Watch, decoder: Decoder | None, rewrite: bool) -> bytes:
    """Read what is still held when the bytes end; gives what the consumer gets of it."""
    held = b"" if decoder is None or not rewrite else decoder.flush()
    try:
        if decoder is not None and not rewrite:
            watch.reader.feed(decoder.flush())
        return (watch.reader.pass_through(held) if held else b"") + watch.reader.flush()
    except Exception:
        watch.report("tap.flush")
        return held


def _same(data: bytes) -> bytes:
    return data
