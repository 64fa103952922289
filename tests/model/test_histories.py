"""Histories that the model found, each as it was shrunk: what went wrong once is run in every run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from model_world import LONGEST, Call, World, complete

from vluna_llm.ending import Ending


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


def settle(world: World) -> None:
    """Everything is delivered, and the books are right."""
    world.check()
    world.drain()
    world.balance()


def run_of_a_job(world: World, tokens: int) -> Call:
    return world.begin(world.processes[0], "ann", "gpt-a", tokens, job="job-1", crash_at=None)


def test_a_run_that_was_given_up_and_reports_usage_late_does_not_charge_the_job_again(world: World) -> None:
    """Its lease was closed by the charge of the run before, of which the cancel's answer did not tell."""
    process = world.start()
    first = run_of_a_job(world, 70)
    world.end(first, complete(70), 70)
    process.act(lambda: process.deliver(5))
    second = run_of_a_job(world, 140)
    world.end(second, Ending("closed"), None)
    process.act(lambda: process.deliver(5))
    world.end(second, complete(140), 140)
    settle(world)
    assert list(world.charged().values()) == [70]


def test_a_run_that_was_given_up_and_reports_usage_late_charges_the_job_where_no_other_did(world: World) -> None:
    process = world.start()
    only = run_of_a_job(world, 140)
    world.end(only, Ending("closed"), None)
    process.act(lambda: process.deliver(5))
    world.end(only, complete(140), 140)
    settle(world)
    assert list(world.charged().values()) == [140]


def test_a_refused_commit_that_an_operator_repairs_is_booked_by_an_ingest_with_bytes_of_its_own(world: World) -> None:
    """The commit's bytes were kept until the books were looked at, and were then sent as the ingest's, in vain."""
    process = world.start()
    call = world.begin(process, "ann", "gpt-a", 70, job=None, crash_at=None)
    world.end(call, complete(70), 70)
    world.gate.sandbox.feature("openai.gpt-a", active=False)
    process.act(lambda: process.deliver(1))
    world.gate.sandbox.feature("openai.gpt-a", active=True)
    (row,) = (row for row in world.rows() if row.state.settlement == "refused")
    world.order(row, "repair")
    settle(world)
    assert list(world.charged().values()) == [70]


@pytest.mark.parametrize("answered", [False, True])
def test_what_was_composed_is_sent_again_as_it_was_though_the_prices_are_others(world: World, answered: bool) -> None:
    """The process dies with its commit on the way; composed once more, it would be another commit of the same key."""
    gate, process = world.gate.sandbox, world.start()
    gate.price("openai.gpt-a.tokens.input", 3)
    gate.unprice("openai.gpt-a.tokens.output")
    call = world.begin(process, "ann", "gpt-a", 70, job=None, crash_at=None)
    world.end(call, complete(70), 70)
    (world.meanwhile_after if answered else world.meanwhile).append(lambda: process.die("killed"))
    process.act(lambda: process.deliver(1))
    assert process.dead
    gate.price("openai.gpt-a.tokens.output", 12)
    settle(world)
    assert list(world.charged().values()) == [70]


def commits(world: World) -> list[bytes]:
    return [sent.body for sent in world.network.log if sent.route == "commits"]


@pytest.mark.parametrize("gone", ["pruned", "closed", "taken over"])
def test_an_operation_that_was_settled_and_ends_once_more_is_not_composed_anew(world: World, gone: str) -> None:
    """Its row was dropped since, or moved; taken up as it had begun, it was another commit of the same key."""
    gate, process = world.gate.sandbox, world.start()
    gate.price("openai.gpt-a.tokens.input", 3)
    gate.unprice("openai.gpt-a.tokens.output")
    call = world.begin(process, "ann", "gpt-a", 70, job=None, crash_at=None)
    world.end(call, complete(70), 70)
    if gone == "taken over":
        world.network.fates.extend(("ok", "answer_lost"))  # the prices, the commit
    process.act(lambda: process.deliver(1))
    if gone == "pruned":
        world.pass_time(4_000.0)
        process.act(process.chores)
    else:
        world.network.outage = "refused_connection"
        process.act(lambda: process.vluna.close(0))
        world.network.outage = None
        if gone == "taken over":
            other = world.start()
            other.act(other.adopt)
    gate.price("openai.gpt-a.tokens.output", 12)
    if gone != "taken over":
        assert not world.rows()
    world.end(call, complete(70), 70)
    world.end(call, Ending("error"), 70)
    process.act(lambda: process.deliver(5))
    settle(world)
    assert len(commits(world)) == (2 if gone == "taken over" else 1)
    assert not any(sent.route == "cancel" for sent in world.network.log)
    assert list(world.charged().values()) == [70]


@pytest.mark.parametrize("sent", [False, True])
def test_usage_that_comes_after_a_cancel_whose_row_is_gone_is_charged(world: World, sent: bool) -> None:
    """What says something new is taken up, and knows of the cancel: the lease is gone, and an ingest follows."""
    process = world.start()
    call = world.begin(process, "ann", "gpt-a", 70, job=None, crash_at=None)
    world.end(call, Ending("closed"), None)
    if sent:
        process.act(lambda: process.deliver(1))
    world.network.outage = "refused_connection"
    process.act(lambda: process.vluna.close(0))
    world.network.outage = None
    other = world.start()
    other.act(other.adopt)
    world.end(call, complete(70), 70)
    settle(world)
    assert list(world.charged().values()) == [70]
    assert not commits(world)


def test_usage_that_is_taken_over_while_the_cancel_is_on_its_way_is_not_settled_by_its_answer(world: World) -> None:
    """The better row takes the place of the one that is being delivered: the answer is not written into it."""
    process, other = world.start(), world.start()
    call = world.begin(process, "ann", "gpt-a", 70, job=None, crash_at=None)
    world.end(call, Ending("closed"), None)
    world.network.outage = "refused_connection"
    process.act(lambda: process.vluna.close(0))
    world.network.outage = None
    other.act(other.adopt)
    world.end(call, complete(70), 70)
    world.kill(process)
    world.pass_time(LONGEST)
    world.meanwhile.append(lambda: other.act(other.adopt))
    other.act(lambda: other.deliver(1))
    assert not world.meanwhile
    settle(world)
    assert list(world.charged().values()) == [70]
