"""What all tests share: where the optional material outside the repository is, and a clean environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with recorded provider traffic and the gate's contract; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared (recordings and gate contract) is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test may see the developer's own gate or provider key."""
    for name in list(os.environ):
        if name.startswith(("VLUNA_", "OPENAI_", "ANTHROPIC_")):
            monkeypatch.delenv(name)
    yield
