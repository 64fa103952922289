"""Commits, single and in batches (gate contract 7.5, 7.7 and 9)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import budgets, catalogue, fields, leases, quotas, rating, rendering
from .problems import DatabaseFault, Refusal, conflict, invalid, missing
from .rating import AskedLine
from .records import Account, Booking, Lease, Rating, User
from .world import World, new_fingerprint, new_id

Hints = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A commit request, read and checked."""

    feature_code: str
    quantity: int
    lease: str
    suffix: str | None
    lines: tuple[AskedLine, ...]
    labels: dict[str, str]

    def fingerprint(self) -> str:
        lines = [[line.meter, line.quantity] for line in self.lines]
        return json.dumps([self.feature_code, self.quantity, self.lease, lines, self.labels], sort_keys=True)


def commit(
    world: World, account: Account, user: User, key: str, body: Any, *, close: bool = True
) -> tuple[dict[str, Any], Hints]:
    """Book what was used on a lease; returns data and hints.

    A lease that is closed or past its grace, and a line that cannot be billed, quarantine the whole commit: the
    amount is shown and nothing is charged (gate contract 9.1). ``close`` False is what a batch does: the lease
    stays active.
    """
    asked = _read(world, body)
    feature = catalogue.usable_feature(world, account, asked.feature_code, None)
    lease = _lease_of(world, account, user, asked)
    scope = (account.realm_id, lease.lease_id, key)
    known = world.store.bookings.get(*scope)
    fingerprint = asked.fingerprint()
    if known is not None:
        if known.fingerprint != fingerprint:
            raise conflict()
        return known.data, list(known.hints)
    if lease.feature != feature.code:
        raise Refusal(422, "WRITE.INVALID_PAYLOAD", "feature mismatch for lease")
    if asked.suffix is not None and not lease.token.endswith("." + asked.suffix):
        raise Refusal(422, "WRITE.INVALID_PAYLOAD", "invalid lease token")
    if asked.quantity > fields.MAX_INT64:
        raise DatabaseFault(f'value "{asked.quantity}" is out of range for type bigint')

    now = world.now()
    first, reasons, quarantined = _lease_verdict(world, lease, now)
    asked_lines = asked.lines or (AskedLine(feature.code, asked.quantity),)
    not_allowed = []
    for line in asked_lines:
        if line.meter not in feature.meters and world.options.auto_registry:
            feature = catalogue.register_meter(world, account.realm_id, feature, line.meter)
        if not catalogue.is_billable(world, account.realm_id, feature, line.meter):
            not_allowed.append(line.meter)
    not_allowed = list(dict.fromkeys(not_allowed))
    if not_allowed and world.options.dialect == "lease":
        raise invalid(f"meter_not_allowed_for_feature: {', '.join(not_allowed)}")
    rated = rating.rate(
        world,
        account,
        user,
        feature,
        asked_lines,
        not_allowed,
        unit=quotas.unit_of(world, account, feature.code),
    )
    unpriced = [meter for meter in rated.unpriced if meter not in not_allowed]
    middle: Hints = []
    if not_allowed:
        reasons.append("meter_not_allowed_for_feature")
        middle.append({"type": "feature.meter_not_allowed", "feature_code": feature.code, "meters": not_allowed})
    middle += rated.contract_hints
    if unpriced:
        reasons.append("pricing_not_configured")
        middle.append({"type": "pricing.not_configured", "feature_code": feature.code, "meters": unpriced})
    quarantined = quarantined or bool(not_allowed or unpriced)

    quota_hints: Hints = []
    budget = None
    short: Hints = []
    low: Hints = []
    allocations: Sequence[Any] = ()
    if not quarantined:
        left = quotas.room(world, account, user, feature.code, lease.windows)
        if left is not None and asked.quantity > left:
            quota_hints = [{"type": "quota.remaining", "max_quantity_minor": left}]
        quotas.consume(world, account, user, feature.code, lease.windows, asked.quantity)
        if lease.budget_id is not None:
            budget = world.store.budgets.get(lease.budget_id)
            if budget is None or budget.status != "active":
                raise missing("budget not found or inactive")
            budget, reason, short, low = budgets.spend(world, budget, rated.amount_xusd)
            reasons.append(reason)
        allocations = rating.fund(world, user, rated.amount_xusd)
        if any(part.grant_kind == "fallback" for part in allocations):
            reasons.append("cash_funding_applied")
    if close:
        world.store.leases.put(account.realm_id, lease.lease_id, replace(lease, state="closed"))
    done = Rating(
        rating_id=new_id(),
        realm_id=account.realm_id,
        account_id=account.account_id,
        billing_user_id=user.billing_user_id,
        principal_id=account.principal_id,
        user_id=user.user_id,
        kind="gate",
        feature=feature.code,
        quantity=asked.quantity,
        amount_xusd=rated.amount_xusd,
        cost_xusd=rated.cost_xusd,
        applied=not quarantined,
        reason_codes=tuple(reasons),
        lines=rated.lines,
        allocations=tuple(allocations),
        labels=asked.labels,
        rated_at=now,
        created_at=now,
        idempotency_key=key,
        idempotency_id=new_id(),
        pricing_fingerprint=new_fingerprint(),
        cost_fingerprint=new_fingerprint(),
        lease_id=lease.lease_id,
        budget_id=lease.budget_id,
        late=now > lease.expires_at,
    )
    rating.record(world, done)
    hints = [*first, *quota_hints, *middle, *short, *rated.changed_hints, *low]
    data = rendering.receipt(world, done, budget)
    world.store.bookings.put(*scope, Booking(fingerprint, done.rating_id, data, tuple(hints)))
    return data, hints


def commit_batch(world: World, account: Account, user: User, body: Any) -> dict[str, Any]:
    """Book several items in one database transaction without savepoints, with all that follows from that.

    A database error makes the later items fail and undoes the earlier ones, which stay reported as committed; leases
    stay active; hints are not shown. Raises 500 for an item without a key, as the real server does.
    """
    items = body.get("items") if isinstance(body, dict) else None
    items = items if isinstance(items, list) else []
    strict = world.options.dialect == "lease"
    if strict and len(items) > 100:
        raise invalid("items must contain at most 100 items")
    results: list[dict[str, Any]] = []
    poisoned = False
    for index, item in enumerate(items):
        key = item.get("idempotency_key") if isinstance(item, dict) else None
        if not isinstance(key, str):
            raise DatabaseFault("an item has no idempotency_key")
        result: dict[str, Any] = {"index": index}
        if poisoned:
            details = "current transaction is aborted, commands ignored until end of transaction block"
            result |= {"status": "failed", "error": {"type": "SERVER.ERROR", "details": details}}
            results.append(result)
            continue
        try:
            if not key.strip():
                raise invalid("idempotency_key is required for each batch item")
            if strict and len(key) > 255:
                raise invalid("idempotency_key must be at most 255 characters")
            before = len(world.store.ratings)
            data, _ = commit(world, account, user, key, item, close=False)
            replayed = strict and len(world.store.ratings) == before
            result |= {"status": "duplicate" if replayed else "committed", "commit": data}
        except Refusal as refusal:
            status = "invalid" if refusal.status == 422 else "failed"
            result |= {"status": status, "error": {"type": refusal.code, "details": refusal.message}}
        except DatabaseFault as fault:
            poisoned = True
            result |= {"status": "failed", "error": {"type": "SERVER.ERROR", "details": str(fault)}}
        results.append(result)
    if poisoned:
        world.store.rollback()
    good = sum(1 for result in results if result["status"] in ("committed", "duplicate"))
    return {"items": results, "committed_count": good, "failed_count": len(results) - good}


def read_lines(value: Any, prefix: str) -> tuple[AskedLine, ...]:
    """The ``meters`` of a request. Anything but a list is ignored, as the real server does. Raises 422."""
    if not isinstance(value, list):
        return ()
    lines = []
    for item in value:
        item = item if isinstance(item, dict) else {}
        raw = item.get("meter_code")
        if raw is None or raw == "":
            raise invalid(f"{prefix}[].meter_code is required")
        meter = fields.code(raw, "meter_code")
        amount = fields.quantity(item.get("quantity_minor"), f"{prefix}[].quantity_minor", positive=True)
        price = item.get("client_unit_price_xusd")
        etag = item.get("client_pricing_etag")
        lines.append(
            AskedLine(
                meter,
                amount,
                None if price is None else fields.number(price),
                etag if isinstance(etag, str) and etag else None,
            )
        )
    return tuple(lines)


def _read(world: World, body: Any) -> _Asked:
    body = body if isinstance(body, dict) else {}
    feature_code = fields.code(body.get("feature_code"), "feature_code")
    quantity = fields.quantity(body.get("quantity_minor"), "quantity_minor", positive=True)
    suffix: str | None = None
    if world.options.dialect == "lease":
        given = leases.external_reference(body.get("lease"), "lease")
        if given is None:
            raise invalid("lease is required")
        lease = given
    else:
        lease, suffix = leases.split_token(body.get("lease_token"))
    labels = fields.labels(body.get("labels"))
    return _Asked(feature_code, quantity, lease, suffix, read_lines(body.get("meters"), "items"), labels)


def _lease_of(world: World, account: Account, user: User, asked: _Asked) -> Lease:
    if world.options.dialect == "lease":
        lease_id = world.store.lease_tokens.get(user.billing_user_id, asked.lease)
        if lease_id is None:
            raise missing("lease not found")
        return leases.find_lease(world, account, user, lease_id)
    return leases.find_lease(world, account, user, asked.lease)


def _lease_verdict(world: World, lease: Lease, now: int) -> tuple[Hints, list[str], bool]:
    """Hints, reason codes and whether the state or age of the lease quarantines the commit."""
    hints: Hints = []
    reasons: list[str] = []
    quarantined = False
    if lease.state != "active":
        hints.append({"type": "lease.closed_at_commit", "state": lease.state})
        reasons.append("lease_closed_at_commit")
        quarantined = True
    late = now - lease.expires_at
    if late > 0:
        exceeded = late > world.options.grace_ms
        hints.append(
            {
                "type": "lease.expired",
                "expires_at": fields.iso(lease.expires_at),
                "delta_ms": late,
                "grace_ms": world.options.grace_ms,
                "exceeded_grace": exceeded,
            }
        )
        reasons.append("late_commit")
        if exceeded:
            reasons.append("late_commit_exceeded")
            quarantined = True
    return hints, reasons, quarantined
