"""One meaning of usage (design rule 13), whatever the provider calls its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """The tokens of one model call.

    Two counts make the whole: ``input_tokens``, all that went into the model whether or not it came from a cache or
    was put into one, and ``output_tokens``, all that came out, hidden reasoning too. Every other count is a part of
    one of them. ``raw`` is the provider's own usage object. ``contradiction`` names the rule that was applied where the
    provider's numbers did not fit together.

    All counts are tokens and never negative. ``audio_seconds`` is set where a provider bills audio by time.

    Raises:
        ValueError: a count is negative or not an integer.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    audio_input_tokens: int = 0
    audio_output_tokens: int = 0
    image_input_tokens: int = 0
    image_output_tokens: int = 0
    audio_seconds: float | None = None
    contradiction: str | None = None
    raw: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be a non-negative integer number of tokens, not {value!r}")

    @property
    def total_tokens(self) -> int:
        """Input plus output tokens."""
        return self.input_tokens + self.output_tokens

    @property
    def costs_without_tokens(self) -> bool:
        """Whether the provider charged for something that is no token here: audio by the second, a cost alone."""
        if self.total_tokens:
            return False
        costs = (
            value for name, value in (self.raw or {}).items() if "cost" in name and isinstance(value, (int, float))
        )
        return bool(self.audio_seconds) or any(costs)

    def __add__(self, other: object) -> TokenUsage:
        """The sum of two calls; ``raw`` and ``contradiction`` are not carried."""
        if not isinstance(other, TokenUsage):
            return NotImplemented
        seconds = (
            None
            if self.audio_seconds is None and other.audio_seconds is None
            else (self.audio_seconds or 0.0) + (other.audio_seconds or 0.0)
        )
        counts = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        return TokenUsage(**counts, audio_seconds=seconds)

    def counts(self) -> dict[str, int]:
        """The counts that are not zero, by name: what the outbox stores (never ``raw``)."""
        return {name: value for name in _COUNTS if (value := getattr(self, name))}


_COUNTS = (
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
    "audio_input_tokens",
    "audio_output_tokens",
    "image_input_tokens",
    "image_output_tokens",
)
