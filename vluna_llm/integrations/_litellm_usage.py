"""What a call through LiteLLM cost: its objects brought into the shapes that our readers know (design rule 13).

LiteLLM puts every provider's usage into objects of its own, mostly `litellm.Usage`: OpenAI's names, Anthropic's cached
tokens added into the input, and what the provider sent beside. They are read by the one normaliser; before that, what
LiteLLM counted itself is taken out, since it is not the provider's report:

* ``0 / 0 / 0`` (or nothing) is what an answer without usage is given;
* the reasoning tokens of Anthropic's models are counted from the text (1.83: always; 1.106: where the answer is
  silent);
* a few providers report no usage at all, and all of it is LiteLLM's tokenizer (`_COUNTED_HERE`).

What the object has lost is read from the provider's own body, where LiteLLM has shown it (``raw``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from ..ending import Ending
from ..lifecycle import ModelCall
from ..usage import BodyFacts, StreamReader, TokenUsage, make_reader, read_body
from ..usage.body import facts_of
from ..usage.facts import has_finish_reason, identity, is_error, is_terminal, start_usage, usage_object
from ..usage.normalize import merge_anthropic, normalize_usage
from ._litellm_models import model_call_of, model_of

__all__ = ["ChunkReader", "chunk_usage", "costs_nothing", "ending_of", "model_call_of", "model_of", "pending"]

_COUNTED_HERE: Final = frozenset(
    {"a2a", "a2a_agent", "huggingface", "langflow", "langgraph", "petals", "predibase", "replicate", "sagemaker"}
)
"""Providers whose answers carry no usage: what LiteLLM reports for them is its own tokenizer's work."""

_CHARACTERS_PER_TOKEN: Final = 4

_URL: Final[Mapping[str, str]] = {
    "chat.completions": "/chat/completions",
    "completions": "/completions",
    "embeddings": "/embeddings",
    "images": "/images/generations",
    "audio": "/audio/transcriptions",
    "responses": "/responses",
    "anthropic.messages": "/v1/messages",
}


# -- whole answers -----------------------------------------------------------------------------------------------------


def ending_of(response: Any, model_call: ModelCall, raw: object = None) -> Ending:
    """How a whole answer ended, and what the provider reported; ``usage`` is None where it reported nothing.

    Args:
        response: what LiteLLM's function returned: an object of LiteLLM's or of an SDK, or a dict.
        model_call: the call that it answers.
        raw: the provider's own body, where LiteLLM has shown it (``original_response`` in `log_post_api_call`). It
            wins: what the body reports is the report, and what a body that we can read does not say was not reported.
    """
    said = _said(response)
    usage = usage_of(said.get("usage"), model_call)
    body = _read_raw(raw, model_call)
    if body is not None:
        usage = body.usage if body.usage is not None or body.finish_reason_seen else usage
    if usage is not None and not usage.total_tokens and not usage.costs_without_tokens:
        usage = None
    response_id, model = identity(said)
    if body is not None:  # LiteLLM makes up an id where the provider's did not arrive
        response_id, model = body.response_id or response_id, body.model or model
    return Ending(
        how="complete",
        usage=usage,
        finished=True,
        finish_reason_seen=True,
        failed=is_error(said),
        output_tokens=None if usage is not None else _generated(response),
        response_id=response_id,
        model=model,
    )


def usage_of(usage: Any, model_call: ModelCall) -> TokenUsage | None:
    """One usage object of LiteLLM's, of an SDK or of a provider; None where the provider reported nothing."""
    raw = _mapping(usage)
    if raw is None or not _reported(raw, model_call):
        return None
    return normalize_usage(_without_counting(raw))


def costs_nothing(response: Any, raw: object = None, kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether no provider was paid for this answer: it came out of LiteLLM's cache, or was made up (``mock_response``).

    LiteLLM marks an answer as cached, too, of which only a part came from the cache (embeddings of many inputs):
    where a provider's body was seen (``raw``), one was paid, and its body says how much.
    """
    if kwargs is not None and any(kwargs.get(name) for name in ("mock_response", "mock_tool_calls", "mock_timeout")):
        return True
    if raw is not None:
        return False
    if getattr(response, "custom_llm_provider", None) == "cached_response":  # a stream out of the cache
        return True
    hidden = getattr(response, "_hidden_params", None)
    return _member(hidden, "cache_hit") is True


def pending(response: Any) -> bool:
    """Whether the provider works on in the background: usage comes with a later retrieve."""
    return _member(response, "status") in ("queued", "in_progress") and _member(response, "object") == "response"


# -- streams -----------------------------------------------------------------------------------------------------------


def chunk_usage(chunk: Any, model_call: ModelCall) -> TokenUsage | None:
    """The usage that one chunk of a stream reports by itself, final or cumulative; None where it reports none.

    A stream of Anthropic's spreads its usage over two chunks: `ChunkReader` puts them together.
    """
    reader = ChunkReader(model_call)
    reader.read(chunk)
    return reader.usage


class ChunkReader:
    """Takes the chunks of one stream, as a provider's SDK or LiteLLM made them, and keeps what they have reported.

    The members are those of `vluna_llm.usage.StreamReader`, with the same meaning; bytes and lines of an event stream
    are read by one.
    """

    __slots__ = (
        "_bytes",
        "_call",
        "_characters",
        "_start",
        "failed",
        "finish_reason_seen",
        "finished",
        "model",
        "provisional_usage",
        "response_id",
        "status",
        "usage",
    )

    def __init__(self, model_call: ModelCall) -> None:
        self.usage: TokenUsage | None = None
        self.provisional_usage: TokenUsage | None = None
        self.finished = False
        self.finish_reason_seen = False
        self.failed = False
        self.response_id: str | None = None
        self.model: str | None = None
        self.status: str | None = None
        self._call = model_call
        self._start: Mapping[str, Any] | None = None
        self._characters = 0
        self._bytes: StreamReader | None = None

    @property
    def output_characters(self) -> int:
        """About how many characters the model has produced so far."""
        return self._characters + (self._bytes.output_characters if self._bytes is not None else 0)

    @property
    def output_tokens(self) -> int:
        """About how many tokens that is."""
        return -(-self.output_characters // _CHARACTERS_PER_TOKEN)

    def read(self, chunk: Any) -> bool:
        """Read the next chunk; True where usage, finish, failure or the end became known with it."""
        before = (self.usage, self.finished, self.finish_reason_seen, self.failed)
        if isinstance(chunk, (bytes, bytearray, str)):
            self._read_bytes(chunk.encode() if isinstance(chunk, str) else bytes(chunk))
        else:
            self._read_object(chunk)
        return before != (self.usage, self.finished, self.finish_reason_seen, self.failed)

    def ending(self, how: Any) -> Ending:
        """What was seen of the stream when it ended in this way."""
        return Ending(
            how=how,
            usage=self.usage,
            finished=self.finished,
            finish_reason_seen=self.finish_reason_seen,
            failed=self.failed,
            output_tokens=self.output_tokens,
            response_id=self.response_id,
            model=self.model,
        )

    def _read_bytes(self, data: bytes) -> None:
        if self._bytes is None:
            self._bytes = make_reader(_URL.get(self._call.kind, "/"), "text/event-stream")
        reader = self._bytes
        reader.feed(data)
        self.usage, self.provisional_usage = reader.usage, reader.provisional_usage
        self.finished, self.finish_reason_seen = reader.finished, reader.finish_reason_seen
        self.failed, self.status = reader.failed, reader.status
        self.response_id, self.model = reader.response_id, reader.model

    def _read_object(self, chunk: Any) -> None:
        said = _said(chunk)
        self._characters += _generated_characters(chunk)
        if self.response_id is None or self.model is None:
            response_id, model = identity(said)
            self.response_id, self.model = self.response_id or response_id, self.model or model
        if (start := start_usage(said)) is not None:
            self._start = start
            self.provisional_usage = normalize_usage(start)
        elif (raw := usage_object(said)) is not None:
            self._take(raw, said)
        if has_finish_reason(said):
            self.finish_reason_seen = True
        if is_terminal(said):
            self.finished = True
        if is_error(said):
            self.failed = True
        response = said.get("response")
        if isinstance(response, Mapping) and isinstance(response.get("status"), str):
            self.status = response["status"]

    def _take(self, raw: Mapping[str, Any], said: Mapping[str, Any]) -> None:
        if not _reported(raw, self._call):
            return
        raw = _without_counting(raw)
        if said.get("type") == "message_delta":  # Anthropic's own event
            raw = merge_anthropic(self._start, raw) if self._start is not None else raw
        elif _is_converted_anthropic(raw):
            if not has_finish_reason(said) and self.usage is None:
                self._start = raw  # made of message_start: the input is known, the output is not
                self.provisional_usage = normalize_usage(raw)
                return
            if self._start is not None:
                raw = _merge_converted(self._start, raw)
        usage = normalize_usage(raw)
        if usage is not None and (usage.total_tokens or self.usage is None):
            self.usage = usage


# -- what LiteLLM does to usage ----------------------------------------------------------------------------------------


def _reported(raw: Mapping[str, Any], model_call: ModelCall) -> bool:
    """Whether a usage object is a report of the provider's.

    LiteLLM gives an answer without usage a usage of zeros; a provider that really used nothing says the same, and
    either costs nothing that could be billed. The caller's answer was made all the same, so it is estimated.
    """
    if model_call.provider in _COUNTED_HERE:
        return False
    return _any_number(raw)


def _any_number(raw: Mapping[str, Any]) -> bool:
    for value in raw.values():
        if isinstance(value, Mapping):
            if _any_number(value):
                return True
        elif value and isinstance(value, (int, float)):
            return True
    return False


def _is_converted_anthropic(raw: Mapping[str, Any]) -> bool:
    """Whether LiteLLM made this of Anthropic's usage: OpenAI's names and both of Anthropic's cache counts beside."""
    return "prompt_tokens" in raw and "cache_creation_input_tokens" in raw and "cache_read_input_tokens" in raw


def _without_counting(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take out the reasoning tokens that LiteLLM counts for Anthropic's models: the text it sees is a summary."""
    if not _is_converted_anthropic(raw):
        return raw
    details = raw.get("completion_tokens_details")
    if not isinstance(details, Mapping) or not details.get("reasoning_tokens"):
        return raw
    return {**raw, "completion_tokens_details": {**details, "reasoning_tokens": None}}


def _merge_converted(start: Mapping[str, Any], delta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Both halves of an Anthropic stream's usage, each converted by itself (1.83; 1.106 does this before it converts).

    The second has the output, and the input only where the model is new enough to repeat it there.
    """
    if delta.get("prompt_tokens"):
        return delta
    merged = {**delta, **{name: value for name, value in start.items() if not name.startswith("completion_tokens")}}
    merged["total_tokens"] = None
    return merged


# -- reading objects ---------------------------------------------------------------------------------------------------


_OUTER: Final = ("type", "object", "id", "model", "status", "error", "stop_reason", "finish_reason", "done")
_HELD: Final = ("usage", "message", "response", "delta", "x_groq", "usageMetadata", "meta")


def _said(obj: Any) -> dict[str, Any]:
    """What the object says about itself, in the provider's JSON shape, without what was written or read by the model.

    An answer's text may be long: only what billing reads is brought over.
    """
    if isinstance(obj, Mapping):
        get = obj.get
    else:

        def get(name: str) -> Any:
            return _attribute(obj, name)

    said: dict[str, Any] = {}
    for name in _OUTER:
        value = get(name)
        if value is not None and isinstance(value, (str, bool, int)):
            said[name] = value
        elif name == "error" and value:
            said[name] = True
    for name in _HELD:
        value = get(name)
        if value is None or isinstance(value, (str, bytes)):
            continue
        if name == "usage":
            if (usage := _mapping(value)) is not None:
                said[name] = usage
        elif inner := _inner(value):
            said[name] = inner
    choices = get("choices")
    if isinstance(choices, list):
        said["choices"] = [
            {"finish_reason": _member(choice, "finish_reason")} for choice in choices if choice is not None
        ]
    for name in ("eval_count", "prompt_eval_count"):
        if isinstance(obj, Mapping) and name in obj:
            said[name] = obj[name]
    return said


def _inner(value: Any) -> dict[str, Any]:
    """The same of an object inside: ``response`` of an event, ``message`` of Anthropic's start, ``delta``."""
    found: dict[str, Any] = {}
    for name in ("id", "model", "status", "stop_reason", "finish_reason", "billed_units", "tokens"):
        item = _member(value, name)
        if isinstance(item, (str, Mapping)):
            found[name] = item
    if (usage := _mapping(_member(value, "usage"))) is not None:
        found["usage"] = usage
    if isinstance(value, Mapping):
        found.update({name: item for name, item in value.items() if name.endswith(("TokenCount", "TokensDetails"))})
    return found


def _mapping(value: Any) -> dict[str, Any] | None:
    """A usage object as JSON has it; None where there is none."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return dict(value)
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        dumped = dump(warnings=False)
        return dumped if isinstance(dumped, dict) else None
    try:
        return dict(vars(value))
    except TypeError:
        return None


def _attribute(obj: Any, name: str) -> Any:
    try:
        return getattr(obj, name, None)
    except Exception:  # properties of other people's classes
        return None


def _member(obj: Any, name: str) -> Any:
    return obj.get(name) if isinstance(obj, Mapping) else _attribute(obj, name)


def _read_raw(raw: object, model_call: ModelCall) -> BodyFacts | None:
    """The facts of the provider's own body; None where there is none that we can read."""
    if raw is None:
        return None
    if isinstance(raw, (str, bytes)):
        data = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
        facts = read_body(_URL.get(model_call.kind, "/"), None, data)
        return facts if facts.complete else None
    if isinstance(raw, Mapping):
        return facts_of((raw,))
    dumped = _mapping(raw)
    return facts_of((json.loads(json.dumps(dumped, default=str)),)) if dumped else None


def _generated(response: Any) -> int | None:
    """About how many tokens a whole answer has, for the estimate of one without usage."""
    characters = _generated_characters(response)
    return -(-characters // _CHARACTERS_PER_TOKEN) if characters else None


def _generated_characters(obj: Any) -> int:
    """How many characters the model produced in this answer or chunk: text, reasoning, tool arguments."""
    count = 0
    choices = _member(obj, "choices")
    if isinstance(choices, list):
        for choice in choices:
            count += _length(_member(choice, "text"))
            for holder in (_member(choice, "delta"), _member(choice, "message")):
                if holder is not None:
                    count += _message_characters(holder)
        return count
    delta = _member(obj, "delta")
    if isinstance(delta, str):
        return len(delta)
    if isinstance(delta, Mapping):
        return sum(_length(delta.get(name)) for name in ("text", "partial_json", "thinking"))
    for block in _list(_member(obj, "content")):  # Anthropic's whole answer
        count += sum(_length(_member(block, name)) for name in ("text", "thinking"))
        if (arguments := _member(block, "input")) is not None:
            count += len(str(arguments))
    for item in _list(_member(obj, "output")):  # Responses
        count += _length(_member(item, "arguments"))
        for part in _list(_member(item, "content")):
            count += _length(_member(part, "text"))
    return count


def _message_characters(message: Any) -> int:
    count = sum(_length(_member(message, name)) for name in ("content", "reasoning_content", "refusal"))
    for call in _list(_member(message, "tool_calls")):
        function = _member(call, "function")
        if function is not None:
            count += _length(_member(function, "name")) + _length(_member(function, "arguments"))
    return count


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else 0


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
