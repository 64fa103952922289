"""Google ADK's words in ours: what a request asks for, and what its responses report. No billing rule, and no I/O.

Objects are read by the names of their attributes, so that nothing of the framework is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from ..ending import Ending, generated_tokens
from ..lifecycle import ModelCall
from ..usage import TokenUsage
from ..usage.normalize import normalize_usage

_FAMILIES: Final = (("gemini", "google"), ("gemma", "google"), ("claude", "anthropic"), ("gpt-", "openai"))
_MADE_BY: Final = {"google_llm": "google", "gemma_llm": "google", "anthropic_llm": "anthropic"}
"""The modules of ADK's own models, and whom they ask."""
_FINISHED: Final = ("STOP", "MAX_TOKENS")
"""Finish reasons after which what was generated is an answer; any other is an error of ADK's (``error_code``)."""


# -- before the call ---------------------------------------------------------------------------------------------------


def named(model: Any, asked: str | None = None) -> tuple[str, str]:
    """Provider and model as the feature code has them; LiteLLM's names as LiteLLM's own integration reads them.

    ``asked`` is the model that a request names, which wins over the one that was given to the object.
    """
    name = asked or model.model or type(model).__name__
    modules = [kind.__module__.rpartition(".")[2] for kind in type(model).__mro__]
    if "lite_llm" in modules:
        from ._litellm_models import model_of

        given = getattr(model, "_additional_args", None) or {}
        return model_of({"model": name, "base_url": given.get("api_base") or given.get("base_url")})
    prefix, _, _ = name.partition("/")
    last = name.rpartition("/")[2]
    for module, provider in _MADE_BY.items():
        if module in modules:
            return provider, last
    for family, provider in _FAMILIES:
        if last.startswith(family):
            return provider, last
    return (prefix, name[len(prefix) + 1 :]) if prefix and prefix != name else ("google_adk", name)


def model_call_of(model: Any, request: Any, *, stream: bool) -> ModelCall:
    """The request as an integration knows it; the body is made for the estimate, of the same parts in every run."""
    provider, name = named(model, request.model)
    config = request.config
    body: dict[str, Any] = {"model": name, "contents": [_content(one) for one in request.contents]}
    if (system := getattr(config, "system_instruction", None)) is not None:
        body["systemInstruction"] = system if isinstance(system, str) else _plain(system)
    if tools := [tool for given in getattr(config, "tools", None) or () for tool in _definitions(given)]:
        body["tools"] = tools
    if limit := getattr(config, "max_output_tokens", None):
        body["max_output_tokens"] = limit
    if getattr(config, "thinking_config", None) is not None:
        body["thinking"] = True
    return ModelCall(kind="chat.completions", provider=provider, model=name, body=body, stream=stream)


def _content(content: Any) -> dict[str, Any]:
    return {"role": content.role or "", "content": [item for part in content.parts or () for item in _items(part)]}


def _items(part: Any) -> Iterator[dict[str, Any]]:
    """One part in the shapes that the estimate measures; without ids, which every run makes anew."""
    if part.text:
        yield {"type": "text", "text": part.text}
    if (call := part.function_call) is not None:
        yield {"name": call.name or "", "arguments": _text(call.args)}
    if (answer := part.function_response) is not None:
        yield {"type": "text", "text": _text(answer.response)}
    for held in (part.inline_data, part.file_data):
        if held is not None:
            media = str(held.mime_type or "")
            yield {"type": "image" if media.startswith("image/") else "input_audio" if "audio" in media else "file"}


def _definitions(tool: Any) -> Iterator[dict[str, Any]]:
    declared = getattr(tool, "function_declarations", None)
    if declared is None:
        yield {"type": "built_in"}  # run by the provider, whose description of it is not in sight
    for one in declared or ():
        yield {"type": "function", "function": _plain(one)}


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_none=True) if hasattr(value, "model_dump") else str(value)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str) if value else ""


# -- after it ----------------------------------------------------------------------------------------------------------


def usage_of(metadata: Any) -> TokenUsage | None:
    """What ``usage_metadata`` reports, by Gemini's rule; None where it reports no tokens.

    ADK's LiteLlm puts OpenAI's numbers under Gemini's names: there the thoughts are inside of the candidates, as the
    total tells. What was written to a cache stands beside the model's fields, where a provider knows of it.
    """
    if metadata is None:
        return None
    raw = metadata.model_dump(mode="json", by_alias=True, exclude_none=True)
    thoughts, candidates = raw.get("thoughtsTokenCount") or 0, raw.get("candidatesTokenCount") or 0
    read = (raw.get("promptTokenCount") or 0) + (raw.get("toolUsePromptTokenCount") or 0)
    if thoughts and candidates >= thoughts and raw.get("totalTokenCount") == read + candidates:
        raw["candidatesTokenCount"] = candidates - thoughts
    usage = normalize_usage(raw)
    if usage is None or not usage.total_tokens:
        return None
    written = getattr(metadata, "cache_creation_input_tokens", None)
    if type(written) is int and 0 < written <= usage.input_tokens:
        usage = replace(usage, cache_write_tokens=written)
    return usage


class Seen:
    """What the responses of one call have said so far."""

    def __init__(self, model: Any, *, stream: bool) -> None:
        self._reasons = stream and named(model)[0] == "google"  # a stream of Gemini's that is whole ends with a reason
        self._usage: TokenUsage | None = None
        self._characters = 0
        self._final: Any = None
        self.any = False

    def take(self, response: Any) -> None:
        """The next response: a fragment, or the whole answer at the end of the fragments."""
        self.any = True
        # Each report of a stream counts all that came before it, too.
        self._usage = usage_of(response.usage_metadata) or self._usage
        written = _characters(response.content)
        if response.partial:
            self._characters += written
        else:
            self._final = response
            self._characters = max(self._characters, written)

    def ending(self, how: str) -> Ending:
        """How the answer ended, for a call that is ``complete``, was ``closed``, or broke (``error``)."""
        final = self._final
        reason = getattr(final, "finish_reason", None)
        finished = reason is not None and str(getattr(reason, "value", reason)) in _FINISHED
        failed = final is not None and final.error_code is not None and not finished
        whole = final is not None and not failed and (finished or not self._reasons)
        if how == "error" or (how == "complete" and not whole):
            found: Any = "error"
        else:
            found = "complete" if whole else "closed"
        return Ending(
            how=found,
            usage=self._usage,
            finished=whole,
            finish_reason_seen=whole,
            failed=failed,
            output_tokens=None if self._usage is not None else generated_tokens(self._characters),
            response_id=getattr(final, "interaction_id", None),
            model=getattr(final, "model_version", None),
        )


def _characters(content: Any) -> int:
    """About how much the model has written: text, thoughts, and the arguments of its calls."""
    count = 0
    for part in getattr(content, "parts", None) or ():
        count += len(part.text or "")
        if (call := part.function_call) is not None:
            count += len(call.name or "") + len(_text(call.args))
    return count
