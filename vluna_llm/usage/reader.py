"""Reading the usage of a whole response at once."""

from __future__ import annotations

from .body import BodyFacts, read_json_body
from .framing import announced, sniff
from .stream import StreamReader
from .types import TokenUsage


def read_body(url: str, content_type: str | None, body: bytes) -> BodyFacts:
    """Everything that billing wants to know of one whole response: JSON, lines of JSON or an event stream.

    ``body`` is decoded (no content encoding). Never raises: what cannot be read says nothing.
    """
    if announced(content_type) == "unknown" and sniff(body) == "json":
        return read_json_body(url, body)  # what the reader would do in the end, without its copies
    reader = StreamReader(url, content_type)
    reader.feed(body)
    reader.end()
    return BodyFacts(
        usage=reader.usage,
        response_id=reader.response_id,
        model=reader.model,
        finish_reason_seen=reader.finish_reason_seen,
        status=reader.status,
        failed=reader.failed,
        complete=reader.finished,
    )


def read_usage(url: str, content_type: str | None, body: bytes) -> TokenUsage | None:
    """The usage that a response reports, in tokens, under the one meaning of design rule 13; None where none is there.

    Knows Chat Completions, Responses, Embeddings, legacy Completions, Images, Audio, Assistants runs, Anthropic
    Messages, Gemini, Cohere and Ollama, and whoever speaks like one of them; bodies and event streams. Where the places
    and meanings of the numbers are ruled: `vluna_llm.usage.facts` and `vluna_llm.usage.normalize`. A stream that gives
    usage several times means the last; a stream cut off after Anthropic's ``message_start`` has reported none; the
    number of a token-count endpoint is not usage. Never raises on a body, however broken.
    """
    return read_body(url, content_type, body).usage
