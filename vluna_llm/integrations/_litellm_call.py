"""One call as the user of LiteLLM sees it: retries, fallbacks and LiteLLM's own detours belong to it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ..context import CallContext, within
from ..ending import Ending
from ..errors import GateError, VlunaError
from ..lifecycle import ModelCall, Operation
from ..scoped import scoped
from ..slot import Slot, family_of, inside

if TYPE_CHECKING:
    from ..vluna import Vluna


class LogicalCall:
    """Holds the operation of the attempt under way, from LiteLLM's entry function to the end of the answer.

    `admit` is called before each attempt and asks the gate only where it has to: the first time, for another feature
    (a fallback to another model), and after an operation inside has ended. A refusal is remembered: LiteLLM may try
    again, and the gate is not asked again for the same feature.

    Attributes:
        refused: the refusal of the latest attempt, None where it was admitted: LiteLLM may have wrapped it.
        attempts: how many concrete calls LiteLLM has begun for this one.
        family: the kind of work, `family_of`: what belongs to another one is no attempt at this call.
        watched: the operation that the end of a stream settles, once there is one.
        asked_usage: usage was asked for on the caller's behalf by an attempt at this call.
        unasked: upstreams that refused to be asked for usage in this call.
        source: the response below the stream that is watched, as long as somebody reads it.
        unreported: usage that LiteLLM tells of its stream may be its own count: only who watches the stream knows.
        driver: the method of a Router that works on it: another one at the same time is a call of its own.
    """

    def __init__(self, vluna: Vluna, bound: CallContext | None = None) -> None:
        self.vluna = vluna
        self.bound = bound
        self.slot = Slot(refusal)
        self.attempts = 0
        self.family: str | None = None
        self.watched: Operation | None = None
        self.asked_usage = False
        self.unasked: set[str] = set()
        self.unreported = False
        self.source: weakref.ref[Any] | None = None
        self.driver: object | None = None
        self.refused: VlunaError | None = None
        self._within = 0
        self._left = False
        self._feature: str | None = None
        self._refusal: tuple[str, VlunaError] | None = None

    @property
    def over(self) -> bool:
        """Whether LiteLLM's entry function has returned: background work that still sees this call is its own."""
        return self._left and not self._within

    @property
    def operation(self) -> Operation | None:
        """The operation of this attempt; None before the first one, and where the call is not metered."""
        return self.slot.operation

    # -- before an attempt -------------------------------------------------------------------------------------------

    def admit(self, call: ModelCall) -> None:
        """Ask the gate for this attempt, where that is needed.

        Raises:
            VlunaError: refused; with ``status_code`` and ``gate_status`` (`refusal`).
        """
        feature = self._next(call)
        if feature is None:
            return
        try:
            self._admitted(feature, self.vluna.begin(call, self.bound), call.kind)
        except VlunaError as error:
            raise self._refused(feature, error) from error.__cause__
        except Exception:
            self.vluna.internal_error("litellm.begin")

    async def aadmit(self, call: ModelCall) -> None:
        """`admit` for coroutines."""
        feature = self._next(call)
        if feature is None:
            return
        try:
            self._admitted(feature, await self.vluna.abegin(call, self.bound), call.kind)
        except VlunaError as error:
            raise self._refused(feature, error) from error.__cause__
        except Exception:
            self.vluna.internal_error("litellm.begin")

    def _next(self, call: ModelCall) -> str | None:
        """The feature to be asked for; None where the operation that is there serves this attempt, too."""
        if self.vluna.mode == "off":
            return None
        self.family = family_of(call.kind)
        try:
            feature = self.vluna.feature_of(call, self.bound)
        except VlunaError as error:
            if self.vluna.mode == "enforce":
                self.refused = refusal(error)
                raise self.refused from None
            feature = ""  # observed: `begin` tells why nobody is billed, and refuses nothing
        operation = self.operation
        if self._refusal is not None and self._refusal[0] == feature and self.vluna.mode == "enforce":
            self.refused = self._refusal[1]
            raise self.refused
        self.refused = None
        if operation is not None and not operation.ended:
            if feature == self._feature and not self.slot.passed_on:
                return None
            self._give_up()
        return feature

    def _admitted(self, feature: str, operation: Operation | None, kind: str) -> None:
        self._feature = feature
        self.slot.offer(operation, kind)

    def _refused(self, feature: str, error: VlunaError) -> VlunaError:
        self.refused = refusal(error)
        self._refusal = (feature, self.refused)
        return self.refused

    def _give_up(self) -> None:
        if (share := self.slot.share) is not None:
            share.fail()
        self.slot.offer(None)

    # -- after it ----------------------------------------------------------------------------------------------------

    def answered(self, ending: Ending) -> None:
        """An attempt was answered; what that costs is settled, unless a metered client inside does so."""
        if (share := self.slot.share) is not None:
            share.finish(ending)

    def failed(self, error: BaseException | None) -> None:
        """The call as a whole failed, whatever was tried: nothing is charged."""
        share = self.slot.share
        if share is not None and not share.operation.ended:
            share.fail(error)

    @contextmanager
    def running(self) -> Iterator[LogicalCall]:
        """Everything that LiteLLM does in the ``with`` belongs to this call, and bills its customer."""
        self._within += 1
        try:
            with scoped(_current, self), inside(self.slot), nullcontext() if self.bound is None else within(self.bound):
                yield self
        finally:
            self._within -= 1
            self._left = True


_current: ContextVar[LogicalCall | None] = ContextVar("vluna_llm_litellm_call", default=None)
_request: ContextVar[LogicalCall | None] = ContextVar("vluna_llm_litellm_request", default=None)
_ATTRIBUTE = "vluna_call"


def current_call() -> LogicalCall | None:
    """The logical call around the running code; None where it is over (LiteLLM logs in copies of its context)."""
    call = _current.get()
    return None if call is None or call.over else call


def current_request() -> LogicalCall | None:
    """The logical call of the proxy's request around the running code, also where it is over."""
    return _request.get()


def call_for(kwargs: Mapping[str, Any]) -> LogicalCall | None:
    """The logical call that a call of LiteLLM's with these arguments is an attempt at; None where it is one of its own.

    The call of a proxy's request travels with the request's logging object: what else the request asks of a model (a
    guardrail's judge, at the same time) is no attempt at it.
    """
    call = current_call()
    if call is None:
        found = getattr(kwargs.get("litellm_logging_obj"), _ATTRIBUTE, None)
        call = found if isinstance(found, LogicalCall) and not found.over else None
    return call


def enter_call(call: LogicalCall) -> None:
    """Make it the logical call of this task, for as long as the task lives: a proxy's hooks have no ``with``."""
    _current.set(call)


def enter_request(call: LogicalCall, logging_obj: Any) -> None:
    """Make it the logical call of a proxy's request.

    Args:
        call: made for the request.
        logging_obj: LiteLLM's logging object of the request; where it has none yet, whatever its task does first is it.
    """
    _request.set(call)
    if logging_obj is None:
        enter_call(call)
    else:
        setattr(logging_obj, _ATTRIBUTE, call)


def leave_request() -> None:
    """Whatever this task does from now on belongs to no call: another request begins in it."""
    _current.set(None)
    _request.set(None)


def request_of(data: Mapping[str, Any]) -> LogicalCall | None:
    """The logical call of the request that a proxy's hook is given."""
    call = getattr(data.get("litellm_logging_obj"), _ATTRIBUTE, None)
    return call if isinstance(call, LogicalCall) else _request.get()


def give_back_unasked(call: LogicalCall | None) -> None:
    """LiteLLM makes the answer to this call up: what was admitted for an attempt before it is not needed."""
    operation = call.operation if call is not None else None
    if call is not None and operation is not None and call.watched is not operation:
        call.failed(None)


def give_back_when_forgotten(call: LogicalCall) -> None:
    """An end of this call that no hook is told of is left to the garbage collector, and charges nothing."""
    weakref.finalize(call, _forgotten, call.slot).atexit = False


def _forgotten(slot: Slot) -> None:
    operation = slot.operation
    if operation is not None and not operation.ended and not slot.claimed:
        operation.abandon(lambda: Ending("error"))


def refusal(error: VlunaError) -> VlunaError:
    """The error with ``status_code`` 400, by which LiteLLM neither retries it nor cools a deployment down.

    ``gate_status`` is what the gate said. LiteLLM counts 401, 402, 404, 408 and 429 of a deployment against it, and
    then refuses other customers.
    """
    error.status_code = 400  # type: ignore[attr-defined]
    error.gate_status = error.status if isinstance(error, GateError) else None  # type: ignore[attr-defined]
    return error


def refused_inside(error: BaseException) -> VlunaError | None:
    """The refusal that a metered client below LiteLLM met: LiteLLM alone has put exceptions around it, if anybody."""
    found: BaseException | None = error
    for _ in range(8):
        if found is None or isinstance(found, VlunaError):
            return found
        if not any(kind.__module__.partition(".")[0] == "litellm" for kind in type(found).__mro__):
            return None
        found = found.__cause__ or found.__context__
    return None


def told_for(error: BaseException) -> BaseException:
    """What the caller is to see in this error's place: the refusal inside it, or the error itself."""
    refused = refused_inside(error)
    return error if refused is None or refused is error else refusal(refused)
