"""The pytest plugin: light to load, a fresh gate per test, registered for everybody who installs the package."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from vluna_llm.sandbox import Sandbox

PLUGIN = "vluna_llm.sandbox.pytest_plugin"
ROOT = Path(__file__).resolve().parents[2]

USERS_TEST = """
def test_mine(vluna_gate):
    assert vluna_gate.booked().charged_xusd == 0
    assert set(vluna_gate.env()) == {
        "VLUNA_SERVICE_BASE_URL", "VLUNA_REALM_ID", "VLUNA_SERVICE_KEY_ID", "VLUNA_SERVICE_KEY_SECRET"
    }
    vluna_gate.credit("c1", 1)

def test_fresh(vluna_gate):
    assert vluna_gate.spendable("c1") == 100_000_000
"""


def test_a_user_gets_a_fresh_gate_per_test(tmp_path: Path) -> None:
    """In a project of its own, the fixture is there and each test has its own gate."""
    (tmp_path / "test_mine.py").write_text(USERS_TEST)
    installed = any(point.value == PLUGIN for point in metadata.entry_points(group="pytest11"))
    load = [] if installed else ["-p", PLUGIN]
    command = [sys.executable, "-m", "pytest", "-q", *load, str(tmp_path)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, timeout=60, check=False
    )
    assert "2 passed" in result.stdout, result.stdout + result.stderr


def test_loading_the_plugin_imports_nothing_heavy() -> None:
    """Every pytest run of every project that installs us loads the plugin: no server, no validation library."""
    code = (
        "import sys, vluna_llm.sandbox.pytest_plugin;"
        "print([m for m in ('starlette', 'uvicorn', 'pydantic', 'httpx', 'asyncio', 'sqlite3', 'opentelemetry')"
        " if m in sys.modules])"
    )
    before = "import sys, pytest; print([m for m in ('asyncio', 'sqlite3') if m in sys.modules])"
    run = [
        subprocess.run(
            [sys.executable, "-c", text], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=True
        ).stdout
        for text in (code, before)
    ]
    assert run[0] == run[1]


def test_the_package_names_the_missing_extra() -> None:
    """Without starlette or uvicorn the import error says what to install."""
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "try:\n    from vluna_llm.sandbox import Sandbox\n"
        "except ImportError as error:\n    print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=True
    )
    assert "pip install 'vluna-llm[sandbox]'" in result.stdout


def test_the_gate_prints_nothing(capfd: object) -> None:
    """Neither starting nor serving nor stopping writes to the terminal."""
    with Sandbox():
        pass
    out, err = capfd.readouterr()  # type: ignore[attr-defined]
    assert out == err == ""
