"""What the README and the examples show, run in a Python of the user's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
_OURS = ("VLUNA_", "OPENAI_", "GOOGLE_", "GEMINI_")


def snippet(word: str) -> str:
    """The one snippet of the README that has this word in it."""
    readme = (TOP / "README.md").read_text(encoding="utf-8")
    (found,) = (code for code in re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE) if word in code)
    return found


def python(arguments: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python without any setting of this process, with a home of its own; warnings go to standard error."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
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
