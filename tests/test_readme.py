"""What the README shows is what happens: its snippets are run as they stand, its tables compared with the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from pydantic import SecretStr

from vluna_llm import Settings, errors
from vluna_llm.sandbox import Sandbox

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PLUGIN = "vluna_llm.sandbox.pytest_plugin"
# The one word that is changed in them: no recorded answer is of a model that costs money.
SHOWN, RECORDED = "gpt-4o-mini", "smollm2-135m-instruct"


def run(arguments: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python of the user's own: no setting of this process, a home of its own, warnings on standard error."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLUNA_", "OPENAI_"))}
    environment = {**kept, "HOME": str(folder), "XDG_STATE_HOME": str(folder / "state"), **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


def rows(title: str) -> dict[str, list[str]]:
    """The rows of the first table below a heading, by each name in backticks in their first column."""
    table = README.partition(f"## {title}\n")[2].partition("\n## ")[0]
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found.update({name: cells[1:] for name in re.findall(r"`(\w+)`", cells[0]) if line.startswith("|")})
    return found


def test_the_snippets_run_as_they_stand(tmp_path: Path) -> None:
    """Both charge the customer whom they name, leave nothing behind and warn of nothing."""
    pytest.importorskip("openai")
    from vluna_llm.sandbox.replay import ReplayUpstream

    first, ways, litellm, langchain, _ = SNIPPETS
    assert SHOWN in first
    assert "VlunaCallback" in litellm, "tests/with_litellm runs it, where LiteLLM is installed"
    assert "wrap_model" in langchain, "tests/integrations runs it, where LangChain is installed"
    with Sandbox() as gate, ReplayUpstream() as provider:
        settings = {**gate.env(), "OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": "none"}
        shown = run(["-c", first.replace(SHOWN, RECORDED)], tmp_path, **settings)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout.startswith("A lighthouse is")
        charged = gate.booked("customer_123").charged_xusd
        reported = sum(one.tokens.input + one.tokens.output for one in provider.served if one.tokens)
        assert shown.stdout.splitlines()[-1] == f"{charged} XUSD charged for {reported} tokens"
        assert charged > reported > 0

        other = run(["-c", ways], tmp_path, **settings)
        assert (other.returncode, other.stderr) == (0, "")
        assert [(entry.feature, entry.quantity) for entry in gate.booked("cust_1").entries] == [("tools.search", 3)]
    kept = list((tmp_path / "state" / "vluna-llm").rglob("*"))
    assert kept
    assert all(path.is_dir() for path in kept)


def test_the_snippet_of_a_test_passes_and_can_fail(tmp_path: Path) -> None:
    """The fixture is there without being asked for; with money in the purse the refusal does not come."""
    pytest.importorskip("openai")
    shown = SNIPPETS[-1]
    (tmp_path / "test_shown.py").write_text(shown)
    (tmp_path / "test_rich.py").write_text(shown.replace('"poor", 0)', '"poor", 10**9)'))
    installed = any(point.value == PLUGIN for point in metadata.entry_points(group="pytest11"))
    load = [] if installed else ["-p", PLUGIN]
    outcome = run(["-m", "pytest", "-q", *load], tmp_path, OPENAI_BASE_URL="http://127.0.0.1:9/v1")
    assert "1 failed, 1 passed" in outcome.stdout, outcome.stdout


def test_the_settings_table_is_complete_and_its_defaults_are_true() -> None:
    """Every variable is a setting, every setting of this version a variable, and what it says is the default is."""
    table = rows("Settings")
    credentials = {"base_url": "SERVICE_BASE_URL", "realm_id": "REALM_ID"}
    credentials |= {"key_id": "SERVICE_KEY_ID", "key_secret": "SERVICE_KEY_SECRET"}
    fields = {f"VLUNA_{credentials.get(name) or 'LLM_' + name.upper()}": name for name in Settings.model_fields}
    assert {*table} == {*fields}
    for variable, (default, _) in table.items():
        value = getattr(Settings(), fields[variable])
        if default.startswith("`"):
            written = f"{value:g}" if isinstance(value, float) else str(value).lower()
            assert f"`{written}`" == default, variable
        else:
            assert value is None, variable


@pytest.mark.parametrize("variable", [name for name in rows("Settings") if name.startswith("VLUNA_LLM")])
def test_each_setting_is_a_variable_and_an_argument(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is not the default arrives by both ways."""
    other = {
        "mode": "observe",
        "settle": "inline",
        "authorize": "overlap",
        "authorize_deadline": "3.5",
        "on_abort": "drain",
        "on_unmetered": "ignore",
        "meters": "never",
        "allow_plaintext": "true",
        "outbox_shared": "postgresql://billing:secret@db.example/outbox",
    }
    name = variable.removeprefix("VLUNA_LLM_").lower()
    value = other.get(name, "deny" if name.endswith("_unavailable") else "given")
    monkeypatch.delenv(variable, raising=False)
    default = getattr(Settings(), name)
    by_argument = getattr(Settings(**{name: value}), name)
    monkeypatch.setenv(variable, value)
    by_variable = getattr(Settings(), name)
    assert by_argument == by_variable != default
    assert isinstance(by_variable, SecretStr) == (name == "outbox_shared"), "it holds a password"


def test_the_table_of_refusals_names_what_can_be_raised() -> None:
    """Each is exported; those that only the settler or the gate clients meet are left out."""
    exported = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)
    }
    named = {name for name in rows("What a refusal looks like") if name[0].isupper()}
    assert exported - named == {"VlunaError", "GateError", "GateAuthError", "IdempotencyConflict"}
    assert named <= exported
