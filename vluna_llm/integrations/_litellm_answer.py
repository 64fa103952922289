"""How the LiteLLM proxy is made to answer our refusals: its exceptions, and its handler for them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import lru_cache
from typing import Any

from ..errors import VlunaError
from ._answer import Answer, answer_to
from ._litellm_parts import part

log = logging.getLogger("vluna_llm.litellm")

_PROXYS = "litellm.proxy._types:ProxyException"
_FASTAPIS = "litellm.proxy.common_request_processing:HTTPException"


def refused(error: VlunaError) -> Exception:
    """The exception by which a hook of the proxy refuses; LiteLLM makes the HTTP answer of it. Never raises.

    Where LiteLLM has its exceptions elsewhere, it is the refusal itself with the attributes that LiteLLM reads: the
    status is the same, and the body in LiteLLM's own shape.
    """
    try:
        return _refused_class()(error)
    except Exception:
        _tell_moved()
        dress(error)
        return error


@lru_cache(maxsize=1)
def _tell_moved() -> None:
    log.warning(
        "this version of LiteLLM has its ProxyException or HTTPException elsewhere: refusals of the proxy keep their "
        "status, and may lack the gate's code, hints and Retry-After",
        exc_info=True,
    )


@lru_cache(maxsize=1)
def _refused_class() -> type[Exception]:
    proxys: Any = part(_PROXYS)
    fastapis: Any = part(_FASTAPIS)

    class Refused(proxys, fastapis):  # type: ignore[misc]
        """LiteLLM 1.106 answers with what ``to_dict`` gives; 1.83 reads the attributes one by one.

        Also an `HTTPException`: by that LiteLLM knows a refusal of the proxy's own, which alerts nobody.
        """

        def __init__(self, error: VlunaError) -> None:
            self.answer = answer_to(error)
            told = self.answer.error()
            super().__init__(
                message=told["message"],
                type=told["type"],
                param=None,
                code=self.answer.status,
                headers=self.answer.headers(),
                provider_specific_fields=told["provider_specific_fields"],
            )
            self.status_code, self.detail = self.answer.status, self.answer.message
            self.error = error

        def to_dict(self) -> dict[str, Any]:
            return self.answer.error()

        def __str__(self) -> str:
            return self.answer.message

    return Refused


def refusal_in(error: BaseException | None) -> VlunaError | None:
    """The refusal of ours that this exception is or came from."""
    for found in _chain(error):
        if isinstance(found, VlunaError):
            return found
    return None


def dress(error: VlunaError) -> None:
    """Give a refusal the attributes of which LiteLLM makes its HTTP answer, now that nothing will route by them."""
    answer = answer_to(error)
    told: Any = error
    told.status_code, told.message, told.type, told.param = answer.status, answer.message, answer.kind, None
    told.headers = answer.headers()
    told.provider_specific_fields = answer.error()["provider_specific_fields"]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        found = waiting.pop(0)
        if found is None or id(found) in seen or len(seen) > 32:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__cause__, found.__context__, getattr(found, "original_exception", None)]


Handler = Callable[[Any, Any], Awaitable[Any]]


def install_handler() -> bool:
    """Let the proxy answer our refusals in one shape on every route.

    LiteLLM 1.83 makes a new exception of each and drops the gate's code, on some routes also the hints and
    ``Retry-After``. Its application keeps a handler for that exception; ours stands before it, speaks where a refusal
    of ours was the cause, and leaves everything else to the one that was there.
    """
    server = sys.modules.get("litellm.proxy.proxy_server")
    layer = getattr(getattr(server, "app", None), "middleware_stack", None)
    while layer is not None and not hasattr(layer, "_exception_handlers"):
        layer = getattr(layer, "app", None)
    if layer is None:
        return False
    known = part(_PROXYS)
    theirs = layer._exception_handlers.get(known)
    if theirs is None:
        return False
    if not getattr(theirs, "vluna", False):
        layer.add_exception_handler(known, _before(theirs))
    return True


def _before(theirs: Handler) -> Handler:
    async def handler(request: Any, exc: Any) -> Any:
        try:
            answer = _answer_behind(exc)
        except Exception:
            log.exception("the answer to a refused request is LiteLLM's own")
            answer = None
        if answer is None:
            return await theirs(request, exc)
        from starlette.responses import JSONResponse

        headers = {**(getattr(exc, "headers", None) or {}), **answer.headers()}
        return JSONResponse({"error": answer.error()}, status_code=answer.status, headers=headers)

    handler.vluna = True  # type: ignore[attr-defined]
    return handler


def _answer_behind(exc: BaseException) -> Answer | None:
    """The refusal that this exception tells; None where it tells of something else that came after one."""
    for found in _chain(exc):
        answer = getattr(found, "answer", None)
        if not isinstance(answer, Answer) and isinstance(found, VlunaError):
            answer = answer_to(found)
        if isinstance(answer, Answer):
            return answer if getattr(exc, "message", None) in (answer.message, str(found)) else None
    return None
