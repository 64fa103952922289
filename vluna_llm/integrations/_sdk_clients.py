"""Metered clients of an SDK: subclasses of the client's own class, made on demand, and twins that are theirs."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..context import CallContext
from ._default import given_or_default
from ._sdk_metered import Metered, Metering

if TYPE_CHECKING:
    from ..vluna import Vluna

T = TypeVar("T")


def meter_client(
    vluna: Vluna,
    client: T,
    bound: CallContext | None,
    metered_class: Callable[[type[Any], Vluna], type[Any]],
    clone: Callable[[Any, type[Any]], Any],
) -> T:
    """A client of the same class that is metered by ``vluna``; the given one stays as it is.

    Wrapping a metered client again meters it once; ``bound`` is merged into what it is bound to.

    Args:
        vluna: by whom it is metered.
        client: of an SDK that has the two methods.
        bound: whom it is bound to.
        metered_class: gives the metered subclass of a class.
        clone: gives the twin of a client that is of another class.
    """
    current: Metering | None = getattr(client, "_vluna_metering", None)
    if current is None:
        metered = clone(client, metered_class(type(client), vluna))
        metered._vluna_metering = Metering(vluna, bound)
        return cast(T, metered)
    if current.vluna is vluna and bound is None:
        return client
    merged = bound if current.bound is None or bound is None else current.bound.override(bound)
    metered = clone(client, type(client))
    metered._vluna_metering = Metering(vluna, merged if merged is not None else current.bound)
    return cast(T, metered)


def make_metered_class(
    base: type[Any], vluna: Vluna, mixin: type[Metered], members: Callable[[type[Any]], Mapping[str, Any]]
) -> type[Any]:
    """The metered subclass of ``base``: named as it is, found again through it, and freed when nobody uses it.

    ``members`` gives what the SDK's own integration puts into it.
    """
    for known in base.__subclasses__():
        metering = known.__dict__.get("_vluna_metering")
        if known.__dict__.get("_vluna_base") is base and metering is not None and metering.vluna is vluna:
            return known
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_vluna_base": base,
        "_vluna_metering": Metering(vluna),  # for type(client)(...): never silently unmetered
        **members(base),
    }
    kind: type[Any] = types.new_class(base.__name__, (mixin, base), {}, lambda body: body.update(namespace))
    return kind


def lookup(kind: type[Any], name: str) -> Any:
    """What a class or one of its bases has under that name, as it was written; None where there is nothing."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def clone(client: Any, kind: type[Any]) -> Any:
    """A shallow twin of another class, without what is bound to the original: resources, and methods set on it.

    Not ``client.copy()``: that calls the constructor of the client's class, which a subclass may have given arguments
    that only its author knows, and forgets what was set later.
    """
    return adopt(object.__new__(kind), client)


def adopt(twin: Any, client: Any) -> Any:
    """Make an object that has nothing yet the twin of a client, as `clone` does."""
    kind = type(twin)
    for name, value in vars(client).items():
        resource = isinstance(lookup(kind, name), functools.cached_property)
        if resource or getattr(value, "__self__", None) is client or getattr(value, "_client", None) is client:
            continue
        twin.__dict__[name] = value
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(client, name):
                setattr(twin, name, getattr(client, name))
    return twin


def drop_in_metering(vluna: Vluna | None) -> Metering:
    """The metering of a drop-in client: of the given ``vluna``, or of `Vluna.default()`."""
    return Metering(given_or_default(vluna))


def with_vluna(client: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options of ``copy`` that hand a drop-in's constructor argument on."""
    extra = {**options.pop("_extra_kwargs", {}), "vluna": client._vluna_metering.vluna}
    return {**options, "_extra_kwargs": extra}
