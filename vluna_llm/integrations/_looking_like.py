"""Classes made for objects of a framework's that we have to get into: they look like the class that they stand for."""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable
from typing import Any


@functools.lru_cache(maxsize=64)
def looking_like(kind: Hashable, bases: tuple[type[Any], ...]) -> type[Any]:
    """A class of these bases that looks like ``kind``, also in a traceback."""
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return types.new_class(named["__qualname__"].rpartition(".")[2], bases, {}, lambda body: body.update(named))
