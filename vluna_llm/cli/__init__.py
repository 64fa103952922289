"""The command ``vluna-llm``. This module is its door: it needs nothing but the standard library."""

from __future__ import annotations

import sys

_EXTRA = frozenset({"typer", "rich", "click", "shellingham"})


def main() -> None:
    """Run the command line; where the extra is not installed, say so in one sentence. Always ends by SystemExit."""
    try:
        from .app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        sys.stderr.write("The command vluna-llm needs its extra: pip install 'vluna-llm[cli]'.\n")
        raise SystemExit(2) from None
    run()
