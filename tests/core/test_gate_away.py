"""A gate that is away, slow or restarted: calls go on, cost nobody its time-out, and are booked once (rule 9)."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.errors import GateDenied, GateUnavailable
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.policy import Breaker, UngatedCap
from vluna_llm.sandbox import Sandbox

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True, response_id="resp_1")

colours = pytest.mark.parametrize("colour", ["sync", "async"])


def begin(vluna: Vluna, colour: str = "sync", principal: str = "ann") -> Operation:
    with call_context(principal_id=principal):
        operation = vluna.begin(CALL) if colour == "sync" else asyncio.run(vluna.abegin(CALL))
    assert operation is not None
    return operation


def took(act: Callable[[], Any]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def booked(gate: Sandbox, principal: str | None = "ann") -> list[tuple[str, int]]:
    return [(entry.kind, entry.quantity) for entry in gate.booked(principal).entries if entry.charged_xusd > 0]


def open_breaker(vluna: Vluna, colour: str = "sync") -> None:
    for _ in range(5):
        begin(vluna, colour).fail()
    assert vluna._admissions._breaker.state(time.monotonic()) != "closed"


# -- a lease that nobody saw -------------------------------------------------------------------------------------------


@colours
@pytest.mark.parametrize("fault", ["hang_after", "drop_after", "error_after"])
def test_an_authorize_that_was_carried_out_unseen_is_booked_once_by_ingest(
    make_vluna: Callable[..., Vluna], gate: Sandbox, fault: Any, colour: str
) -> None:
    """The gate gave a lease and we never saw it: the call ran ungated, and that lease lapses."""
    vluna = make_vluna(authorize_deadline=0.15)
    begin(vluna, principal="bob").fail()
    gate.faults.add(fault, "authorize", times=None)
    operation = begin(vluna, colour)
    assert operation.lease is None
    gate.faults.clear()
    assert [lease.state for lease in gate.leases("ann")] == ["active"]
    operation.finish(USED)
    assert vluna.flush(10)
    assert booked(gate) == [("ingest", 120)]
    assert [lease.state for lease in gate.leases("ann")] == ["active"], "neither committed nor cancelled"
    (entry,) = gate.booked("ann").entries
    assert entry.labels["operation_id"] == operation.operation_id
    assert abs(entry.occurred_at.timestamp() - time.time()) < 5, "booked at the time of its usage"


@colours
def test_a_call_that_ran_ungated_and_failed_owes_nothing_and_sends_nothing(
    make_vluna: Callable[..., Vluna], gate: Sandbox, colour: str
) -> None:
    vluna = make_vluna(authorize_deadline=0.15)
    gate.faults.add("drop_after", "authorize", times=None)
    operation = begin(vluna, colour)
    gate.faults.clear()
    operation.fail(TimeoutError())
    receipt = operation.wait(5)
    assert receipt is not None
    assert receipt.state == "lapsed"
    assert {request.route for request in gate.requests} == {"authorize"}


# -- slow, not dead ----------------------------------------------------------------------------------------------------


@colours
def test_a_slow_gate_that_answers_in_time_is_waited_for_and_never_left_alone(
    make_vluna: Callable[..., Vluna], gate: Sandbox, colour: str
) -> None:
    vluna = make_vluna(authorize_deadline=1.0)
    gate.faults.add("latency", "authorize", times=None, seconds=0.15)
    for _ in range(7):
        operation = begin(vluna, colour)
        assert operation.lease is not None
        operation.finish(USED)
    assert vluna.flush(10)
    assert booked(gate) == [("commit", 120)] * 7


@colours
def test_a_gate_slower_than_the_deadline_costs_five_calls_their_deadline_and_no_more(
    make_vluna: Callable[..., Vluna], gate: Sandbox, colour: str
) -> None:
    vluna = make_vluna(authorize_deadline=0.2)
    begin(vluna, colour).fail()
    gate.faults.add("latency", "authorize", times=None, seconds=0.6)
    waits = [took(lambda: begin(vluna, colour).finish(USED)) for _ in range(12)]
    assert all(0.15 < wait < 0.6 for wait in waits[:5]), waits
    assert sum(wait > 0.15 for wait in waits[5:]) <= 1, waits
    gate.faults.clear()
    assert vluna.flush(10)
    assert booked(gate) == [("ingest", 120)] * 12


@pytest.mark.parametrize("seconds", [0.4, 7.0])
def test_slow_settlements_neither_hold_up_calls_nor_are_sent_twice_for_money(
    make_vluna: Callable[..., Vluna], gate: Sandbox, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that takes longer than its time-out was carried out all the same: the same bytes find that out."""
    monkeypatch.setattr("vluna_llm.runtime.SETTLE_TIMEOUT", 0.5)
    vluna = make_vluna()
    gate.faults.add("latency" if seconds < 0.5 else "hang_after", "commits", times=3, seconds=seconds)
    assert took(lambda: [begin(vluna, principal=f"cust-{n}").finish(USED) for n in range(3)]) < 0.3
    gate_released = threading.Timer(1.0, gate.faults.release)
    gate_released.start()
    assert vluna.flush(15)
    gate_released.join()
    assert booked(gate, None) == [("commit", 120)] * 3


# -- stop, start, restart ----------------------------------------------------------------------------------------------


@colours
def test_calls_through_a_gate_that_comes_and_goes_are_each_booked_once(
    make_vluna: Callable[..., Vluna], gate: Sandbox, colour: str
) -> None:
    """Up, stopped, up, restarted with another memory, up: one booking for each call, whatever its way."""
    vluna = make_vluna(authorize_deadline=0.15)
    total = 0

    def call(count: int) -> None:
        nonlocal total
        for _ in range(count):
            begin(vluna, colour, f"cust-{total % 4}").finish(USED)
            total += 1

    call(4)
    for _ in range(2):
        gate.stop()
        call(8)
        gate.start()
        call(2)
        gate.restart()
        call(4)
    assert vluna.flush(20)
    assert len(booked(gate, None)) == total
    operations = [entry.labels["operation_id"] for entry in gate.booked().entries]
    assert len(set(operations)) == total


@colours
@pytest.mark.parametrize("policy", ["allow", "deny"])
def test_a_gate_that_is_back_is_noticed_within_a_second_of_the_first_probe(
    make_vluna: Callable[..., Vluna], gate: Sandbox, colour: str, policy: str
) -> None:
    vluna = make_vluna(authorize_deadline=0.1, on_gate_unavailable=policy)
    gate.stop()
    for _ in range(6):
        try:
            begin(vluna, colour).fail()
        except GateUnavailable:
            assert policy == "deny"
    gate.start()

    def until_gated() -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                operation = begin(vluna, colour)
            except GateUnavailable:
                operation = None  # type: ignore[assignment]
            if operation is not None:
                operation.fail()
                if operation.lease is not None:
                    return
            time.sleep(0.02)
        raise AssertionError("it was never noticed")

    assert took(until_gated) < 2.5


def test_however_long_the_outage_a_gate_that_is_back_goes_unnoticed_for_seconds_only() -> None:
    """The pause between two probes grows, and not beyond five seconds."""
    breaker = Breaker(jitter=lambda: 1.0)
    now = 0.0
    for _ in range(5):
        breaker.failed(now)
    for _ in range(200):
        now += breaker.wait(now)
        assert breaker.admit(now)
        breaker.failed(now)
    assert breaker.wait(now) <= 5.5


def test_a_probe_whose_caller_was_cancelled_leaves_the_next_one_to_probe(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    """Else nobody would ask for ten seconds more."""
    vluna = make_vluna(authorize_deadline=0.1)
    gate.stop()
    open_breaker(vluna)
    gate.start()
    gate.faults.add("hang", "authorize", times=1)
    vluna._admissions._breaker.probe_now(time.monotonic())

    async def cancelled() -> None:
        with call_context(principal_id="ann"):
            task = asyncio.ensure_future(vluna.abegin(CALL))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancelled())
    gate.faults.clear()
    operation = begin(vluna)
    assert operation.lease is not None
    operation.fail()


# -- told --------------------------------------------------------------------------------------------------------------


def breaker_events(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    found = []
    for record in caplog.records:
        text = record.getMessage()
        if "vluna.gate.breaker" in text:
            found.append((record.levelno, text.partition("breaker.state=")[2].split()[0]))
    return found


@colours
def test_every_change_of_the_breaker_is_told_once(
    make_vluna: Callable[..., Vluna], gate: Sandbox, caplog: pytest.LogCaptureFixture, colour: str
) -> None:
    """Opened: an error that says what to do. The probes: for the curious. Back: a warning that says how long it was."""
    vluna = make_vluna(authorize_deadline=0.1)
    caplog.set_level(logging.DEBUG, "vluna_llm")
    gate.stop()
    for _ in range(12):
        begin(vluna, colour).fail()
    assert breaker_events(caplog) == [(logging.ERROR, "open")]
    assert "VLUNA_SERVICE_BASE_URL" in caplog.text
    vluna._admissions._breaker.probe_now(time.monotonic())
    begin(vluna, colour).fail()
    assert breaker_events(caplog)[1:] == [(logging.DEBUG, "half_open"), (logging.DEBUG, "open")]
    gate.start()
    vluna._admissions._breaker.probe_now(time.monotonic())
    for _ in range(3):
        begin(vluna, colour).fail()
    assert breaker_events(caplog)[3:] == [(logging.DEBUG, "half_open"), (logging.WARNING, "closed")]
    (back,) = [record.getMessage() for record in caplog.records if "breaker.state=closed" in record.getMessage()]
    assert "breaker.not_asked=7" in back
    assert vluna.telemetry.counts["vluna.gate.breaker"] == 5


def test_many_threads_that_find_the_gate_dead_at_once_tell_it_once(
    make_vluna: Callable[..., Vluna], gate: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    vluna = make_vluna(authorize_deadline=0.1)
    caplog.set_level(logging.DEBUG, "vluna_llm")
    gate.stop()
    start = threading.Barrier(24)

    def call() -> None:
        start.wait(5)
        begin(vluna).fail()

    threads = [threading.Thread(target=call) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert breaker_events(caplog) == [(logging.ERROR, "open")]


def test_changes_are_told_once_however_many_threads_report() -> None:
    """The machine alone: 16 threads fail and succeed at the same instants."""
    for _ in range(50):
        told: list[str] = []
        breaker = Breaker(threshold=3, changed=told.append)
        start = threading.Barrier(16)

        def work(breaker: Breaker = breaker, start: threading.Barrier = start) -> None:
            start.wait(5)
            for _ in range(3):
                breaker.failed(0.0)

        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        assert told == ["open"]
        breaker.succeeded()
        breaker.succeeded()
        assert told == ["open", "closed"]


def test_an_opening_in_the_middle_of_an_opening_is_told_once() -> None:
    """What another thread does between our look at the state and our change of it, done here by the jitter."""
    told: list[str] = []
    others = iter([True])

    def jitter() -> float:
        if next(others, False):
            breaker.failed(0.0)
        return 0.5

    breaker = Breaker(threshold=1, jitter=jitter, changed=told.append)
    breaker.failed(0.0)
    assert told == ["open"]


# -- caps --------------------------------------------------------------------------------------------------------------


@colours
def test_a_customer_may_run_so_many_calls_without_the_gate_and_then_waits_for_it(
    make_vluna: Callable[..., Vluna], gate: Sandbox, colour: str
) -> None:
    vluna = make_vluna(authorize_deadline=0.1)
    vluna._admissions._cap = UngatedCap(max_operations=8)
    gate.stop()
    for _ in range(8):
        begin(vluna, colour).finish(USED)
    with pytest.raises(GateUnavailable, match="as many calls without a lease as are allowed"):
        begin(vluna, colour)
    begin(vluna, colour, "bob").finish(USED)
    gate.start()
    vluna._admissions._breaker.probe_now(time.monotonic())
    operation = begin(vluna, colour)
    assert operation.lease is not None
    operation.finish(USED)
    assert vluna.flush(15)
    assert booked(gate).count(("ingest", 120)) == 8
    assert booked(gate).count(("commit", 120)) == 1
    gate.stop()
    begin(vluna, colour).fail()
    gate.start()


def test_two_short_outages_hours_apart_are_not_one_long_one() -> None:
    """A customer who calls rarely met both, and nothing in between; the gate answered others all the time."""
    cap = UngatedCap(max_operations=5, max_age_seconds=3600.0)
    cap.count("rare", 0.0)
    assert not cap.has_room("rare", 7200.0), "nobody was answered in between: one outage of two hours"
    cap.answered(3000.0)
    assert cap.has_room("rare", 7200.0)
    cap.count("rare", 7200.0)
    assert cap.used("rare") == 1
    assert not cap.has_room("rare", 7200.0 + 3601.0)


def test_a_rare_customer_is_served_in_the_second_outage(make_vluna: Callable[..., Vluna], gate: Sandbox) -> None:
    vluna = make_vluna(authorize_deadline=0.1)
    cap = vluna._admissions._cap = UngatedCap(max_age_seconds=0.3)
    gate.faults.add("drop_before", "authorize", times=None, principal_id="rare")
    begin(vluna, principal="rare").fail()
    begin(vluna, principal="another").fail()
    time.sleep(0.4)
    begin(vluna, principal="rare").fail()
    assert cap.used("rare") == 1


@colours
def test_the_denied_stay_denied_while_the_gate_is_left_alone(
    make_vluna: Callable[..., Vluna], gate: Sandbox, colour: str
) -> None:
    vluna = make_vluna(authorize_deadline=0.1)
    gate.set_credit("poor", 0)
    with pytest.raises(GateDenied):
        begin(vluna, colour, "poor")
    gate.stop()
    open_breaker(vluna, colour)
    with pytest.raises(GateDenied):
        begin(vluna, colour, "poor")
    gate.start()


# -- many --------------------------------------------------------------------------------------------------------------


def outage(vluna: Vluna, gate: Sandbox, calls: int, customers: int) -> tuple[float, float]:
    """Half of the calls sync in threads, half async at once, the gate stopped for the middle third.

    Gives the median and the longest time that a call had to wait for its admission, in seconds.
    """
    waits: list[float] = []

    def one(number: int) -> None:
        began = time.monotonic()
        operation = begin(vluna, principal=f"cust-{number % customers}")
        waits.append(time.monotonic() - began)
        operation.finish(USED)

    async def crowd(numbers: range) -> None:
        async def call(number: int) -> None:
            with call_context(principal_id=f"cust-{number % customers}"):
                operation = await vluna.abegin(CALL)
            assert operation is not None
            operation.finish(USED)

        await asyncio.gather(*(call(number) for number in numbers))

    third = calls // 3
    for part in range(3):
        if part == 1:
            gate.stop()
        if part == 2:
            gate.start()
        numbers = range(part * third, part * third + third)
        halves = numbers[: third // 2], numbers[third // 2 :]
        threads = [threading.Thread(target=lambda n=n: [one(i) for i in n]) for n in (halves[0][::2], halves[0][1::2])]  # type: ignore[misc]
        for thread in threads:
            thread.start()
        for first in range(0, len(halves[1]), 50):
            asyncio.run(crowd(halves[1][first : first + 50]))
        for thread in threads:
            thread.join(60)
    waits.sort()
    return waits[len(waits) // 2], waits[-1]


def test_hundreds_of_calls_through_an_outage_are_each_booked_once(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    vluna = make_vluna(authorize_deadline=0.3)
    median, longest = outage(vluna, gate, 300, 12)
    assert vluna.flush(60)
    entries = gate.booked().entries
    assert len(entries) == len({entry.labels["operation_id"] for entry in entries}) == 300
    assert {entry.charged_xusd > 0 for entry in entries} == {True}
    assert {entry.kind for entry in entries} == {"commit", "ingest"}
    assert median < 0.1
    assert longest < 1.5


@pytest.mark.slow
def test_thousands_of_calls_through_an_outage_are_each_booked_once(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Any
) -> None:
    """3,000 calls of 40 customers, in threads and on event loops, with the gate's bad habits on all the time."""
    vluna = make_vluna(authorize_deadline=0.5, outbox=str(tmp_path))
    for number in range(90):
        kind: Any = ("error_before", "error_after", "drop_after")[number % 3]
        gate.faults.add(kind, (None, "commits", "ingest")[number // 3 % 3], skip=20 + 30 * number)
    outage(vluna, gate, 3000, 40)
    assert vluna.flush(180)
    entries = [entry for entry in gate.booked().entries if entry.charged_xusd > 0]
    assert len(entries) == len({entry.labels["operation_id"] for entry in entries}) == 3000
