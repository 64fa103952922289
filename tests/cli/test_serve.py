"""``vluna-llm sandbox``: what a shell makes of it, how it ends, what it refuses."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("uvicorn", reason="these tests need the extra sandbox")

from vluna_llm.sandbox import Sandbox

SECRET = "VLUNA_SERVICE_KEY_SECRET"
URL = "VLUNA_SERVICE_BASE_URL"

Cli = Callable[..., Any]


def _serve(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vluna_llm", "sandbox", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _exports(server: subprocess.Popen[str]) -> tuple[dict[str, str], str]:
    """What a shell makes of the lines, and the line about stopping."""
    assert server.stdout is not None
    lines = [server.stdout.readline() for _ in range(5)]
    shell = subprocess.run(
        ["/bin/sh", "-c", f"{''.join(lines)}\nenv"], capture_output=True, text=True, check=True, env={}
    )
    env = dict(line.split("=", 1) for line in shell.stdout.splitlines() if line.startswith("VLUNA_"))
    return env, lines[-1]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_sandbox_prints_what_a_shell_needs_and_stops_cleanly(cli: Cli, stop: signal.Signals, tmp_path: Path) -> None:
    """The four lines are a working environment; Ctrl-C ends it with 0; the books survive in their file."""
    config = tmp_path / "gate.toml"
    config.write_text('realm_id = "realm-of-mine"\n')
    arguments = ("--port", "0", "--config", str(config), "--state", str(tmp_path / "books.sqlite3"))
    server = _serve(*arguments)
    try:
        env, last = _exports(server)
        assert set(env) == {URL, "VLUNA_REALM_ID", "VLUNA_SERVICE_KEY_ID", SECRET}
        assert env["VLUNA_REALM_ID"] == "realm-of-mine"
        assert "Ctrl-C" in last
        assert cli("verify", **env).code == 0
    finally:
        server.send_signal(stop)
        out, err = server.communicate(timeout=10)
    assert (server.returncode, out, err) == (0, "", "")
    again = _serve(*arguments)
    try:
        assert _exports(again)[0][SECRET] == env[SECRET]
    finally:
        again.terminate()
        again.communicate(timeout=10)


def test_sandbox_speaks_the_dialect_that_was_asked_for(cli: Cli) -> None:
    """``--dialect lease`` is a gate without cancel."""
    server = _serve("--port", "0", "--dialect", "lease")
    try:
        assert "lease: preflight, no cancel" in cli("verify", **_exports(server)[0]).out
    finally:
        server.terminate()
        server.communicate(timeout=10)


def test_sandbox_names_what_is_wrong(cli: Cli, gate: Sandbox, tmp_path: Path) -> None:
    """A port that is taken, a file that is not there and a setting that does not exist: one sentence each."""
    port = gate.base_url.split(":")[2].split("/")[0]
    taken = cli("sandbox", "--port", port)
    assert (taken.code, taken.out) == (2, "")
    assert "choose another port" in taken.err
    assert "There is no configuration file" in cli("sandbox", "--config", str(tmp_path / "no.toml")).err
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("dialekt = 1\n")
    assert "Unknown setting 'dialekt'" in cli("sandbox", "--config", str(wrong)).err
