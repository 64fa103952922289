"""LiteLLM's Router: one logical call from its public method to the answer, whatever it tries in between.

The Router catches every `Exception`, in many places: to try again, to fall back, to cool a deployment down, to alert
the operator. A refusal of the gate is none of their business: it belongs to one customer. So it travels through the
Router as a `BaseException` of our own, which nothing in there catches, and the method that was called raises the gate's
own error.
The gate is asked where the Router is about to choose a deployment, or has just done so, and has counted nothing against
it yet: neither requests per minute nor one of its parallel requests.

The class is patched and never an instance. A Router that was made before is covered, too: also its generated methods
(``router.aresponses``) look their helpers up on the class. Where no context reaches, the logical call is carried along:
into the thread in which a sync method works when it is called on an event loop, and into a fallback that continues a
broken stream long after the method has returned.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Final

import litellm

from ..errors import VlunaError
from ._litellm_call import current_call
from ._litellm_entry import installed
from ._litellm_route import Continuation, OpenCall, Refused, Route, Unbilled, current_route, open_route, unbilled

if TYPE_CHECKING:
    from ..vluna import Vluna

Patch = Callable[[Callable[..., Any], str], Callable[..., Any]]

_METHODS: Final[Mapping[str, str]] = {
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

_GENERIC: Final = ("_ageneric_api_call_with_fallbacks", "_generic_api_call_with_fallbacks")
"""What the methods that a Router makes for itself come down to."""

_GENERIC_KINDS: Final[Mapping[str, str]] = {
    "responses": "responses",
    "aresponses": "responses",
    "anthropic_messages": "anthropic.messages",
}
"""LiteLLM's functions behind those methods, by name."""

_CONTINUED: Final = (
    "_acompletion_streaming_iterator",
    "_aresponses_streaming_iterator",
    "_aanthropic_messages_streaming_iterator",
)
"""They keep the arguments of the call for a fallback that continues a broken stream."""

_CONTINUE: Final[Mapping[str, str]] = {
    "async_function_with_fallbacks_common_utils": "kwargs",
    "_aanthropic_messages_retry_same_group": "initial_kwargs",
}
"""Where they go on, and by which argument they hand over what they kept."""

_MIRRORED: Final = ("_silent_experiment_acompletion", "_silent_experiment_completion")
"""A copy of the request for another model, for the operator to compare."""


class RouterHooks:
    """What `VlunaCallback` does as one of the Router's callbacks. Mixed into it."""

    async def async_filter_deployments(
        self,
        model: str,
        healthy_deployments: list[Any],
        messages: list[Any] | None,
        request_kwargs: dict[str, Any] | None = None,
        parent_otel_span: Any = None,
    ) -> list[Any]:
        """Ask the gate before a deployment is chosen, where all of them sell the same. Nothing is filtered.

        Raises:
            Refused: the method of the Router that was called raises the gate's own error.
        """
        route = current_route()
        if route is not None and route.is_async and _alike(healthy_deployments):
            arguments = {"messages": messages, "request_kwargs": request_kwargs}
            await route.aadmit(route.plan(healthy_deployments[0], arguments))
        return healthy_deployments


def install_router(open_call: OpenCall) -> None:
    """Cover every Router of this process, also those that were made before. Again: nothing more happens.

    Args:
        open_call: makes the logical call where a method of a Router is called outside of one.
    """
    global _open_call
    _open_call = open_call
    if _patched:
        return
    router = litellm.Router
    for name, kind in _METHODS.items():
        _patch(router, name, functools.partial(_entry, kind=functools.partial(_fixed_kind, kind)))
    for name in _GENERIC:
        _patch(router, name, functools.partial(_entry, kind=_generic_kind, prepared=_as_wrapped))
    for name in ("async_function_with_fallbacks", "function_with_fallbacks"):
        _patch(router, name, _chain)
    _patch(router, "make_call", _attempt)
    for name in ("async_get_available_deployment", "get_available_deployment"):
        _patch(router, name, _choice)
    _patch(router, "abatch_completion_fastest_response", _race)
    for name in _CONTINUED:
        _patch(router, name, _keeping)
    _patch(router, "_completion_streaming_iterator", _carrying)
    for name, argument in _CONTINUE.items():
        _patch(router, name, functools.partial(_continuing, argument=argument))
    for name in _MIRRORED:
        _patch(router, name, functools.partial(_nobodys, what="litellm.router.silent_model", quiet=False))
    _patch(litellm, "ahealth_check", functools.partial(_nobodys, what="litellm.ahealth_check", quiet=True))


def uninstall_router() -> None:
    """Take the patches off. One that somebody else has wrapped meanwhile stays where it is, and does nothing."""
    global _open_call
    _open_call = None
    for (owner, name), (before, ours) in _patched.items():
        if vars(owner).get(name) is ours:
            setattr(owner, name, before)
    _patched.clear()


_open_call: OpenCall | None = None
_patched: dict[tuple[Any, str], tuple[Any, Any]] = {}


def _patch(owner: Any, name: str, patch: Patch) -> None:
    before = vars(owner).get(name)
    if not inspect.isfunction(before):
        return  # this version of LiteLLM has no such method
    ours = functools.wraps(before)(patch(before, name))
    setattr(owner, name, ours)
    _patched[owner, name] = (before, ours)


def _alike(deployments: Any) -> bool:
    """Whether it does not matter to the bill which of these is chosen."""
    if not isinstance(deployments, list) or not deployments:
        return False
    marks = (_mark(deployment) for deployment in deployments)
    first = next(marks)
    return first is not None and all(mark == first for mark in marks)


def _mark(deployment: Any) -> tuple[Any, ...] | None:
    params = deployment.get("litellm_params") if isinstance(deployment, Mapping) else None
    if not isinstance(params, Mapping):
        return None
    info = deployment.get("model_info")
    base = info.get("base_model") if isinstance(info, Mapping) else None
    return (*(params.get(name) for name in ("model", "custom_llm_provider", "base_model", "deployment_id")), base)


# -- entries -----------------------------------------------------------------------------------------------------------


def _entry(
    original: Callable[..., Any],
    name: str,
    *,
    kind: Callable[[Mapping[str, Any]], str],
    prepared: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Callable[..., Any]:
    """A method that is called from outside: it makes the logical call, and lets a refusal out."""

    def start(kwargs: dict[str, Any], is_async: bool) -> tuple[Route | None, dict[str, Any]]:
        if _open_call is None:
            return None, kwargs
        if prepared is not None:
            kwargs = prepared(kwargs)
        return open_route(_open_call, kind(kwargs), kwargs, is_async=is_async)

    if inspect.iscoroutinefunction(original):

        async def amethod(self: Any, *args: Any, **kwargs: Any) -> Any:
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


def _fixed_kind(kind: str, kwargs: Mapping[str, Any]) -> str:
    return kind


def _race(original: Callable[..., Any], name: str) -> Callable[..., Any]:
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
            try:
                _refusals.reset(token)
            except ValueError:
                pass  # closed in another task than it was called in, which never saw it
        raise refusals[0]

    return race


def _race_refused(error: VlunaError) -> None:
    refusals = _refusals.get()
    if refusals is not None:
        refusals.append(error)


_refusals: ContextVar[list[VlunaError] | None] = ContextVar("vluna_llm_litellm_refusals", default=None)


def _generic_kind(kwargs: Mapping[str, Any]) -> str:
    return _GENERIC_KINDS.get(getattr(kwargs.get("original_function"), "__name__", ""), "")


def _as_wrapped(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A Router keeps LiteLLM's functions as they were when it was made: in their place the wrapped ones, or back."""
    function = kwargs.get("original_function")
    name = getattr(function, "__name__", None)
    now = vars(litellm).get(name) if isinstance(name, str) else None
    if now is not None and getattr(now, "__wrapped__", None) is function:
        return {**kwargs, "original_function": now}
    return kwargs


def _chain(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Retries and fallbacks. Whatever gets here outside of a route took its method from an instance before we came."""
    entry = _entry(_threaded(original), name, kind=_chain_kind)

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
        return _GENERIC_KINDS.get(getattr(kwargs.get("original_generic_function"), "__name__", ""), "")
    return _METHODS.get(name.removeprefix("_"), "")


def _threaded(original: Callable[..., Any]) -> Callable[..., Any]:
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


def _attempt(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """One attempt: a refusal that it meets is no reason for another one."""

    async def make_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await original(self, *args, **kwargs)
        except VlunaError as error:
            if current_route() is None:
                raise
            raise Refused(error) from None

    return make_call


def _choice(original: Callable[..., Any], name: str) -> Callable[..., Any]:
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


# -- streams that a fallback continues ---------------------------------------------------------------------------------


def _keeping(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    async def keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        route, arguments = current_route(), kwargs.get("initial_kwargs")
        if route is not None and route.call is not None and isinstance(arguments, dict):
            kwargs["initial_kwargs"] = Continuation(arguments, route.again())
        return await original(self, *args, **kwargs)

    return keep


def _continuing(original: Callable[..., Any], name: str, *, argument: str) -> Callable[..., Any]:
    async def go_on(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = kwargs.get(argument)
        if not isinstance(kept, Continuation) or _open_call is None:
            return await original(self, *args, **kwargs)
        return await _afollowed(kept.route, original, self, *args, **kwargs)

    return go_on


async def _afollowed(route: Route, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with route.entered():
        try:
            return await function(*args, **kwargs)
        except Refused as refused:
            error: BaseException = refused.error
        except BaseException as failure:
            error = failure
        route.failed(error)
    raise error


def _carrying(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    def carry(self: Any, *args: Any, **kwargs: Any) -> Any:
        route = current_route()
        if route is None or route.call is None:
            return original(self, *args, **kwargs)
        return original(_Carrier(self, route.again()), *args, **kwargs)

    return carry


class _Carrier:
    """The Router as the generator of a sync stream sees it: what it goes on with belongs to the call it began in."""

    def __init__(self, router: Any, route: Route) -> None:
        self._router = router
        self._route = route

    def __getattr__(self, name: str) -> Any:
        return getattr(self._router, name)

    def function_with_fallbacks(self, *args: Any, **kwargs: Any) -> Any:
        """As LiteLLM 1.83 goes on."""
        route = self._route
        with route.entered():
            try:
                return self._router.function_with_fallbacks(*args, **kwargs)
            except Refused as refused:
                error: BaseException = refused.error
            except BaseException as failure:
                error = failure
            route.failed(error)
        raise error

    async def async_function_with_fallbacks_common_utils(self, *args: Any, **kwargs: Any) -> Any:
        """As LiteLLM 1.106 goes on, in a loop of its own and maybe in a thread of its own."""
        function = self._router.async_function_with_fallbacks_common_utils
        return await _afollowed(self._route, function, *args, **kwargs)


# -- calls that nobody pays for ----------------------------------------------------------------------------------------


def _nobodys(original: Callable[..., Any], name: str, *, what: str, quiet: bool) -> Callable[..., Any]:
    """Calls that LiteLLM makes for itself. They cost tokens and belong to no customer: none is billed for them.

    Health checks are never refused, and told in a low voice: they run every few minutes. Mirrored traffic is told like
    everything else that costs money and is not metered.
    """

    def vluna_of() -> Vluna | None:
        vluna = installed()
        if vluna is None or vluna.mode == "off" or isinstance(current_call(), Unbilled):
            return None
        if quiet:
            vluna.telemetry.emit("vluna.endpoint.unmetered", "info", {"vluna.endpoint": what})
        else:
            vluna.unmetered(what)
        return vluna

    if inspect.iscoroutinefunction(original):

        async def arun(*args: Any, **kwargs: Any) -> Any:
            vluna = vluna_of()
            if vluna is None:
                return await original(*args, **kwargs)
            with unbilled(vluna):
                return await original(*args, **kwargs)

        return arun

    def run(*args: Any, **kwargs: Any) -> Any:
        vluna = vluna_of()
        if vluna is None:
            return original(*args, **kwargs)
        with unbilled(vluna):
            return original(*args, **kwargs)

    return run
