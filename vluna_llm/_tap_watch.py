"""What is known of one answer while it passes, and who is told how it ended; no stream is referred to from here."""

from __future__ import annotations

import gc
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal, Protocol

from .ending import Ending, generated_tokens
from .usage.stream import StreamReader

REST_CHUNKS = 8
"""How many more pieces are read for the usage of an answer that the model had finished (design rule 3)."""
REST_SECONDS = 2.0
"""How long that may take, in seconds."""
BODY_SECONDS = 5.0
"""How long the rest of a plain JSON answer may take that was left early, in seconds."""

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
        page: it was announced as a page for people to read, as something on the way to a model serves it.
    """

    __slots__ = ("cancelled", "event_stream", "page", "reader", "report", "sink", "told")

    def __init__(
        self,
        reader: StreamReader,
        sink: Sink,
        report: Callable[[str], None],
        *,
        event_stream: bool,
        page: bool = False,
    ) -> None:
        self.reader = reader
        self.sink = sink
        self.report = report
        self.event_stream = event_stream
        self.page = page
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
            if collecting():
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
            output_tokens=generated_tokens(characters) or None,
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
        """The provider sent all there is; an event stream that did not say so was cut (design rule 4), and a page is no
        answer of a model."""
        if self.told:
            return
        try:
            self.reader.end()
        except Exception:
            self.report("tap.end")
        whole = self.reader.finished or not (self.streams or self.page or self.reader._framing == "json")
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


# -- garbage collection ------------------------------------------------------------------------------------------------

_collector: int | None = None


def _on_collection(phase: str, info: dict[str, int]) -> None:
    global _collector
    _collector = threading.get_ident() if phase == "start" else None


def watch_collector() -> None:
    """Note from now on when a collection runs; there is one callback however many streams."""
    if _on_collection not in gc.callbacks:
        gc.callbacks.append(_on_collection)


def collecting() -> bool:
    """Whether this code was called by a garbage collection that is running in this thread."""
    return _collector is not None and _collector == threading.get_ident()
