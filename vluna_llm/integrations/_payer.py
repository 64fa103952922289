"""Who pays, as an application's function or a framework's own data names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..context import ARGUMENTS, CallContext, make_context
from ..errors import ConfigurationError, VlunaError

if TYPE_CHECKING:
    from ..vluna import Vluna


def named(payer: object, what: str, fields: Sequence[str] = ARGUMENTS) -> CallContext:
    """The call context that is named; an empty one where nobody is.

    Args:
        payer: a `CallContext`, the customer's id as text, the arguments of a call context by name, or None.
        what: how an error begins, e.g. ``identity= gave``.
        fields: the arguments that may be given here.

    Raises:
        ConfigurationError: it is none of these, names something else, or what it names cannot be billed.
    """
    if payer is None:
        return CallContext()
    if isinstance(payer, CallContext):
        return payer
    if isinstance(payer, str):
        payer = {"principal_id": payer}
    if not isinstance(payer, Mapping):
        raise ConfigurationError(f"{what} a {type(payer).__name__}; name the customer: {{'principal_id': '...'}}.")
    unknown = [str(name) for name in payer if name not in fields]
    if unknown:
        raise ConfigurationError(f"{what} a mapping with {', '.join(sorted(unknown))}; it takes {', '.join(fields)}.")
    return make_context(**payer)


def tell_nobody(vluna: Vluna, error: Exception) -> None:
    """In ``observe`` an identity that raises, or names nobody who could be billed, refuses nothing: it is told."""
    why = f"{error} " if isinstance(error, VlunaError) else ""  # the words of others may name anybody
    vluna.telemetry.emit(
        "vluna.endpoint.unmetered",
        "error",
        {"error.type": type(error).__name__},
        message=f"{why}identity= named nobody who could be billed: whoever pays for the work around the run does",
    )
