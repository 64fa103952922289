"""The wrapper model: every request that it sends on to a provider is one operation."""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, contextmanager
from typing import TYPE_CHECKING, Any

from google.adk.models import FallbackModel
from google.adk.models.base_llm import BaseLlm
from google.adk.models.registry import LLMRegistry
from pydantic import ConfigDict, PrivateAttr

from ..context import CallContext, make_context, within
from ..ending import Ending
from ..errors import VlunaError
from ..slot import Share, Slot, inside
from ..tap import INLINE_SECONDS
from ._default import given_or_default
from ._google_adk_words import Seen, model_call_of

if TYPE_CHECKING:
    from ..vluna import Vluna


class VlunaLlm(BaseLlm):  # type: ignore[misc]
    """A model of ADK whose requests are authorized before they are sent, and settled by what they used.

    The model inside may be any `BaseLlm`; this one says that it is of its class, and has its attributes. A client
    inside that is metered itself takes the operation over: it is settled once; so is a model that is wrapped twice.

    Args:
        wrapped: the model, or its name, which ADK's registry resolves.
        vluna: what meters; `Vluna.default()`, whose settings come from the environment, where not given.
        bound: who pays, by the arguments of `call_context`; wins over the surrounding context.

    Raises:
        ConfigurationError: who pays could not be billed; no ``vluna``, and the environment is incomplete or wrong.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    wrapped: BaseLlm
    _vluna: Vluna = PrivateAttr()
    _bound: CallContext | None = PrivateAttr(default=None)

    def __init__(self, wrapped: Any, vluna: Vluna | None = None, /, **bound: Any) -> None:
        inner = LLMRegistry.new_llm(wrapped) if isinstance(wrapped, str) else wrapped
        super().__init__(model=inner.model, wrapped=inner)
        vluna = given_or_default(vluna)
        self._vluna = vluna
        self._bound = make_context(**bound) if bound else None

    def __getattr__(self, name: str) -> Any:
        """What the model inside has besides; pydantic looks its private attributes up here first."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "wrapped" or name.startswith("__"):
                raise
            return getattr(self.wrapped, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """The class of the model inside: ADK asks for it, and treats some models in ways of their own."""
        kind: type[Any] = self.wrapped.__class__
        return kind

    def __repr__(self) -> str:
        return f"VlunaLlm({self.wrapped!r})"

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> VlunaLlm:
        """The same model: it holds connections and the metering, which are nobody's to copy."""
        return self

    @property
    def vluna(self) -> Vluna:
        """What meters."""
        return self._vluna

    @property
    def capabilities(self) -> Any:
        """What the model inside can do."""
        return self.wrapped.capabilities

    async def generate_content_async(self, llm_request: Any, stream: bool = False) -> AsyncGenerator[Any, None]:
        """One operation; of a `FallbackModel`, one of each model that it tries.

        Raises:
            VlunaError: the gate refused, or nobody pays; the provider was not called.
        """
        if issubclass(type(self.wrapped), FallbackModel):  # not one of ours that says it is one
            async with aclosing(self._each_metered(self.wrapped).generate_content_async(llm_request, stream)) as tried:
                async for response in tried:
                    yield response
            return
        call = await self._begin(llm_request, stream=stream)
        responses = self.wrapped.generate_content_async(llm_request, stream)
        try:
            while True:
                try:
                    with call.running():
                        response = await responses.__anext__()
                except StopAsyncIteration:
                    break
                call.take(response)
                if not stream:
                    await call.ended("complete")  # all there is; whoever takes it may never ask for more
                yield response
        except Exception as error:
            call.broke(error)
            raise
        except BaseException as error:  # closed, or cancelled: settled before anything else is waited for
            call.left(error)
            raise
        finally:
            await responses.aclose()
        await call.ended("complete")

    def connect(self, llm_request: Any) -> AbstractAsyncContextManager[Any]:
        """Live connections are not metered: they follow ``on_unmetered``.

        Raises:
            ConfigurationError: ``on_unmetered="deny"``.
        """
        try:
            self._vluna.unmetered("google_adk.live", self._bound)
        except VlunaError:
            raise
        except Exception:
            self._vluna.internal_error("google_adk.live")
        connection: AbstractAsyncContextManager[Any] = self.wrapped.connect(llm_request)
        return connection

    def _each_metered(self, several: FallbackModel) -> FallbackModel:
        """The same model, each of whose members is metered by itself: which one answers decides what is sold."""
        payer = self._bound or CallContext()
        members = [metered(several._delegate(entry), self._vluna, payer) for entry in several.models]
        return several.model_copy(update={"models": members})

    async def _begin(self, llm_request: Any, *, stream: bool) -> _Call:
        bound = self._bound
        try:
            call = model_call_of(self.wrapped, llm_request, stream=stream)
            slot = Slot()
            operation = await self._vluna.abegin(call, bound)
            slot.offer(operation)
            return _Call(self._vluna, bound, slot, slot.share, Seen(self.wrapped, stream=stream))
        except VlunaError:
            raise
        except Exception:
            self._vluna.internal_error("google_adk.begin")
            return _Call(self._vluna, bound, Slot(), None, None)


def metered(model: BaseLlm, vluna: Vluna, payer: CallContext) -> VlunaLlm:
    """The model for one request, whoever it serves otherwise; what is bound to a `VlunaLlm` wins over ``payer``."""
    if type(model) is VlunaLlm:
        inner, vluna, bound = model.wrapped, model._vluna, model._bound
        made = VlunaLlm(inner, vluna)
        made._bound = payer if bound is None else payer.override(bound)
        return made
    made = VlunaLlm(model, vluna)
    made._bound = payer
    return made


class _Call:
    """One request until it is settled: by us, or by a metered client inside that claimed it. Never raises."""

    def __init__(
        self, vluna: Vluna, bound: CallContext | None, slot: Slot, share: Share | None, seen: Seen | None
    ) -> None:
        self._vluna = vluna
        self._bound = bound
        self._slot = slot
        self._share = share
        self._seen = seen
        if share is not None:
            # Whoever holds an answer longer than its loop runs leaves nobody behind who could settle it.
            self._forgotten = weakref.finalize(self, share.abandon, lambda: Ending(how="abandoned"))
            self._forgotten.atexit = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is called in the ``with`` may claim the operation, and bills the same customer."""
        with ExitStack() as stack:
            if self._bound is not None:
                stack.enter_context(within(self._bound))
            stack.enter_context(inside(self._slot))
            yield

    def take(self, response: Any) -> None:
        """The next response."""
        try:
            if self._seen is not None:
                self._seen.take(response)
        except Exception:
            self._vluna.internal_error("google_adk.response")

    async def ended(self, how: str) -> None:
        """There are no more responses; the receipt is waited for where the settings say so."""
        share = self._settle(how, None)
        try:
            if share is not None:
                await share.receipt(INLINE_SECONDS)
        except Exception:
            self._vluna.internal_error("google_adk.wait")

    def broke(self, error: Exception) -> None:
        """The model raised: what was reported is charged, and nothing else."""
        self._settle("error", error)

    def left(self, error: BaseException) -> None:
        """The consumer left, or was cancelled; without any answer yet that is as if the call had failed."""
        self._settle("closed", error)

    def _settle(self, how: str, error: BaseException | None) -> Share | None:
        share, self._share = self._share, None
        if share is None:
            return None
        self._forgotten.detach()
        try:
            assert self._seen is not None
            if error is not None and not self._seen.any:
                share.fail(error)
            else:
                share.finish(self._seen.ending(how))
        except Exception:
            self._vluna.internal_error("google_adk.answer")
            share.fail(None)
        return share
