"""Features, meters, prices and who may use them (gate contract, section 6)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from .money import ResidualMode, Rounding
from .problems import Refusal, missing
from .records import Account, Feature, Meter, Price
from .world import World, new_id

AUTO_FAMILY = "auto.registry"
TOKEN_METERS = ("tokens.input", "tokens.cached", "tokens.output")


@dataclass(frozen=True, slots=True)
class Effective:
    """The price that holds for one account; ``hint`` tells a contract term that could not be used."""

    price: Price | None
    hint: dict[str, Any] | None = None


def find_feature(world: World, realm_id: str, code: str) -> Feature | None:
    """The feature of this code."""
    return world.store.features.get(realm_id, code)


def usable_feature(world: World, account: Account, code: str, family: str | None, *, register: bool = True) -> Feature:
    """The feature, created where auto-registry is on. Raises 422 unknown or inactive, 403 without entitlement."""
    feature = find_feature(world, account.realm_id, code)
    if feature is None:
        if not (world.options.auto_registry and register):
            raise missing("feature not found")
        feature = register_feature(world, account.realm_id, code, family)
    if not feature.active:
        raise missing("feature inactive")
    check_entitlement(account, feature)
    return feature


def check_entitlement(account: Account, feature: Feature) -> None:
    """Raises 403 where the customer's plan denies the feature or does not grant what it needs."""
    if feature.code in account.denied:
        raise Refusal(403, "ENTITLEMENT.DENIED", "entitlement denied")
    if feature.entitlement and feature.code not in account.granted:
        raise Refusal(403, "ENTITLEMENT.REQUIRED", "entitlement required")


def entitled(account: Account, feature: Feature) -> bool:
    """Whether the customer may use the feature."""
    return feature.code not in account.denied and (not feature.entitlement or feature.code in account.granted)


def register_feature(world: World, realm_id: str, code: str, family: str | None) -> Feature:
    """Create a feature with its primary meter, and with what the defaults give it: token meters and prices."""
    defaults = world.options.defaults
    prices = dict(zip(TOKEN_METERS, (defaults.input_xusd, defaults.cached_xusd, defaults.output_xusd), strict=True))
    meters = [code] + [f"{code}.{name}" for name, price in prices.items() if price is not None]
    for meter in meters:
        if world.store.meters.get(realm_id, meter) is None:
            world.store.meters.put(realm_id, meter, Meter(meter))
    feature = Feature(code, family or AUTO_FAMILY, tuple(meters))
    world.store.features.put(realm_id, code, feature)
    if defaults.primary_xusd is not None and world.store.prices.get(realm_id, code) is None:
        save_price(world, realm_id, code, defaults.primary_xusd)
    for name, price in prices.items():
        if price is not None and world.store.prices.get(realm_id, f"{code}.{name}") is None:
            save_price(world, realm_id, f"{code}.{name}", price)
    return feature


def register_meter(world: World, realm_id: str, feature: Feature, code: str) -> Feature:
    """Auto-registry of a meter: created without a price, or, where it exists elsewhere, added to this feature."""
    if world.store.meters.get(realm_id, code) is None:
        world.store.meters.put(realm_id, code, Meter(code))
    feature = replace(feature, meters=(*feature.meters, code))
    world.store.features.put(realm_id, feature.code, feature)
    return feature


def is_billable(world: World, realm_id: str, feature: Feature, meter: str) -> bool:
    """Whether the gate may bill this meter of the feature: it belongs to it and counts activity, not outcome."""
    record = world.store.meters.get(realm_id, meter)
    return meter in feature.meters and record is not None and record.kind == "activity"


def residual_mode(world: World, realm_id: str, meter: str) -> ResidualMode:
    """How the meter treats a started block."""
    record = world.store.meters.get(realm_id, meter)
    return "none" if record is None else record.residual


def save_price(
    world: World,
    realm_id: str,
    meter: str,
    unit_price_xusd: int,
    *,
    unit_quantity: int = 1,
    rounding: Rounding = "nearest",
    unit_cost_xusd: int = 0,
    cost_unit_quantity: int | None = None,
    cost_rounding: Rounding | None = None,
) -> Price:
    """Set the price of a meter from now on. Saving it anew forgets the carried remainders."""
    now = world.now()
    cost_unit = cost_unit_quantity or unit_quantity
    facts = (realm_id, meter, unit_price_xusd, unit_quantity, rounding, now)
    price = Price(
        meter=meter,
        unit_price_xusd=unit_price_xusd,
        unit_quantity=unit_quantity,
        rounding=rounding,
        unit_cost_xusd=unit_cost_xusd,
        cost_unit_quantity=cost_unit,
        cost_rounding=cost_rounding or rounding,
        effective_at=now,
        revision=new_id(),
        fingerprint=hashlib.sha256(repr(facts).encode()).hexdigest(),
    )
    world.store.prices.put(realm_id, meter, price)
    return price


def list_price(world: World, realm_id: str, meter: str) -> Price | None:
    """The price that everybody sees."""
    return world.store.prices.get(realm_id, meter)


def effective_price(world: World, account: Account, meter: str) -> Effective:
    """The price of this account: the list price, or its contract's where that can be used (gate contract 8)."""
    price = list_price(world, account.realm_id, meter)
    term = next((term for term in account.terms if term.meter == meter), None)
    if term is None:
        return Effective(price)
    about = {"meter_code": meter, "contract_id": account.contract_id, "term_key": meter}
    if term.unit_price_xusd is None:
        text = "contract pricing term schema mismatch"
        return Effective(price, {"type": "pricing.contract_term_invalid", **about, "message": text})
    if price is None:
        text = "contract pricing ignored: meter_prices has no active row for meter_code as-of at (strict mode)"
        return Effective(None, {"type": "pricing.meter_price_missing", **about, "message": text})
    own = replace(price, unit_price_xusd=term.unit_price_xusd, revision=f"{price.revision}/{account.contract_id}")
    return Effective(own)


def is_free(world: World, realm_id: str, feature: Feature) -> bool:
    """Whether authorize lets customers without credit in: meters exist and each is unpriced, or free at no cost."""
    prices = [list_price(world, realm_id, meter) for meter in feature.meters]
    return bool(prices) and all(
        price is None or (price.unit_price_xusd == 0 and price.unit_cost_xusd == 0) for price in prices
    )
