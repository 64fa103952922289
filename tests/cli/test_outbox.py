"""``vluna-llm outbox`` as an operator uses it: what waits, what to tell cron, and what becomes of an order."""

from __future__ import annotations

import csv
import io
import json
import os
import sqlite3
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("uvicorn", reason="these tests need the extra sandbox")

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.cli.selection import seconds, short_ids
from vluna_llm.ending import Ending
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.outbox.orders import waiting_in
from vluna_llm.sandbox import Sandbox

Cli = Callable[..., Any]
Make = Callable[..., Vluna]

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True, response_id="resp_1")
FEATURE = "openai.gpt-4o-mini"
METERS = (FEATURE, *(f"{FEATURE}.tokens.{part}" for part in ("input", "cached", "output")))
HOUR = 3_600.0


def begin(vluna: Vluna, principal: str = "ann", **context: Any) -> Operation:
    with call_context(principal_id=principal, **context):
        operation = vluna.begin(CALL)
    assert operation is not None
    return operation


def charged(gate: Sandbox, principal: str = "ann") -> list[tuple[str, int]]:
    return [(entry.kind, entry.quantity) for entry in gate.booked(principal).entries if entry.charged_xusd > 0]


def journals(directory: Path) -> list[Path]:
    return sorted(directory.glob("journal-*.sqlite3"))


def change(directory: Path, sql: str, *values: Any) -> None:
    """Change a row of a dead process, where time or another version would have."""
    (path,) = journals(directory)
    with sqlite3.connect(path) as db:
        db.execute(sql, values)
    db.close()


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


@pytest.fixture
def left(gate: Sandbox, make_vluna: Make, outbox: Path) -> dict[str, str]:
    """What a process left behind that has ended: one operation in each state, by its id, and a booked one."""
    vluna = make_vluna(outbox=str(outbox))
    ids: dict[str, str] = {}
    booked = begin(vluna, "paid")
    booked.finish(USED)
    assert booked.wait(10) is not None

    lost = begin(vluna, "flying")
    ids["lost"] = lost.operation_id

    dead = begin(vluna, "dead", request_id="=HYPERLINK(1)")
    gate.feature(FEATURE, active=False)
    dead.finish(USED)
    assert dead.wait(10) is not None
    gate.feature(FEATURE, active=True)
    ids["dead"] = dead.operation_id

    quarantined = begin(vluna, "quarantined")
    for meter in METERS:
        gate.unprice(meter)
    quarantined.finish(USED)
    assert quarantined.wait(10) is not None
    for meter in METERS:
        gate.price(meter, 5)
    ids["quarantined"] = quarantined.operation_id

    waiting = {"held": begin(vluna, "held"), "pending": begin(vluna, "pending")}
    away = gate.faults.add("status", "commits", times=None, status=503)
    for state, operation in waiting.items():
        operation.finish(USED)
        ids[state] = operation.operation_id
    vluna.close(timeout=0.0)
    gate.faults.remove(away)
    change(outbox, "UPDATE operations SET held = 1, last_error = '401' WHERE operation_id = ?", ids["held"])
    return ids


@pytest.fixture
def ready(gate: Sandbox) -> dict[str, str]:
    """The settings of the gate, as environment variables."""
    return dict(gate.env())


def listed(cli: Cli, outbox: Path, *options: str) -> dict[str, str]:
    """State by id."""
    data = json.loads(cli("outbox", str(outbox), "--json", *options).out)
    return {one["operation_id"]: one["state"] for one in data["operations"]}


# -- listing -----------------------------------------------------------------------------------------------------------


def test_each_state_is_listed_by_its_word(cli: Cli, left: dict[str, str], outbox: Path) -> None:
    """In the table, in JSON and in its counts; what was booked is not; the call of a dead process counts as lost."""
    ran = cli("outbox", str(outbox), "--json")
    data = json.loads(ran.out)
    assert {one["state"]: one["operation_id"] for one in data["operations"]} == left
    assert data["counts"] == dict.fromkeys(("pending", "held", "dead", "quarantined", "lost"), 1)
    assert (data["needs_person"], data["in_flight"]) == (4, 0)
    table = cli("outbox", str(outbox)).out
    for state, name in left.items():
        assert state in table
        assert name[:8] in table
    assert "paid" not in table
    assert "5 operation(s)" in table
    assert "outbox repair --all" in table


def test_filters_say_what_is_listed(cli: Cli, left: dict[str, str], outbox: Path) -> None:
    """By state, more than one, by customer, by age."""
    assert listed(cli, outbox, "--state", "dead") == {left["dead"]: "dead"}
    both = listed(cli, outbox, "--state", "held", "--state", "lost")
    assert set(both.values()) == {"held", "lost"}
    assert set(listed(cli, outbox, "--principal", "quarantined").values()) == {"quarantined"}
    assert listed(cli, outbox, "--principal", "nobody") == {}
    assert listed(cli, outbox, "--older-than", "1h") == {}
    change(outbox, "UPDATE operations SET ended_at = ended_at - 7300 WHERE operation_id = ?", left["dead"])
    assert set(listed(cli, outbox, "--older-than", "2h").values()) == {"dead"}
    assert "Nothing that is asked for waits" in cli("outbox", str(outbox), "--principal", "nobody").out


def test_a_long_list_is_cut_and_says_so(cli: Cli, left: dict[str, str], outbox: Path) -> None:
    cut = cli("outbox", str(outbox), "--limit", "2").out
    assert "... and 3 more" in cut
    assert "5 operation(s)" in cut
    assert "more" not in cli("outbox", str(outbox), "--limit", "0").out


def test_the_directory_may_be_an_option(cli: Cli, left: dict[str, str], outbox: Path) -> None:
    assert "5 operation(s)" in cli("outbox", "--directory", str(outbox)).out
    assert "5 operation(s)" in cli("outbox", "list", str(outbox)).out


# -- what cron is told -------------------------------------------------------------------------------------------------


def test_exit_0_where_nothing_waits_for_a_person(cli: Cli, left: dict[str, str], outbox: Path) -> None:
    """What is pending goes out by itself; with --quiet cron then has nothing to mail."""
    assert cli("outbox", str(outbox), "--state", "pending").code == 0
    assert cli("outbox", str(outbox), "--state", "pending", "--quiet") == (0, "", "")
    assert cli("outbox", str(outbox), "--principal", "nobody").code == 0


@pytest.mark.parametrize("state", ["held", "dead", "quarantined", "lost"])
def test_exit_1_where_something_waits_for_a_person(cli: Cli, left: dict[str, str], outbox: Path, state: str) -> None:
    ran = cli("outbox", str(outbox), "--state", state, "--quiet")
    assert ran.code == 1
    assert left[state][:8] in ran.out
    assert cli("outbox", str(outbox), "--state", state, "--json").code == 1


def test_exit_1_where_something_is_pending_for_too_long(cli: Cli, left: dict[str, str], outbox: Path) -> None:
    """An hour, unless told otherwise."""
    change(outbox, "UPDATE operations SET ended_at = ended_at - 4000 WHERE operation_id = ?", left["pending"])
    only = ("outbox", str(outbox), "--state", "pending")
    assert cli(*only).code == 1
    assert cli(*only, "--max-age", "2h").code == 0
    assert cli(*only, "--max-age", "1min").code == 1


def test_exit_2_where_the_settings_or_the_command_are_wrong(cli: Cli, tmp_path: Path) -> None:
    """Also where a journal could not be read besides."""
    (tmp_path / "journal-1-broken.sqlite3").write_bytes(b"no database" * 100)
    at = str(tmp_path)
    for wrong in (
        ("outbox", str(tmp_path / "none")),
        ("outbox", at, "--state", "asleep"),
        ("outbox", at, "--max-age", "soon"),
        ("outbox", "retry", "-d", at),
        ("outbox", "retry", "abc", "--all", "-d", at),
        ("outbox", "retry", "abc", "-d", at),
        ("outbox", "drop", "-d", at),
        ("outbox", "export", "abc", "-d", at),
        ("outbox", "export", "--format", "xls", "-d", at),
        ("outbox", "export", "-d", at, "-o", str(tmp_path / "none" / "file.csv")),
    ):
        ran = cli(*wrong)
        assert ran.code == 2, wrong
        assert ran.err, wrong
    shared = cli("outbox", at, VLUNA_LLM_OUTBOX_SHARED="postgresql://nobody@127.0.0.1:9/none")
    assert shared.code == 2
    assert "VLUNA_REALM_ID" in shared.err


def test_exit_3_where_a_journal_cannot_be_read(cli: Cli, left: dict[str, str], outbox: Path) -> None:
    """It outranks what waits: nobody knows what the other one holds. Each command says so."""
    (outbox / "journal-1-broken.sqlite3").write_bytes(b"no database" * 100)
    assert cli("outbox", str(outbox)).code == 3
    assert cli("outbox", str(outbox), "--quiet").out
    assert cli("outbox", str(outbox), "--json").code == 3
    exported = cli("outbox", "export", "-d", str(outbox))
    assert exported.code == 3
    assert len(exported.out.splitlines()) == 5
    assert "journal-1-broken" in exported.err
    retried = cli("outbox", "retry", "--state", "held", "-d", str(outbox), "--timeout", "0")
    assert retried.code == 3
    assert "journal-1-broken" in retried.err


def test_the_exit_codes_are_documented(cli: Cli) -> None:
    text = cli("outbox", "--help").out
    for code in ("0  nothing waits", "1  something does", "2  the settings", "3  a journal"):
        assert code in text
    for command in ("list", "retry", "repair", "export", "drop"):
        assert cli("outbox", command, "--help").code == 0


# -- orders ------------------------------------------------------------------------------------------------------------


def test_what_a_dead_process_left_is_delivered_by_the_command(
    cli: Cli, gate: Sandbox, left: dict[str, str], outbox: Path, ready: dict[str, str]
) -> None:
    """With the settings of the gate it takes over, as any process would: retried and repaired, charged once."""
    retried = cli("outbox", "retry", "--all", "-d", str(outbox), **ready)
    assert (retried.code, retried.err) == (0, "")
    assert retried.out.count("charged") == 3
    assert [charged(gate, name) for name in ("pending", "held", "dead")] == [[("commit", 120)]] * 3
    repaired = cli("outbox", "repair", left["quarantined"][:6], "-d", str(outbox), "--json", **ready)
    assert repaired.code == 0
    assert json.loads(repaired.out) == [
        {"operation_id": left["quarantined"], "end": "settled", "said": "charged by ingest"}
    ]
    assert charged(gate, "quarantined") == [("ingest", 120)]
    assert listed(cli, outbox) == {left["lost"]: "lost"}
    assert charged(gate, "flying") == []
    again = cli("outbox", "retry", "--all", "-d", str(outbox), **ready)
    assert (again.code, again.out) == (0, "Nothing waits that is meant by this.\n")


def test_without_credentials_the_order_waits_for_the_next_process(
    cli: Cli, gate: Sandbox, make_vluna: Make, left: dict[str, str], outbox: Path
) -> None:
    """It says so, and the next process carries it out."""
    ran = cli("outbox", "repair", "--feature", FEATURE, "--state", "quarantined", "-d", str(outbox))
    assert ran.code == 1
    assert "the next process carries it out" in ran.out.replace("\n", " ")
    assert "VLUNA_SERVICE_BASE_URL" in ran.out
    (journal,) = journals(outbox)
    assert [one.operation_id for one in waiting_in(journal)] == [left["quarantined"]]
    assert charged(gate, "quarantined") == []
    heir = make_vluna(outbox=str(outbox))
    begin(heir).fail()
    assert heir.flush(10)
    assert charged(gate, "quarantined") == [("ingest", 120)]


def test_rows_of_another_gate_are_not_delivered_to_this_one(
    cli: Cli, gate: Sandbox, left: dict[str, str], outbox: Path, ready: dict[str, str]
) -> None:
    """It names the settings under which they would be."""
    change(outbox, "UPDATE operations SET realm_id = 'elsewhere'")
    ran = cli("outbox", "retry", "--all", "-d", str(outbox), **ready)
    assert ran.code == 1
    assert "VLUNA_REALM_ID=elsewhere" in ran.out.replace("\n", " ").replace(" ", "")
    assert charged(gate, "pending") == []
    assert len(journals(outbox)) == 1


def test_half_of_the_credentials_is_a_mistake_that_is_named(
    cli: Cli, left: dict[str, str], outbox: Path, ready: dict[str, str]
) -> None:
    wrong = {**ready, "VLUNA_SERVICE_KEY_SECRET": "no secret"}
    ran = cli("outbox", "retry", "--all", "-d", str(outbox), **wrong)
    assert ran.code == 2
    assert "VLUNA_SERVICE_KEY_SECRET" in ran.err
    assert "no secret" not in ran.err


def test_a_running_process_carries_out_orders_for_its_own(
    cli: Cli, gate: Sandbox, make_vluna: Make, outbox: Path
) -> None:
    """No credentials are needed for that, and nothing of its journal is taken over."""
    vluna = make_vluna(outbox=str(outbox))
    operation = begin(vluna)
    gate.feature(FEATURE, active=False)
    operation.finish(USED)
    assert operation.wait(10) is not None
    tried = cli("outbox", "retry", "--state", "dead", "-d", str(outbox))
    assert tried.code == 1
    assert "feature inactive" in tried.out.replace("\n", " ")
    gate.feature(FEATURE, active=True)
    retried = cli("outbox", "retry", operation.operation_id, "-d", str(outbox))
    assert retried.code == 0, retried.out
    assert charged(gate) == [("commit", 120)]


def test_a_process_that_does_not_answer_is_named(cli: Cli, gate: Sandbox, make_vluna: Make, outbox: Path) -> None:
    """It may be suspended: the order waits for it."""
    vluna = make_vluna(outbox=str(outbox))
    operation = begin(vluna)
    gate.feature(FEATURE, active=False)
    operation.finish(USED)
    assert operation.wait(10) is not None
    vluna._process.running().settler.keeper.stop()
    ran = cli("outbox", "retry", "--all", "-d", str(outbox), "--timeout", "0.5s")
    assert ran.code == 1
    assert f"process {os.getpid()} has not carried it out yet" in ran.out.replace("\n", " ")


def test_what_an_order_means_nothing_for_says_why(cli: Cli, left: dict[str, str], outbox: Path) -> None:
    ran = cli("outbox", "repair", left["lost"], "-d", str(outbox))
    assert ran.code == 1
    assert "its usage is not known" in ran.out
    (journal,) = journals(outbox)
    assert waiting_in(journal) == []


# -- drop --------------------------------------------------------------------------------------------------------------


def test_what_is_dropped_is_written_first_and_never_sent(
    cli: Cli, gate: Sandbox, left: dict[str, str], outbox: Path, ready: dict[str, str], tmp_path: Path
) -> None:
    """What it gives up is shown and kept in a file of its owner alone; what is not named goes on."""
    file = tmp_path / "dropped.jsonl"
    named = [left["dead"], left["lost"], left["pending"]]
    ran = cli("outbox", "drop", *named, "--yes", "-d", str(outbox), "-o", str(file), **ready)
    assert ran.code == 0, ran.out
    assert "Gives up 3 operation(s) with 240 known tokens" in ran.out
    assert {json.loads(line)["operation_id"] for line in file.read_text().splitlines()} == set(named)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert set(listed(cli, outbox).values()) <= {"held", "quarantined"}
    assert [charged(gate, name) for name in ("dead", "flying", "pending")] == [[], [], []]
    again = cli("outbox", "drop", left["quarantined"], "--yes", "-d", str(outbox), "-o", str(file), **ready)
    assert again.code == 2
    assert "there already" in again.err
    assert left["quarantined"] in listed(cli, outbox)


def test_nothing_is_dropped_unasked(cli: Cli, left: dict[str, str], outbox: Path, ready: dict[str, str]) -> None:
    """Where nobody can be asked, --yes is needed; and no file is left."""
    ran = cli("outbox", "drop", left["dead"], "-d", str(outbox), **ready)
    assert ran.code == 2
    assert "--yes" in ran.err
    assert left["dead"] in listed(cli, outbox)
    assert not list(outbox.glob("dropped-*"))


def test_dropped_operations_are_kept_beside_the_journals_by_default(
    cli: Cli, left: dict[str, str], outbox: Path, ready: dict[str, str]
) -> None:
    """JSON on standard output stays JSON."""
    ran = cli("outbox", "drop", left["dead"], "--yes", "--json", "-d", str(outbox), **ready)
    assert [one["end"] for one in json.loads(ran.out)] == ["settled"]
    (kept,) = outbox.glob("dropped-*.jsonl")
    assert json.loads(kept.read_text())["operation_id"] == left["dead"]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


# -- export ------------------------------------------------------------------------------------------------------------


def test_the_export_is_for_an_accountant(cli: Cli, gate: Sandbox, left: dict[str, str], outbox: Path) -> None:
    """Who, what, when, how much; no lease token, none of the bytes, no secret."""
    ran = cli("outbox", "export", "-d", str(outbox))
    assert ran.code == 0
    records = {one["operation_id"]: one for one in map(json.loads, ran.out.splitlines())}
    assert {name: one["state"] for name, one in records.items()} == {name: state for state, name in left.items()}
    quarantined = records[left["quarantined"]]
    assert (quarantined["quantity"], quarantined["input_tokens"], quarantined["output_tokens"]) == (120, 100, 20)
    assert quarantined["occurred_at"].endswith("Z")
    assert quarantined["commit_id"]
    assert "pricing.not_configured" in quarantined["reason"]
    lost = records[left["lost"]]
    assert (lost["quantity"], lost["estimated_output"] > 0) == (None, True)
    with sqlite3.connect(journals(outbox)[0]) as db:
        tokens = [token for (token,) in db.execute("SELECT lease_token FROM operations WHERE lease_token IS NOT NULL")]
    db.close()
    assert tokens
    assert not [token for token in tokens if token in ran.out]
    assert gate.key_secret not in ran.out
    assert "quantity_minor" not in ran.out


def test_the_export_as_csv_runs_no_formula(cli: Cli, left: dict[str, str], outbox: Path, tmp_path: Path) -> None:
    """A value that a spreadsheet would run begins with an apostrophe; the file is its owner's alone."""
    file = tmp_path / "for the accountant.csv"
    ran = cli("outbox", "export", "--format", "csv", "-o", str(file), "--state", "dead", "-d", str(outbox))
    assert (ran.code, ran.out) == (0, "")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (record,) = csv.DictReader(io.StringIO(file.read_bytes().decode()))
    assert record["request_id"] == "'=HYPERLINK(1)"
    assert record["quantity"] == "120"
    assert {one.name for one in tmp_path.iterdir()} <= {file.name, "outbox", "state"}


# -- ids and times -----------------------------------------------------------------------------------------------------


def test_ids_may_be_shortened_as_long_as_they_are_clear(cli: Cli, left: dict[str, str], outbox: Path) -> None:
    """The shortest that the table shows is accepted; what is short for two is refused."""
    change(
        outbox,
        "UPDATE operations SET operation_id = 'vluna-llm:background:abcdef12' || '-1' WHERE operation_id = ?",
        left["dead"],
    )
    change(outbox, "UPDATE operations SET operation_id = 'abcdef12-2' WHERE operation_id = ?", left["held"])
    one = cli("outbox", "export", "abcdef12-1", "-d", str(outbox))
    assert json.loads(one.out)["state"] == "dead"
    two = cli("outbox", "export", "abcdef12", "-d", str(outbox))
    assert two.code == 2
    assert "short for 2 operations" in two.err
    table = cli("outbox", str(outbox)).out
    assert "abcdef12-1" in table
    assert "abcdef12-2" in table


def test_shown_ids_are_never_the_same() -> None:
    assert short_ids(["aaaaaaaaaa1", "x:aaaaaaaaaa2"]) == {"aaaaaaaaaa1": "aaaaaaaaaa1", "x:aaaaaaaaaa2": "aaaaaaaaaa2"}
    assert short_ids(["0123456789", "abcdefghij"]) == {"0123456789": "01234567", "abcdefghij": "abcdefgh"}
    assert set(short_ids(["x:same", "y:same"])) == {"x:same", "y:same"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("90", 90.0), ("90s", 90.0), ("1.5h", 5_400.0), ("15min", 900.0), ("15 m", 900.0), ("2d", 172_800.0)],
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "soon", "-5", "1w", "h", "1h30"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        seconds(text)


def test_a_killed_process_and_an_operator(cli: Cli, gate: Sandbox, outbox: Path, ready: dict[str, str]) -> None:
    """The whole way: a process is killed with work undelivered and in flight, and the operator clears up after it."""
    script = textwrap.dedent(
        """
        import os, signal
        from vluna_llm import TokenUsage, Vluna, call_context
        from vluna_llm.ending import Ending
        from vluna_llm.lifecycle import ModelCall
        vluna = Vluna()
        call = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []})
        with call_context(principal_id="ann"):
            done, flying = vluna.begin(call), vluna.begin(call)
        done.finish(Ending("complete", usage=TokenUsage(100, 20), finished=True))
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    away = gate.faults.add("status", "commits", times=None, status=503)
    environment = {**os.environ, **ready, "VLUNA_LLM_OUTBOX": str(outbox)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, timeout=60)
    assert killed.returncode == -9
    gate.faults.remove(away)
    assert sorted(listed(cli, outbox).values()) == ["lost", "pending"]
    assert cli("outbox", "retry", "--all", "-d", str(outbox), **ready).code == 0
    assert charged(gate) == [("commit", 120)]
    (lost,) = listed(cli, outbox)
    assert cli("outbox", "drop", lost, "--yes", "-d", str(outbox), **ready).code == 0
    assert cli("outbox", str(outbox)).code == 0
    assert journals(outbox) == [], "nothing is left that anybody has to look at"
