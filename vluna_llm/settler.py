"""The background workers that deliver settlements: a few threads a process, started on first need.

Each (principal, user) is a lane with one delivery at a time: a real gate answers parallel ones with deadlocks (design
rule 16). Lanes are served side by side, and what waits for another attempt steps out of its lane meanwhile. A gate that
is away stops all of it behind a breaker: one settlement at a time finds out whether it is back.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence

from .alarm import Alarm
from .backlog import Backlog, Lane
from .delivery import Courier, Delivery, Elsewhere
from .errors import OutboxUnavailable
from .failpoints import Crash
from .keeper import Keeper, started
from .ledger import Ledger, LedgerClosed
from .outbox import DueRows, Row
from .policy import Breaker
from .pricing import PriceBook
from .settlement import LONGEST_WAIT, backoff
from .sharing import Sharing
from .telemetry import Telemetry
from .usage.features import MeterNames
from .usage.meters import MetersMode

MAX_WORKERS = 8
_AFTER_AN_ERROR = 60.0
_SYNC_WITHIN = 0.05
_TIDY_EVERY = 60.0
_PRUNE_EVERY = 300.0
_WATCH_EVERY = 5.0
_KEEP_SETTLED = 3600.0


class Settler:
    """Delivers what the ledger holds. Thread-safe; its threads are daemons and own no state that the journal lacks."""

    def __init__(
        self,
        ledger: Ledger,
        courier: Courier,
        prices: PriceBook,
        telemetry: Telemetry,
        *,
        meters: MetersMode,
        names: Callable[[str], MeterNames],
        notes: queue.SimpleQueue[Callable[[], None]] | None = None,
        before_delivery: Callable[[], None] = lambda: None,
        retry_after: Callable[[int, float], float] = backoff,
        books_denied_jobs: bool = False,
        tell_back: Callable[[], None] = lambda: None,
        sharing: Sharing | None = None,
    ) -> None:
        self._tell_back = tell_back
        self._sharing = sharing
        self._ledger = ledger
        self._telemetry = telemetry
        self._before_delivery = before_delivery
        self.delivery = Delivery(
            courier,
            prices,
            telemetry,
            meters=meters,
            names=names,
            retry_after=retry_after,
            heard=self._heard,
            books_denied_jobs=books_denied_jobs,
        )
        self._guard = threading.RLock()
        self._changed = threading.Condition(self._guard)  # work came, or the end
        self._drained = threading.Condition(self._guard)  # something was delivered
        self._backlog = Backlog()
        self._breaker = Breaker(threshold=MAX_WORKERS)
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._refilling = False
        self._sync_is_due = False
        self._stopping = False
        self._told_of_shared = False
        self._this_thread = threading.local()
        self.arrived = 0
        self.keeper = Keeper(queue.SimpleQueue() if notes is None else notes, telemetry)
        self.keeper.every(_TIDY_EVERY, "checkpoint", self._ledger.journal.checkpoint)
        self.keeper.every(_PRUNE_EVERY, "prune", self._prune)
        self._alarm = Alarm()
        self._gone = 0
        self.keeper.every(_WATCH_EVERY, "alarm", self._watch)

    # -- taking work -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread that takes the notes of finalizers. Called before the first operation."""
        self.keeper.start()
        if self._sharing is not None:
            self._sharing.start(self)

    @property
    def locks(self) -> tuple[object, ...]:
        """The locks of the settler's own critical sections (`vluna_llm.reentry`)."""
        return self._guard, self.keeper.lock, *(self._sharing.locks if self._sharing else ())

    def enqueue(self, row: Row, *, due: float = 0.0, fresh: bool = True) -> None:
        """Deliver this row's settlement, not before ``due`` (seconds since the epoch).

        ``fresh``: its call ended just now; it does not wait behind a backlog.
        """
        if self._sharing is not None and self._sharing.take(row):
            self.arrived += 1
            self._telemetry.gauges.arrived()
            return
        self._deliver_here(row, due, fresh)

    def _deliver_here(self, row: Row, due: float, fresh: bool = False, *, arrives: bool = True) -> None:
        # The clock may have jumped since ``due`` was stored; to look early costs one request.
        delay = min(max(0.0, due - time.time()), LONGEST_WAIT) if due else 0.0
        with self._changed:
            now = time.monotonic()
            offer = self._backlog.offer(
                row.operation_id,
                row.lane,
                now,
                delay,
                fresh=fresh and self._breaker.state(now) == "closed",
                must=not self._ledger.is_stored(row.operation_id),
            )
            if offer != "known" and arrives:
                self.arrived += 1
                self._telemetry.gauges.arrived()
            self._changed.notify()
            self._staff()
            if self._sync_is_due:
                return
            self._sync_is_due = True
        self.keeper.once(_SYNC_WITHIN, "sync", self._sync)

    def _staff(self) -> None:
        if len(self._threads) >= MAX_WORKERS or self._stopping:
            return
        wanted = self._backlog.workload(time.monotonic()) + (self._backlog.next_due() is not None)
        if self._idle < wanted:
            thread = started(self._work, f"vluna-llm-settler-{len(self._threads)}")
            if thread is not None:
                self._threads.append(thread)

    # -- waiting and ending ----------------------------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        """How many settlements this process still has to deliver, those that wait for another attempt included."""
        with self._changed:
            here, more = len(self._backlog), self._backlog.more
        if self._sharing is not None:
            here += self._sharing.outstanding
        if more:
            here = max(here, 1)  # where the journal cannot be read, too
            with contextlib.suppress(OutboxUnavailable):
                waiting = [total for total in self._ledger.journal.totals() if total.settlement in ("pending", "sent")]
                here = max(here, sum(total.count for total in waiting if total.stage is None))
        return here

    def flush(self, timeout: float | None) -> bool:
        """Wait at most ``timeout`` seconds until everything is delivered; False where something is left."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self.keeper.flush(timeout):
            return False
        with self._changed:
            while self._something_left() and not self._stopping:
                self._staff()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and (left <= 0 or self._nothing_within(left)):
                    return False
                self._drained.wait(left)
            return not self._something_left()

    def _something_left(self) -> bool:
        here = len(self._backlog) or self._backlog.more
        return bool(here or (self._sharing is not None and self._sharing.outstanding))

    def _nothing_within(self, seconds: float) -> bool:
        """Whether all that is left waits for a later attempt, so that waiting for it is in vain."""
        if self._backlog.delivering:
            return False
        now = time.monotonic()
        if self._sharing is not None and self._sharing.outstanding:
            if not self._sharing.in_vain(seconds, self._breaker.wait(now)):
                return False
            if not len(self._backlog) and not self._backlog.more:
                return True
        if self._backlog.in_line:
            return self._breaker.wait(now) > seconds
        due = self._backlog.next_due()
        return due is not None and due > now + seconds

    def stop(self, timeout: float = 1.0) -> None:
        """End the threads; what is not delivered stays in the journal."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._drained.notify_all()
            threads = list(self._threads)
        keeper = self.keeper.stop()
        deadline = time.monotonic() + timeout
        for thread in (*threads, *([keeper] if keeper else [])):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._sharing is not None:
            self._sharing.stop(max(min(0.2, timeout), deadline - time.monotonic()))

    # -- the workers -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (found := self._next()) is not None:
            lane, operation_id = found
            self._this_thread.works = None
            delay: float | None = None
            claimed = self._sharing.store_of(operation_id, lane) if self._sharing is not None else None
            try:
                self._before_delivery()
                delay = self.delivery.deliver(operation_id, claimed or self._ledger)
            except Elsewhere:
                pass
            except LedgerClosed:
                delay = LONGEST_WAIT  # the journal was given up meanwhile: the next runtime delivers it
            except Exception:
                self._telemetry.internal_error("settler.deliver")
                delay = _AFTER_AN_ERROR
                if claimed is not None:
                    claimed.postpone(delay)
                else:
                    self._postpone(operation_id, delay)
            except Crash:
                raise
            except BaseException:
                self._worker_ended(lane, operation_id)
                raise
            works: bool | None = self._this_thread.works
            with self._changed:
                now = time.monotonic()
                if works is None:
                    self._breaker.unused(now)
                here = delay if claimed is None else None  # a claimed row waits in PostgreSQL
                gone = self._backlog.done(
                    lane, operation_id, now, here, must=not self._ledger.is_stored(operation_id), away=works is False
                )
                if gone or delay is not None:
                    self._drained.notify_all()  # who waits sees that it is done, or that waiting is in vain
            if claimed is not None and self._sharing is not None:
                self._sharing.attempted(operation_id, lane, delay)
            with contextlib.suppress(Exception):
                self._ledger.journal.checkpoint()

    def _postpone(self, operation_id: str, delay: float) -> None:
        """An error of ours struck: have the row left alone also where it is read back from the journal."""
        due = time.time() + delay
        with contextlib.suppress(Exception):
            self._ledger.apply(operation_id, lambda now: now.evolve(next_attempt_at=due))

    def _worker_ended(self, lane: Lane, operation_id: str) -> None:
        """Something that is no error ended this thread (a greenlet is killed, a library panics): its lane goes on."""
        with self._changed:
            must = not self._ledger.is_stored(operation_id)
            self._backlog.done(lane, operation_id, time.monotonic(), _AFTER_AN_ERROR, must=must)
            self._breaker.unused(time.monotonic())
            self._threads = [thread for thread in self._threads if thread is not threading.current_thread()]
            self._changed.notify()
            self._staff()

    def _next(self) -> tuple[Lane, str] | None:
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                if self._backlog.wants_more(now) and not self._refilling:
                    self._refill()
                    continue
                due = self._backlog.next_due()
                pause = None if due is None else max(due - now, 0.0)
                if self._backlog.workload(now):
                    pause = self._breaker.wait(now)
                    if not pause and self._breaker.admit(now):
                        return self._backlog.next(now)
                self._idle += 1
                self._changed.wait(pause)
                self._idle -= 1
            return None

    def _refill(self) -> None:
        """Read back from the journal what found no room in memory. The lock is held, and let go meanwhile."""
        self._refilling = True
        self._backlog.looking(time.monotonic())
        self._guard.release()
        try:
            room = self._backlog.room_of_a_lane()
            rows = self._ledger.journal.due(2 * self._backlog.window, room, time.time())
        except Exception:
            self._telemetry.internal_error("settler.refill")
            rows = DueRows((), complete=False)
        finally:
            self._guard.acquire()
            self._refilling = False
        now, wall, taken, all_here = time.monotonic(), time.time(), 0, rows.complete
        self._backlog.refilled(now, 0, True)
        for operation_id, lane, due in rows:
            if not self._backlog.holds(operation_id):
                delay = min(max(0.0, due - wall), LONGEST_WAIT)
                taken += self._backlog.offer(operation_id, lane, now, delay) == "taken"
        self._backlog.refilled(now, taken, all_here and not self._backlog.more)
        if taken:
            self._changed.notify(taken)
        self._drained.notify_all()

    def gate_is_back(self) -> None:
        """The gate was heard of elsewhere: try at once what failed because it was away."""
        with self._changed:
            now = time.monotonic()
            if self._breaker.state(now) != "closed":
                self._breaker.probe_now(now)
                self._backlog.gate_is_back(now)
                self._changed.notify_all()

    def _heard(self, works: bool) -> None:
        """An exchange with the gate ended on this thread."""
        self._this_thread.works = works
        with self._changed:
            now = time.monotonic()
            was_open = self._breaker.state(now) != "closed"
            if works:
                self._breaker.succeeded()
            else:
                self._breaker.failed(now)
            if was_open:
                if works:
                    self._backlog.gate_is_back(now)
                self._changed.notify_all()  # those that wait for the next probe need not, or have to anew
        if works and was_open:
            self._tell_back()

    # -- for the shared outbox (`vluna_llm.sharing.Workers`) ---------------------------------------------------------

    def feed(self, rows: Sequence[Row]) -> None:
        """Deliver these rows, which are claimed."""
        with self._changed:
            for row in rows:
                self._backlog.offer(row.operation_id, row.lane, time.monotonic(), must=True)
            self._changed.notify(len(rows))
            for _ in rows[:MAX_WORKERS]:
                self._staff()

    def deliver_here(self, rows: Sequence[Row]) -> None:
        """Deliver these rows of the journal from here; they were counted when they came."""
        for row in rows:
            self._deliver_here(row, row.next_attempt_at, arrives=False)

    def recall(self) -> None:
        """Rows have come that are or may be in the shared outbox, and are delivered from there."""
        if self._sharing is not None:
            self._sharing.recall()
        elif not self._told_of_shared and self._ledger.journal.staged("sharing", "shared", limit=1):
            self._told_of_shared = True
            self._telemetry.emit(
                "vluna.outbox.shared_away",
                "error",
                {"error.type": "ConfigurationError"},
                message="an earlier process handed settlements to a shared outbox and VLUNA_LLM_OUTBOX_SHARED is not "
                "set any more: they are delivered by hosts where it is, or by this one once it is set again",
            )

    def reopen(self, operation_id: str, ordered: Callable[[Row], Row]) -> tuple[Row, Row] | None:
        """Change a row of the shared outbox as an operator ordered it (`vluna_llm.sharing.Sharing.reopen`).

        Raises:
            OutboxUnavailable: that cannot be done now.
        """
        if self._sharing is None:
            raise OutboxUnavailable("VLUNA_LLM_OUTBOX_SHARED is not set, and the row is in the shared outbox")
        return self._sharing.reopen(operation_id, ordered)

    def read_again(self) -> None:
        """The journal holds rows that are to be delivered from here and are not in memory."""
        with self._changed:
            self._backlog.more = True
            self._changed.notify()
            self._staff()

    def delivering(self, operation_id: str) -> bool:
        """Whether this row is being delivered at this moment."""
        with self._changed:
            return self._backlog.delivers(operation_id)

    def gate_away_for(self) -> float | None:
        """None where the gate answers; else the seconds until one settlement may find out whether it is back."""
        with self._changed:
            now = time.monotonic()
            return None if self._breaker.state(now) == "closed" else self._breaker.wait(now)

    def settled_elsewhere(self) -> None:
        """A row of this process was settled, by whoever had the claim."""
        with self._changed:
            self._drained.notify_all()

    # -- chores ----------------------------------------------------------------------------------------------------

    def _sync(self) -> None:
        with self._changed:
            self._sync_is_due = False
        self._ledger.sync()

    def _prune(self) -> None:
        self._ledger.journal.prune(time.time() - _KEEP_SETTLED)

    def _watch(self) -> None:
        """Tell when settlements come in faster than they go out, and when that is over (design rule 16)."""
        arrived, depth = self.arrived, self.outstanding
        # The two are not of the same instant: what has gone out never comes back.
        self._gone = max(self._gone, arrived - depth)
        change = self._alarm.observe(time.monotonic(), arrived, self._gone, depth)
        if change is None:
            return
        behind = change.level == "behind"
        left = change.seconds_to_drain
        if behind:
            message = (
                f"{depth} settlements wait, {change.arrival_rate:.1f} a second come in and {change.drain_rate:.1f} go "
                "out: they are safe in the outbox, and charged later and later. Is the gate slow, or the load too high?"
            )
        else:
            message = f"settlements go out as they come in again; {depth} wait"
        self._telemetry.emit(
            "vluna.outbox.backlog",
            "error" if behind else "info",
            {
                "vluna.outbox.level": change.level,
                "vluna.outbox.waiting": depth,
                "vluna.outbox.arrival_rate": round(change.arrival_rate, 3),
                "vluna.outbox.drain_rate": round(change.drain_rate, 3),
                "vluna.outbox.seconds_to_drain": None if left is None else round(left),
            },
            message=message,
        )
