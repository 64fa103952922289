"""What the tests of Anthropic's client share: both colours of it, and its requests."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Colour
from upstream import Upstream

anthropic = pytest.importorskip(
    "anthropic", reason="Anthropic's SDK is not installed: pip install 'vluna-llm[anthropic]'"
)

HI = [{"role": "user", "content": "hi"}]
MESSAGE: dict[str, Any] = {"model": "claude-sonnet-5", "max_tokens": 100, "messages": HI}
STREAM: dict[str, Any] = {**MESSAGE, "stream": True}
TOOL = {"name": "look_up", "description": "Looks it up.", "input_schema": {"type": "object", "properties": {}}}


class Claude(Colour):
    """`conftest.Colour`, with Anthropic's client."""

    def bare(self, **options: Any) -> Any:
        """An unwrapped client."""
        kind = anthropic.AsyncAnthropic if self.is_async else anthropic.Anthropic
        return kind(**{**self.options, **options})

    @property
    def options(self) -> dict[str, Any]:
        """What every client here is made with."""
        assert isinstance(self.provider, Upstream)
        return {"base_url": self.provider.anthropic_base, "api_key": "sk-ant-test", "max_retries": 0}
