"""The command itself: version, help, what it says where an extra is missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("uvicorn", reason="these tests need the extra sandbox")

from vluna_llm import __version__

Cli = Callable[..., Any]


def test_version(cli: Cli) -> None:
    """``--version`` is the version of the package."""
    assert cli("--version") == (0, f"vluna-llm {__version__}\n", "")


def test_python_dash_m_is_the_same_command() -> None:
    """``python -m vluna_llm`` works where the script is not on the path."""
    ran = subprocess.run([sys.executable, "-m", "vluna_llm", "--version"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, f"vluna-llm {__version__}\n")


def test_help_imports_no_sdk_and_no_server() -> None:
    """``--help`` lists the commands and loads neither openai nor the embedded gate."""
    code = (
        "import sys\n"
        "from vluna_llm.cli import main\n"
        "sys.argv = ['vluna-llm', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit: pass\n"
        "heavy = {'openai', 'starlette', 'uvicorn', 'httpx', 'pydantic'} & set(sys.modules)\n"
        "print('LOADED', sorted(heavy))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("demo", "sandbox", "verify", "outbox"):
        assert f"  {command} " in ran.stdout
    assert "LOADED []" in ran.stdout


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_extra_the_command_names_it(package: str) -> None:
    """Without typer or rich there is one sentence with the extra to install, and no traceback."""
    code = f"import sys; sys.modules['{package}'] = None\nfrom vluna_llm.cli import main\nmain()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == "The command vluna-llm needs its extra: pip install 'vluna-llm[cli]'.\n"


@pytest.mark.parametrize(
    ("command", "package", "extra"), [("demo", "openai", "demo"), ("sandbox", "uvicorn", "sandbox")]
)
def test_a_command_names_the_extra_that_it_lacks(command: str, package: str, extra: str) -> None:
    """A command whose packages are missing names the extra to install."""
    code = f"import sys; sys.modules['{package}'] = None; sys.argv = ['vluna-llm', '{command}']\n"
    code += "from vluna_llm.cli import main\nmain()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert f"pip install 'vluna-llm[{extra}]'" in ran.stderr
    assert "Traceback" not in ran.stderr
