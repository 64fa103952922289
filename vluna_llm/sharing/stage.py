"""The thread of the shared stage: what it does in turn, and what happens while PostgreSQL is away."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import ConfigurationError, OutboxUnavailable
from ..keeper import started
from ..ledger import Ledger, LedgerClosed
from ..outbox import Row
from ..reporting import attributes_of, span_of
from ..telemetry import Telemetry
from ..types import Receipt
from ..usage.meters import MetersMode
from .claiming import Claiming
from .claims import ClaimedStore, Claims
from .copying import Copying
from .following import Following
from .handing import stays
from .rows import UNDELIVERED, StagedRows
from .workers import Workers

if TYPE_CHECKING:
    from ..outbox.postgres import Claim, SharedOutbox

TTL = 30.0
"""Seconds for which a lane is claimed; renewed at a third of it."""

_TIDY_EVERY = 600.0
_FOLLOW_EVERY = 60.0
_AWAY = (1.0, 30.0)
_GOODBYE = 1.0


class Sharing:
    """Shares, claims, and learns what became of rows. Every method may be called from any thread.

    Args:
        shared: the shared outbox.
        ledger: the rows of this process.
        telemetry: where an outage and a lost claim are told.
        ttl: seconds for which a lane is claimed; `TTL` where not given.
        margin: seconds that a claim must still be good for when a delivery begins; more than one exchange takes.
        meters: the setting ``VLUNA_LLM_METERS``.
    """

    def __init__(
        self,
        shared: SharedOutbox,
        ledger: Ledger,
        telemetry: Telemetry,
        *,
        ttl: float | None = None,
        margin: float = 6.0,
        meters: MetersMode = "auto",
    ) -> None:
        ttl = TTL if ttl is None else ttl
        self._shared = shared
        self._ledger = ledger
        self._telemetry = telemetry
        self._ttl = ttl
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._workers: Workers | None = None
        self._guard = threading.RLock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._cannot_run = False
        self._away_since: float | None = None
        self._outages = 0
        staged = StagedRows(ledger, telemetry)
        self.claims = Claims(shared, min(margin, ttl / 3), settled=self._settled_here, lost=self._claim_lost)
        self._claiming = Claiming(shared, self.claims, self.owner, ttl)
        self._copying = Copying(shared, ledger, staged, self._guard, self.owner, self._copied, meters)
        self._following = Following(shared, ledger, staged, self._guard, self._copying.add_unsure, self._told)
        self._tidy_at = time.monotonic() + random.uniform(0.1, 1.0) * _TIDY_EVERY
        self._follow_at = 0.0

    # -- for the settler -------------------------------------------------------------------------------------------

    def start(self, workers: Workers) -> None:
        """Start the thread; without one (the interpreter is ending) rows are delivered from here."""
        with self._guard:
            self._workers = workers
            if self._thread is None and not self._stopping:
                self._thread = started(lambda: self._run(workers), "vluna-llm-sharing")
            self._cannot_run = self._thread is None
            here = self._copying.never_offered() if self._cannot_run else []
        workers.deliver_here(here)

    def take(self, row: Row) -> bool:
        """Take charge of this row; False where it is delivered from here. Cheap: it is called by callers' threads."""
        with self._guard:
            if row.stage == "shared":
                self._following.add(row.operation_id)
            elif row.stage == "sharing":
                self._copying.add_unsure(row.operation_id)
            elif (
                self._away_since is not None
                or self._cannot_run
                or self._stopping
                or stays(row)
                or not self._ledger.is_stored(row.operation_id)
            ):
                return False
            else:
                self._copying.add(row.operation_id)
        self._wake.set()
        return True

    def recall(self) -> None:
        """Take charge of the rows that came with the journal of a dead process, and are or may be in PostgreSQL."""
        if self._ledger.journal.path is None:
            return  # nothing ever comes to a journal in memory
        self._copying.recall()
        self._following.recall()
        self._wake.set()

    def store_of(self, operation_id: str, lane: tuple[str, str]) -> ClaimedStore | None:
        """Where a claimed row is kept while it is delivered; None where it is not claimed. `attempted` must follow."""
        return self.claims.store_of(operation_id, lane)

    def attempted(self, operation_id: str, lane: tuple[str, str], delay: float | None) -> None:
        """The delivery of a claimed row ended; ``delay`` seconds until the next attempt, None where there is none."""
        self.claims.attempted(operation_id, lane)
        if delay:
            self._following.attempted(operation_id, delay)
        self._wake.set()

    @property
    def outstanding(self) -> int:
        """How many rows of this process are on their way through the shared outbox."""
        with self._guard:
            return len(self._copying) + len(self._following)

    def in_vain(self, seconds: float, gate_away_for: float) -> bool:
        """Whether waiting for so long is in vain: all is in PostgreSQL, and tried again later than that."""
        with self._guard:
            if len(self._copying):
                return False
            return gate_away_for > seconds or self._following.later_than(seconds)

    @property
    def locks(self) -> tuple[object, ...]:
        """The locks of this class and what it uses (`vluna_llm.reentry`)."""
        return self._guard, self.claims.lock, self._shared.lock

    def reopen(self, operation_id: str, ordered: Callable[[Row], Row]) -> tuple[Row, Row] | None:
        """Change a row in PostgreSQL as an operator ordered it; gives it before and after, None where it is not there.

        Raises:
            OutboxUnavailable: PostgreSQL is away, or somebody is delivering its lane at this moment; to be tried again.
        """
        old = self._shared.get(operation_id)
        if old is None:
            return None
        new = ordered(old)
        if new is old:
            return old, old
        if not self._shared.reopen(old, new):
            raise OutboxUnavailable(f"the lane of {operation_id} is being delivered at this moment")

        def follow(now: Row) -> Row:
            return now if now.stage is None else now.evolve(state=new.state, last_error=new.last_error)

        self._ledger.apply(operation_id, follow)
        with self._guard:
            if new.state.settlement in UNDELIVERED:
                self._following.add(operation_id)
            self._claiming.soon()
        self._wake.set()
        return old, new

    def stop(self, timeout: float) -> None:
        """Give the lanes back and end the thread, within ``timeout`` seconds and never more than one.

        Whoever ends waited for the rows before; what is left to do is to give lanes back, and they run out by
        themselves where PostgreSQL is silent.
        """
        self._stopping = True
        self._wake.set()
        if self._thread is None or self._thread is threading.current_thread():
            return
        seconds = min(timeout, _GOODBYE)
        self._thread.join(seconds)
        if self._thread.is_alive() and self._away_since is None:
            self._telemetry.emit(
                "vluna.outbox.shared_away",
                "warn",
                {"error.type": "SharedAway"},
                message=f"PostgreSQL at {self._shared.where} has not answered within {seconds:g} s at the end: the "
                f"lanes of this host are free for others in at most {self._ttl:g} s",
            )

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self, workers: Workers) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                pause = self._round(workers)
            except LedgerClosed:
                break
            except (OutboxUnavailable, ConfigurationError) as error:
                pause = self._away(str(error), workers)
            except Exception:
                self._telemetry.internal_error("sharing")
                pause = _AWAY[0]
            self._wake_in(pause)
        try:
            if self._away_since is None:
                self._claiming.end()
        except Exception:
            self._telemetry.internal_error("sharing.release")  # they run out
        self._shared.close()

    def _wake_in(self, pause: float) -> None:
        if self._away_since is None:
            self._wake.wait(pause)
            return
        until = time.monotonic() + pause  # what comes in meanwhile is no reason to ask earlier
        while not self._stopping and (left := until - time.monotonic()) > 0:
            self._wake.wait(left)
            self._wake.clear()

    def _round(self, workers: Workers) -> float:
        """Do what is due; the seconds until something is again."""
        self._shared.ready()
        if self._away_since is not None:
            self._back()
        while not self._stopping and self._copying.step(workers):
            self._claiming.step(workers)
        self._claiming.step(workers)
        self._following.look(lambda: self._stopping)
        now = time.monotonic()
        if self._tidy_at <= now:
            self._tidy_at = now + _TIDY_EVERY * random.uniform(0.8, 1.2)
            while self._shared.prune() and not self._stopping:
                pass
        if self._follow_at <= now:
            self._follow_at = now + _FOLLOW_EVERY
            self._copying.look_again()
            self._following.follow()
        waits = [self._claiming.next_at, self._tidy_at, self._follow_at]
        if (look_at := self._following.next_at) is not None:
            waits.append(look_at)
        return max(0.0, min(waits) - time.monotonic())

    # -- PostgreSQL comes and goes ---------------------------------------------------------------------------------

    def _away(self, why: str, workers: Workers) -> float:
        """PostgreSQL cannot be asked: what was never offered is delivered from here. Gives the seconds to wait."""
        with self._guard:
            first = self._away_since is None
            if first:
                self._away_since = time.monotonic()
                self._outages = 0
            new, more = self._copying.give_up()
        if first:
            self._claiming.away()
            self._telemetry.emit(
                "vluna.outbox.shared_away",
                "error",
                {"error.type": "SharedAway"},
                message=f"{why}; new settlements are delivered from this host, those that were being copied wait",
            )
        workers.deliver_here(self._copying.to_deliver_here(new))
        if more:
            workers.read_again()
        self._outages += 1
        return min(_AWAY[1], _AWAY[0] * 2.0 ** min(self._outages - 1, 10)) * random.uniform(0.5, 1.0)

    def _back(self) -> None:
        with self._guard:
            gone, self._away_since = time.monotonic() - (self._away_since or 0.0), None
            self._claiming.back()
            self._following.soon()
        self._telemetry.emit(
            "vluna.outbox.shared_back",
            "info",
            {"vluna.outbox.away_seconds": round(gone, 1)},
            message=f"PostgreSQL at {self._shared.where} answers again",
        )

    # -- what the parts tell ---------------------------------------------------------------------------------------

    def _copied(self, operation_id: str) -> None:
        """PostgreSQL has this row: somebody delivers it, perhaps this host."""
        self._following.add(operation_id)
        self._claiming.soon()

    def _settled_here(self, row: Row, receipt: Receipt) -> None:
        """A worker of this process settled a claimed row."""
        self._following.close(row, receipt)

    def _told(self) -> None:
        if self._workers is not None:
            self._workers.settled_elsewhere()

    def _claim_lost(self, row: Row, claim: Claim) -> None:
        self._telemetry.emit(
            "vluna.outbox.claim_lost",
            "warn",
            attributes_of(row),
            span=span_of(row),
            message="this host was away for longer than its claim: another one delivers the settlement, with the same "
            "key and bytes, and nothing was written here",
        )
