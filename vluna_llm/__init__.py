"""A billing gate around every model call: authorize before, meter while it streams, settle exactly once.

Importing this package is cheap: every public name is loaded on first use, and no optional dependency is touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .context import Scope, call_context
    from .settings import Settings
    from .types import Hint, Lease, Receipt
    from .usage.types import TokenUsage
    from .vluna import Vluna

__version__ = "0.1.0"

__all__ = ["Hint", "Lease", "Receipt", "Scope", "Settings", "TokenUsage", "Vluna", "__version__", "call_context"]

_HOMES = {
    "Hint": ".types",
    "Lease": ".types",
    "Receipt": ".types",
    "Scope": ".context",
    "Settings": ".settings",
    "TokenUsage": ".usage.types",
    "Vluna": ".vluna",
    "call_context": ".context",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
