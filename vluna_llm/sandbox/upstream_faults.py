"""What can go wrong with one answer of the replay upstream."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamFault:
    """What goes wrong with one answer. Parts are events of a stream; a plain body counts as one part.

    ``status``: answer with this error instead (``retry_after`` seconds go along). ``cut_after``: really drop the
    connection after so many parts, 0 before the first byte; a plain body is cut in its middle; ``reset`` drops it with
    a TCP reset instead of an orderly end. ``hang_after``: fall silent after so many parts, 0 before the first byte,
    until the caller leaves. ``delay``: seconds before the first byte. ``gzip``: a compressed answer.

    Raises:
        ValueError: a number is negative, or both ``cut_after`` and ``hang_after`` are given.
    """

    status: int | None = None
    retry_after: float | None = None
    cut_after: int | None = None
    reset: bool = False
    hang_after: int | None = None
    delay: float = 0.0
    gzip: bool = False

    def __post_init__(self) -> None:
        if self.cut_after is not None and self.hang_after is not None:
            raise ValueError("a connection is either cut or left hanging: give cut_after or hang_after")
        for name in ("status", "retry_after", "cut_after", "hang_after", "delay"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, not {value!r}")

    @classmethod
    def parse(cls, text: str) -> UpstreamFault:
        """Read the form of the header: ``cut_after=5, reset`` or ``status=429, retry_after=1``.

        Raises:
            ValueError: an unknown name, or a value that is not a number.
        """
        kinds = {one.name: str(one.type) for one in fields(cls)}
        given: dict[str, Any] = {}
        for item in text.split(","):
            name, _, value = (part.strip() for part in item.partition("="))
            if name not in kinds:
                raise ValueError(f"unknown fault {name!r}; known: {', '.join(kinds)}")
            kind = kinds[name]
            given[name] = True if kind == "bool" else float(value) if "float" in kind else int(value)
        return cls(**given)


@dataclass(slots=True)
class PlannedFault:
    """A fault that waits for the next requests that fit."""

    fault: UpstreamFault
    left: int
    path: str | None
    model: str | None
    stream: bool | None

    def fits(self, path: str, model: str | None, stream: bool) -> bool:
        """Whether a request meets this fault."""
        return (
            self.left > 0
            and self.path in (None, path)
            and self.model in (None, model)
            and self.stream in (None, stream)
        )
