"""Leases: authorize, preflight and cancel (gate contract 7.4, 7.6 and 14)."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from typing import Any

from . import budgets, catalogue, fields, money, quotas
from .problems import DatabaseFault, Refusal, conflict, invalid, missing, out_of_range
from .records import Account, Feature, Lease, User, Window
from .world import World, new_id

Hints = list[dict[str, Any]]


def authorize(world: World, account: Account, user: User, key: str, body: Any) -> tuple[dict[str, Any], Hints]:
    """Decide in the order of gate contract 7.4 and hand out a lease. Returns data and hints; reserves nothing."""
    asked = _Asked(world, body)
    feature = catalogue.usable_feature(world, account, asked.feature_code, asked.family_code)
    broke = _check_credit(world, account, user, feature)
    fingerprint = asked.fingerprint()
    known = world.store.lease_keys.get(user.billing_user_id, key)
    if known is not None:
        lease = world.store.leases.rows[(account.realm_id, known)]
        if lease.fingerprint != fingerprint:
            raise conflict()
        return _lease_data(world, lease), list(lease.hints)
    windows, cap, hints = _decide(world, account, user, feature, asked, broke)
    now = world.now()
    lease_id = new_id()
    if world.options.dialect == "lease":
        token = asked.lease or f"lease_{secrets.token_hex(16)}"
        if world.store.lease_tokens.get(user.billing_user_id, token) is not None:
            raise Refusal(409, "WRITE.INVALID_PAYLOAD", "lease already exists")
    else:
        token = f"lease.{lease_id}.{secrets.token_hex(8)}"
    lease = Lease(
        lease_id=lease_id,
        token=token,
        realm_id=account.realm_id,
        account_id=account.account_id,
        billing_user_id=user.billing_user_id,
        feature=feature.code,
        family=feature.family,
        cap=cap,
        created_at=now,
        expires_at=now + round(world.options.lease_ttl_seconds * 1000),
        fingerprint=fingerprint,
        windows=windows,
        budget_id=asked.budget_id,
        hints=tuple(hints),
        labels=asked.labels,
    )
    world.store.leases.put(account.realm_id, lease_id, lease)
    world.store.lease_keys.put(user.billing_user_id, key, lease_id)
    world.store.lease_tokens.put(user.billing_user_id, token, lease_id)
    return _lease_data(world, lease), hints


def preflight(world: World, account: Account, user: User, body: Any) -> tuple[dict[str, Any], Hints]:
    """Dialect B: the decisions of authorize without a lease and without auto-registration.

    The caller rolls the transaction back, so that nothing is counted.
    """
    asked = _Asked(world, body)
    feature = catalogue.usable_feature(world, account, asked.feature_code, asked.family_code, register=False)
    broke = _check_credit(world, account, user, feature)
    windows, _, hints = _decide(world, account, user, feature, asked, broke)
    data: dict[str, Any] = {"as_of": fields.iso(world.now())}
    if asked.budget_id is not None:
        data["budget_id"] = asked.budget_id
    data |= _where(feature.code, feature.family, windows[0])
    return data, hints


def cancel(world: World, account: Account, user: User, body: Any) -> dict[str, Any]:
    """Close an active lease without a charge. Only the id in the token is looked at."""
    lease_id = split_token(body.get("lease_token") if isinstance(body, dict) else None)[0]
    lease = find_lease(world, account, user, lease_id)
    active = lease.state == "active"
    if active:
        world.store.leases.put(account.realm_id, lease.lease_id, replace(lease, state="canceled"))
    return {"cancelled": active, "released_cap": "0", "trace_id": f"cancel_{secrets.token_hex(4)}"}


def split_token(value: Any) -> tuple[str, str]:
    """Id and random part of a dialect A token. Raises 422 in the words of the real server."""
    if not isinstance(value, str) or not value.strip():
        raise invalid("lease_token is required")
    parts = value.strip().split(".")
    if len(parts) != 3 or parts[0] != "lease" or not parts[1] or not parts[2]:
        raise invalid("invalid lease token format")
    return parts[1], parts[2]


def find_lease(world: World, account: Account, user: User, lease_id: str) -> Lease:
    """The lease of this customer and user. An id that is no uuid is a database error on the real server."""
    if not fields.is_uuid(lease_id):
        raise DatabaseFault(f'invalid input syntax for type uuid: "{lease_id}"')
    lease = world.store.leases.get(account.realm_id, lease_id.lower())
    if lease is None or lease.account_id != account.account_id or lease.billing_user_id != user.billing_user_id:
        raise missing("lease not found")
    return lease


class _Asked:
    """The fields of an authorize or preflight request, read and checked."""

    def __init__(self, world: World, body: Any) -> None:
        body = body if isinstance(body, dict) else {}
        self.feature_code = fields.code(body.get("feature_code"), "feature_code")
        self.tells_estimate = body.get("estimated_quantity_minor") is not None
        self.estimate = fields.quantity(
            body.get("estimated_quantity_minor"), "estimated_quantity_minor", positive=False
        )
        if self.estimate > fields.MAX_INT64:
            raise out_of_range()
        family = body.get("feature_family_code")
        self.family_code = (
            fields.code(family, "feature_family_code") if isinstance(family, str) and family.strip() else None
        )
        self.labels = fields.labels(body.get("labels"))
        self.budget_id: str | None = None
        self.budget_name: Any = body.get("budget" if world.options.dialect == "lease" else "budget_id")
        self.lease: str | None = None
        if world.options.dialect == "lease":
            self.lease = external_reference(body.get("lease"), "lease")

    def fingerprint(self) -> str:
        return json.dumps(
            [self.feature_code, self.family_code, self.estimate, self.budget_name, self.lease, self.labels],
            sort_keys=True,
        )


def external_reference(value: Any, name: str) -> str | None:
    """Dialect B: a caller-owned reference of 1..255 characters without control characters; None when absent."""
    if value is None:
        return None
    if (
        not isinstance(value, str)
        or not value.strip()
        or len(value) > 255
        or any(c < " " or c == "\x7f" for c in value)
    ):
        raise invalid(f"{name} must be 1..255 characters without control characters")
    return value


def _check_credit(world: World, account: Account, user: User, feature: Feature) -> bool:
    """Step 5: prepaid customers need credit, unless the feature is free. Returns whether they have none."""
    if account.billing_mode != "prepaid" or world.purse(user.billing_user_id).spendable_xusd > 0:
        return False
    if catalogue.is_free(world, account.realm_id, feature):
        return True
    hints: Hints = []
    if world.options.dialect == "lease":
        primary = catalogue.list_price(world, account.realm_id, feature.code)
        hints = [{"type": "funding.xusd_shortfall", "shortfall_xusd": primary.unit_price_xusd if primary else 1}]
    raise Refusal(402, "SERVER.CONFIG", "grant balance exhausted", hints=hints)


def _decide(
    world: World, account: Account, user: User, feature: Feature, asked: _Asked, broke: bool
) -> tuple[tuple[Window, ...], int, Hints]:
    """Steps 7 to 11: policies, quotas, rates, budget, then advice about the estimate."""
    windows, cap, rate_hint = quotas.admit(world, account, user, feature.code)
    prepaid = account.billing_mode == "prepaid"
    budget = None
    if asked.budget_name is not None:
        budget = budgets.resolve(world, account, asked.budget_name)
        asked.budget_id = budget.budget_id
        if prepaid and budget.remaining_xusd <= 0:
            lack = {
                "type": "budget.shortfall",
                "budget_id": budget.budget_id,
                "shortfall_xusd": max(-budget.remaining_xusd, 1),
            }
            raise Refusal(402, "BUDGET.EXHAUSTED", "budget has no headroom after refill", hints=[lack])
    hints: Hints = [] if rate_hint is None else [rate_hint]
    if broke:
        hints.append({"type": "funding.xusd_shortfall", "shortfall_xusd": 1})
    if asked.estimate > 0:
        prices, unpriced = [], []
        for meter in feature.meters:
            if not catalogue.is_billable(world, account.realm_id, feature, meter):
                continue
            found = catalogue.effective_price(world, account, meter)
            if found.hint is not None:
                hints.append(found.hint)
            if found.price is None:
                unpriced.append(meter)
            else:
                prices.append((found.price.unit_price_xusd, found.price.unit_quantity))
        if unpriced:
            hints.append({"type": "pricing.not_configured", "feature_code": feature.code, "meters": sorted(unpriced)})
        if prepaid and not broke:
            balance = world.purse(user.billing_user_id).spendable_xusd
            hints += _advice(balance, asked.estimate, prices, None)
        if prepaid and budget is not None:
            hints += _advice(budget.remaining_xusd, asked.estimate, prices, budget.budget_id)
    if asked.tells_estimate:
        cap = asked.estimate
    return windows, cap, hints


def _advice(balance: int, estimate: int, prices: list[tuple[int, int]], budget_id: str | None) -> Hints:
    lack = money.shortfall(balance, estimate, prices)
    if lack is None:
        return []
    if budget_id is None:
        first: dict[str, Any] = {"type": "funding.xusd_shortfall", "shortfall_xusd": lack.missing_xusd}
        message = "insufficient credits to cover estimated usage"
    else:
        first = {"type": "budget.shortfall", "budget_id": budget_id, "shortfall_xusd": lack.missing_xusd}
        message = "budget cannot cover estimated usage"
    return [first, {"type": "quota.remaining", "max_quantity_minor": lack.affordable_quantity, "message": message}]


def _lease_data(world: World, lease: Lease) -> dict[str, Any]:
    if world.options.dialect == "lease":
        data: dict[str, Any] = {"lease": lease.token}
    else:
        data = {"lease_token": lease.token, "lease_id": lease.lease_id}
    if lease.budget_id is not None:
        data["budget_id"] = lease.budget_id
    return data | _where(lease.feature, lease.family, lease.windows[0])


def _where(feature: str, family: str, window: Window) -> dict[str, str]:
    return {
        "feature_code": feature,
        "feature_family_code": family,
        "window_start": fields.iso(window.start),
        "window_end": fields.iso(window.end),
    }
