"""The SDK clients that a LangChain model holds, in the places of which metered ones are put."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from ..context import CallContext
from ..errors import ConfigurationError
from ._langchain_run import CONTEXT_FIELDS

if TYPE_CHECKING:
    from ..vluna import Vluna

_MADE_LATE: Final = ("_client", "_async_client")
"""Under these names models make their clients at the first call (``ChatAnthropic``)."""


def meter_clients(model: Any, vluna: Vluna, bound: CallContext | None) -> bool:
    """Put metered clients in the places of those that this model holds; whether all that it holds are metered now.

    A model without a client, or with one that `Vluna.wrap` does not take, is left as it is.
    """
    forget_late_clients(vars(model), type(model))
    found = {name: value for name, value in vars(model).items() if _client_of(value) is not None}
    for name in _late(type(model)):
        try:
            made = getattr(model, name)
        except Exception:  # the call itself will say what is wrong
            made = None
        if _client_of(made) is not None:
            found[name] = made
    metered: dict[int, Any] = {}
    changed: dict[str, Any] = {}
    for name, value in found.items():
        client = _client_of(value)
        if id(client) not in metered:
            try:
                metered[id(client)] = _meter(client, vluna, bound)
            except ConfigurationError:
                forget_late_clients(vars(model), type(model))
                return False
        mine = metered[id(client)]
        changed[name] = value if mine is client else mine if value is client else type(value)(mine)
    for name, value in changed.items():
        vars(model)[name] = value
    return bool(changed)


def forget_late_clients(values: dict[str, Any], kind: type[Any]) -> None:
    """Leave out the clients that a model of this kind makes again at its next call."""
    for name in _late(kind):
        values.pop(name, None)


def _late(kind: type[Any]) -> list[str]:
    return [name for name in _MADE_LATE if isinstance(getattr(kind, name, None), cached_property)]


def _meter(client: Any, vluna: Vluna, bound: CallContext | None) -> Any:
    if bound is None:
        return vluna.wrap(client)
    return vluna.bind(client, **fields_of(bound))


def fields_of(context: CallContext) -> dict[str, Any]:
    """What the context sets, as arguments."""
    found = {name: getattr(context, name) for name in CONTEXT_FIELDS}
    given = {name: value for name, value in found.items() if value is not None and name != "labels"}
    return {**given, "labels": dict(context.labels)} if context.labels else given


def _client_of(value: Any) -> Any:
    """The SDK client that this is, or whose resource it is (``client.chat.completions``)."""
    if _is_client(value):
        return value
    home = type(value).__module__.partition(".")[0]
    inner = getattr(value, "_client", None) if home in ("openai", "anthropic") else None
    return inner if _is_client(inner) else None


def _is_client(value: Any) -> bool:
    homes = {kind.__module__.partition(".")[0] for kind in type(value).__mro__}
    return bool(homes & {"openai", "anthropic"}) and callable(getattr(value, "with_options", None))
