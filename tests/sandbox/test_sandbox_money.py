"""Arithmetic of prices and grants (gate contract 9.3 and 9.4)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vluna_llm.sandbox.money import affordable, block_charge, proportional_charge, shortfall, split


@pytest.mark.parametrize(
    ("rounding", "residual", "amounts"),
    [
        ("floor", "none", [0, 100, 100]),
        ("ceil", "none", [100, 100, 200]),
        ("nearest", "none", [0, 100, 200]),
        ("floor", "prepaid", [100, 100, 100]),
    ],
)
def test_the_example_of_the_contract(rounding: Any, residual: Any, amounts: list[int]) -> None:
    """100 XUSD per 1000 units, commits of 400, 700, 1500 in this order."""
    carry, found = 0, []
    for quantity in (400, 700, 1500):
        charge = block_charge(quantity, 100, 1000, rounding, carry, residual)
        carry = charge.carry
        found.append(charge.amount_xusd)
    assert found == amounts


@given(st.lists(st.integers(0, 10**9), max_size=30), st.integers(0, 1000), st.integers(1, 10_000))
def test_floor_loses_no_unit(quantities: list[int], price: int, unit: int) -> None:
    """However a usage is cut into commits, floor bills the whole blocks of the sum, the rest stays carried."""
    carry = total = 0
    for quantity in quantities:
        charge = block_charge(quantity, price, unit, "floor", carry)
        carry, total = charge.carry, total + charge.amount_xusd
    assert total == (sum(quantities) // unit * price if unit > 1 else sum(quantities) * price)
    assert carry < max(unit, 1)


@given(st.lists(st.integers(0, 10**9), max_size=30), st.integers(0, 1000), st.integers(1, 10_000))
def test_prepaid_blocks_cover_every_unit(quantities: list[int], price: int, unit: int) -> None:
    """With ``prepaid`` the blocks paid so far always cover the units used, by less than one block."""
    if unit == 1:
        return
    carry = blocks = 0
    for quantity in quantities:
        charge = block_charge(quantity, 1, unit, "floor", carry, "prepaid")
        carry, blocks = charge.carry, blocks + charge.amount_xusd
    assert blocks * unit - sum(quantities) == carry
    assert 0 <= carry < unit


@given(st.lists(st.integers(0, 10**9), max_size=30), st.integers(0, 10**6), st.integers(1, 10**6))
def test_proportional_prices_lose_no_fraction(quantities: list[int], price: int, unit: int) -> None:
    """Dialect B: the amounts add up to the exact price of the sum, rounded down once."""
    carry = total = 0
    for quantity in quantities:
        charge = proportional_charge(quantity, price, unit, carry)
        carry, total = charge.carry, total + charge.amount_xusd
    assert total == sum(quantities) * price // unit


@given(st.integers(0, 10**9), st.lists(st.tuples(st.uuids().map(str), st.integers(-5, 10**6)), max_size=8))
def test_a_charge_is_split_without_a_rest_lost(amount: int, grants: list[tuple[str, int]]) -> None:
    """The parts and what is left over add up to the charge, and no grant gives more than it has."""
    parts, rest = split(amount, grants)
    have = dict(grants)
    assert sum(part for _, part in parts) + rest == amount
    assert all(0 < part <= have[name] for name, part in parts)
    assert rest == max(amount - sum(max(value, 0) for value in have.values()), 0) or len(have) < len(grants)


@pytest.mark.parametrize(
    ("balance", "estimate", "prices", "expected"),
    [
        (100, 1200, [(5, 1), (3, 1), (12, 1), (1, 1)], (1100, 100)),
        (100, 20, [(5, 1), (1, 1)], None),
        (50, 100, [], None),
        (50, 100, [(0, 1)], None),
    ],
)
def test_coverage_is_judged_by_the_cheapest_meter(
    balance: int, estimate: int, prices: list[tuple[int, int]], expected: tuple[int, int] | None
) -> None:
    """The shortfall of an estimate is that of the meter that affords most; a free meter does not count."""
    lack = shortfall(balance, estimate, prices)
    assert (None if lack is None else (lack.missing_xusd, lack.affordable_quantity)) == expected


def test_affordable_counts_whole_blocks() -> None:
    """820 XUSD buy 8 blocks of 1000 units at 100 XUSD, and nothing of a free meter."""
    assert affordable(820, 100, 1000) == 8000
    assert affordable(820, 0, 1) == 0
