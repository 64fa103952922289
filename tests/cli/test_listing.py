"""``vluna-llm outbox``: what it lists, and that looking changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("uvicorn", reason="these tests need the extra sandbox")

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.errors import GateDenied
from vluna_llm.operation import OperationState, Part
from vluna_llm.outbox import Journal, Row
from vluna_llm.sandbox import Sandbox
from vluna_llm.usage.meters import MeterLine

Cli = Callable[..., Any]


@pytest.fixture
def left_behind(gate: Sandbox, make_vluna: Callable[..., Vluna], tmp_path: Path) -> Path:
    """A directory with a journal in which one operation waits for the gate, one was booked and one denied."""
    directory = tmp_path / "outbox"
    vluna = make_vluna(outbox=str(directory))
    with call_context(principal_id="acme") as scope, vluna.operation(feature_code="tools.search", estimate=1) as op:
        op.record(quantity=2)
    assert scope.wait(5)
    gate.set_credit("broke", 0)
    denied = vluna.operation(feature_code="tools.search", estimate=1)
    with call_context(principal_id="broke"), pytest.raises(GateDenied), denied:
        pass
    with call_context(principal_id="globex"), vluna.operation(feature_code="tools.search", estimate=1) as op:
        gate.stop()
        op.record(quantity=7)
    vluna.close(timeout=0.0)
    return directory


def test_outbox_lists_what_waits_and_nothing_else(cli: Cli, left_behind: Path) -> None:
    """Booked and denied operations are not listed; leases and the bytes for the gate are not shown."""
    ran = cli("outbox", str(left_behind), "--json")
    assert ran.code == 0
    data = json.loads(ran.out)
    (operation,) = data["operations"]
    assert operation["state"] in ("pending", "sent")
    assert operation["principal_id"] == "globex"
    assert operation["usage"] == {"input_tokens": 7}
    assert "lease." not in ran.out
    assert "lease_token" not in operation
    assert "body" not in operation
    table = cli("outbox", str(left_behind)).out
    assert "globex" in table
    assert "acme" not in table
    assert "1 operation(s)" in table


def test_outbox_tells_what_an_ingest_charged_and_what_is_left(cli: Cli, tmp_path: Path) -> None:
    """In the table, as JSON and for an accountant."""
    state = OperationState().ungated().started().completed(TokenUsage(100, 40), "provider").sent()
    left = state.partly_booked((MeterLine("m.output", 40),), (Part("c-1", 300),))
    row = Row("op-1", "https://gate", "realm", 1, "acme", "acme", "m", 1.0, "", "k", held=True, state=left, body=b"{}")
    journal = Journal(tmp_path)
    journal.insert(row)
    journal.close()
    table = cli("outbox", str(tmp_path)).out
    assert "40 left" in table
    assert "m.output (40)" in " ".join(table.split())
    (shown,) = json.loads(cli("outbox", str(tmp_path), "--json").out)["operations"]
    assert (shown["state"], shown["unbilled"], shown["charged_xusd"]) == ("held", 40, 300)
    exported = json.loads(cli("outbox", "export", "-d", str(tmp_path)).out)
    assert (exported["quantity"], exported["unbilled"], exported["unbilled_lines"]) == (140, 40, {"m.output": 40})
    assert (exported["charged_xusd"], exported["charged_by"]) == (300, {"c-1": 300})


def test_outbox_changes_nothing(cli: Cli, gate: Sandbox, left_behind: Path, make_vluna: Callable[..., Vluna]) -> None:
    """Listing leaves the files as they are, and the next process still delivers what waits, once."""
    journals = sorted(left_behind.glob("journal-*.sqlite3"))
    before = [path.read_bytes() for path in journals]
    cli("outbox", str(left_behind))
    assert [path.read_bytes() for path in journals] == before
    gate.start()
    heir = make_vluna(outbox=str(left_behind))
    with call_context(principal_id="acme"), heir.operation(feature_code="tools.search", estimate=1) as op:
        op.record(quantity=1)
    assert heir.flush(10)
    assert [entry.quantity for entry in gate.booked("globex").entries] == [7]
    assert json.loads(cli("outbox", str(left_behind), "--json").out)["operations"] == []


def test_outbox_reads_the_journal_of_a_running_process(
    cli: Cli, gate: Sandbox, make_vluna: Callable[..., Vluna], tmp_path: Path
) -> None:
    """An operation in flight is counted while its process runs."""
    vluna = make_vluna(outbox=str(tmp_path / "live"))
    with call_context(principal_id="acme"), vluna.operation(feature_code="tools.search", estimate=1) as op:
        assert json.loads(cli("outbox", str(tmp_path / "live"), "--json").out)["in_flight"] == 1
        op.record(quantity=1)


@pytest.mark.parametrize("with_shared_memory", [True, False])
def test_outbox_reads_what_a_killed_process_left(
    cli: Cli, gate: Sandbox, make_vluna: Callable[..., Vluna], tmp_path: Path, with_shared_memory: bool
) -> None:
    """Rows that are only in the write-ahead log are seen, and the log is not moved into the file by looking."""
    vluna = make_vluna(outbox=str(tmp_path / "live"))
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    with call_context(principal_id="acme"), vluna.operation(feature_code="tools.search", estimate=1) as op:
        gate.stop()
        op.record(quantity=7)
    for path in (tmp_path / "live").glob("journal-*"):
        if path.suffix != ".lock" and (with_shared_memory or not path.name.endswith("-shm")):
            (crashed / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in crashed.iterdir() if not path.name.endswith("-shm")}
    assert any(name.endswith("-wal") and content for name, content in before.items())
    data = json.loads(cli("outbox", str(crashed), "--json").out)
    assert [operation["usage"] for operation in data["operations"]] == [{"input_tokens": 7}]
    assert {path.name: path.read_bytes() for path in crashed.iterdir() if not path.name.endswith("-shm")} == before


def test_outbox_looks_where_the_settings_say(cli: Cli, left_behind: Path, tmp_path: Path) -> None:
    """VLUNA_LLM_OUTBOX is the default; without it, every journal of this user."""
    assert "globex" in cli("outbox", VLUNA_LLM_OUTBOX=str(left_behind)).out
    assert "Nothing waits" in cli("outbox").out
    home = tmp_path / "state" / "vluna-llm" / "some-gate"
    home.parent.mkdir(parents=True)
    left_behind.rename(home)
    assert "globex" in cli("outbox").out


def test_outbox_names_a_journal_that_cannot_be_read(cli: Cli, tmp_path: Path) -> None:
    """A broken file is named and makes the exit code 3; it does not hide the others."""
    (tmp_path / "journal-1-broken.sqlite3").write_bytes(b"no database" * 100)
    ran = cli("outbox", str(tmp_path))
    assert ran.code == 3
    assert "journal-1-broken.sqlite3" in ran.out
    assert json.loads(cli("outbox", str(tmp_path), "--json").out)["unreadable"][0]["problem"]


def test_outbox_refuses_what_it_cannot_look_at(cli: Cli, tmp_path: Path) -> None:
    """An outbox in memory and a directory that is not there: one sentence each, exit code 2."""
    memory = cli("outbox", VLUNA_LLM_OUTBOX="memory")
    assert memory.code == 2
    assert "nothing on disk to list" in memory.err
    assert cli("outbox", str(tmp_path / "none")).err == f"There is no directory {tmp_path / 'none'}.\n"
