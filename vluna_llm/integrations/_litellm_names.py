"""Putting a function in the place of another: in its own module, and wherever it was imported before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

Function = Callable[..., Any]


def found(modules: tuple[str, ...], name: str) -> list[Function]:
    """The different functions that go by this name in these modules, as far as they are loaded."""
    functions: list[Function] = []
    for home in modules:
        function = vars(module).get(name) if (module := sys.modules.get(home)) is not None else None
        if callable(function) and all(function is not known for known in functions):
            functions.append(function)
    return functions


def replace_everywhere(twins: Mapping[Function, Function]) -> int:
    """Put each function's twin in its place in the globals of every module that is loaded; returns how many names.

    ``from litellm import completion`` before LiteLLM was wrapped is covered by this, under whatever name it was bound.
    What was put into a class, a closure, a default argument or a container is not.
    """
    by_id = {id(function): twin for function, twin in twins.items()}
    replaced = 0
    modules: list[object] = list(sys.modules.values())
    for module in modules:
        if not isinstance(module, ModuleType):
            continue
        names = vars(module)
        try:
            items = list(names.items())
        except RuntimeError:  # it is being imported in another thread: once more, without haste
            items = list(dict(names).items())
        for name, value in items:
            twin = by_id.get(id(value))
            if twin is not None:
                names[name] = twin
                replaced += 1
    return replaced
