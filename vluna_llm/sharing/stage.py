"""The thread that takes settlements to PostgreSQL, so that any host delivers them (``VLUNA_LLM_OUTBOX_SHARED``).

A row goes there in three steps that survive a crash at any point: the journal says that it is being copied
(``sharing``), PostgreSQL takes it where it is not there yet, the journal says that it is there (``shared``). From the
first step on it is delivered from PostgreSQL alone, under a claim of its lane, by whichever host has that. While
PostgreSQL is away, rows that were never offered are delivered from here, and the others wait for it.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import socket
import sqlite3
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from ..errors import ConfigurationError, OutboxUnavailable
from ..failpoints import hit
from ..keeper import started
from ..ledger import Ledger, LedgerClosed
from ..operation import Settlement
from ..outbox import Row
from ..outbox.row import Stage
from ..outbox.staged import staged
from ..reporting import attributes_of, span_of
from ..settlement import receipt_of
from ..telemetry import Telemetry
from ..types import Hint, Receipt, ReceiptState
from .claims import ClaimedStore, Claims

if TYPE_CHECKING:
    from ..outbox.postgres import Claim, SharedOutbox

TTL = 30.0
"""Seconds for which a lane is claimed; renewed at a third of it."""

_BATCH = 200
_ASKED_AT_ONCE = 1_000
_ROWS_OF_A_LANE = 20
_LANES = 16
_HELD_IN_MEMORY = 10_000
_CLAIM_EVERY = 1.0
_LOOK_EVERY = (0.25, 5.0)
_TIDY_EVERY = 600.0
_FOLLOW_EVERY = 60.0
_AWAY = (1.0, 30.0)
_UNDELIVERED: tuple[Settlement, ...] = ("pending", "sent")
_PUT_ASIDE: tuple[Settlement, ...] = ("quarantined", "refused")


class Workers(Protocol):
    """What the coordinator needs of the settler."""

    def feed(self, rows: Sequence[Row]) -> None:
        """Deliver these rows, which are claimed."""
        ...

    def deliver_here(self, rows: Sequence[Row]) -> None:
        """Deliver these rows of the journal from here."""
        ...

    def read_again(self) -> None:
        """The journal holds rows that are to be delivered from here and are not in memory."""
        ...

    def delivering(self, operation_id: str) -> bool:
        """Whether this row is being delivered at this moment."""
        ...

    def gate_away_for(self) -> float | None:
        """None where the gate answers; else the seconds until one settlement may find out whether it is back."""
        ...

    def settled_elsewhere(self) -> None:
        """A row of this process was settled, by whoever had the claim."""
        ...


class Sharing:
    """Shares, claims, and learns what became of rows. Every method may be called from any thread.

    Args:
        shared: the shared outbox.
        ledger: the rows of this process.
        telemetry: where an outage and a lost claim are told.
        ttl: seconds for which a lane is claimed; `TTL` where not given.
        margin: seconds that a claim must still be good for when a delivery begins; more than one exchange takes.
    """

    def __init__(
        self,
        shared: SharedOutbox,
        ledger: Ledger,
        telemetry: Telemetry,
        *,
        ttl: float | None = None,
        margin: float = 6.0,
    ) -> None:
        ttl = TTL if ttl is None else ttl
        self._shared = shared
        self._ledger = ledger
        self._telemetry = telemetry
        self._ttl = ttl
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.claims = Claims(shared, min(margin, ttl / 3), settled=self._settled_here, lost=self._claim_lost)
        self._workers: Workers | None = None
        self._guard = threading.RLock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._cannot_run = False
        self._away_since: float | None = None
        self._outages = 0
        self._new: deque[str] = deque()  # never offered
        self._unsure: deque[str] = deque()  # offered, perhaps
        self._in_batch = 0  # taken from these two, and being copied at this moment
        self._unstorable: set[str] = set()
        self._more = True  # the journal may hold rows that were never offered
        self._unread = False  # and some of them could not be read
        self._waiting: OrderedDict[str, float] = OrderedDict()  # shared, and when the next attempt is due
        self._more_waiting = False
        self._look_pause = _LOOK_EVERY[0]
        self._due = dict.fromkeys(("claim", "renew", "look", "tidy", "follow"), 0.0)
        self._due["tidy"] = time.monotonic() + random.uniform(0.1, 1.0) * _TIDY_EVERY
        self._followed = 0
        self._forgotten = True  # PostgreSQL may think that we hold lanes of which we do not know

    # -- for the settler -------------------------------------------------------------------------------------------

    def start(self, workers: Workers) -> None:
        """Start the thread; without one (the interpreter is ending) rows are delivered from here."""
        with self._guard:
            self._workers = workers
            if self._thread is None and not self._stopping:
                self._thread = started(self._run, "vluna-llm-sharing")
            self._cannot_run = self._thread is None
            here = (
                [row for key in self._new if (row := self._ledger.known(key)) is not None] if self._cannot_run else []
            )
        workers.deliver_here(here)

    def take(self, row: Row) -> bool:
        """Take charge of this row; False where it is delivered from here. Cheap: it is called by callers' threads."""
        with self._guard:
            if row.stage == "shared":
                self._wait_for(row.operation_id)
            elif row.stage == "sharing":
                self._unsure.append(row.operation_id)
            elif (
                self._away_since is not None
                or self._cannot_run
                or self._stopping
                or row.state.route == "cancel"  # no money in it
                or not self._ledger.is_stored(row.operation_id)
            ):
                return False
            elif len(self._new) < _HELD_IN_MEMORY or self._ledger.journal.path is None:
                self._new.append(row.operation_id)
            else:
                self._more = True
        self._wake.set()
        return True

    def recall(self) -> None:
        """Take charge of the rows that came with the journal of a dead process, and are or may be in PostgreSQL."""
        after = 0
        while found := self._staged("sharing", _UNDELIVERED, after):
            with self._guard:
                there = set(self._unsure)
                self._unsure.extend(key for _, key in found if key not in there)
            after = found[-1][0]
        self._read_waiting()
        self._wake.set()

    def store_of(self, operation_id: str, lane: tuple[str, str]) -> ClaimedStore | None:
        """Where a claimed row is kept while it is delivered; None where it is not claimed. `attempted` must follow."""
        return self.claims.store_of(operation_id, lane)

    def attempted(self, operation_id: str, lane: tuple[str, str], delay: float | None) -> None:
        """The delivery of a claimed row ended; ``delay`` seconds until the next attempt, None where there is none."""
        self.claims.attempted(operation_id, lane)
        if delay:
            with self._guard:
                if operation_id in self._waiting:
                    self._waiting[operation_id] = time.monotonic() + delay
        self._wake.set()

    @property
    def outstanding(self) -> int:
        """How many rows of this process are on their way through the shared outbox."""
        with self._guard:
            return len(self._new) + len(self._unsure) + self._in_batch + len(self._waiting) + self._more_waiting

    def in_vain(self, seconds: float, gate_away_for: float) -> bool:
        """Whether waiting for so long is in vain: all is in PostgreSQL, and tried again later than that."""
        with self._guard:
            if self._new or self._unsure or self._in_batch:
                return False
            until = time.monotonic() + seconds
            return gate_away_for > seconds or (
                not self._more_waiting and all(due > until for due in self._waiting.values())
            )

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
            if new.state.settlement in _UNDELIVERED:
                self._wait_for(operation_id)
            self._due["claim"] = 0.0
        self._wake.set()
        return old, new

    def stop(self, timeout: float) -> None:
        """Give the lanes back and end the thread, within ``timeout`` seconds."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                pause = self._round()
            except LedgerClosed:
                break
            except (OutboxUnavailable, ConfigurationError) as error:
                pause = self._away(str(error))
            except Exception:
                self._telemetry.internal_error("sharing")
                pause = _AWAY[0]
            self._wake_in(pause)
        try:
            if self._away_since is None:
                self._shared.release(self.claims.idle())
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

    def _round(self) -> float:
        """Do what is due; the seconds until something is again."""
        self._shared.ready()
        if self._away_since is not None:
            self._back()
        while not self._stopping and self._share():
            self._claim()
        self._claim()
        self._look()
        now = time.monotonic()
        if self._is_due("tidy", now):
            self._due["tidy"] = now + _TIDY_EVERY * random.uniform(0.8, 1.2)
            while self._shared.prune() and not self._stopping:
                pass
        if self._is_due("follow", now):
            self._due["follow"] = now + _FOLLOW_EVERY
            if self._unread:
                self._unread, self._more = False, True
            self._follow()
        waits = [self._due["claim"], self._due["tidy"], self._due["follow"]]
        if len(self.claims):
            waits.append(self._due["renew"])
        if self._waiting or self._more_waiting:
            waits.append(self._due["look"])
        return max(0.0, min(waits) - time.monotonic())

    def _is_due(self, what: str, now: float) -> bool:
        return self._due[what] <= now

    # -- PostgreSQL comes and goes ---------------------------------------------------------------------------------

    def _away(self, why: str) -> float:
        """PostgreSQL cannot be asked: what was never offered is delivered from here. Gives the seconds to wait."""
        with self._guard:
            first = self._away_since is None
            if first:
                self._away_since = time.monotonic()
                self._outages = 0
            new = list(self._new)
            self._new.clear()
            more, self._more = self._more, True  # to be offered when it is back
        if first:
            self.claims.drop(self.claims.idle())
            self._telemetry.emit(
                "vluna.outbox.shared_away",
                "error",
                {"error.type": "SharedAway"},
                message=f"{why}; new settlements are delivered from this host, those that were being copied wait",
            )
        assert self._workers is not None
        here = [row for key in new if (row := self._ledger.known(key)) is not None and row.stage is None]
        self._workers.deliver_here(here)
        if more:
            self._workers.read_again()
        self._outages += 1
        return min(_AWAY[1], _AWAY[0] * 2.0 ** min(self._outages - 1, 10)) * random.uniform(0.5, 1.0)

    def _back(self) -> None:
        with self._guard:
            gone, self._away_since = time.monotonic() - (self._away_since or 0.0), None
            self._due.update(claim=0.0, look=0.0)
            self._forgotten = True
        self._telemetry.emit(
            "vluna.outbox.shared_back",
            "info",
            {"vluna.outbox.away_seconds": round(gone, 1)},
            message=f"PostgreSQL at {self._shared.where} answers again",
        )

    # -- sharing ---------------------------------------------------------------------------------------------------

    def _share(self) -> bool:
        """Copy one batch to PostgreSQL; whether there may be more."""
        self._read_more()
        with self._guard:
            unsure = [self._unsure.popleft() for _ in range(min(_BATCH, len(self._unsure)))]
            new = [self._new.popleft() for _ in range(min(_BATCH, len(self._new)))]
            self._in_batch = len(unsure) + len(new)
        try:
            return self._share_batch(unsure, new)
        except BaseException:
            with self._guard:  # how far it came is written in the rows
                self._unsure.extend((*unsure, *new))
            raise
        finally:
            self._in_batch = 0

    def _share_batch(self, unsure: Sequence[str], new: Sequence[str]) -> bool:
        if not unsure and not new:
            return False
        rows = [row for key in (*unsure, *new) if (row := self._marked(key)) is not None]
        offered: list[Row] = []
        if rows:
            self._ledger.sync()
            hit("sharing.marked")
            offered = self._offered(rows)
            hit("sharing.offered")
        for row in offered:
            self._ledger.apply(row.operation_id, _with_stage("shared"))
            with self._guard:
                self._wait_for(row.operation_id)
        if offered:
            hit("sharing.shared")
            self._due["claim"] = 0.0
        return True

    def _offered(self, rows: Sequence[Row]) -> list[Row]:
        from ..outbox.postgres import Unstorable

        plain = [row.evolve(stage=None, arrived_from=None) for row in rows]
        try:
            self._shared.offer(plain, self.owner)
            return list(rows)
        except Unstorable:
            if len(rows) == 1:
                self._never(rows[0])
                return []
        return [row for one in rows for row in self._offered([one])]

    def _never(self, row: Row) -> None:
        """PostgreSQL cannot hold this row, and has not: it is delivered from here."""
        self._unstorable.add(row.operation_id)
        here = self._ledger.apply(row.operation_id, _with_stage(None))
        if here is not None and self._workers is not None:
            self._workers.deliver_here([here])

    def _marked(self, operation_id: str) -> Row | None:
        """The row, marked as being copied; None where it is not to be, or is being delivered from here."""

        def mark(now: Row) -> Row:
            ours = now.stage is None and now.arrived_from is None and now.state.route != "cancel"
            ours = ours and operation_id not in self._unstorable
            return now.evolve(stage="sharing") if ours and now.state.settlement in _UNDELIVERED else now

        before = self._ledger.known(operation_id)
        if before is None:
            self._unread = True  # settled and pruned since, or it cannot be read now: then it is looked for again
        row = None if before is None else self._ledger.apply(operation_id, mark)
        if row is None or row.stage != "sharing" or row.state.settlement not in _UNDELIVERED:
            return None
        if before is not None and before.stage is None and self._workers is not None:
            # A worker that had stored "sent" before the mark may be sending; one that comes later sees the mark.
            busy = self._workers.delivering(operation_id)
            row = self._ledger.known(operation_id)
            if row is not None and (busy or row.state.settlement not in _UNDELIVERED):
                here = self._ledger.apply(operation_id, _with_stage(None))
                if here is not None and here.state.settlement in _UNDELIVERED:
                    # The worker may have seen the mark and given the row up.
                    self._workers.deliver_here([here])
                return None
        return row

    def _read_more(self) -> None:
        """Look through the journal for rows that were never offered, where there may be some beside those in memory."""
        path = self._ledger.journal.path
        with self._guard:
            if not self._more or self._new:
                return
            self._more = False
        if path is None:
            return
        after = 0
        while True:
            found = self._staged(None, _UNDELIVERED, after)
            with self._guard:
                self._new.extend(key for _, key in found)
                if len(found) < _BATCH:
                    return
                if len(self._new) >= _HELD_IN_MEMORY:
                    self._more = True
                    return
            after = found[-1][0]

    def _staged(self, stage: Stage | None, settlements: Sequence[Settlement], after: int) -> list[tuple[int, str]]:
        path = self._ledger.journal.path
        if path is None:
            return []
        try:
            return staged(path, stage, settlements, after=after, limit=_BATCH)
        except (OSError, sqlite3.Error):
            self._telemetry.internal_error("sharing.staged")
            return []

    # -- claiming --------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Keep the lanes that are being worked on, read more of them, give back the empty ones, take new ones."""
        assert self._workers is not None
        now = time.monotonic()
        if self._forgotten or (len(self.claims) and self._is_due("renew", now)):
            self.claims.renewed(self._shared.renew(self.owner, self.claims.all(), self._ttl))
            self._due["renew"] = now + self._ttl / 3
            self._forgotten = False
        away = self._workers.gate_away_for()
        if away:
            self._give_back(self.claims.idle())  # a host that reaches the gate may take them
        elif away is None:
            self._read(self.claims.empty(), _ROWS_OF_A_LANE)
        probe = away is not None
        room = (1 if probe else _LANES) - len(self.claims)
        if room <= 0 or not self._is_due("claim", now) or (away or 0.0) > 0.0:
            if self._is_due("claim", now):
                self._due["claim"] = now + _CLAIM_EVERY * random.uniform(0.8, 1.2)
            return
        first = not len(self.claims)
        claims = self._shared.claim(self.owner, room, self._ttl)
        if first:
            self._due["renew"] = now + self._ttl / 3
        self._due["claim"] = now + _CLAIM_EVERY * random.uniform(0.8, 1.2)
        self.claims.take(claims)
        self._read(claims, 1 if probe else _ROWS_OF_A_LANE)

    def _read(self, claims: Sequence[Claim], limit: int) -> None:
        if not claims:
            return
        assert self._workers is not None
        rows = self._shared.rows_of(claims, limit)
        self._workers.feed(self.claims.in_hand(rows))
        lanes = {row.lane for row in rows}
        empty = [claim for claim in claims if claim.lane not in lanes]
        if empty:
            self._give_back(empty)
            self._due["claim"] = 0.0

    def _give_back(self, claims: Sequence[Claim]) -> None:
        if claims:
            self.claims.drop(claims)
            self._shared.release(claims)

    def _claim_lost(self, row: Row, claim: Claim) -> None:
        self._telemetry.emit(
            "vluna.outbox.claim_lost",
            "warn",
            attributes_of(row),
            span=span_of(row),
            message="this host was away for longer than its claim: another one delivers the settlement, with the same "
            "key and bytes, and nothing was written here",
        )

    # -- what became of rows ---------------------------------------------------------------------------------------

    def _wait_for(self, operation_id: str) -> None:
        if len(self._waiting) >= _HELD_IN_MEMORY and operation_id not in self._waiting:
            self._more_waiting = self._ledger.journal.path is not None
            if self._more_waiting:
                return
        self._waiting[operation_id] = 0.0
        self._look_pause = _LOOK_EVERY[0]

    def _look(self) -> None:
        """Ask what became of the rows that others deliver."""
        if self._more_waiting and len(self._waiting) < _HELD_IN_MEMORY // 2:
            self._read_waiting()
        with self._guard:
            if not self._waiting or not self._is_due("look", time.monotonic()):
                return
            keys = list(self._waiting)
        settled = 0
        for first in range(0, len(keys), _ASKED_AT_ONCE):
            if self._stopping:
                return
            ended = self._shared.ended(keys[first : first + _ASKED_AT_ONCE])
            settled += sum(self._settled_there(row) for row in ended.rows)
            with self._guard:
                for key in ended.missing:  # the database was lost or set back: the keys are the same
                    self._waiting.pop(key, None)
                    self._unsure.append(key)
            for key in ended.missing:
                self._ledger.apply(key, _with_stage("sharing"))
        shortest, longest = _LOOK_EVERY
        self._look_pause = shortest if settled else min(longest, 1.5 * self._look_pause)
        self._due["look"] = time.monotonic() + self._look_pause

    def _read_waiting(self) -> None:
        self._more_waiting = False
        after = 0
        while True:
            found = self._staged("shared", _UNDELIVERED, after)
            with self._guard:
                self._waiting.update((key, 0.0) for _, key in found if key not in self._waiting)
                if len(found) < _BATCH:
                    return
                if len(self._waiting) >= _HELD_IN_MEMORY:
                    self._more_waiting = True
                    return
            after = found[-1][0]

    def _settled_there(self, row: Row) -> bool:
        """A row that others delivered has ended: settle it here."""
        return self._close(row, receipt_from(row))

    def _settled_here(self, row: Row, receipt: Receipt) -> None:
        """A worker of this process settled a claimed row."""
        self._close(row, receipt)

    def _close(self, ended: Row, receipt: Receipt) -> bool:
        found = False

        def follow(now: Row) -> Row:
            nonlocal found
            if now.stage is None or now.state.settlement not in (*_UNDELIVERED, *_PUT_ASIDE):
                return now
            found = True
            return now.evolve(
                state=ended.state,
                receipt=ended.receipt,
                last_error=ended.last_error,
                attempts=ended.attempts,
                held=False,
            )

        row = self._ledger.apply(ended.operation_id, follow)
        with self._guard:
            self._waiting.pop(ended.operation_id, None)
        if row is None or not found:
            return False
        hit("sharing.settled")
        self._ledger.settled(row, receipt)
        if self._workers is not None:
            self._workers.settled_elsewhere()
        return True

    def _follow(self) -> None:
        """See whether an operator had rows repaired that had been put aside: a page of them each time."""
        found = self._staged("shared", _PUT_ASIDE, self._followed)
        self._followed = found[-1][0] if len(found) == _BATCH else 0
        for ended in self._shared.ended([key for _, key in found]).rows:
            here = self._ledger.known(ended.operation_id)
            if here is not None and here.state.settlement != ended.state.settlement:
                self._close(ended, receipt_from(ended))


def _with_stage(stage: Stage | None) -> Callable[[Row], Row]:
    return lambda row: row.evolve(stage=stage)


def receipt_from(row: Row) -> Receipt:
    """The receipt of a row that another process settled, from what it stored of it."""
    told = json.loads(row.receipt or "{}")
    plain = receipt_of(row, told.get("state", _TOLD_AS.get(row.state.settlement, "held")), None, told.get("detail"))
    hints = tuple(
        Hint(hint["type"], {name: value for name, value in hint.items() if name != "type"})
        for hint in told.get("hints", ())
    )
    return replace(
        plain,
        amount_xusd=told.get("amount_xusd"),
        charged_xusd=told.get("charged_xusd"),
        commit_id=told.get("commit_id"),
        hints=hints,
    )


_TOLD_AS: dict[Settlement, ReceiptState] = {
    "booked": "booked",
    "rebooked": "rebooked",
    "quarantined": "quarantined",
    "refused": "refused",
    "lapsed": "lapsed",
}


def open_shared(url: str, base_url: str, realm_id: str) -> SharedOutbox:
    """The shared outbox behind this URL; nothing is asked of it yet.

    Raises:
        ConfigurationError: as `check_shared`.
    """
    check_shared(url)
    from ..outbox.postgres import SharedOutbox

    return SharedOutbox(url, base_url, realm_id)


def check_shared(url: str) -> None:
    """See whether this URL can be used; nothing is asked of it.

    Raises:
        ConfigurationError: the package that speaks to PostgreSQL is not installed or finds no libpq, or cannot make
            anything of the URL.
    """
    try:
        importlib.import_module("psycopg")
    except ImportError as error:
        raise ConfigurationError(
            "VLUNA_LLM_OUTBOX_SHARED needs psycopg and libpq, which cannot be loaded here "
            f'({error}): pip install "vluna-llm[postgres]", or "psycopg[binary]" where the system has no libpq.'
        ) from None
    from ..outbox.postgres_connection import understood

    understood(url)
