"""One call of a public method of LiteLLM's Router, and what carries it through the Router's own machinery."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import litellm

from ..context import CallContext, current_context
from ..errors import VlunaError
from ..lifecycle import ModelCall
from ..scoped import scoped, unset
from ._litellm_attempt import is_stream
from ._litellm_call import LogicalCall, call_for
from ._litellm_metadata import BUCKETS, strip
from ._litellm_usage import costs_nothing, ending_of, model_call_of

if TYPE_CHECKING:
    from ..vluna import Vluna

OpenCall = Callable[[Mapping[str, Any]], "LogicalCall | None"]
"""Makes the logical call of an outer entry from its keyword arguments; None where nothing is metered.

May raise `ConfigurationError`: what the arguments say about who pays is unusable.
"""

_MOCKS = ("mock_response", "mock_tool_calls", "mock_timeout")


class Refused(BaseException):
    """Carries a refusal through code that catches every `Exception`. Never leaves the patches in `_litellm_router`."""

    def __init__(self, error: VlunaError) -> None:
        super().__init__(str(error))
        self.error = error


class Unbilled(LogicalCall):
    """A call that belongs to no customer: LiteLLM's own health checks and mirrored traffic. It asks for nothing."""

    def _next(self, call: ModelCall) -> str | None:
        return None


class Route:
    """One call of a public method of the Router: retries, fallbacks and everything else that it tries.

    Attributes:
        call: the logical call; None where this kind of call is not metered.
        kind: the API, as in `ModelCall`; empty where it is not metered.
        is_async: whether its attempts may wait without blocking a loop.
        owned: it made the logical call, and tells its failure.
        planned: what was admitted last, before the attempt itself; None where nothing was yet.
        used: something was tried in it, or another method has taken the logical call over.
    """

    __slots__ = ("_attempts", "_within", "call", "is_async", "kind", "owned", "planned", "used")

    def __init__(self, call: LogicalCall | None, kind: str, *, is_async: bool, owned: bool = True) -> None:
        self.call = call
        self.kind = kind
        self.is_async = is_async
        self.owned = owned
        self.planned: ModelCall | None = None
        self.used = False
        self._within = 0
        self._attempts = 0 if call is None else call.attempts

    @property
    def over(self) -> bool:
        """Whether the method has returned: LiteLLM's background tasks go on in copies of its context."""
        return not self._within

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What runs in the ``with`` belongs to this call."""
        token = _route.set(self)
        self._within += 1
        call = self.call
        try:
            if call is None:
                yield
                return
            before, call.driver = call.driver, self
            try:
                with call.running():
                    yield
            finally:
                call.driver = before
        finally:
            self._within -= 1
            unset(_route, token)

    def again(self) -> Route:
        """The same call, taken up once more after its method has returned: a fallback continues a broken stream."""
        return Route(self.call, self.kind, is_async=self.is_async)

    def leave_stream(self) -> None:
        """A stream of this call broke, and something else is tried: what follows is another operation.

        LiteLLM may hold on to the broken stream for as long as the next one lives. Usage that it has seen counts, since
        usage outranks a failure.
        """
        call = self.call
        operation = None if call is None else call.operation
        if call is None or operation is None or call.watched is not operation:
            return
        if not operation.ended and not call.slot.claimed:
            operation.fail()
        call.slot.offer(None)

    # -- before an attempt -------------------------------------------------------------------------------------------

    def plan(self, deployment: Any, arguments: Mapping[str, Any]) -> ModelCall | None:
        """What will be asked of this deployment; None where that cannot be told yet.

        Args:
            deployment: an entry of the Router's ``model_list``.
            arguments: ``messages``, ``input`` and ``request_kwargs``, where they are known.
        """
        self.used = True
        if self.call is None or not self.kind or not isinstance(deployment, Mapping):
            return None
        try:
            given: dict[str, Any] = {name: arguments[name] for name in ("messages", "input") if arguments.get(name)}
            for part in (deployment.get("litellm_params"), arguments.get("request_kwargs")):
                if isinstance(part, Mapping):
                    given.update({name: value for name, value in part.items() if name != "model"})
            given["model"] = deployment["litellm_params"]["model"]
            given["model_info"] = deployment.get("model_info")
            if any(given.get(name) for name in _MOCKS) or not _names_a_model(given["model"]):
                return None
            self.planned = model_call_of(self.kind, given)
            return self.planned
        except Exception:
            self.call.vluna.internal_error("litellm.router.plan")
            return None

    def admit(self, planned: ModelCall | None) -> None:
        """Ask the gate for it, where that is needed.

        Raises:
            Refused: with the gate's own error.
        """
        if planned is None or self.call is None:
            return
        try:
            self.call.admit(planned)
        except VlunaError as error:
            raise Refused(error) from None

    async def aadmit(self, planned: ModelCall | None) -> None:
        """`admit` for coroutines."""
        if planned is None or self.call is None:
            return
        try:
            await self.call.aadmit(planned)
        except VlunaError as error:
            raise Refused(error) from None

    # -- at its end --------------------------------------------------------------------------------------------------

    def failed(self, error: BaseException) -> None:
        """The method has no answer."""
        if self.owned and self.call is not None:
            self.call.failed(error)

    def answered(self, result: Any) -> Any:
        """The method returned. What it cost was settled by the attempt that asked the provider, where one was seen.

        Where LiteLLM has called a function that is not wrapped, the answer itself is read.
        """
        call = self.call
        if call is None or self.planned is None or call.attempts != self._attempts:
            return result
        try:
            operation = call.operation
            if operation is None or operation.ended or call.slot.claimed or call.watched is operation:
                return result
            if is_stream(result):
                from ._litellm_stream import watch

                return watch(result, call, self.planned, asked_usage=False, is_async=self.is_async)
            if costs_nothing(result):
                call.failed(None)
            else:
                call.answered(ending_of(result, self.planned))
        except Exception:
            call.vluna.internal_error("litellm.router.answered")
        return result


def _names_a_model(name: str) -> bool:
    """A pattern names none, nor does the place where a prompt is kept (``langfuse/...``)."""
    kept_prompts = getattr(litellm, "_known_custom_logger_compatible_callbacks", ())
    return "*" not in name and name.partition("/")[0] not in (*kept_prompts, "litellm_agent")


_route: ContextVar[Route | None] = ContextVar("vluna_llm_litellm_route", default=None)


def current_route() -> Route | None:
    """The call of a Router's method around the running code."""
    route = _route.get()
    return None if route is None or route.over else route


def open_route(
    open_call: OpenCall, kind: str, kwargs: dict[str, Any], *, is_async: bool
) -> tuple[Route | None, dict[str, Any]]:
    """The route of a public method that was called just now, and the arguments for it without our metadata.

    None for what nobody pays for.

    Raises:
        ConfigurationError: ``metadata["vluna"]`` is unusable.
    """
    call, here = call_for(kwargs), current_route()
    if isinstance(call, Unbilled):
        return None, kwargs
    if not kind:
        return Route(None, "", is_async=is_async), kwargs
    if call is None:
        made = open_call(kwargs)
        if made is not None:
            # A stream may be continued when the caller has left the context: who pays is captured here.
            made.bound = current_context().override(made.bound or CallContext())
        return Route(made, kind, is_async=is_async), _without_ours(kwargs)
    if call.driver is None:
        return Route(call, kind, is_async=is_async, owned=False), kwargs
    if here is not None and here is call.driver and not here.used:
        here.used = True  # a method that hands over to another one (a queue for priorities): nothing was tried yet
        return Route(call, kind, is_async=is_async, owned=False), kwargs
    return Route(LogicalCall(call.vluna, call.bound), kind, is_async=is_async), kwargs


def _without_ours(kwargs: dict[str, Any]) -> dict[str, Any]:
    given = strip(kwargs)
    for bucket in BUCKETS:
        if given.get(bucket) is None and kwargs.get(bucket) is not None:
            del given[bucket]  # the Router adds to metadata that is there, and makes its own where none is
    return given


@contextmanager
def unbilled(vluna: Vluna) -> Iterator[None]:
    """What runs in the ``with`` is paid for by nobody, whoever is around it."""
    with scoped(_route, None), Unbilled(vluna).running():
        yield


class Continuation(dict[str, Any]):
    """Arguments that the Router keeps for going on later, with the call that they belong to. Copies are plain dicts."""

    def __init__(self, arguments: Mapping[str, Any], route: Route) -> None:
        super().__init__(arguments)
        self.route = route

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)
