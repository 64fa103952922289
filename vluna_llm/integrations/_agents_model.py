"""Models of the OpenAI Agents SDK whose calls are metered, each of them as an operation of its own."""

from __future__ import annotations

import copy
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from agents import Model, OpenAIChatCompletionsModel, OpenAIResponsesModel
from agents.retry import ModelRetryAdvice, ModelRetryNormalizedError
from openai import AsyncOpenAI
from openai._base_client import AsyncAPIClient

from .._tap_watch import Watch
from ..context import CallContext
from ..errors import VlunaError
from ..lifecycle import ModelCall
from ..slot import Share, Slot, inside
from ..tap import INLINE_SECONDS
from ._agents_call import EventItems, asking_usage, ending_of, model_call_of, refused_option
from ._agents_payer import Turn, paying, run_of_call
from ._default import given_or_default

if TYPE_CHECKING:
    from ..vluna import Vluna

_NAMES = (
    "system_instructions",
    "input",
    "model_settings",
    "tools",
    "output_schema",
    "handoffs",
    "tracing",
)
_BY_CLIENT = (OpenAIResponsesModel, OpenAIChatCompletionsModel)
"""Models that are nothing but requests of an OpenAI client: metered there, where an answer is seen byte by byte."""


class VlunaModel(Model):  # type: ignore[misc]
    """Any model of the SDK, with each call asked for at the gate and settled::

        Agent(name="writer", model=VlunaModel(OpenAIResponsesModel("gpt-4o", AsyncOpenAI())))

    The SDK's own models over HTTP get a metered twin of their client. Other models (LiteLLM, one of your own, Responses
    over a WebSocket) are asked for before they are called and settled by the usage of their answer; where a metered
    client or LiteLLM's callback inside takes the operation over, that settles it, once. The runner's retries
    (``ModelSettings.retry``) are calls of their own, those of the SDK's client are not; a refusal is never retried.

    Everything else of the given model is reached through this one.

    Args:
        model: the model. It is left as it is.
        vluna: the metering; `Vluna.default()` where not given, looked up at the first call.
    """

    def __init__(self, model: Model, vluna: Vluna | None = None, *, _turn: Turn | None = None) -> None:
        wrapped: Any = model if isinstance(model, VlunaModel) else None  # wrapping it again meters it once
        self._vluna_inner: Any = model if wrapped is None else wrapped._vluna_inner
        self._vluna_given: Vluna | None = vluna if wrapped is None else vluna or wrapped._vluna_given
        self._vluna_turn = _turn
        self._vluna_ready: tuple[Vluna, Any, bool] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_vluna_"):
            raise AttributeError(name)
        return getattr(self._vluna_inner, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """The given model's class: the runner treats Chat Completions models in a way of their own."""
        kind: type[Any] = type(self._vluna_inner)
        return kind

    def __repr__(self) -> str:
        return f"VlunaModel({self._vluna_inner!r})"

    async def get_response(self, *args: Any, **kwargs: Any) -> Any:
        """The given model's answer.

        Raises:
            VlunaError: refused; the model was not called.
        """
        vluna, model, by_client = self._metered()
        run = run_of_call()
        if by_client:
            with paying(vluna, self._vluna_turn, run):
                return await model.get_response(*args, **kwargs)
        share = await self._begin(vluna, model, args, kwargs, run, stream=False)
        if share is None:
            return await model.get_response(*args, **kwargs)
        try:
            with paying(vluna, self._vluna_turn, run), inside(share.slot):
                response = await model.get_response(*args, **kwargs)
        except BaseException as error:
            share.fail(error)
            raise
        with _reported(vluna, "agents.answer"):
            share.finish(ending_of(response))
            await share.receipt(INLINE_SECONDS)
        return response

    def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """The given model's events. What `get_response` raises is raised at the first of them."""
        forgotten: list[Callable[[], None]] = []
        events = self._events(forgotten, args, kwargs)
        weakref.finalize(events, lambda: [forget() for forget in forgotten]).atexit = False
        return events

    def get_retry_advice(self, request: Any) -> Any:
        """The given model's advice. A refusal of the gate is never retried: it is an answer (design rule 8)."""
        if isinstance(request.error, VlunaError):
            never = ModelRetryNormalizedError(is_abort=True)
            return ModelRetryAdvice(suggested=False, replay_safety="unsafe", reason="refused", normalized=never)
        return self._vluna_inner.get_retry_advice(request)

    async def close(self) -> None:
        """Close the given model."""
        await self._vluna_inner.close()

    async def _cleanup_on_run_end(self, owner: object) -> None:
        await self._vluna_inner._cleanup_on_run_end(owner)

    # -- plumbing --------------------------------------------------------------------------------------------------

    def _metered(self) -> tuple[Vluna, Any, bool]:
        """The metering, the model to call, and whether the model's own client meters its calls."""
        if self._vluna_ready is None:
            vluna = given_or_default(self._vluna_given)
            twin = _with_metered_client(self._vluna_inner, vluna)
            self._vluna_ready = (vluna, self._vluna_inner if twin is None else twin, twin is not None)
        return self._vluna_ready

    async def _begin(
        self, vluna: Vluna, model: Any, args: Any, kwargs: Any, run: CallContext, *, stream: bool
    ) -> Share | None:
        """Ask the gate; None where the call is not metered. Only refusals are raised."""
        try:
            call: ModelCall = model_call_of(model, {**dict(zip(_NAMES, args, strict=False)), **kwargs}, stream=stream)
        except Exception:
            vluna.internal_error("agents.prepare")
            call = ModelCall("responses", "openai", type(model).__name__, None, stream)
        with paying(vluna, self._vluna_turn, run):
            try:
                operation = await vluna.abegin(call)
            except VlunaError:
                raise
            except Exception:
                vluna.internal_error("agents.begin")
                return None
        if operation is None:
            return None
        slot = Slot()
        slot.offer(operation)
        return slot.share

    async def _events(self, forgotten: list[Callable[[], None]], args: Any, kwargs: Any) -> AsyncIterator[Any]:
        """The events; our context variables are set while the given model works and never while the consumer does."""
        vluna, model, by_client = self._metered()
        run = run_of_call()
        share = None if by_client else await self._begin(vluna, model, args, kwargs, run, stream=True)
        reader = EventItems()
        watch = None
        if share is not None:
            watch = Watch(reader, share, vluna.internal_error, event_stream=True)  # type: ignore[arg-type]
            forgotten.append(watch.forgotten)

        @contextmanager
        def working() -> Iterator[None]:
            with paying(vluna, self._vluna_turn, run):
                if share is None:
                    yield
                else:
                    with inside(share.slot):
                        yield

        source = _pull(vluna, model, args, kwargs, working, ask=share is not None)
        try:
            async for event in source:
                if watch is not None and share is not None:
                    with _reported(vluna, "agents.event"):
                        if reader.take(event):
                            watch.settle("complete")
                            await share.receipt(INLINE_SECONDS)
                yield event
            if watch is not None:
                watch.end_of_bytes()
        except BaseException as error:
            if watch is not None:
                watch.broke(error)
            raise
        finally:
            await source.aclose()


async def _pull(
    vluna: Vluna, model: Any, args: Any, kwargs: Any, working: Callable[[], Any], *, ask: bool
) -> AsyncGenerator[Any, None]:
    """The given model's events, with usage asked for where its API reports it only then (design rule 2)."""
    asking = None
    if ask:
        with _reported(vluna, "agents.include_usage"):
            asking = asking_usage(model, args, kwargs)
    begun, stream = False, None
    try:
        with working():
            stream = model.stream_response(*(asking or (args, kwargs))[0], **(asking or (args, kwargs))[1])
        while True:
            with working():
                try:
                    event = await stream.__anext__()
                except StopAsyncIteration:
                    break
                except Exception as error:
                    if begun or asking is None or not refused_option(model, error):
                        raise
                    event = None
            if event is None:  # outside of the except block: the caller's exception must not carry this one
                asking = None
                with working():
                    stream = model.stream_response(*args, **kwargs)
                continue
            begun = True
            yield event
    finally:
        close = getattr(stream, "aclose", None)
        if close is not None:
            with working():
                await close()


def _with_metered_client(model: Any, vluna: Vluna) -> Any:
    """A twin of this model with a metered client; None where its calls are more than requests of an OpenAI client.

    A client that is metered already stays: it may be bound to a customer, or to another gate.
    """
    if type(model) not in _BY_CLIENT:
        return None
    client = model._client if model._client is not None else AsyncOpenAI()
    if not isinstance(client, AsyncAPIClient):
        return None
    twin = copy.copy(model)
    twin._client = client if getattr(client, "_vluna_metering", None) is not None else vluna.wrap(client)
    return twin


@contextmanager
def _reported(vluna: Vluna, where: str) -> Iterator[None]:
    """Our own errors are logged and counted, and the answer goes on."""
    try:
        yield
    except Exception:
        with suppress(Exception):
            vluna.internal_error(where)
