"""Pricing the lines of a commit or an ingest, and booking the result (gate contract, section 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from . import catalogue, money
from .fields import MAX_INT64, MAX_SAFE
from .problems import DatabaseFault, out_of_range
from .records import Account, Allocation, Feature, Grant, Line, Purse, Rating, Side, User
from .world import World, new_fingerprint, new_id


@dataclass(frozen=True, slots=True)
class AskedLine:
    """One line of a request; ``client_price`` and ``client_etag`` are what the client believed, dialect A."""

    meter: str
    quantity: int
    client_price: int | None = None
    client_etag: str | None = None


@dataclass(frozen=True, slots=True)
class Rated:
    """Lines with their money, and the hints that pricing gave rise to."""

    lines: tuple[Line, ...]
    amount_xusd: int
    cost_xusd: int
    contract_hints: tuple[dict[str, Any], ...]
    changed_hints: tuple[dict[str, Any], ...]

    @property
    def unpriced(self) -> list[str]:
        """Meters without a price, each once."""
        return list(dict.fromkeys(line.meter for line in self.lines if not line.priced))


def rate(
    world: World,
    account: Account,
    user: User,
    feature: Feature,
    asked: Sequence[AskedLine],
    not_allowed: Sequence[str] = (),
    *,
    unit: str = "unit",
) -> Rated:
    """Price every line and move the carried remainders, whatever becomes of the commit (gate contract 9.3).

    Lines of one meter start from the same stored remainder and the last one wins: so does the real server.
    """
    now = world.now()
    lines, contract_hints, changed = [], [], []
    carried: dict[tuple[str, ...], int] = {}
    for ask in asked:
        if ask.quantity > MAX_INT64:
            raise DatabaseFault(f'value "{ask.quantity}" is out of range for type bigint')
        found = (
            catalogue.Effective(None)
            if ask.meter in not_allowed
            else catalogue.effective_price(world, account, ask.meter)
        )
        if found.hint is not None:
            contract_hints.append(found.hint)
        if found.price is None:
            free = Side(0, 1, "floor", 0, now, new_fingerprint())
            cost = replace(free, fingerprint=new_fingerprint())
            lines.append(Line(new_id(), ask.meter, ask.quantity, False, free, cost, now, unit))
            continue
        price = found.price
        residual = catalogue.residual_mode(world, account.realm_id, ask.meter)
        sides = []
        for side, unit_xusd, unit_quantity, rounding in (
            ("price", price.unit_price_xusd, price.unit_quantity, price.rounding),
            ("cost", price.unit_cost_xusd, price.cost_unit_quantity, price.cost_rounding),
        ):
            key: tuple[str, ...] = (user.billing_user_id, ask.meter, side, price.revision)
            before = world.store.carries.get(*key) or 0
            if world.options.dialect == "lease":
                charge = money.proportional_charge(ask.quantity, unit_xusd, unit_quantity, before)
            else:
                charge = money.block_charge(ask.quantity, unit_xusd, unit_quantity, rounding, before, residual)
            if charge.carry != before or key in carried:
                carried[key] = charge.carry
            shown = "ceil" if residual == "prepaid" else rounding
            sides.append(
                Side(
                    unit_xusd,
                    unit_quantity,
                    shown,
                    charge.amount_xusd,
                    price.effective_at,
                    new_fingerprint(),
                    before,
                    charge.carry,
                    price.revision,
                )
            )
        if max(sides[0].amount_xusd, sides[1].amount_xusd) > MAX_SAFE:
            raise out_of_range()
        line = Line(new_id(), ask.meter, ask.quantity, True, sides[0], sides[1], now, unit)
        lines.append(line)
        if ask.client_etag is not None or (ask.client_price is not None and ask.client_price != sides[0].unit_xusd):
            changed.append(
                {
                    "type": "pricing.changed",
                    "previous_fingerprint": ask.client_etag or "",
                    "current_fingerprint": line.price.fingerprint,
                }
            )
    for place, rest in carried.items():
        world.store.carries.put(*place, rest)
    amount = sum(line.price.amount_xusd for line in lines)
    cost_total = sum(line.cost.amount_xusd for line in lines)
    if max(amount, cost_total) > MAX_SAFE:
        raise out_of_range()
    return Rated(tuple(lines), amount, cost_total, tuple(contract_hints), tuple(changed))


def fund(world: World, user: User, amount_xusd: int) -> tuple[Allocation, ...]:
    """Draw a charge from the user's grants, the rest from the month's fallback grant: debt (gate contract 9.4)."""
    if amount_xusd <= 0:
        return ()
    purse = world.purse(user.billing_user_id)
    own = sorted(
        (grant for grant in purse.grants if grant.kind != "fallback" and grant.remaining_xusd > 0),
        key=lambda grant: (
            grant.window_end is None,
            grant.window_end or 0,
            -grant.priority,
            grant.grant_id,
        ),
    )
    parts, rest = money.split(amount_xusd, [(grant.grant_id, grant.remaining_xusd) for grant in own])
    grants = {grant.grant_id: grant for grant in purse.grants}
    if rest:
        debt = _fallback(world, purse)
        grants.setdefault(debt.grant_id, debt)
        parts.append((debt.grant_id, rest))
    settled = world.options.ledger_sync
    out = []
    for grant_id, part in parts:
        grant = grants[grant_id]
        out.append(Allocation(new_id(), grant_id, grant.kind, part, settled))
        grants[grant_id] = (
            replace(grant, posted_xusd=grant.posted_xusd + part)
            if settled
            else replace(grant, pending_xusd=grant.pending_xusd + part)
        )
    world.store.purses.put(user.billing_user_id, Purse(purse.ledger_xusd, tuple(grants.values())))
    return tuple(out)


def _fallback(world: World, purse: Purse) -> Grant:
    today = datetime.fromtimestamp(world.now() / 1000, tz=timezone.utc)
    start = datetime(today.year, today.month, 1, tzinfo=timezone.utc)
    end = datetime(today.year + today.month // 12, today.month % 12 + 1, 1, tzinfo=timezone.utc)
    opens, closes = int(start.timestamp()) * 1000, int(end.timestamp()) * 1000
    for grant in purse.grants:
        if grant.kind == "fallback" and grant.window_start == opens:
            return grant
    return Grant(
        new_id(),
        "fallback",
        "fallback-cash",
        "Fallback Cash Anchor",
        0,
        priority=-100_000,
        window_start=opens,
        window_end=closes,
    )


def record(world: World, rating: Rating) -> None:
    """Keep a rating."""
    world.store.ratings.put(rating.rating_id, rating)
