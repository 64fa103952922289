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

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import litellm

from ..telemetry import log
from ._litellm_models import model_of
from ._litellm_parts import ROUTER, part
from ._litellm_route import OpenCall, current_route
from ._litellm_router_core import FACADE, SEAMS
from ._litellm_router_late import CONTINUE, CONTINUED, MIRRORED, carrying, continuing, keeping, nobodys
from ._litellm_router_steps import (
    GENERIC,
    METHODS,
    as_wrapped,
    attempt_of,
    chain_of,
    choice_of,
    entry_of,
    fixed_kind,
    generic_kind,
    installed,
    race_of,
)

_NEEDED = frozenset({"completion", "acompletion", "make_call", "async_function_with_fallbacks"})
"""Without these a call on a Router is not one operation."""

Patch = Callable[[Callable[..., Any], str], Callable[..., Any]]


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
    installed.open_call = open_call
    if _patched:
        return
    _patch(litellm, "ahealth_check", functools.partial(nobodys, what="litellm.ahealth_check", quiet=True))
    if part(FACADE) is None:
        router = part(ROUTER)
        _install_on(getattr(router, "_core_class", router))  # in 1.109 the class that is made has the working one
        return
    missing = [seam for seam in SEAMS if not _patch(seam.found(), seam.name, seam.patch)]
    if missing:
        log.warning(
            "this version of LiteLLM has another Router than we know: %s",
            "; ".join(f"no {seam.owner.replace(':', '.')}.{seam.name}: {seam.without}" for seam in missing),
        )


def _install_on(router: Any) -> None:
    for name, kind in METHODS.items():
        _patch(router, name, functools.partial(entry_of, kind=functools.partial(fixed_kind, kind)))
    for name in GENERIC:
        _patch(router, name, functools.partial(entry_of, kind=generic_kind, prepared=as_wrapped))
    for name in ("async_function_with_fallbacks", "function_with_fallbacks"):
        _patch(router, name, chain_of)
    _patch(router, "make_call", attempt_of)
    for name in ("async_get_available_deployment", "get_available_deployment"):
        _patch(router, name, choice_of)
    _patch(router, "abatch_completion_fastest_response", race_of)
    for name in CONTINUED:
        _patch(router, name, keeping)
    _patch(router, "_completion_streaming_iterator", carrying)
    for name in CONTINUE:
        _patch(router, name, continuing)
    for name in MIRRORED:
        _patch(router, name, functools.partial(nobodys, what="litellm.router.silent_model", quiet=False))
    if router is not None and (missing := _NEEDED - {name for _, name in _patched}):
        log.warning(
            "this version of LiteLLM has another Router than we know (%s): its retries and fallbacks are calls of "
            "their own, and a refusal may be tried again",
            ", ".join(sorted(missing)),
        )


def uninstall_router() -> None:
    """Take the patches off. One that somebody else has wrapped meanwhile stays where it is, and does nothing."""
    installed.open_call = None
    for (owner, name), (before, ours) in _patched.items():
        if vars(owner).get(name) is ours:
            setattr(owner, name, before)
    _patched.clear()


_patched: dict[tuple[Any, str], tuple[Any, Any]] = {}


def _patch(owner: Any, name: str, patch: Patch) -> bool:
    """Whether there was something to patch."""
    if isinstance(owner, type):
        owner = next((home for home in owner.__mro__ if name in vars(home)), owner)
    before = None if owner is None else vars(owner).get(name)
    if not inspect.isfunction(before):
        return False  # this version of LiteLLM has no such method
    ours = functools.wraps(before)(patch(before, name))
    setattr(owner, name, ours)
    _patched[owner, name] = (before, ours)
    return True


def _alike(deployments: Any) -> bool:
    """Whether it does not matter to the bill which of these is chosen."""
    if not isinstance(deployments, list) or not deployments:
        return False
    try:
        first, *others = [_sold(deployment) for deployment in deployments]
    except Exception:
        return False
    return all(sold == first for sold in others)


def _sold(deployment: Mapping[str, Any]) -> tuple[str, str]:
    return model_of({**deployment["litellm_params"], "model_info": deployment.get("model_info")})
