"""What the events of one response add up to: the state that a reader keeps, without any question of bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Literal

from .body import is_token_count, last_usage_object, read_ends, read_json_body
from .facts import (
    FAILED_EVENTS,
    generated_characters,
    has_finish_reason,
    identity,
    is_error,
    is_terminal,
    is_usage_only,
    start_usage,
    usage_object,
)
from .framing import decode
from .normalize import merge_anthropic, normalize_usage
from .types import TokenUsage

Protocol = Literal["unknown", "chat", "responses", "anthropic", "other"]

_IDENTIFY_WITHIN: Final = 8
"""Events that are parsed in search of an id and a model; a server that sends neither is not parsed for ever."""


class EventReader:
    """Takes the events of one response, decoded from their framing, and keeps what they have reported.

    Attributes:
        usage: the last usage reported, final or cumulative, in tokens: what may be committed whatever happens next.
            Anthropic's ``message_start`` alone is neither and stays in ``provisional_usage`` (design rule 3). Counts
            that were already reported are not undone by zeros that follow (an error's last chunk, *observed*).
        provisional_usage: input known, output not yet: for an estimate of an abandoned Anthropic stream.
        finished: the protocol's own end was seen: ``[DONE]``, ``response.completed|incomplete|failed``,
            ``message_stop``, the last event of Cohere, Ollama and of audio and image streams; a whole JSON body.
        finish_reason_seen: the model has stopped, so leaving now is not an abort.
        failed: an error was seen; usage may still be there, or come.
        response_id, model: as the provider names them, None until seen.
        status: the Responses API's ``status`` where one was seen (``queued``, ``completed``, ...).
    """

    __slots__ = (
        "_characters",
        "_events",
        "_identify",
        "_protocol",
        "_start",
        "_token_count",
        "_truncated",
        "_url",
        "failed",
        "finish_reason_seen",
        "finished",
        "model",
        "provisional_usage",
        "response_id",
        "status",
        "usage",
    )

    def __init__(self, url: str) -> None:
        self.usage: TokenUsage | None = None
        self.provisional_usage: TokenUsage | None = None
        self.finished = False
        self.finish_reason_seen = False
        self.failed = False
        self.response_id: str | None = None
        self.model: str | None = None
        self.status: str | None = None
        self._url = url
        self._token_count = is_token_count(url)
        self._protocol: Protocol = "unknown"
        self._identify = _IDENTIFY_WITHIN
        self._start: Mapping[str, Any] | None = None  # usage of Anthropic's message_start
        self._truncated = False  # the middle of what is to be read was too large to keep
        self._characters = 0  # generated, where counted
        self._events = 0

    def _identifying(self) -> bool:
        return self._identify > 0 and (self.response_id is None or self.model is None)

    def _read_payload(self, payload: bytes, name: bytes | None) -> bool:
        payload = payload.strip()
        if not payload:
            return False
        if payload == b"[DONE]":
            self.finished = True
            return False
        obj = decode(payload)
        if obj is None:
            if self._truncated:
                self._truncated = False
                self._take(normalize_usage(last_usage_object(payload)))
                self._ended_by_name(name)
            return False
        return self.read_object(obj)

    def read_object(self, obj: Mapping[str, Any]) -> bool:
        """Read one event that is decoded already; True where it is a usage-only chunk."""
        if self._identifying():
            self._identify -= 1
            response_id, model = identity(obj)
            self.response_id = self.response_id or response_id
            self.model = self.model or model
        if self._protocol == "unknown":
            self._protocol = _protocol_of(obj)
        self._characters += generated_characters(obj)
        self._read_usage(obj)
        if has_finish_reason(obj):
            self.finish_reason_seen = True
        if is_terminal(obj):
            self.finished = True
        if is_error(obj):
            self.failed = True
        response = obj.get("response")
        if isinstance(response, dict) and isinstance(response.get("status"), str):
            self.status = response["status"]
        return is_usage_only(obj)

    def _read_usage(self, obj: Mapping[str, Any]) -> None:
        start = start_usage(obj)
        if start is not None:
            self._start = start
            self.provisional_usage = normalize_usage(start)
            return
        raw = usage_object(obj)
        if raw is not None and self._start is not None and obj.get("type") == "message_delta":
            raw = merge_anthropic(self._start, raw)
        self._take(normalize_usage(raw))

    def _take(self, usage: TokenUsage | None) -> None:
        if usage is None or self._token_count:
            return
        if usage.total_tokens or self.usage is None:
            self.usage = usage

    def _ended_by_name(self, name: bytes | None) -> None:
        if name is not None and is_terminal({"type": name.decode("ascii", "replace")}):
            self.finished = True
            broke = name.decode("ascii", "replace") in FAILED_EVENTS
            self.failed = self.failed or broke
            self.finish_reason_seen = self.finish_reason_seen or not broke

    def _read_body(self, body: bytes) -> None:
        if self._truncated:
            ends = read_ends(body)
            body = json.dumps(ends).encode() if ends is not None else b""
        facts = read_json_body(self._url, body)
        self._take(facts.usage)
        self.response_id = self.response_id or facts.response_id
        self.model = self.model or facts.model
        self.status = facts.status or self.status
        self.failed = self.failed or facts.failed
        self.finish_reason_seen = self.finish_reason_seen or facts.finish_reason_seen
        self.finished = self.finished or facts.complete


def _protocol_of(obj: Mapping[str, Any]) -> Protocol:
    kind = obj.get("type")
    if isinstance(obj.get("choices"), list):
        return "chat"
    if isinstance(kind, str) and kind.startswith("response."):
        return "responses"
    if kind in ("message_start", "content_block_start", "content_block_delta", "ping"):
        return "anthropic"
    return "unknown" if "error" in obj else "other"
