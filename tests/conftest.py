"""What all tests share: where the optional material outside the repository is, and a clean environment."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_finish() -> None:
    """What was imported until now is garbage to nobody: hundreds of tests collect it all, over and over."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with recorded provider traffic and the gate's contract; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared (recordings and gate contract) is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may see the developer's own gate or provider key."""
    for name in list(os.environ):
        if name.startswith(("VLUNA_", "OPENAI_", "ANTHROPIC_")):
            monkeypatch.delenv(name)


@pytest.fixture
def gate() -> Iterator[Any]:
    """An embedded gate with its default prices and credit, on real HTTP."""
    from vluna_llm.sandbox import Sandbox

    with Sandbox() as running:
        yield running


@pytest.fixture
def make_vluna(gate: Any) -> Iterator[Callable[..., Any]]:
    """Makes `Vluna` instances against the embedded gate, with the outbox in memory unless told otherwise."""
    from vluna_llm import Vluna

    made: list[Any] = []

    def make(**settings: Any) -> Any:
        given = {
            "base_url": gate.base_url,
            "realm_id": gate.realm_id,
            "key_id": gate.key_id,
            "key_secret": gate.key_secret,
            "outbox": "memory",
            **settings,
        }
        made.append(Vluna(**given))
        return made[-1]

    yield make
    for instance in made:
        instance.close(timeout=1.0)


@pytest.fixture
def vluna(make_vluna: Callable[..., Any]) -> Any:
    """One `Vluna` with default behaviour against the embedded gate."""
    return make_vluna()
