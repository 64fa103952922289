"""What is waiting to be delivered, as far as memory holds it: a window on the journal. No clock, no I/O, no locks.

Settlements of one (principal, user), a lane, go one after another (design rule 16); lanes take turns. The window is
bounded, in all and for each lane, so that neither an outage nor one busy customer makes memory grow or keeps the others
waiting. What finds no room is in the journal alone; `more` says so, and the settler reads it back when there is room.

Times are monotonic seconds, handed in.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import Literal

Lane = tuple[str, str]
Offer = Literal["taken", "known", "full"]

WINDOW = 4_000
LEAST_OF_A_LANE = 16
_UNPRODUCTIVE = 1.0
_LONGEST_UNPRODUCTIVE = 15.0


@dataclass(frozen=True, slots=True, order=True)
class _Timer:
    at: float
    number: int
    lane: Lane
    operation_id: str
    gate_was_away: bool = False


class Backlog:
    """Lanes, and who waits for another attempt.

    Args:
        window: about how many settlements are held in memory, and never more than twice as many.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._lanes: dict[Lane, deque[str]] = {}
        self._ready: deque[Lane] = deque()
        self._fresh: deque[Lane] = deque()  # lanes that were empty when a call ended: every second turn is theirs
        self._turn_of_fresh = True
        self._busy: dict[Lane, str] = {}
        self._timers: list[_Timer] = []
        self._number = 0
        self._waiting: dict[str, int] = {}  # the number of the timer that counts; others of that id are void
        self._known: set[str] = set()
        self._again: set[str] = set()
        self._more = False
        self._left_out = False  # since the journal was last asked
        self._look_at = 0.0
        self._pause = _UNPRODUCTIVE

    @property
    def more(self) -> bool:
        """Whether the journal holds settlements that are not here."""
        return self._more

    @more.setter
    def more(self, more: bool) -> None:
        self._more = more
        self._left_out = self._left_out or more

    def __len__(self) -> int:
        """How many settlements are here, those on their way and those that wait for another attempt included."""
        return len(self._known)

    # -- taking in -------------------------------------------------------------------------------------------------

    def offer(
        self,
        operation_id: str,
        lane: Lane,
        now: float,
        delay: float = 0.0,
        *,
        fresh: bool = False,
        must: bool = False,
    ) -> Offer:
        """Take a settlement, to be delivered not before ``delay`` seconds from now.

        Half of the room is for ``fresh`` ones, of calls that ended just now: who calls while a backlog drains does not
        wait for its end. ``must`` takes it in whatever the room: it is nowhere else. ``known`` means that it is here
        already: another settlement takes the place of the one that was to be delivered, and owes nothing to its delays.
        Where that one is on its way at this moment, the new one is looked at when it has ended.
        """
        if operation_id in self._known:
            if operation_id in self._waiting:
                self._wait(operation_id, lane, now + delay)
            elif self._busy.get(lane) == operation_id:
                self._again.add(operation_id)
            return "known"
        most = 2 * self._window if fresh else self._window
        if not must and (len(self._known) >= most or not self._room(lane, delay)):
            self.more = True
            return "full"
        self._known.add(operation_id)
        if delay > 0:
            self._wait(operation_id, lane, now + delay)
        else:
            self._line_up(operation_id, lane, fresh=fresh)
        return "taken"

    def holds(self, operation_id: str) -> bool:
        """Whether this settlement is here."""
        return operation_id in self._known

    def delivers(self, operation_id: str) -> bool:
        """Whether this settlement is being delivered at this moment."""
        return operation_id in self._busy.values()

    def room_of_a_lane(self) -> int:
        """How many settlements of one lane may wait here."""
        return max(LEAST_OF_A_LANE, self._window // (2 * max(1, len(self._lanes))))

    def _room(self, lane: Lane, delay: float) -> bool:
        if delay > 0:
            return len(self._waiting) < self._window // 2
        return len(self._lanes.get(lane, ())) < self.room_of_a_lane()

    def _line_up(self, operation_id: str, lane: Lane, *, fresh: bool = False) -> None:
        waiting = self._lanes.get(lane)
        if waiting is None:
            waiting = self._lanes[lane] = deque()
        waiting.append(operation_id)
        if len(waiting) == 1 and lane not in self._busy:
            (self._fresh if fresh else self._ready).append(lane)

    def _wait(self, operation_id: str, lane: Lane, at: float, gate_was_away: bool = False) -> None:
        self._number += 1
        self._waiting[operation_id] = self._number
        heapq.heappush(self._timers, _Timer(at, self._number, lane, operation_id, gate_was_away))

    # -- giving out ------------------------------------------------------------------------------------------------

    def workload(self, now: float) -> int:
        """How many lanes could be served at this moment, were there workers for them."""
        while self._timers and self._timers[0].at <= now:
            timer = heapq.heappop(self._timers)
            if self._waiting.get(timer.operation_id) == timer.number:
                del self._waiting[timer.operation_id]
                self._line_up(timer.operation_id, timer.lane)
        return len(self._ready) + len(self._fresh)

    def next(self, now: float) -> tuple[Lane, str] | None:
        """The next settlement to deliver; its lane is busy until `done`. None where nothing is due."""
        if not self.workload(now):
            return None
        first = self._fresh if self._fresh and (self._turn_of_fresh or not self._ready) else self._ready
        self._turn_of_fresh = first is not self._fresh
        lane = first.popleft()
        operation_id = self._lanes[lane].popleft()
        self._busy[lane] = operation_id
        return lane, operation_id

    def done(
        self, lane: Lane, operation_id: str, now: float, delay: float | None, *, must: bool = False, away: bool = False
    ) -> bool:
        """The delivery ended; ``delay`` seconds until the next attempt, None where there is none.

        ``away`` marks an attempt that failed since the gate was away: `gate_is_back` brings it forward. True where the
        settlement is not here any more.
        """
        self._busy.pop(lane, None)
        if self._lanes[lane]:
            self._ready.append(lane)
        else:
            del self._lanes[lane]
        if operation_id in self._again:
            self._again.discard(operation_id)
            self._wait(operation_id, lane, now)
            return False
        if delay is not None and (must or delay <= 0 or self._room(lane, delay)):
            self._wait(operation_id, lane, now + delay, away)
            return False
        if delay is not None:
            self.more = True
        self._known.discard(operation_id)
        return True

    def gate_is_back(self, now: float) -> None:
        """What failed since the gate was away is due now."""
        self._timers = [
            _Timer(min(t.at, now), t.number, t.lane, t.operation_id) if t.gate_was_away else t for t in self._timers
        ]
        heapq.heapify(self._timers)
        self._look_at = now

    # -- the rest in the journal -----------------------------------------------------------------------------------

    def wants_more(self, now: float) -> bool:
        """Whether the journal should be asked for what is not here."""
        return self.more and now >= self._look_at and self._in_line < self._window // 2

    def looking(self, now: float) -> None:
        """The journal is being asked: nobody else needs to, for a while."""
        self._left_out = False
        self._look_at = now + _LONGEST_UNPRODUCTIVE

    def refilled(self, now: float, taken: int, everything: bool) -> None:
        """The journal was asked: ``taken`` settlements were new; ``everything`` that is undelivered is here now.

        What found no room here since it was asked may not be in its answer.
        """
        self._more, self._left_out = not everything or self._left_out, False
        self._pause = _UNPRODUCTIVE if taken else min(2 * self._pause, _LONGEST_UNPRODUCTIVE)
        self._look_at = now if taken else now + self._pause

    @property
    def window(self) -> int:
        """How many settlements are worth asking the journal for."""
        return self._window

    @property
    def _in_line(self) -> int:
        return len(self._known) - len(self._waiting)

    # -- what is to come -------------------------------------------------------------------------------------------

    def next_due(self) -> float | None:
        """When something will be due that is not now; None where nothing will."""
        times = [self._timers[0].at] if self._timers else []
        if self.more and self._in_line < self._window // 2:
            times.append(self._look_at)
        return min(times, default=None)

    @property
    def lanes(self) -> int:
        """How many lanes have something here that is in line."""
        return len(self._lanes)

    @property
    def in_line(self) -> bool:
        """Whether something could be delivered at this moment."""
        return bool(self._ready or self._fresh)

    @property
    def delivering(self) -> bool:
        """Whether something is being delivered at this moment."""
        return bool(self._busy)
