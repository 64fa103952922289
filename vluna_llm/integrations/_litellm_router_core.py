"""The patches on the core that works behind `litellm.Router` from 1.110 on.

There the class that a user makes is a facade, and what is tried next is decided by a state machine that Python steps:
every answer of ours, and every error, stays in Python. So the same patches do, in other places. All public methods
come down to one driver per colour, whatever they are called and whenever they were taken from a Router; an attempt is
one method, called after the choice and before anything is counted; and one method judges every failure of an attempt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from ..errors import VlunaError
from ._litellm_parts import part
from ._litellm_route import Continuation, Refused, current_route
from ._litellm_router_late import afollowed, followed, nobodys
from ._litellm_router_steps import GENERIC_KINDS, METHODS, choice_of, entry_of, fixed_kind, race_of

Method = Callable[..., Any]

FACADE: Final = "litellm.router:_core_class"
"""Only a Router that is a facade has it."""


class Seam(NamedTuple):
    """A function of LiteLLM's that is patched.

    Attributes:
        owner: where it is (``module:class``, or a module).
        name: what it is called there.
        patch: makes ours of LiteLLM's.
        without: what does not hold where it is not found.
    """

    owner: str
    name: str
    patch: Callable[[Method, str], Method]
    without: str

    def found(self) -> Any:
        """The owner; None where this version has none."""
        return part(self.owner)


def driver_of(original: Method, name: str) -> Method:
    """What every public method comes down to: it makes the logical call, and lets a refusal out."""
    if inspect.iscoroutinefunction(original):

        async def adrive(self: Any, plan: Any, request: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            async def work(core: Any, /, **given: Any) -> Any:
                return await original(core, plan, given, *args, **kwargs)

            return await entry_of(work, name, kind=lambda _: _kind(plan))(self, **request)

        return adrive

    def drive(self: Any, plan: Any, request: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        def work(core: Any, /, **given: Any) -> Any:
            return original(core, plan, given, *args, **kwargs)

        return entry_of(work, name, kind=lambda _: _kind(plan))(self, **request)

    return drive


def _kind(plan: Any) -> str:
    endpoint = getattr(plan, "endpoint", "")
    function = str(getattr(plan, "host_op", "")).rpartition(".")[2]
    return METHODS.get(endpoint) or GENERIC_KINDS.get(function, "")


def _method_of(original: Method, name: str) -> Method:
    """The one method that has no driver: it chooses a deployment and calls LiteLLM, once."""
    kind = METHODS[name]
    return entry_of(original, name, kind=lambda kwargs: fixed_kind(kind, kwargs))


def attempted(original: Method, name: str) -> Method:
    """An attempt at the deployment that was chosen: ask the gate first for what it sells."""
    if inspect.iscoroutinefunction(original):

        async def aattempt(self: Any, step: Mapping[str, Any]) -> Any:
            route = current_route()
            if route is not None and route.is_async:
                await route.aadmit(route.plan(step.get("deployment"), _asked(self, step)))
            return await original(self, step)

        return aattempt

    def attempt(self: Any, step: Mapping[str, Any]) -> Any:
        route = current_route()
        if route is not None and not route.is_async:
            route.admit(route.plan(step.get("deployment"), _asked(self, step)))
        return original(self, step)

    return attempt


def _asked(driver: Any, step: Mapping[str, Any]) -> dict[str, Any]:
    return {"request_kwargs": {**(getattr(driver, "_request", None) or {}), **(step.get("params") or {})}}


def judged(original: Method, name: str) -> Method:
    """A refusal that an attempt has met is no failure of its deployment, and no reason for another attempt."""

    def judge(self: Any, *args: Any, **kwargs: Any) -> Any:
        error = next((value for value in (*args, *kwargs.values()) if isinstance(value, VlunaError)), None)
        if error is not None and current_route() is not None:
            raise Refused(error) from None
        return original(self, *args, **kwargs)

    return judge


# -- streams that a retry or a fallback continues ----------------------------------------------------------------------


def streamed(original: Method, name: str) -> Method:
    """What the stream of an attempt keeps for going on later: it belongs to the call that it began in."""

    def stream(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept, route = original(self, *args, **kwargs), current_route()
        if route is not None and route.call is not None:
            kept.request = Continuation(kept.request, route.again())
        return kept

    return stream


def continued(original: Method, name: str) -> Method:
    """Where that stream goes on."""
    if inspect.iscoroutinefunction(original):

        async def ago_on(self: Any, *args: Any, **kwargs: Any) -> Any:
            kept = self.request
            if not isinstance(kept, Continuation):
                return await original(self, *args, **kwargs)
            return await afollowed(kept.route, original, self, *args, **kwargs)

        return ago_on

    def go_on(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = self.request
        if not isinstance(kept, Continuation):
            return original(self, *args, **kwargs)
        return followed(kept.route, original, self, *args, **kwargs)

    return go_on


def _mirrored(original: Method, name: str) -> Method:
    return nobodys(original, name, what="litellm.router.silent_model", quiet=False)


_CORE: Final = "litellm.router_rust.core:RustCore"
_DRIVER: Final = "litellm.router_rust.core:_Driver"
_ENDPOINTS: Final = "litellm.router_rust.invoke.endpoints"
_STREAM: Final = "litellm.router_rust.invoke.streaming:StreamAttempt"

_A_CALL_EACH: Final = "what a Router tries is a call of its own each time"
_COUNTED: Final = "a denied call is counted against a deployment's own limits"
_AGAIN: Final = "a refusal that an attempt meets is tried again, and cools its deployment down"
_CONTINUED: Final = "a stream that a retry or a fallback continues is billed to who reads it"

SEAMS: Final = (
    Seam(_CORE, "_drive", driver_of, _A_CALL_EACH),
    Seam(_CORE, "_call_sync", driver_of, _A_CALL_EACH),
    Seam(_CORE, "text_completion", _method_of, "text_completion of a Router is LiteLLM's own call"),
    Seam(_CORE, "get_available_deployment", choice_of, "text_completion of a Router is asked for as its group"),
    Seam(_DRIVER, "attempt", attempted, _COUNTED),
    Seam(_DRIVER, "attempt_sync", attempted, _COUNTED),
    Seam(_DRIVER, "_failed", judged, _AGAIN),
    Seam(_DRIVER, "_stream_attempt", streamed, _CONTINUED),
    Seam(_STREAM, "fallback", continued, _CONTINUED),
    Seam(_STREAM, "fallback_sync", continued, _CONTINUED),
    Seam(_STREAM, "retry", continued, _CONTINUED),
    Seam(
        f"{_ENDPOINTS}:RustEndpoints",
        "abatch_completion_fastest_response",
        race_of,
        "a refusal of every call of a batch is told as LiteLLM's own error",
    ),
    Seam(_ENDPOINTS, "_run_silent", _mirrored, "mirrored traffic (silent_model) is billed to the customer"),
)
"""Everything that is patched there."""
