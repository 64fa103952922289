"""Transports of httpx and httpx2 that meter the model calls of a bare HTTP client, or of any SDK that takes one.

::

    client = httpx.Client(transport=MeteringTransport(httpx.HTTPTransport()))
    client = httpx.AsyncClient(transport=AsyncMeteringTransport(httpx.AsyncHTTPTransport(), principal_id="alice"))

A refusal is an answer here: 402, 403, 429, 400 or 503 in the provider's shape, with ``x-should-retry: false``, so that
an SDK above neither tries again nor takes it for a broken connection. The exception itself is in
``response.extensions["vluna_error"]``. Each HTTP request is one operation: the retries of an SDK above are several, of
which those that failed are given back. Below a client that is metered itself nothing is metered again, and what is
metered below (a second transport, an application that is called in this process) takes the operation over. The setting
``authorize="overlap"`` means nothing here: the gate is always asked first.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .._tap_wire import http_module
from ..context import CallContext, make_context, within
from ..errors import ConfigurationError, VlunaError
from ..lifecycle import Operation
from ..slot import Slot, inside
from ._http_call import Exchange, RefusedOption, may_be_metered, prepare, refusal
from ._sdk_call import Call, in_flight
from ._sdk_clients import drop_in_metering

if TYPE_CHECKING:
    from ..vluna import Vluna

__all__ = ["AsyncMeteringTransport", "MeteringTransport"]

_REFUSALS = (400, 422)


class _Transport:
    """What both colours share. An instance is a transport of the library whose transport it wraps."""

    _base: str

    def __new__(cls, transport: Any, vluna: Vluna | None = None, **who: Any) -> Any:
        if "_vluna_http" not in vars(cls):
            try:
                kind: Any = cls
                cls = _of(kind, http_module(transport))
            except TypeError as error:
                raise ConfigurationError(
                    f"{cls.__name__} wraps a transport of httpx or httpx2, such as httpx.HTTPTransport(), "
                    f"not {type(transport).__name__!r}."
                ) from error
        return object.__new__(cls)

    def __init__(self, transport: Any, vluna: Vluna | None = None, **who: Any) -> None:
        self._inner = transport
        self._vluna = drop_in_metering(vluna).vluna
        self._bound: CallContext | None = make_context(**who) if who else None

    def _watches(self, request: Any) -> bool:
        return self._vluna.mode != "off" and in_flight.get() is None and may_be_metered(request)

    def _prepare(self, request: Any) -> Exchange | None:
        try:
            return prepare(self._vluna, self._bound, request)
        except VlunaError:
            raise
        except Exception:
            self._vluna.internal_error("httpx.prepare")
            return None

    def _asking(self, request: Any, exchange: Exchange) -> Any:
        """The request with what is asked for on the caller's behalf."""
        if exchange.asked is None:
            return request
        try:
            headers = [(name, value) for name, value in request.headers.multi_items() if name.lower() not in _FRAMING]
            return type(request)(
                request.method, request.url, headers=headers, content=exchange.asked, extensions=request.extensions
            )
        except Exception:
            self._vluna.internal_error("httpx.include_usage")
            return request

    def _answered(self, request: Any, exchange: Exchange, response: Any, *, is_async: bool) -> Any:
        call = exchange.call
        page = response.headers.get("content-type", "").startswith("text/html")  # of a proxy: no answer of a model
        if page or not response.is_success:
            call.failed(None)
            return response
        response.request = request  # as the client does it afterwards
        call.answer(response, is_async=is_async)
        return response

    def _refused(self, request: Any, error: VlunaError) -> Any:
        status, headers, body = refusal(error, request)
        http = importlib.import_module(http_module(request))
        return http.Response(status, headers=headers, json=body, request=request, extensions={"vluna_error": error})


@contextmanager
def _offered(call: Call) -> Iterator[None]:
    """What is metered below, another transport or a gateway in this process, takes the operation over, and bills the
    same customer."""
    slot = Slot()
    slot.offer(call.operation if isinstance(call.operation, Operation) else None, call.model_call.kind)
    call.operation = slot.share
    with ExitStack() as around:
        if call.bound is not None:
            around.enter_context(within(call.bound))
        if call.operation is not None:
            around.enter_context(inside(slot))
        yield


_FRAMING = frozenset({"content-length", "transfer-encoding"})


class MeteringTransport(_Transport):
    """A transport of `httpx` (or `httpx2`) that meters what passes through the one that it wraps.

    Args:
        transport: sends the requests, e.g. ``httpx.HTTPTransport()``.
        vluna: by whom they are metered; `Vluna.default()` where not given.
        **who: whom the transport is bound to, as ``vluna.bind`` takes it; the surrounding context where not given.

    Raises:
        ConfigurationError: this is no transport of either library, or an id could not be signed.
    """

    _base = "BaseTransport"

    def handle_request(self, request: Any) -> Any:
        """Ask the gate, send the request, watch the answer."""
        if not self._watches(request):
            return self._inner.handle_request(request)
        request.read()
        try:
            exchange = self._prepare(request)
            if exchange is None:
                return self._inner.handle_request(request)
            call = exchange.call
            if call.is_gated:
                call.operation = call.begin()
                if call.operation is None:
                    return self._inner.handle_request(request)
        except VlunaError as error:
            return self._refused(request, error)
        try:
            with _offered(call):
                response = self._inner.handle_request(self._asking(request, exchange))
            if exchange.asked is not None and response.status_code in _REFUSALS:
                response.read()
                if call.refused_option(RefusedOption(response.status_code, response.text)):
                    response.close()
                    response = self._inner.handle_request(request)
                    if response.is_success:
                        call.remember_refusal()
        except BaseException as error:
            call.failed(error)
            raise
        return self._answered(request, exchange, response, is_async=False)

    def close(self) -> None:
        """Close the transport that is wrapped."""
        self._inner.close()


class AsyncMeteringTransport(_Transport):
    """`MeteringTransport` for async clients."""

    _base = "AsyncBaseTransport"

    async def handle_async_request(self, request: Any) -> Any:
        """Ask the gate, send the request, watch the answer."""
        if not self._watches(request):
            return await self._inner.handle_async_request(request)
        await request.aread()
        try:
            exchange = self._prepare(request)
            if exchange is None:
                return await self._inner.handle_async_request(request)
            call = exchange.call
            if call.is_gated:
                call.operation = await call.abegin()
                if call.operation is None:
                    return await self._inner.handle_async_request(request)
        except VlunaError as error:
            return self._refused(request, error)
        try:
            with _offered(call):
                response = await self._inner.handle_async_request(self._asking(request, exchange))
            if exchange.asked is not None and response.status_code in _REFUSALS:
                await response.aread()
                if call.refused_option(RefusedOption(response.status_code, response.text)):
                    await response.aclose()
                    response = await self._inner.handle_async_request(request)
                    if response.is_success:
                        call.remember_refusal()
        except BaseException as error:
            call.failed(error)
            raise
        return self._answered(request, exchange, response, is_async=True)

    async def aclose(self) -> None:
        """Close the transport that is wrapped."""
        await self._inner.aclose()


@lru_cache(maxsize=16)
def _of(kind: Any, module: str) -> type[Any]:
    """The class that is also a transport of that library."""
    base = getattr(importlib.import_module(module), kind._base)
    return type(kind.__name__, (kind, base), {"__module__": kind.__module__, "_vluna_http": module})
