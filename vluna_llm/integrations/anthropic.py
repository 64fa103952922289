"""Anthropic clients whose calls are metered: wrapped ones, and drop-in classes for the import line.

::

    client = vluna.wrap(anthropic.Anthropic())                  # what `vluna.wrap` does
    from vluna_llm.integrations.anthropic import Anthropic      # or one changed import; settings from the environment

A metered client is an instance of a subclass of the client's own class that overrides two methods: ``request``, which
runs once per logical call with all its retries, and ``_process_response``, which sees the final answer. Types, events,
exceptions and helpers are the SDK's own. The SDK on httpx (0.x) and on httpx2 (1.x, 2.x) work, and its clients for
Bedrock, Vertex AI, Foundry and other clouds. A tool runner or a thread makes one model call after the other: each is an
operation of its own, and so is each model that a fallback middleware turns to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..context import CallContext
from ..errors import ConfigurationError

try:
    import anthropic
    from anthropic._base_client import AsyncAPIClient, SyncAPIClient
except ImportError as error:
    raise ImportError(
        "vluna_llm.integrations.anthropic needs Anthropic's SDK: pip install 'vluna-llm[anthropic]'", name="anthropic"
    ) from error

from ._anthropic_metered import AsyncAnthropicMetered, SyncAnthropicMetered
from ._sdk_clients import adopt, drop_in_metering, lookup, make_metered_class, meter_client, with_vluna
from ._sdk_metered import Metered

if TYPE_CHECKING:
    from ..vluna import Vluna

__all__ = ["Anthropic", "AsyncAnthropic", "wrap_client"]

T = TypeVar("T")


# -- wrapping ----------------------------------------------------------------------------------------------------------


def wrap_client(vluna: Vluna, client: T, bound: CallContext | None = None) -> T:
    """A client of the same class that is metered by ``vluna``; the given one stays as it is.

    Options, HTTP client, headers, credentials, middleware, time-outs and retries are shared with the original; so is
    closing, as with ``client.with_options()``. Attributes that somebody set on the original's *resources*
    (``client.messages.create = ...``) stay behind, as with ``with_options()``.
    Wrapping a metered client again meters it once; ``bound`` is merged into what it is bound to.

    Raises:
        ConfigurationError: this is not a client of Anthropic's SDK.
    """
    if not isinstance(client, (SyncAPIClient, AsyncAPIClient)):
        raise ConfigurationError(
            "vluna.wrap takes a client of Anthropic's SDK, such as anthropic.Anthropic(), "
            f"not {getattr(client, '__name__', type(client).__name__)!r}."
        )
    return cast(T, meter_client(vluna, client, bound, _metered_class, _twin))


def _metered_class(base: type[Any], vluna: Vluna) -> type[Any]:
    mixin: type[Metered] = SyncAnthropicMetered if issubclass(base, SyncAPIClient) else AsyncAnthropicMetered
    return make_metered_class(base, vluna, mixin, _members)


def _members(base: type[Any]) -> Mapping[str, Any]:
    """What a metered class has besides the two methods: copies that are metered."""
    names = ("copy", "with_options")
    return {name: _carrying(method) for name in names if callable(method := getattr(base, name, None))}


def _carrying(method: Callable[..., Any]) -> Callable[..., Any]:
    """``copy`` (or ``with_options``) of the base, whose result is metered and bound as the client is.

    It is asked of a bare twin: the SDK hands credentials on only where a client is of its very own class.
    """

    @functools.wraps(method)
    def copy(self: Any, *args: Any, **kwargs: Any) -> Any:
        metering, kind = self._vluna_metering, type(self)
        base = vars(kind).get("_vluna_base")
        copied = method(self if base is None else _twin(self, base), *args, **kwargs)
        if type(copied) is base:
            copied = _twin(copied, kind)
        elif not isinstance(copied, Metered):  # a class of the user's own that names itself
            return wrap_client(metering.vluna, copied, metering.bound)
        copied._vluna_metering = metering
        return copied

    return copy


def _twin(client: Any, kind: type[Any]) -> Any:
    return _take_over(object.__new__(kind), client)


def _take_over(twin: Any, client: Any) -> Any:
    """Make ``twin`` a twin of ``client``, with what the SDK ties to a client when it is made: resources, middleware."""
    adopt(twin, client)
    twin.__dict__.pop("_vluna_metering", None)
    for name, value in vars(client).items():
        cached = isinstance(lookup(type(twin), name), functools.cached_property)
        if getattr(value, "_client", None) is client:
            if not cached:
                twin.__dict__[name] = type(value)(twin)  # as the clients for Bedrock and Vertex AI make them
        elif cached and getattr(value, "__self__", None) is not client:
            twin.__dict__[name] = value  # a setting that the class would look up in the environment
    if "_middleware_chain" in vars(twin):
        twin._middleware_chain = twin._build_middleware_chain()
    return twin


# -- drop-in classes ---------------------------------------------------------------------------------------------------


def _drop_in(kind: type[T]) -> type[T]:
    """Give a drop-in class its ``copy`` and ``with_options``."""
    base: Any = kind.__bases__[1]
    carrying = _carrying(base.copy)

    @functools.wraps(base.copy)
    def copy(self: Any, **options: Any) -> Any:
        if type(self) is kind:
            return carrying(self, **options)
        copied = base.copy(self, **with_vluna(self, options))
        copied._vluna_metering = self._vluna_metering
        return copied

    for name, value in {"copy": copy, "with_options": copy, "_vluna_base": base}.items():
        setattr(kind, name, value)
    return kind


@_drop_in
class Anthropic(SyncAnthropicMetered, anthropic.Anthropic):
    """`anthropic.Anthropic`, metered by ``vluna``, or by `Vluna.default()` whose settings come from the environment."""

    def __init__(self, *args: Any, vluna: Vluna | None = None, **options: Any) -> None:
        # The SDK looks for credentials beyond the environment only where a client is of its very own class.
        _take_over(self, anthropic.Anthropic(*args, **options))
        self._vluna_metering = drop_in_metering(vluna)


@_drop_in
class AsyncAnthropic(AsyncAnthropicMetered, anthropic.AsyncAnthropic):
    """`anthropic.AsyncAnthropic`, metered by ``vluna``, or by `Vluna.default()` (settings from the environment)."""

    def __init__(self, *args: Any, vluna: Vluna | None = None, **options: Any) -> None:
        _take_over(self, anthropic.AsyncAnthropic(*args, **options))
        self._vluna_metering = drop_in_metering(vluna)
