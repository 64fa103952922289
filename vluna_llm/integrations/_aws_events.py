"""Reads the event stream of AWS, in which Bedrock answers: binary messages with JSON inside.

Source: AWS documentation, "Event stream encoding" (``application/vnd.amazon.eventstream``): four bytes total length,
four bytes length of the headers, four bytes CRC, headers, payload, four bytes CRC; numbers are big-endian.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

from ..usage import StreamReader
from ..usage.framing import decode

_PRELUDE: Final = 12
_LARGEST: Final = 32 * 1024 * 1024


class AwsReader(StreamReader):
    """Follows one answer of Bedrock: ``InvokeModel`` wraps the model's own events, ``Converse`` has events of AWS."""

    __slots__ = ("_buffer",)

    def __init__(self, url: str) -> None:
        super().__init__(url, "text/event-stream")
        self._framing = "sse"  # its end is in its protocol
        self._buffer = bytearray()

    def pass_through(self, data: bytes) -> bytes:
        """Read the next piece; nothing is hidden."""
        self.feed(data)
        return data

    def feed(self, data: bytes) -> bool:
        """Read the next piece; True where usage, finish, failure or the end became known with it."""
        before = (self.usage, self.finished, self.finish_reason_seen, self.failed)
        buffer = self._buffer
        buffer += data
        while len(buffer) >= _PRELUDE:
            total = int.from_bytes(buffer[0:4], "big")
            headers = int.from_bytes(buffer[4:8], "big")
            if not _PRELUDE + headers + 4 <= total <= _LARGEST:
                buffer.clear()  # not what it was announced to be
                break
            if len(buffer) < total:
                break
            names = bytes(buffer[_PRELUDE : _PRELUDE + headers])
            self._message(names, bytes(buffer[_PRELUDE + headers : total - 4]))
            del buffer[:total]
        return before != (self.usage, self.finished, self.finish_reason_seen, self.failed)

    def flush(self) -> bytes:
        """Nothing is held back."""
        return b""

    def end(self) -> None:
        """No more bytes will come."""

    def _message(self, headers: bytes, payload: bytes) -> None:
        if b"exception" in headers:
            self.failed = True
            return
        obj = decode(payload)
        if obj is None:
            return
        inner = obj.get("bytes")
        if isinstance(inner, str):
            try:
                wrapped = decode(base64.b64decode(inner))
            except (binascii.Error, ValueError):
                return
            if wrapped is not None:
                self.read_object(wrapped)
            return
        self._converse(obj)

    def _converse(self, obj: dict[str, Any]) -> None:
        """Converse: ``messageStop`` has the reason, ``metadata`` comes last and has the usage."""
        if "stopReason" in obj:
            self.finish_reason_seen = True
        delta = obj.get("delta")
        if isinstance(delta, dict) and isinstance(delta.get("text"), str):
            self._characters += len(delta["text"])
        self.read_object(obj)
        if isinstance(obj.get("usage"), dict):
            self.finished = True
