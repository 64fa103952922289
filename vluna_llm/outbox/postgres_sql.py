# ruff: noqa: S608 - names of columns come from COLUMNS, never from outside; values always go as parameters.
"""The tables of the shared stage and the statements on them.

Each statement is a transaction of its own under READ COMMITTED. Where one of them waits for a lock, it goes on with the
row as it is then: conditions and assignments read the locked row itself, never an older look at it.
"""

from __future__ import annotations

from .row import COLUMNS

SCHEMA_VERSION = 3
"""Raised with every column or table that is added."""
READABLE_FROM = 2
"""The oldest version of this package that may work with what this one writes.

Version 2 knows nothing of meters that a caller named (``meters``). It does no harm: such a row is handed over with its
bytes and with its lines as what is left of it (`vluna_llm.sharing.handing`), and that is what this version sends.
Version 1 knows nothing of what is left (``rest``) either, and when it repaired such a row it would charge the total by
the primary meter. So it may not connect any more; one that is connected still sends stored bytes as they are.
"""

LOCAL = ("arrived_from", "stage")
"""Columns that only mean something in a journal."""
SHARED = tuple(name for name in COLUMNS if name not in LOCAL)
_TYPES = {"TEXT": "text", "INTEGER": "bigint", "REAL": "double precision", "BLOB": "bytea"}
_ADVISORY_LOCK = 0x766C756E61  # any number that is ours

_UNDELIVERED = "settlement IN ('pending', 'sent')"
_DONE = "settlement IN ('booked', 'rebooked', 'lapsed')"
_LANE = (
    "base_url = %(base_url)s AND realm_id = %(realm_id)s AND principal_id = %(principal_id)s AND user_id = %(user_id)s"
)
_CLOCK = "extract(epoch FROM clock_timestamp())::float8"

SESSION = (
    "SET statement_timeout = {}; SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE"
)


def _type(name: str) -> str:
    return _TYPES[COLUMNS[name].partition(" ")[0]]


def _column(name: str) -> str:
    rest = COLUMNS[name].partition(" ")[2]
    return f"{name} {_type(name)} {'NOT NULL' if rest == 'PRIMARY KEY' else rest}".rstrip()


MIGRATIONS = f"""
SELECT pg_advisory_xact_lock({_ADVISORY_LOCK});
CREATE TABLE IF NOT EXISTS vluna_llm_schema (version integer PRIMARY KEY, readable_from integer NOT NULL,
    since timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS vluna_llm_operations (
    seq bigint GENERATED ALWAYS AS IDENTITY,
    {", ".join(_column(name) for name in SHARED)},
    origin text,
    changed_by text,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (base_url, realm_id, operation_id));
{"".join(f"ALTER TABLE vluna_llm_operations ADD COLUMN IF NOT EXISTS {_column(name)};" for name in SHARED)}
CREATE INDEX IF NOT EXISTS vluna_llm_undelivered ON vluna_llm_operations
    (base_url, realm_id, principal_id, user_id, seq) INCLUDE (next_attempt_at) WHERE {_UNDELIVERED};
CREATE INDEX IF NOT EXISTS vluna_llm_open ON vluna_llm_operations
    (base_url, realm_id, settlement, seq) WHERE NOT {_DONE};
CREATE INDEX IF NOT EXISTS vluna_llm_done ON vluna_llm_operations (base_url, realm_id, updated_at) WHERE {_DONE};
CREATE SEQUENCE IF NOT EXISTS vluna_llm_epochs;
CREATE TABLE IF NOT EXISTS vluna_llm_lanes (
    base_url text NOT NULL, realm_id text NOT NULL, principal_id text NOT NULL, user_id text NOT NULL,
    owner text,
    epoch bigint NOT NULL DEFAULT 0,
    expires_at timestamptz NOT NULL DEFAULT '-infinity',
    due_at timestamptz NOT NULL DEFAULT 'infinity',
    claimable_at timestamptz NOT NULL
        GENERATED ALWAYS AS (CASE WHEN owner IS NULL THEN due_at ELSE expires_at END) STORED,
    PRIMARY KEY (base_url, realm_id, principal_id, user_id));
CREATE INDEX IF NOT EXISTS vluna_llm_claimable ON vluna_llm_lanes (base_url, realm_id, claimable_at);
CREATE INDEX IF NOT EXISTS vluna_llm_claimed ON vluna_llm_lanes (base_url, realm_id, owner) WHERE owner IS NOT NULL;
INSERT INTO vluna_llm_schema (version, readable_from) VALUES ({SCHEMA_VERSION}, {READABLE_FROM})
    ON CONFLICT DO NOTHING
"""
"""Sent at once, hence one transaction; who comes second waits for the lock and finds everything there."""


OFFER = f"""
WITH offered AS (
    SELECT * FROM unnest({", ".join(f"%({name})s::{_type(name)}[]" for name in SHARED)})
        WITH ORDINALITY AS given ({", ".join(SHARED)}, place)
), stored AS (
    INSERT INTO vluna_llm_operations ({", ".join(SHARED)}, origin)
    SELECT {", ".join(f"{_CLOCK} + next_attempt_at" if name == "next_attempt_at" else name for name in SHARED)},
        %(origin)s
    FROM offered ORDER BY place
    ON CONFLICT DO NOTHING
)
INSERT INTO vluna_llm_lanes AS lane (base_url, realm_id, principal_id, user_id, due_at)
SELECT base_url, realm_id, principal_id, user_id, clock_timestamp() + min(next_attempt_at) * interval '1 second'
FROM offered GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
ON CONFLICT (base_url, realm_id, principal_id, user_id) DO UPDATE SET due_at = least(lane.due_at, excluded.due_at)
RETURNING 1 AS told
"""

# A claimed lane is due by what is offered from then on; what was there before, its owner reads.
CLAIM = """
WITH free AS (
    SELECT principal_id, user_id FROM vluna_llm_lanes
    WHERE base_url = %(base_url)s AND realm_id = %(realm_id)s AND claimable_at <= now()
    ORDER BY claimable_at LIMIT %(lanes)s FOR UPDATE SKIP LOCKED
)
UPDATE vluna_llm_lanes AS lane
SET owner = %(owner)s, epoch = nextval('vluna_llm_epochs'), due_at = 'infinity',
    expires_at = clock_timestamp() + %(ttl)s * interval '1 second'
FROM free
WHERE lane.base_url = %(base_url)s AND lane.realm_id = %(realm_id)s
    AND lane.principal_id = free.principal_id AND lane.user_id = free.user_id
RETURNING lane.principal_id, lane.user_id, lane.epoch
"""

_SELECT = f"SELECT *, {_CLOCK} AS db_now FROM vluna_llm_operations"

ROWS_OF = f"""
SELECT op.*, {_CLOCK} AS db_now
FROM unnest(%(principals)s::text[], %(users)s::text[]) AS lane (principal_id, user_id), LATERAL (
    SELECT * FROM vluna_llm_operations AS one
    WHERE one.base_url = %(base_url)s AND one.realm_id = %(realm_id)s
        AND one.principal_id = lane.principal_id AND one.user_id = lane.user_id
        AND one.{_UNDELIVERED} AND one.next_attempt_at <= {_CLOCK}
    ORDER BY one.seq LIMIT %(limit)s
) AS op
ORDER BY op.seq
"""

GET = f"""
{_SELECT} WHERE base_url = %(base_url)s AND realm_id = %(realm_id)s AND operation_id = %(operation_id)s
"""

_FENCE = f"""
WITH fence AS (
    SELECT FROM vluna_llm_lanes
    WHERE {_LANE} AND epoch = %(epoch)s AND expires_at > clock_timestamp() FOR SHARE
)
"""
"""The lane, locked for this statement: nobody claims it between the look and the write. An epoch has one owner."""


def _assignments(columns: tuple[str, ...]) -> str:
    assert set(columns) <= set(SHARED)
    return "".join(
        f"{name} = {_CLOCK} + %({name})s, " if name == "next_attempt_at" else f"{name} = %({name})s, "
        for name in columns
    )


def update_of(columns: tuple[str, ...]) -> str:
    """Changes these columns of a row under a claim."""
    return f"""{_FENCE}
    UPDATE vluna_llm_operations SET {_assignments(columns)} changed_by = %(owner)s, updated_at = clock_timestamp()
    WHERE {_LANE} AND operation_id = %(operation_id)s AND EXISTS (SELECT FROM fence)
    RETURNING 1 AS told
    """


RENEW = """
WITH mine AS (
    SELECT principal_id, user_id, epoch FROM vluna_llm_lanes
    WHERE base_url = %(base_url)s AND realm_id = %(realm_id)s AND owner = %(owner)s
    ORDER BY principal_id, user_id FOR UPDATE
), forgotten AS (
    UPDATE vluna_llm_lanes AS lane SET expires_at = '-infinity' FROM mine
    WHERE lane.base_url = %(base_url)s AND lane.realm_id = %(realm_id)s AND lane.owner = %(owner)s
        AND lane.principal_id = mine.principal_id AND lane.user_id = mine.user_id
        AND NOT lane.epoch = ANY(%(epochs)s)
)
UPDATE vluna_llm_lanes AS lane SET expires_at = clock_timestamp() + %(ttl)s * interval '1 second' FROM mine
WHERE lane.base_url = %(base_url)s AND lane.realm_id = %(realm_id)s AND lane.owner = %(owner)s
    AND lane.principal_id = mine.principal_id AND lane.user_id = mine.user_id
    AND lane.epoch = ANY(%(epochs)s) AND lane.expires_at > clock_timestamp()
RETURNING lane.epoch
"""

# due_at is read from the lane as it is when its lock is there, so that an offer that came meanwhile is not forgotten.
RELEASE = f"""
WITH mine AS (
    SELECT base_url, realm_id, principal_id, user_id, epoch FROM vluna_llm_lanes
    WHERE base_url = %(base_url)s AND realm_id = %(realm_id)s AND owner IS NOT NULL AND epoch = ANY(%(epochs)s)
    ORDER BY principal_id, user_id FOR UPDATE
)
UPDATE vluna_llm_lanes AS lane
SET owner = NULL, expires_at = '-infinity', due_at = least(lane.due_at, (
    SELECT to_timestamp(min(op.next_attempt_at)) FROM vluna_llm_operations AS op
    WHERE op.base_url = lane.base_url AND op.realm_id = lane.realm_id
        AND op.principal_id = lane.principal_id AND op.user_id = lane.user_id AND op.{_UNDELIVERED}))
FROM mine
WHERE lane.base_url = mine.base_url AND lane.realm_id = mine.realm_id
    AND lane.principal_id = mine.principal_id AND lane.user_id = mine.user_id AND lane.epoch = mine.epoch
RETURNING 1 AS told
"""

ENDED = f"""
SELECT asked, op.*, {_CLOCK} AS db_now
FROM unnest(%(ids)s::text[]) AS asked
LEFT JOIN vluna_llm_operations AS op
    ON op.base_url = %(base_url)s AND op.realm_id = %(realm_id)s AND op.operation_id = asked
WHERE op.operation_id IS NULL OR NOT op.{_UNDELIVERED}
"""

TOTALS = f"""
SELECT settlement, held != 0 AS held, count(*) AS count, min(created_at) AS created, min(ended_at) AS ended
FROM vluna_llm_operations WHERE base_url = %(base_url)s AND realm_id = %(realm_id)s AND NOT {_DONE} GROUP BY 1, 2
"""

LISTED = f"""
{_SELECT} WHERE base_url = %(base_url)s AND realm_id = %(realm_id)s AND settlement = ANY(%(settlements)s)
ORDER BY created_at, seq LIMIT %(limit)s
"""

KNOW_LANE = """
INSERT INTO vluna_llm_lanes (base_url, realm_id, principal_id, user_id)
VALUES (%(base_url)s, %(realm_id)s, %(principal_id)s, %(user_id)s) ON CONFLICT DO NOTHING RETURNING 1 AS told
"""


def reopen_of(columns: tuple[str, ...]) -> str:
    """Changes these columns of a row whose lane nobody delivers, and has the lane looked at."""
    return f"""
    WITH idle AS (
        SELECT FROM vluna_llm_lanes
        WHERE {_LANE} AND (owner IS NULL OR expires_at <= clock_timestamp()) FOR UPDATE
    ), done AS (
        UPDATE vluna_llm_operations SET {_assignments(columns)} updated_at = clock_timestamp()
        WHERE {_LANE} AND operation_id = %(operation_id)s AND settlement = %(seen)s AND attempts = %(seen_attempts)s
            AND EXISTS (SELECT FROM idle)
        RETURNING 1
    )
    UPDATE vluna_llm_lanes SET due_at = least(due_at, clock_timestamp())
    WHERE {_LANE} AND EXISTS (SELECT FROM done)
    RETURNING 1 AS told
    """


PRUNE = f"""
WITH old AS (
    SELECT operation_id FROM vluna_llm_operations
    WHERE base_url = %(base_url)s AND realm_id = %(realm_id)s AND {_DONE}
        AND updated_at < now() - %(keep)s * interval '1 second'
    ORDER BY updated_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
), dropped AS (
    DELETE FROM vluna_llm_operations AS op USING old
    WHERE op.base_url = %(base_url)s AND op.realm_id = %(realm_id)s AND op.operation_id = old.operation_id
    RETURNING op.principal_id, op.user_id
), idle AS (
    DELETE FROM vluna_llm_lanes AS lane USING (SELECT DISTINCT principal_id, user_id FROM dropped) AS emptied
    WHERE lane.base_url = %(base_url)s AND lane.realm_id = %(realm_id)s
        AND lane.principal_id = emptied.principal_id AND lane.user_id = emptied.user_id
        AND lane.owner IS NULL AND lane.due_at = 'infinity'
)
SELECT count(*) AS dropped FROM dropped
"""
