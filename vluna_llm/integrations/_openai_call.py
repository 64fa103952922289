"""One logical call of an OpenAI client between its request and its answer; the same for both colours, without I/O."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Literal

from ..ending import Ending
from ..errors import VlunaError
from ..lifecycle import ModelCall, Operation
from ..tap import Sink, tap
from ..usage import StreamReader, TokenUsage, read_body
from ._openai_endpoints import body_of, classify, provider_of
from ._openai_usage_option import KINDS, REFUSERS, ask, is_asked, is_refusal

if TYPE_CHECKING:
    from ..context import CallContext
    from ..vluna import Vluna

RAW_RESPONSE_HEADER: Final = "X-Stainless-Raw-Response"
_WORKING: Final = frozenset({"queued", "in_progress"})
_ENDED: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})


class Call:
    """What is known of a call under way. ``operation`` is None until it was admitted."""

    __slots__ = (
        "answered",
        "asks_usage",
        "background",
        "base_url",
        "bound",
        "model_call",
        "operation",
        "pending",
        "retrieve",
        "url",
        "vluna",
    )

    def __init__(
        self,
        vluna: Vluna,
        bound: CallContext | None,
        model_call: ModelCall,
        url: str,
        *,
        base_url: str = "",
        retrieve: bool = False,
        background: bool = False,
        asks_usage: bool = False,
    ) -> None:
        self.vluna = vluna
        self.bound = bound
        self.model_call = model_call
        self.url = url
        self.base_url = base_url
        self.retrieve = retrieve
        self.background = background
        self.asks_usage = asks_usage
        self.operation: Operation | None = None
        self.pending: Any = None  # an authorize under way (authorize="overlap")
        self.answered: Literal["no", "whole", "open"] = "no"

    # -- admission ---------------------------------------------------------------------------------------------------

    def begin(self) -> Operation | None:
        """Ask the gate; None where the call is not metered. Only refusals are raised."""
        try:
            return self.vluna.begin(self.model_call, self.bound)
        except VlunaError:
            raise
        except Exception:
            self.vluna.internal_error("openai.begin")
            return None

    async def abegin(self) -> Operation | None:
        """`begin` for coroutines."""
        try:
            return await self.vluna.abegin(self.model_call, self.bound)
        except VlunaError:
            raise
        except Exception:
            self.vluna.internal_error("openai.begin")
            return None

    # -- the request -------------------------------------------------------------------------------------------------

    def asking(self, options: Any) -> Any:
        """The options with ``include_usage`` asked for; the same object where nothing is to be asked."""
        if not self.asks_usage:
            return options
        try:
            asked = options.model_copy()
            asked.json_data, asked.extra_json = ask(options.json_data, options.extra_json)
            return asked
        except Exception:
            self.vluna.internal_error("openai.include_usage")
            self.asks_usage = False
            return options

    def refused_option(self, error: BaseException) -> bool:
        """Whether the call failed because usage was asked for; from now on it is not."""
        try:
            status = getattr(error, "status_code", None)
            if self.answered != "no" or not isinstance(status, int):
                return False
            text = f"{error} {getattr(error, 'body', '')}"
            if not is_refusal(status, text):
                return False
        except Exception:
            self.vluna.internal_error("openai.include_usage")
            return False
        self.asks_usage = False
        return True

    def remember_refusal(self) -> None:
        """The call went through without the option: this upstream is not asked again."""
        REFUSERS.add(self.base_url)

    def failed(self, error: BaseException) -> None:
        """The call raised. After an answer that changes nothing: what was spent was spent (design rule 4)."""
        if self.answered == "no" and self.operation is not None:
            self.operation.fail(error)

    # -- the answer --------------------------------------------------------------------------------------------------

    def answer(self, response: Any, *, is_async: bool) -> None:
        """The final 2xx: read the usage of a whole body, or watch an open one. Never raises."""
        if self.answered != "no":
            return
        try:
            if response.is_closed:
                self.answered = "whole"
                self._whole(response)
            else:
                self.answered = "open"
                tap(
                    response,
                    self._sink(),
                    url=self.url,
                    hide_usage_chunk=self.asks_usage,
                    report=self.vluna.internal_error,
                    is_async=is_async,
                    reader=BackgroundReader(self.url, response.headers.get("content-type")) if self.retrieve else None,
                )
        except Exception:
            self.vluna.internal_error("openai.answer")
            if self.operation is not None:
                self.operation.fail()

    @property
    def waits(self) -> bool:
        """Whether the caller waits for the receipt before getting the answer."""
        return self.answered == "whole" and self.operation is not None and self.operation.settle_inline

    def _sink(self) -> Sink:
        if self.retrieve:
            return _Retrieved(self)
        if self.operation is None:
            return _Nobody()
        return _Parked(self, self.operation) if self.background else self.operation

    def _whole(self, response: Any) -> None:
        body = response.content
        content_type = response.headers.get("content-type")
        if self.asks_usage:
            # A stream that somebody has read already: a logging hook of the HTTP client, or a recorded answer.
            response._content = _without_usage_chunk(self.url, content_type, body)
        facts = read_body(self.url, content_type, body)
        if self.retrieve:
            if facts.usage is not None and facts.status in _ENDED and _says_background(body):
                self.book(facts.response_id, facts.usage, facts.model)
            return
        operation = self.operation
        if operation is None:
            return
        if facts.status in _WORKING:
            operation.park(facts.response_id)
            return
        # A text answer (a transcript as text or subtitles) is whole and says nothing; a page of a proxy is no answer.
        plain = (content_type or "").partition(";")[0].strip().lower()
        whole = facts.complete or (
            self.model_call.kind == "audio" and plain.startswith("text/") and plain != "text/html"
        )
        sink = _Parked(self, operation) if self.background else operation
        sink.finish(
            Ending(
                how="complete" if whole else "error",
                usage=facts.usage,
                finished=whole,
                finish_reason_seen=facts.finish_reason_seen,
                failed=facts.failed or not whole,
                response_id=facts.response_id,
                model=facts.model,
            )
        )

    def book(self, response_id: str | None, usage: TokenUsage, model: str | None) -> None:
        """The usage of a background response is known: it is booked under its own id, however often it is seen."""
        if response_id is None:
            return
        call = self.model_call
        if not call.model and model:
            call = ModelCall(call.kind, call.provider, model, None, call.stream)
        self.vluna.book_background(response_id, usage, call, self.bound)


in_flight: ContextVar[Call | None] = ContextVar("vluna_llm_openai_call", default=None)
"""Ties the two methods of a client together; set by ``request`` and reset before it returns."""


class _Nobody:
    """Stands for an operation where none was admitted and the answer still has to be rewritten."""

    on_abort: Final = "cancel"
    settle_inline: Final = False

    def finish(self, ending: Ending) -> None:
        """Nothing is told."""

    def abandon(self, ending: Callable[[], Ending]) -> None:
        """Nothing is told."""

    def wait(self, timeout: float | None = None) -> object:
        """There is no receipt."""
        return None

    async def _no_receipt(self) -> object:
        return None

    def wait_async(self, timeout: float | None = None) -> Awaitable[object]:
        """There is no receipt."""
        return self._no_receipt()


class _Retrieved(_Nobody):
    """The answer of a retrieve: a background response is booked when its end is seen."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def finish(self, ending: Ending) -> None:
        """Book the usage of the terminal event. What a model wrote cannot look like one: it stands inside a string."""
        if ending.usage is not None and ending.finished:
            self._call.book(ending.response_id, ending.usage, ending.model)


class _Parked(_Nobody):
    """A response created with ``background=True``: leaving it does not end it, and its usage is booked by its id."""

    def __init__(self, call: Call, operation: Operation) -> None:
        self._call = call
        self._operation = operation
        self.settle_inline = False  # type: ignore[misc]

    def finish(self, ending: Ending) -> None:
        """Park it; book what is known. One that failed at once without usage is an ordinary failure.

        It is never estimated: what was seen of it is no measure of what the provider goes on to spend, and a retrieve
        will bring that.
        """
        if ending.failed and ending.usage is None:
            self._operation.finish(ending)
            return
        if ending.response_id is None:
            self._operation.finish(ending if ending.usage is not None else _given_up(ending))
            return
        self._operation.park(ending.response_id)
        if ending.usage is not None:
            self._call.book(ending.response_id, ending.usage, None)

    def abandon(self, ending: Callable[[], Ending]) -> None:
        """A forgotten stream is cancelled, whatever ``on_abort`` says; a later retrieve books the usage."""
        self._operation.abandon(lambda: _given_up(ending()))


def _given_up(ending: Ending) -> Ending:
    return Ending(how="error", output_tokens=ending.output_tokens, response_id=ending.response_id, model=ending.model)


class BackgroundReader(StreamReader):
    """Reads a retrieved stream, and reports usage only where the response says that it runs in the background."""

    def __init__(self, url: str, content_type: str | None) -> None:
        super().__init__(url, content_type)
        self._line = bytearray()
        self.background = False

    def pass_through(self, data: bytes) -> bytes:
        """Read the next piece; nothing is hidden."""
        self.feed(data)
        return data

    def feed(self, data: bytes) -> bool:
        """Read the next piece."""
        if not self.background:
            self._line += data
            *lines, rest = bytes(self._line).split(b"\n")
            self._line[:] = rest[-1_048_576:]
            self.background = any(_says_background(line[5:]) for line in lines if line.startswith(b"data:"))
        news = super().feed(data)
        if not self.background:
            self.usage = None
        return news


def _without_usage_chunk(url: str, content_type: str | None, body: bytes) -> bytes:
    reader = StreamReader(url, content_type, hide_usage_chunk=True)
    return reader.pass_through(body) + reader.flush()


def _says_background(body: bytes) -> bool:
    if b'"background"' not in body:
        return False
    with suppress(ValueError, RecursionError):
        obj = json.loads(body)
        if isinstance(obj, dict):
            inner = obj.get("response")
            return (inner if isinstance(inner, dict) else obj).get("background") is True
    return False


def prepare(
    vluna: Vluna, bound: CallContext | None, client: Any, options: Any, stream: bool, *, flavour: str
) -> Call | None:
    """What has to be done about this request; None where nothing has.

    Raises:
        ConfigurationError: the endpoint costs money, is not metered, and the setting ``on_unmetered`` is ``deny``.
    """
    try:
        if vluna.mode == "off":
            return None
        body = body_of(options.json_data, options.extra_json, getattr(options, "content", None))
        endpoint = classify(options.method, options.url, body)
        if endpoint.role == "free":
            return None
        if endpoint.role != "unmetered":
            return _metered(
                vluna, bound, client, options, stream, body or {}, endpoint.role == "retrieve", endpoint.kind, flavour
            )
    except Exception:
        vluna.internal_error("openai.prepare")
        return None
    try:
        vluna.unmetered(f"openai.{endpoint.kind}", bound)
    except VlunaError:
        raise
    except Exception:
        vluna.internal_error("openai.unmetered")
    return None


def _metered(
    vluna: Vluna,
    bound: CallContext | None,
    client: Any,
    options: Any,
    stream: bool,
    body: Mapping[str, Any],
    retrieve: bool,
    kind: str,
    flavour: str,
) -> Call:
    base_url = str(client.base_url)
    model = body.get("model") or getattr(client, "_azure_deployment", None)
    streams = stream or body.get("stream") is True
    model_call = ModelCall(
        kind=kind,
        provider=provider_of(client.base_url.host, flavour),
        model=str(model) if model else ("" if retrieve else "default"),
        body=body,
        stream=streams,
    )
    stays_open = stream or _raw_mode(options) == "stream"
    return Call(
        vluna,
        bound,
        model_call,
        options.url,
        base_url=base_url,
        retrieve=retrieve,
        background=body.get("background") is True and kind == "responses",
        asks_usage=(
            kind in KINDS
            and stays_open
            and body.get("stream") is True
            and not is_asked(body)
            and (isinstance(options.json_data, Mapping) or isinstance(options.extra_json, Mapping))
            and base_url not in REFUSERS
        ),
    )


def _raw_mode(options: Any) -> str | None:
    headers = options.headers
    if not isinstance(headers, Mapping):
        return None
    value = headers.get(RAW_RESPONSE_HEADER)
    return value if isinstance(value, str) else None
