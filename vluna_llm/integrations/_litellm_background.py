"""Responses that a provider works on in the background: parked when they are created, booked when a retrieve tells all.

LiteLLM gives them ids of its own, which name provider and deployment; here they go by the provider's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ..ending import Ending
from ..lifecycle import ModelCall, Operation
from ._litellm_usage import ending_of, model_call_of

if TYPE_CHECKING:
    from ..context import CallContext
    from ..vluna import Vluna

RETRIEVES: Final = ("get_responses", "aget_responses", "cancel_responses", "acancel_responses")
"""LiteLLM's functions whose answer may be a background response that has ended."""

_ENDED: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})


def is_background(call: ModelCall) -> bool:
    """Whether the provider is asked to work on after it has answered."""
    return call.kind == "responses" and call.body is not None and call.body.get("background") is True


def response_id_of(response: Any) -> str | None:
    """The provider's id of a response."""
    return _decoded(_member(response, "id"))[0]


def book_retrieved(vluna: Vluna, response: Any, bound: CallContext | None) -> None:
    """Book the usage of a background response that has ended, once, by its id. Never raises."""
    try:
        if _member(response, "background") is not True or _member(response, "status") not in _ENDED:
            return
        response_id, provider = _decoded(_member(response, "id"))
        given = {"model": _member(response, "model") or "", "custom_llm_provider": provider}
        call = model_call_of("responses", given)
        usage = ending_of(response, call).usage
        if response_id is not None and usage is not None:
            vluna.book_background(response_id, usage, call, bound)
    except Exception:
        vluna.internal_error("litellm.retrieve")


def park(vluna: Vluna, operation: Operation, call: ModelCall, bound: CallContext | None, ending: Ending) -> None:
    """The stream of a background response ended, in whatever way: leaving it does not end the work.

    Its usage is booked by its id, as a retrieve does, so that both together book it once. It is never estimated: what
    was seen of it is no measure of what the provider goes on to spend.
    """
    if ending.response_id is None or (ending.failed and ending.usage is None):
        operation.finish(ending if ending.failed or ending.usage is not None else given_up_on(ending))
        return
    operation.park(ending.response_id)
    if ending.usage is not None:
        vluna.book_background(ending.response_id, ending.usage, call, bound)


def given_up_on(ending: Ending) -> Ending:
    """The ending of a background response's stream that was forgotten: cancelled, whatever ``on_abort`` says."""
    return Ending(how="error", output_tokens=ending.output_tokens, response_id=ending.response_id, model=ending.model)


def _member(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def _decoded(response_id: object) -> tuple[str | None, str | None]:
    """The provider's id, and LiteLLM's word for the provider, where LiteLLM has put them into one of its own."""
    if not isinstance(response_id, str) or not response_id:
        return None, None
    try:
        from litellm.responses.utils import ResponsesAPIRequestUtils

        found = ResponsesAPIRequestUtils._decode_responses_api_response_id(response_id)
        provider = found.get("custom_llm_provider")
        return str(found.get("response_id") or response_id), provider if isinstance(provider, str) else None
    except Exception:
        return response_id, None
