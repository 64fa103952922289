"""Streams of LiteLLM: how each of them ends, by what the provider sent and not by what LiteLLM makes of it.

LiteLLM counts tokens itself where the provider reports none, tells its callbacks nothing about a stream that is left,
and some of its versions report an answer that was cut as a success. So its chunks and events are not looked at: below
nearly every stream of LiteLLM lies an open HTTP response, and the observing byte stream of `vluna_llm.tap` is put under
that. Types, chunks, errors and their timing stay LiteLLM's own, whatever is wrapped around the stream afterwards (the
Router's fallbacks, a bridge to another API, a proxy's hooks).

Where there is no response yet (LiteLLM asks the provider at the first read) or none that can be read, the items of the
stream are observed instead (`_litellm_items`). A stream that LiteLLM makes up from a whole answer is settled at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import AsyncGeneratorType, FrameType, GeneratorType
from typing import Any, Final

from ..ending import Ending
from ..lifecycle import ModelCall
from ..slot import Share
from ..tap import tap
from ..usage import StreamReader, read_body
from ._aws_events import AwsReader
from ._litellm_ask import ask_usage, is_refused, remember_refusal
from ._litellm_background import given_up_on, is_background, park
from ._litellm_call import LogicalCall
from ._litellm_ends import tell_end
from ._litellm_items import Site, observe, whole_answer
from ._litellm_usage import costs_nothing

__all__ = ["ask_usage", "is_refused", "remember_refusal", "watch"]

_LINKS: Final = (
    "response",
    "_response",
    "http_response",
    "completion_stream",
    "litellm_custom_stream_wrapper",
    "streaming_response",
    "stream_iterator",
    "_anthropic_wrapper",
    "_byte_stream",
    "_responses_stream",
    "responses_stream",
    "iterator",
    "stream",
    "self",
)
"""Under these names the streams of LiteLLM, of the OpenAI SDK and of httpx hold what they read from: attributes of
objects, arguments of generators that have not begun."""
_DEEPEST: Final = 12
_AWS: Final = "application/vnd.amazon.eventstream"


def watch(response: Any, call: LogicalCall, model_call: ModelCall, *, asked_usage: bool, is_async: bool) -> Any:
    """See to it that the end of this stream settles the call's operation, however it ends. Never raises.

    Args:
        response: the stream that LiteLLM returned, unread.
        call: the logical call; its operation of now is settled, also where another attempt follows later.
        model_call: what was asked for.
        asked_usage: usage was asked for on the caller's behalf; LiteLLM itself leaves that chunk out of the stream.
        is_async: the colour of the call.

    Returns:
        What the caller is given: the same object, or for a bare generator another generator.
    """
    share = call.slot.share
    if share is None:
        return response
    operation = share.operation
    try:
        if share.passed_on:
            share.fail()
        if share.passed_on or share.claimed:
            let_go()
            _follow(response, open_response(response), is_async)
            return response
        if call.watched is operation:
            return response
        call.watched = operation
        bill = Bill(share, call, model_call)
        return _watch(response, call, bill, model_call, asked_usage or call.asked_usage, is_async)
    except Exception:
        call.vluna.internal_error("litellm.stream")
        operation.fail()
        return response


class Bill(Share):
    """The share of one stream: what the provider works on in the background is parked."""

    __slots__ = ("_call", "_model_call")

    def __init__(self, share: Share, call: LogicalCall, model_call: ModelCall) -> None:
        super().__init__(share.slot, share._offer)
        self._call = call
        self._model_call = model_call

    def finish(self, ending: Ending) -> None:
        """The answer ended."""
        if is_background(self._model_call) and not self.claimed and not self.passed_on:
            park(self._call.vluna, self.operation, self._model_call, self._call.bound, ending)
        else:
            super().finish(ending)

    def abandon(self, ending: Callable[[], Ending]) -> None:
        """The answer was forgotten."""
        super().abandon((lambda: given_up_on(ending())) if is_background(self._model_call) else ending)


def _watch(
    response: Any, call: LogicalCall, bill: Bill, model_call: ModelCall, asked_usage: bool, is_async: bool
) -> Any:
    if _is_free(response):
        bill.fail()
        return response
    known = whole_answer(response, model_call)
    if known is not None:
        bill.finish(known)
        return response

    def adopt(made: Any, stream: Any) -> bool:
        return _tap_below(made, stream, call, bill, is_async)

    site = Site(bill, call, model_call, is_async, asked_usage, adopt)
    return response if site.adopt(response, response) else observe(response, site)


def _tap_below(made: Any, stream: Any, call: LogicalCall, bill: Bill, is_async: bool) -> bool:
    """Observe the response below ``made``; False where there is none yet. The consumer reads ``stream``."""
    let_go()
    http = open_response(made)
    if http is None:
        return False
    if _is_tapped(http) or _tap(http, call, bill, is_async):
        _follow(stream, http, is_async)
    return True


def _is_tapped(http: Any) -> bool:
    """Whether a stream of ours is there already: that of a metered client, which settles by itself."""
    return hasattr(http.stream, "_watch")


def _follow(stream: Any, http: Any, is_async: bool) -> None:
    """Have what is below told when LiteLLM ends the stream, and when the consumer drops it."""
    if stream is None or http is None or not _is_tapped(http):
        return
    watch = http.stream._watch
    tell_end(stream, watch, http, is_async=is_async)
    # LiteLLM's logging holds on to the response itself, and contexts of its background tasks to its logging.
    weakref.finalize(stream, watch.forgotten).atexit = False


def _tap(http: Any, call: LogicalCall, bill: Bill, is_async: bool) -> bool:
    """Put the observing stream below this response; False where it was read already, and is settled by what it is."""
    request = getattr(http, "_request", None)
    url = str(request.url.path) if request is not None else ""
    content_type = http.headers.get("content-type") or ""
    if http.is_closed or http.is_stream_consumed:
        bill.finish(_read_already(http, url, content_type))
        return False
    reader = AwsReader(url) if content_type.startswith(_AWS) else StreamReader(url, content_type or None)
    report = call.vluna.internal_error
    if not hasattr(http.stream, "__iter__") or not hasattr(http.stream, "__aiter__"):
        is_async = hasattr(http.stream, "__aiter__")  # an async function of LiteLLM may have asked in a thread
    tap(http, bill, url=url, hide_usage_chunk=False, report=report, is_async=is_async, reader=reader)
    call.source = weakref.ref(http)
    return True


def _read_already(http: Any, url: str, content_type: str) -> Ending:
    """The ending of an answer that somebody has read to its end before us; what is not kept is estimated."""
    try:
        facts = read_body(url, content_type, http.content)
    except Exception:
        return Ending(how="complete", finished=True)
    return Ending(
        how="complete" if facts.complete else "error",
        usage=facts.usage,
        finished=facts.complete,
        finish_reason_seen=facts.finish_reason_seen,
        failed=facts.failed or not facts.complete,
        response_id=facts.response_id,
        model=facts.model,
    )


def _is_free(response: Any) -> bool:
    """Whether no provider is asked: LiteLLM plays back an answer from its cache, or one that the caller made up."""
    source = getattr(response, "completion_stream", None)
    frame = _frame(source)
    return (
        costs_nothing(response)
        or type(response).__name__.startswith("Cached")
        or (frame is not None and "mock_completion" in frame.f_code.co_name)
    )


def let_go() -> None:
    """Make LiteLLM forget its latest call, which it keeps for ever: the consumer alone is to hold a stream.

    That is ``litellm.error_logs`` of 1.83, which nothing reads. A stream that is held there is never collected, and
    that it was left is never noticed.
    """
    import litellm

    kept = getattr(litellm, "error_logs", None)
    if isinstance(kept, dict):
        kept.pop("PRE_CALL", None)
        kept.pop("POST_CALL", None)


def open_response(found: Any) -> Any:
    """The HTTP response from which this stream will be read; None where there is none yet."""
    seen: set[int] = set()
    level = [found]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for holder in level:
            if id(holder) in seen:
                continue
            seen.add(id(holder))
            if _is_response(holder):
                return holder
            below.extend(_links(holder))
        if not below:
            return None
        level = below
    return None


def _links(holder: Any) -> list[Any]:
    names: Any
    frame = _frame(holder)
    if frame is not None:
        names = frame.f_locals
    else:
        names = getattr(holder, "__dict__", None)
        if not isinstance(names, dict):
            return []
    return [names[name] for name in _LINKS if names.get(name) is not None]


def _frame(holder: Any) -> FrameType | None:
    if isinstance(holder, GeneratorType):
        return holder.gi_frame
    if isinstance(holder, AsyncGeneratorType):
        frame: FrameType | None = holder.ag_frame
        return frame
    return None


def _is_response(holder: Any) -> bool:
    return any(
        kind.__name__ == "Response" and kind.__module__.partition(".")[0] in ("httpx", "httpx2")
        for kind in type(holder).__mro__
    ) and hasattr(holder, "stream")
