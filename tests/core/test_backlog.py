"""The window on what waits: bounded in all and by customer, fair between them, and nothing is forgotten."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vluna_llm.backlog import Backlog, Lane

ANN: Lane = ("ann", "ann")
BOB: Lane = ("bob", "bob")


def drain(backlog: Backlog, now: float = 0.0) -> list[str]:
    delivered = []
    while (found := backlog.next(now)) is not None:
        delivered.append(found[1])
        backlog.done(*found, now, None)
    return delivered


def test_a_lane_is_served_one_after_another_and_lanes_take_turns() -> None:
    backlog = Backlog()
    for number in range(3):
        backlog.offer(f"a{number}", ANN, 0.0)
    backlog.offer("b0", BOB, 0.0)
    first, second = backlog.next(0.0), backlog.next(0.0)
    assert (first, second) == ((ANN, "a0"), (BOB, "b0"))
    assert backlog.next(0.0) is None, "both lanes are busy"
    backlog.done(ANN, "a0", 0.0, None)
    assert backlog.next(0.0) == (ANN, "a1")


def test_what_waits_for_another_attempt_steps_out_of_its_lane() -> None:
    backlog = Backlog()
    backlog.offer("a0", ANN, 0.0)
    backlog.offer("a1", ANN, 0.0)
    assert backlog.next(0.0) == (ANN, "a0")
    backlog.done(ANN, "a0", 0.0, 30.0)
    assert drain(backlog, 1.0) == ["a1"]
    assert len(backlog) == 1
    assert backlog.next_due() == 30.0
    assert drain(backlog, 30.0) == ["a0"]


def test_another_settlement_of_one_that_waits_owes_nothing_to_its_delay() -> None:
    """Usage that turns up while a cancel waits for the end of a rate window."""
    backlog = Backlog()
    backlog.offer("a0", ANN, 0.0, 300.0)
    assert backlog.offer("a0", ANN, 1.0) == "known"
    assert backlog.next(1.0) == (ANN, "a0")
    backlog.done(ANN, "a0", 1.0, None)
    assert len(backlog) == 0
    assert backlog.next(301.0) is None, "the timer of old is void"


def test_another_settlement_of_one_that_is_on_its_way_is_looked_at_when_that_has_ended() -> None:
    backlog = Backlog()
    backlog.offer("a0", ANN, 0.0)
    assert backlog.next(0.0) == (ANN, "a0")
    backlog.offer("a0", ANN, 0.0)
    assert not backlog.done(ANN, "a0", 0.0, 300.0)
    assert backlog.next(0.0) == (ANN, "a0")


def test_one_customer_can_neither_fill_the_window_nor_keep_others_out() -> None:
    backlog = Backlog(window=100)
    taken = sum(backlog.offer(f"a{number}", ANN, 0.0) == "taken" for number in range(1_000))
    assert 16 <= taken <= 100
    assert backlog.more
    assert backlog.offer("b0", BOB, 0.0) == "taken"
    assert [backlog.next(0.0), backlog.next(0.0)] == [(ANN, "a0"), (BOB, "b0")]


def test_what_finds_no_room_while_the_journal_is_being_read_is_read_with_the_next_look() -> None:
    """It came after the journal had answered, so that the answer, complete as it was, does not hold it."""
    backlog = Backlog(window=32)
    backlog.more = True
    backlog.looking(0.0)
    late = [backlog.offer(f"a{number}", ANN, 0.0) for number in range(20)]
    assert "full" in late
    backlog.refilled(0.0, 0, True)
    assert backlog.more
    drain(backlog)
    backlog.looking(20.0)
    backlog.refilled(20.0, 4, True)
    assert not backlog.more


def test_what_a_look_has_to_find_and_came_after_it_is_looked_for_again() -> None:
    """The settler is told of rows in the journal while it reads it."""
    backlog = Backlog()
    backlog.looking(0.0)
    backlog.more = True
    backlog.refilled(0.0, 0, True)
    assert backlog.more


def test_very_many_customers_are_bounded_too() -> None:
    backlog = Backlog(window=100)
    for number in range(1_000):
        backlog.offer(f"op{number}", (f"c{number}", ""), 0.0)
    assert len(backlog) <= 100
    assert backlog.more


def test_who_calls_while_a_backlog_of_very_many_customers_drains_does_not_wait_for_its_end() -> None:
    backlog = Backlog(window=100)
    for number in range(1_000):
        backlog.offer(f"op{number}", (f"c{number}", ""), 0.0)
    taken = [backlog.offer(f"new{number}", (f"n{number}", ""), 0.0, fresh=True) for number in range(1_000)]
    assert taken.count("taken") == 100
    assert len(backlog) == 200


def test_every_second_turn_is_a_new_calls() -> None:
    backlog = Backlog()
    for number in range(6):
        backlog.offer(f"old{number}", (f"o{number}", ""), 0.0)
        backlog.offer(f"new{number}", (f"n{number}", ""), 0.0, fresh=number < 3)
    turns = drain(backlog)
    assert turns[:6] == ["new0", "old0", "new1", "old1", "new2", "old2"]
    assert len(turns) == 12


def test_what_waits_for_hours_leaves_room_for_what_is_due() -> None:
    """A feature without a price holds thousands of settlements up; they must not hold up the others."""
    backlog = Backlog(window=100)
    for number in range(1_000):
        backlog.offer(f"a{number}", ANN, 0.0, 300.0)
    assert len(backlog) <= 50
    assert backlog.offer("b0", BOB, 0.0) == "taken"


def test_what_is_nowhere_else_is_taken_whatever_the_room() -> None:
    backlog = Backlog(window=2)
    for number in range(100):
        assert backlog.offer(f"a{number}", ANN, 0.0, must=True) == "taken"
    assert len(drain(backlog)) == 100
    backlog.offer("a", ANN, 0.0, must=True)
    found = backlog.next(0.0)
    assert found is not None
    assert not backlog.done(*found, 0.0, 300.0, must=True)
    assert len(backlog) == 1


def test_the_journal_is_asked_again_when_there_is_room_and_less_and_less_often_when_it_has_nothing() -> None:
    backlog = Backlog(window=4)
    for number in range(1_000):
        backlog.offer(f"a{number}", ANN, 0.0)
    assert not backlog.wants_more(0.0), "no room"
    drain(backlog)
    assert backlog.wants_more(0.0)
    backlog.refilled(0.0, 0, False)
    assert not backlog.wants_more(0.5)
    assert backlog.next_due() == pytest.approx(2.0)
    assert backlog.wants_more(2.0)
    backlog.refilled(2.0, 0, False)
    assert not backlog.wants_more(5.0)
    for _ in range(10):
        backlog.refilled(2.0, 0, False)
    assert backlog.next_due() == pytest.approx(17.0)
    backlog.refilled(20.0, 3, False)
    assert backlog.wants_more(20.0)
    backlog.refilled(20.0, 3, True)
    assert not backlog.wants_more(1e9)
    assert backlog.next_due() is None


def test_when_the_gate_is_back_only_what_it_was_missed_for_is_due() -> None:
    backlog = Backlog()
    for name, lane, away in (("a", ANN, True), ("b", BOB, False)):
        backlog.offer(name, lane, 0.0)
        found = backlog.next(0.0)
        assert found is not None
        backlog.done(*found, 0.0, 300.0, away=away)
    backlog.gate_is_back(10.0)
    assert drain(backlog, 10.0) == ["a"]
    assert backlog.next_due() == 300.0


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), window=st.integers(4, 60), lanes=st.integers(1, 40))
def test_with_its_journal_nothing_is_ever_forgotten_or_out_of_bounds(seed: int, window: int, lanes: int) -> None:
    """The settler's loop over a journal that is a dict: all is delivered, one of a lane at a time, memory bounded."""
    chance = random.Random(seed)
    backlog, now = Backlog(window), 0.0
    journal: dict[str, tuple[Lane, float]] = {}
    delivered: list[str] = []
    flying: dict[Lane, str] = {}
    arrivals = 400
    while arrivals or journal or flying:
        now += chance.random()
        for _ in range(chance.randrange(0, 30)):
            if arrivals:
                arrivals -= 1
                lane = (f"c{chance.randrange(lanes)}", "")
                journal[f"op{arrivals}"] = (lane, 0.0)
                backlog.offer(f"op{arrivals}", lane, now, fresh=chance.random() < 0.5)
        if backlog.wants_more(now):
            due = sorted(journal.items(), key=lambda item: item[1][1])[: 2 * window]
            taken = 0
            backlog.refilled(now, 0, True)
            for operation_id, (lane, at) in due:
                if not backlog.holds(operation_id):
                    taken += backlog.offer(operation_id, lane, now, max(0.0, at - now)) == "taken"
            backlog.refilled(now, taken, len(due) == len(journal) and not backlog.more)
        while len(flying) < 8 and (found := backlog.next(now)) is not None:
            assert found[0] not in flying
            flying[found[0]] = found[1]
        for lane in chance.sample(sorted(flying), chance.randrange(len(flying) + 1)):
            operation_id = flying.pop(lane)
            if chance.random() < 0.3:
                delay = chance.choice([0.0, 1.0, 30.0])
                journal[operation_id] = (lane, now + delay)
                backlog.done(lane, operation_id, now, delay)
            else:
                del journal[operation_id]
                delivered.append(operation_id)
                backlog.done(lane, operation_id, now, None)
        assert len(backlog) <= 2 * window
        assert now < 1e5, "it stands still"
    assert len(delivered) == len(set(delivered)) == 400
    assert len(backlog) == 0
