"""Metered chat models: a copy of the model whose class is a subclass of its own.

So everything that LangChain or an application asks of the model (``bind_tools``, ``isinstance``, its name in traces and
caches) is answered as before. One of two layers meters:

* ``client``: the model's SDK clients are metered; the class only tells them who pays;
* ``messages``: ``_generate``, ``_stream`` and their async twins ask the gate, read the usage of what they give, settle.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import ensure_config
from langchain_core.runnables.configurable import RunnableConfigurableFields
from langchain_core.utils.uuid import uuid7
from pydantic import PrivateAttr

from ..context import CallContext, make_context
from ..errors import VlunaError
from ..tap import INLINE_SECONDS
from ._langchain_call import MessagesCall, describe
from ._langchain_clients import fields_of, forget_late_clients, meter_clients
from ._langchain_run import Run, noted, paid_by, payer_of, run_of_call, run_of_config, run_of_manager
from ._langchain_stream import AsyncItems, SyncItems

if TYPE_CHECKING:
    from ..vluna import Vluna

Layer = Literal["client", "messages"]

_METERING: Final = "_vluna_metering"
_END: Final = object()


@dataclass(frozen=True, slots=True)
class Metering:
    """By whom a model is metered, and whom it is bound to."""

    vluna: Vluna
    bound: CallContext | None
    layer: Layer

    def __deepcopy__(self, memo: object) -> Metering:
        return self


class MeteredSerialized(dict[str, Any]):
    """How a metered model describes itself to callbacks: equal to what the bare model says, and known by its class."""


def metering_of(model: object) -> Metering | None:
    """How this model is metered; None where it is not."""
    found = getattr(model, _METERING, None) if isinstance(model, BaseChatModel) else None
    return found if isinstance(found, Metering) else None


def meter(model: Any, vluna: Vluna, bound: CallContext | None = None) -> Any:
    """A metered twin of a chat model, or of a binding, a retry or fallbacks around some; anything else as it is."""
    if isinstance(model, BaseChatModel):
        return _meter_model(model, vluna, bound)
    if isinstance(model, RunnableWithFallbacks):
        inner, rest = meter(model.runnable, vluna, bound), [meter(one, vluna, bound) for one in model.fallbacks]
        return model.model_copy(update={"runnable": inner, "fallbacks": rest})
    if isinstance(model, RunnableBindingBase):
        inner = meter(model.bound, vluna, bound)
        return model if inner is model.bound else model.model_copy(update={"bound": inner})
    return model


def _meter_model(model: Any, vluna: Vluna, bound: CallContext | None) -> Any:
    known = metering_of(model)
    if known is not None:
        if known.vluna is vluna and bound is None:
            return model
        bound = bound if known.bound is None else known.bound if bound is None else known.bound.override(bound)
        base = type(model).__dict__["_vluna_base"]
    else:
        base = type(model)
    twin = model.model_copy()
    layer: Layer = "client" if meter_clients(twin, vluna, bound) else "messages"
    return _become(twin, metered_class(base, vluna, layer), Metering(vluna, bound, layer))


def _become(twin: Any, kind: type[Any], metering: Metering) -> Any:
    private = {**(twin.__pydantic_private__ or {}), _METERING: metering}
    twin.__dict__.pop("_serialized", None)
    object.__setattr__(twin, "__class__", kind)
    object.__setattr__(twin, "__pydantic_private__", private)
    return twin


def metered_class(base: type[Any], vluna: Vluna, layer: Layer) -> type[Any]:
    """The metered subclass of ``base``: named as it is, found again through it, and freed when nobody uses it."""
    for known in base.__subclasses__():
        own = known.__dict__
        if own.get("_vluna_base") is base and own.get("_vluna_of") == (id(vluna), layer):
            return known
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_vluna_metering": PrivateAttr(default_factory=lambda: Metering(vluna, None, layer)),
        **_common(base, vluna),
        **(_client_methods(base) if layer == "client" else _messages_methods(base)),
    }
    kind: Any = type(base)
    made: type[Any] = kind(base.__name__, (base,), namespace)
    # Set afterwards: pydantic would take names with an underscore for private attributes.
    type.__setattr__(made, "_vluna_base", base)
    type.__setattr__(made, "_vluna_of", (id(vluna), layer))
    return made


# -- what both layers do -----------------------------------------------------------------------------------------------


def _common(base: type[Any], vluna: Vluna) -> dict[str, Any]:
    """Notes the run before LangChain calls the model back, and keeps what is derived from the model metered."""

    @functools.wraps(base.__init__)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        base.__init__(self, *args, **values)
        meter_clients(self, vluna, None)  # for type(model)(...): never silently unmetered

    @functools.wraps(base._generate_with_cache)
    def _generate_with_cache(self: Any, messages: Any, stop: Any = None, run_manager: Any = None, **rest: Any) -> Any:
        with noted(run_of_manager(run_manager) if run_manager is not None else run_of_config(None, self)):
            return base._generate_with_cache(self, messages, stop=stop, run_manager=run_manager, **rest)

    @functools.wraps(base._agenerate_with_cache)
    async def _agenerate_with_cache(
        self: Any, messages: Any, stop: Any = None, run_manager: Any = None, **rest: Any
    ) -> Any:
        with noted(run_of_manager(run_manager) if run_manager is not None else run_of_config(None, self)):
            return await base._agenerate_with_cache(self, messages, stop=stop, run_manager=run_manager, **rest)

    @functools.wraps(base.stream)
    def stream(self: Any, input: Any, config: Any = None, **rest: Any) -> Iterator[Any]:
        config = {"run_id": uuid7(), **ensure_config(config)}
        return _steps(base.stream(self, input, config, **rest), run_of_config(config, self))

    @functools.wraps(base.astream)
    def astream(self: Any, input: Any, config: Any = None, **rest: Any) -> AsyncIterator[Any]:
        config = {"run_id": uuid7(), **ensure_config(config)}
        return _asteps(base.astream(self, input, config, **rest), run_of_config(config, self))

    @functools.wraps(base.with_retry)
    def with_retry(self: Any, **options: Any) -> Any:
        types = options.pop("retry_if_exception_type", (Exception,))
        return base.with_retry(self, retry_if_exception_type=_unless_refused(types), **options)

    @functools.wraps(base.with_fallbacks)
    def with_fallbacks(self: Any, fallbacks: Any, **options: Any) -> Any:
        mine = metering_of(self)
        if mine is not None:
            fallbacks = [meter(one, mine.vluna, mine.bound) for one in fallbacks]
        return base.with_fallbacks(self, fallbacks, **options)

    @functools.wraps(base.configurable_fields)
    def configurable_fields(self: Any, **fields: Any) -> Any:
        made = base.configurable_fields(self, **fields)
        return MeteredConfigurable(default=made.default, fields=made.fields)

    def __deepcopy__(self: Any, memo: Any = None) -> Any:
        source = self.model_copy()
        forget_late_clients(vars(source), base)
        twin = base.__deepcopy__(source, memo)
        if (mine := metering_of(self)) is not None:
            meter_clients(twin, mine.vluna, mine.bound)
        return twin

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        mine = metering_of(self)
        bare: Any = object.__new__(base)
        values = dict(vars(self))
        forget_late_clients(values, base)
        values.pop("_serialized", None)
        private = {name: value for name, value in (self.__pydantic_private__ or {}).items() if name != _METERING}
        bare.__setstate__(
            {
                "__dict__": values,
                "__pydantic_extra__": self.__pydantic_extra__,
                "__pydantic_fields_set__": self.__pydantic_fields_set__,
                "__pydantic_private__": private or None,
            }
        )
        return _metered_again, (bare, fields_of(mine.bound) if mine is not None and mine.bound is not None else None)

    found: dict[str, Any] = {
        "__init__": __init__,
        "_generate_with_cache": _generate_with_cache,
        "_agenerate_with_cache": _agenerate_with_cache,
        "stream": stream,
        "astream": astream,
        "with_retry": with_retry,
        "with_fallbacks": with_fallbacks,
        "configurable_fields": configurable_fields,
        "__deepcopy__": __deepcopy__,
        "__reduce_ex__": __reduce_ex__,
    }
    described = getattr(base, "_serialized", None)
    if isinstance(described, cached_property):
        found["_serialized"] = cached_property(lambda self: MeteredSerialized(described.func(self)))
    return found


def _metered_again(bare: Any, bound: dict[str, Any] | None) -> Any:
    """What a pickle is read as: metered by the settings of the process that reads it."""
    from ..vluna import Vluna

    return meter(bare, Vluna.default(), make_context(**bound) if bound else None)


class MeteredConfigurable(RunnableConfigurableFields):  # type: ignore[misc]
    """``configurable_fields`` of a metered model: what it makes for a config is bound as the model is."""

    def _prepare(self, config: Any = None) -> Any:
        runnable, config = super()._prepare(config)
        mine = metering_of(self.default)
        if mine is not None and runnable is not self.default:
            runnable = meter(runnable, mine.vluna, mine.bound)
        return runnable, config


MeteredConfigurable.__module__ = RunnableConfigurableFields.__module__
MeteredConfigurable.__name__ = MeteredConfigurable.__qualname__ = RunnableConfigurableFields.__name__


def _unless_refused(types: Any) -> Any:
    """What ``with_retry`` retries, without refusals of the gate, unless one of their types is named."""
    if not isinstance(types, (tuple, type)):
        return lambda error: not isinstance(error, VlunaError) and types(error)
    named = types if isinstance(types, tuple) else (types,)
    refusals = tuple(kind for kind in named if issubclass(kind, VlunaError))
    return lambda error: isinstance(error, refusals if isinstance(error, VlunaError) else named)


def _steps(inner: Any, run: Run) -> Iterator[Any]:
    try:
        with noted(run):
            first = next(inner, _END)
        if first is not _END:
            yield first
            yield from inner
    finally:
        inner.close()
        if run.items is not None:
            run.items.close()


async def _asteps(inner: Any, run: Run) -> AsyncIterator[Any]:
    try:
        with noted(run):
            first = await anext(inner, _END)
        if first is not _END:
            yield first
            async for item in inner:
                yield item
    finally:
        await inner.aclose()
        if callable(close := getattr(run.items, "aclose", None)):
            await close()
        elif isinstance(run.items, SyncItems):  # a generator may be running in another thread, which cannot be stopped
            run.items.close()


# -- the layers --------------------------------------------------------------------------------------------------------


def _manager_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The run manager among the arguments after the messages: ``stop`` comes first."""
    return kwargs.get("run_manager") or (args[1] if len(args) > 1 else None)


def _payer(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Run, CallContext]:
    mine = metering_of(model)
    assert mine is not None
    run = run_of_call(_manager_in(args, kwargs))
    return run, payer_of(run, mine.vluna)


def _paid(make: Callable[[], Any], payer: CallContext) -> Iterator[Any]:
    """The chunks of a stream, whose request is made at the first read."""
    inner: Any = None
    try:
        with paid_by(payer):
            inner = iter(make())
            first = next(inner, _END)
        if first is not _END:
            yield first
            yield from inner
    finally:
        if callable(close := getattr(inner, "close", None)):
            close()


async def _apaid(make: Callable[[], Any], payer: CallContext) -> AsyncIterator[Any]:
    inner: Any = None
    try:
        with paid_by(payer):
            inner = make().__aiter__()
            first = await anext(inner, _END)
        if first is not _END:
            yield first
            async for chunk in inner:
                yield chunk
    finally:
        if callable(close := getattr(inner, "aclose", None)):
            await close()


def _client_methods(base: type[Any]) -> dict[str, Any]:
    """The metered clients inside ask the gate; they are told who pays."""

    @functools.wraps(base._generate)
    def _generate(self: Any, messages: Any, *args: Any, **kwargs: Any) -> Any:
        with paid_by(_payer(self, args, kwargs)[1]):
            return base._generate(self, messages, *args, **kwargs)

    @functools.wraps(base._agenerate)
    async def _agenerate(self: Any, messages: Any, *args: Any, **kwargs: Any) -> Any:
        with paid_by(_payer(self, args, kwargs)[1]):
            return await base._agenerate(self, messages, *args, **kwargs)

    @functools.wraps(base._stream)
    def _stream(self: Any, messages: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        run, payer = _payer(self, args, kwargs)
        run.items = chunks = _paid(lambda: base._stream(self, messages, *args, **kwargs), payer)
        return chunks

    @functools.wraps(base._astream)
    def _astream(self: Any, messages: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        run, payer = _payer(self, args, kwargs)
        run.items = chunks = _apaid(lambda: base._astream(self, messages, *args, **kwargs), payer)
        return chunks

    return _where_overridden(base, _generate, _agenerate, _stream, _astream)


def _messages_methods(base: type[Any]) -> dict[str, Any]:
    """The model's own methods ask the gate, and settle by what they give."""

    def opened(
        self: Any, messages: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, stream: bool
    ) -> tuple[Run, MessagesCall] | None:
        mine = metering_of(self)
        assert mine is not None
        if mine.vluna.mode == "off":
            return None
        run = run_of_call(_manager_in(args, kwargs))
        asked = {name: value for name, value in kwargs.items() if name not in ("stop", "run_manager")}
        stop = kwargs.get("stop") or (args[0] if args else None)
        call = describe(self, messages, stop, asked, stream=stream)
        return run, MessagesCall(mine.vluna, payer_of(run, mine.vluna), mine.bound, call)

    @functools.wraps(base._generate)
    def _generate(self: Any, messages: Any, *args: Any, **kwargs: Any) -> Any:
        found = opened(self, messages, args, kwargs, stream=False)
        if found is None or not (call := found[1]).begin():
            return base._generate(self, messages, *args, **kwargs)
        try:
            with call.running():
                result = base._generate(self, messages, *args, **kwargs)
        except BaseException as error:
            call.failed(error)
            raise
        call.answered(result)
        call.wait(INLINE_SECONDS)
        return result

    @functools.wraps(base._agenerate)
    async def _agenerate(self: Any, messages: Any, *args: Any, **kwargs: Any) -> Any:
        found = opened(self, messages, args, kwargs, stream=False)
        if found is None or not await (call := found[1]).abegin():
            return await base._agenerate(self, messages, *args, **kwargs)
        try:
            with call.running():
                result = await base._agenerate(self, messages, *args, **kwargs)
        except BaseException as error:
            call.failed(error)
            raise
        call.answered(result)
        await call.wait_async(INLINE_SECONDS)
        return result

    @functools.wraps(base._stream)
    def _stream(self: Any, messages: Any, *args: Any, **kwargs: Any) -> Any:
        found = opened(self, messages, args, kwargs, stream=True)
        if found is None:
            return base._stream(self, messages, *args, **kwargs)
        hides = _asks_usage(base._stream, self, kwargs)
        asked = {**kwargs, "stream_usage": True} if hides else kwargs
        run, call = found  # the stream does not know its run: what is told at its end must not keep it alive
        run.items = SyncItems(call, lambda: base._stream(self, messages, *args, **asked), hides_usage=hides)
        return run.items

    @functools.wraps(base._astream)
    def _astream(self: Any, messages: Any, *args: Any, **kwargs: Any) -> Any:
        found = opened(self, messages, args, kwargs, stream=True)
        if found is None:
            return base._astream(self, messages, *args, **kwargs)
        hides = _asks_usage(base._astream, self, kwargs)
        asked = {**kwargs, "stream_usage": True} if hides else kwargs
        run, call = found
        run.items = AsyncItems(call, lambda: base._astream(self, messages, *args, **asked), hides_usage=hides)
        return run.items

    # Events that a model makes itself have no chunks to read: LangChain then makes them from ``_stream``.
    own = {name: None for name in ("_stream_chat_model_events", "_astream_chat_model_events") if hasattr(base, name)}
    return {**_where_overridden(base, _generate, _agenerate, _stream, _astream), **own}


def _where_overridden(base: type[Any], *methods: Callable[..., Any]) -> dict[str, Any]:
    """Those methods that the model has of its own: LangChain asks, and its defaults lead to the others."""
    return {
        method.__name__: method
        for method in methods
        if getattr(base, method.__name__) is not getattr(BaseChatModel, method.__name__)
    }


def _asks_usage(method: Callable[..., Any], model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the model has a switch for the usage of streams that is not on."""
    if "stream_usage" not in inspect.signature(method).parameters:
        return False
    given = kwargs.get("stream_usage")
    return not (getattr(model, "stream_usage", None) if given is None else given)
