"""OpenAI clients whose calls are metered: wrapped ones, and drop-in classes for the import line.

::

    client = vluna.wrap(openai.OpenAI())                  # what `vluna.wrap` does
    from vluna_llm.integrations.openai import OpenAI      # or one changed import; settings from the environment

A metered client is an instance of a subclass of the client's own class that overrides two methods: ``request``, which
runs once per logical call with all its retries, and ``_process_response``, which sees the final answer. Types, chunks,
exceptions and helpers are the SDK's own. Both majors of the SDK (2.x on httpx, 3.x on httpx2) work.

Calls over WebSocket (``realtime.connect``, ``responses.connect``) are not metered and follow ``on_unmetered``.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..context import CallContext
from ..errors import ConfigurationError

try:
    import openai
    from openai._base_client import AsyncAPIClient, SyncAPIClient
except ImportError as error:
    raise ImportError(
        "vluna_llm.integrations.openai needs the OpenAI SDK: pip install 'vluna-llm[openai]'", name="openai"
    ) from error

from ._openai_metered import AsyncOpenAIMetered, SyncOpenAIMetered
from ._sdk_clients import clone, drop_in_metering, lookup, make_metered_class, meter_client, with_vluna
from ._sdk_metered import Metered

if TYPE_CHECKING:
    from ..vluna import Vluna

__all__ = ["AsyncAzureOpenAI", "AsyncOpenAI", "AzureOpenAI", "OpenAI", "wrap_client"]

T = TypeVar("T")


# -- wrapping ----------------------------------------------------------------------------------------------------------


def wrap_client(vluna: Vluna, client: T, bound: CallContext | None = None) -> T:
    """A client of the same class that is metered by ``vluna``; the given one stays as it is.

    Options, HTTP client, headers, time-outs and retries are shared with the original; so is closing, as with
    ``client.with_options()``. Attributes that somebody set on the original's *resources* (``client.chat.completions
    .create = ...``) stay behind, as with ``with_options()``: trace the wrapped client, not the other way round.
    Wrapping a metered client again meters it once; ``bound`` is merged into what it is bound to.

    The module ``openai`` itself may be given: then its module-level client is metered and the module is returned.

    Raises:
        ConfigurationError: this is not an OpenAI client, or the module was to be bound to one customer.
    """
    if client is cast(Any, openai):
        if bound is not None:
            raise ConfigurationError(
                "The module `openai` is shared by the whole process and cannot be bound to one customer: "
                "bind a client of its own, or use call_context(...)."
            )
        _wrap_module(vluna)
        return client
    if not isinstance(client, (SyncAPIClient, AsyncAPIClient)):
        raise ConfigurationError(
            f"vluna.wrap takes an OpenAI client (or the module openai), not {type(client).__name__!r}."
        )
    return cast(T, meter_client(vluna, client, bound, _metered_class, clone))


def _metered_class(base: type[Any], vluna: Vluna) -> type[Any]:
    mixin: type[Metered] = SyncOpenAIMetered if issubclass(base, SyncAPIClient) else AsyncOpenAIMetered
    return make_metered_class(base, vluna, mixin, _members)


def _members(base: type[Any]) -> Mapping[str, Any]:
    """What a metered class has besides the two methods: copies that are metered, and WebSockets that are announced."""
    namespace: dict[str, Any] = {}
    for name in ("copy", "with_options"):
        if callable(method := getattr(base, name, None)):
            namespace[name] = _carrying(method)
    for name in ("realtime", "responses", "live"):
        if isinstance(prop := lookup(base, name), functools.cached_property):
            namespace[name] = _announcing(prop, f"openai.{name}.connect")
    return namespace


def _carrying(method: Callable[..., Any]) -> Callable[..., Any]:
    """``copy`` (or ``with_options``) of the base, whose result is metered and bound as the client is."""

    @functools.wraps(method)
    def copy(self: Any, *args: Any, **kwargs: Any) -> Any:
        copied = method(self, *args, **kwargs)
        metering = self._vluna_metering
        if isinstance(copied, Metered):
            copied._vluna_metering = metering
            return copied
        return wrap_client(metering.vluna, copied, metering.bound)  # a class of the user's own that names itself

    return copy


def _announcing(prop: functools.cached_property[Any], what: str) -> functools.cached_property[Any]:
    """A resource whose ``connect`` (a WebSocket, past ``request``) follows ``on_unmetered``."""

    def build(self: Any) -> Any:
        resource = prop.func(self)
        connect = getattr(resource, "connect", None)
        if connect is None:
            return resource

        @functools.wraps(connect)
        def announced(*args: Any, **kwargs: Any) -> Any:
            metering = self._vluna_metering
            if metering.vluna.mode != "off":
                metering.vluna.unmetered(what, metering.bound)
            return connect(*args, **kwargs)

        resource.connect = announced
        return resource

    build.__doc__ = prop.__doc__
    return functools.cached_property(build)


def _wrap_module(vluna: Vluna) -> None:
    """Meter the module-level client: the classes that ``openai`` makes it from, and the one it has made already."""
    module: types.ModuleType = openai
    for name in ("_ModuleClient", "_AzureModuleClient", "_BedrockModuleClient"):
        kind = getattr(module, name, None)
        if kind is not None:
            setattr(module, name, _metered_class(kind.__dict__.get("_vluna_base", kind), vluna))
    made = getattr(module, "_client", None)
    if made is not None:
        module._client = wrap_client(vluna, made)  # type: ignore[attr-defined]


# -- drop-in classes ---------------------------------------------------------------------------------------------------


def _drop_in(kind: type[T]) -> type[T]:
    """Give a drop-in class its ``copy`` and ``with_options``, and announce its WebSockets."""
    base: Any = kind.__bases__[1]

    @functools.wraps(base.copy)
    def copy(self: Any, **options: Any) -> Any:
        copied = base.copy(self, **with_vluna(self, options))
        copied._vluna_metering = self._vluna_metering
        return copied

    namespace: dict[str, Any] = {"copy": copy, "with_options": copy}
    for name in ("realtime", "responses", "live"):
        if isinstance(prop := lookup(base, name), functools.cached_property):
            announced = _announcing(prop, f"openai.{name}.connect")
            announced.__set_name__(kind, name)
            namespace[name] = announced
    for name, value in namespace.items():
        setattr(kind, name, value)
    return kind


@_drop_in
class OpenAI(SyncOpenAIMetered, openai.OpenAI):
    """`openai.OpenAI`, metered by ``vluna``, or by `Vluna.default()` whose settings come from the environment."""

    def __init__(self, *args: Any, vluna: Vluna | None = None, **options: Any) -> None:
        self._vluna_metering = drop_in_metering(vluna)
        super().__init__(*args, **options)


@_drop_in
class AsyncOpenAI(AsyncOpenAIMetered, openai.AsyncOpenAI):
    """`openai.AsyncOpenAI`, metered by ``vluna``, or by `Vluna.default()` whose settings come from the environment."""

    def __init__(self, *args: Any, vluna: Vluna | None = None, **options: Any) -> None:
        self._vluna_metering = drop_in_metering(vluna)
        super().__init__(*args, **options)


@_drop_in
class AzureOpenAI(SyncOpenAIMetered, openai.AzureOpenAI):
    """`openai.AzureOpenAI`, metered by ``vluna``, or by `Vluna.default()` whose settings come from the environment."""

    def __init__(self, *args: Any, vluna: Vluna | None = None, **options: Any) -> None:
        self._vluna_metering = drop_in_metering(vluna)
        super().__init__(*args, **options)


@_drop_in
class AsyncAzureOpenAI(AsyncOpenAIMetered, openai.AsyncAzureOpenAI):
    """`openai.AsyncAzureOpenAI`, metered by ``vluna``, or by `Vluna.default()` (settings from the environment)."""

    def __init__(self, *args: Any, vluna: Vluna | None = None, **options: Any) -> None:
        self._vluna_metering = drop_in_metering(vluna)
        super().__init__(*args, **options)
