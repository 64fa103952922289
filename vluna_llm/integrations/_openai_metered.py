"""The two methods of a metered OpenAI client, in both colours."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import openai
from openai._base_client import AsyncAPIClient, SyncAPIClient

from ..context import CallContext
from ..tap import INLINE_SECONDS
from ._openai_call import Call, in_flight, prepare

if TYPE_CHECKING:
    from ..lifecycle import Operation
    from ..vluna import Vluna


@dataclass(frozen=True, slots=True)
class Metering:
    """By whom a client is metered, and whom it is bound to."""

    vluna: Vluna
    bound: CallContext | None = None


class SyncMetered(SyncAPIClient):
    """The two methods, in the colour of `openai.OpenAI`."""

    _vluna_metering: Metering

    def request(self, cast_to: Any, options: Any, *, stream: bool = False, **rest: Any) -> Any:
        metering = self._vluna_metering
        call = prepare(metering.vluna, metering.bound, self, options, stream, flavour=_flavour(self))
        if call is not None and not call.retrieve and not self._vluna_admit(call):
            call = None
        token = in_flight.set(call)
        try:
            if call is None:
                return super().request(cast_to, options, stream=stream, **rest)
            asking = call.asking(options)
            try:
                answer = super().request(cast_to, asking, stream=stream, **rest)
            except openai.APIStatusError as error:
                if asking is options or not call.refused_option(error):
                    raise
                again = True
            else:
                again = False
            if again:  # outside of the except block: the caller's exception must not carry the first one
                answer = super().request(cast_to, options, stream=stream, **rest)
                call.remember_refusal()
        except BaseException as error:
            if call is not None:
                _failed(call, error)
            raise
        finally:
            in_flight.reset(token)
        if call.waits and call.operation is not None:
            try:
                call.operation.wait(INLINE_SECONDS)
            except Exception:
                call.vluna.internal_error("openai.wait")
        return answer

    def _process_response(self, *, response: Any, **rest: Any) -> Any:
        call = in_flight.get()
        if call is not None:
            if call.pending is not None:
                try:
                    call.operation = call.pending.result()
                except BaseException:  # refused, or interrupted while waiting: nothing of the answer is handed out
                    response.close()
                    raise
                call.pending = None
            call.answer(response, is_async=False)
        return super()._process_response(response=response, **rest)

    def _vluna_admit(self, call: Call) -> bool:
        """Ask the gate; False where the call is not metered. Refusals of the gate are raised."""
        if call.vluna.settings.authorize == "overlap":
            call.pending = _in_thread(call.begin)
            return True
        call.operation = call.begin()
        return call.operation is not None


class AsyncMetered(AsyncAPIClient):
    """The two methods, in the colour of `openai.AsyncOpenAI`."""

    _vluna_metering: Metering

    async def request(self, cast_to: Any, options: Any, *, stream: bool = False, **rest: Any) -> Any:
        metering = self._vluna_metering
        call = prepare(metering.vluna, metering.bound, self, options, stream, flavour=_flavour(self))
        if call is not None and not call.retrieve and not await self._vluna_admit(call):
            call = None
        token = in_flight.set(call)
        try:
            if call is None:
                return await super().request(cast_to, options, stream=stream, **rest)
            asking = call.asking(options)
            try:
                answer = await super().request(cast_to, asking, stream=stream, **rest)
            except openai.APIStatusError as error:
                if asking is options or not call.refused_option(error):
                    raise
                again = True
            else:
                again = False
            if again:
                answer = await super().request(cast_to, options, stream=stream, **rest)
                call.remember_refusal()
        except BaseException as error:
            if call is not None:
                _failed(call, error)
            raise
        finally:
            try:
                in_flight.reset(token)
            except ValueError:
                pass  # a coroutine that is closed from another task than it ran in: that task never saw the call
        if call.waits and call.operation is not None:
            try:
                await call.operation.wait_async(INLINE_SECONDS)
            except Exception:
                call.vluna.internal_error("openai.wait")
        return answer

    async def _process_response(self, *, response: Any, **rest: Any) -> Any:
        call = in_flight.get()
        if call is not None:
            if call.pending is not None:
                try:
                    call.operation = await asyncio.shield(call.pending)
                except BaseException:  # refused, or cancelled while waiting: nothing of the answer is handed out
                    await response.aclose()
                    raise
                call.pending = None
            call.answer(response, is_async=True)
        return await super()._process_response(response=response, **rest)

    async def _vluna_admit(self, call: Call) -> bool:
        if call.vluna.settings.authorize == "overlap" and (loop := _asyncio_loop()) is not None:
            call.pending = loop.create_task(call.abegin())
            return True
        call.operation = await call.abegin()
        return call.operation is not None


def _failed(call: Call, error: BaseException) -> None:
    """The call raised: tell the operation, or see to it that the one being admitted is told."""
    pending, call.pending = call.pending, None
    if pending is None:
        call.failed(error)
        return

    def admitted(future: Any) -> None:
        if not future.cancelled() and future.exception() is None and (operation := future.result()) is not None:
            operation.fail(error)

    pending.add_done_callback(admitted)


def _in_thread(begin: Callable[[], Operation | None]) -> Future[Operation | None]:
    """Ask the gate beside the model call, in a thread of its own that sees the caller's context."""
    future: Future[Operation | None] = Future()
    context = copy_context()

    def run() -> None:
        try:
            future.set_result(context.run(begin))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="vluna-authorize", daemon=True).start()
    return future


def _asyncio_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:  # trio
        return None


_AZURE = (openai.AzureOpenAI, openai.AsyncAzureOpenAI)
_BEDROCK = tuple(
    kind for name in ("BedrockOpenAI", "AsyncBedrockOpenAI") if isinstance(kind := getattr(openai, name, None), type)
)


def _flavour(client: object) -> str:
    return "azure" if isinstance(client, _AZURE) else "bedrock" if isinstance(client, _BEDROCK) else ""
