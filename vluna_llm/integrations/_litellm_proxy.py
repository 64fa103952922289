"""The hooks of the LiteLLM proxy: who pays, refusal before the provider is called, and the end of each request.

A request is one `LogicalCall`, made in the pre-call hook and handed on with LiteLLM's own logging object of the
request. Usage is told by the wrapped functions below (`_litellm_entry`), which find the call there; here only what they
cannot see: that the client has gone, and that the request as a whole is over.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any, Final

from ..context import CallContext
from ..ending import Ending
from ..errors import ConfigurationError, MissingPrincipal, VlunaError
from ..lifecycle import ModelCall
from ..tap import INLINE_SECONDS
from ._litellm_answer import dress, install_handler, log, refusal_in, refused
from ._litellm_call import LogicalCall, current_request, enter_request, give_back_when_forgotten, request_of
from ._litellm_functions import METERED, UNMETERED
from ._litellm_identity import Identity, strip_client_identity
from ._litellm_key import enter_payer
from ._litellm_models import as_deployed, model_call_of

if TYPE_CHECKING:
    from ..vluna import Vluna

OPERATION_HEADER: Final = "x-vluna-operation-id"
SETTLED_HEADER: Final = "x-vluna-settled-xusd"
LEAVE_SECONDS: Final = 5.0
"""How long a stream whose client has gone may take to be closed, in seconds; nobody waits for it."""

_PROXY_NAMES: Final = {"embeddings": "embedding", "audio_transcription": "transcription"}
"""Where the proxy has a name of its own for a function of LiteLLM's."""

_FREE: Final = (
    *("alist_", "aget_", "adelete_", "acancel_", "aretrieve_", "aupdate_", "afile_", "list_", "get_"),
    *("avector_store_list", "avector_store_retrieve", "avector_store_update", "avector_store_delete"),
    *("avector_store_file_list", "avector_store_file_retrieve", "avector_store_file_delete"),
    *("acreate_file", "acreate_container", "acreate_skill", "acreate_agent", "acreate_eval", "aupload_"),
    *("avideo_list", "avideo_status", "avideo_content", "avideo_get_", "moderation", "amoderation"),
    *("token_counter", "apply_guardrail", "call_mcp_tool", "list_mcp_tools"),
)
"""Routes that ask no model, by the beginning of the proxy's name for them."""


class ProxyHooks:
    """What `VlunaCallback` does inside the proxy. Mixed into it; also a class that inherits from it is seen.

    The proxy looks for its hooks in the very class of the callback, not in its bases: each subclass is given them.
    """

    vluna: Vluna
    identity: Identity

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in _HOOKS:
            if name not in vars(cls):
                setattr(cls, name, getattr(cls, name) if _is_overridden(cls, name) else getattr(ProxyHooks, name))

    # -- before ------------------------------------------------------------------------------------------------------

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any] | None:
        """Find out who pays and ask the gate.

        Raises:
            ProxyException: refused; LiteLLM answers 402, 403, 429, 400 or 503 in OpenAI's shape.
        """
        vluna = self.vluna
        try:
            if vluna.mode == "off":
                return None
            payer = await self._payer(user_api_key_dict, data)
            enter_payer(payer)
            await self._admit(vluna, payer, data, str(getattr(call_type, "value", call_type)))
        except VlunaError as error:
            if vluna.mode != "enforce":
                vluna.internal_error("litellm.proxy.identity")
                return None
            raise self._refusal(error, user_api_key_dict) from None
        except Exception:
            vluna.internal_error("litellm.proxy.pre_call")
        return None

    async def _payer(self, auth: Any, data: dict[str, Any]) -> CallContext:
        try:
            return await self.identity.of(auth, data)
        finally:
            strip_client_identity(data)

    async def _admit(self, vluna: Vluna, payer: CallContext, data: dict[str, Any], call_type: str) -> None:
        kind = METERED.get(_PROXY_NAMES.get(call_type, call_type))
        if kind is None:
            _unmetered(vluna, payer, call_type)
            return
        earlier = current_request()
        if earlier is not None and earlier.attempts == 0:
            earlier.failed(None)  # the proxy begins anew with another model, since another hook refused the first one
        call = LogicalCall(vluna, payer)
        _enter(call, data)
        if vluna.mode == "enforce" and payer.principal_id is None and vluna.settings.principal is None:
            raise MissingPrincipal
        planned = _planned(kind, data)
        if planned is not None:
            await call.aadmit(planned)

    def _refusal(self, error: VlunaError, auth: Any) -> Exception:
        try:
            install_handler()
            if current_request() is None:  # LiteLLM logs the refused request as if it were a call
                enter_request(LogicalCall(self.vluna, CallContext()), None)
            if isinstance(error, MissingPrincipal):
                named = {name: getattr(auth, name, None) for name in ("key_alias", "team_id", "user_id")}
                log.warning("a request of the proxy is refused: its key belongs to no customer (%s)", named)
            elif isinstance(error, ConfigurationError):
                log.warning("a request of the proxy is refused: %s", error)
        except Exception:
            self.vluna.internal_error("litellm.proxy.handler")
        return refused(error)

    # -- after -------------------------------------------------------------------------------------------------------

    async def async_post_call_failure_hook(
        self,
        request_data: dict[str, Any],
        original_exception: Exception,
        user_api_key_dict: Any,
        traceback_str: str | None = None,
    ) -> Any:
        """The request is over and has no answer: what was admitted for it is given back."""
        try:
            call = request_of(request_data)
            if call is not None:
                call.failed(original_exception)
            error = refusal_in(original_exception)
            if error is not None and hasattr(error, "gate_status"):
                install_handler()
                dress(error)
        except Exception:
            self.vluna.internal_error("litellm.proxy.failure")
        return None

    async def async_post_call_success_hook(self, data: dict[str, Any], user_api_key_dict: Any, response: Any) -> Any:
        """The request is over and has an answer."""
        self._answered(request_of(data))
        return None

    def _answered(self, call: LogicalCall | None) -> None:
        """Give back what was admitted for a request whose answer no provider was asked for (``mock_response``)."""
        try:
            if call is not None and call.attempts == 0 and call.watched is None:
                call.failed(None)
        except Exception:
            self.vluna.internal_error("litellm.proxy.answered")

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: Any, request_data: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """Hand a stream on as it is, and see that its client leaves it."""
        call = request_of(request_data)
        operation = call.operation if call is not None else None
        drains = operation is not None and operation.on_abort == "drain"
        try:
            async for item in _steadily(response) if drains else response:
                yield item
        except (GeneratorExit, asyncio.CancelledError):
            if call is not None:
                await self._left(call, response)
            raise
        self._answered(call)

    async def _left(self, call: LogicalCall, response: Any) -> None:
        """Nobody reads on: close the provider's answer, which settles it at once by ``on_abort``."""
        import anyio

        try:
            operation = call.operation
            if operation is None or operation.ended or call.slot.claimed:
                return
            with anyio.CancelScope(shield=True), anyio.move_on_after(LEAVE_SECONDS):
                source = call.source() if call.source is not None else None
                if source is not None:
                    await source.aclose()
                    return
                close = getattr(response, "aclose", None)
                if close is not None:
                    await close()
            if not operation.ended and operation.on_abort != "drain":
                operation.finish(Ending("closed"))
        except Exception:
            self.vluna.internal_error("litellm.proxy.left")

    async def async_post_call_response_headers_hook(
        self,
        data: dict[str, Any],
        user_api_key_dict: Any,
        response: Any,
        request_headers: dict[str, str] | None = None,
        **more: Any,
    ) -> dict[str, str] | None:
        """Name the operation, and what it cost where that is known already (``settle="inline"``)."""
        try:
            call = request_of(data)
            operation = call.operation if call is not None else None
            if operation is None:
                return None
            headers = {OPERATION_HEADER: operation.operation_id}
            if operation.settle_inline and operation.ended:
                receipt = await operation.wait_async(INLINE_SECONDS)
                if receipt is not None and receipt.charged_xusd is not None:
                    headers[SETTLED_HEADER] = str(receipt.charged_xusd)
            return headers
        except Exception:
            self.vluna.internal_error("litellm.proxy.headers")
            return None


_HOOKS = (
    "async_pre_call_hook",
    "async_post_call_success_hook",
    "async_post_call_failure_hook",
    "async_post_call_streaming_iterator_hook",
    "async_post_call_response_headers_hook",
)


def _is_overridden(cls: type, name: str) -> bool:
    """Whether a class between this one and ours has a hook of its own, which then is meant."""
    for base in cls.__mro__:
        if base is ProxyHooks:
            return False
        if name in vars(base) and issubclass(base, ProxyHooks):
            return True
    return False


async def _steadily(response: Any) -> AsyncGenerator[Any, None]:
    """Read so that a cancelled request never cancels a read: a stream that was cut in one could not be read on."""
    import anyio

    source = response.__aiter__()
    while True:
        step = asyncio.ensure_future(source.__anext__())
        try:
            item = await asyncio.shield(step)
        except StopAsyncIteration:
            return
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await asyncio.wait({step}, timeout=LEAVE_SECONDS)
            if not step.done():
                step.cancel()
            elif not step.cancelled():
                step.exception()  # nobody is left to see it
            raise
        yield item


def _unmetered(vluna: Vluna, payer: CallContext, call_type: str) -> None:
    """Tell of a route that costs money and is not metered, or refuse it; each is told once, by us or by LiteLLM's
    wrapped function below."""
    if call_type.startswith(_FREE):
        return
    if call_type in UNMETERED and vluna.settings.on_unmetered != "deny":
        return
    try:
        vluna.unmetered(f"litellm.{call_type}", payer)
    except ConfigurationError as error:
        error.unmetered = True  # type: ignore[attr-defined]
        raise


def _planned(kind: str, data: Mapping[str, Any]) -> ModelCall | None:
    """The call that the router will most probably make; None where only the attempt itself can tell."""
    model = data.get("model")
    if not isinstance(model, str) or not model or "," in model:
        return None
    router = getattr(sys.modules.get("litellm.proxy.proxy_server"), "llm_router", None)
    deployments = (router.get_model_list(model_name=model) if router is not None else None) or ()
    for deployment in deployments:
        params = deployment.get("litellm_params") or {}
        concrete = params.get("model")
        if not isinstance(concrete, str) or "*" in concrete:
            return None
        return model_call_of(kind, as_deployed({**data, **params, "model_info": deployment.get("model_info")}))
    return None


def _enter(call: LogicalCall, data: Mapping[str, Any]) -> None:
    """Make it the call of this request. An end that no hook is told of is left to the garbage collector, and charges
    nothing."""
    enter_request(call, data.get("litellm_logging_obj"))
    give_back_when_forgotten(call)
