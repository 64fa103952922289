"""LiteLLM as another version may have it: a name of its own is somewhere else, and only we look for it here."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from vluna_llm.integrations import _litellm_models, _litellm_parts


class Without:
    """A module that lacks a name; everything else is the module's."""

    def __init__(self, module: Any, name: str) -> None:
        self._module = module
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._module, name)


def importer(hidden: str) -> Any:
    """What stands for `importlib`: without the name (``module:name``), or without the whole module (``module:``)."""
    home, _, gone = hidden.partition(":")

    def import_module(module: str) -> Any:
        if module != home:
            return importlib.import_module(module)
        if not gone:
            raise ImportError(module)
        return Without(importlib.import_module(module), gone)

    return SimpleNamespace(import_module=import_module)


def hide(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    """Hide this name from us. LiteLLM goes on with it: its own modules cannot do without."""
    monkeypatch.setattr(_litellm_parts, "importlib", importer(hidden))
    monkeypatch.setattr(_litellm_models, "_KNOWN", {})
