"""The quickstart notebook: it runs, and what is committed is what it prints."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient", reason="executing notebooks needs the extra dev")
pytest.importorskip("openai", reason="the notebook needs the extra demo")
pytest.importorskip("opentelemetry.sdk", reason="the notebook needs opentelemetry-sdk")

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
QUICKSTART = NOTEBOOKS / "quickstart.ipynb"


@pytest.fixture(scope="module")
def script() -> Any:
    """``notebooks/execute.py``, which keeps the outputs."""
    spec = importlib.util.spec_from_file_location("execute_notebooks", NOTEBOOKS / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def executed(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook after a fresh run, in a kernel that sees none of the developer's settings or configuration."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(home))
        patch.setenv("VLUNA_SERVICE_KEY_SECRET", "not base64!")
        patch.setenv("OPENAI_API_KEY", "sk-the-users-own")
        return script.executed(QUICKSTART)


def _outputs(notebook: Any) -> list[str]:
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            texts.append(f"{output.get('name', output.output_type)}: {text}")
    return texts


def test_it_runs_and_prints_what_is_committed(script: Any, executed: Any) -> None:
    """Every cell runs, and the committed outputs are those of today's code (else: python notebooks/execute.py)."""
    import nbformat

    committed = nbformat.read(QUICKSTART, as_version=4)
    assert _outputs(executed) == _outputs(committed)


def test_it_shows_what_it_promises(executed: Any) -> None:
    """Receipts, a cancelled stream, a denial before the provider, hints as events, the gate's own books."""
    text = "\n".join(_outputs(executed))
    assert "booked: 41 in (0 cached), 43 out" in text
    assert "cancelled: 0 in" in text
    assert "insufficient_credit\n0 requests reached the provider" in text
    assert "WARN initech funding.xusd_shortfall" in text
    assert "'openai.smollm2-135m-instruct.tokens.output': 103" in text
    assert "stderr" not in text


def test_no_machine_and_no_run_is_in_the_committed_file(script: Any) -> None:
    """No absolute path, no address, no execution count and no metadata of the machine that executed it."""
    import nbformat

    raw = QUICKSTART.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users|usr|var)/|[A-Z]:\\\\|127\.0\.0\.1|0x[0-9a-f]{6}", raw)
    data = json.loads(raw)
    assert set(data["metadata"]) == {"kernelspec", "language_info"}
    assert all(cell.get("execution_count") is None and cell["metadata"] == {} for cell in data["cells"])
    notebook = nbformat.read(QUICKSTART, as_version=4)
    nbformat.validate(notebook)
    assert script.cleaned(notebook) == nbformat.read(QUICKSTART, as_version=4)
