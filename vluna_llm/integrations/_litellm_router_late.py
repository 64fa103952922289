"""What LiteLLM's Router does beside a call, or long after it: continued streams, mirrored traffic, health checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ._litellm_call import current_call
from ._litellm_entry import installed as metering
from ._litellm_route import Continuation, Refused, Route, Unbilled, current_route, unbilled

if TYPE_CHECKING:
    from ..vluna import Vluna

CONTINUED: Final = (
    "_acompletion_streaming_iterator",
    "_aresponses_streaming_iterator",
    "_aanthropic_messages_streaming_iterator",
)
"""They keep the arguments of the call for a fallback that continues a broken stream."""

CONTINUE: Final = (
    "async_function_with_fallbacks_common_utils",
    "_aanthropic_messages_retry_same_group",
    "_astream_retry_same_group",
)
"""Where they go on (the last is what 1.109 calls the one before); what they kept is one of the arguments."""

MIRRORED: Final = ("_silent_experiment_acompletion", "_silent_experiment_completion")
"""A copy of the request for another model, for the operator to compare."""


Method = Callable[..., Any]


# -- streams that a fallback continues ---------------------------------------------------------------------------------


def keeping(original: Method, name: str) -> Method:
    async def keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        route, arguments = current_route(), kwargs.get("initial_kwargs")
        if route is not None and route.call is not None and isinstance(arguments, dict):
            kwargs["initial_kwargs"] = Continuation(arguments, route.again())
        return await original(self, *args, **kwargs)

    return keep


def continuing(original: Method, name: str) -> Method:
    async def go_on(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = next((value for value in (*args, *kwargs.values()) if isinstance(value, Continuation)), None)
        if kept is None:
            return await original(self, *args, **kwargs)
        return await afollowed(kept.route, original, self, *args, **kwargs)

    return go_on


async def afollowed(route: Route, function: Method, *args: Any, **kwargs: Any) -> Any:
    """What goes on with a broken stream belongs to the call that it began in."""
    route.leave_stream()
    with route.entered():
        try:
            return await function(*args, **kwargs)
        except Refused as refused:
            error: BaseException = refused.error
        except BaseException as failure:
            error = failure
        route.failed(error)
    raise error


def followed(route: Route, function: Method, *args: Any, **kwargs: Any) -> Any:
    """`afollowed` for what does not wait."""
    route.leave_stream()
    with route.entered():
        try:
            return function(*args, **kwargs)
        except Refused as refused:
            error: BaseException = refused.error
        except BaseException as failure:
            error = failure
        route.failed(error)
    raise error


def carrying(original: Method, name: str) -> Method:
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
        return followed(self._route, self._router.function_with_fallbacks, *args, **kwargs)

    async def async_function_with_fallbacks_common_utils(self, *args: Any, **kwargs: Any) -> Any:
        """As LiteLLM 1.106 goes on, in a loop of its own and maybe in a thread of its own."""
        function = self._router.async_function_with_fallbacks_common_utils
        return await afollowed(self._route, function, *args, **kwargs)


# -- calls that nobody pays for ----------------------------------------------------------------------------------------


def nobodys(original: Method, name: str, *, what: str, quiet: bool) -> Method:
    """Calls that LiteLLM makes for itself. They cost tokens and belong to no customer: none is billed for them.

    Health checks are never refused, and told in a low voice: they run every few minutes. Mirrored traffic is told like
    everything else that costs money and is not metered.
    """

    def vluna_of() -> Vluna | None:
        vluna = metering()
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
