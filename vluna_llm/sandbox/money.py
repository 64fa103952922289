"""Arithmetic of prices and grants; nothing here does I/O or knows a request (gate contract, sections 9.3 and 9.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Rounding = Literal["floor", "nearest", "ceil"]
ResidualMode = Literal["none", "prepaid"]


@dataclass(frozen=True, slots=True)
class Charge:
    """Money for one line, and the units carried to the next one of the same user, meter and price."""

    amount_xusd: int
    carry: int


def block_charge(
    quantity: int,
    unit_price_xusd: int,
    unit_quantity: int,
    rounding: Rounding,
    carry: int,
    residual: ResidualMode = "none",
) -> Charge:
    """Price ``quantity`` units in blocks of ``unit_quantity`` (dialect A).

    Source: gate contract 9.3. ``carry`` is in units; a price per single unit carries nothing.
    """
    u = unit_quantity
    if u == 1:
        return Charge(quantity * unit_price_xusd, 0)
    if residual == "prepaid":
        if carry >= quantity:
            return Charge(0, carry - quantity)
        blocks = -((carry - quantity) // u)
        return Charge(blocks * unit_price_xusd, blocks * u - (quantity - carry))
    total = carry + quantity
    if rounding == "ceil":
        return Charge(-(-total // u) * unit_price_xusd, 0)
    blocks, rest = divmod(total, u)
    if rounding == "nearest" and 2 * rest >= u:
        return Charge((blocks + 1) * unit_price_xusd, 0)
    return Charge(blocks * unit_price_xusd, rest)


def proportional_charge(quantity: int, unit_price_xusd: int, unit_quantity: int, carry: int) -> Charge:
    """Price ``quantity`` units at an exact rate, whole XUSD now and the fraction later (dialect B).

    Here ``carry`` is the numerator of a fraction of one XUSD over ``unit_quantity``.
    """
    amount, rest = divmod(quantity * unit_price_xusd + carry, unit_quantity)
    return Charge(amount, rest)


def affordable(balance_xusd: int, unit_price_xusd: int, unit_quantity: int) -> int:
    """How many units a balance pays for; 0 for a free meter, which the real gate reports like that, too."""
    if unit_price_xusd <= 0 or balance_xusd <= 0:
        return 0
    return balance_xusd // unit_price_xusd * unit_quantity


@dataclass(frozen=True, slots=True)
class Shortfall:
    """What a balance lacks for an estimate, by its most favourable price."""

    missing_xusd: int
    affordable_quantity: int


def shortfall(balance_xusd: int, estimate: int, prices: Sequence[tuple[int, int]]) -> Shortfall | None:
    """Judge an estimate by the cheapest of ``prices`` (unit price, unit quantity); None where it is covered.

    Source: gate contract 7.4, step 11: coverage is judged by the meter that affords most.
    """
    best: Shortfall | None = None
    for unit_price, unit_quantity in prices:
        if unit_price <= 0:
            continue
        room = affordable(balance_xusd, unit_price, unit_quantity)
        if room >= estimate:
            return None
        lack = -(-estimate // unit_quantity) * unit_price - balance_xusd
        if (
            best is None
            or room > best.affordable_quantity
            or (room == best.affordable_quantity and lack < best.missing_xusd)
        ):
            best = Shortfall(lack, room)
    return best


def split(amount_xusd: int, spendable: Sequence[tuple[str, int]]) -> tuple[list[tuple[str, int]], int]:
    """Draw an amount from grants in the given order; returns the parts and what they do not cover."""
    parts: list[tuple[str, int]] = []
    rest = amount_xusd
    for grant_id, available in spendable:
        if rest <= 0:
            break
        part = min(rest, available)
        if part > 0:
            parts.append((grant_id, part))
            rest -= part
    return parts, rest
