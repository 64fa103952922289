"""Whose request of the LiteLLM proxy is served, on every route; and where what stands in a call is a client's word.

In a program ``metadata["vluna"]`` was written by the program. In a process that serves the proxy it may have come with
a request, on ways that no hook sees: a fallback that the body brings is laid over the arguments by the Router, the
events of a WebSocket and the body of ``/queue/...`` are handed down as they are. So it names nobody there.

Who pays is the key, which LiteLLM authenticates on every route, and which no client can write. It is noted as the
authentication gives it, in the context of the request, and becomes the payer where the pre-call hook was not asked.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from ..context import CallContext, current_context, enter_context
from ..errors import VlunaError
from ..telemetry import log
from ._litellm_call import leave_request, refusal

if TYPE_CHECKING:
    from ..vluna import Vluna
    from ._litellm_identity import Identity

_SERVER: Final = "litellm.proxy.proxy_server"
_STARTED: Final = ("llm_router", "user_model", "master_key", "general_settings", "prisma_client")
"""What is set in the proxy's module once a proxy has been set up, and is empty where it was only imported."""

_AUTH: Final = "litellm.proxy.auth.user_api_key_auth"
_BUILDERS: Final = ("user_api_key_auth_builder", "_user_api_key_auth_builder")
"""What makes the ``UserAPIKeyAuth`` of a request, whatever it came by; 1.83 has the second name alone."""


class _Key:
    """The key that a request was authenticated by, and who pays for it, as soon as somebody has asked."""

    __slots__ = ("auth", "payer")

    def __init__(self, auth: Any) -> None:
        self.auth = auth
        self.payer: CallContext | None = None


class _Proxy:
    """What is known of the proxy in this process."""

    __slots__ = ("identity", "served", "told", "vluna")

    def __init__(self) -> None:
        self.vluna: Vluna | None = None
        self.identity: Identity | None = None
        self.served = False
        self.told = False


_proxy: Final = _Proxy()
_key: ContextVar[_Key | None] = ContextVar("vluna_llm_litellm_key", default=None)
_watched: list[tuple[str, Callable[..., Any], Callable[..., Any]]] = []


# -- what a client writes ----------------------------------------------------------------------------------------------


def in_proxy() -> bool:
    """Whether this process serves LiteLLM's proxy, or is about to; not where its modules are only imported."""
    if _proxy.served:
        return True
    server = sys.modules.get(_SERVER)
    return server is not None and any(getattr(server, name, None) for name in _STARTED)


def is_believed() -> bool:
    """Whether ``metadata["vluna"]`` of a call counts: not in a proxy, unless the operator trusts the clients."""
    if not in_proxy() or (_proxy.identity is not None and _proxy.identity.trust_client):
        return True
    if not _proxy.told:
        _proxy.told = True
        log.warning(
            'metadata["vluna"] of a call names nobody in a process that serves LiteLLM\'s proxy, since a client may '
            "have written it: a program's own calls there name their customer by vluna_llm.call_context"
        )
    return False


# -- whose key it is ---------------------------------------------------------------------------------------------------


def see_keys(vluna: Vluna, identity: Identity) -> None:
    """Note the key of each request that the proxy authenticates from now on, if there is a proxy in this process.

    Args:
        vluna: what meters.
        identity: how a key becomes a customer.
    """
    _proxy.vluna, _proxy.identity = vluna, identity
    _watch()


def forget_keys() -> None:
    """Leave the authentication as it was."""
    _proxy.vluna = _proxy.identity = None
    _proxy.served = _proxy.told = False
    module = sys.modules.get(_AUTH)
    while _watched:
        name, before, ours = _watched.pop()
        if module is not None and vars(module).get(name) is ours:
            setattr(module, name, before)


def _watch() -> None:
    module = sys.modules.get(_AUTH)
    if module is None or _watched:
        return
    for name in _BUILDERS:
        before = vars(module).get(name)
        if callable(before):
            ours = _noting(before)
            setattr(module, name, ours)
            _watched.append((name, before, ours))
    if not _watched:
        log.warning(
            "this version of LiteLLM authenticates elsewhere than in %s: routes of the proxy without a pre-call hook "
            "are refused, since nobody knows whose key it is",
            _AUTH,
        )


def _noting(before: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(before)
    async def authenticate(*args: Any, **kwargs: Any) -> Any:
        if (earlier := _key.get()) is not None:
            # A pipelined request begins in the context of the one before it, which may be another customer's.
            _key.set(None)
            leave_request()
            if earlier.payer is not None:
                enter_context(CallContext())
        auth = await before(*args, **kwargs)
        _proxy.served = True
        _key.set(_Key(auth))
        return auth

    return authenticate


def enter_payer(payer: CallContext) -> None:
    """Whatever the request of the proxy around the running code asks of a model is for this customer."""
    _proxy.served = True
    if (key := _key.get()) is not None:
        key.payer = payer
    else:
        _watch()  # the proxy was imported after the callback was made
    enter_context(payer)


def is_unasked() -> bool:
    """Whether a request of the proxy is served of which nobody knows yet who pays: `enter_key` finds out."""
    return _key.get() is not None and current_context().principal_id is None


async def enter_key() -> None:
    """Find out who pays for the request, by its key: its route has asked no hook.

    Raises:
        ConfigurationError: the key or its team name a customer that could never be billed.
    """
    vluna, identity, key = _proxy.vluna, _proxy.identity, _key.get()
    if vluna is None or identity is None or key is None or vluna.mode == "off":
        return
    try:
        if key.payer is None:
            key.payer = await identity.of(key.auth, {})
        enter_context(current_context().override(key.payer))
    except VlunaError as error:
        if vluna.mode == "enforce":
            raise refusal(error) from None
        vluna.internal_error("litellm.proxy.identity")
    except Exception:
        vluna.internal_error("litellm.proxy.key")
