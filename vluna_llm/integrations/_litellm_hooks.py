"""The logging hooks of LiteLLM: hints, never the truth. They leave our trace for other callbacks, and settle nothing.

Where LiteLLM is not wrapped (``install=False``) they are all there is: then the hook before an asynchronous call asks
the gate, and the events after it settle. LiteLLM's events about chat and text streams are no truth to settle by: its
count stands for a report, and a cut answer for a whole one. Those streams are watched from when they are made.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from ..context import CallContext, current_context
from ..ending import Ending
from ..errors import VlunaError
from ._litellm_ask import ask_usage, is_refused, remember_refusal
from ._litellm_attempt import current_attempt
from ._litellm_call import LogicalCall, current_call, current_request, give_back_when_forgotten, refusal
from ._litellm_functions import METERED
from ._litellm_key import enter_key, is_unasked
from ._litellm_metadata import Trace, leave_trace, take_identity, trace_in
from ._litellm_stream import let_go, watch
from ._litellm_usage import answer_shown, costs_nothing, ending_of, model_call_of, pending, tokens_in
from ._openai_usage_option import KINDS, is_asked

if TYPE_CHECKING:
    from ..lifecycle import ModelCall, Operation
    from ..types import Receipt
    from ..vluna import Vluna

RECEIPT_SECONDS: Final = 0.5
"""How long background logging waits for a receipt, so that other callbacks see the amount."""
_PAUSE_SECONDS: Final = 10.0
"""After a wait that was in vain the next ones are left out for so long: a gate that is away holds no log up."""


class LoggingHooks:
    """What `VlunaCallback` does as a logger. Mixed into it."""

    vluna: Vluna
    hooks_only: bool = False
    _patient_from: float = 0.0

    # -- before the provider is asked --------------------------------------------------------------------------------

    def log_pre_api_call(self, model: Any, messages: Any, kwargs: Any) -> None:
        """The provider is about to be asked: note by whom, and tell of a call that came past us."""
        try:
            if self.vluna.mode == "off" or not isinstance(kwargs, dict):
                return
            if self.hooks_only:
                let_go()
            attempt = current_attempt()
            if attempt is not None:
                attempt.asks_provider = True
                leave_trace(kwargs, attempt.trace)
            elif current_call() is None and current_request() is None and trace_in(kwargs) is None:
                self._escaped(kwargs)
        except Exception:
            self.vluna.internal_error("litellm.pre_call")

    def log_post_api_call(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """The provider's own body, where LiteLLM shows it."""
        try:
            attempt = current_attempt()
            if attempt is not None and isinstance(kwargs, dict):
                attempt.raw = answer_shown(kwargs.get("original_response"), attempt.raw)
        except Exception:
            self.vluna.internal_error("litellm.post_call")

    def _escaped(self, kwargs: Mapping[str, Any]) -> None:
        name = str(kwargs.get("call_type") or "completion")
        if METERED.get(name) is None:
            return
        how = "installed with install=False" if self.hooks_only else "called by a name bound before VlunaCallback()"
        try:
            self.vluna.unmetered(f"litellm.{name} ({how})")
        except VlunaError:  # it cannot be refused here any more, and is not to pass silently
            self.vluna.telemetry.emit(
                "vluna.endpoint.unmetered",
                "error",
                {"vluna.endpoint": f"litellm.{name}"},
                message=f"litellm.{name} ({how}) came past the gate and nobody is billed for it",
            )

    # -- what it cost, for other callbacks ---------------------------------------------------------------------------

    def logging_hook(self, kwargs: dict[str, Any], result: Any, call_type: str) -> tuple[dict[str, Any], Any]:
        """In LiteLLM's logging thread: say what the call cost, if the gate says so in time."""
        try:
            trace = trace_in(kwargs)
            if trace is not None and trace.operation is not None and not self._on_the_way(kwargs, trace.operation):
                receipt = trace.operation.wait(self._patience(blocking=True))
                self._show(kwargs, trace, receipt)
        except Exception:
            self.vluna.internal_error("litellm.logging_hook")
        return kwargs, result

    def _on_the_way(self, kwargs: Any, operation: Operation) -> bool:
        """Whether this is a chunk of a stream: LiteLLM logs each, and no receipt comes before the stream has ended."""
        return not self.hooks_only and kwargs.get("stream") is True and not operation.ended

    async def async_logging_hook(
        self, kwargs: dict[str, Any], result: Any, call_type: str
    ) -> tuple[dict[str, Any], Any]:
        """In LiteLLM's logging task: the same."""
        try:
            trace = trace_in(kwargs)
            if trace is not None and trace.operation is not None and not self._on_the_way(kwargs, trace.operation):
                receipt = await trace.operation.wait_async(self._patience(blocking=False))
                self._show(kwargs, trace, receipt)
        except Exception:
            self.vluna.internal_error("litellm.logging_hook")
        return kwargs, result

    def _patience(self, *, blocking: bool) -> float:
        if self.hooks_only or time.monotonic() < self._patient_from:
            return 0.0  # without wrappers it is the event after this one that settles
        if blocking:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                return RECEIPT_SECONDS
            return 0.0  # somebody logs on a loop's own thread: nothing waits there
        return RECEIPT_SECONDS

    def _show(self, kwargs: dict[str, Any], trace: Trace, receipt: Receipt | None) -> None:
        if receipt is None:
            if not self.hooks_only and time.monotonic() >= self._patient_from:
                self._patient_from = time.monotonic() + _PAUSE_SECONDS
        else:
            trace["state"] = receipt.state
            trace["amount_xusd"] = receipt.amount_xusd
            trace["charged_xusd"] = receipt.charged_xusd
        payload = kwargs.get("standard_logging_object")
        metadata = payload.get("metadata") if isinstance(payload, dict) else None
        if isinstance(metadata, dict):
            metadata["vluna"] = dict(trace)

    # -- without wrappers: hooks are all there is --------------------------------------------------------------------

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: Any) -> dict[str, Any] | None:
        """With ``install=False``: ask the gate, for asynchronous calls.

        Raises:
            VlunaError: refused; with ``status_code`` 400.
        """
        vluna = self.vluna
        if not self.hooks_only or vluna.mode == "off" or current_call() is not None:
            return None
        kind = METERED.get(str(getattr(call_type, "value", call_type)))
        if kind is None:
            return None
        try:
            if is_unasked():
                await enter_key()
            given, bound, trace = take_identity(kwargs)
        except VlunaError as error:
            if vluna.mode == "enforce":
                raise refusal(error) from None
            vluna.internal_error("litellm.identity")
            return None
        owner = trace.owner if trace is not None else None
        call = owner if isinstance(owner, LogicalCall) and owner.operation is not None else None
        if call is None or call.operation is None or call.operation.ended:
            call, trace = LogicalCall(vluna, current_context().override(bound or CallContext())), None
        model_call = model_call_of(kind, _named(given))
        await call.aadmit(model_call)
        if call.operation is None:
            return given
        if trace is None:
            trace = Trace(call)
            give_back_when_forgotten(call)
        trace.follow(call.operation)
        given = self._asking(given, model_call, call)
        bucket = "metadata" if kind not in ("responses", "anthropic.messages") else "litellm_metadata"
        metadata = given.get(bucket)
        given[bucket] = {**(metadata if isinstance(metadata, Mapping) else {}), "vluna": trace}
        return given

    def _asking(self, given: dict[str, Any], model_call: ModelCall, call: LogicalCall) -> dict[str, Any]:
        """Ask for the usage of a stream, where no upstream of the user's own is named: nobody can make a call again
        that is refused for it, and a call that fails by our doing is worse than an estimate. Refusals are remembered.
        """
        try:
            own = given.get("api_base") or given.get("base_url")
            asking, asked = (given, False) if own else ask_usage(_named(given), model_call)
            call.asked_usage = call.asked_usage or asked
            call.unreported = asked or (model_call.stream and model_call.kind in KINDS and not is_asked(given))
            return {**given, "extra_body": asking["extra_body"]} if asked else given
        except Exception:
            self.vluna.internal_error("litellm.ask")
            return given

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """With ``install=False``: settle what LiteLLM says was answered."""
        self._settle(kwargs, response_obj)

    async def async_log_failure_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """With ``install=False``: LiteLLM says that it failed."""
        try:
            call = self._hooked_call(kwargs)
            if call is None:
                return
            error = kwargs.get("exception")
            if call.asked_usage and isinstance(error, BaseException) and is_refused(error):
                remember_refusal({}, model_call_of(_kind_of(kwargs), kwargs))  # only such calls are asked
            call.failed(error)
        except Exception:
            self.vluna.internal_error("litellm.failure_event")

    def _settle(self, kwargs: Any, response: Any) -> None:
        try:
            call = self._hooked_call(kwargs)
            if call is None:
                return
            if kwargs.get("cache_hit") is True or costs_nothing(response):
                call.failed(None)
            elif pending(response) and call.operation is not None:
                call.operation.park(getattr(response, "id", None))
            else:
                ending = ending_of(response, model_call_of(_kind_of(kwargs), kwargs))
                call.answered(_without_count(ending, response) if call.unreported else ending)
        except Exception:
            self.vluna.internal_error("litellm.success_event")

    def _hooked_call(self, kwargs: Any) -> LogicalCall | None:
        if not self.hooks_only or not isinstance(kwargs, Mapping):
            return None
        trace = trace_in(kwargs)
        call = _call_in(trace)
        return None if call is None or (call.watched is not None and call.watched is call.operation) else call


def watch_made(stream: Any) -> None:
    """With ``install=False``: LiteLLM has made a stream. Where the hook before the call has admitted it, its own end
    settles it, whatever LiteLLM says of it afterwards. Never raises."""
    details = getattr(getattr(stream, "logging_obj", None), "model_call_details", None)
    if not isinstance(details, Mapping) or (call := _call_in(trace_in(details))) is None:
        return
    try:
        watch(stream, call, model_call_of(_kind_of(details), details), asked_usage=call.asked_usage, is_async=True)
    except Exception:
        call.vluna.internal_error("litellm.stream_made")


def _named(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the model, which may have been given by position: 1.106 tells it beside, 1.83 does not."""
    model = getattr(given.get("litellm_logging_obj"), "model", None)
    return given if "model" in given or not isinstance(model, str) else {**given, "model": model}


def _call_in(trace: Trace | None) -> LogicalCall | None:
    owner = trace.owner if trace is not None else None
    return owner if isinstance(owner, LogicalCall) else None


def _kind_of(details: Mapping[str, Any]) -> str:
    return METERED.get(str(details.get("call_type")), "chat.completions")


def _without_count(ending: Ending, response: Any) -> Ending:
    """The ending without the usage, which may be LiteLLM's own count and not the provider's report."""
    return replace(ending, usage=None, output_tokens=tokens_in(response))
