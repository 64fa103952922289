"""Streams of a chat model that is metered by its messages: every chunk passes through, and the end settles the call.

LangChain drops the iterator that ``_stream`` gave it when its own generator is closed, and closes it never. So the
iterator is an object, whose end is noticed also where it is only forgotten; whoever wraps LangChain's generator closes
it by name, while there is still something to be read.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from contextvars import copy_context
from typing import Any, Final

from .._tap_watch import REST_CHUNKS, Watch, collecting, watch_collector
from ..tap import DRAIN_SECONDS, INLINE_SECONDS, note_open
from ._langchain_call import ChunkReader, MessagesCall

_MANY: Final = 1 << 40


class _Items:
    """What both colours share.

    Args:
        call: is begun at the first read, as the provider is.
        make: makes the model's own iterator.
        hides_usage: usage was asked for on the consumer's behalf, who is not to see it.
    """

    def __init__(self, call: MessagesCall, make: Callable[[], Any], *, hides_usage: bool) -> None:
        self._call = call
        self._make = make
        self._hides_usage = hides_usage
        self._source: Any = None
        self._reader = ChunkReader()
        self._watch = Watch(self._reader, call, call.vluna.internal_error, event_stream=True)  # type: ignore[arg-type]
        self._watch.told = True  # nothing to tell before the gate was asked

    def _begun(self, metered: bool) -> None:
        if metered:
            self._watch.told = False
            watch_collector()
            weakref.finalize(self, self._watch.forgotten).atexit = False
            note_open(self)

    def _take(self, chunk: Any) -> bool:
        """Read a chunk; whether the consumer gets it."""
        if self._watch.told and not self._hides_usage:
            return True
        try:
            if not self._watch.told:
                self._reader.take(chunk)
            return not self._hides_usage or _without_usage(chunk)
        except Exception:
            self._watch.report("langchain.chunk")
            return True

    def _ended(self) -> None:
        """The model gave all there is. A stream of nothing is no answer."""
        self._reader.finished = self._reader.seen
        self._watch.settle("complete" if self._reader.seen else "error")

    def _seconds(self) -> float:
        """How long it is worth to read on; 0 where it is not."""
        watch = self._watch
        if watch.told or collecting() or self._source is None:
            return 0.0
        if seconds := watch.wants_rest():
            return seconds
        drains = watch.sink.on_abort == "drain" and not watch.cancelled and not watch.rest_is_known()
        return DRAIN_SECONDS if drains else 0.0

    @property
    def _limit(self) -> int:
        return REST_CHUNKS if self._reader.finish_reason_seen else _MANY


class SyncItems(_Items):
    """For ``_stream``."""

    _busy = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._source is None:
            self._begun(self._call.begin())
        self._busy = True
        try:
            while True:
                with self._call.running():
                    if self._source is None:
                        self._source = iter(self._make())
                    chunk = next(self._source)
                if self._take(chunk):
                    return chunk
        except StopIteration:
            self._ended()
            self._call.wait(INLINE_SECONDS)
            raise
        except BaseException as error:
            self._watch.broke(error)
            raise
        finally:
            self._busy = False

    def close(self) -> None:
        """Read what is worth reading (design rules 3 and 4), settle and close."""
        if self._busy:  # read in another thread, whose coroutine was cancelled: that one cannot be stopped
            self._watch.settle("closed")
            return
        seconds = self._seconds()
        if not seconds:
            self._leave()
            return
        # A generator that blocks cannot be interrupted, so it is read where nobody waits for it.
        reading = copy_context().run
        thread = threading.Thread(target=reading, args=(self._read_on, seconds), name="vluna-drain", daemon=True)
        with suppress(RuntimeError):  # no new thread can be started while the interpreter exits
            thread.start()
            if self._reader.finish_reason_seen:
                thread.join(seconds)
                self._watch.settle("closed")
            return
        self._leave()

    def _read_on(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with suppress(Exception):
            for _ in range(self._limit):
                with self._call.running():
                    chunk = next(self._source, None)
                if chunk is None:
                    self._ended()
                    break
                self._take(chunk)
                if self._watch.rest_is_known() or time.monotonic() > deadline:
                    break
        self._leave()

    def _leave(self) -> None:
        self._watch.settle("closed")
        close = getattr(self._source, "close", None)
        if close is not None:
            with suppress(Exception):
                close()


class AsyncItems(_Items):
    """For ``_astream``."""

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if self._source is None:
            self._begun(await self._call.abegin())
        try:
            while True:
                with self._call.running():
                    if self._source is None:
                        self._source = self._make().__aiter__()
                    chunk = await self._source.__anext__()
                if self._take(chunk):
                    return chunk
        except StopAsyncIteration:
            self._ended()
            await self._call.wait_async(INLINE_SECONDS)
            raise
        except BaseException as error:
            self._watch.broke(error)
            raise

    async def aclose(self) -> None:
        """Read what is worth reading (design rules 3 and 4), settle and close."""
        seconds = self._seconds()
        if not seconds:
            await self._leave()
        elif self._reader.finish_reason_seen:
            await self._read_on(seconds)
        else:
            task = asyncio.get_running_loop().create_task(self._read_on(seconds), name="vluna-drain")
            _draining.add(task)
            task.add_done_callback(_draining.discard)

    async def _read_on(self, seconds: float) -> None:
        import anyio

        try:
            with suppress(Exception), anyio.move_on_after(seconds):
                for _ in range(self._limit):
                    with self._call.running():
                        chunk = await anext(self._source, None)
                    if chunk is None:
                        self._ended()
                        return
                    self._take(chunk)
                    if self._watch.rest_is_known():
                        return
        finally:
            await self._leave()

    async def _leave(self) -> None:
        self._watch.settle("closed")
        close = getattr(self._source, "aclose", None)
        if close is not None:
            with suppress(Exception):
                await close()


_draining: set[asyncio.Task[None]] = set()  # a loop keeps only weak references to its tasks


def _without_usage(chunk: Any) -> bool:
    """Take the usage off a chunk; False where it is there for the usage alone.

    With the usage of a stream ``ChatAnthropic`` also gives the event that begins it, which only names the model.
    """
    message = chunk.message
    said = message.response_metadata
    rest = (message.content, getattr(message, "tool_call_chunks", None), message.additional_kwargs)
    if any(rest) or chunk.generation_info or said.keys() - {"model_name", "model_provider"}:
        message.usage_metadata = None
        return True
    if getattr(message, "usage_metadata", None) is None:
        return "model_name" not in said
    message.usage_metadata = None
    return bool(said)
