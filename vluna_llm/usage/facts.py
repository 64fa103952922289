"""What one decoded JSON object of a provider says: where its usage stands, who it is, whether it is the end.

The object is a whole body or one event of a stream. Nothing is searched for: usage is read only from the places where
providers put it, so that a model that writes about usage cannot change a bill.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

TERMINAL_EVENTS: Final = frozenset(
    {
        "response.completed",
        "response.incomplete",
        "response.failed",
        "response.cancelled",
        "message_stop",
        "message-end",
        "transcript.text.done",
        "speech.audio.done",
        "image_generation.completed",
        "image_edit.completed",
    }
)
"""Event types that end a stream by protocol: Responses, Anthropic, Cohere, and OpenAI's audio and image streams."""

FAILED_STATUSES: Final = ("failed", "cancelled")
FAILED_EVENTS: Final = ("error", "response.failed", "response.cancelled")
_FINISHED_STATUSES: Final = ("completed", "incomplete")


def usage_object(obj: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The usage object inside a body or an event, or None.

    Places, in this order (the first that is an object with members wins, so that Groq's second copy in ``x_groq`` is
    not counted again): ``usage`` (OpenAI and whoever follows it, Anthropic's bodies and ``message_delta``),
    ``response.usage`` (Responses events), ``x_groq.usage`` (Groq, where ``include_usage`` was not asked for),
    ``delta.usage`` (Cohere's ``message-end``), ``usageMetadata`` (Gemini), ``meta`` (Cohere v1),
    and Ollama's counts, which stand at the top of the last line.

    Anthropic's ``message_start`` is not one of them: its usage is neither final nor cumulative (`start_usage`).
    """
    found = _mapping(obj.get("usage"))
    if found:
        return found
    for outer in ("response", "x_groq", "delta"):
        if (holder := _mapping(obj.get(outer))) and (found := _mapping(holder.get("usage"))):
            return found
    for name in ("usageMetadata", "usage_metadata"):
        if found := _mapping(obj.get(name)):
            return found
    if (meta := _mapping(obj.get("meta"))) and ("billed_units" in meta or "tokens" in meta):
        return meta
    if obj.get("eval_count") is not None or obj.get("prompt_eval_count") is not None:
        return {name: obj[name] for name in ("prompt_eval_count", "eval_count") if name in obj}
    return None


def start_usage(obj: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The usage of Anthropic's ``message_start``: the input is known, the output is not."""
    if obj.get("type") != "message_start":
        return None
    message = _mapping(obj.get("message"))
    return _mapping(message.get("usage")) if message else None


def is_error(obj: Mapping[str, Any]) -> bool:
    """Whether this is an error: ``error`` that is not null, ``type: error``, or a response that failed."""
    if obj.get("error") or obj.get("type") in FAILED_EVENTS:
        return True
    if obj.get("object") == "response" and obj.get("status") in FAILED_STATUSES:
        return True
    return any(
        isinstance(choice, dict) and (choice.get("finish_reason") == "error" or choice.get("error"))
        for choice in _list(obj.get("choices"))
    )


def has_finish_reason(obj: Mapping[str, Any]) -> bool:
    """Whether a finish reason stands in this object: the model has stopped, whatever is still to come.

    OpenAI ``choices[].finish_reason``; Anthropic ``stop_reason`` (body, or ``delta`` of ``message_delta``); Gemini
    ``candidates[].finishReason``; Ollama ``done``; Cohere ``finish_reason``; Responses: a final ``status``. A response
    that failed has ended, and the model has not finished: nothing is owed but what was reported.
    """
    for choice in _list(obj.get("choices")):
        if isinstance(choice, dict) and choice.get("finish_reason"):
            return True
    if obj.get("stop_reason") or obj.get("finish_reason") or obj.get("done") is True:
        return True
    if (delta := _mapping(obj.get("delta"))) and (delta.get("stop_reason") or delta.get("finish_reason")):
        return True
    for candidate in _list(obj.get("candidates")):
        if isinstance(candidate, dict) and candidate.get("finishReason"):
            return True
    if is_terminal(obj):
        return obj.get("type") not in FAILED_EVENTS
    return obj.get("object") == "response" and obj.get("status") in _FINISHED_STATUSES


def is_terminal(obj: Mapping[str, Any]) -> bool:
    """Whether this event is the protocol's own end: by its type, or Ollama's ``done``."""
    kind = obj.get("type")
    return (isinstance(kind, str) and kind in TERMINAL_EVENTS) or obj.get("done") is True


def is_usage_only(obj: Mapping[str, Any]) -> bool:
    """Whether this is the extra chunk that ``include_usage`` adds: ``choices`` is an empty list and usage an object.

    Azure's first chunk (empty choices, ``prompt_filter_results``, no usage) is not; a chunk with choices and usage
    is not either (source: OpenAI API reference, ``stream_options.include_usage``; the rest *observed*).
    """
    return obj.get("choices") == [] and bool(_mapping(obj.get("usage"))) and not obj.get("error")


def identity(obj: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Response id and model, each None where the object has none (or an empty one, as Azure's first chunk)."""
    inner = _mapping(obj.get("response")) or _mapping(obj.get("message")) or {}
    response_id = obj.get("id") or obj.get("responseId") or inner.get("id")
    model = obj.get("model") or obj.get("modelVersion") or inner.get("model")
    return (
        response_id if isinstance(response_id, str) and response_id else None,
        model if isinstance(model, str) and model else None,
    )


def generated_characters(obj: Mapping[str, Any]) -> int:
    """How many characters the model produced in this event: text, reasoning, refusals and tool arguments."""
    count = 0
    for choice in _list(obj.get("choices")):
        if isinstance(choice, dict):
            count += _text(choice, "text")
            if delta := _mapping(choice.get("delta")):
                count += _text(delta, "content", "reasoning_content", "reasoning", "refusal")
                for call in _list(delta.get("tool_calls")):
                    if isinstance(call, dict) and (function := _mapping(call.get("function"))):
                        count += _text(function, "name", "arguments")
    delta = obj.get("delta")
    if isinstance(delta, str):  # Responses: response.output_text.delta, response.function_call_arguments.delta, ...
        count += len(delta)
    elif isinstance(delta, dict):  # Anthropic's content_block_delta, Cohere's content-delta
        count += _text(delta, "text", "partial_json", "thinking")
        if (message := _mapping(delta.get("message"))) and (content := _mapping(message.get("content"))):
            count += _text(content, "text", "thinking")
    for candidate in _list(obj.get("candidates")):
        if isinstance(candidate, dict) and (content := _mapping(candidate.get("content"))):
            count += sum(_text(part, "text") for part in _list(content.get("parts")) if isinstance(part, dict))
    if (message := _mapping(obj.get("message"))) and isinstance(message.get("content"), str):
        count += _text(message, "content", "thinking")
    return count


def _text(holder: Mapping[str, Any], *names: str) -> int:
    return sum(len(value) for name in names if isinstance(value := holder.get(name), str))


def _mapping(value: object) -> Mapping[str, Any] | None:
    return value if isinstance(value, dict) and value else None


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
