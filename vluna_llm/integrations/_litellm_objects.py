"""LiteLLM's, the OpenAI SDK's and a provider's objects, as the JSON that our readers know.

Only what billing reads is brought over: an answer may be long, and its text is nobody's business here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_SCALARS: Final = ("type", "object", "id", "model", "status", "stop_reason", "finish_reason", "done")
_HOLDERS: Final = ("message", "response", "delta", "x_groq", "meta")
_INNER: Final = ("id", "model", "status", "stop_reason", "finish_reason")
_PLACES: Final = ("usage", "usageMetadata", "usage_metadata", "billed_units", "tokens")
_COUNTS: Final = ("eval_count", "prompt_eval_count")
_Names = tuple[str, ...]
_OF_CHAT: Final[tuple[_Names, _Names, _Names]] = (("id", "model", "object"), ("usage",), ("x_groq",))
_OF_ALL: Final[tuple[_Names, _Names, _Names]] = (_SCALARS, _PLACES, _HOLDERS)
"""What is looked for: a chat chunk comes for every word, and asking a pydantic object for what it has not is slow."""


def said_by(obj: Any, *, usage: bool = True) -> dict[str, Any]:
    """What a whole answer, a chunk or an event says of itself: who, how it ended, its ``usage`` where that is asked."""
    said: dict[str, Any] = {}
    choices = member(obj, "choices")
    scalars, places, holders = _OF_CHAT if isinstance(choices, list) else _OF_ALL
    if not usage:  # a chat answer has nothing else in its holder
        places, holders = (), () if isinstance(choices, list) else holders
    for name in scalars:
        value = member(obj, name)
        if value is not None and isinstance(value, (str, bool, int)):
            said[name] = value
    if member(obj, "error"):
        said["error"] = True
    for name in places:
        if (value := member(obj, name)) is not None and (found := plain(value)):
            said[name] = found
    for name in holders:
        value = member(obj, name)
        if value is None or isinstance(value, (str, bytes)):
            continue
        if inner := _inside(value):
            said[name] = inner
    if isinstance(choices, list):
        said["choices"] = [{"finish_reason": member(choice, "finish_reason")} for choice in choices if choice]
    if isinstance(obj, Mapping):
        said.update({name: obj[name] for name in _COUNTS if name in obj})
    return said


def _inside(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _INNER:
        item = member(value, name)
        if isinstance(item, str):
            found[name] = item
    for name in _PLACES:
        item = member(value, name)
        if item is not None and (usage := plain(item)):
            found[name] = usage
    return found


def plain(value: Any) -> Any:
    """An object as JSON has it: pydantic models become dicts, all the way down."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    dump = attribute(value, "model_dump")
    if callable(dump):
        return dump(warnings=False)
    try:
        return {name: plain(item) for name, item in vars(value).items() if not name.startswith("_")}
    except TypeError:
        return None


def attribute(obj: Any, name: str) -> Any:
    """The attribute; None where there is none, or where a property of somebody's class fails."""
    try:
        return getattr(obj, name, None)
    except Exception:
        return None


def member(obj: Any, name: str) -> Any:
    """The member of a mapping, or the attribute of an object."""
    return obj.get(name) if isinstance(obj, Mapping) else attribute(obj, name)


def generated_characters(obj: Any) -> int:
    """How many characters the model produced in this answer or chunk: text, reasoning, refusals, tool arguments."""
    choices = member(obj, "choices")
    if isinstance(choices, list):
        return sum(_in_choice(choice) for choice in choices)
    delta = member(obj, "delta")
    if isinstance(delta, str):  # Responses: response.output_text.delta, response.function_call_arguments.delta, ...
        return len(delta)
    if isinstance(delta, Mapping):  # Anthropic's content_block_delta
        return _lengths(delta, "text", "partial_json", "thinking")
    count = _lengths(obj, "text")
    for block in _list(member(obj, "content")):  # Anthropic's whole answer
        count += _lengths(block, "text", "thinking")
        if (arguments := member(block, "input")) is not None:
            count += len(str(arguments))
    for item in _list(member(obj, "output")):  # a whole response
        count += _lengths(item, "arguments")
        count += sum(_lengths(part, "text", "refusal") for part in _list(member(item, "content")))
    return count


def _in_choice(choice: Any) -> int:
    count = _lengths(choice, "text")
    for holder in (member(choice, "delta"), member(choice, "message")):
        if holder is None:
            continue
        count += _lengths(holder, "content", "reasoning_content", "refusal")
        for call in _list(member(holder, "tool_calls")):
            if (function := member(call, "function")) is not None:
                count += _lengths(function, "name", "arguments")
    return count


def _lengths(holder: Any, *names: str) -> int:
    return sum(len(value) for name in names if isinstance(value := member(holder, name), str))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
