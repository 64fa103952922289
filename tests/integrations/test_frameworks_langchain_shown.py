"""What is shown of LangChain runs as it stands: the README's snippet, and the example."""

from __future__ import annotations

from pathlib import Path

import pytest
from langchain_stage import Script
from shown import TOP, python, snippet

from vluna_llm.sandbox import Sandbox

pytest.importorskip("langchain.agents", reason="LangChain's agents are not installed: pip install langchain")


def test_the_snippet_charges_both_customers(tmp_path: Path) -> None:
    """As pasted: one by the context, one by the config."""
    script = Script()
    try:
        with Sandbox() as gate:
            settings = {**gate.env(), "OPENAI_BASE_URL": script.base_url, "OPENAI_API_KEY": "none"}
            ran = python(["-c", snippet("wrap_model")], tmp_path, **settings)
            assert (ran.returncode, ran.stderr) == (0, "")
            for customer in ("customer_123", "customer_456"):
                entries = gate.booked(customer).entries
                assert [(entry.feature, entry.status) for entry in entries] == [("openai.gpt-4o-mini", "applied")]
    finally:
        script.close()
    assert len(script.asked) == 2


def test_the_example_runs_without_keys(tmp_path: Path) -> None:
    """Its words arrive streamed, and it prints what the gate charged."""
    ran = python([str(TOP / "examples" / "langgraph_agent.py")], tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    words, *receipts, last = ran.stdout.splitlines()
    assert words.strip() == "High water at Dover: 11:52 and 23:58."
    assert sorted(line.partition(",")[0] for line in receipts) == [
        *["openai.gpt-4o-mini: 101 units"] * 2,
        "tools.tides: 1 units",
    ]
    assert all(line.endswith("booked") for line in receipts)
    charged = sum(int(line.split(", ")[1].split()[0]) for line in receipts)
    assert last == f"{charged} XUSD charged to customer_123"
    assert charged > 0
