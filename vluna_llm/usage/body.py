"""Reading one JSON body: usage, identity and how the call ended, without decoding megabytes where the end suffices."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .facts import has_finish_reason, identity, is_error, usage_object
from .normalize import normalize_usage
from .types import TokenUsage

_TOKEN_COUNT_PATH: Final = re.compile(r"(?:/count_tokens|/input_tokens|:countTokens)/?(?:[?#]|\Z)")
_BULKY_PATH: Final = re.compile(r"/(?:embeddings|images/(?:generations|edits|variations))/?(?:[?#]|\Z)")
_BULKY_BYTES: Final = 16 * 1024
_LONGEST_TAIL: Final = 8 * 1024
_SCALAR_MEMBER: Final = re.compile(
    rb'\s*"((?:[^"\\]|\\.)*)"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null)\s*,', re.DOTALL
)
_DECODER: Final = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class BodyFacts:
    """What one response says about itself.

    ``status`` is the Responses API's own (``queued``, ``in_progress``, ``completed``, ``incomplete``, ``failed``,
    ``cancelled``), None elsewhere. ``complete`` says that the body could be read to its end. ``failed`` says that it
    is an error or a failed response; usage may stand beside that and was spent.
    """

    usage: TokenUsage | None = None
    response_id: str | None = None
    model: str | None = None
    finish_reason_seen: bool = False
    status: str | None = None
    failed: bool = False
    complete: bool = False


def is_token_count(url: str) -> bool:
    """Whether this endpoint counts tokens without using any: its number is not usage.

    OpenAI ``/responses/input_tokens``, Anthropic ``/messages/count_tokens``, Gemini ``:countTokens``.
    """
    return _TOKEN_COUNT_PATH.search(url) is not None


def read_json_body(url: str, body: bytes) -> BodyFacts:
    """Read a JSON body (an object, a list of events as Gemini streams it, or one object per line); never raises.

    Large embeddings and images are read from both ends: the last top-level members decide, and only where they are
    provably top-level (what follows ``"usage"`` closes exactly the one object that is open); otherwise all is decoded.
    """
    if len(body) >= _BULKY_BYTES and _BULKY_PATH.search(url):
        ends = read_ends(body)
        if ends is not None:
            return facts_of((ends,), is_token_count(url))
    try:
        decoded = json.loads(body)
    except (ValueError, RecursionError):
        return facts_of(_lines(body), is_token_count(url))
    return facts_of(decoded if isinstance(decoded, list) else (decoded,), is_token_count(url))


def facts_of(objects: Iterable[object], token_count: bool = False) -> BodyFacts:
    """The facts of one decoded body, or of several objects that follow each other: the last word counts."""
    usage: TokenUsage | None = None
    response_id = model = status = None
    finish = failed = complete = False
    for obj in objects:
        if not isinstance(obj, Mapping):
            continue
        complete = True
        found = None if token_count else normalize_usage(usage_object(obj))
        if found is not None and (found.total_tokens or usage is None):
            usage = found
        new_id, new_model = identity(obj)
        response_id, model = response_id or new_id, model or new_model
        finish = finish or has_finish_reason(obj)
        failed = failed or is_error(obj)
        if obj.get("object") == "response" and isinstance(obj.get("status"), str):
            status = obj["status"]
    return BodyFacts(usage, response_id, model, finish, status, failed, complete)


def read_ends(body: bytes) -> dict[str, Any] | None:
    """The top-level members at both ends of a large JSON object that has ``usage`` near its end; None where unsure.

    ``{`` followed by the rest of the body from ``"usage"`` on can only be valid JSON if exactly one object was open
    there, the outermost; and an unescaped ``"usage"`` cannot stand inside a string.
    """
    text = body.strip()
    at = text.rfind(b'"usage"')
    if at < 0 or len(text) - at > _LONGEST_TAIL or not text.startswith(b"{") or not text.endswith(b"}"):
        return None
    near = text.rfind(b'"model"', max(at - 256, 0), at)
    for start in (near, at):
        if start < 0:
            continue
        try:
            tail = json.loads(b"{" + text[start:])
        except (ValueError, RecursionError):
            continue
        if isinstance(tail, dict) and isinstance(tail.get("usage"), dict) and tail["usage"]:
            return {**_head(text), **tail}
    return None


def last_usage_object(body: bytes) -> Mapping[str, Any] | None:
    """The last usage object in bytes whose middle is missing (an event too large to keep); None where there is none."""
    at = body.rfind(b'"usage"')
    if at < 0:
        return None
    rest = body[at + 7 :].decode("utf-8", "replace").lstrip(" \t\r\n:")
    try:
        value, _ = _DECODER.raw_decode(rest)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value else None


def _head(text: bytes) -> dict[str, Any]:
    """The plain members before the first list or object: top-level by construction."""
    members: dict[str, Any] = {}
    position = 1
    while match := _SCALAR_MEMBER.match(text, position):
        try:
            members[json.loads(b'"' + match[1] + b'"')] = json.loads(match[2])
        except ValueError:
            break
        position = match.end()
    return members


def _lines(body: bytes) -> list[object]:
    """One object per line (Ollama answers so under any content type); nothing where the first line is not JSON."""
    found: list[object] = []
    lines = body.split(b"\n")
    if len(lines) < 2:
        return found
    for line in lines:
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            if not found:
                break
    return found
