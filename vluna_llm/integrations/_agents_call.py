"""One call of a model of the OpenAI Agents SDK: what is known of it before, and what its answer says it used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Final, cast
from urllib.parse import urlsplit

from ..ending import Ending, generated_tokens
from ..lifecycle import ModelCall
from ..usage.events import EventReader
from ..usage.normalize import normalize_usage
from ..usage.types import TokenUsage
from ._openai_endpoints import provider_of
from ._openai_usage_option import REFUSERS, is_refusal

_NO_ID: Final = "__fake_id__"
"""What the SDK puts where an API gives its answers no id of the kind that Responses have."""
_LITELLM: Final = "agents.extensions.models.litellm_model"
_ADAPTERS: Final = "agents.extensions.models."
_SETTINGS: Final = 2
"""Where ``model_settings`` stand among the positional arguments of ``stream_response``."""
_TERMINAL: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})
_ERRORS: Final = frozenset({"error", "response.error"})


# -- before it ---------------------------------------------------------------------------------------------------------


def named(model: Any) -> tuple[str, str]:
    """Provider and model as the feature code has them, of any model object of the SDK.

    LiteLLM's names are read as LiteLLM's own integration reads them. Of others the host of an OpenAI client decides,
    then a prefix (``anthropic/claude-...``); a model without any of these counts as OpenAI's.
    """
    given = next((name for one in ("model", "model_name") if isinstance(name := getattr(model, one, None), str)), "")
    name = given or type(model).__name__
    if any(kind.__module__ == _LITELLM for kind in type(model).__mro__):
        from ._litellm_models import model_of

        return model_of({"model": name, "base_url": getattr(model, "base_url", None)})
    base_url = getattr(getattr(model, "_client", None), "base_url", None)
    if base_url is not None:
        return provider_of(urlsplit(str(base_url)).hostname or ""), name
    prefix, slash, rest = name.partition("/")
    return (prefix, rest) if slash and prefix and rest else ("openai", name)


def model_call_of(model: Any, request: Mapping[str, Any], *, stream: bool) -> ModelCall:
    """What is known of a call before it is made.

    Args:
        model: the model that will be called.
        request: the arguments of ``get_response`` or ``stream_response``, by name.
        stream: whether events are asked for.
    """
    provider, name = named(model)
    settings = request.get("model_settings")
    tools = [_definition(tool) for tool in (*(request.get("tools") or ()), *(request.get("handoffs") or ()))]
    body: dict[str, Any] = {
        "model": name,
        "instructions": request.get("system_instructions"),
        "input": _plain(request.get("input")),
        "tools": tools,
        "max_output_tokens": getattr(settings, "max_tokens", None),
    }
    return ModelCall(
        "responses", provider, name, {key: value for key, value in body.items() if value not in (None, [])}, stream
    )


def asking_usage(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """The arguments of a stream with ``include_usage`` asked for; None where that is decided, or none of the API's.

    The SDK's adapters of Chat Completions ask for it where ``ModelSettings`` say so.
    """
    settings = args[_SETTINGS] if len(args) > _SETTINGS else kwargs.get("model_settings")
    if getattr(settings, "include_usage", True) is not None or not type(model).__module__.startswith(_ADAPTERS):
        return None
    if _upstream(model) in REFUSERS:
        return None
    asking = replace(cast(Any, settings), include_usage=True)
    if len(args) > _SETTINGS:
        return (*args[:_SETTINGS], asking, *args[_SETTINGS + 1 :]), kwargs
    return args, {**kwargs, "model_settings": asking}


def refused_option(model: Any, error: BaseException) -> bool:
    """Whether the upstream does not know ``include_usage``; from now on it is not asked."""
    status = getattr(error, "status_code", None)
    if not isinstance(status, int) or not is_refusal(status, str(error)):
        return False
    REFUSERS.add(_upstream(model))
    return True


def _upstream(model: Any) -> str:
    return f"agents:{getattr(model, 'base_url', None)}:{getattr(model, 'model', None)}"


def _plain(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [item.model_dump(exclude_unset=True) if hasattr(item, "model_dump") else item for item in value]


def _definition(tool: Any) -> dict[str, Any]:
    """A tool or a handoff, as large as the model will read it."""
    name = getattr(tool, "tool_name", None) or getattr(tool, "name", None) or type(tool).__name__
    description = getattr(tool, "tool_description", None) or getattr(tool, "description", None) or ""
    schema = getattr(tool, "params_json_schema", None) or getattr(tool, "input_json_schema", None)
    if schema is None:
        return {"type": str(name)}  # one of the provider's own: it brings a description of unknown length
    return {"type": "function", "name": name, "description": description, "parameters": schema}


# -- after it ----------------------------------------------------------------------------------------------------------


def ending_of(response: Any) -> Ending:
    """The ending of a whole answer (``ModelResponse``)."""
    usage = usage_of(getattr(response, "usage", None))
    response_id = getattr(response, "response_id", None)
    return Ending(
        how="complete",
        usage=usage,
        finished=True,
        finish_reason_seen=True,
        output_tokens=None
        if usage is not None
        else generated_tokens(_characters(getattr(response, "output", ()))) or None,
        response_id=response_id if response_id != _NO_ID else None,
    )


def usage_of(usage: Any) -> TokenUsage | None:
    """The SDK's ``Usage`` (or the ``ResponseUsage`` of an event); None where it holds no tokens.

    The SDK fills in zeros where a provider reported nothing, and no answer costs nothing.
    """
    raw = _mapping(usage)
    counts = {name: raw[name] for name in ("input_tokens", "output_tokens", "total_tokens") if raw.get(name)}
    if not counts:
        return None
    for name in ("input_tokens_details", "output_tokens_details"):
        if details := _mapping(raw.get(name)):
            counts[name] = details
    return normalize_usage({"input_tokens": 0, "output_tokens": 0, **counts})


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "model_dump"):
        dumped: dict[str, Any] = value.model_dump()
        return dumped
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in fields(value)}
    return {}


def _characters(output: Iterable[Any]) -> int:
    """About how much a model wrote: its messages, its refusals and the arguments of its tool calls."""
    count = 0
    for item in output or ():
        whole = _mapping(item)
        parts: list[Any] = [whole, *(whole.get("content") or ()), *(whole.get("summary") or ())]
        for part in parts:
            if isinstance(part, Mapping):
                texts = (part.get(name) for name in ("text", "refusal", "arguments", "name"))
                count += sum(len(text) for text in texts if isinstance(text, str))
    return count


class EventItems(EventReader):
    """Takes the events of ``stream_response`` and keeps what they have reported, as `vluna_llm._tap_watch` reads it."""

    __slots__ = ("_framing",)

    def __init__(self) -> None:
        super().__init__("/responses")
        self._framing = "sse"  # the end of such a stream is in its events, never in there being no more of them

    @property
    def output_characters(self) -> int:
        """About how many characters the model has produced so far."""
        return self._characters

    def end(self) -> None:
        """Nothing is held back."""

    def take(self, event: Any) -> bool:
        """Read the next event; True where it ends the answer."""
        kind = _member(event, "type")
        if isinstance(delta := _member(event, "delta"), str):
            self._characters += len(delta)
            return False
        if kind in _ERRORS:
            self.failed = True
            return False
        response = _member(event, "response")
        if response is None:
            return False
        response_id = _member(response, "id")
        if isinstance(response_id, str) and response_id != _NO_ID:
            self.response_id = response_id
        if kind not in _TERMINAL:
            return False
        self.usage = usage_of(_member(response, "usage")) or self.usage
        self.finished = True
        self.failed = self.failed or kind == "response.failed"
        self.finish_reason_seen = kind != "response.failed"
        return True


def _member(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
