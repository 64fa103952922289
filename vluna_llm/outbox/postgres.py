"""The shared second stage: settlements in PostgreSQL, for hosts whose disk does not outlive them.

Rows are delivered by whoever holds the claim on their lane (principal and user). A claim runs out on the database's
clock, and every write names the epoch of its claim: a host that was asleep finds that its writes change nothing.

Every act is one statement of its own transaction. A host that is suspended or cut off in the middle therefore holds no
lock, and what it had sent either happened as a whole or not at all. That, and READ COMMITTED, is what the statements
below rely on; where one of them waited for a lock it looks at the row again as it is then.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..operation import Settlement
from . import postgres_sql as sql
from .postgres_connection import Connection, SharedAway, Unstorable
from .row import COLUMNS, Row, changed_values, from_values, insert_values
from .schema import Total

__all__ = ["Claim", "ClaimLost", "Ended", "SharedAway", "SharedOutbox", "Unstorable"]


class ClaimLost(Exception):
    """The claim ran out or was taken over: what was about to be written belongs to another host now."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to deliver one lane. ``epoch`` never repeats; ``until`` is on this process's monotonic clock."""

    principal_id: str
    user_id: str
    owner: str
    epoch: int
    until: float

    @property
    def lane(self) -> tuple[str, str]:
        """Principal and user."""
        return self.principal_id, self.user_id


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of rows that were asked for: those nobody delivers any more, and the ids that are not there."""

    rows: tuple[Row, ...]
    missing: tuple[str, ...]


class SharedOutbox:
    """The rows of one gate and realm in one PostgreSQL. Every method may be called from any thread.

    Args:
        url: ``postgresql://…``; its password is never shown.
        base_url: the gate; rows of another one are neither seen nor touched.
        realm_id: the realm, likewise.
        patience: seconds after which a statement is given up.

    Raises:
        SharedAway: from every method, where PostgreSQL cannot be asked.
    """

    def __init__(self, url: str, base_url: str, realm_id: str, *, patience: float = 10.0) -> None:
        self._scope = {"base_url": base_url, "realm_id": realm_id}
        self._line = Connection(url, patience)

    def __repr__(self) -> str:
        return f"SharedOutbox({self.where!r})"

    # -- sharing ---------------------------------------------------------------------------------------------------

    def offer(self, rows: Sequence[Row], origin: str) -> None:
        """Store rows for whoever delivers them; those that are there already are left as they are.

        Args:
            rows: settlements of this gate and realm.
            origin: who offers them, for a person who reads the table.

        Raises:
            Unstorable: a value of one of them cannot be stored; none of them was.
        """
        if not rows:
            return
        if any((row.base_url, row.realm_id) != tuple(self._scope.values()) for row in rows):
            raise ValueError("a row of another gate or realm")
        found = [_with_delay(insert_values(row)) for row in rows]
        columns = {name: [values.get(name, _default(name)) for values in found] for name in sql.SHARED}
        self._line.run(sql.OFFER, {**columns, "origin": origin})

    # -- delivering ------------------------------------------------------------------------------------------------

    def claim(self, owner: str, lanes: int, ttl: float) -> list[Claim]:
        """Take at most ``lanes`` lanes for ``ttl`` seconds in which something is due, the longest waiting first."""
        began = time.monotonic()
        found = self._line.run(sql.CLAIM, {**self._scope, "owner": owner, "lanes": lanes, "ttl": ttl})
        return [Claim(lane["principal_id"], lane["user_id"], owner, lane["epoch"], began + ttl) for lane in found]

    def rows_of(self, claims: Sequence[Claim], limit: int) -> list[Row]:
        """What is due in claimed lanes, oldest first, at most ``limit`` rows of each."""
        principals = [claim.principal_id for claim in claims]
        users = [claim.user_id for claim in claims]
        return self._rows(sql.ROWS_OF, {**self._scope, "principals": principals, "users": users, "limit": limit})

    def get(self, operation_id: str) -> Row | None:
        """One row as it stands."""
        rows = self._rows(sql.GET, {**self._scope, "operation_id": operation_id})
        return rows[0] if rows else None

    def update(self, claim: Claim, old: Row, new: Row) -> None:
        """Store what changed in a row of a claimed lane; where nothing did, the claim is looked at all the same.

        Raises:
            ClaimLost: nothing was stored.
        """
        if new.lane != claim.lane:
            raise ValueError("a row of another lane")
        changed = _storable(changed_values(old, new))
        values = {**self._of(claim), **changed, "operation_id": new.operation_id}
        if not self._line.run(sql.update_of(tuple(changed)), values):
            raise ClaimLost(f"the claim of epoch {claim.epoch} is not valid any more")

    def renew(self, owner: str, claims: Sequence[Claim], ttl: float) -> list[Claim]:
        """The claims that are still held, for another ``ttl`` seconds.

        Lanes that this owner holds without knowing it, since the answer to a claim was lost, are given back.
        """
        began = time.monotonic()
        epochs = [claim.epoch for claim in claims]
        found = self._line.run(sql.RENEW, {**self._scope, "owner": owner, "epochs": epochs, "ttl": ttl})
        kept = {lane["epoch"] for lane in found}
        return [
            Claim(claim.principal_id, claim.user_id, owner, claim.epoch, began + ttl)
            for claim in claims
            if claim.epoch in kept
        ]

    def release(self, claims: Iterable[Claim]) -> None:
        """Give lanes back; each is due again when the first of its rows is. A claim that was lost changes nothing."""
        epochs = [claim.epoch for claim in claims]
        if epochs:
            self._line.run(sql.RELEASE, {**self._scope, "epochs": epochs})

    # -- looking ---------------------------------------------------------------------------------------------------

    def ended(self, operation_ids: Sequence[str]) -> Ended:
        """Which of these nobody delivers any more, with their receipts, and which are not there."""
        if not operation_ids:
            return Ended((), ())
        found = self._line.run(sql.ENDED, {**self._scope, "ids": list(operation_ids)})
        rows = tuple(_row(values) for values in found if values["operation_id"] is not None)
        return Ended(rows, tuple(values["asked"] for values in found if values["operation_id"] is None))

    def totals(self) -> list[Total]:
        """How many rows stand alike and since when; those that are done are not counted."""
        return [
            Total(one["settlement"], one["held"], False, "shared", one["count"], one["created"], one["ended"])
            for one in self._line.run(sql.TOTALS, self._scope)
        ]

    def listed(self, *settlements: Settlement, limit: int | None = None) -> list[Row]:
        """The rows in these settlement states, oldest first."""
        return self._rows(sql.LISTED, {**self._scope, "settlements": list(settlements), "limit": limit})

    # -- the operator ----------------------------------------------------------------------------------------------

    def reopen(self, old: Row, new: Row) -> bool:
        """Replace a row as an operator wants it, and have its lane looked at now.

        False, and nothing is changed, where somebody is delivering its lane at this moment or the row is not any more
        as it was seen.
        """
        changed = _storable(changed_values(old, new))
        lane = {**self._scope, "principal_id": new.principal_id, "user_id": new.user_id}
        seen = {"operation_id": old.operation_id, "seen": old.state.settlement, "seen_attempts": old.attempts}
        self._line.run(sql.KNOW_LANE, lane)
        return bool(self._line.run(sql.reopen_of(tuple(changed)), {**lane, **changed, **seen}))

    def prune(self, keep: float = 86_400.0, limit: int = 1_000) -> int:
        """Drop at most ``limit`` rows that were done ``keep`` seconds ago, and lanes without any; gives how many."""
        (found,) = self._line.run(sql.PRUNE, {**self._scope, "keep": keep, "limit": limit})
        return int(found["dropped"])

    # -- life ------------------------------------------------------------------------------------------------------

    @property
    def where(self) -> str:
        """Host and database, for people."""
        return self._line.where

    @property
    def lock(self) -> object:
        """The lock of every method (`vluna_llm.reentry`)."""
        return self._line.lock

    def ready(self) -> None:
        """Connect where there is no connection; raises `SharedAway` where there can be none."""
        self._line.ready()

    def close(self) -> None:
        """Close the connection; nothing is asked any more."""
        self._line.close()

    # -- plumbing --------------------------------------------------------------------------------------------------

    def _of(self, claim: Claim) -> dict[str, Any]:
        return {
            **self._scope,
            "principal_id": claim.principal_id,
            "user_id": claim.user_id,
            "owner": claim.owner,
            "epoch": claim.epoch,
        }

    def _rows(self, sql: str, values: Mapping[str, Any]) -> list[Row]:
        return [_row(found) for found in self._line.run(sql, values)]


def _default(name: str) -> Any:
    return 0 if "DEFAULT 0" in COLUMNS[name] else None


def _storable(changed: Mapping[str, Any]) -> dict[str, Any]:
    """Changed columns as PostgreSQL takes them: text without NUL, a due time as a delay."""
    found = {name: value for name, value in changed.items() if name not in sql.LOCAL}
    for name, value in found.items():
        if isinstance(value, str):
            found[name] = value.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
    return _with_delay(found)


def _with_delay(values: dict[str, Any]) -> dict[str, Any]:
    """A due time travels as a delay: the host's clock means nothing to the others."""
    if "next_attempt_at" in values:
        values["next_attempt_at"] = max(0.0, values["next_attempt_at"] - time.time())
    return values


def _row(values: Mapping[str, Any]) -> Row:
    """A row with its due time on this host's clock."""
    delay = values["next_attempt_at"] - values["db_now"]
    return from_values({**values, "next_attempt_at": time.time() + delay if delay > 0 else 0.0})
