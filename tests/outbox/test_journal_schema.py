"""Files of every older version are read, taken over and brought up to date; nothing in them is changed or lost."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import pytest
from outbox_rows import DONE, GATE, REALM, row

from vluna_llm.operation import Part
from vluna_llm.outbox import Journal, schema
from vluna_llm.outbox.reading import read_journal
from vluna_llm.outbox.row import COLUMNS
from vluna_llm.settlement import compose
from vluna_llm.usage import MeterLine, TokenUsage
from vluna_llm.usage.features import DEFAULT_NAMES

VERSION_1 = """
CREATE TABLE operations (operation_id TEXT PRIMARY KEY, base_url TEXT NOT NULL, realm_id TEXT NOT NULL,
    pid INTEGER NOT NULL, principal_id TEXT NOT NULL, user_id TEXT NOT NULL, feature_code TEXT NOT NULL,
    created_at REAL NOT NULL, authorize_key TEXT NOT NULL, settle_key TEXT NOT NULL, admission TEXT NOT NULL,
    work TEXT NOT NULL, settlement TEXT NOT NULL, route TEXT, dialect TEXT NOT NULL,
    cancel_sent INTEGER NOT NULL DEFAULT 0, usage TEXT, usage_source TEXT, next_step TEXT NOT NULL,
    feature_family_code TEXT, budget_id TEXT, labels TEXT, model TEXT,
    estimated_input INTEGER NOT NULL DEFAULT 0, estimated_output INTEGER NOT NULL DEFAULT 0,
    lease_token TEXT, lease_id TEXT, response_id TEXT, request_id TEXT, trace_id TEXT, span_id TEXT,
    ended_at REAL, path TEXT, body BLOB, attempts INTEGER NOT NULL DEFAULT 0,
    next_attempt_at REAL NOT NULL DEFAULT 0, last_error TEXT, receipt TEXT,
    derived INTEGER NOT NULL DEFAULT 0, unsplit INTEGER NOT NULL DEFAULT 0);
PRAGMA user_version = 1;
"""
VERSION_2 = VERSION_1.replace("user_version = 1", "user_version = 2").replace(
    "span_id TEXT,", "span_id TEXT, trace_flags INTEGER,"
)
VERSION_3 = (
    VERSION_2.replace("user_version = 2", "user_version = 3").replace(
        "unsplit INTEGER NOT NULL DEFAULT 0)",
        "unsplit INTEGER NOT NULL DEFAULT 0, look_first INTEGER NOT NULL DEFAULT 0, "
        "used_up INTEGER NOT NULL DEFAULT 0, held INTEGER NOT NULL DEFAULT 0, arrived_from TEXT, stage TEXT)",
    )
    + """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE orders (id INTEGER PRIMARY KEY, operation_id TEXT, what TEXT, at REAL);
"""
)
VERSION_4 = """
CREATE TABLE operations (operation_id TEXT PRIMARY KEY, base_url TEXT NOT NULL, realm_id TEXT NOT NULL,
    pid INTEGER NOT NULL, principal_id TEXT NOT NULL, user_id TEXT NOT NULL, feature_code TEXT NOT NULL,
    created_at REAL NOT NULL, authorize_key TEXT NOT NULL, settle_key TEXT NOT NULL, admission TEXT NOT NULL,
    work TEXT NOT NULL, settlement TEXT NOT NULL, route TEXT, dialect TEXT NOT NULL,
    cancel_sent INTEGER NOT NULL DEFAULT 0, look_first INTEGER NOT NULL DEFAULT 0,
    used_up INTEGER NOT NULL DEFAULT 0, usage TEXT, usage_source TEXT, next_step TEXT NOT NULL,
    feature_family_code TEXT, budget_id TEXT, labels TEXT, model TEXT,
    estimated_input INTEGER NOT NULL DEFAULT 0, estimated_output INTEGER NOT NULL DEFAULT 0,
    lease_token TEXT, lease_id TEXT, response_id TEXT, request_id TEXT, trace_id TEXT, span_id TEXT,
    trace_flags INTEGER, ended_at REAL, path TEXT, body BLOB, attempts INTEGER NOT NULL DEFAULT 0,
    next_attempt_at REAL NOT NULL DEFAULT 0, last_error TEXT, receipt TEXT,
    derived INTEGER NOT NULL DEFAULT 0, unsplit INTEGER NOT NULL DEFAULT 0, held INTEGER NOT NULL DEFAULT 0,
    arrived_from TEXT, stage TEXT, rest TEXT, parts TEXT);
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE orders (id INTEGER PRIMARY KEY, operation_id TEXT, what TEXT, at REAL);
CREATE INDEX orders_of_operations ON orders (operation_id);
PRAGMA user_version = 4;
"""
"""As `sqlite_master` has it of a file of that version."""
OLD = {"1": VERSION_1, "2": VERSION_2, "3": VERSION_3, "4": VERSION_4}

FIRST = {
    "operation_id": "op-1",
    "base_url": GATE,
    "realm_id": REALM,
    "pid": 17,
    "principal_id": "ann",
    "user_id": "ann",
    "feature_code": "openai.gpt-4o",
    "created_at": 1000.0,
    "authorize_key": "op-1:auth",
    "settle_key": "op-1",
    "admission": "leased",
    "work": "completed",
    "settlement": "sent",
    "route": "commit",
    "dialect": "lease_token",
    "usage": json.dumps({"input_tokens": 10, "output_tokens": 5, "cached_tokens": 4}),
    "usage_source": "provider",
    "next_step": "sent, answer not seen yet; delivered again with the same key and bytes",
    "labels": '{"a": "b"}',
    "path": "/gate/commits",
    "body": b'{"exact": "bytes"}',
    "attempts": 2,
    "derived": 1,
}
EXPECTED = row(
    "op-1",
    pid=17,
    state=DONE.sent(),
    labels={"a": "b"},
    path="/gate/commits",
    body=b'{"exact": "bytes"}',
    attempts=2,
    derived=True,
)


@pytest.fixture(params=[1, 2, 3, 4])
def old_file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A journal as that version wrote it, with a settlement on its way and a call that was in flight."""
    path = tmp_path / f"journal-17-{request.param}.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(OLD[str(request.param)])
        flying = {**FIRST, "operation_id": "op-2", "work": "running", "settlement": "none"}
        for unknown in ("route", "usage", "usage_source", "path", "body"):
            del flying[unknown]
        for values in (FIRST, flying):
            marks = ", ".join("?" * len(values))
            db.execute(f"INSERT INTO operations ({', '.join(values)}) VALUES ({marks})", [*values.values()])
    return path


def test_a_file_of_an_older_version_is_read_as_it_is(old_file: Path) -> None:
    before = old_file.read_bytes()
    found = read_journal(old_file)
    assert found.problem is None
    assert found.rows[0] == EXPECTED
    assert found.rows[1].state.settlement == "none"
    with contextlib.closing(schema.connect_existing(old_file, 1.0, mode="ro")) as db:
        assert sorted((total.settlement, total.count) for total in schema.totals_of(db)) == [("none", 1), ("sent", 1)]
        assert schema.orders_of(db) == []
    assert old_file.read_bytes() == before


def test_a_file_of_an_older_version_is_taken_over_with_its_keys_and_bytes(old_file: Path) -> None:
    heir = Journal(old_file.parent)
    given = heir.adopt(GATE, REALM)
    assert [each.state.settlement for each in given] == ["sent", "lost"]
    assert heir.get("op-1") == EXPECTED
    assert not old_file.exists()
    heir.close()


def test_migrating_only_adds(old_file: Path) -> None:
    """Every old value is where it was, the new columns hold what older rows mean, and the new tables are there."""
    with contextlib.closing(schema.connect_existing(old_file, 1.0)) as db:
        old = [dict(found) for found in db.execute("SELECT * FROM operations ORDER BY rowid")]
        schema.migrate(db)
        schema.migrate(db)
        new = [dict(found) for found in db.execute("SELECT * FROM operations ORDER BY rowid")]
        assert [{name: found[name] for name in before} for before, found in zip(old, new, strict=True)] == old
        assert COLUMNS.keys() <= new[0].keys()
        assert {(found["held"], found["arrived_from"], found["stage"]) for found in new} == {(0, None, None)}
        assert {(found["rest"], found["parts"]) for found in new} == {(None, None)}
        assert {found["meters"] for found in new} == {None}
        assert schema.version_of(db) == 5
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert tables == {"operations", "about", "orders"}
    assert read_journal(old_file).rows[0] == EXPECTED


def test_a_migration_that_is_interrupted_has_not_begun(old_file: Path) -> None:
    with contextlib.closing(schema.connect_existing(old_file, 1.0)) as db:
        before = db.execute("PRAGMA user_version").fetchone()[0]
        db.execute("CREATE TABLE of_somebody_else (name TEXT)")
        db.execute("DROP TABLE of_somebody_else")

        def no(action: int, *names: object) -> int:
            return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_CREATE_TABLE else sqlite3.SQLITE_OK

        db.set_authorizer(no)
        with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
            schema.migrate(db)
        assert not db.in_transaction
    with contextlib.closing(schema.connect_existing(old_file, 1.0)) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == before
        assert "meters" not in {found["name"] for found in db.execute("PRAGMA table_info(operations)")}


PLAIN = {**FIRST, "settlement": "pending", "path": None, "body": None, "attempts": 0, "derived": 0, "unsplit": 1}
PLAIN.update(operation_id="op-3", usage='{"input_tokens": 3}', usage_source="caller")
PART = {**PLAIN, "operation_id": "op-4", "admission": "ungated", "route": "ingest", "used_up": 1}
PART.update(unsplit=0, usage=FIRST["usage"], rest='{"m.out": 5}', parts='{"c-1": 40}')


def test_what_version_4_left_unsettled_means_the_same_and_is_settled_the_same(tmp_path: Path) -> None:
    """A plain quantity has no meters of its own, and what a partly charged ingest left is still that alone."""
    path = tmp_path / "journal-17-4.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executescript(VERSION_4)
        for values in (PLAIN, PART):
            marks = ", ".join("?" * len(values))
            db.execute(f"INSERT INTO operations ({', '.join(values)}) VALUES ({marks})", [*values.values()])
    heir = Journal(tmp_path)
    plain, part = heir.adopt(GATE, REALM)
    assert [one.state.meters for one in (plain, part)] == [(), ()]
    assert (plain.state.usage, plain.unsplit) == (TokenUsage(3), True)
    assert (part.state.rest, part.state.parts) == ((MeterLine("m.out", 5),), (Part("c-1", 40),))
    for one, expected in ((plain, {"quantity_minor": "3"}), (part, {"quantity_minor": "5"})):
        body = json.loads(compose(one, mode="auto", names=DEFAULT_NAMES, priced=None).body)
        assert {"quantity_minor": body["quantity_minor"]} == expected
        assert body.get("meters", []) == [
            {"meter_code": line.meter_code, "quantity_minor": str(line.quantity)} for line in one.state.rest or ()
        ]
    heir.close()


def test_a_new_journal_has_the_tables_and_columns_that_others_count_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.path is not None
    with contextlib.closing(sqlite3.connect(journal.path)) as db:
        columns = {
            name: (kind, needed, default)
            for _, name, kind, needed, default, _ in db.execute("PRAGMA table_info(operations)")
        }
        assert columns["held"] == ("INTEGER", 1, "0")
        assert columns["arrived_from"] == ("TEXT", 0, None)
        assert columns["stage"] == ("TEXT", 0, None)
        assert columns["meters"] == ("TEXT", 0, None)
        assert [name for _, name, *_ in db.execute("PRAGMA table_info(about)")] == ["key", "value"]
        assert [name for _, name, *_ in db.execute("PRAGMA table_info(orders)")] == ["id", "operation_id", "what", "at"]
    journal.close()
