"""The examples, run as a newcomer runs them: as programs, without a key, an account or a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def said(name: str, tmp_path: Path, *, warned: str = "") -> list[str]:
    """What an example prints, with a home of its own and no settings of this process; ``warned`` is on stderr."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("VLUNA_", "OPENAI_", "ANTHROPIC_", "GOOGLE_"))
    }
    run = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", str(EXAMPLES / name)],
        cwd=tmp_path,
        env={**kept, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (run.returncode, run.stderr) == (0, warned)
    return run.stdout.splitlines()


def test_the_web_app_bills_each_request_to_its_customer(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    asked, listened, refused, booked = said("web_app.py", tmp_path)
    assert asked.startswith("ann asks: 200 ")
    assert int(asked.split()[3]) > 0
    assert listened.startswith("ann listens: 200 ")
    assert refused == "bob asks: 402 insufficient_credit"
    assert booked == "the gate has booked 2 calls of ann, 0 of bob"


def test_a_job_that_is_run_again_is_charged_once(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    taken_over = "Took over 1 unsettled operation(s) of processes that ended: 1 to deliver, 0 lost in flight.\n"
    lines = said("job_worker.py", tmp_path, warned=taken_over)
    assert "job-2 died, and is handed out again" in lines
    assert lines[-1] == "4 model calls, 3 charges for 3 jobs"
    assert sum(" done: " in line for line in lines) == 3


def test_agents_of_google_adk_bill_whoever_asks(tmp_path: Path) -> None:
    """A sold tool, a handoff to another model, streamed; the customer without credit is refused before any of it."""
    pytest.importorskip("google.adk")
    ada, bob, *booked, ada_pays, bob_pays = said("google_adk_agent.py", tmp_path)
    assert ada.startswith("ada asks. [clerk: search_orders] [clerk: transfer_to_agent] Your lantern left on Monday. ")
    assert ada.count("lantern") == 1
    assert bob == "bob asks. Refused: insufficient_credit; no model was called"
    rows = [line.split() for line in booked]
    assert sorted((feature, agent, int(quantity)) for feature, agent, quantity, *_ in rows) == [
        ("google.gemini-2.5-flash", "clerk", 84),
        ("google.gemini-2.5-flash", "clerk", 114),
        ("google.gemini-2.5-pro", "writer", 152),
        ("tools.order_search", "clerk", 1),
    ]
    total = sum(int(row[3]) for row in rows)
    assert total > 0
    assert (ada_pays, bob_pays) == (f"ada pays {total} XUSD", "bob pays 0 XUSD")
