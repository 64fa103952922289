"""The gate's clock: real time that a test may push forward or hold still."""

from __future__ import annotations

import time


class Clock:
    """Milliseconds since the epoch, plus what a test added."""

    def __init__(self) -> None:
        self._offset = 0
        self._held: int | None = None

    def now_ms(self) -> int:
        """The gate's present, in milliseconds since the epoch."""
        return (time.time_ns() // 1_000_000 if self._held is None else self._held) + self._offset

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass at once: leases expire, windows roll over, tokens run out."""
        self._offset += round(seconds * 1000)

    def hold(self, at_ms: int | None = None) -> None:
        """Stop the clock, at ``at_ms`` or where it is; only :meth:`advance` moves it from then on."""
        self._held = self.now_ms() if at_ms is None else at_ms
        self._offset = 0

    def release(self) -> None:
        """Let the clock run again in real time."""
        self._held = None
        self._offset = 0
