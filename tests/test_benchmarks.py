"""The benchmarks run, from one command, and report every figure. Nothing here looks at a time."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("openai", reason="the OpenAI SDK is not installed: pip install 'vluna-llm[openai]'")
pytest.importorskip("uvicorn", reason="the embedded gate is not installed: pip install 'vluna-llm[sandbox]'")
pytest.importorskip("rich", reason="rich is not installed: pip install 'vluna-llm[cli]'")

ROOT = Path(__file__).resolve().parents[1]

BUDGETS = {
    ("streaming, sync", "CPU added to a call of 200 chunks"): 3.0,
    ("streaming, sync", "CPU added per chunk passed through"): 1.0,
    ("streaming, async", "CPU added to a call of 200 chunks"): 3.0,
    ("streaming, async", "CPU added per chunk passed through"): 1.0,
    ("local work", "caller's CPU per call"): 100.0,
    ("first token, sync", "strict adds"): 1.25,
    ("first token, sync", "overlap adds"): 1.0,
    ("first token, async", "strict adds"): 1.25,
    ("first token, async", "overlap adds"): 1.0,
    ("memory", "Python objects kept per operation"): 32.0,
    ("50 streams at once", "settlements lost or doubled"): 0,
    ("50 streams at once", "tokens that the gate's books are off"): 0,
    ("event loop", "p99 lag added while a backlog drains"): 2.0,
    ("backlog of 2,000, 1,000 customers", "settlements lost or doubled"): 0,
    ("backlog of 2,000, 1,000 customers", "tokens that the gate's books are off"): 0,
    ("backlog of 2,000, 1,000 customers", "memory at its peak"): 50.0,
    ("backlog of 2,000, 1 customer", "settlements lost or doubled"): 0,
    ("backlog of 2,000, 1 customer", "errors of our own"): 0,
    ("estimate", "CPU of one prediction, 4 KB of prompt"): 50.0,
    ("reader", "chat, usage:null"): 1000.0,
}
INFORMATION = {
    ("gate client", "CPU of one authorize"),
    ("gate client", "CPU of one commit"),
    ("streaming, sync", "CPU of the bare client per chunk"),
    ("first token, sync", "bare client"),
    ("event loop", "p99 lag, idle"),
}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_quick_run_measures_every_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``python -m benchmarks --quick`` writes each budgeted row with its figure, and books every operation."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--results", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )

    assert run.returncode == 0, run.stdout + run.stderr
    (written,) = tmp_path.glob("*.json")
    report = json.loads(written.read_text(encoding="utf-8"))
    figures = {(figure["group"], figure["name"]): figure for figure in report["figures"]}
    assert {key: figures[key]["budget"] for key in BUDGETS} == BUDGETS
    assert figures.keys() >= INFORMATION
    assert all(isinstance(figure["value"], (int, float)) for figure in figures.values())
    assert all(len(figure["samples"]) >= 3 for figure in figures.values() if figure["bound"] is not None)
    assert figures["50 streams at once", "settlements lost or doubled"]["value"] == 0
    assert figures["first token, sync", "bare client"]["value"] > 50, "the provider was slower than it said"
    drained = [figure for figure in report["figures"] if figure["group"] == "backlog of 2,000, 1,000 customers"]
    told = ", ".join(f"{figure['name']} {figure['value']:.0f} {figure['unit']}" for figure in drained)
    with capsys.disabled():
        print(f"\nbacklog of 2,000 settlements: {told}")
    assert report["load_average"]
    assert all(name in run.stdout for _, name in BUDGETS), "the table lacks a row"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmarks are no part of the package: found beside the tests."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.figures")


def test_a_budget_that_is_exceeded_fails_the_run(figures: ModuleType) -> None:
    """What is judged is the upper bound, not the mean; a row without a budget never fails."""
    steady = figures.mean_of("g", "n", "µs", [0.8, 0.9, 0.85, 0.95], budget=1.0)
    shaky = figures.mean_of("g", "n", "µs", [0.2, 1.6, 0.3, 1.4], budget=1.0)

    assert steady.value < steady.bound < 1.0
    assert not steady.over
    assert shaky.value < 1.0 < shaky.bound
    assert shaky.over
    assert not figures.mean_of("g", "n", "µs", [7.0, 9.0]).over


def test_the_bound_is_students(figures: ModuleType) -> None:
    """Against the table: t(0.95) is 1.833 with 9 degrees of freedom and 1.685 with 39."""
    for count, quantile in ((10, 1.833), (40, 1.685)):
        samples = [1.0, 3.0] * (count // 2)
        deviation = (count / (count - 1)) ** 0.5
        assert figures.upper_bound(samples) == pytest.approx(2 + quantile * deviation / count**0.5, abs=0.001)


@pytest.fixture
def without_litellm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command, as it is where LiteLLM is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    command = importlib.import_module("benchmarks.__main__")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return command


def test_without_litellm_its_section_says_what_to_install(
    without_litellm: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who asks for it by name is told how to get it."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", "litellm"])

    with pytest.raises(SystemExit) as ended:
        without_litellm.main()

    assert ended.value.code == 2
    assert "pip install 'vluna-llm[litellm]'" in capsys.readouterr().err


def test_without_litellm_everything_else_is_measured(
    without_litellm: ModuleType,
    figures: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """A run of everything leaves that section out, says so, and goes on."""
    measured: list[str] = []

    def section(name: str) -> object:
        return lambda profile: measured.append(name) or [figures.Figure("group", name, "µs", 1.0)]

    monkeypatch.setattr(without_litellm, "_sections", lambda: {name: section(name) for name in ("local", "litellm")})
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--results", str(tmp_path)])

    assert without_litellm.main() == 0
    assert measured == ["local"]
    assert "litellm: left out" in capsys.readouterr().err
