"""What the tests with many processes share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the embedded gate is not installed: pip install 'vluna-llm[sandbox]'")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integrations"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from programs import Program

from vluna_llm import Vluna
from vluna_llm.sandbox import Sandbox


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    """The directory in which all processes of one test keep their journals."""
    return tmp_path / "outbox"


@pytest.fixture
def program(gate: Sandbox, outbox: Path, tmp_path: Path) -> Iterator[Program]:
    """Starts programs; kills what is left of them."""
    made = Program(gate, outbox, tmp_path)
    yield made
    made.kill()


@pytest.fixture
def heir(make_vluna: Callable[..., Vluna], outbox: Path) -> Callable[[], Vluna]:
    """Starts a living instance on the same outbox, here, and lets it deliver what others left."""

    def make() -> Vluna:
        vluna = make_vluna(outbox=str(outbox))
        vluna._running()
        assert vluna.flush(10)
        return vluna

    return make
