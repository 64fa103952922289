"""The pytest plugin: the fixture ``vluna_gate``. Loading it imports nothing but pytest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .sandbox import Sandbox


@pytest.fixture
def vluna_gate() -> Iterator[Sandbox]:
    """A fresh embedded gate on a free loopback port, in memory, gone after the test."""
    try:
        from .sandbox import Sandbox
    except ImportError as error:
        pytest.fail(f"vluna_gate needs the embedded gate: pip install 'vluna-llm[sandbox]' ({error})")
    with Sandbox() as gate:
        yield gate
