"""The public API keeps its types: a file that only a type checker reads is checked here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed: pip install 'vluna-llm[dev]'")
pytest.importorskip("openai", reason="the OpenAI SDK is not installed: pip install 'vluna-llm[openai]'")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_public_api_has_the_types_that_products_rely_on(tmp_path: Path) -> None:
    """``vluna.wrap`` gives back the type it was given, errors carry their attributes, and so on."""
    command = [sys.executable, "-m", "mypy", "--strict", "--python-version", "3.10"]
    command += ["--cache-dir", str(tmp_path), "tests/typing/public_api.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
