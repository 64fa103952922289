"""What the README shows of Google ADK is what happens: its snippet is run as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("google.adk", reason="Google ADK is not installed: pip install google-adk")

from gemini_upstream import GeminiUpstream

from vluna_llm.sandbox import Sandbox

TOP = Path(__file__).resolve().parents[2]
README = (TOP / "README.md").read_text(encoding="utf-8")


def run(arguments: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python of the user's own: no setting of this process, a home of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLUNA_", "GOOGLE_", "GEMINI_"))}
    path = os.pathsep.join(filter(None, [str(TOP), os.environ.get("PYTHONPATH")]))
    environment = {**kept, "HOME": str(folder), "XDG_STATE_HOME": str(folder / "state"), "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=90,
    )


def test_the_snippet_runs_as_it_stands(tmp_path: Path) -> None:
    """It charges the customer whom it names what the provider reported, and warns of nothing."""
    (snippet,) = (
        code for code in re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE) if "VlunaPlugin" in code
    )
    with Sandbox() as gate, GeminiUpstream() as upstream:
        settings = {**gate.env(), "GOOGLE_GEMINI_BASE_URL": upstream.host, "GOOGLE_API_KEY": "none"}
        shown = run(["-c", snippet], tmp_path, **settings)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "guide > word" in shown.stdout
        (entry,) = gate.booked("customer_123").entries
        assert len(upstream.posts()) == 1
    assert (entry.feature, entry.quantity) == ("google.gemini-2.5-flash", 120)
    assert entry.labels["agent"] == "guide"
    assert entry.labels["run_id"].startswith("e-")


def test_the_extra_is_named(tmp_path: Path) -> None:
    """Without ADK the import says what to install."""
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "__init__.py").write_text("")
    done = run(["-c", "import vluna_llm.integrations.google_adk"], tmp_path)
    assert done.returncode == 1
    assert "pip install 'vluna-llm[google-adk]'" in done.stderr
