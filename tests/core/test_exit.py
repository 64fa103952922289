"""How a process ends: what it owes is delivered on the way out, or by the next one."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vluna_llm import Vluna
from vluna_llm.sandbox import Sandbox

PROGRAM = """
import os, signal, sys
from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.lifecycle import ModelCall

vluna = Vluna()
with call_context(principal_id="ann"):
    operation = vluna.begin(ModelCall("chat.completions", "openai", "gpt-4o-mini", {{"messages": []}}))
{before}
operation.finish(Ending("complete", usage=TokenUsage(100, 20), finished=True))
{after}
"""


def run(gate: Sandbox, outbox: Path, *, before: str = "", after: str = "") -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(PROGRAM).format(before=before, after=after)
    environment = {**gate.env(), "VLUNA_LLM_OUTBOX": str(outbox), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_script_that_just_ends_has_paid_and_leaves_nothing_behind(gate: Sandbox, tmp_path: Path) -> None:
    ended = run(gate, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [entry.quantity for entry in gate.booked("ann").entries] == [120]
    assert list(tmp_path.iterdir()) == []


def test_a_script_that_ends_by_an_exception_has_paid_too(gate: Sandbox, tmp_path: Path) -> None:
    ended = run(gate, tmp_path, after="raise SystemExit(3)")
    assert ended.returncode == 3
    assert [entry.quantity for entry in gate.booked("ann").entries] == [120]


def test_a_gate_that_hangs_holds_up_the_exit_for_seconds_only_and_the_next_process_delivers(
    gate: Sandbox, tmp_path: Path, make_vluna: Callable[..., Vluna]
) -> None:
    gate.faults.add("hang", "commits", times=None)
    started = time.monotonic()
    ended = run(gate, tmp_path)
    assert ended.returncode == 0
    assert time.monotonic() - started < 12
    assert "not delivered yet" in ended.stderr
    gate.faults.clear()
    vluna = make_vluna(outbox=str(tmp_path))
    vluna._running()
    assert vluna.flush(10)
    assert [entry.quantity for entry in gate.booked("ann").entries] == [120]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_process_loses_what_it_had_not_seen_and_nothing_else(
    gate: Sandbox, tmp_path: Path, make_vluna: Callable[..., Vluna], moment: str
) -> None:
    gate.faults.add("hang", "meters", times=None)
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    killed = run(gate, tmp_path, **{moment: kill})
    assert killed.returncode == -signal.SIGKILL
    gate.faults.clear()
    vluna = make_vluna(outbox=str(tmp_path))
    vluna._running()
    assert vluna.flush(10)
    assert [entry.quantity for entry in gate.booked("ann").entries] == ([120] if moment == "after" else [])
    assert len(vluna._running().ledger.journal.rows("lost")) == (1 if moment == "before" else 0)


@pytest.mark.slow
def test_a_gate_that_hangs_holds_up_the_exit_for_the_same_few_seconds_however_many_instances_there_are(
    gate: Sandbox, tmp_path: Path
) -> None:
    gate.faults.add("hang", "commits", times=None)
    more = """
import time
others = [Vluna() for _ in range(25)]
for other in others:
    with call_context(principal_id="ann"):
        one = other.begin(ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []}))
    one.finish(Ending("complete", usage=TokenUsage(100, 20), finished=True))
print(time.time(), flush=True)
"""
    ended = run(gate, tmp_path, after=more)
    took = time.time() - float(ended.stdout)
    assert ended.returncode == 0
    assert 4.5 < took < 8.5
