"""Reading back what was booked: ops/ratings, ops/rated-records, ops/allocations (gate contract 7.11).

The lists are empty unless ``X-Realm-Admin: true`` is sent, and following ``next_cursor`` skips a row per page: both
are what the real server does.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from . import rendering
from .auth import Caller
from .fields import iso, parse_time
from .problems import Refusal
from .records import Allocation, Line, Rating
from .world import World

Query = Sequence[tuple[str, str]]
Page = tuple[list[dict[str, Any]], dict[str, Any]]
T = TypeVar("T")

_UNSET = "1970-01-01T00:00:00.000Z"


def ratings(world: World, caller: Caller, query: Query) -> Page:
    """Ratings of the realm, newest first."""
    chosen = _chosen(world, caller, query)
    return _page(query, chosen, lambda rating: rating, lambda rating: rating.rating_id, _rating_view)


def rating_by_id(world: World, caller: Caller, rating_id: str, query: Query) -> dict[str, Any]:
    """One rating, with its lines on ``expand=rated_records``. Raises 404."""
    found = [rating for rating in _visible(world, caller, query) if rating.rating_id == rating_id]
    if not found:
        raise Refusal(404, "RESOURCE.NOT_FOUND", "rating not found", bare=True)
    out = _rating_view(found[0])
    if "rated_records" in {word for name, value in query if name == "expand" for word in value.split(",")}:
        out["rated_records"] = [_record_view(found[0], line) for line in found[0].lines]
    return out


def rated_records(world: World, caller: Caller, query: Query) -> Page:
    """Lines of ratings, newest first."""
    meter = _one(query, "meter_code")
    rows = [
        (rating, line)
        for rating in _chosen(world, caller, query)
        for line in rating.lines
        if meter is None or line.meter == meter
    ]
    return _page(query, rows, lambda row: row[0], lambda row: row[1].line_id, lambda row: _record_view(*row))


def allocations(world: World, caller: Caller, query: Query) -> Page:
    """What was charged, one row per funding source, newest first; nothing for quarantined ratings."""
    rows = [
        (rating, part, index + 1)
        for rating in _chosen(world, caller, query)
        for index, part in enumerate(rating.allocations)
    ]
    return _page(query, rows, lambda row: row[0], lambda row: row[1].allocation_id, lambda row: _allocation_view(*row))


def _visible(world: World, caller: Caller, query: Query) -> list[Rating]:
    account_id = _one(query, "billing_account_id")
    if caller.is_bearer:
        if caller.account is None or account_id != caller.account.account_id:
            raise Refusal(403, "AUTH.INSUFFICIENT_SCOPE", "billing_account_id mismatch", bare=True)
    elif not caller.principal_id:
        raise Refusal(401, "AUTH.MISSING_SERVICE_BINDINGS", "principal_id or billing_account_id required")
    if not caller.is_admin:
        return []
    return [rating for rating in world.store.ratings.rows.values() if rating.realm_id == caller.realm_id]


def _chosen(world: World, caller: Caller, query: Query) -> list[Rating]:
    every = _visible(world, caller, query)
    rating_id = _one(query, "rating_id")
    if rating_id is not None:
        every = [rating for rating in every if rating.rating_id == rating_id]
    tests: list[Callable[[Rating], bool]] = []
    for name, attribute in (
        ("billing_account_id", "account_id"),
        ("billing_user_id", "billing_user_id"),
        ("feature_code", "feature"),
        ("rating_kind", "kind"),
        ("budget_id", "budget_id"),
    ):
        value = _one(query, name)
        if value is not None:
            tests.append(lambda rating, a=attribute, v=value: getattr(rating, a) == v)  # type: ignore[misc]
    meter = _one(query, "meter_code")
    if meter is not None:
        tests.append(lambda rating: any(line.meter == meter for line in rating.lines))
    source = _one(query, "source_ref")
    if source is not None:
        tests.append(lambda rating: _source_ref(rating) == source)
    after, before = parse_time(_one(query, "rated_after")), parse_time(_one(query, "rated_before"))
    if after is not None:
        tests.append(lambda rating: rating.rated_at >= after)
    if before is not None:
        tests.append(lambda rating: rating.rated_at < before)
    # Newest first, also among those of one millisecond: the sort keeps the order of equals.
    kept = [rating for rating in reversed(every) if all(test(rating) for test in tests)]
    return sorted(kept, key=lambda rating: rating.rated_at, reverse=True)


def _page(
    query: Query,
    rows: list[T],
    rating_of: Callable[[T], Rating],
    id_of: Callable[[T], str],
    view: Callable[[T], dict[str, Any]],
) -> Page:
    try:
        limit = min(max(int(_one(query, "limit") or 50), 1), 200)
    except ValueError:
        limit = 50
    cursor = _one(query, "cursor")
    if cursor is not None:
        try:
            named = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))["id"]
        except (ValueError, KeyError, TypeError):
            raise Refusal(422, "VALIDATION.INVALID_INPUT", "invalid cursor") from None
        places = [index for index, row in enumerate(rows) if id_of(row) == named]
        # As on the real server, the row that a cursor points to is lost: it ends no page and starts none.
        rows = rows[places[0] + 1 :] if places else []
    more = len(rows) > limit
    following = None
    if more:
        first = rows[limit]
        text = {"t": iso(rating_of(first).rated_at), "id": id_of(first), "sort_by": "rated_at", "sort_order": "desc"}
        following = base64.urlsafe_b64encode(json.dumps(text, separators=(",", ":")).encode()).rstrip(b"=").decode()
    return [view(row) for row in rows[:limit]], {"next_cursor": following, "has_more": more, "limit": limit}


def _rating_view(rating: Rating) -> dict[str, Any]:
    cost = _aggregate(rating, [line.cost.unit_xusd for line in rating.lines], rating.cost_xusd, rating.cost_fingerprint)
    price = _aggregate(
        rating, [line.price.unit_xusd for line in rating.lines], rating.amount_xusd, rating.pricing_fingerprint
    )
    metadata: dict[str, Any] = {"labels": rating.labels} if rating.labels else {}
    if rating.kind == "ingest":
        metadata |= {
            "backfill": False,
            "commit_kind": "ingest",
            "occurred_at": iso(rating.rated_at),
            "occurred_at_source": "client" if rating.client_dated else "server_default",
            "system_recorded_at": iso(rating.created_at),
        }
    else:
        metadata |= {"lease_id": rating.lease_id, "late_commit": rating.late}
    metadata |= {
        "feature_code": rating.feature,
        "reason_codes": list(rating.reason_codes),
        "application_status": "applied" if rating.applied else "quarantined",
        "aggregate_cost_snapshot": cost,
        "aggregate_pricing_snapshot": price,
    }
    return {
        "rating_id": rating.rating_id,
        "realm_id": rating.realm_id,
        "billing_account_id": rating.account_id,
        "billing_user_id": rating.billing_user_id,
        "rating_kind": rating.kind,
        "idempotency_id": rating.idempotency_id,
        "source_ref": _source_ref(rating),
        "budget_id": rating.budget_id,
        "feature_code": rating.feature,
        "direction": "debit",
        "reversal_of_rating_id": None,
        "canonical_quantity_minor": str(rating.quantity),
        "canonical_amount_xusd": str(rating.amount_xusd),
        "canonical_cost_xusd": str(rating.cost_xusd),
        "pricing_fingerprint": rating.pricing_fingerprint,
        "pricing_cost_fingerprint": rating.cost_fingerprint,
        "cost_snapshot": cost,
        "cost_fingerprint": rating.cost_fingerprint,
        "metadata": metadata,
        "rated_at": iso(rating.rated_at),
        "created_at": iso(rating.created_at),
    }


def _aggregate(rating: Rating, units: list[int], total: int, fingerprint: str) -> dict[str, Any]:
    """The snapshot over all lines: its unit price is the average, rounded down."""
    counted = sum(line.quantity for line in rating.lines)
    unit_price = units[0] if len(units) == 1 else (total // counted if counted else 0)
    return {
        "unit": rating.lines[0].unit,
        "rounding": "floor",
        "provenance": {
            "inputs": {"items": sorted(line.meter for line in rating.lines), "feature_code": rating.feature},
            "source": "aggregate",
        },
        "computed_at": iso(rating.created_at),
        "fingerprint": fingerprint,
        "effective_at": iso(max(line.price.effective_at for line in rating.lines)),
        "unit_price_xusd": str(unit_price),
        "unit_quantity_minor": "1",
    }


def _record_view(rating: Rating, line: Line) -> dict[str, Any]:
    metadata: dict[str, Any] = {"labels": rating.labels} if rating.labels else {}
    if rating.lease_id is not None:
        metadata["lease_id"] = rating.lease_id
    metadata["feature_code"] = rating.feature
    return {
        "rated_record_id": line.line_id,
        "rating_id": rating.rating_id,
        "billing_account_id": rating.account_id,
        "billing_user_id": rating.billing_user_id,
        **rendering.line_a(rating.feature, line, with_id=False),
        "unit_quantity_minor": str(line.price.unit_quantity),
        "rounding": line.price.rounding,
        "metadata": metadata,
        "created_at": iso(rating.created_at),
    }


def _allocation_view(rating: Rating, part: Allocation, seq: int) -> dict[str, Any]:
    share = rating.cost_xusd * part.amount_xusd // rating.amount_xusd if rating.amount_xusd else 0
    sources = [
        {
            "kind": "grant",
            "grant_id": other.grant_id,
            "alloc_seq": index + 1,
            "allocated_xusd": str(other.amount_xusd),
        }
        for index, other in enumerate(rating.allocations)
    ]
    return {
        "allocation_id": part.allocation_id,
        "realm_id": rating.realm_id,
        "rating_id": rating.rating_id,
        "direction": "debit",
        "billing_account_id": rating.account_id,
        "billing_user_id": rating.billing_user_id,
        "budget_id": rating.budget_id,
        "feature_code": rating.feature,
        "grant_id": part.grant_id,
        "funding_kind": "grant",
        "allocated_xusd": str(part.amount_xusd),
        "alloc_seq": seq,
        "reversal_of_allocation_id": None,
        "application_status": "applied",
        "reason_codes": list(rating.reason_codes),
        "late_rating": rating.late,
        "amount_xusd": str(rating.amount_xusd),
        "cost_xusd": str(rating.cost_xusd),
        "pricing_fingerprint": rating.pricing_fingerprint,
        "cost_fingerprint": rating.cost_fingerprint,
        "rated_at": iso(rating.rated_at),
        "applied_quantity_minor": str(rating.quantity),
        "applied_amount_xusd": str(part.amount_xusd),
        "applied_cost_xusd": str(share),
        "usage_started_at": _UNSET,
        "usage_finished_at": _UNSET,
        "decided_at": iso(rating.created_at),
        "settlement_scope_kind": None,
        "settlement_scope_key": None,
        "settlement_batch_id": None,
        "engine": "inline",
        "engine_run_id": None,
        "settlement_state": "settled" if part.settled else "pending",
        "entry_id": None,
        "entry_ref": None,
        "entry_amount_xusd": None,
        "entry_reason": None,
        "settled_at": iso(rating.created_at) if part.settled else _UNSET,
        "error_code": None,
        "error_message": None,
        "metadata": {
            "cost": {"applied_xusd": str(share), "canonical_xusd": str(rating.cost_xusd)},
            "funding": {"sources": sources, "grant_coverage_xusd": str(rating.charged_xusd)},
        },
        "created_at": iso(rating.created_at),
        "updated_at": iso(rating.created_at),
    }


def _source_ref(rating: Rating) -> str | None:
    return None if rating.lease_id is None else f"gate_lease:{rating.lease_id}"


def _one(query: Query, name: str) -> str | None:
    return next((value for key, value in query if key == name and value), None)
