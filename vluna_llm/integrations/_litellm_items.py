"""Streams of LiteLLM that have no readable HTTP response below them (yet): their items are observed as they pass.

That is so where LiteLLM asks the provider at the first read (text completions of OpenAI, Gemini), and for providers
that LiteLLM reaches by a library of their own or that an application has written itself (``CustomLLM``). As soon as the
response of a late request is there, it is observed instead and the items pass unread.
"""

from __future__ import annotations

import asyncio
import inspect
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import AsyncGeneratorType, GeneratorType
from typing import Any, Final

from .._tap_watch import REST_CHUNKS, How, Sink, Watch, collecting, watch_collector
from ..ending import Ending
from ..lifecycle import ModelCall
from ..slot import Share
from ..tap import DRAIN_SECONDS, note_open
from ._litellm_ask import is_refused, without_asking
from ._litellm_call import LogicalCall, current_call
from ._litellm_ends import tell_end
from ._litellm_made import making
from ._litellm_usage import ChunkReader, ending_of
from ._openai_usage_option import REFUSERS

_MANY: Final = 1 << 40
_PLAYED_BACK: Final = {
    "MockResponseIterator": "model_response",
    "FakeAnthropicMessagesStreamIterator": "response",
    "MockResponsesAPIStreamingIterator": "_events",
}
"""Streams that LiteLLM makes up from a whole answer, and where they keep it."""


def whole_answer(response: Any, model_call: ModelCall) -> Ending | None:
    """The ending of an answer that is there already and is only played back as a stream; None for a real stream."""
    stream = response
    for _ in range(3):
        where = _PLAYED_BACK.get(type(stream).__name__)
        kept = getattr(stream, where, None) if where else None
        if isinstance(kept, (list, tuple)):
            kept = getattr(kept[-1], "response", None) if kept else None
        if kept is None and type(stream).__name__ == "ModelResponse":
            kept = stream
        if kept is not None:
            return ending_of(kept, model_call)
        stream = getattr(stream, "completion_stream", None)
        if stream is None:
            return None
    return None


@dataclass(frozen=True, slots=True)
class Site:
    """Where a stream is observed: who is told, for which call, and how the response below a late stream is observed.

    Attributes:
        is_async: the colour of the call.
        asked_usage: usage was asked for on the caller's behalf.
        adopt: observes the response below a stream that was just made, for the stream that the consumer reads; False
            where there is none.
    """

    sink: Share
    call: LogicalCall
    model_call: ModelCall
    is_async: bool
    asked_usage: bool
    adopt: Callable[[Any, Any], bool]

    def watch(self, *, asked: bool) -> ItemWatch:
        """A watch over items."""
        return ItemWatch(self.sink, self.call.vluna.internal_error, self.model_call, asked=asked)


def observe(response: Any, site: Site) -> Any:
    """Observe the items of this stream; gives what the consumer is handed.

    It is the same object. A bare generator cannot be changed: another generator stands for it.
    """
    holder = response
    while getattr(getattr(holder, "completion_stream", None), "completion_stream", None) is not None:
        holder = holder.completion_stream
    late = getattr(holder, "make_call", None)
    source = getattr(holder, "completion_stream", None)
    if source is None and late is not None:
        holder.make_call = LateCall(late, site, holder)
    elif source is not None:
        kind = Items if hasattr(source, "__aiter__") else SyncItems
        holder.completion_stream = items = kind(source, site)
        tell_end(holder, items._watch, items, is_async=site.is_async)
    elif isinstance(response, AsyncGeneratorType):
        return _relay_async(Items(response, site))
    elif isinstance(response, GeneratorType):
        return _relay(SyncItems(response, site))
    else:
        weakref.finalize(response, site.sink.abandon, lambda: Ending(how="abandoned")).atexit = False
    return response


class ItemReader(ChunkReader):
    """A `ChunkReader` with what `Watch` asks of a reader, quick about chunks that only add text."""

    __slots__ = ("_framing",)

    def __init__(self, model_call: ModelCall) -> None:
        super().__init__(model_call)
        self._framing = "sse"

    def take(self, item: Any) -> None:
        """Read the next item."""
        if isinstance(item, str):
            item = item if item.endswith("\n") else item + ("\n\n" if item.startswith("data:") else "\n")
        elif not isinstance(item, (bytes, bytearray)) and self._only_text(item):
            return
        self.read(item)

    def _only_text(self, item: Any) -> bool:
        """Whether this chunk has one choice that only adds text; it is counted."""
        choices = getattr(item, "choices", None)
        if not choices or len(choices) != 1 or self.response_id is None or getattr(item, "usage", None) is not None:
            return False
        choice = choices[0]
        if getattr(choice, "finish_reason", None) is not None:
            return False
        delta = getattr(choice, "delta", None)
        text = getattr(choice, "text", None) if delta is None else getattr(delta, "content", None)
        if not isinstance(text, str) or getattr(delta, "tool_calls", None):
            return False
        self._characters += len(text)
        return True

    def end(self) -> None:
        """No more items will come."""


class ItemWatch(Watch):
    """What is known of one stream of items. ``asked`` tells whether the provider was asked at all by now."""

    __slots__ = ("asked", "items")

    def __init__(self, sink: Sink, report: Callable[[str], None], model_call: ModelCall, *, asked: bool) -> None:
        self.items = ItemReader(model_call)
        super().__init__(self.items, sink, report, event_stream=True)  # type: ignore[arg-type]
        self.asked = asked

    def ending(self, how: How) -> Ending:
        """What was seen; a stream that was never read had nothing asked for, and costs nothing."""
        return super().ending(how) if self.asked else Ending(how="error")

    def end_of_items(self) -> None:
        """The stream says that there is no more: an end as good as any, where items have no protocol."""
        self.settle("complete")


class _Observed:
    """What both kinds of `Items` share; ``_inner`` is LiteLLM's iterator."""

    def __init__(self, inner: Any, site: Site) -> None:
        self._inner = inner
        self._site = site
        self._watch = site.watch(asked=not _begins_late(inner))
        self._again = without_asking(inner) if site.asked_usage else None
        self._begun = False
        watch_collector()
        weakref.finalize(self, self._watch.forgotten).atexit = False
        note_open(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_inner", "_watch"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __iter__(self) -> Any:
        self._inner = iter(self._inner)
        return self

    def __next__(self) -> Any:
        watch = self._watch
        try:
            item = next(self._inner) if self._begun else self._first()
        except StopIteration:
            watch.end_of_items()
            raise
        except BaseException as error:
            watch.broke(error)
            raise
        if not watch.told:
            self._take(item)
        return item

    def _take(self, item: Any) -> None:
        try:
            self._watch.items.take(item)
        except Exception:
            self._watch.report("litellm.items")

    @contextmanager
    def _beginning(self) -> Generator[None, None, None]:
        """The first read: whatever it asks of a provider belongs to this call."""
        self._begun = self._watch.asked = True
        try:
            with self._site.call.running(), making(self._made):
                yield
        except BaseException as error:
            if self._superseded:
                self._site.call.failed(error)
            raise
        finally:
            if self._superseded:
                self._watch.told = True

    @property
    def _superseded(self) -> bool:
        """Whether another call, under another feature, was made for this stream: that one is billed, in its place."""
        return self._site.call.operation is not self._site.sink.operation

    def _first(self) -> Any:
        with self._beginning():
            try:
                return next(self._inner)
            except Exception as error:
                if not self._refused_option(error):
                    raise
            item = next(self._inner)
        self._remember()
        return item

    def _refused_option(self, error: Exception) -> bool:
        """Whether the upstream does not take the option that we put in: the stream is made again without it."""
        if self._again is None or self._watch.told or not is_refused(error):
            return False
        self._inner = self._again.make()
        return True

    def _remember(self) -> None:
        if self._again is not None:
            REFUSERS.add(self._again.upstream)

    def _made(self, stream: Any) -> None:
        """LiteLLM has made a stream inside this one: what is below it is observed instead of the items."""
        try:
            mine = current_call() is self._site.call and not self._superseded  # else it is settled by whose it is
            if mine and not self._watch.told and self._site.adopt(stream, stream):
                self._watch.told = True
        except Exception:
            self._watch.report("litellm.made")

    def close(self) -> None:
        """Settle and close."""
        if not collecting():
            self._watch.settle("closed")
        close = getattr(self._inner, "close", None)
        if callable(close):
            close()


class SyncItems(_Observed):
    """For an iterator that knows no ``async for``."""


class Items(_Observed):
    """For an async iterator, or one of both colours."""

    _reading: AsyncIterator[Any] | None = None

    def __aiter__(self) -> AsyncIterator[Any]:
        self._reading = self._inner.__aiter__()
        return self

    async def __anext__(self) -> Any:
        watch = self._watch
        reading = self._reading if self._reading is not None else self._inner
        try:
            if self._begun:
                item = await reading.__anext__()
            else:
                item = await self._afirst(reading)
        except StopAsyncIteration:
            watch.end_of_items()
            raise
        except BaseException as error:
            watch.broke(error)
            raise
        if not watch.told:
            self._take(item)
        return item

    async def _afirst(self, reading: Any) -> Any:
        with self._beginning():
            try:
                return await reading.__anext__()
            except Exception as error:
                if not self._refused_option(error):
                    raise
            self._reading = self._inner.__aiter__()
            item = await self._reading.__anext__()
        self._remember()
        return item

    async def aclose(self) -> None:
        """Read what is worth reading (design rules 3 and 4), settle and close."""
        watch = self._watch
        try:
            if not watch.told and not collecting() and self._begun:
                if seconds := watch.wants_rest():
                    await self._read_on(seconds, REST_CHUNKS)
                elif watch.sink.on_abort == "drain" and not watch.cancelled and not watch.rest_is_known():
                    task = asyncio.get_running_loop().create_task(self._drain(), name="vluna-drain")
                    _draining.add(task)
                    task.add_done_callback(_draining.discard)
                    return
        except Exception:
            watch.report("litellm.aclose")
        await self._leave()

    async def _drain(self) -> None:
        try:
            await self._read_on(DRAIN_SECONDS, _MANY)
        finally:
            await self._leave()

    async def _leave(self) -> None:
        self._watch.settle("closed")
        for name in ("aclose", "close"):
            close = getattr(self._inner, name, None)
            if callable(close):
                left = close()
                if left is not None:
                    await left
                return

    async def _read_on(self, seconds: float, items: int) -> None:
        import anyio

        watch = self._watch
        reading = self._reading if self._reading is not None else self._inner
        with suppress(Exception), anyio.move_on_after(seconds):
            for _ in range(items):
                try:
                    self._take(await reading.__anext__())
                except StopAsyncIteration:
                    watch.end_of_items()
                    return
                if watch.rest_is_known():
                    return


_draining: set[asyncio.Task[None]] = set()  # a loop keeps only weak references to its tasks


def _begins_late(inner: Any) -> bool:
    """Whether nothing was asked of a provider yet: a generator that has not begun may still have to do so."""
    return isinstance(inner, (GeneratorType, AsyncGeneratorType))


def _relay(items: SyncItems) -> Iterator[Any]:
    yield from items


async def _relay_async(items: Items) -> AsyncIterator[Any]:
    try:
        async for item in items:
            yield item
    except GeneratorExit:
        await items.aclose()
        raise


class LateCall:
    """Stands for ``make_call`` of LiteLLM's stream, by which the provider is asked at the first read."""

    def __init__(self, make_call: Callable[..., Any], site: Site, stream: Any) -> None:
        self._make_call = make_call
        self._site = site
        self._stream = weakref.ref(stream)
        self._watch = site.watch(asked=False)
        watch_collector()
        weakref.finalize(self, self._watch.forgotten).atexit = False
        note_open(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with self._site.call.running():
                made = self._make_call(*args, **kwargs)
        except BaseException as error:
            self._watch.broke(error)
            raise
        return self._awaited(made) if inspect.iscoroutine(made) else self._observed(made)

    async def _awaited(self, made: Any) -> Any:
        try:
            with self._site.call.running():
                stream = await made
        except BaseException as error:
            self._watch.broke(error)
            raise
        return self._observed(stream)

    def _observed(self, stream: Any) -> Any:
        self._watch.told = True  # from here on it is told by who observes the stream
        try:
            holder = self._stream()
            if self._site.adopt(stream, holder):
                return stream
            kind = Items if hasattr(stream, "__aiter__") else SyncItems
            items = kind(stream, self._site)
            items._watch.asked = True
            if holder is not None:
                tell_end(holder, items._watch, items, is_async=self._site.is_async)
            return items
        except Exception:
            self._watch.told = False  # nobody observes it: that it is over is told by the garbage collector
            self._watch.report("litellm.make_call")
            return stream
