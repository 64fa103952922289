"""What the README shows of Google ADK is what happens: its snippet is run as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("google.adk", reason="Google ADK is not installed: pip install google-adk")

from gemini_upstream import GeminiUpstream
from shown import python, snippet

from vluna_llm.sandbox import Sandbox


def test_the_snippet_runs_as_it_stands(tmp_path: Path) -> None:
    """It charges the customer whom it names what the provider reported, and warns of nothing."""
    with Sandbox() as gate, GeminiUpstream() as upstream:
        settings = {**gate.env(), "GOOGLE_GEMINI_BASE_URL": upstream.host, "GOOGLE_API_KEY": "none"}
        shown = python(["-c", snippet("VlunaPlugin")], tmp_path, **settings)
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
    done = python(["-c", "import vluna_llm.integrations.google_adk"], tmp_path)
    assert done.returncode == 1
    assert "pip install 'vluna-llm[google-adk]'" in done.stderr
