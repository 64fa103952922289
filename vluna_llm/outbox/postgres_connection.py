"""One connection to PostgreSQL, made anew when it breaks; what it says never holds the password."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Generator, Mapping
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import psycopg
from psycopg import errors
from psycopg.rows import dict_row

from ..errors import ConfigurationError, OutboxUnavailable
from . import postgres_sql as sql

_CONNECT_EVERY = 1.0
_LONGEST_WORDS = 300
_HOST = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[\w.%-]*)(:\d+)?")

T = TypeVar("T")


class SharedAway(OutboxUnavailable):
    """PostgreSQL cannot be asked, or does not answer. Whether the last statement took effect is not known."""

    def __init__(self, message: str, *, hangs: bool = False) -> None:
        super().__init__(message)
        self.hangs = hangs


class Unstorable(Exception):
    """PostgreSQL cannot hold a value of this row, and has not stored it."""


class Connection:
    """Runs statements, one at a time. Every method may be called from any thread.

    Args:
        url: ``postgresql://…``.
        patience: seconds after which a statement is given up.
    """

    def __init__(self, url: str, patience: float) -> None:
        self._url = url
        self._patience = patience
        self._guard = threading.RLock()
        self._db: _Connection | None = None
        self._refused: str | None = None
        self._again_at = 0.0
        self._closed = False
        self.where = place_of(url)

    @property
    def lock(self) -> object:
        """The lock of every method (`vluna_llm.reentry`)."""
        return self._guard

    def ready(self) -> None:
        """Connect where there is no connection; raises `SharedAway` where there can be none."""
        with self._guard:
            if self._db is None:
                self._connected()

    def close(self) -> None:
        """Close it; nothing is asked any more."""
        with self._guard:
            self._closed = True
            self._drop()

    def run(self, sql: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Run one statement; once more where the connection had been cut while nothing was asked of it.

        Each of our statements may be run twice: it is fenced, changes nothing the second time, or does so harmlessly.

        Raises:
            SharedAway: PostgreSQL cannot be asked.
            Unstorable: it cannot hold one of the values.
        """
        with self._guard:
            old = self._db
            if old is not None:
                try:
                    return self._ask(old, sql, values)
                except SharedAway as error:
                    if error.hangs or self._closed:
                        raise
            return self._ask(self._connected(), sql, values)

    def _ask(self, db: _Connection, sql: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        try:
            return db.execute(sql, values).fetchall()
        except (errors.DataError, UnicodeError) as error:
            raise Unstorable(type(error).__name__) from None
        except psycopg.Error as error:
            self._drop()
            raise self._away(error) from None

    def _connected(self) -> _Connection:
        if self._closed:
            raise SharedAway(f"PostgreSQL at {self.where} is not used any more")
        if self._refused is not None and time.monotonic() < self._again_at:
            raise SharedAway(self._refused)  # several threads ask: one attempt a second does for all
        try:
            self._db = self._connect()
        except psycopg.Error as error:
            away = self._away(error)
            self._refused, self._again_at = str(away), time.monotonic() + _CONNECT_EVERY
            raise away from None
        self._refused = None
        return self._db

    def _connect(self) -> _Connection:
        given = understood(self._url)
        made = {"connect_timeout": 5, "application_name": "vluna-llm", **given, "client_encoding": "utf8"}
        where = psycopg.conninfo.make_conninfo("", **made)
        db = _Connection.connect(where, autocommit=True, row_factory=dict_row, prepare_threshold=None)
        try:
            db.patience = self._patience
            db.execute(sql.SESSION.format(int(self._patience * 1000)))
            _migrate(db)
        except BaseException:
            db.close()
            raise
        return db

    def _drop(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(Exception):
                db.close()

    def _away(self, error: psycopg.Error) -> SharedAway:
        """What the server or the driver said, without values of rows and without the password."""
        said = error.diag.message_primary or " ".join(str(error).split()) or type(error).__name__
        for secret in _secrets(self._url):
            said = said.replace(secret, "***")
        return SharedAway(
            f"cannot use PostgreSQL at {self.where}: {said[:_LONGEST_WORDS]}", hangs=isinstance(error, _NoAnswer)
        )


class _NoAnswer(psycopg.OperationalError):
    """The server took a statement and is silent."""


class _Connection(psycopg.Connection[dict[str, Any]]):
    """A connection that gives up a statement whose answer does not come: a server may hang without closing."""

    patience = 10.0

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **options: Any) -> T:
        """Drive the driver's generator, for so many seconds."""
        return super().wait(_within(gen, self.patience), *args, **options)


def _within(gen: Generator[Any, Any, T], seconds: float) -> Generator[Any, Any, T]:
    deadline = time.monotonic() + seconds
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > deadline:
                raise _NoAnswer(f"no answer within {seconds:g} s")
            wanted = gen.send(ready)
    except StopIteration as ended:
        return ended.value  # type: ignore[no-any-return]


def understood(url: str) -> dict[str, Any]:
    """What the driver makes of the URL.

    Raises:
        ConfigurationError: nothing.
    """
    try:
        given = dict(psycopg.conninfo.conninfo_to_dict(url))
        if given.get("port"):
            _ = [int(port or 0) for port in str(given["port"]).split(",")]  # the driver looks at it when it connects
        return given
    except (psycopg.Error, UnicodeError, ValueError):
        # The driver's own words may hold a piece of the password.
        raise ConfigurationError(
            "VLUNA_LLM_OUTBOX_SHARED is not a URL that PostgreSQL understands: use "
            "postgresql://user:password@host:5432/database, with special characters percent-encoded."
        ) from None


def place_of(url: str) -> str:
    """Hosts, ports and database of a URL, for people: without user and password, also where these are badly quoted."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        hosts = parts.netloc.rpartition("@")[2]
        if "@" not in parts.path and all(_HOST.fullmatch(host) for host in hosts.split(",")):
            return f"{hosts or 'a local socket'}{parts.path}"
    return "a URL that cannot be read"


def _secrets(url: str) -> list[str]:
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        found = [parts.password or ""]
        found += [item.partition("=")[2] for item in parts.query.split("&") if item.startswith("password=")]
        return sorted({text for raw in found for text in (raw, unquote(raw)) if text}, key=len, reverse=True)
    return [url]


def _migrate(db: _Connection) -> None:
    try:
        found = db.execute("SELECT max(version) AS version, max(readable_from) AS least FROM vluna_llm_schema")
        there = found.fetchone() or {}
    except errors.UndefinedTable:
        there = {}
    if (there.get("least") or 0) > sql.SCHEMA_VERSION:
        raise psycopg.NotSupportedError(
            f"its tables need schema {there['least']}, this version knows {sql.SCHEMA_VERSION}"
        )
    if (there.get("version") or 0) < sql.SCHEMA_VERSION:
        db.execute(sql.MIGRATIONS)
