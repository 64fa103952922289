"""What is asked of the gate: every request as a value, without I/O. Those that only read are in `queries`.

A request is composed once, its body is bytes from then on, and it may be stored and sent again later: the same bytes
under the same key, with a fresh time, nonce and signature (design rule 7). The same input always gives the same bytes,
because the gate compares the order of JSON members (gate contract, section 5).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal

from ..errors import ConfigurationError
from ..types import Dialect, Lease
from .credentials import MAX_IDEMPOTENCY_KEY, header_value

RequestKind = Literal[
    "health",
    "authorize",
    "commit",
    "commit_batch",
    "cancel",
    "ingest",
    "preflight",
    "limits",
    "meters",
    "wallet_balance",
    "issue_token",
    "ratings",
    "rating",
    "allocations",
]

POST_PATHS: Mapping[RequestKind, str] = {
    "authorize": "/gate/authorize",
    "commit": "/gate/commits",
    "commit_batch": "/gate/commits/batch",
    "cancel": "/gate/cancel",
    "ingest": "/gate/ingest",
    "preflight": "/gate/preflight",
    "issue_token": "/token/issue",
}

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class GateRequest:
    """One request to the gate, ready to be signed and sent as often as needed.

    ``path`` is relative to the base URL, query included. ``admin`` asks for the realm's own view of the ops routes
    (``X-Realm-Admin``). The body is in no repr: it carries the lease token.
    """

    kind: RequestKind
    method: Literal["GET", "POST"]
    path: str
    body: bytes = field(default=b"", repr=False)
    idempotency_key: str = ""
    principal_id: str = ""
    user_id: str = ""
    admin: bool = False

    @classmethod
    def stored(
        cls, kind: RequestKind, body: bytes, *, idempotency_key: str, principal_id: str, user_id: str | None = None
    ) -> GateRequest:
        """A POST whose body was composed earlier and kept: exactly these bytes go out again under the same key.

        Raises:
            ConfigurationError: an id cannot be sent as a header, or this kind has no body.
        """
        if kind not in POST_PATHS:
            raise ConfigurationError(f"A stored request must be one of {', '.join(POST_PATHS)}, not {kind!r}.")
        return _post(kind, body, idempotency_key, principal_id, user_id)


@dataclass(frozen=True, slots=True)
class MeterLine:
    """One line of a commit: how much of one meter.

    ``quantity`` is in the meter's own unit (tokens). ``client_unit_price_xusd`` (XUSD) lets the gate tell when its
    price differs from the one that was expected; only the ``lease_token`` dialect knows it.
    """

    meter_code: str
    quantity: int
    unit: str | None = None
    client_unit_price_xusd: int | None = None
    client_pricing_etag: str | None = None


Meters = Mapping[str, int] | Sequence[MeterLine]


@dataclass(frozen=True, slots=True)
class BatchCommit:
    """One item of a batch: what a single commit takes, with its own idempotency key."""

    lease: Lease
    quantity: int
    idempotency_key: str
    meters: Meters = ()
    labels: Labels | None = None


def new_key(purpose: str) -> str:
    """An idempotency key that nobody else uses: one of the gate's caches is shared by all callers (contract 5)."""
    return f"vluna-llm:{uuid.uuid4()}:{purpose}"


def health_request() -> GateRequest:
    """Ask whether the gate runs. Not signed; the path is outside of the API's own."""
    return GateRequest("health", "GET", "/health")


def authorize_request(
    *,
    principal_id: str,
    feature_code: str,
    user_id: str | None = None,
    feature_family_code: str | None = None,
    estimated_quantity: int | None = None,
    budget_id: str | None = None,
    lease: str | None = None,
    labels: Labels | None = None,
    idempotency_key: str | None = None,
    dialect: Dialect | None = None,
) -> GateRequest:
    """Ask for a lease.

    Args:
        principal_id: the customer who pays.
        feature_code: what is used.
        user_id: the purse within the customer; the principal itself when None (design rule 11).
        feature_family_code: used by the gate only when it registers the feature by itself.
        estimated_quantity: tokens, >= 0; without it the gate gives no hints on price and credit.
        budget_id: a budget; a uuid where the gate speaks the ``lease_token`` dialect.
        lease: our own lease id, which the ``lease`` dialect takes and the other ignores; 1 to 255 characters.
        labels: stored with the lease.
        idempotency_key: generated when None; unique for each piece of work.
        dialect: what this gate is known to speak, only used to check ``budget_id`` early. The bytes do not depend on
            it, so that a key repeated by another process still meets the same body.

    Raises:
        ConfigurationError: a value cannot be sent; the text names it.
    """
    body: dict[str, Any] = {"feature_code": _code(feature_code, "feature_code")}
    if feature_family_code is not None:
        body["feature_family_code"] = _code(feature_family_code, "feature_family_code")
    if estimated_quantity is not None:
        body["estimated_quantity_minor"] = _quantity(estimated_quantity, "estimated_quantity", least=0)
    _add_budget(body, budget_id, dialect)
    if lease is not None:
        body["lease"] = header_value(lease, "lease")
    _add_labels(body, labels)
    return _post("authorize", _encode(body), idempotency_key, principal_id, user_id)


def preflight_request(
    *,
    principal_id: str,
    feature_code: str,
    user_id: str | None = None,
    feature_family_code: str | None = None,
    estimated_quantity: int | None = None,
    budget_id: str | None = None,
    idempotency_key: str | None = None,
) -> GateRequest:
    """Ask whether authorize would succeed, without a lease. Only the ``lease`` dialect has it.

    Raises:
        ConfigurationError: a value cannot be sent; the text names it.
    """
    body: dict[str, Any] = {"feature_code": _code(feature_code, "feature_code")}
    if feature_family_code is not None:
        body["feature_family_code"] = _code(feature_family_code, "feature_family_code")
    if estimated_quantity is not None:
        body["estimated_quantity_minor"] = _quantity(estimated_quantity, "estimated_quantity", least=0)
    if budget_id is not None:
        body["budget"] = header_value(budget_id, "budget_id")
    return _post("preflight", _encode(body), idempotency_key, principal_id, user_id)


def commit_request(
    *,
    lease: Lease,
    principal_id: str,
    quantity: int,
    user_id: str | None = None,
    meters: Meters = (),
    labels: Labels | None = None,
    idempotency_key: str | None = None,
) -> GateRequest:
    """Report what was used under a lease, in the dialect in which the lease came.

    Args:
        lease: what authorize returned; its feature code is sent.
        principal_id: the customer for whom the lease was given.
        quantity: total, tokens, > 0; counts against quotas and prices the primary meter where ``meters`` is empty.
        user_id: as on authorize.
        meters: the split by price. Sorted by code, each meter once (added up), zero lines left out: the gate refuses
            a zero line and deadlocks on differing orders (contract 1.7).
        labels: kept with the rating and readable later.
        idempotency_key: generated when None.

    Raises:
        ConfigurationError: a value cannot be sent; the text names it.
    """
    body = _commit_body(lease, quantity, meters, labels)
    return _post("commit", _encode(body), idempotency_key, principal_id, user_id)


def commit_batch_request(
    *,
    items: Sequence[BatchCommit],
    principal_id: str,
    user_id: str | None = None,
    idempotency_key: str | None = None,
) -> GateRequest:
    """Report several commits of one (principal, user) at once. Read the warnings of ``BatchResult`` first.

    Raises:
        ConfigurationError: there is no item, or a value cannot be sent; the text names it.
    """
    if not items:
        raise ConfigurationError("items is empty; pass at least one BatchCommit.")
    body = {
        "items": [
            {
                "idempotency_key": header_value(item.idempotency_key, "idempotency_key", limit=MAX_IDEMPOTENCY_KEY),
                **_commit_body(item.lease, item.quantity, item.meters, item.labels),
            }
            for item in items
        ]
    }
    return _post("commit_batch", _encode(body), idempotency_key, principal_id, user_id)


def cancel_request(
    *, lease: Lease, principal_id: str, user_id: str | None = None, idempotency_key: str | None = None
) -> GateRequest:
    """End a lease whose work failed. Only the ``lease_token`` dialect has it: elsewhere a lease lapses by itself.

    Raises:
        ConfigurationError: the lease came in the ``lease`` dialect, or an id cannot be sent.
    """
    if lease.dialect != "lease_token":
        raise ConfigurationError("This gate has no cancel: a lease of its dialect lapses by itself, so send nothing.")
    return _post("cancel", _encode({"lease_token": lease.token}), idempotency_key, principal_id, user_id)


def ingest_request(
    *,
    principal_id: str,
    feature_code: str,
    quantity: int | None = None,
    user_id: str | None = None,
    meters: Meters = (),
    occurred_at: datetime | None = None,
    budget_id: str | None = None,
    labels: Labels | None = None,
    idempotency_key: str | None = None,
    dialect: Dialect | None = None,
) -> GateRequest:
    """Book usage without a lease: charged at once, no check of credit or quota, not counted against quotas.

    Args:
        principal_id: the customer who pays.
        feature_code: what was used.
        quantity: total, tokens, >= 0; may be None when ``meters`` has lines.
        user_id: the purse within the customer; the principal itself when None.
        meters: the split by price, as for a commit.
        occurred_at: when the usage happened; must carry a time zone.
        budget_id: a budget; a uuid where the gate speaks the ``lease_token`` dialect.
        labels: the only way to find this booking again (contract 13).
        idempotency_key: generated when None.
        dialect: as on authorize.

    Raises:
        ConfigurationError: there is neither a quantity nor a line, or a value cannot be sent; the text names it.
    """
    lines = _lines(meters)
    if quantity is None and not lines:
        raise ConfigurationError("quantity is missing; pass the number of tokens, or meters with at least one line.")
    body: dict[str, Any] = {"feature_code": _code(feature_code, "feature_code")}
    if quantity is not None:
        body["quantity_minor"] = _quantity(quantity, "quantity", least=0)
    if lines:
        body["meters"] = lines
    if occurred_at is not None:
        body["occurred_at"] = instant(occurred_at, "occurred_at")
    _add_budget(body, budget_id, dialect, happened=True)
    _add_labels(body, labels)
    return _post("ingest", _encode(body), idempotency_key, principal_id, user_id)


def issue_token_request(
    *,
    principal_id: str,
    user_id: str | None = None,
    scopes: Iterable[str] | None = None,
    ttl_seconds: int | None = None,
    traits: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> GateRequest:
    """Ask for an end-user token.

    Such a token opens the whole API to its holder (gate contract 3.4): never hand one out where end users can reach
    the gate. ``ttl_seconds`` is clamped to 60 to 3600 by the gate; 900 when None.

    Raises:
        ConfigurationError: a value cannot be sent; the text names it.
    """
    principal = header_value(principal_id, "principal_id")
    user = principal if user_id is None else header_value(user_id, "user_id")
    body: dict[str, Any] = {"principal_id": principal, "user_id": user}
    if scopes is not None:
        body["scopes"] = sorted(set(scopes))
    if ttl_seconds is not None:
        body["session_ttl_sec"] = int(ttl_seconds)
    if traits is not None:
        body["traits"] = dict(sorted(traits.items()))
    return _post("issue_token", _encode(body), idempotency_key, principal, user)


def _post(
    kind: RequestKind, body: bytes, idempotency_key: str | None, principal_id: str, user_id: str | None
) -> GateRequest:
    principal = header_value(principal_id, "principal_id")
    key = new_key(kind) if idempotency_key is None else idempotency_key
    return GateRequest(
        kind,
        "POST",
        POST_PATHS[kind],
        body,
        header_value(key, "idempotency_key", limit=MAX_IDEMPOTENCY_KEY),
        principal,
        principal if user_id is None else header_value(user_id, "user_id"),
    )


def _encode(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode("ascii")


def _commit_body(lease: Lease, quantity: int, meters: Meters, labels: Labels | None) -> dict[str, Any]:
    member = "lease_token" if lease.dialect == "lease_token" else "lease"
    body: dict[str, Any] = {
        member: lease.token,
        "feature_code": _code(lease.feature_code, "feature_code"),
        "quantity_minor": _quantity(quantity, "quantity", least=1),
    }
    lines = _lines(meters, client_price=lease.dialect == "lease_token")
    if lines:
        body["meters"] = lines
    _add_labels(body, labels)
    return body


def _lines(meters: Meters, *, client_price: bool = True) -> list[dict[str, Any]]:
    if isinstance(meters, Mapping):
        meters = [MeterLine(code, quantity) for code, quantity in meters.items()]
    merged: dict[str, dict[str, Any]] = {}
    totals: dict[str, int] = {}
    for line in sorted(meters, key=lambda line: line.meter_code):
        code = _code(line.meter_code, "meter_code")
        _quantity(line.quantity, f"quantity of meter {code}", least=0)
        totals[code] = totals.get(code, 0) + line.quantity
        entry = merged.setdefault(code, {"meter_code": code, "quantity_minor": ""})
        if line.unit is not None:
            entry["unit"] = line.unit
        if client_price and line.client_unit_price_xusd is not None:
            entry["client_unit_price_xusd"] = str(line.client_unit_price_xusd)
        if line.client_pricing_etag is not None:
            entry["client_pricing_etag"] = line.client_pricing_etag
    for code, entry in merged.items():
        entry["quantity_minor"] = str(totals[code])
    return [entry for code, entry in merged.items() if totals[code]]


def _add_labels(body: dict[str, Any], labels: Labels | None) -> None:
    if labels:
        kept = {str(name): str(labels[name]) for name in sorted(labels) if labels[name] not in (None, "")}
        if kept:
            body["labels"] = kept


def _add_budget(
    body: dict[str, Any], budget_id: str | None, dialect: Dialect | None, *, happened: bool = False
) -> None:
    """Name the budget in both dialects at once: each ignores the other's member.

    Before the work, a reference that is no uuid still goes out as ``budget_id`` too, so that a gate of the
    ``lease_token`` dialect refuses it aloud instead of letting the call run without its budget. Usage that has
    ``happened`` is worth more than its budget, which that dialect only notes: there it is left out.
    """
    if budget_id is None:
        return
    header_value(budget_id, "budget_id")
    is_uuid = _is_uuid(budget_id)
    if not is_uuid and dialect == "lease_token" and not happened:
        raise ConfigurationError(
            f"budget_id must be a uuid at this gate, not {budget_id!r}; use the id that the gate gave the budget."
        )
    if is_uuid or not happened:
        body["budget_id"] = budget_id
    body["budget"] = budget_id


def _is_uuid(value: str) -> bool:
    try:
        return str(uuid.UUID(value)) == value.lower()
    except ValueError:
        return False


def _code(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"{what} is empty; name the feature or meter as it is known to the gate.")
    return value


def _quantity(value: object, what: str, *, least: int) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(f"{what} must be an integer number of tokens, not {value!r}; round it first.")
    if value < least:
        raise ConfigurationError(f"{what} must be at least {least}, not {value}; leave the call out or correct it.")
    return str(value)


def instant(value: datetime, what: str) -> str:
    """A time as the gate reads it; raises `ConfigurationError` where it has no time zone."""
    if value.tzinfo is None:
        raise ConfigurationError(f"{what} has no time zone; use datetime.now(timezone.utc) or attach one.")
    return value.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
