"""A tool that is sold: what one use of it is charged, by its result, whatever framework has run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vluna_llm import Vluna, call_context
from vluna_llm.billable import BillableTool
from vluna_llm.sandbox import Sandbox
from vluna_llm.sandbox.booked import BookedEntry

OCR = "tools.ocr"


def used(vluna: Vluna, gate: Sandbox, result: Any, **options: Any) -> BookedEntry:
    """What the gate has in its books of one use."""
    tool = BillableTool(OCR, **options)
    with call_context(principal_id="ann") as scope, tool.operation(vluna) as op:
        tool.used(op, result)
    assert scope.wait(5)
    (entry,) = gate.booked("ann").entries
    return entry


def test_the_estimate_is_the_price_of_a_use_without_a_quantity(vluna: Vluna, gate: Sandbox) -> None:
    entry = used(vluna, gate, "text", estimate=3)
    assert (entry.feature, entry.quantity, entry.labels["usage_source"]) == (OCR, 3, "caller")


def test_the_result_says_how_much_it_was(vluna: Vluna, gate: Sandbox) -> None:
    assert used(vluna, gate, "text", estimate=3, quantity=len).quantity == 4


def test_the_result_says_how_much_it_was_on_each_meter(vluna: Vluna, gate: Sandbox) -> None:
    meters = {f"{OCR}.pages": 100, f"{OCR}.seconds": 7}
    gate.feature(OCR, meters=tuple(meters))
    for meter, price in meters.items():
        gate.price(meter, price, feature=OCR)
    entry = used(vluna, gate, (2, 9), quantity=lambda read: dict(zip(meters, read, strict=True)))
    assert (entry.quantity, entry.charged_xusd) == (11, 2 * 100 + 9 * 7)


@pytest.mark.parametrize(
    "quantity",
    [lambda result: result["pages"], lambda result: -1, lambda result: 1.5, lambda result: {"no code!": 1}],
    ids=["raises", "negative", "no integer", "no code"],
)
def test_a_quantity_that_fails_is_told_and_the_estimate_is_charged(
    vluna: Vluna, gate: Sandbox, caplog: pytest.LogCaptureFixture, quantity: Callable[[Any], Any]
) -> None:
    """The tool was used, and its caller gets what it returned. Nothing of the result is logged."""
    entry = used(vluna, gate, "a secret text", estimate=3, quantity=quantity)
    assert (entry.quantity, entry.labels["usage_source"]) == (3, "estimated")
    assert f"quantity= of the tool sold as {OCR} failed" in caplog.text
    assert "secret" not in caplog.text


def test_a_quantity_of_zero_charges_nothing(vluna: Vluna, gate: Sandbox) -> None:
    tool = BillableTool(OCR, estimate=3, quantity=lambda result: 0)
    with call_context(principal_id="ann") as scope, tool.operation(vluna) as op:
        tool.used(op, "text")
    assert scope.wait(5)
    assert gate.booked("ann").entries == ()
    assert [lease.state for lease in gate.leases("ann")] == ["canceled"]
