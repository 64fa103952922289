"""An operator and the shared outbox: what waits there is listed, and orders are carried out where the rows are."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("uvicorn", reason="these tests need the extra sandbox")

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.sandbox import Sandbox

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True, response_id="resp_1")
FEATURE = "openai.gpt-4o-mini"
METERS = (FEATURE, *(f"{FEATURE}.tokens.{part}" for part in ("input", "cached", "output")))


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, gate: Sandbox, database: str
) -> Callable[..., tuple[int, str, str]]:
    """Runs ``vluna-llm`` in this process, with the settings of a host that uses the shared outbox."""
    from vluna_llm.cli import main

    for name, value in {**gate.env(), "VLUNA_LLM_OUTBOX_SHARED": database}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLUNA_LLM_OUTBOX", str(tmp_path / "operator"))
    (tmp_path / "operator").mkdir()

    def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["vluna-llm", *arguments])
            with pytest.raises(SystemExit) as ended:
                main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def host(make_vluna: Callable[..., Vluna], tmp_path: Path, database: str) -> Vluna:
    return make_vluna(outbox=str(tmp_path / "host"), outbox_shared=database)


def begin(vluna: Vluna, principal: str) -> Operation:
    with call_context(principal_id=principal):
        operation = vluna.begin(CALL)
    assert operation is not None
    return operation


def charged(gate: Sandbox, principal: str) -> list[tuple[str, int]]:
    return [(entry.kind, entry.quantity) for entry in gate.booked(principal).entries if entry.charged_xusd > 0]


def listed(cli: Callable[..., Any], *options: str) -> dict[str, str]:
    code, out, _ = cli("outbox", "--json", *options)
    assert code in (0, 1), out
    return {one["operation_id"]: one["state"] for one in json.loads(out)["operations"]}


def eventually(true: Callable[[], Any], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def stuck(host: Vluna, gate: Sandbox, cli: Callable[..., Any]) -> dict[str, Operation]:
    """One operation that the gate refused, and one that it took and did not charge; both in the shared outbox."""
    dead = begin(host, "dead")
    gate.feature(FEATURE, active=False)
    dead.finish(USED)
    assert dead.wait(20) is not None
    gate.feature(FEATURE, active=True)
    quarantined = begin(host, "quarantined")
    for meter in METERS:
        gate.unprice(meter)
    quarantined.finish(USED)
    assert quarantined.wait(20) is not None
    for meter in METERS:
        gate.price(meter, 5)
    return {"dead": dead, "quarantined": quarantined}


def test_what_waits_there_is_listed_from_any_host(
    cli: Callable[..., Any], stuck: dict[str, Operation], tmp_path: Path
) -> None:
    """Once, also on the host whose journal has a copy; with the place, and no password."""
    expected = {operation.operation_id: state for state, operation in stuck.items()}
    eventually(lambda: listed(cli) == expected)
    assert listed(cli, "-d", str(tmp_path / "host")) == expected
    code, out, _ = cli("outbox")
    assert code == 1
    assert "where" in out
    found = json.loads(cli("outbox", "--json")[1])["operations"]
    assert {one["journal"] for one in found} == {None}


def test_orders_are_carried_out_by_whichever_host_delivers(
    cli: Callable[..., Any], stuck: dict[str, Operation], gate: Sandbox
) -> None:
    eventually(lambda: len(listed(cli)) == 2)
    code, out, _ = cli("outbox", "retry", "--state", "dead")
    assert code == 0, out
    assert charged(gate, "dead") == [("commit", 120)]
    code, out, _ = cli("outbox", "repair", "--all")
    assert code == 0, out
    assert charged(gate, "quarantined") == [("ingest", 120)]
    assert listed(cli) == {}


def test_what_is_dropped_there_is_never_sent(
    cli: Callable[..., Any], stuck: dict[str, Operation], gate: Sandbox, tmp_path: Path
) -> None:
    eventually(lambda: len(listed(cli)) == 2)
    code, out, _ = cli("outbox", "drop", stuck["dead"].operation_id, "--yes", "-o", str(tmp_path / "dropped.jsonl"))
    assert code == 0, out
    assert set(listed(cli).values()) == {"quarantined"}
    assert charged(gate, "dead") == []


def test_exit_3_where_it_cannot_be_asked(cli: Callable[..., Any], database: str) -> None:
    code, out, _ = cli("outbox", VLUNA_LLM_OUTBOX_SHARED="postgresql://nobody:secret@127.0.0.1:9/none")
    assert code == 3
    assert "127.0.0.1" in out
    assert "secret" not in out
