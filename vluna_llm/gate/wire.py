"""The bytes on their way: what is handed to a transport, what comes back, and how long it may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import httpx

TransportFault = Literal["connect", "timeout", "broken"]
"""``connect``: the request was never sent. ``timeout`` and ``broken``: it may have been carried out all the same."""


@dataclass(frozen=True, slots=True)
class WireRequest:
    """A signed request. ``target`` is the path with query exactly as signed; headers are in no repr."""

    method: str
    target: str
    headers: Sequence[tuple[str, str]] = field(repr=False)
    body: bytes = field(repr=False)
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, unjudged. Header names are in lower case; the body, which may carry a token, is in no repr."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one exchange may take, in seconds: to connect, between bytes, and altogether."""

    connect: float
    read: float
    total: float

    @classmethod
    def of(cls, timeout: float | httpx.Timeout) -> Patience:
        """A number bounds the whole exchange; an ``httpx.Timeout`` its parts, and connect plus read the whole.

        Raises:
            ValueError: a time-out is not a positive number, or is missing.
        """
        if isinstance(timeout, httpx.Timeout):
            connect, read = timeout.connect, timeout.read
            if connect is None or read is None or connect <= 0 or read <= 0:
                raise ValueError("timeout needs positive connect and read seconds: the gate must never hang a caller")
            return cls(connect, read, connect + read)
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
        return cls(min(1.0, timeout), timeout, timeout)


class TransportError(Exception):
    """No answer came. Carries the fault, never the request."""

    def __init__(self, fault: TransportFault, text: str) -> None:
        self.fault: TransportFault = fault
        super().__init__(text)
