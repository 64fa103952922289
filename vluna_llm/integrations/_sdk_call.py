"""One logical call of an SDK's client between its request and its answer; for both colours and any SDK, without I/O.

What is told here holds for every SDK that has the two methods ``request`` and ``_process_response``; what an API has of
its own is in a subclass of `Call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeVar

from ..ending import Ending
from ..errors import VlunaError
from ..scoped import scoped
from ..slot import mark_refused
from ..tap import Sink, tap

if TYPE_CHECKING:
    from ..context import CallContext
    from ..lifecycle import ModelCall, Operation
    from ..slot import Share
    from ..usage import BodyFacts, StreamReader
    from ..vluna import Vluna
    from ._openai_endpoints import Endpoint

RAW_RESPONSE_HEADER: Final = "X-Stainless-Raw-Response"


class Call:
    """What is known of a call under way. ``operation`` is None until it was admitted."""

    __slots__ = ("answered", "bound", "model_call", "operation", "pending", "url", "vluna")

    sdk: ClassVar[str]
    """The name of the SDK where an error of ours is told."""

    def __init__(self, vluna: Vluna, bound: CallContext | None, model_call: ModelCall, url: str) -> None:
        self.vluna = vluna
        self.bound = bound
        self.model_call = model_call
        self.url = url
        self.operation: Operation | Share | None = None
        self.pending: Any = None  # an authorize under way (authorize="overlap")
        self.answered: Literal["no", "whole", "open"] = "no"

    # -- admission ---------------------------------------------------------------------------------------------------

    @property
    def is_gated(self) -> bool:
        """Whether the gate is asked before this call."""
        return True

    def begin(self) -> Operation | None:
        """Ask the gate; None where the call is not metered. Only refusals are raised."""
        try:
            return self.vluna.begin(self.model_call, self.bound)
        except VlunaError as error:
            mark_refused(error)
            raise
        except Exception:
            self.vluna.internal_error(f"{self.sdk}.begin")
            return None

    async def abegin(self) -> Operation | None:
        """`begin` for coroutines."""
        try:
            return await self.vluna.abegin(self.model_call, self.bound)
        except VlunaError as error:
            mark_refused(error)
            raise
        except Exception:
            self.vluna.internal_error(f"{self.sdk}.begin")
            return None

    # -- the request -------------------------------------------------------------------------------------------------

    def asking(self, options: Any) -> Any:
        """The options as they are to be sent; the same object where nothing is to be asked for."""
        return options

    def refused_option(self, error: BaseException) -> bool:
        """Whether the call failed because of what `asking` added; from now on it adds nothing."""
        return False

    def remember_refusal(self) -> None:
        """The call went through without what `asking` adds."""

    def failed(self, error: BaseException | None) -> None:
        """No answer came. After an answer that changes nothing: what was spent was spent (design rule 4)."""
        if self.answered == "no" and self.operation is not None:
            self.operation.fail(error)

    # -- the answer --------------------------------------------------------------------------------------------------

    def answer(self, response: Any, *, is_async: bool) -> None:
        """The final 2xx: read the usage of a whole body, or watch an open one. Never raises."""
        if self.answered != "no":
            return
        try:
            if response.is_closed:
                self.answered = "whole"
                self._whole(response)
            else:
                self.answered = "open"
                self._watch(response, is_async)
        except Exception:
            self.vluna.internal_error(f"{self.sdk}.answer")
            if self.operation is not None:
                self.operation.fail()

    @property
    def waits(self) -> bool:
        """Whether the caller waits for the receipt before getting the answer."""
        return self.answered == "whole" and self.operation is not None and self.operation.settle_inline

    def _watch(self, response: Any, is_async: bool) -> None:
        sink = self._sink()
        if sink is not None:
            tap(
                response,
                sink,
                url=self.url,
                hide_usage_chunk=self._hides_usage(),
                report=self.vluna.internal_error,
                is_async=is_async,
                reader=self._reader(response),
            )

    def _sink(self) -> Sink | None:
        """Who is told how an open answer ended; None where nobody is."""
        return self.operation

    def _hides_usage(self) -> bool:
        return False

    def _reader(self, response: Any) -> StreamReader | None:
        """What reads an open answer; None for the ordinary reader."""
        return None

    def _whole(self, response: Any) -> None:
        raise NotImplementedError


def ending_of(facts: BodyFacts, *, whole: bool) -> Ending:
    """How a body ended that was read at once; ``whole``: it is all of an answer."""
    return Ending(
        how="complete" if whole else "error",
        usage=facts.usage,
        finished=whole,
        finish_reason_seen=facts.finish_reason_seen,
        failed=facts.failed or not whole,
        response_id=facts.response_id,
        model=facts.model,
    )


in_flight: ContextVar[Call | None] = ContextVar("vluna_llm_sdk_call", default=None)
"""Ties the two methods of a client together; set by ``request`` and reset before it returns."""


@contextmanager
def flying(call: Call) -> Iterator[None]:
    """Let what is sent inside belong to this call: a transport below does not meter it again."""
    with scoped(in_flight, call):
        yield


C = TypeVar("C", bound=Call)


def prepare_call(vluna: Vluna, bound: CallContext | None, sdk: str, find: Callable[[], C | Endpoint]) -> C | None:
    """What has to be done about a request; None where nothing has.

    Args:
        vluna: by whom it is metered.
        bound: whom the client is bound to.
        sdk: the name of the SDK.
        find: gives the call, or what the request is where it is not metered.

    Raises:
        ConfigurationError: the endpoint costs money, is not metered, and the setting ``on_unmetered`` is ``deny``.
    """
    try:
        if vluna.mode == "off":
            return None
        found = find()
        if isinstance(found, Call):
            return found
        if found.role == "free":
            return None
    except Exception:
        vluna.internal_error(f"{sdk}.prepare")
        return None
    try:
        vluna.unmetered(f"{sdk}.{found.kind}", bound)
    except VlunaError:
        raise
    except Exception:
        vluna.internal_error(f"{sdk}.unmetered")
    return None


def raw_mode(options: Any) -> str | None:
    """How the caller wants to have the response itself: ``true`` or ``raw``, ``stream``; None for the parsed answer."""
    headers = options.headers
    if not isinstance(headers, Mapping):
        return None
    value = headers.get(RAW_RESPONSE_HEADER)
    return value if isinstance(value, str) else None
