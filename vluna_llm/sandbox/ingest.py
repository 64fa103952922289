"""Ingest: usage that is charged at once, without a lease (gate contract 7.8)."""

from __future__ import annotations

import json
from typing import Any

from . import budgets, catalogue, fields, rating, rendering
from .commits import read_lines
from .problems import DatabaseFault, conflict, invalid
from .rating import AskedLine
from .records import Account, Booking, Budget, Rating, User
from .world import World, new_fingerprint, new_id

Hints = list[dict[str, Any]]


def ingest(world: World, account: Account, user: User, key: str, body: Any) -> tuple[dict[str, Any], Hints]:
    """Charge what is reported: no lease, no credit, quota or rate check, never quarantined.

    Lines without a price are booked with 0 and tell it by ``provenance.source`` alone.
    """
    body = body if isinstance(body, dict) else {}
    feature_code = fields.code(body.get("feature_code"), "feature_code")
    given = body.get("quantity_minor")
    lines = read_lines(body.get("meters"), "meters")
    if given is None and not lines:
        raise invalid("quantity_minor or meters[] is required")
    quantity = (
        sum(line.quantity for line in lines)
        if given is None
        else fields.quantity(given, "quantity_minor", positive=False)
    )
    now = world.now()
    occurred_at, client_dated = now, False
    if body.get("occurred_at") is not None:
        moment = fields.parse_time(body["occurred_at"])
        if moment is None:
            raise invalid("occurred_at must be a valid date-time")
        occurred_at, client_dated = moment, True
    labels = fields.labels(body.get("labels"))
    name, budget_id, budget = _budget(world, account, body)
    feature = catalogue.usable_feature(world, account, feature_code, _family(body))

    fingerprint = json.dumps(
        [
            feature_code,
            quantity,
            [[line.meter, line.quantity] for line in lines],
            occurred_at if client_dated else None,
            name,
            labels,
        ],
        sort_keys=True,
    )
    scope = (account.realm_id, user.billing_user_id, "ingest", key)
    known = world.store.bookings.get(*scope)
    if known is not None:
        if known.fingerprint != fingerprint:
            raise conflict()
        return known.data, list(known.hints)
    if quantity > fields.MAX_INT64:
        raise DatabaseFault(f'value "{quantity}" is out of range for type bigint')

    asked_lines = lines or (AskedLine(feature.code, quantity),)
    not_allowed = []
    for line in asked_lines:
        if line.meter not in feature.meters and world.options.auto_registry:
            feature = catalogue.register_meter(world, account.realm_id, feature, line.meter)
        if not catalogue.is_billable(world, account.realm_id, feature, line.meter):
            not_allowed.append(line.meter)
    if not_allowed:
        raise invalid(f"meter_not_allowed_for_feature: {', '.join(dict.fromkeys(not_allowed))}")
    rated = rating.rate(world, account, user, feature, asked_lines)
    reasons = ["ingest"]
    if rated.unpriced:
        reasons.append("pricing_not_configured")
    budget_hints: Hints = []
    if budget is not None:
        budget, reason, short, low = budgets.spend(world, budget, rated.amount_xusd)
        reasons.append(reason)
        budget_hints = [*short, *low]
    allocations = rating.fund(world, user, rated.amount_xusd)
    if any(part.grant_kind == "fallback" for part in allocations):
        reasons.append("cash_funding_applied")
    done = Rating(
        rating_id=new_id(),
        realm_id=account.realm_id,
        account_id=account.account_id,
        billing_user_id=user.billing_user_id,
        principal_id=account.principal_id,
        user_id=user.user_id,
        kind="ingest",
        feature=feature.code,
        quantity=quantity,
        amount_xusd=rated.amount_xusd,
        cost_xusd=rated.cost_xusd,
        applied=True,
        reason_codes=tuple(reasons),
        lines=rated.lines,
        allocations=allocations,
        labels=labels,
        rated_at=occurred_at,
        created_at=now,
        idempotency_key=key,
        idempotency_id=new_id(),
        pricing_fingerprint=new_fingerprint(),
        cost_fingerprint=new_fingerprint(),
        budget_id=budget_id,
        client_dated=client_dated,
    )
    rating.record(world, done)
    hints = [*rated.contract_hints, *budget_hints]
    data = rendering.receipt(world, done, budget)
    world.store.bookings.put(*scope, Booking(fingerprint, done.rating_id, data, tuple(hints)))
    return data, hints


def _budget(world: World, account: Account, body: dict[str, Any]) -> tuple[Any, str | None, Budget | None]:
    """What was named, the id that the answer shows, and the budget where it is charged: dialect A only notes it."""
    if world.options.dialect == "lease":
        name = body.get("budget")
        if name is None:
            return None, None, None
        budget = budgets.resolve(world, account, name)
        return name, budget.budget_id, budget
    name = body.get("budget_id")
    if name is None:
        return None, None, None
    if not isinstance(name, str) or not fields.is_uuid(name):
        raise invalid("invalid budget_id")
    return name, name, None


def _family(body: dict[str, Any]) -> str | None:
    family = body.get("feature_family_code")
    return fields.code(family, "feature_family_code") if isinstance(family, str) and family.strip() else None
