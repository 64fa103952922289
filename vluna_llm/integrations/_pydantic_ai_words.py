"""Pydantic AI's words in ours: what a request asks for, and what an answer reports. No billing rule, and no I/O.

Objects are read by the names of their attributes, so that nothing of the framework is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from ..ending import Ending, generated_tokens
from ..lifecycle import ModelCall
from ..usage import TokenUsage
from ..usage.normalize import normalize_usage
from ._openai_endpoints import provider_of

_SYSTEMS: Final = {
    "google-gla": "google",
    "google-vertex": "google",
    "google-cloud": "google",
    "openai-chat": "openai",
    "openai-responses": "openai",
}
"""Systems of Pydantic AI under the name that a metered client gives the same provider."""


# -- before the call ---------------------------------------------------------------------------------------------------


def model_call_of(model: Any, messages: Sequence[Any], settings: Any, parameters: Any, *, stream: bool) -> ModelCall:
    """The request as an integration knows it; the body is made for the estimate, of the same parts in every run."""
    responses = "responses" in type(model).__name__.lower()
    return ModelCall(
        kind="responses" if responses else "chat.completions",
        provider=provider_name(model),
        model=model.model_name or "default",
        body=_body(model.model_name, messages, settings or {}, parameters),
        stream=stream,
    )


def provider_name(model: Any) -> str:
    """The first part of the feature code: a host that is known, else what Pydantic AI calls the provider."""
    host = urlsplit(model.base_url or "").hostname or ""
    known = provider_of(host)
    if known != "openai":
        return known
    system: str = model.system
    return _SYSTEMS.get(system, system)


def _body(model_name: str, messages: Sequence[Any], settings: Mapping[str, Any], parameters: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model_name, "messages": [_message(message) for message in messages]}
    if instructions := _instructions(messages, parameters):
        body["instructions"] = instructions
    tools: list[dict[str, Any]] = []
    for tool in (*parameters.function_tools, *parameters.output_tools):
        function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters_json_schema}
        tools.append({"type": "function", "function": function})
    tools.extend({"type": native.kind} for native in parameters.native_tools)
    if tools:
        body["tools"] = tools
    if parameters.output_mode == "native" and parameters.output_object is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": parameters.output_object.json_schema}
    for name, called in (("max_tokens", "max_tokens"), ("thinking", "thinking"), ("openai_reasoning_effort", None)):
        if settings.get(name):
            body[called or "reasoning_effort"] = settings[name]
    return body


def _instructions(messages: Sequence[Any], parameters: Any) -> str | None:
    parts = getattr(parameters, "instruction_parts", None)
    if parts:
        return "\n\n".join(part.content for part in parts)
    found: str | None = next((said for m in reversed(messages) if (said := getattr(m, "instructions", None))), None)
    return found


def _message(message: Any) -> dict[str, Any]:
    return {"role": message.kind, "content": [item for part in message.parts for item in _items(part)]}


def _items(part: Any) -> Iterator[dict[str, Any]]:
    """One part of a message in the shapes that the estimate measures; without ids, which every run makes anew."""
    kind = part.part_kind
    if kind.endswith("tool-call"):
        args = part.args
        text = args if isinstance(args, str) else json.dumps(args, sort_keys=True, default=str) if args else ""
        yield {"name": part.tool_name, "arguments": text}
        return
    content = getattr(part, "content", None)
    if isinstance(content, str):
        yield {"type": "text", "text": content}
    elif kind.endswith("tool-return"):
        yield {"type": "text", "text": part.model_response_str()}
    elif isinstance(content, Iterable):
        for item in content:
            yield from _piece(item)
    elif content is not None:
        yield from _piece(content)


def _piece(item: Any) -> Iterator[dict[str, Any]]:
    """A piece of what a user said: text, or a file by its kind. Files are not read."""
    if isinstance(item, str):
        yield {"type": "text", "text": item}
        return
    kind = getattr(item, "kind", None)
    media = str(getattr(item, "media_type", "") or "") if kind in ("binary", "uploaded-file") else ""
    if kind == "image-url":
        yield {"type": "image_url", "image_url": {"url": item.url}}
    elif media.startswith("image/"):
        yield {"type": "image"}
    elif kind == "audio-url" or media.startswith("audio/"):
        yield {"type": "input_audio"}
    elif kind in ("document-url", "video-url", "binary", "uploaded-file"):
        yield {"type": "file"}
    elif isinstance(text := getattr(item, "content", None), str):
        yield {"type": "text", "text": text}


# -- after it ----------------------------------------------------------------------------------------------------------


def usage_of(usage: Any) -> TokenUsage | None:
    """What the provider reported; None where it reported nothing.

    Pydantic AI has brought every provider's numbers into one meaning, which is ours: the input includes what was read
    from and written to a cache, the output includes reasoning (`pydantic_ai.usage.UsageBase`). An answer without usage
    says so (``unmeasured_requests``), or its counts are 0.
    """
    if getattr(usage, "unmeasured_requests", 0) or not usage.total_tokens:
        return None
    reasoning = getattr(usage, "output_reasoning_tokens", 0) or usage.details.get("reasoning_tokens", 0)
    return normalize_usage(
        {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cache_read_tokens,
                "cache_write_tokens": usage.cache_write_tokens,
                "audio_tokens": usage.input_audio_tokens,
            },
            "output_tokens_details": {"reasoning_tokens": reasoning, "audio_tokens": usage.output_audio_tokens},
        }
    )


def ending_of(response: Any) -> Ending:
    """How a whole answer ended."""
    usage = usage_of(response.usage)
    failed = response.finish_reason == "error"
    return Ending(
        how="complete",
        usage=usage,
        finished=not failed,
        finish_reason_seen=not failed,
        failed=failed,
        output_tokens=None if usage is not None else tokens_of(response),
        response_id=response.provider_response_id,
        model=response.model_name,
    )


def stream_ending_of(stream: Any, how: Literal["complete", "closed", "error"]) -> Ending:
    """How a stream ended: completion is read from the model's finish reason, never from the end of its bytes."""
    reason = stream.finish_reason
    seen = reason is not None and reason != "error"
    # OpenAI's chat streams are given the reason "stop" where none came, and know that they made it up.
    if how == "complete" and getattr(stream, "_has_finish_reason", True) is False and reason == "stop":
        seen = False
    usage = usage_of(stream.usage)
    if usage is not None and not seen and how != "complete" and _counts_provisionally(stream):
        usage = None
    return Ending(
        how="error" if how == "complete" and not seen else how,
        usage=usage,
        finished=how == "complete" and seen,
        finish_reason_seen=seen,
        failed=reason == "error",
        output_tokens=None if usage is not None else tokens_of(stream.get()),
        response_id=stream.provider_response_id,
        model=stream.model_name,
    )


def _counts_provisionally(stream: Any) -> bool:
    """Whether what a stream reports before its end is neither final nor cumulative: Anthropic's ``message_start``."""
    return any(kind.__module__.startswith("pydantic_ai.models.anthropic") for kind in type(stream).__mro__)


def tokens_of(response: Any) -> int:
    """About how many tokens the model has produced."""
    characters = 0
    for part in response.parts:
        for name in ("content", "args"):
            value = getattr(part, name, None)
            if isinstance(value, str):
                characters += len(value)
            elif isinstance(value, dict):
                characters += len(json.dumps(value, default=str))
    return generated_tokens(characters)
