"""The form of an answer: an event stream, lines of JSON or one JSON text, and the parts of an event."""

from __future__ import annotations

import json
import re
from typing import Any, Final, Literal

Framing = Literal["unknown", "sse", "ndjson", "json", "opaque"]
"""``opaque`` is what is never looked at: audio, pictures, web pages."""

BOUNDARY: Final = re.compile(rb"\n\r?\n|\r\r")
"""The end of an event: a blank line. No cut of the bytes can make it match earlier than in the whole."""
BOM: Final = b"\xef\xbb\xbf"

_LINES: Final = frozenset(
    {"application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"}
)
_OPAQUE: Final = ("audio/", "image/", "video/", "multipart/", "text/html")
_EVENT_START: Final = b":deir"
"""What a line of an event stream begins with: a comment, data, event (or the error line of some servers), id, retry."""


def announced(content_type: str | None) -> Framing:
    """What the content type alone settles; otherwise the first byte has to tell (`sniff`)."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind in _LINES:
        return "ndjson"
    return "opaque" if kind.startswith(_OPAQUE) else "unknown"


def sniff(start: bytes | bytearray) -> Framing:
    """Decide between an event stream and JSON by the first byte that is neither white space nor a byte order mark.

    Servers answer a request for a stream with a JSON error under ``text/event-stream``, and send events without a
    content type: no JSON object or list begins with what a line of an event stream begins with.
    """
    first = bytes(start[:256]).removeprefix(BOM).lstrip()[:1] or bytes(start).removeprefix(BOM).lstrip()[:1]
    if first in (b"{", b"["):
        return "json"
    if not first or first == b"\xef":
        return "unknown"
    return "sse" if first in _EVENT_START else "opaque"


def payload_of(event: bytes) -> tuple[bytes, bytes | None, bool]:
    """Data, event name, and whether there is an ``error:`` line, which llama.cpp and GPUStack send (*observed*)."""
    if event.startswith(b"data:") and b"\n" not in event and b"\r" not in event:
        return event[5:], None, False
    data: list[bytes] = []
    name: bytes | None = None
    error = False
    for line in event.splitlines():
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value[1:] if value.startswith(b" ") else value)
        elif field == b"event":
            name = value.strip()
        elif field == b"error":
            error = True
    return b"\n".join(data), name, error


def decode(payload: bytes) -> dict[str, Any] | None:
    """The JSON object of an event; None where it is none."""
    try:
        obj = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    return obj if isinstance(obj, dict) else None
