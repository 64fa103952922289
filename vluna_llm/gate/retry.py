"""When authorize asks again, as arithmetic: no clock, no sleep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

FIRST_WAIT = 0.05
MAX_WAIT = 0.5
MIN_ATTEMPT = 0.02
"""Seconds below which another attempt has no chance and is not made."""


@dataclass(slots=True)
class AuthorizeSchedule:
    """Plans attempts of one authorize within ``deadline`` seconds from ``started`` (monotonic), waits included.

    The first retry comes soon, because the first call of every new customer answers 500 (gate contract 4). One
    attempt may use 60 % of what is left, so that a server which hangs is asked a second time.
    """

    deadline: float
    started: float
    jitter: Callable[[], float]
    attempts: int = 0

    def attempt_timeout(self, now: float) -> float:
        """Seconds that the next attempt may take; at least a little, so that one attempt is always made."""
        left = self.left(now)
        self.attempts += 1
        return max(MIN_ATTEMPT, left * 0.6 if left > 0.5 else left)

    def wait(self, now: float) -> float | None:
        """Seconds to wait before asking again, or None where the deadline leaves no room for it."""
        pause = min(MAX_WAIT, FIRST_WAIT * 2 ** (self.attempts - 1)) * (0.5 + self.jitter())
        return pause if self.left(now) - pause > MIN_ATTEMPT else None

    def left(self, now: float) -> float:
        """Seconds until the deadline."""
        return self.started + self.deadline - now
