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
import gc
import importlib
import os
import socket
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any, Literal, Protocol

from .ending import Ending
from .usage.stream import StreamReader

REST_CHUNKS = 8
"""How many more pieces are read for the usage of an answer that the model had finished (design rule 3)."""
REST_SECONDS = 2.0
"""How long that may take, in seconds."""
BODY_SECONDS = 5.0
"""How long the rest of a plain JSON answer may take that was left early, in seconds."""
INLINE_SECONDS = 5.0
"""How long ``settle="inline"`` waits for the receipt, in seconds: the receipt is never worth more than the answer."""
DRAIN_SECONDS = 60.0
"""How long ``on_abort="drain"`` reads on behind the consumer's back, in seconds."""
DRAIN_BYTES = 16 * 1024 * 1024
"""How much ``on_abort="drain"`` reads at most, in bytes."""

_MANY = 1 << 40

How = Literal["complete", "closed", "error", "abandoned"]


class Sink(Protocol):
    """What a tap tells: an operation, or something that stands for one. No method raises."""

    @property
    def on_abort(self) -> Literal["cancel", "estimate", "drain"]:
        """What becomes of an answer that the consumer leaves."""

    @property
    def settle_inline(self) -> bool:
        """Whether the consumer waits for the receipt."""

    def finish(self, ending: Ending) -> None:
        """The answer ended."""

    def abandon(self, ending: Callable[[], Ending]) -> None:
        """The answer was forgotten: only queue it; ``ending`` is asked later, on another thread."""

    def wait(self, timeout: float | None = None) -> object:
        """Wait for the receipt."""

    def wait_async(self, timeout: float | None = None) -> Awaitable[object]:
        """Wait for the receipt without holding up the loop."""


class Watch:
    """What is known of one answer, and whether it was told.

    Args:
        reader: follows the decoded bytes.
        sink: is told the ending, once.
        report: is called inside an ``except`` block where our own code failed; gets the place.
        event_stream: the answer was announced as an event stream.
    """

    __slots__ = ("cancelled", "event_stream", "reader", "report", "sink", "told")

    def __init__(self, reader: StreamReader, sink: Sink, report: Callable[[str], None], *, event_stream: bool) -> None:
        self.reader = reader
        self.sink = sink
        self.report = report
        self.event_stream = event_stream
        self.told = False
        self.cancelled = False

    def settle(self, how: How) -> None:
        """Tell the operation how the answer ended; only the first call counts. Never raises.

        Inside a garbage collection it is queued instead: what was interrupted may be holding any lock.
        """
        if self.told:
            return
        self.told = True
        try:
            if _collecting():
                self.sink.abandon(partial(self.ending, "abandoned" if how == "closed" else how))
            else:
                self.sink.finish(self.ending(how))
        except Exception:
            self.report("tap.settle")

    def forgotten(self) -> None:
        """The stream was collected, or the interpreter exits: queue it, nothing else."""
        if self.told:
            return
        self.told = True
        try:
            self.sink.abandon(partial(self.ending, "abandoned"))
        except Exception:
            self.report("tap.forgotten")

    def ending(self, how: How) -> Ending:
        """What was seen, as an `Ending`; reads what the reader still holds."""
        reader = self.reader
        try:
            reader.end()
        except Exception:
            self.report("tap.end")
        characters = reader.output_characters
        return Ending(
            how=how,
            usage=reader.usage,
            finished=reader.finished,
            finish_reason_seen=reader.finish_reason_seen,
            failed=reader.failed,
            output_tokens=(characters + 3) // 4 or None,
            response_id=reader.response_id,
            model=reader.model,
        )

    @property
    def streams(self) -> bool:
        """Whether the end of this answer is in its protocol and never in the end of the bytes: as it came, not as it
        was announced (a request for a stream is answered with plain JSON at times, and the other way round)."""
        framing = self.reader._framing
        return self.event_stream if framing == "unknown" else framing in ("sse", "ndjson")

    def end_of_bytes(self) -> None:
        """The provider sent all there is; an event stream that did not say so was cut (design rule 4)."""
        if self.told:
            return
        try:
            self.reader.end()
        except Exception:
            self.report("tap.end")
        whole = self.reader.finished or not (self.streams or self.reader._framing == "json")
        self.settle("complete" if whole else "error")

    def broke(self, error: BaseException) -> None:
        """Reading raised: the provider's fault where it is an `Exception`, else somebody cancelled the reading."""
        if isinstance(error, Exception):
            self.settle("error")
        else:
            self.cancelled = True
            self.settle("closed")

    def wants_rest(self) -> float:
        """Seconds that are worth spending on the rest of an answer that is being left; 0 where nothing is to be had."""
        reader = self.reader
        if self.told or self.cancelled or reader.finished or reader.usage is not None:
            return 0.0
        if not self.streams:
            return BODY_SECONDS
        return REST_SECONDS if reader.finish_reason_seen else 0.0

    def rest_is_known(self) -> bool:
        """Whether reading on brings nothing more."""
        return self.reader.finished or self.reader.usage is not None


class _Tap:
    """What both colours share. ``see`` takes a piece and gives what the consumer may have of it."""

    _inner: Any
    _watch: Watch

    def __init__(self, inner: Any, watch: Watch, decoder: _Decoder | None, *, rewrite: bool, wire: _Wire) -> None:
        self._inner = inner
        self._watch = watch
        self._decoder = decoder
        self._rewrite = rewrite
        self._wire = wire
        self._source: Any = None
        self._handed_over = False
        _watch_collector()
        weakref.finalize(self, watch.forgotten)

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

    def _wants_drain(self) -> bool:
        watch = self._watch
        return not (watch.told or watch.cancelled or watch.rest_is_known()) and watch.sink.on_abort == "drain"


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
            raise
        except BaseException as error:
            watch.broke(error)
            raise
        watch.end_of_bytes()

    def close(self) -> None:
        watch = self._watch
        try:
            if not watch.told and not _collecting():
                self._before_leaving()
        except Exception:
            watch.report("tap.close")
        finally:
            if not self._handed_over:
                watch.settle("closed")
                self._inner.close()
        if watch.sink.settle_inline and not self._handed_over and not watch.cancelled and not _collecting():
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
            raise
        except BaseException as error:
            watch.broke(error)
            raise
        watch.end_of_bytes()

    async def aclose(self) -> None:
        watch = self._watch
        try:
            if not watch.told and not _collecting():
                await self._before_leaving()
        except Exception:
            watch.report("tap.close")
        finally:
            if not self._handed_over:
                watch.settle("closed")
                await self._inner.aclose()
        if watch.sink.settle_inline and not self._handed_over and not watch.cancelled and not _collecting():
            try:
                await watch.sink.wait_async(INLINE_SECONDS)
            except Exception:
                watch.report("tap.wait")

    async def _before_leaving(self) -> None:
        seconds, pieces = self._rest_limits()
        if seconds:
            await self._read_on(seconds, pieces, DRAIN_BYTES if self._watch.streams else _MANY)
        elif self._wants_drain():
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:  # another event loop than asyncio's: no task of ours can outlive the consumer's there
                return
            task = loop.create_task(self._drain(), name="vluna-drain")
            _draining.add(task)
            task.add_done_callback(_draining.discard)
            self._handed_over = True

    async def _drain(self) -> None:
        try:
            await self._read_on(DRAIN_SECONDS, _MANY, DRAIN_BYTES)
        finally:
            self._watch.settle("closed")
            with suppress(Exception):
                await self._inner.aclose()

    async def _read_on(self, seconds: float, pieces: int, size: int) -> None:
        import anyio  # with httpx; works on every event loop that httpx works on

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


_draining: set[asyncio.Task[None]] = set()  # a loop keeps only weak references to its tasks


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
    watch = Watch(reader, sink, report, event_stream=event_stream)
    decoder = _Decoder.of(response)
    rewrite = decoder is not None and hide_usage_chunk
    if decoder is not None and rewrite:
        decoder.take_over(response)
    kind = _stream_class(_http_module(response), is_async)
    response.stream = kind(response.stream, watch, decoder, rewrite=rewrite, wire=_Wire(response))


def _http_module(response: object) -> str:
    for kind in type(response).__mro__:
        name = kind.__module__.partition(".")[0]
        if name in ("httpx", "httpx2"):
            return name
    raise TypeError(f"{type(response)!r} is not a response of httpx or httpx2")


@lru_cache(maxsize=4)
def _stream_class(module: str, is_async: bool) -> type[Any]:
    """A tap that is a byte stream of that module: closing a response checks it."""
    http = importlib.import_module(module)
    if is_async:
        return type("TappedAsyncStream", (_AsyncTap, http.AsyncByteStream), {"__module__": __name__})
    return type("TappedStream", (_SyncTap, http.SyncByteStream), {"__module__": __name__})


class _Decoder:
    """Decodes the content encoding of one response, with the response's own decoders."""

    __slots__ = ("_codec",)

    def __init__(self, codec: Any) -> None:
        self._codec = codec

    @classmethod
    def of(cls, response: Any) -> _Decoder | None:
        """A decoder for ourselves; None where the bytes are not encoded."""
        encoding = response.headers.get("content-encoding")
        if not encoding or encoding.strip().lower() == "identity":
            return None
        codec = response._get_content_decoder()
        del response._decoder  # the response makes itself another one
        return None if type(codec).__name__ == "IdentityDecoder" else cls(codec)

    def take_over(self, response: Any) -> None:
        """The response will be given decoded bytes."""
        module = importlib.import_module(type(self._codec).__module__)
        response._decoder = module.IdentityDecoder()

    def decode(self, data: bytes) -> bytes:
        return _joined(self._codec.decode(data))

    def flush(self) -> bytes:
        return _joined(self._codec.flush())


def _joined(decoded: Any) -> bytes:
    return decoded if isinstance(decoded, bytes) else b"".join(decoded)


def _tail(watch: Watch, decoder: _Decoder | None, rewrite: bool) -> bytes:
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


class _Wire:
    """Bounds what is still read from a connection, in the sync colour: no time-out reaches a read that is under way.

    HTTP/1.1: the connection carries this answer alone and is shut down when the time is over. HTTP/2: it carries other
    answers too, and each read asks for its time-out anew. Where neither is to be had (a transport of somebody's own),
    the client's own time-out holds.
    """

    __slots__ = ("_stream", "_timeouts")

    def __init__(self, response: Any) -> None:
        self._stream = response.extensions.get("network_stream")
        self._timeouts = response.request.extensions.get("timeout")

    @contextmanager
    def cut_after(self, seconds: float) -> Generator[None, None, None]:
        """End whatever is being read after so many seconds."""
        if isinstance(self._timeouts, dict):
            self._timeouts["read"] = seconds
        timer: threading.Timer | None = None
        if self._socket() is not None:
            timer = threading.Timer(seconds, self._shut)
            timer.daemon = True
            try:
                timer.start()
            except RuntimeError:  # no new thread can be started while the interpreter exits
                timer = None
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def _socket(self) -> socket.socket | None:
        try:
            tls = self._stream.get_extra_info("ssl_object")
            if tls is not None and tls.selected_alpn_protocol() == "h2":
                return None
            found = self._stream.get_extra_info("socket")
        except Exception:
            return None
        return found if isinstance(found, socket.socket) else None

    def _shut(self) -> None:
        sock = self._socket()
        if sock is None:
            return
        with suppress(OSError):
            twin = socket.socket(fileno=os.dup(sock.fileno()))  # past a TLS object that another thread is reading from
            with twin:
                twin.shutdown(socket.SHUT_RDWR)


# -- garbage collection ------------------------------------------------------------------------------------------------

_collector: int | None = None


def _on_collection(phase: str, info: dict[str, int]) -> None:
    global _collector
    _collector = threading.get_ident() if phase == "start" else None


def _watch_collector() -> None:
    if _on_collection not in gc.callbacks:
        gc.callbacks.append(_on_collection)


def _collecting() -> bool:
    """Whether this code was called by a garbage collection that is running in this thread."""
    return _collector is not None and _collector == threading.get_ident()
