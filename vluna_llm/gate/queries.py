"""What is read of the gate: quotas, prices, purses and its books, as requests without a body.

The query is encoded here and never again: what is signed is what is sent (gate contract 3.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from urllib.parse import quote, urlencode

from ..errors import ConfigurationError
from .credentials import header_value
from .requests import GateRequest, RequestKind, instant


def limits_request(
    *,
    principal_id: str,
    user_id: str | None = None,
    feature_code: str | Iterable[str] | None = None,
    feature_family_code: str | Iterable[str] | None = None,
    expand: Iterable[str] = ("quotas", "rates"),
    as_of: datetime | None = None,
) -> GateRequest:
    """Ask for quotas and rates, the only place that tells when a used-up quota starts anew (contract 7.9)."""
    query = {
        "feature_code": _comma(feature_code),
        "feature_family_code": _comma(feature_family_code),
        "expand": _comma(expand),
        "as_of": None if as_of is None else instant(as_of, "as_of"),
    }
    return _get("limits", "/gate/limits", query, principal_id, user_id)


def meters_request(
    *,
    principal_id: str,
    user_id: str | None = None,
    meter_code: str | Iterable[str] | None = None,
    feature_code: str | Iterable[str] | None = None,
    feature_family_code: str | Iterable[str] | None = None,
    expand: Iterable[str] = ("pricing",),
    coverage_profile: str | None = None,
    coverage_basis: str | None = None,
    coverage_budget_id: str | None = None,
    coverage_as_of: datetime | None = None,
) -> GateRequest:
    """Ask for meters with ``expand`` of pricing, coverage, limits, limits.quotas, limits.rates (contract 7.10)."""
    query = {
        "meter_code": _comma(meter_code),
        "feature_code": _comma(feature_code),
        "feature_family_code": _comma(feature_family_code),
        "expand": _comma(expand),
        "coverage_profile": coverage_profile,
        "coverage_basis": coverage_basis,
        "coverage_budget_id": coverage_budget_id,
        "coverage_as_of": None if coverage_as_of is None else instant(coverage_as_of, "coverage_as_of"),
    }
    return _get("meters", "/gate/meters", query, principal_id, user_id)


def wallet_balance_request(
    *, principal_id: str, user_id: str | None = None, refresh_grants: bool = False
) -> GateRequest:
    """Ask for the grants of one (principal, user)."""
    query = {"refresh_grants": "true" if refresh_grants else None}
    return _get("wallet_balance", "/wallet/balance", query, principal_id, user_id)


def ratings_request(
    *,
    principal_id: str,
    user_id: str | None = None,
    source_ref: str | None = None,
    lease_id: str | None = None,
    billing_account_id: str | None = None,
    billing_user_id: str | None = None,
    feature_code: str | None = None,
    meter_code: str | None = None,
    rating_kind: str | None = None,
    budget_id: str | None = None,
    rated_after: datetime | None = None,
    rated_before: datetime | None = None,
    limit: int = 200,
    cursor: str | None = None,
) -> GateRequest:
    """List ratings: every commit and ingest that the gate recorded, charged or not (contract 7.11).

    ``lease_id`` is short for the ``source_ref`` of a commit. Do not page with ``cursor``: the gate skips a row per
    page; narrow the time window instead so that at most ``limit`` (200) rows match.

    Raises:
        ConfigurationError: ``limit`` is not within 1 to 200, or a value cannot be sent.
    """
    if lease_id is not None:
        source_ref = f"gate_lease:{lease_id}"
    query = {
        "source_ref": source_ref,
        "billing_account_id": billing_account_id,
        "billing_user_id": billing_user_id,
        "feature_code": feature_code,
        "meter_code": meter_code,
        "rating_kind": rating_kind,
        "budget_id": budget_id,
        "rated_after": None if rated_after is None else instant(rated_after, "rated_after"),
        "rated_before": None if rated_before is None else instant(rated_before, "rated_before"),
        "limit": _page_size(limit),
        "cursor": cursor,
    }
    return _get("ratings", "/ops/ratings", query, principal_id, user_id, admin=True)


def rating_request(*, principal_id: str, rating_id: str, user_id: str | None = None, lines: bool = True) -> GateRequest:
    """Look up one rating; its id is the commit id. ``lines`` adds its lines."""
    path = f"/ops/ratings/{quote(header_value(rating_id, 'rating_id'), safe='')}"
    query = {"expand": "rated_records" if lines else None}
    return _get("rating", path, query, principal_id, user_id, admin=True)


def allocations_request(
    *,
    principal_id: str,
    user_id: str | None = None,
    rating_id: str | None = None,
    billing_account_id: str | None = None,
    limit: int = 200,
    cursor: str | None = None,
) -> GateRequest:
    """List what was really charged; a rating without any allocation charged nothing (contract 13).

    Raises:
        ConfigurationError: ``limit`` is not within 1 to 200, or a value cannot be sent.
    """
    query = {
        "rating_id": rating_id,
        "billing_account_id": billing_account_id,
        "limit": _page_size(limit),
        "cursor": cursor,
    }
    return _get("allocations", "/ops/allocations", query, principal_id, user_id, admin=True)


def _get(
    kind: RequestKind,
    path: str,
    query: Mapping[str, str | None],
    principal_id: str,
    user_id: str | None,
    *,
    admin: bool = False,
) -> GateRequest:
    principal = header_value(principal_id, "principal_id")
    user = principal if user_id is None else header_value(user_id, "user_id")
    # Signed exactly as sent, so the encoding is done here and never again (contract 3.2).
    text = urlencode([(name, value) for name, value in query.items() if value], quote_via=quote, safe=",:")
    return GateRequest(kind, "GET", f"{path}?{text}" if text else path, b"", "", principal, user, admin)


def _comma(value: str | Iterable[str] | None) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    return ",".join(value) or None


def _page_size(limit: int) -> str:
    if not 1 <= limit <= 200:
        raise ConfigurationError(f"limit must be within 1 and 200, not {limit}; narrow the time window instead.")
    return str(limit)
