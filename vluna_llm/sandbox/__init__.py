"""The embedded gate: what a Vluna server does, on a loopback port, for tests, demos and development.

``from vluna_llm.sandbox import Sandbox`` needs the extra ``sandbox`` (starlette, uvicorn).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .booked import Booked, BookedEntry
    from .config import STRICT, SandboxConfig, load_config
    from .faults import Fault, FaultKind, Faults
    from .sandbox import Sandbox
    from .server import serve

__all__ = [
    "STRICT",
    "Booked",
    "BookedEntry",
    "Fault",
    "FaultKind",
    "Faults",
    "Sandbox",
    "SandboxConfig",
    "load_config",
    "serve",
]

_HOMES = {
    "STRICT": ".config",
    "Booked": ".booked",
    "BookedEntry": ".booked",
    "Fault": ".faults",
    "FaultKind": ".faults",
    "Faults": ".faults",
    "Sandbox": ".sandbox",
    "SandboxConfig": ".config",
    "load_config": ".config",
    "serve": ".server",
}
_EXTRA = frozenset({"starlette", "uvicorn", "h11", "tomli"})


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(home, __name__), name)
    except ModuleNotFoundError as error:
        if error.name in _EXTRA:
            raise ImportError("The embedded gate needs its extra: pip install 'vluna-llm[sandbox]'.") from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
