"""What a call through LiteLLM cost: its objects brought into the shapes that our readers know (design rule 13).

LiteLLM puts every provider's usage into objects of its own, mostly `litellm.Usage`: OpenAI's names, Anthropic's cached
tokens added into the input, and what the provider sent beside. They are read by the one normaliser; before that, what
LiteLLM counted itself is taken out, since it is not the provider's report:

* ``0 / 0 / 0`` is what an answer without usage is given;
* the reasoning tokens of Anthropic's models are counted from the text that is shown (1.83: always; 1.106: where the
  answer does not say; both: Bedrock's Converse, which never says);
* some providers report no usage at all, and all of it is LiteLLM's tokenizer (`_counted_here`).

LiteLLM's objects also lose numbers: all of a transcription's usage, the reasoning that Anthropic reports (1.83), the
usage of Groq's streams; and 1.106 adds the steps of Anthropic's server-side loops into the totals once more. So the
provider's own body wins wherever LiteLLM has shown it (``raw``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from ..ending import Ending, generated_tokens
from ..lifecycle import ModelCall
from ..usage import BodyFacts, StreamReader, TokenUsage, make_reader, read_body
from ..usage.body import facts_of
from ..usage.events import EventReader
from ..usage.facts import has_finish_reason, identity, is_error
from ..usage.normalize import normalize_usage
from ._litellm_models import model_call_of, model_of
from ._litellm_objects import generated_characters, member, plain, said_by

__all__ = [
    "ChunkReader",
    "answer_shown",
    "chunk_usage",
    "costs_nothing",
    "ending_of",
    "model_call_of",
    "model_of",
    "pending",
    "spent",
    "tokens_in",
    "usage_of",
]

_COUNTED_HERE: Final = frozenset(
    {"a2a", "a2a_agent", "langflow", "langgraph", "petals", "predibase", "replicate", "sagemaker"}
)
_COUNTED_AGENTS: Final = ("agents/", "agentcore/", "agent_engine/")
_COUNTED_EMBEDDINGS: Final = frozenset({"google", "huggingface", "triton"})

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

    An answer without usage that is an error costs nothing; any other was paid for and will be estimated.

    Args:
        response: what LiteLLM's function returned: an object of LiteLLM's or of an SDK, or a dict.
        model_call: the call that it answers.
        raw: the provider's own body, where LiteLLM has shown it (``original_response`` in `log_post_api_call`). What
            it reports is the report; where it is in a shape whose usage we know, and has none, none was reported.
    """
    body = _read_raw(raw, model_call)
    if body is not None and (body.usage is not None or (body.finish_reason_seen and not _in_headers(model_call))):
        said = said_by(response, usage=False)
        usage = body.usage
    else:
        said = _without_total(said_by(response))
        usage = _usage_in(said.get("usage"), model_call)
    failed = is_error(said)
    characters = generated_characters(response) if usage is None else 0
    response_id, model = identity(said)
    return Ending(
        how="complete",
        usage=usage,
        finished=True,
        finish_reason_seen=not failed or usage is not None,
        failed=failed,
        output_tokens=generated_tokens(characters) if characters else None,
        # LiteLLM makes up an id where the provider's was lost.
        response_id=(body.response_id if body is not None else None) or response_id,
        model=(body.model if body is not None else None) or model,
    )


def answer_shown(shown: object, before: object) -> object:
    """The provider's answer, of what LiteLLM shows as ``original_response`` one after the other in one call.

    It also shows coroutines, and the text of an exception of its own that came after the answer.
    """
    if isinstance(shown, (str, bytes)):
        begins = shown[:64].lstrip()[:1]
        return shown if begins in ("{", "[", b"{", b"[") else before
    return before if shown is None or member(shown, "usage") is None else shown


def spent(raw: object, model_call: ModelCall) -> Ending | None:
    """The ending of a call that LiteLLM failed although the provider had answered; None where nothing shows that.

    LiteLLM cannot make an answer of everything that providers send, and raises then: what was reported was spent
    (design rule 4). The body of a provider's error reports nothing.
    """
    body = _read_raw(raw, model_call)
    if body is None or body.usage is None:
        return None
    return Ending(
        how="complete",
        usage=body.usage,
        finished=True,
        finish_reason_seen=True,
        failed=True,
        response_id=body.response_id,
        model=body.model,
    )


def usage_of(usage: Any, model_call: ModelCall) -> TokenUsage | None:
    """One usage object of LiteLLM's, of an SDK or of a provider; None where the provider reported nothing."""
    return _usage_in(plain(usage), model_call)


def _usage_in(raw: object, model_call: ModelCall) -> TokenUsage | None:
    if not isinstance(raw, Mapping) or not _reported(raw, model_call):
        return None
    return normalize_usage(_without_counting(raw))


def tokens_in(response: Any) -> int | None:
    """About how many tokens the model has produced in this answer; None where that cannot be told."""
    return generated_tokens(generated_characters(response)) or None


def costs_nothing(response: Any, raw: object = None, kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether no provider was paid for this answer: it came out of LiteLLM's cache.

    LiteLLM marks an answer as cached, too, of which only a part came from the cache (embeddings of many inputs):
    where a provider's body was seen (``raw``), one was paid, and its body says how much.
    """
    if raw is not None:
        return False
    if getattr(response, "custom_llm_provider", None) == "cached_response":  # a stream out of the cache
        return True
    hidden = getattr(response, "_hidden_params", None)
    if member(hidden, "cache_hit") is True or member(hidden, "cache_key"):  # 1.83 marks a text completion by the key
        return True
    # An Anthropic message is a plain dict and bears no mark: the call's logging object does, where one was handed on.
    logging = None if kwargs is None else kwargs.get("litellm_logging_obj")
    return member(getattr(logging, "caching_details", None), "cache_hit") is True


def pending(response: Any) -> bool:
    """Whether the provider works on in the background: usage comes with a later retrieve."""
    return member(response, "object") == "response" and member(response, "status") in ("queued", "in_progress")


# -- streams -----------------------------------------------------------------------------------------------------------


def chunk_usage(chunk: Any, model_call: ModelCall) -> TokenUsage | None:
    """The usage that one chunk of a stream reports by itself, final or cumulative; None where it reports none.

    A stream of Anthropic's spreads its usage over two chunks: `ChunkReader` puts them together.
    """
    reader = ChunkReader(model_call)
    reader.read(chunk)
    return reader.usage


class ChunkReader(EventReader):
    """Takes the items of one stream, as a provider's SDK or LiteLLM made them, and keeps what they have reported.

    Items are chunks and events as objects or dicts, or the bytes and lines of an event stream. The attributes are
    those of `EventReader`.
    """

    __slots__ = ("_bytes", "_call", "_half")

    def __init__(self, model_call: ModelCall) -> None:
        super().__init__(_URL.get(model_call.kind, "/"))
        self._call = model_call
        self._half: Mapping[str, Any] | None = None  # usage that LiteLLM made of Anthropic's message_start
        self._bytes: StreamReader | None = None

    @property
    def output_characters(self) -> int:
        """About how many characters the model has produced so far."""
        return self._characters + (self._bytes.output_characters if self._bytes is not None else 0)

    @property
    def output_tokens(self) -> int:
        """About how many tokens that is."""
        return generated_tokens(self.output_characters)

    def read(self, item: Any) -> bool:
        """Read the next item; True where usage, finish, failure or the end became known with it."""
        before = (self.usage, self.finished, self.finish_reason_seen, self.failed)
        if isinstance(item, (bytes, bytearray, str)):
            self._read_bytes(item.encode() if isinstance(item, str) else bytes(item))
        else:
            self._characters += generated_characters(item)
            self.read_object(said_by(item))
        return before != (self.usage, self.finished, self.finish_reason_seen, self.failed)

    def ending(self, how: Literal["complete", "closed", "error", "abandoned"]) -> Ending:
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
            self._bytes = make_reader(self._url, "text/event-stream")
        reader = self._bytes
        reader.feed(data)
        self.usage, self.provisional_usage = reader.usage, reader.provisional_usage
        self.finished, self.finish_reason_seen = reader.finished, reader.finish_reason_seen
        self.failed, self.status = reader.failed, reader.status
        self.response_id, self.model = reader.response_id, reader.model

    def _read_usage(self, obj: Mapping[str, Any]) -> None:
        raw = obj.get("usage")
        if not isinstance(raw, Mapping):
            super()._read_usage(obj)
        elif not _reported(raw, self._call):
            pass
        elif not _is_converted_anthropic(raw):
            super()._read_usage(obj)
        elif self.usage is None and not self.finish_reason_seen and not has_finish_reason(obj):
            self._half = raw  # made of message_start: the input is known, the output is not
            self.provisional_usage = normalize_usage(_without_counting(raw))
        else:
            self._take(normalize_usage(_without_counting(_both_halves(self._half, raw))))


# -- what LiteLLM does to usage ----------------------------------------------------------------------------------------


def _reported(raw: Mapping[str, Any], model_call: ModelCall) -> bool:
    """Whether a usage object is a report of the provider's, and not LiteLLM's zeros or its own counting."""
    return _any_number(raw) and not _counted_here(model_call)


def _counted_here(model_call: ModelCall) -> bool:
    """Whether LiteLLM's usage for such a call comes from its own tokenizer (read in both lines' sources)."""
    if model_call.kind == "embeddings":
        return model_call.provider in _COUNTED_EMBEDDINGS
    return model_call.provider in _COUNTED_HERE or model_call.model.startswith(_COUNTED_AGENTS)


def _in_headers(model_call: ModelCall) -> bool:
    """Whether a body without usage proves nothing: Bedrock counts the tokens of many models in its headers."""
    return model_call.provider == "bedrock"


def _any_number(raw: Mapping[str, Any]) -> bool:
    for value in raw.values():
        if isinstance(value, Mapping):
            if _any_number(value):
                return True
        elif value and isinstance(value, (int, float)):
            return True
    return False


def _is_converted_anthropic(raw: Mapping[str, Any]) -> bool:
    """Whether LiteLLM made this of Anthropic's usage: OpenAI's names, and both of Anthropic's cache counts beside."""
    return "prompt_tokens" in raw and "cache_creation_input_tokens" in raw and "cache_read_input_tokens" in raw


def _without_counting(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take out the reasoning tokens that LiteLLM counts for Anthropic's models: the text it sees is a summary."""
    details = raw.get("completion_tokens_details")
    if not _is_converted_anthropic(raw) or not isinstance(details, Mapping) or not details.get("reasoning_tokens"):
        return raw
    return {**raw, "completion_tokens_details": {**details, "reasoning_tokens": None}}


def _without_total(said: dict[str, Any]) -> dict[str, Any]:
    """Take the total out of an Anthropic message: it has none of its own.

    1.83's logging writes one into the caller's answer, maybe before we read it, and leaves the cached tokens out of it
    (*observed*: input 2, read 11131, written 18, output 88, "total" 90).
    """
    usage = said.get("usage")
    if said.get("type") == "message" and isinstance(usage, dict) and "input_tokens" in usage:
        usage.pop("total_tokens", None)
    return said


def _both_halves(start: Mapping[str, Any] | None, delta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Both halves of an Anthropic stream's usage, each converted by itself (1.83; 1.106 does it before it converts).

    The second has the output, and the input only where the model is new enough to repeat it there.
    """
    if start is None or delta.get("prompt_tokens"):
        return delta
    inputs = {name: value for name, value in start.items() if not name.startswith("completion_tokens")}
    return {**delta, **inputs, "total_tokens": None}


# -- the provider's own body -------------------------------------------------------------------------------------------


def _read_raw(raw: object, model_call: ModelCall) -> BodyFacts | None:
    """The facts of the provider's own body; None where there is none, or none that can be read."""
    if isinstance(raw, (str, bytes)):
        data = raw.encode("utf-8", "replace") if isinstance(raw, str) else raw
        facts = read_body(_URL.get(model_call.kind, "/"), None, data)
        return facts if facts.complete else None
    if raw is None or member(raw, "usage") is None:
        return None
    return facts_of((said_by(raw),))
