"""The patches on the methods of LiteLLM's Router that a call passes: its entry, its attempts, a deployment's choice."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any, Final

import litellm

from ..errors import VlunaError
from ..scoped import unset
from ._litellm_key import enter_key, is_unasked
from ._litellm_route import OpenCall, Refused, Route, current_route, open_route

METHODS: Final[Mapping[str, str]] = {
    "completion": "chat.completions",
    "acompletion": "chat.completions",
    "aadapter_completion": "chat.completions",
    "text_completion": "completions",
    "atext_completion": "completions",
    "embedding": "embeddings",
    "aembedding": "embeddings",
    "image_generation": "images",
    "aimage_generation": "images",
    "atranscription": "audio",
    "aspeech": "",
    "arerank": "",
}
"""The Router's public methods, and what they ask for; empty where that is not metered by tokens."""

GENERIC: Final = ("_ageneric_api_call_with_fallbacks", "_generic_api_call_with_fallbacks")
"""What the methods that a Router makes for itself come down to."""

GENERIC_KINDS: Final[Mapping[str, str]] = {
    "responses": "responses",
    "aresponses": "responses",
    "anthropic_messages": "anthropic.messages",
}
"""LiteLLM's functions behind those methods, by name."""


Method = Callable[..., Any]


class Installed:
    """Who makes the logical calls; None where the patches do nothing (any more)."""

    __slots__ = ("open_call",)

    def __init__(self) -> None:
        self.open_call: OpenCall | None = None


installed: Final = Installed()


def entry_of(
    original: Method,
    name: str,
    *,
    kind: Callable[[Mapping[str, Any]], str],
    prepared: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Method:
    """A method that is called from outside: it makes the logical call, and lets a refusal out."""

    def start(kwargs: dict[str, Any], is_async: bool) -> tuple[Route | None, dict[str, Any]]:
        if installed.open_call is None:
            return None, kwargs
        if prepared is not None:
            kwargs = prepared(kwargs)
        return open_route(installed.open_call, kind(kwargs), kwargs, is_async=is_async)

    if inspect.iscoroutinefunction(original):

        async def amethod(self: Any, *args: Any, **kwargs: Any) -> Any:
            if is_unasked():
                await enter_key()
            route, kwargs = start(kwargs, True)
            if route is None:
                return await original(self, *args, **kwargs)
            with route.entered():
                try:
                    return route.answered(await original(self, *args, **kwargs))
                except Refused as refused:
                    error: BaseException = refused.error
                    _race_refused(refused.error)
                except BaseException as failure:
                    error = failure
                route.failed(error)
            raise error

        return amethod

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        route, kwargs = start(kwargs, False)
        if route is None:
            return original(self, *args, **kwargs)
        with route.entered():
            try:
                return route.answered(original(self, *args, **kwargs))
            except Refused as refused:
                error: BaseException = refused.error
            except BaseException as failure:
                error = failure
            route.failed(error)
        raise error

    return method


def fixed_kind(kind: str, kwargs: Mapping[str, Any]) -> str:
    return kind


def race_of(original: Method, name: str) -> Method:
    """Several calls at once, of which the first answer counts. Where there is none, LiteLLM does not say why."""

    async def race(self: Any, *args: Any, **kwargs: Any) -> Any:
        refusals: list[VlunaError] = []
        token = _refusals.set(refusals)
        try:
            return await original(self, *args, **kwargs)
        except Exception:
            if not refusals:
                raise
        finally:
            unset(_refusals, token)
        raise refusals[0]

    return race


def _race_refused(error: VlunaError) -> None:
    refusals = _refusals.get()
    if refusals is not None:
        refusals.append(error)


_refusals: ContextVar[list[VlunaError] | None] = ContextVar("vluna_llm_litellm_refusals", default=None)


def generic_kind(kwargs: Mapping[str, Any]) -> str:
    return GENERIC_KINDS.get(getattr(kwargs.get("original_function"), "__name__", ""), "")


def as_wrapped(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A Router keeps LiteLLM's functions as they were when it was made: in their place the wrapped ones, or back."""
    function = kwargs.get("original_function")
    name = getattr(function, "__name__", None)
    now = vars(litellm).get(name) if isinstance(name, str) else None
    if now is not None and getattr(now, "__wrapped__", None) is function:
        return {**kwargs, "original_function": now}
    return kwargs


def chain_of(original: Method, name: str) -> Method:
    """Retries and fallbacks. Whatever gets here outside of a route took its method from an instance before we came."""
    entry = entry_of(_threaded(original), name, kind=_chain_kind)

    if inspect.iscoroutinefunction(original):

        async def achain(self: Any, *args: Any, **kwargs: Any) -> Any:
            return await (entry if current_route() is None else original)(self, *args, **kwargs)

        return achain

    threaded = _threaded(original)

    def chain(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (entry if current_route() is None else threaded)(self, *args, **kwargs)

    return chain


def _chain_kind(kwargs: Mapping[str, Any]) -> str:
    name = getattr(kwargs.get("original_function"), "__name__", "")
    if "generic" in name:
        return GENERIC_KINDS.get(getattr(kwargs.get("original_generic_function"), "__name__", ""), "")
    return METHODS.get(name.removeprefix("_"), "")


def _threaded(original: Method) -> Method:
    """On an event loop the Router's sync methods work in another thread, which is given this context here."""
    if inspect.iscoroutinefunction(original):
        return original

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _on_a_loop():
            return original(self, *args, **kwargs)
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(copy_context().run, original, self, *args, **kwargs).result()

    return method


def _on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


# -- attempts ----------------------------------------------------------------------------------------------------------


def attempt_of(original: Method, name: str) -> Method:
    """One attempt: a refusal that it meets is no reason for another one."""

    async def make_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await original(self, *args, **kwargs)
        except VlunaError as error:
            if current_route() is None:
                raise
            raise Refused(error) from None

    return make_call


def choice_of(original: Method, name: str) -> Method:
    """A deployment was chosen, and nothing is counted against it yet: ask the gate for what it sells."""
    if inspect.iscoroutinefunction(original):

        async def achoose(self: Any, *args: Any, **kwargs: Any) -> Any:
            deployment = await original(self, *args, **kwargs)
            route = current_route()
            if route is not None and route.is_async:
                await route.aadmit(route.plan(deployment, kwargs))
            return deployment

        return achoose

    def choose(self: Any, *args: Any, **kwargs: Any) -> Any:
        deployment = original(self, *args, **kwargs)
        route = current_route()
        if route is not None and not route.is_async:
            route.admit(route.plan(deployment, kwargs))
        return deployment

    return choose
