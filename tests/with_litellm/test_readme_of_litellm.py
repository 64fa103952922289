"""The README's snippet for LiteLLM, run as it stands by a Python of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from provider import Provider

from vluna_llm.sandbox import Sandbox

ROOT = Path(__file__).resolve().parents[2]


def test_the_snippet_runs_as_it_stands(provider: Provider, tmp_path: Path) -> None:
    """It charges the customer whom it names, once, and leaves nothing on disk."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = (
        snippet
        for snippet in re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
        if "VlunaCallback" in snippet
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLUNA_", "OPENAI_"))}
    with Sandbox() as gate:
        environment = {
            **kept,
            **gate.env(),
            "HOME": str(tmp_path),
            "XDG_STATE_HOME": str(tmp_path / "state"),
            "OPENAI_BASE_URL": provider.base_url,
            "OPENAI_API_KEY": "none",
        }
        done = subprocess.run(
            [sys.executable, "-c", shown], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90
        )
        assert done.returncode == 0, done.stderr
        entries = gate.booked("customer_123").entries
    assert [(entry.feature, entry.status, entry.quantity) for entry in entries] == [
        ("openai.gpt-4o-mini", "applied", 120)
    ]
    assert not [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
