"""One run of a LiteLLM entry function: an attempt at a logical call, or a logical call of its own. Both colours.

LiteLLM's functions call each other: retries, fallbacks, bridges from one API to another. What runs inside is part of
the call around it, and is settled where the provider answered. But LiteLLM also makes calls of other kinds inside (an
embedding for its semantic cache), and hooks of the user may ask a model themselves. `Attempt` tells these apart:

* the same feature, or any after an attempt inside has failed: an attempt of the same call (retry, bridge, fallback);
* another feature or kind of work while the surrounding one is under way: a call of its own, for the same customer;
* an answer counts for whoever asked the provider: a function that translated what an inner one brought owes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel

from ..context import CallContext, current_context
from ..errors import ConfigurationError, VlunaError
from ..scoped import unset
from ..slot import Slot, family_of, inside, open_slot
from ._litellm_ask import ask_usage, is_refused, remember_refusal, upstream_of
from ._litellm_background import response_id_of
from ._litellm_call import LogicalCall, call_for, current_call, refusal, refused_inside
from ._litellm_key import in_proxy
from ._litellm_metadata import Trace, strip, take_identity
from ._litellm_models import as_deployed, positional_names
from ._litellm_parts import TOO_LONG, part
from ._litellm_stream import watch
from ._litellm_usage import costs_nothing, ending_of, model_call_of, pending, spent

if TYPE_CHECKING:
    from ..lifecycle import ModelCall, Operation
    from ..vluna import Vluna

_SELF_CALLS: Final = (
    "acompletion",
    "aembedding",
    "atext_completion",
    "aimg_generation",
    "atranscription",
    "aresponses",
    "is_async",
    "_is_async",
    "async_call",
)
"""Arguments by which LiteLLM's async functions call their sync twins: not another call."""


class Attempt:
    """What is known of one run of an entry function."""

    __slots__ = (
        "answered_inside",
        "args",
        "asked",
        "asks_provider",
        "bare",
        "behind",
        "brought",
        "call",
        "complete",
        "done",
        "entered",
        "failed_inside",
        "fallbacks",
        "function",
        "kind",
        "kwargs",
        "model_call",
        "outermost",
        "parent",
        "raw",
        "settled_elsewhere",
        "trace",
    )

    def __init__(self, function: Callable[..., Any], kind: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.function = function
        self.kind = kind
        self.args = args
        self.kwargs = kwargs
        self.parent: Attempt | None = None
        self.outermost = False
        self.asked = False
        self.bare: dict[str, Any] | None = None
        self.complete = False
        self.fallbacks: Mapping[Any, Any] | None = None
        self.done = False
        self.entered = False
        self.behind: object = None
        self.asks_provider = False
        self.answered_inside = False
        self.brought: Any = None
        self.settled_elsewhere = False
        self.failed_inside = False
        self.raw: Any = None
        self.trace = Trace(self)
        self.call: LogicalCall
        self.model_call = self._named(kwargs, args)

    def _named(self, kwargs: Mapping[str, Any], args: Sequence[Any]) -> ModelCall:
        said = as_deployed(kwargs) if in_proxy() else kwargs
        return model_call_of(self.kind, said, args, positional_names(self.function) if args else ())

    @property
    def vluna(self) -> Vluna:
        """Whose call it is."""
        return self.call.vluna

    def ask_usage(self) -> None:
        """Ask for the usage of a stream on the caller's behalf."""
        asked, self.asked = ask_usage(self.kwargs, self.model_call, self.call.unasked)
        if self.asked:
            self.call.asked_usage = True
            self.bare, self.kwargs = self.kwargs, asked

    def hands_to(self, function: object) -> bool:
        """Whether LiteLLM's public function (1.106) hands this call to the one behind it: true once in each run."""
        if self.entered or self.behind is None or self.behind is not function:
            return False
        self.entered = True
        return True

    # -- before ------------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Ask the gate, where that is needed.

        Raises:
            VlunaError: refused; the provider must not be called.
        """
        self.call.attempts += 1
        with self._shielded():
            self.call.admit(self.model_call)
        self._follow()

    async def aadmit(self) -> None:
        """`admit` for coroutines."""
        self.call.attempts += 1
        with self._shielded():
            await self.call.aadmit(self.model_call)
        self._follow()

    @contextmanager
    def _shielded(self) -> Iterator[None]:
        """A call of its own inside another takes nothing out of that one's slot."""
        with inside(Slot()) if self.outermost and self.parent is not None else nullcontext():
            yield

    def _follow(self) -> None:
        if self.call.operation is not None:
            self.trace.follow(self.call.operation)

    @contextmanager
    def running(self) -> Iterator[None]:
        """LiteLLM works on this attempt in the ``with``."""
        self.entered = False
        with self.call.running() if self.outermost or current_call() is not self.call else nullcontext():
            token = _current.set(self)
            try:
                yield
            finally:
                unset(_current, token)

    # -- after a failure ---------------------------------------------------------------------------------------------

    def again(self, error: BaseException) -> bool:
        """Whether the function is to be run once more, with other arguments: decided here, where the gate is asked."""
        try:
            if self.asked and self.bare is not None and is_refused(error):
                self.call.unasked.add(upstream_of(self.kwargs, self.model_call))
                self.kwargs, self.asked = self.bare, False
                return True
            if self.fallbacks is not None and isinstance(error, part(TOO_LONG)):
                model = self.fallbacks.get(self.kwargs.get("model", self.args[0] if self.args else None))
                if model is not None:
                    self.fallbacks = None
                    self.kwargs, self.args = _with_model(self.kwargs, self.args, model)
                    self.model_call = self._named(self.kwargs, self.args)
                    return True
        except Exception:
            self.vluna.internal_error("litellm.again")
        return False

    def failed(self, error: BaseException) -> BaseException:
        """It raised for good: the outermost call charges nothing. Returns what the caller is to see."""
        self.done = True
        try:
            if (answered := spent(self.raw, self.model_call)) is not None:
                self.call.answered(answered)  # LiteLLM could make nothing of it: what was reported was spent
            if self.parent is not None:
                self.parent.failed_inside = True
            if (below := refused_inside(error)) is not None:
                self.call.refused = refusal(below)
            if not self.outermost:
                return error if below is None else below
            self.call.failed(error)
            refused = self.call.refused
            # LiteLLM puts an exception of its own in the place of a refusal that an attempt inside met.
            if refused is not None and error is not refused and isinstance(error, Exception):
                return refused
        except Exception:
            self.vluna.internal_error("litellm.failed")
        return error

    # -- after an answer ---------------------------------------------------------------------------------------------

    def owes_anew(self, result: Any) -> bool:
        """Whether the provider gave this to this very function, while a call inside has used up the operation."""
        operation = self.call.operation
        return self.answered_inside and not self._handed_on(result) and operation is not None and operation.ended

    def _handed_on(self, result: Any) -> bool:
        """Whether a call inside has brought it: a bridge asks nobody itself, a retry asked in vain before."""
        return self.answered_inside and (not self.asks_provider or (result is not None and result is self.brought))

    def readmit(self) -> None:
        """The work is done: get an operation for it, whatever the gate says."""
        try:
            self.admit()
        except VlunaError as error:
            self._lost(error)

    async def areadmit(self) -> None:
        """`readmit` for coroutines."""
        try:
            await self.aadmit()
        except VlunaError as error:
            self._lost(error)

    def _lost(self, error: VlunaError) -> None:
        self.vluna.telemetry.emit(
            "vluna.endpoint.unmetered",
            "error",
            {"error.type": type(error).__name__},
            message=f"a model call inside another one was made and cannot be billed: {error}",
        )

    def answered(self, result: Any, *, is_async: bool) -> Any:
        """LiteLLM's function returned: settle a whole answer, watch a stream. Never raises."""
        self.done = True
        try:
            return self._answered(result, is_async)
        except Exception:
            self.vluna.internal_error("litellm.answered")
            return result
        finally:
            self.brought = None

    def _answered(self, result: Any, is_async: bool) -> Any:
        call = self.call
        if self.bare is not None and not self.asked:
            remember_refusal(self.kwargs, self.model_call)
        if self.parent is not None:
            self.parent.answered_inside = True
            if self.outermost:
                self.parent.settled_elsewhere = True
        stream = is_stream(result)
        translated = self._handed_on(result)
        if translated and not self.settled_elsewhere and not stream:
            pass  # settled inside, by the attempt that asked the provider
        elif not stream and costs_nothing(result, self.raw, self.kwargs):
            call.failed(None)
        elif translated and self.settled_elsewhere:
            call.failed(None)  # what was admitted for it is not needed: the work was billed as a call of its own
        elif stream:
            result = watch(result, call, self.model_call, asked_usage=self.asked, is_async=is_async)
        elif pending(result):
            if call.operation is not None and not call.slot.claimed:
                call.operation.park(response_id_of(result))
        else:
            call.answered(ending_of(result, self.model_call, self.raw))
        if call.operation is not None:
            self._follow()
            show(result, call.operation)
        if self.parent is not None:
            self.parent.brought = result
        return result

    @property
    def waits(self) -> Operation | None:
        """The operation whose receipt the caller waits for before getting the answer (``settle="inline"``)."""
        operation = self.call.operation
        if self.outermost and operation is not None and operation.ended and operation.settle_inline:
            return operation
        return None


_current: ContextVar[Attempt | None] = ContextVar("vluna_llm_litellm_attempt", default=None)


def current_attempt() -> Attempt | None:
    """The attempt under way around the running code."""
    attempt = _current.get()
    return None if attempt is None or attempt.done else attempt


def is_own_call(kwargs: Mapping[str, Any]) -> bool:
    """Whether an async function of LiteLLM calls its sync twin."""
    return any(kwargs.get(name) is True for name in _SELF_CALLS)


def open_attempt(
    vluna: Vluna, function: Callable[..., Any], kind: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Attempt | None:
    """The attempt that this run of an entry function is; None where it is none of ours.

    Raises:
        ConfigurationError: ``metadata["vluna"]`` is unusable.
    """
    around = current_attempt()
    call = call_for(kwargs)
    if call is not None and open_slot() not in (None, call.slot):
        around = call = None  # another layer that meters is between the two: what it has admitted is taken over
    given, bound, trace = _identity(vluna, kwargs)
    if around is None and call is None and trace is not None:
        # Handed on through a thread of LiteLLM's that knows nothing of the caller's context.
        if isinstance(trace.owner, Attempt) and not trace.owner.done:
            around, call = trace.owner, trace.owner.call
        elif isinstance(trace.owner, CallContext):
            bound = trace.owner if bound is None else trace.owner.override(bound)
    try:
        return _opened(vluna, Attempt(function, kind, args, given), bound, around, call)
    except VlunaError:
        raise
    except Exception:
        vluna.internal_error("litellm.open")
        return None


def _identity(vluna: Vluna, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], CallContext | None, Trace | None]:
    try:
        return take_identity(kwargs)
    except ConfigurationError as error:
        if vluna.mode == "enforce":
            raise refusal(error) from None
        vluna.telemetry.emit(
            "vluna.endpoint.unmetered",
            "error",
            {"error.type": "ConfigurationError"},
            message=f"{error} The call goes on for whoever pays for the surrounding work",
        )
        return strip(kwargs), None, None


def _opened(
    vluna: Vluna,
    attempt: Attempt,
    bound: CallContext | None,
    around: Attempt | None,
    call: LogicalCall | None,
) -> Attempt:
    if around is not None and call is around.call:
        attempt.parent = around
    if call is None or not _belongs(attempt, call, bound):
        attempt.outermost = True
        kind_of_call = LogicalCall if call is None else type(call)  # what nobody pays for stays so
        # Who pays is captured here: LiteLLM may go on in a thread that knows nothing of the caller's context.
        payer = bound if call is None or bound is not None else call.bound
        attempt.call = kind_of_call(vluna, current_context() if payer is None else current_context().override(payer))
    else:
        attempt.call = call
    return attempt


def _belongs(attempt: Attempt, call: LogicalCall, bound: CallContext | None) -> bool:
    """Whether it is an attempt of the call around it."""
    if call.family is not None and call.family != family_of(attempt.kind):
        return False
    if bound is not None and bound.principal_id not in (None, _payer(call)):
        return False  # it names another customer: work of its own
    around = attempt.parent
    if around is None or around.failed_inside:
        return True
    return call.operation is None or _feature(call, attempt) == _feature(call, around)


def _payer(call: LogicalCall) -> str | None:
    if call.operation is not None:
        return call.operation.customer[0]
    return None if call.bound is None else call.bound.principal_id


def _feature(call: LogicalCall, attempt: Attempt) -> str | None:
    try:
        return call.vluna.feature_of(attempt.model_call, call.bound)
    except VlunaError:
        return None


def _with_model(kwargs: dict[str, Any], args: Sequence[Any], model: Any) -> tuple[dict[str, Any], Sequence[Any]]:
    if "model" in kwargs or not args:
        return {**kwargs, "model": model}, args
    return kwargs, (model, *args[1:])


def is_stream(result: Any) -> bool:
    """Whether the answer is still to be read."""
    if isinstance(result, (dict, list, str, bytes, BaseModel)):
        return False
    return (
        hasattr(result, "__anext__") or hasattr(result, "__next__") or hasattr(result, "__aiter__")
    ) and not inspect.iscoroutine(result)


def show(result: Any, operation: Operation) -> None:
    """Name the operation on the answer, as LiteLLM does with its own facts: ``_hidden_params``."""
    hidden = getattr(result, "_hidden_params", None)
    if isinstance(hidden, dict):
        hidden["vluna_operation_id"] = operation.operation_id
