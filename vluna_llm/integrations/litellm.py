"""LiteLLM with every call authorized, metered and settled: one callback, in programs and in the proxy.

::

    import litellm
    from vluna_llm import call_context
    from vluna_llm.integrations.litellm import VlunaCallback

    litellm.callbacks = [VlunaCallback()]                  # settings from the environment
    with call_context(principal_id="customer_123"):
        litellm.completion(model="anthropic/claude-sonnet-5", messages=[...])

In a program the customer may also be named with the call, which wins: ``metadata={"vluna": {"principal_id": ...}}``.
In a proxy's ``config.yaml``: ``callbacks: vluna_llm.integrations.litellm.proxy_callback``.

Constructing the callback wraps LiteLLM's entry functions, since no hook of LiteLLM can refuse a synchronous call or
sees the end of a stream that is left. `uninstall` puts LiteLLM back as it was.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

try:
    import litellm  # noqa: F401
except ImportError as error:
    raise ImportError(
        "vluna_llm.integrations.litellm needs LiteLLM: pip install 'vluna-llm[litellm]'", name="litellm"
    ) from error

from ._default import given_or_default
from ._litellm_entry import install as _install
from ._litellm_entry import open_call as _open_call
from ._litellm_entry import uninstall as _uninstall
from ._litellm_hooks import LoggingHooks, watch_made
from ._litellm_identity import IdentityOption, make_identity
from ._litellm_key import forget_keys, see_keys
from ._litellm_made import forget_creations, see_creations
from ._litellm_parts import LOGGER, part, tell_missing
from ._litellm_proxy import ProxyHooks
from ._litellm_router import RouterHooks, install_router, uninstall_router

if TYPE_CHECKING:
    from ..vluna import Vluna

    proxy_callback: VlunaCallback

_CustomLogger: Any = part(LOGGER) or object  # LiteLLM's hooks are for its own class; the wrapped functions need none

__all__ = ["VlunaCallback", "install", "proxy_callback", "uninstall"]


class VlunaCallback(LoggingHooks, RouterHooks, ProxyHooks, _CustomLogger):  # type: ignore[misc]
    """Puts the gate round every call that LiteLLM makes. Put one into ``litellm.callbacks``; two meter once.

    Args:
        vluna: what meters; `Vluna.default()`, whose settings come from the environment, where not given. The latest
            callback's is the one that LiteLLM's functions use.
        install: wrap LiteLLM's entry functions and its Router. Without that only the asynchronous functions are
            covered, by hooks: sync calls run unmetered, which is told. Of LiteLLM only the constructor of its chat and
            text streams is wrapped, so that these are billed by what the provider reports.
        identity: how a caller of the proxy becomes a customer (see `vluna_llm.integrations._litellm_identity`).
        trust_client_identity: whether what the proxy's clients write may name the customer.

    Raises:
        ConfigurationError: the environment or an argument is wrong.
    """

    def __init__(
        self,
        vluna: Vluna | None = None,
        *,
        install: bool = True,
        identity: IdentityOption = None,
        trust_client_identity: bool | None = None,
    ) -> None:
        super().__init__()
        vluna = given_or_default(vluna)
        self.vluna = vluna
        self.identity = make_identity(identity, trust_client=trust_client_identity)
        self.hooks_only = not install
        see_keys(vluna, self.identity)
        if install:
            globals()["install"](vluna)
        else:
            with _guard:
                see_creations(watch_made)
                tell_missing()


def install(vluna: Vluna | None = None) -> None:
    """Wrap LiteLLM's entry functions and its Router, as constructing a `VlunaCallback` does; once is enough.

    Raises:
        ConfigurationError: no ``vluna`` is given, and the environment is incomplete or wrong.
    """
    vluna = given_or_default(vluna)
    with _guard:
        missing = _install(vluna)
        install_router(_open_call)
        see_creations(watch_made)
        tell_missing(missing)


def uninstall() -> None:
    """Put LiteLLM back as it was; calls under way are still settled. For tests, and for whoever switches it off."""
    with _guard:
        uninstall_router()
        _uninstall()
        forget_creations()
        forget_keys()


_guard = threading.RLock()


def __getattr__(name: str) -> Any:
    """``proxy_callback`` is made when a proxy asks for it: importing this module needs no settings."""
    if name != "proxy_callback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _guard:
        made = globals().get(name)
        if made is None:
            made = globals()[name] = VlunaCallback()
        return made
