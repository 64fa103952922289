"""``stream_options.include_usage``, asked for on the caller's behalf (design rule 2)."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

KINDS: Final = frozenset({"chat.completions", "completions"})
"""The APIs whose streams report usage only when asked."""

_REFUSALS: Final = (
    "stream_options",
    "include_usage",
    "unrecognized request argument",
    "extra fields not permitted",
    "extra inputs are not permitted",
    "unknown parameter",
    "unsupported parameter",
    "unexpected keyword",
    "additional properties are not allowed",
)
_REMEMBERED: Final = 256


class Refusers:
    """The upstreams that refuse the option, by base URL: at most 256, the oldest forgotten first. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, base_url: str) -> bool:
        return base_url in self._known

    def add(self, base_url: str) -> None:
        """Remember this upstream."""
        with self._lock:
            self._known[base_url] = None
            self._known.move_to_end(base_url)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)

    def after_fork(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()


REFUSERS: Final = Refusers()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=REFUSERS.after_fork)


def is_asked(body: Mapping[str, Any]) -> bool:
    """Whether the caller asks for the usage chunk."""
    options = body.get("stream_options")
    return isinstance(options, Mapping) and options.get("include_usage") is True


def ask(json_data: object, extra_json: object) -> tuple[object, object]:
    """Both halves of the body with the option set, as copies; what the caller passed stays as it is."""
    if isinstance(extra_json, Mapping) and "stream_options" in extra_json:
        return json_data, _with_option(extra_json)
    if isinstance(json_data, Mapping):
        return _with_option(json_data), extra_json
    return json_data, extra_json


def _with_option(body: Mapping[str, Any]) -> dict[str, Any]:
    options = body.get("stream_options")
    given = dict(options) if isinstance(options, Mapping) else {}
    return {**body, "stream_options": {**given, "include_usage": True}}


def is_refusal(status: int, text: str) -> bool:
    """Whether an upstream's answer may mean that it does not know the option.

    OpenAI-compatible servers say so with 400 or 422, some without naming the member: the call is made once more
    without it, and only a second answer that is better makes the upstream remembered.
    """
    if status not in (400, 422):
        return False
    lowered = text.lower()
    return any(words in lowered for words in _REFUSALS)
