"""One request of Pydantic AI to one model, between its admission and its end; streams are watched here."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio

from .._tap_watch import REST_CHUNKS, REST_SECONDS
from ..context import CallContext, within
from ..ending import Ending
from ..errors import VlunaError
from ..lifecycle import ModelCall, Operation
from ..slot import Slot, inside
from ..tap import INLINE_SECONDS
from ._pydantic_ai_words import ending_of, stream_ending_of, usage_of

if TYPE_CHECKING:
    from ..vluna import Vluna

_STOPPED: Final = (asyncio.CancelledError, KeyboardInterrupt, SystemExit)
"""Whoever is stopped by one of these waits for nothing more. A generator that is closed may still be awaited in."""


class Refusals:
    """Remembers that one request was refused: what falls back to another model must not ask for that one, too."""

    __slots__ = ("refused",)

    def __init__(self) -> None:
        self.refused: VlunaError | None = None

    @contextmanager
    def final(self) -> Iterator[None]:
        """A refusal inside comes out as it is, whatever the framework has put in its place."""
        try:
            yield
        except Exception as error:
            if self.refused is not None and error is not self.refused:
                raise self.refused from None
            raise


fallback: ContextVar[Refusals | None] = ContextVar("vluna_llm_pydantic_ai_fallback", default=None)
"""The request to several models, one after the other, that the running code is part of."""


class Call:
    """Holds the operation of one request until it is settled: by us, or by a metered client inside that claimed it."""

    def __init__(self, vluna: Vluna, bound: CallContext | None, operation: Operation | None) -> None:
        self.vluna = vluna
        self.bound = bound
        self.operation = operation
        self._slot = Slot()
        self._slot.offer(operation)
        self._share = self._slot.share

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is called in the ``with`` may claim the operation, and bills the same customer."""
        with ExitStack() as stack:
            if self.bound is not None:
                stack.enter_context(within(self.bound))
            stack.enter_context(inside(self._slot))
            yield

    @property
    def settles(self) -> bool:
        """Whether the end is still to be told, and by us."""
        if self._share is None or self._share.claimed:
            return False
        if self._share.passed_on:
            self._share.fail()
            return False
        return True

    def failed(self, error: BaseException) -> None:
        """No answer came."""
        if self._share is not None:
            self._share.fail(error)

    def finish(self, ending: Callable[[], Ending]) -> None:
        """The answer ended. Never raises."""
        if self._share is None or not self.settles:
            return
        try:
            self._share.finish(ending())
        except Exception:
            self.broke("pydantic_ai.answer")

    def broke(self, where: str) -> None:
        """An error of ours, while it is handled: told, and nothing is charged."""
        self.vluna.internal_error(where)
        if self._share is not None:
            self._share.fail()

    def answered(self, response: Any, waits: Callable[[Any], bool]) -> None:
        """A whole answer; one that the provider works on in the background is parked until a poll brings its usage."""
        if not self.park(response, waits):
            self.finish(lambda: ending_of(response))

    def park(self, response: Any, waits: Callable[[Any], bool]) -> bool:
        """Whether the answer is to be polled for, and its operation was parked."""
        if self.operation is None or response.state != "suspended" or not self.settles or not waits(response):
            return False
        self.operation.park(response.provider_response_id)
        return True

    async def receipt(self) -> None:
        """Wait for the receipt where the settings say so. Never raises but for a cancellation."""
        if self.operation is None or not self.operation.settle_inline or not self.operation.ended:
            return
        try:
            await self.operation.wait_async(INLINE_SECONDS)
        except Exception:
            self.vluna.internal_error("pydantic_ai.wait")


async def begin(
    vluna: Vluna, make: Callable[[], ModelCall], bound: CallContext | None, refusals: Refusals | None
) -> Call:
    """Ask the gate for one request.

    Raises:
        VlunaError: refused, now or a moment ago for another model of the same request; the provider is not called.
    """
    refusals = refusals or fallback.get()
    if refusals is not None and refusals.refused is not None:
        raise refusals.refused
    try:
        return Call(vluna, bound, await vluna.abegin(make(), bound))
    except VlunaError as error:
        if refusals is not None:
            refusals.refused = error
        raise
    except Exception:
        vluna.internal_error("pydantic_ai.begin")
        return Call(vluna, bound, None)


def book_background(vluna: Vluna, response: Any, make: Callable[[], ModelCall], bound: CallContext | None) -> None:
    """A poll brought the end of a background response: it is booked under its own id, however often it is seen."""
    try:
        usage = usage_of(response.usage)
        if usage is not None and response.provider_response_id:
            vluna.book_background(response.provider_response_id, usage, make(), bound)
    except Exception:
        vluna.internal_error("pydantic_ai.background")


class StreamWatch:
    """Sees how the events of one stream end, below everything that the framework does with them.

    The iterator is put under the stream's own: its types, events, errors and state stay as they are.
    """

    def __init__(self, call: Call, stream: Any, waits: Callable[[Any], bool]) -> None:
        self._call = call
        self._stream = stream
        self._waits = waits
        self._make: Callable[[], AsyncIterator[Any]] = stream._get_event_iterator
        self._events: AsyncIterator[Any] | None = None
        self._how: Literal["complete", "error"] | None = None
        assert call.operation is not None
        # Whoever holds a stream longer than its loop runs leaves nobody behind who could settle it.
        self._forgotten = weakref.finalize(stream, call.operation.abandon, lambda: Ending(how="abandoned"))
        self._forgotten.atexit = False
        stream._get_event_iterator = self._watched

    def _watched(self) -> AsyncIterator[Any]:
        self._events = _Events(self._make(), self)
        return self._events

    def ended(self, how: Literal["complete", "error"]) -> None:
        """The provider's events came to an end; not where the consumer has cut them off by ``cancel()``."""
        if not self._stream.cancelled:
            self._how = how

    async def left(self, error: BaseException | None) -> None:
        """The consumer is done with the stream, at its end or before: settle it. Never raises but for a cancellation.

        Where the model had finished, the rest is read for its usage: at most 8 events, 2 seconds.
        """
        try:
            if self._rest_may_tell and not isinstance(error, _STOPPED):
                await self._read_rest()
        finally:
            self._settle()
        if error is None:
            await self._call.receipt()

    @property
    def _rest_may_tell(self) -> bool:
        return self._call.settles and self._how is None and self._stream.finish_reason is not None

    def _settle(self) -> None:
        self._forgotten.detach()
        try:
            if not self._call.park(self._stream.get(), self._waits):
                self._call.finish(lambda: stream_ending_of(self._stream, self._how or "closed"))
        except Exception:
            self._call.broke("pydantic_ai.stream")

    async def _read_rest(self) -> None:
        if self._events is None:
            return
        try:
            with anyio.move_on_after(REST_SECONDS):
                for _ in range(REST_CHUNKS):
                    await self._events.__anext__()
        except Exception:  # at its end, broken, or somebody else still reads it
            pass


class _Events:
    """The events of one stream, handed on as they come."""

    __slots__ = ("_inner", "_watch")

    def __init__(self, inner: AsyncIterator[Any], watch: StreamWatch) -> None:
        self._inner = inner
        self._watch = watch

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._inner.__anext__()
        except StopAsyncIteration:
            self._watch.ended("complete")
            raise
        except Exception:
            self._watch.ended("error")
            raise

    async def aclose(self) -> None:
        """Close the events below."""
        if (close := getattr(self._inner, "aclose", None)) is not None:
            await close()


def watch(call: Call, stream: Any, waits: Callable[[Any], bool]) -> StreamWatch | None:
    """See to it that the end of this stream is known; None where nobody wants to know. Never raises."""
    if not call.settles:
        return None
    try:
        return StreamWatch(call, stream, waits)
    except Exception:
        call.broke("pydantic_ai.stream")
        return None
