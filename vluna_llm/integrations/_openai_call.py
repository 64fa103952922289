"""One logical call of an OpenAI client: what is its own about it, from the request to the answer."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from ..ending import Ending
from ..lifecycle import ModelCall, Operation
from ..tap import Sink
from ..usage import StreamReader, TokenUsage, read_body
from ._openai_endpoints import Endpoint, body_of, classify, provider_of
from ._openai_usage_option import KINDS, REFUSERS, ask, is_asked, is_refusal
from ._sdk_call import Call, ending_of, prepare_call, raw_mode

if TYPE_CHECKING:
    from ..context import CallContext
    from ..slot import Share
    from ..vluna import Vluna

_WORKING: Final = frozenset({"queued", "in_progress"})
_ENDED: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})


class OpenAICall(Call):
    """A call of an OpenAI client under way."""

    __slots__ = ("asks_usage", "background", "base_url", "retrieve")

    sdk = "openai"

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
        super().__init__(vluna, bound, model_call, url)
        self.base_url = base_url
        self.retrieve = retrieve
        self.background = background
        self.asks_usage = asks_usage

    @property
    def is_gated(self) -> bool:
        """Whether the gate is asked before this call."""
        return not self.retrieve

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

    # -- the answer --------------------------------------------------------------------------------------------------

    def _sink(self) -> Sink:
        if self.retrieve:
            return _Retrieved(self)
        if self.operation is None:
            return _Nobody()
        return _Parked(self, self.operation) if self.background else self.operation

    def _hides_usage(self) -> bool:
        return self.asks_usage

    def _reader(self, response: Any) -> StreamReader | None:
        return BackgroundReader(self.url, response.headers.get("content-type")) if self.retrieve else None

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
        sink.finish(ending_of(facts, whole=whole))

    def book(self, response_id: str | None, usage: TokenUsage, model: str | None) -> None:
        """The usage of a background response is known: it is booked under its own id, however often it is seen."""
        if response_id is None:
            return
        call = self.model_call
        if not call.model and model:
            call = ModelCall(call.kind, call.provider, model, None, call.stream)
        self.vluna.book_background(response_id, usage, call, self.bound)


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

    def __init__(self, call: OpenAICall) -> None:
        self._call = call

    def finish(self, ending: Ending) -> None:
        """Book the usage of the terminal event. What a model wrote cannot look like one: it stands inside a string."""
        if ending.usage is not None and ending.finished:
            self._call.book(ending.response_id, ending.usage, ending.model)


class _Parked(_Nobody):
    """A response created with ``background=True``: leaving it does not end it, and its usage is booked by its id."""

    def __init__(self, call: OpenAICall, operation: Operation | Share) -> None:
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
) -> OpenAICall | None:
    """What has to be done about this request; None where nothing has.

    Raises:
        ConfigurationError: the endpoint costs money, is not metered, and the setting ``on_unmetered`` is ``deny``.
    """

    def find() -> OpenAICall | Endpoint:
        body = body_of(options.json_data, options.extra_json, getattr(options, "content", None))
        endpoint = classify(options.method, options.url, body)
        if endpoint.role in ("free", "unmetered"):
            return endpoint
        return _metered(
            vluna, bound, client, options, stream, body or {}, endpoint.role == "retrieve", endpoint.kind, flavour
        )

    return prepare_call(vluna, bound, "openai", find)


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
) -> OpenAICall:
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
    stays_open = stream or raw_mode(options) == "stream"
    return OpenAICall(
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
