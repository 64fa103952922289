"""What the README and the example show of Pydantic AI is what happens: both are run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from shown import TOP, python, snippet

from vluna_llm.sandbox import Sandbox
from vluna_llm.sandbox.replay import ReplayUpstream

pytest.importorskip("pydantic_ai", reason="Pydantic AI is not installed: pip install 'pydantic-ai-slim[openai]'")

# The one word that is changed: no recorded answer is of a model that costs money.
SHOWN, RECORDED = "gpt-4o-mini", "smollm2-135m-instruct"


def test_the_snippet_runs_as_it_stands(tmp_path: Path) -> None:
    """It charges the customer whom it names what the provider reported, and warns of nothing."""
    code = snippet("VlunaCapability")
    assert SHOWN in code
    with Sandbox() as gate, ReplayUpstream() as provider:
        settings = {**gate.env(), "OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": "none"}
        shown = python(["-c", code.replace(SHOWN, RECORDED)], tmp_path, **settings)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout.strip()
        (entry,) = gate.booked("customer_123").entries
        reported = sum(one.tokens.input + one.tokens.output for one in provider.served if one.tokens)
    assert (entry.feature, entry.quantity) == (f"openai.{RECORDED}", reported)
    assert entry.labels["agent"] == "agent"


def test_the_example_runs_without_keys(tmp_path: Path) -> None:
    """Two turns, a sold tool, a stream; one customer is charged, the one without credit is told so."""
    shown = python(["-W", "error", str(TOP / "examples" / "pydantic_ai_agent.py")], tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert lines[:2] == ["Ann: Your order has left the warehouse this morning.", "Ann: It comes tomorrow."]
    quantities = re.findall(r"^  (\S+): (\d+) for (\d+) XUSD$", shown.stdout, re.M)
    assert sorted((feature, int(quantity)) for feature, quantity, _ in quantities) == [
        ("openai.gpt-4o-mini", 72),
        ("openai.gpt-4o-mini", 92),
        ("openai.gpt-4o-mini", 112),
        ("tools.order_status", 1),
    ]
    together = sum(int(xusd) for *_, xusd in quantities)
    assert together > 0
    assert f"  together {together} XUSD" in lines
    assert lines[-2].startswith("Bob: not answered (insufficient_credit)")
    assert lines[-1] == f"The gate has charged Ann {together} XUSD and Bob nothing."
