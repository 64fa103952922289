"""The model: whatever happens in whatever order, known usage is charged exactly once and nothing else is charged.

Hypothesis draws histories of several processes on one outbox directory: calls (threads and coroutines, jobs, background
responses) that end, are given up, and report usage late; deliveries, adoptions, closes; crashes at every await, before
and after every write and send; requests and answers that are lost, repeated, late or answered wrongly; a gate that
restarts, refuses the key, loses a price, switches a feature or a customer off; clocks that jump. After every step
nothing may be charged twice, and at the end the gate's books are the sum of the known usages.

Left out, since nothing can make it right from outside: jobs in observe mode. A run that the gate denied is booked
without a lease there, while another run that was allowed is charged by a commit.
"""

from __future__ import annotations

import contextvars
import logging
import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from model_gate import ALL_FATES, Fate
from model_world import FEATURES, MODELS, PRINCIPALS, Call, World, complete, dump

from vluna_llm.ending import Ending

STEPS: Counter[str] = Counter()
"""Rules that were really run, by name."""
ENDS: Counter[str] = Counter()
"""What the histories came to: bookings, crashes, states of rows."""

SEEDS = "1,5,8"
"""Those of the long run. By 5 and 8 it was found that an operation which ended once more was composed anew; what a seed
draws changes with the rules, so what was found is kept in `test_histories`."""

some = st.integers(min_value=0, max_value=40)
tokens = st.integers(min_value=0, max_value=60).map(lambda n: n * 7)
crash = st.one_of(st.none(), st.none(), st.integers(min_value=0, max_value=30))
principals = st.sampled_from(PRINCIPALS)
models = st.sampled_from(MODELS)
jobs = st.sampled_from((None, None, None, "job-1", "job-2"))
fates = st.sampled_from(ALL_FATES)
outages: st.SearchStrategy[Fate | None] = st.sampled_from(
    (None, None, "refused_connection", "request_lost", "answer_lost", "key_refused", "error_after", "bad_gateway")
)
mostly = st.sampled_from((True, True, False))
METERS = tuple(
    feature + part for feature in FEATURES for part in ("", ".tokens.input", ".tokens.cached", ".tokens.output")
)


class Books(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(first_call_fails=True)
        self.world.__enter__()

    @initialize(kind=st.sampled_from(("cancel", "estimate")), observe=st.booleans())
    def first(self, kind: Any, observe: bool) -> None:
        self.options: dict[str, Any] = {"on_abort": kind, "mode": "observe" if observe else "enforce"}
        self.world.start(**self.options)

    # -- who there is ----------------------------------------------------------------------------------------------

    def job(self, job: str | None) -> str | None:
        return None if self.options["mode"] == "observe" else job

    def process(self, index: int) -> Any:
        alive = self.world.alive()
        return alive[index % len(alive)]

    def of(self, index: int, calls: list[Call]) -> Call:
        return calls[-1 - index % len(calls)]

    def running(self) -> list[Call]:
        return [call for call in self.world.calls if call.running and call.process.runs]

    def asking(self) -> list[Call]:
        return [call for call in self.world.calls if call.waiting is not None and call.process.runs]

    def some_process(self) -> bool:
        return bool(self.world.alive())

    def count(self, name: str) -> None:
        STEPS[name] += 1

    # -- processes -------------------------------------------------------------------------------------------------

    @rule(what=st.sampled_from(("start", "kill", "close", "stop", "wake", "start")), which=some, at=crash)
    def life(self, what: str, which: int, at: int | None) -> None:
        """A process starts, is killed, gives its journal up and goes on, is stopped (a suspended machine), or woken."""
        self.count(f"life {what}")
        alive = self.world.alive()
        if what == "start" and len(alive) < 4:
            self.world.start(**self.options)
        elif what == "wake" or not alive:
            for process in self.world.processes:
                process.asleep = False
            if not self.world.alive():
                self.world.start(**self.options)
        elif what == "kill":
            self.world.kill(self.process(which))
        elif what == "close":
            process = self.process(which)
            process.act(lambda: process.vluna.close(5), at)
            self.world._look(process)
        elif what == "stop":
            self.process(which).asleep = True

    # -- calls -----------------------------------------------------------------------------------------------------

    @precondition(some_process)
    @rule(which=some, principal=principals, model=models, used=tokens, job=jobs, at=crash)
    def begin(self, which: int, principal: str, model: str, used: int, job: str | None, at: int | None) -> None:
        self.count("begin")
        job = self.job(job)
        self.world.begin(self.process(which), principal, model, used or 7 if job else used, job=job, crash_at=at)

    @precondition(some_process)
    @rule(which=some, principal=principals, model=models, used=tokens, job=jobs, at=crash)
    def begin_async(self, which: int, principal: str, model: str, used: int, job: str | None, at: int | None) -> None:
        self.count("begin_async")
        job = self.job(job)
        self.world.begin_async(self.process(which), principal, model, used or 7 if job else used, job=job, crash_at=at)

    @precondition(some_process)
    @rule(which=some, principal=principals, model=models, used=tokens, job=jobs, at=crash)
    def call(self, which: int, principal: str, model: str, used: int, job: str | None, at: int | None) -> None:
        """A call from its beginning to its end."""
        self.count("call")
        process = self.process(which)
        call = self.world.begin(process, principal, model, used or 7, job=self.job(job), crash_at=None)
        if call.operation is not None:
            self.world.end(call, complete(call.tokens), call.tokens, at)

    call_again = call

    @precondition(asking)
    @rule(which=some, at=crash, cancel=st.sampled_from((False, False, False, True)))
    def await_ends(self, which: int, at: int | None, cancel: bool) -> None:
        """A coroutine goes on from its await, or is cancelled there."""
        self.count("await_ends")
        self.world.go_on(self.of(which, self.asking()), at, cancel=cancel)

    @precondition(running)
    @rule(which=some, at=crash)
    def finish(self, which: int, at: int | None) -> None:
        """Usage came: at the end of the call, after it was given up, or once more."""
        self.count("finish")
        call = self.of(which, self.running())
        if call.parked is None:
            self.world.end(call, complete(call.tokens), call.tokens, at)

    finish_again = finish
    await_ends_again = await_ends

    @precondition(running)
    @rule(which=some, generated=some, at=crash)
    def finish_without_usage(self, which: int, generated: int, at: int | None) -> None:
        """The answer was whole and reported nothing: an estimate is billed."""
        self.count("finish_without_usage")
        call = self.of(which, self.running())
        if call.parked is None and not call.ended:
            expected = call.operation._row.estimated_input + generated  # type: ignore[union-attr]
            self.world.end(call, Ending("complete", finished=True, output_tokens=generated), expected, at)

    @precondition(running)
    @rule(which=some, how=st.sampled_from(("closed", "error", "abandoned")), at=crash)
    def give_up(self, which: int, how: Any, at: int | None) -> None:
        self.count("give_up")
        call = self.of(which, self.running())
        if call.parked is not None or call.ended:
            return
        expected = None
        if self.options["on_abort"] == "estimate" and how != "error":
            expected = call.operation._row.estimated_input + 3  # type: ignore[union-attr]
        if expected is None or call.known is None:
            self.world.end(call, Ending(how, output_tokens=3), expected, at)

    @precondition(running)
    @rule(which=some, at=crash)
    def park(self, which: int, at: int | None) -> None:
        self.count("park")
        call = self.of(which, self.running())
        if call.known is None and not call.ended and call.parked is None and call.job is None:
            self.world.park(call, at)

    @precondition(lambda self: self.some_process() and any(call.parked for call in self.world.calls))
    @rule(which=some, where=some, at=crash)
    def retrieve(self, which: int, where: int, at: int | None) -> None:
        self.count("retrieve")
        call = self.of(which, [call for call in self.world.calls if call.parked])
        if call.tokens:
            self.world.retrieve(self.process(where), call, at)

    # -- settling --------------------------------------------------------------------------------------------------

    @precondition(some_process)
    @rule(which=some, how_many=st.sampled_from((1, 1, 2, 5)), at=crash)
    def deliver(self, which: int, how_many: int, at: int | None) -> None:
        self.count("deliver")
        process = self.process(which)
        process.act(lambda: process.deliver(how_many), at)
        self.world._look(process)

    deliver_again = deliver
    deliver_once_more = deliver

    @precondition(some_process)
    @rule(
        which=some,
        other=some,
        late=some,
        before=st.booleans(),
        what=st.sampled_from(("usage", "deliver", "adopt", "kill", "kill, and another price", "close", "gate")),
    )
    def deliver_and_meanwhile(self, which: int, other: int, late: int, before: bool, what: str) -> None:
        """Something else happens while a request, or its answer, is on the way."""
        self.count("deliver_and_meanwhile")
        process, beside = self.process(which), self.process(other)

        def happens() -> None:
            if what == "usage" and self.running():
                call = self.of(late, self.running())
                if call.parked is None:
                    self.world.end(call, complete(call.tokens), call.tokens)
            elif what == "deliver" and beside is not process:
                beside.act(lambda: beside.deliver(2))
            elif what == "adopt":  # its own keeper's thread, or another process
                beside.act(beside.adopt)
            elif what == "kill":
                beside.die("killed")
            elif what == "kill, and another price":
                process.die("killed")
                meter, there = METERS[late % len(METERS)], bool(other % 2)
                (self.world.gate.sandbox.price(meter, 4) if there else self.world.gate.sandbox.unprice(meter))
            elif what == "close":
                beside.act(lambda: beside.vluna.close(1))
            elif what == "gate":
                self.world.gate.restart()

        (self.world.meanwhile if before else self.world.meanwhile_after).append(happens)
        process.act(lambda: process.deliver(1))
        self.world.meanwhile.clear()
        self.world.meanwhile_after.clear()
        for one in (process, beside):
            self.world._look(one)

    deliver_and_meanwhile_again = deliver_and_meanwhile

    @precondition(some_process)
    @rule(which=some, what=st.sampled_from(("adopt", "chores")), at=crash)
    def keep_house(self, which: int, what: str, at: int | None) -> None:
        """Its keeper looks for journals of dead processes, or does whatever has come round."""
        self.count(what)
        process = self.process(which)
        process.act(process.adopt if what == "adopt" else process.chores, at)
        self.world._look(process)

    @precondition(lambda self: self.world.calls)
    @rule(which=some, what=st.sampled_from(("retry", "repair")))
    def operator(self, which: int, what: Any) -> None:
        """Somebody orders something about an operation, whether it makes sense or not."""
        self.count("operator")
        rows = [row for row in self.world.rows() if row.state.settlement not in ("booked", "lapsed", "none")]
        if rows:
            self.world.order(rows[which % len(rows)], what)

    # -- the network, the gate, time -------------------------------------------------------------------------------

    @rule(
        what=st.one_of(
            st.tuples(st.just("fates"), st.lists(fates, min_size=1, max_size=4)),
            st.tuples(st.just("fates"), st.lists(fates, min_size=1, max_size=4)),
            st.tuples(st.just("outage"), outages),
            st.tuples(st.just("late"), some),
            st.tuples(st.just("restart"), some),
            st.tuples(st.just("pass"), st.sampled_from((0.3, 2.0, 20.0, 400.0, 4_000.0, 46_000.0))),
            st.tuples(st.just("jump"), st.sampled_from((-30, -2, 2, 30))),
            st.tuples(st.just("jump of the gate"), st.sampled_from((2, 30))),
            st.tuples(st.just("price"), st.tuples(st.sampled_from(METERS), mostly)),
            st.tuples(st.just("feature"), st.tuples(st.sampled_from(FEATURES), mostly)),
            st.tuples(st.just("user"), st.tuples(principals, mostly)),
            st.tuples(st.just("credit"), st.tuples(principals, mostly)),
        )
    )
    def weather(self, what: tuple[str, Any]) -> None:
        """Something happens to the gate, to its catalogue or customers, to the network as a whole, or to a clock."""
        kind, value = what
        self.count(f"weather {kind}")
        world, gate = self.world, self.world.gate.sandbox
        if kind == "fates":
            world.network.fates.extend(value)
        elif kind == "outage":
            world.network.outage = value
        elif kind == "late":
            world.network.deliver_late(value)
        elif kind == "restart":
            world.gate.turn = value
            world.gate.restart()
        elif kind == "pass":
            world.pass_time(value)
        elif kind == "jump":
            world.clock.jump(value * 3600.0)
        elif kind == "jump of the gate":
            gate.clock.advance(value * 3600.0)
        elif kind == "price" and value[1]:
            gate.price(value[0], 4)
        elif kind == "price":
            gate.unprice(value[0])
        elif kind == "feature":
            gate.feature(value[0], active=value[1])
        elif kind == "user":
            gate.disable_user(value[0], active=value[1])
        elif kind == "credit":
            gate.set_credit(value[0], 10**9 if value[1] else 0)

    # -- what holds ------------------------------------------------------------------------------------------------

    def check_invariants(self, settings: Any, output: Any, runtimes: Any) -> None:
        self.world.check()

    def teardown(self) -> None:
        try:
            if self.world.processes:
                self.world.drain()
                self.world.balance()
                self.world.tell(ENDS)
        except BaseException:
            if os.environ.get("MODEL_DUMP"):
                print(dump(self.world))
            raise
        finally:
            self.world.__exit__(None, None, None)


def run(examples: int, steps: int, *, number: int | None = None) -> int:
    """Run the machine; how many rules were run. In a context of its own: who dies inside one never leaves it."""
    return contextvars.copy_context().run(_run, examples, steps, number)


def _run(examples: int, steps: int, number: int | None) -> int:
    STEPS.clear()
    ENDS.clear()
    logging.getLogger("vluna_llm").setLevel(logging.CRITICAL)
    try:
        run_state_machine_as_test(
            Books if number is None else seed(number)(Books),
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                derandomize=number is None,
                database=None,
                deadline=None,
                print_blob=True,
                verbosity=Verbosity.normal,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        logging.getLogger("vluna_llm").setLevel(logging.NOTSET)
    return sum(STEPS.values())


@pytest.mark.timeout(600)  # a failure is made small first
def test_books_are_the_sum_of_known_usages(capsys: pytest.CaptureFixture[str]) -> None:
    """The quick run: always the same histories."""
    done = run(60, 50)
    with capsys.disabled():
        print(f"\nmodel: {done} steps: " + ", ".join(f"{name} {count}" for name, count in STEPS.most_common()))
    assert done > 1_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_books_are_the_sum_of_known_usages_in_many_histories(capsys: pytest.CaptureFixture[str]) -> None:
    """The long run: the same histories every time, so that it fails for a change and not by chance.

    ``MODEL_SEED=21,22`` in the environment tries those of other seeds, about 15 seconds each.
    """
    numbers = [int(number) for number in os.environ.get("MODEL_SEED", SEEDS).split(",")]
    done = sum(run(150, 80, number=number) for number in numbers)
    assert done >= 20_000 * len(numbers) // 3
    with capsys.disabled():
        print(f"\nmodel: {done} steps")
        print("model, the last of them: " + ", ".join(f"{name} {count}" for name, count in ENDS.most_common(40)))
