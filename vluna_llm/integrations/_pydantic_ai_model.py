"""The wrapper model: every request that it sends on to a provider is one operation."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.models.wrapper import WrapperModel

from ..context import CallContext
from ..errors import VlunaError
from ..lifecycle import ModelCall
from ..scoped import scoped
from ._default import given_or_default
from ._pydantic_ai_call import Call, Refusals, begin, book_background, fallback, watch
from ._pydantic_ai_words import model_call_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..vluna import Vluna


class VlunaModel(WrapperModel):  # type: ignore[misc]
    """A model of Pydantic AI whose requests are authorized before they are sent, and settled by what they used.

    A `FallbackModel` may be wrapped as a whole, or its members: each model that is tried is an operation of its own.
    Wrapped as a whole, a refusal of the gate ends the request whatever its ``fallback_on`` says; otherwise Pydantic
    AI's rule holds: the default lets a refusal through, ``fallback_on=(Exception,)`` tries the next member, for which
    the gate is asked anew. A client inside that is metered itself takes the operation over: it is settled once.

    Args:
        wrapped: the model, or its name.
        vluna: what meters; `Vluna.default()`, whose settings come from the environment, where not given.
        bound: who pays, in place of the surrounding `call_context`.
        refusals: the request that this is part of, for layers above that try several models.

    Raises:
        ConfigurationError: no ``vluna`` is given, and the environment is incomplete or wrong.
    """

    def __init__(
        self,
        wrapped: Any,
        vluna: Vluna | None = None,
        *,
        bound: CallContext | None = None,
        refusals: Refusals | None = None,
    ) -> None:
        super().__init__(wrapped)
        vluna = given_or_default(vluna)
        self.vluna = vluna
        self._bound = bound
        self._refusals = refusals
        self._route = routed(self.wrapped, lambda model: VlunaModel(model, self.vluna, bound=bound, refusals=refusals))

    async def request(self, messages: Any, model_settings: Any, model_request_parameters: Any) -> Any:
        """One operation, but for polls of a background response.

        Raises:
            VlunaError: the gate refused, or nobody pays; the provider was not called.
        """
        asked = (messages, model_settings, model_request_parameters)
        if self._route is not None:
            with self._one_request():
                return await self._route.request(*asked)
        if self._is_free:
            return await super().request(*asked)

        def make() -> ModelCall:
            return model_call_of(self.wrapped, *asked, stream=False)

        if self._polls(messages):
            response = await super().request(*asked)
            if not self._waits(response):
                book_background(self.vluna, response, make, self._bound)
            return response
        call = await begin(self.vluna, make, self._bound, self._refusals)
        return await self._answered(call, lambda: super(VlunaModel, self).request(*asked))

    @asynccontextmanager
    async def request_stream(
        self, messages: Any, model_settings: Any, model_request_parameters: Any, run_context: Any = None
    ) -> AsyncIterator[Any]:
        """One operation, settled when the stream is left, at its end or before.

        Raises:
            VlunaError: the gate refused, or nobody pays; the provider was not called.
        """
        asked = (messages, model_settings, model_request_parameters)
        async with AsyncExitStack() as stack:
            if self._route is not None:
                with self._one_request():
                    stream = await stack.enter_async_context(self._route.request_stream(*asked, run_context))
                yield stream
                return
            opening = super().request_stream(*asked, run_context)
            if self._is_free:
                yield await stack.enter_async_context(opening)
                return

            def make() -> ModelCall:
                return model_call_of(self.wrapped, *asked, stream=True)

            if self._polls(messages):
                stream = await stack.enter_async_context(opening)
                try:
                    yield stream
                finally:
                    if not self._waits(response := stream.get()):
                        book_background(self.vluna, response, make, self._bound)
                return
            call = await begin(self.vluna, make, self._bound, self._refusals)
            try:
                with call.running():
                    stream = await stack.enter_async_context(opening)
            except BaseException as error:
                call.failed(error)
                raise
            watched = watch(call, stream, self._waits)
            try:
                yield stream
            except BaseException as error:
                if watched is not None:
                    await watched.left(error)
                raise
            if watched is not None:
                await watched.left(None)

    async def compact_messages(self, request_context: Any, *, instructions: str | None = None) -> Any:
        """One operation: the provider is paid for a summary as for an answer."""
        if self._route is not None or self._is_free:
            return await (self._route or self.wrapped).compact_messages(request_context, instructions=instructions)
        asked = (request_context.messages, request_context.model_settings, request_context.model_request_parameters)
        call = await begin(
            self.vluna, lambda: model_call_of(self.wrapped, *asked, stream=False), self._bound, self._refusals
        )
        return await self._answered(
            call, lambda: self.wrapped.compact_messages(request_context, instructions=instructions)
        )

    async def batch_create(self, requests: Any) -> Any:
        """Batches are not metered: they follow ``on_unmetered``.

        Raises:
            ConfigurationError: ``on_unmetered="deny"``.
        """
        try:
            self.vluna.unmetered("pydantic_ai.batch", self._bound)
        except VlunaError:
            raise
        except Exception:
            self.vluna.internal_error("pydantic_ai.batch")
        return await super().batch_create(requests)

    # -- plumbing ----------------------------------------------------------------------------------------------------

    async def _answered(self, call: Call, ask: Callable[[], Any]) -> Any:
        try:
            with call.running():
                response = await ask()
        except BaseException as error:
            call.failed(error)
            raise
        call.answered(response, self._waits)
        await call.receipt()
        return response

    @property
    def _is_free(self) -> bool:
        """Whether no provider is asked: models made for tests."""
        return isinstance(_innermost(self.wrapped), (TestModel, FunctionModel))

    @contextmanager
    def _one_request(self) -> Iterator[None]:
        """A request to several models, one after the other."""
        refusals = self._refusals or Refusals()
        with scoped(fallback, refusals), refusals.final():
            yield

    def _polls(self, messages: Any) -> bool:
        """Whether this only asks whether a background response is there, which costs nothing by itself."""
        last = messages[-1] if messages else None
        return getattr(last, "state", None) == "suspended" and self._waits(last)

    def _waits(self, response: Any) -> bool:
        """Whether the provider works on this in the background, and is polled."""
        try:
            return response.state == "suspended" and self.wrapped.continuation_delay(response) is not None
        except Exception:
            self.vluna.internal_error("pydantic_ai.background")
            return False


def routed(model: Any, leaf: Callable[[Any], Any]) -> Any:
    """A twin of a model that hands its requests to others, with ``leaf`` around each of those; None for any other."""
    if isinstance(model, VlunaModel):
        return None if model._route is None else routed(model._route, leaf)
    if isinstance(model, FallbackModel):
        twin = copy.copy(model)
        twin.models = [routed(inner, leaf) or leaf(inner) for inner in model.models]
        return twin
    if isinstance(model, WrapperModel) and (inner := routed(model.wrapped, leaf)) is not None:
        twin = copy.copy(model)
        twin.wrapped = inner
        return twin
    return None


def _innermost(model: Any) -> Any:
    while isinstance(model, WrapperModel):
        model = model.wrapped
    return model
