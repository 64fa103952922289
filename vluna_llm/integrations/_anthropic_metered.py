"""What makes the two methods of a metered client those of an Anthropic client, and what a middleware adds to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

import anthropic

from ._anthropic_call import AnthropicCall, origin_of, prepare
from ._sdk_call import Call, flying, in_flight
from ._sdk_metered import AsyncMetered, Metered, SyncMetered

_HOP: Final = "_vluna_hop"

if TYPE_CHECKING:

    class _Sync(SyncMetered):
        def _attempt_request(self, options: Any, **rest: Any) -> Any: ...

    class _Async(AsyncMetered):
        async def _attempt_request(self, options: Any, **rest: Any) -> Any: ...

else:
    _Sync, _Async = SyncMetered, AsyncMetered


class _AnthropicMetered(Metered):
    _vluna_status_error: ClassVar[type[Exception]] = anthropic.APIStatusError

    def _vluna_prepare(self, options: Any, stream: bool) -> AnthropicCall | None:
        metering = self._vluna_metering
        return prepare(metering.vluna, metering.bound, self, options, stream)

    def _vluna_call_of(self, response: Any) -> Call | None:
        """The call that this answer is of; None for an error, which only a client with middleware processes."""
        hop: AnthropicCall | None = vars(response).pop(_HOP, None)
        if not response.is_success:
            if hop is not None and hop.operation is not None:
                hop.operation.fail()
            return None
        return hop or in_flight.get()

    def _vluna_hop(self, options: Any) -> AnthropicCall | None:
        """The call that a middleware makes after the first one was answered; None for attempts of the first one."""
        try:
            first = origin_of(options)
            if first is None or first.answered == "no" or first.vluna.mode == "off":
                return None
            return first.again(options)
        except Exception:
            self._vluna_metering.vluna.internal_error("anthropic.middleware")
            return None


class SyncAnthropicMetered(_AnthropicMetered, _Sync):
    """The two methods, in the colour of `anthropic.Anthropic`."""

    def _attempt_request(self, options: Any, **rest: Any) -> Any:
        """Send one request; only called by SDKs that have middleware."""
        hop = self._vluna_hop(options)
        if hop is None:
            return super()._attempt_request(options, **rest)
        hop.operation = hop.begin()
        try:
            with flying(hop):
                sent = super()._attempt_request(options, **rest)
        except BaseException as error:
            hop.failed(error)
            raise
        vars(sent[0])[_HOP] = hop
        return sent


class AsyncAnthropicMetered(_AnthropicMetered, _Async):
    """The two methods, in the colour of `anthropic.AsyncAnthropic`."""

    async def _attempt_request(self, options: Any, **rest: Any) -> Any:
        """Send one request; only called by SDKs that have middleware."""
        hop = self._vluna_hop(options)
        if hop is None:
            return await super()._attempt_request(options, **rest)
        hop.operation = await hop.abegin()
        try:
            with flying(hop):
                sent = await super()._attempt_request(options, **rest)
        except BaseException as error:
            hop.failed(error)
            raise
        vars(sent[0])[_HOP] = hop
        return sent
