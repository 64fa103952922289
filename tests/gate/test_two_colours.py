"""The client for threads is the client for event loops with the awaiting taken out, to the letter.

`vluna_llm/gate/client_async.py` is written by hand; after a change to it run this file as a program to write
`client.py` anew. The test fails where the two have drifted apart.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GATE = Path(__file__).resolve().parents[2] / "vluna_llm" / "gate"

SUBSTITUTIONS = (
    (r"\A# ruff: noqa.*\n", ""),
    (
        r"for event loops: every endpoint that we use, typed. Its twin for threads is ``client``",
        "for threads: every endpoint that we use, typed. Its twin for event loops is ``client_async``",
    ),
    (
        r"for event loops. One client serves any number of loops, one after another or in several threads",
        "for threads. One client serves any number of them, and a forked child as well",
    ),
    (r"the connections of the running loop", "the connections"),
    (r"\nimport anyio\n", "\n"),
    (r"\banyio\.sleep", "time.sleep"),
    (r"\bawait ", ""),
    (r"\basync def\b", "def"),
    (r"\bAsyncGateClient\b", "GateClient"),
    (r"\bAsyncTransport\b", "Transport"),
    (r"\bopen_async_transport\b", "open_transport"),
    (r"\btransport_async\b", "transport"),
    (r"\bhttpx\.AsyncClient\b", "httpx.Client"),
    (r"\b__a(enter|exit)__\b", r"__\1__"),
    (r"\baclose\b", "close"),
)


def for_threads(source: str) -> str:
    """The source for threads."""
    for pattern, replacement in SUBSTITUTIONS:
        source, count = re.subn(pattern, replacement, source)
        assert count, f"nothing to substitute for {pattern}"
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("needs ruff, to wrap lines as the repository does")
    command = [ruff, "format", "--stdin-filename", str(GATE / "client.py"), "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout


def test_the_two_colours_are_one_text() -> None:
    written = (GATE / "client.py").read_text()
    assert written == for_threads((GATE / "client_async.py").read_text())


if __name__ == "__main__":
    (GATE / "client.py").write_text(for_threads((GATE / "client_async.py").read_text()))
