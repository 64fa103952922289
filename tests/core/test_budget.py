"""What one task may cost: refused before the gate is asked, counted while it is in flight."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.budget import Amount, Limits
from vluna_llm.ending import Ending
from vluna_llm.errors import BudgetExceeded, ConfigurationError, OutboxUnavailable, VlunaError
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.sandbox import Sandbox

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": [{"role": "user", "content": "hi"}]})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True)


def begun(vluna: Vluna) -> Operation:
    operation = vluna.begin(CALL)
    assert operation is not None
    return operation


@pytest.mark.parametrize(
    ("limits", "spent", "in_flight", "asked", "room"),
    [
        (Limits(max_tokens=100), Amount(), Amount(), Amount(0, 100), True),
        (Limits(max_tokens=100), Amount(), Amount(), Amount(0, 101), False),
        (Limits(max_tokens=100), Amount(0, 60), Amount(0, 20), Amount(0, 20), True),
        (Limits(max_tokens=100), Amount(0, 60), Amount(0, 20), Amount(0, 21), False),
        (Limits(max_tokens=100), Amount(0, 100), Amount(), Amount(0, 0), False),
        (Limits(max_tokens=100), Amount(0, 99), Amount(), Amount(0, 0), True),
        (Limits(max_tokens=0), Amount(), Amount(), Amount(), False),
        (Limits(max_amount_xusd=50), Amount(20, 999), Amount(20, 999), Amount(10, 999), True),
        (Limits(max_amount_xusd=50), Amount(20), Amount(20), Amount(11), False),
        (Limits(max_amount_xusd=50, max_tokens=5), Amount(), Amount(), Amount(1, 6), False),
    ],
)
def test_the_rule(limits: Limits, spent: Amount, in_flight: Amount, asked: Amount, room: bool) -> None:
    assert (limits.judge(spent, in_flight, asked) is None) is room


@pytest.mark.parametrize("limit", [-1, 1.5, True, "9"])
def test_a_limit_that_is_none_is_named(limit: object) -> None:
    with pytest.raises(ConfigurationError, match="max_tokens must be an integer"):
        call_context(principal_id="ann", max_tokens=limit)  # type: ignore[arg-type]


def test_the_call_beyond_the_limit_is_refused_before_the_gate_is_asked(vluna: Vluna, gate: Sandbox) -> None:
    with call_context(principal_id="ann", max_tokens=330) as scope:
        begun(vluna).finish(USED)
        begun(vluna).finish(USED)
        assert scope.wait(5)
        asked = len(gate.requests)
        with pytest.raises(BudgetExceeded) as refused:
            vluna.operation(feature_code="tools.search", estimate=91).__enter__()
        assert len(gate.requests) == asked
        assert scope.pending == 0
    error = refused.value
    assert isinstance(error, VlunaError)
    assert (error.limit, error.maximum, error.spent, error.in_flight) == ("max_tokens", 330, 240, 0)
    assert "max_tokens" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.spent) == (str(error), 240)
    assert vluna.flush(5)
    assert len(gate.booked("ann").entries) == 2


def test_what_is_in_flight_counts_and_is_given_back(vluna: Vluna) -> None:
    work = {"feature_code": "tools.search", "estimate": 40}
    with call_context(principal_id="ann", max_tokens=100) as scope:
        with vluna.operation(**work) as one:  # type: ignore[arg-type]
            with vluna.operation(**work) as two:  # type: ignore[arg-type]
                with pytest.raises(BudgetExceeded) as refused, vluna.operation(**work):  # type: ignore[arg-type]
                    pass
                assert (refused.value.spent, refused.value.in_flight, refused.value.asked) == (0, 80, 40)
                two.record(quantity=5)
            with vluna.operation(**work) as three:  # type: ignore[arg-type]
                three.record(quantity=40)
            one.record(quantity=40)
        assert scope.wait(5)
        assert scope.usage.total_tokens == 85
        with pytest.raises(BudgetExceeded), vluna.operation(**work):  # type: ignore[arg-type]
            pass


def test_work_that_failed_gives_its_room_back_at_once(vluna: Vluna, gate: Sandbox) -> None:
    gate.faults.add("hang", "cancel")
    with call_context(principal_id="ann", max_tokens=50):
        for _ in range(3):
            with pytest.raises(LookupError), vluna.operation(feature_code="tools.search", estimate=40):
                raise LookupError
    gate.faults.clear()


def test_money_counts_by_the_price_also_of_the_first_calls(vluna: Vluna, gate: Sandbox) -> None:
    """Nobody has asked for a price yet: it is asked for before the first call of a task that is limited in money."""
    gate.price("tools.search", 10)
    with call_context(principal_id="ann", max_amount_xusd=1_000) as scope:
        with vluna.operation(feature_code="tools.search", estimate=60) as one:
            assert scope.estimated_xusd == 600
            with pytest.raises(BudgetExceeded) as refused, vluna.operation(feature_code="tools.search", estimate=60):
                pass
            assert (refused.value.in_flight, refused.value.asked) == (600, 600)
            one.record(quantity=30)
        with vluna.operation(feature_code="tools.search", estimate=60) as two:
            two.record(quantity=60)
        assert scope.wait(5)
        assert scope.settled_xusd == 900
        with pytest.raises(BudgetExceeded), vluna.operation(feature_code="tools.search", estimate=11):
            pass


def test_a_hundred_tasks_at_once_do_not_go_beyond_the_limit(vluna: Vluna, gate: Sandbox) -> None:
    gate.price("tools.search", 1)

    async def one() -> int:
        try:
            async with vluna.operation(feature_code="tools.search", estimate=10) as op:
                await asyncio.sleep(0.05)
                op.record(quantity=10)
        except BudgetExceeded:
            return 0
        return 10

    async def main() -> int:
        async with call_context(principal_id="ann", max_amount_xusd=250):
            return sum(await asyncio.gather(*(one() for _ in range(100))))

    assert asyncio.run(main()) == 250
    assert vluna.flush(10)
    assert gate.booked("ann").charged_xusd == 250


def test_an_outer_task_is_charged_for_an_inner_one_and_refuses_it(vluna: Vluna) -> None:
    with call_context(principal_id="ann", max_tokens=100) as outer:
        with call_context(principal_id="bob", max_tokens=1_000) as inner:
            with vluna.operation(feature_code="tools.search", estimate=80) as op:
                op.record(quantity=80)
            with pytest.raises(BudgetExceeded) as refused, vluna.operation(feature_code="tools.search", estimate=30):
                pass
            assert refused.value.maximum == 100
            assert inner.wait(5)
            assert inner.pending == 0
        assert outer.usage.total_tokens == 80


def test_what_an_inner_task_refuses_is_not_in_flight_in_the_outer_one(vluna: Vluna) -> None:
    with call_context(principal_id="ann", max_tokens=1_000) as outer, call_context(max_tokens=10):
        with pytest.raises(BudgetExceeded) as refused, vluna.operation(feature_code="tools.search", estimate=80):
            pass
        assert refused.value.maximum == 10
        assert outer.pending == 0
        with call_context(), pytest.raises(BudgetExceeded) as again:
            vluna.operation(feature_code="tools.search", estimate=990).__enter__()
        assert again.value.maximum == 10
    with pytest.raises(BudgetExceeded) as counted:
        outer.reserve("another", Amount(0, 1_001))
    assert counted.value.in_flight == 0


def test_what_could_not_be_stored_is_not_in_flight(make_vluna: Callable[..., Vluna], tmp_path: Path) -> None:
    """A disk that fails, and ``on_outbox_unavailable="deny"``: the task has its room back."""
    taken = tmp_path / "a file"
    taken.write_text("no folder can be made here")
    vluna = make_vluna(outbox=str(taken / "outbox"), on_outbox_unavailable="deny")
    with call_context(principal_id="ann", max_tokens=100) as scope:
        for _ in range(3):
            with pytest.raises(OutboxUnavailable):
                vluna.operation(feature_code="tools.search", estimate=80).__enter__()
        assert scope.pending == 0


def test_observed_nothing_is_refused_and_all_is_booked(make_vluna: Callable[..., Vluna], gate: Sandbox) -> None:
    vluna = make_vluna(mode="observe")
    with call_context(principal_id="ann", max_tokens=10) as scope:
        begun(vluna).finish(USED)
        begun(vluna).finish(USED)
        assert scope.wait(5)
    assert len(gate.booked("ann").entries) == 2


def test_a_gate_that_tells_no_price_stops_nobody(vluna: Vluna, gate: Sandbox) -> None:
    gate.faults.add("error_before", "meters")
    with call_context(principal_id="ann", max_amount_xusd=1_000_000):
        begun(vluna).finish(USED)
        begun(vluna).finish(USED)
    gate.faults.clear()
    assert vluna.flush(10)
    assert len(gate.booked("ann").entries) == 2
