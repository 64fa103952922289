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
from collections.abc import Callable
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

from ._openai_metered import AsyncMetered, Metering, SyncMetered

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
    current: Metering | None = getattr(client, "_vluna_metering", None)
    if current is None:
        metered = _clone(client, _metered_class(type(client), vluna))
        metered._vluna_metering = Metering(vluna, bound)
        return cast(T, metered)
    if current.vluna is vluna and bound is None:
        return client
    merged = bound if current.bound is None or bound is None else current.bound.override(bound)
    metered = _clone(client, type(client))
    metered._vluna_metering = Metering(vluna, merged if merged is not None else current.bound)
    return cast(T, metered)


def _metered_class(base: type[Any], vluna: Vluna) -> type[Any]:
    """The metered subclass of ``base``: named as it is, found again through it, and freed when nobody uses it."""
    for known in base.__subclasses__():
        metering = known.__dict__.get("_vluna_metering")
        if known.__dict__.get("_vluna_base") is base and metering is not None and metering.vluna is vluna:
            return known
    mixin = SyncMetered if issubclass(base, SyncAPIClient) else AsyncMetered
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_vluna_base": base,
        "_vluna_metering": Metering(vluna),  # for type(client)(...): never silently unmetered
    }
    for name in ("copy", "with_options"):
        if callable(method := getattr(base, name, None)):
            namespace[name] = _carrying(method)
    for name in ("realtime", "responses", "live"):
        if isinstance(prop := _lookup(base, name), functools.cached_property):
            namespace[name] = _announcing(prop, f"openai.{name}.connect")
    kind: type[Any] = types.new_class(base.__name__, (mixin, base), {}, lambda body: body.update(namespace))
    return kind


def _carrying(method: Callable[..., Any]) -> Callable[..., Any]:
    """``copy`` (or ``with_options``) of the base, whose result is metered and bound as the client is."""

    @functools.wraps(method)
    def copy(self: Any, *args: Any, **kwargs: Any) -> Any:
        copied = method(self, *args, **kwargs)
        metering = self._vluna_metering
        if isinstance(copied, (SyncMetered, AsyncMetered)):
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


def _lookup(kind: type[Any], name: str) -> Any:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def _clone(client: Any, kind: type[Any]) -> Any:
    """A shallow twin of another class, without what is bound to the original: resources, and methods set on it.

    Not ``client.copy()``: that calls the constructor of the client's class, which a subclass may have given arguments
    that only its author knows, and forgets what was set later.
    """
    twin = object.__new__(kind)
    for name, value in vars(client).items():
        resource = isinstance(_lookup(kind, name), functools.cached_property)
        if resource or getattr(value, "__self__", None) is client or getattr(value, "_client", None) is client:
            continue
        twin.__dict__[name] = value
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(client, name):
                setattr(twin, name, getattr(client, name))
    return twin


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


def _drop_in_metering(vluna: Vluna | None) -> Metering:
    if vluna is None:
        from ..vluna import Vluna

        vluna = Vluna.default()
    return Metering(vluna)


def _with_vluna(self: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options of ``copy`` that hand our constructor argument on."""
    extra = {**options.pop("_extra_kwargs", {}), "vluna": self._vluna_metering.vluna}
    return {**options, "_extra_kwargs": extra}


def _drop_in(kind: type[T]) -> type[T]:
    """Give a drop-in class its ``copy`` and ``with_options``, and announce its WebSockets."""
    base: Any = kind.__mro__[2]

    @functools.wraps(base.copy)
    def copy(self: Any, **options: Any) -> Any:
        copied = base.copy(self, **_with_vluna(self, options))
        copied._vluna_metering = self._vluna_metering
        return copied

    namespace: dict[str, Any] = {"copy": copy, "with_options": copy}
    for name in ("realtime", "responses", "live"):
        if isinstance(prop := _lookup(base, name), functools.cached_property):
            announced = _announcing(prop, f"openai.{name}.connect")
            announced.__set_name__(kind, name)
            namespace[name] = announced
    for name, value in namespace.items():
        setattr(kind, name, value)
    return kind


@_drop_in
class OpenAI(SyncMetered, openai.OpenAI):
    """`openai.OpenAI`, metered by ``vluna``, or by `Vluna.default()` whose settings come from the environment."""

    def __init__(self, *args: Any, vluna: Vluna | None = None, **options: Any) -> None:
        self._vluna_metering = _drop_in_metering(vluna)
        super().__init__(*args, **options)


@_drop_in
class AsyncOpenAI(AsyncMetered, openai.AsyncOpenAI):
    """`openai.AsyncOpenAI`, metered by ``vluna``, or by `Vluna.default()` whose settings come from the environment."""

    def __init__(self, *args: Any, vluna: Vluna | None = None, **options: Any) -> None:
        self._vluna_metering = _drop_in_metering(vluna)
        super().__init__(*args, **options)


@_drop_in
class AzureOpenAI(SyncMetered, openai.AzureOpenAI):
    """`openai.AzureOpenAI`, metered by ``vluna``, or by `Vluna.default()` whose settings come from the environment."""

    def __init__(self, *args: Any, vluna: Vluna | None = None, **options: Any) -> None:
        self._vluna_metering = _drop_in_metering(vluna)
        super().__init__(*args, **options)


@_drop_in
class AsyncAzureOpenAI(AsyncMetered, openai.AsyncAzureOpenAI):
    """`openai.AsyncAzureOpenAI`, metered by ``vluna``, or by `Vluna.default()` (settings from the environment)."""

    def __init__(self, *args: Any, vluna: Vluna | None = None, **options: Any) -> None:
        self._vluna_metering = _drop_in_metering(vluna)
        super().__init__(*args, **options)
