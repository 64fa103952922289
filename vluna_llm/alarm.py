"""Whether settlements come in faster than they go out (design rule 16). Pure: it is told the time and the counts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

Level = Literal["behind", "caught_up"]

FLOOR = 100
"""Undelivered settlements below which there is no backlog: a few always wait."""

WINDOW = 60.0
"""Seconds over which arrivals and deliveries are compared."""


@dataclass(frozen=True, slots=True)
class BacklogChange:
    """The alarm was raised (``behind``) or called off (``caught_up``); rates are settlements a second."""

    level: Level
    depth: int
    arrival_rate: float
    drain_rate: float

    @property
    def seconds_to_drain(self) -> float | None:
        """How long the backlog lasts at these rates; None where it does not shrink."""
        surplus = self.drain_rate - self.arrival_rate
        return self.depth / surplus if surplus > 0 else None


class Alarm:
    """Raised once when arrivals outrun deliveries over a whole window; called off once, when that is really over.

    It is called off where the backlog has fallen below half the floor, or where the drain has been winning for a whole
    window on end: one that wins for a moment and loses again does not make the alarm flutter.

    Args:
        floor: undelivered settlements at which there is a backlog.
        window: seconds over which rates are taken.
    """

    def __init__(self, floor: int = FLOOR, window: float = WINDOW) -> None:
        self._floor = floor
        self._window = window
        self._samples: deque[tuple[float, int, int]] = deque()
        self._raised = False
        self._winning_since: float | None = None

    @property
    def raised(self) -> bool:
        """Whether settlements come in faster than they go out."""
        return self._raised

    def observe(self, now: float, arrived: int, delivered: int, depth: int) -> BacklogChange | None:
        """Take one observation, every few seconds; gives the change of the alarm, if there is one.

        Args:
            now: seconds, monotonic.
            arrived: settlements that came in since the start.
            delivered: settlements that went out since the start.
            depth: settlements that wait now, those included that were there at the start.
        """
        samples = self._samples
        if samples and (now < samples[-1][0] or arrived < samples[-1][1] or delivered < samples[-1][2]):
            samples.clear()  # another process, or another runtime: these counts began anew
            self._winning_since = None
        samples.append((now, arrived, delivered))
        # The newest sample that is a window old is kept: what is compared is a whole window, and not much more.
        while len(samples) > 1 and samples[1][0] <= now - self._window:
            samples.popleft()
        then, arrived_then, delivered_then = samples[0]
        if now - then < self._window:
            return None
        came, went = (arrived - arrived_then) / (now - then), (delivered - delivered_then) / (now - then)
        if not self._raised:
            if depth < self._floor or came <= went:
                return None
            self._raised, self._winning_since = True, None
            return BacklogChange("behind", depth, came, went)
        if not self._is_over(now, came, went, depth):
            return None
        self._raised, self._winning_since = False, None
        return BacklogChange("caught_up", depth, came, went)

    def _is_over(self, now: float, came: float, went: float, depth: int) -> bool:
        if depth < self._floor / 2:
            return True
        if went <= came:
            self._winning_since = None
            return False
        if self._winning_since is None:
            self._winning_since = now
        return now - self._winning_since >= self._window
