"""The two methods of a metered client, in both colours; what they are mixed into is the SDK's own client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..context import CallContext
from ..scoped import unset
from ..tap import INLINE_SECONDS
from ._sdk_call import Call, in_flight

if TYPE_CHECKING:
    from ..lifecycle import Operation
    from ..vluna import Vluna

    class _SyncClient:
        def request(self, cast_to: Any, options: Any, *, stream: bool = False, **rest: Any) -> Any: ...
        def _process_response(self, *, response: Any, **rest: Any) -> Any: ...

    class _AsyncClient:
        async def request(self, cast_to: Any, options: Any, *, stream: bool = False, **rest: Any) -> Any: ...
        async def _process_response(self, *, response: Any, **rest: Any) -> Any: ...

else:
    _SyncClient = _AsyncClient = object


@dataclass(frozen=True, slots=True)
class Metering:
    """By whom a client is metered, and whom it is bound to."""

    vluna: Vluna
    bound: CallContext | None = None


class Metered:
    """What both colours have: by whom they are metered, and what a request is, which the SDK's own mixin says."""

    _vluna_metering: Metering
    _vluna_status_error: ClassVar[type[Exception]]

    def _vluna_prepare(self, options: Any, stream: bool) -> Call | None:
        """What has to be done about this request; None where nothing has."""
        raise NotImplementedError

    def _vluna_call_of(self, response: Any) -> Call | None:
        """The call that this answer is of; None where it is not metered."""
        return in_flight.get()


class SyncMetered(Metered, _SyncClient):
    """The two methods of a client that blocks."""

    def request(self, cast_to: Any, options: Any, *, stream: bool = False, **rest: Any) -> Any:
        call = self._vluna_prepare(options, stream)
        if call is not None and call.is_gated and not self._vluna_admit(call):
            call = None
        token = in_flight.set(call)
        try:
            if call is None:
                return super().request(cast_to, options, stream=stream, **rest)
            asking = call.asking(options)
            try:
                answer = super().request(cast_to, asking, stream=stream, **rest)
            except self._vluna_status_error as error:
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
        if call.answered == "no":  # somebody's middleware has answered in the provider's place
            _failed(call, None)
        if call.waits and call.operation is not None:
            try:
                call.operation.wait(INLINE_SECONDS)
            except Exception:
                call.vluna.internal_error(f"{call.sdk}.wait")
        return answer

    def _process_response(self, *, response: Any, **rest: Any) -> Any:
        call = self._vluna_call_of(response)
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


class AsyncMetered(Metered, _AsyncClient):
    """The two methods of a client of coroutines."""

    async def request(self, cast_to: Any, options: Any, *, stream: bool = False, **rest: Any) -> Any:
        call = self._vluna_prepare(options, stream)
        if call is not None and call.is_gated and not await self._vluna_admit(call):
            call = None
        token = in_flight.set(call)
        try:
            if call is None:
                return await super().request(cast_to, options, stream=stream, **rest)
            asking = call.asking(options)
            try:
                answer = await super().request(cast_to, asking, stream=stream, **rest)
            except self._vluna_status_error as error:
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
            unset(in_flight, token)
        if call.answered == "no":
            _failed(call, None)
        if call.waits and call.operation is not None:
            try:
                await call.operation.wait_async(INLINE_SECONDS)
            except Exception:
                call.vluna.internal_error(f"{call.sdk}.wait")
        return answer

    async def _process_response(self, *, response: Any, **rest: Any) -> Any:
        call = self._vluna_call_of(response)
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


def _failed(call: Call, error: BaseException | None) -> None:
    """No answer came: tell the operation, or see to it that the one being admitted is told."""
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
