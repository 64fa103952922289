"""What meters where an application has not said it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..vluna import Vluna


def given_or_default(vluna: Vluna | None) -> Vluna:
    """The given one, or the process's own, whose settings come from the environment.

    Raises:
        ConfigurationError: none is given, and the environment is incomplete or wrong.
    """
    if vluna is None:
        from ..vluna import Vluna

        return Vluna.default()
    return vluna
