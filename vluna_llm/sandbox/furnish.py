"""Bringing a gate's store to what its configuration says."""

from __future__ import annotations

import base64
import os
import secrets
from dataclasses import replace
from typing import Literal

from . import catalogue
from .config import LimitConfig, PriceConfig, SandboxConfig
from .faults import Faults
from .records import UNLIMITED, Meter, Policy, Realm, ServiceKey
from .world import World


def furnish(world: World, config: SandboxConfig) -> ServiceKey:
    """Set up realm, key, catalogue, limits and credit without disturbing what the store already knows.

    Returns the service key: the configured one, else the one in the store, else a new one.
    """
    store, realm_id = world.store, config.realm_id
    with store.transaction():
        everybody = [limit.policy(kind) for kind, limit in _limits(config) if limit.principal is None]
        store.realms.put(realm_id, Realm(realm_id, policies=(UNLIMITED, *everybody)))
        key = _service_key(world, config)
        for code, feature in config.features.items():
            configure_feature(world, realm_id, code, feature.meters, feature.outcome_meters)
            record = replace(
                store.features.rows[(realm_id, code)],
                family=feature.family,
                active=feature.active,
                entitlement=feature.entitlement,
            )
            store.features.put(realm_id, code, record)
        for meter, price in config.prices.items():
            ensure_meter(world, realm_id, meter)
            _set_price(world, realm_id, meter, price)
        for principal_id, xusd in config.credit.items():
            if world.account_of(realm_id, principal_id) is None:
                user = world.ensure_user(world.ensure_account(realm_id, principal_id)[0], principal_id)
                world.top_up(user, xusd - world.purse(user.billing_user_id).spendable_xusd)
        own: dict[str, list[Policy]] = {}
        for kind, limit in _limits(config):
            if limit.principal is not None:
                own.setdefault(limit.principal, []).append(limit.policy(kind))
        for principal_id, extra in own.items():
            account, _ = world.ensure_account(realm_id, principal_id)
            store.accounts.put(realm_id, principal_id, replace(account, extra_policies=tuple(extra)))
    return key


def script(faults: Faults, config: SandboxConfig) -> None:
    """Add the configured faults."""
    for fault in config.faults:
        faults.add(
            fault.kind,
            fault.route,
            times=fault.times or None,
            skip=fault.skip,
            principal_id=fault.principal,
            seconds=fault.seconds,
            status=fault.status,
            body=fault.body,
        )


def ensure_meter(world: World, realm_id: str, meter: str, feature: str | None = None) -> None:
    """Create a meter that does not exist, for ``feature``.

    By default that is the part before ``.tokens.``, else a feature with the meter's own name.
    """
    if world.store.meters.get(realm_id, meter) is None:
        configure_feature(world, realm_id, feature or meter.partition(".tokens.")[0], (meter,), ())


def configure_feature(
    world: World, realm_id: str, code: str, meters: tuple[str, ...], outcome: tuple[str, ...]
) -> None:
    """Create a feature, or add meters to the one that is there."""
    found = catalogue.find_feature(world, realm_id, code)
    if found is None:
        found = catalogue.register_feature(world, realm_id, code, None)
    for meter in meters:
        if world.store.meters.get(realm_id, meter) is None:
            world.store.meters.put(realm_id, meter, Meter(meter))
    for meter in outcome:
        world.store.meters.put(realm_id, meter, Meter(meter, "outcome"))
    every = tuple(dict.fromkeys((*found.meters, *meters, *outcome)))
    world.store.features.put(realm_id, code, replace(found, meters=every))


def _set_price(world: World, realm_id: str, meter: str, price: PriceConfig) -> None:
    if price.residual != "none":
        world.store.meters.put(realm_id, meter, Meter(meter, residual=price.residual))
    known = catalogue.list_price(world, realm_id, meter)
    # Saving a price anew would forget the carried remainders, so an unchanged one is left alone.
    if known is not None and (
        known.unit_price_xusd,
        known.unit_quantity,
        known.rounding,
        known.unit_cost_xusd,
        known.cost_unit_quantity,
        known.cost_rounding,
    ) == (
        price.unit_price_xusd,
        price.unit_quantity,
        price.rounding,
        price.unit_cost_xusd,
        price.cost_unit_quantity or price.unit_quantity,
        price.cost_rounding or price.rounding,
    ):
        return
    catalogue.save_price(
        world,
        realm_id,
        meter,
        price.unit_price_xusd,
        unit_quantity=price.unit_quantity,
        rounding=price.rounding,
        unit_cost_xusd=price.unit_cost_xusd,
        cost_unit_quantity=price.cost_unit_quantity,
        cost_rounding=price.cost_rounding,
    )


def _limits(config: SandboxConfig) -> list[tuple[Literal["quota", "rate"], LimitConfig]]:
    quotas: list[tuple[Literal["quota", "rate"], LimitConfig]] = [("quota", limit) for limit in config.quotas]
    return [*quotas, *(("rate", limit) for limit in config.rates)]


def _service_key(world: World, config: SandboxConfig) -> ServiceKey:
    if config.key_id is not None and config.key_secret is not None:
        key = ServiceKey(config.key_id, config.key_secret, config.realm_id)
    else:
        for known in world.store.keys.rows.values():
            if known.realm_id == config.realm_id and known.status == "active":
                return known
        secret = base64.b64encode(os.urandom(32)).decode()
        key = ServiceKey(f"pk-{secrets.token_urlsafe(12)}", secret, config.realm_id)
    world.store.keys.put(key.key_id, key)
    return key
