"""What a customer may still do: gate/limits and gate/meters (gate contract 7.9 and 7.10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import budgets, catalogue, fields, money, quotas
from .problems import invalid
from .records import Account, Feature, Price, User
from .world import World

Query = Sequence[tuple[str, str]]


def limits(world: World, account: Account, user: User, query: Query) -> list[dict[str, Any]]:
    """One entry per feature that the customer is entitled to, by code; inactive ones are listed as well."""
    expand = _words(query, "expand")
    at = _moment(world, query, "as_of")
    out = []
    for feature in _features(world, account, query):
        entry: dict[str, Any] = {
            "feature_code": feature.code,
            "feature_family_code": feature.family,
            "unit": quotas.unit_of(world, account, feature.code),
        }
        if "quotas" in expand:
            entry["quotas"] = quotas.view(world, account, user, feature.code, "quota", at)
        if "rates" in expand:
            entry["rates"] = quotas.view(world, account, user, feature.code, "rate", at)
        entry["meters"] = sorted(feature.meters)
        out.append(entry)
    return out


def meters(world: World, account: Account, user: User, query: Query) -> list[dict[str, Any]]:
    """One entry per meter of those features, by code, with prices, coverage and limits on demand."""
    expand = _words(query, "expand")
    wanted = set(_words(query, "meter_code"))
    at = _moment(world, query, "coverage_as_of")
    basis = next((value for name, value in query if name == "coverage_basis"), "xusd")
    optimistic = ("coverage_profile", "optimistic") in query
    budget_id: str | None = None
    balance = 0
    if "coverage" in expand:
        if basis == "budget":
            budget_id = next((value for name, value in query if name == "coverage_budget_id"), "")
            if not budget_id:
                raise invalid("coverage.budget_id is required when basis=budget")
            if world.options.dialect == "lease_token" and not fields.is_uuid(budget_id):
                raise invalid("invalid budget_id")
            budget = budgets.resolve(world, account, budget_id)
            budget_id, balance = budget.budget_id, max(budget.remaining_xusd, 0)
        else:
            balance = world.purse(user.billing_user_id).spendable_xusd
    if world.options.auto_registry and world.options.defaults.primary_xusd is not None:
        # Only where new features come with a price: asking for one shows it, as if an operator had priced it before.
        for code in _words(query, "feature_code"):
            if catalogue.find_feature(world, account.realm_id, code) is None:
                catalogue.register_feature(world, account.realm_id, code, None)
    by_meter: dict[str, list[Feature]] = {}
    for feature in _features(world, account, query):
        for meter in feature.meters:
            by_meter.setdefault(meter, []).append(feature)
    out = []
    for meter in sorted(by_meter):
        if wanted and meter not in wanted:
            continue
        features = by_meter[meter]
        unit = quotas.unit_of(world, account, features[0].code)
        entry: dict[str, Any] = {
            "meter_code": meter,
            "unit": unit,
            "features": [feature.code for feature in features],
            "feature_family_codes": list(dict.fromkeys(feature.family for feature in features)),
        }
        for kind, name in (("quota", "quotas"), ("rate", "rates")):
            if "limits" in expand or f"limits.{name}" in expand:
                entry[name] = _merged(world, account, user, features, kind)
        price = catalogue.list_price(world, account.realm_id, meter)
        if price is not None and "pricing" in expand:
            entry["pricing"] = _pricing(world, price, unit)
        if price is not None and "coverage" in expand:
            limited = basis == "budget" or account.billing_mode == "prepaid"
            entry["coverage"] = _coverage(
                world, price, balance, features[0].code, at, basis, budget_id, optimistic, limited
            )
        out.append(entry)
    return out


def _features(world: World, account: Account, query: Query) -> list[Feature]:
    codes = set(_words(query, "feature_code"))
    families = set(_words(query, "feature_family_code"))
    return sorted(
        (
            feature
            for (realm_id, _), feature in world.store.features.rows.items()
            if realm_id == account.realm_id
            and (not codes or feature.code in codes)
            and (not families or feature.family in families)
            and catalogue.entitled(account, feature)
        ),
        key=lambda feature: feature.code,
    )


def _merged(world: World, account: Account, user: User, features: list[Feature], kind: str) -> list[dict[str, str]]:
    """Windows with equal bounds are shown once: the first of them, so a limited one hides an unlimited one."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for feature in features:
        for window in quotas.view(world, account, user, feature.code, kind, world.now()):
            found.setdefault((window["subject_scope"], window["window_start"], window["window_end"]), window)
    return list(found.values())


def _pricing(world: World, price: Price, unit: str) -> dict[str, Any]:
    out: dict[str, Any] = {"unit_price_xusd": str(price.unit_price_xusd)}
    if world.options.dialect == "lease":
        out |= {"unit_price_base_xusd": str(price.unit_price_xusd), "unit_price_dynamic_xusd": "0"}
    out["unit_quantity_minor"] = str(price.unit_quantity)
    if world.options.dialect == "lease_token":
        out["rounding"] = price.rounding
    out |= {"effective_at": fields.iso(price.effective_at), "fingerprint": price.fingerprint, "unit": unit}
    if world.options.dialect == "lease":
        out |= {
            "unit_cost_xusd": str(price.unit_cost_xusd),
            "cost_unit_quantity_minor": str(price.cost_unit_quantity),
        }
    return out


def _coverage(
    world: World,
    price: Price,
    balance: int,
    feature: str,
    at: int,
    basis: str,
    budget_id: str | None,
    optimistic: bool,
    limited: bool,
) -> dict[str, Any]:
    out: dict[str, Any] = {"basis": basis, "balance_xusd": str(balance)}
    free = price.unit_price_xusd == 0
    room = money.affordable(balance, price.unit_price_xusd, price.unit_quantity)
    if world.options.dialect == "lease":
        out["balance_limited"] = limited
        out["max_quantity_minor_estimated"] = None if free else str(room)
    else:
        out["max_quantity_minor_estimated"] = str(room)
    out |= {"advisory": True, "as_of": fields.iso(at)}
    if budget_id is not None:
        out["budget_id"] = budget_id
    out["notes"] = f"feature={feature}" + ("; pricing unavailable" if free else "")
    if optimistic and not free:
        out["optimistic_quantity_minor"] = str(-(-balance // price.unit_price_xusd) * price.unit_quantity)
    return out


def _words(query: Query, name: str) -> list[str]:
    return [word.strip() for key, value in query if key == name for word in value.split(",") if word.strip()]


def _moment(world: World, query: Query, name: str) -> int:
    value = next((value for key, value in query if key == name), None)
    moment = None if value is None else fields.parse_time(value)
    return world.now() if moment is None else moment
