"""What the sync and the async gate client share: everything but the sending."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable

import httpx
from opentelemetry import trace

from ..errors import ConfigurationError, GateUnavailable
from ..types import Dialect, Lease
from .credentials import GateCredentials, header_value
from .failures import error_from_transport
from .requests import GateRequest
from .retry import AuthorizeSchedule
from .signing import JSON_CONTENT_TYPE, Signer
from .wire import Patience, TransportError, WireRequest

DEFAULT_TIMEOUT = httpx.Timeout(5.0, connect=1.0)
"""For everything but authorize: seconds to connect, and between bytes."""
AUTHORIZE_DEADLINE = 2.0
"""Seconds that authorize may take with all its retries (``VLUNA_LLM_AUTHORIZE_DEADLINE``)."""

Timeout = float | httpx.Timeout
"""Seconds for a whole exchange, or an ``httpx.Timeout`` for its parts."""

_USER_AGENT = "vluna-llm"


class GateCore:
    """What both colours share: addresses, signing, tracing headers, what is known about the gate."""

    def __init__(
        self,
        credentials: GateCredentials,
        *,
        timeout: Timeout = DEFAULT_TIMEOUT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.credentials = credentials
        self.dialect: Dialect | None = None
        """What this gate speaks; None until the first authorize told."""
        self._patience = Patience.of(timeout)
        self.clock = clock
        self._base_path = credentials.path
        self._signer = Signer(key_id=credentials.key_id, key=credentials.key, realm_id=credentials.realm_id)
        self._constant = (
            ("x-realm-id", credentials.realm_id),
            ("content-type", JSON_CONTENT_TYPE),
            ("accept", "application/json"),
            ("accept-encoding", "identity"),
            ("user-agent", _USER_AGENT),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(base_url={self.credentials.base_url!r}, realm_id={self.credentials.realm_id!r})"

    def sealed(self, request: GateRequest, request_id: str | None, traceparent: str | None) -> WireRequest:
        """The request with fresh time, nonce and signature."""
        request_id = uuid.uuid4().hex if request_id is None else header_value(request_id, "request_id")
        if request.kind == "health":
            headers = [*self._constant[2:], ("x-request-id", request_id)]
            return WireRequest("GET", self.credentials.health_path, headers, b"", request_id)
        target = self._base_path + request.path
        authorization, digest = self._signer.sign(
            request.method,
            target,
            request.body,
            principal_id=request.principal_id,
            user_id=request.user_id,
            idempotency_key=request.idempotency_key,
        )
        headers = [
            *self._constant,
            ("authorization", authorization),
            ("content-digest", digest),
            ("x-principal-id", request.principal_id),
            ("x-user-id", request.user_id),
            ("x-request-id", request_id),
        ]
        if request.idempotency_key:
            headers.append(("idempotency-key", request.idempotency_key))
        if request.admin:
            headers.append(("x-realm-admin", "true"))
        traceparent = traceparent or current_traceparent()
        if traceparent:
            headers.append(("traceparent", header_value(traceparent, "traceparent")))
        return WireRequest(request.method, target, headers, request.body, request_id)

    def patience_for(self, timeout: Timeout | None) -> Patience:
        """The caller's time-out, or the client's default."""
        return self._patience if timeout is None else Patience.of(timeout)

    def learned(self, lease: Lease) -> Lease:
        """Remember the dialect that this lease came in."""
        self.dialect = lease.dialect
        return lease

    def schedule(self, deadline: float) -> AuthorizeSchedule:
        """The attempts of one authorize, starting now."""
        if not deadline > 0:
            raise ConfigurationError(f"deadline must be a positive number of seconds, not {deadline!r}.")
        return AuthorizeSchedule(deadline, time.monotonic(), random.random)


def unavailable(error: TransportError, wire: WireRequest) -> GateUnavailable:
    """The error for a request that got no answer, with the transport's own exception as its cause."""
    failure = error_from_transport(error, request_id=wire.request_id)
    failure.__cause__ = error.__cause__ or error
    return failure


def current_traceparent() -> str | None:
    """The W3C ``traceparent`` of the current OpenTelemetry span; None where there is none."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
