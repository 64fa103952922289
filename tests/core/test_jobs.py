"""Jobs that may run more than once: each piece of their work is charged once, whatever became of the runs (rule 17)."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.errors import GateDenied
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.sandbox import Sandbox

FEATURE = "openai.gpt-4o-mini"
JOB = {"principal_id": "ann", "idempotency_key": "job-42"}


def ask(what: str = "the question") -> ModelCall:
    return ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": [{"role": "user", "content": what}]})


def used(tokens: int = 100) -> Ending:
    return Ending("complete", usage=TokenUsage(tokens, 20), finished=True, response_id=f"resp_{tokens}")


def begin(vluna: Vluna, call: ModelCall | None = None, **context: Any) -> Operation:
    with call_context(**{**JOB, **context}):
        operation = vluna.begin(call or ask())
    assert operation is not None
    return operation


def charged(gate: Sandbox, principal: str = "ann") -> list[int]:
    return [entry.quantity for entry in gate.booked(principal).entries if entry.charged_xusd > 0]


# -- every fate of two and three runs --------------------------------------------------------------------------------

FATES = ("done", "cancelled", "vanished", "left undelivered", "asleep")
"""What becomes of a run: it ends and is settled; its call fails; its process dies in the middle; its process dies with
the usage in the journal, and is started again much later; it stands still while the others run, and then ends."""


class Runs:
    """Runs of one job on hosts of their own, against one gate."""

    def __init__(self, gate: Sandbox, folder: Path) -> None:
        self.gate = gate
        self.folder = folder
        self.late: list[Callable[[], None]] = []
        self.hosts = itertools.count()

    def host(self, name: str | None = None) -> Vluna:
        return Vluna(
            base_url=self.gate.base_url,
            realm_id=self.gate.realm_id,
            key_id=self.gate.key_id,
            key_secret=self.gate.key_secret,
            outbox=str(self.folder / (name or f"host-{next(self.hosts)}")),
            authorize_deadline=0.1,
        )

    def run(self, fate: str, *, gated: bool, tokens: int) -> None:
        name = f"host-{next(self.hosts)}"
        vluna = self.host(name)
        if not gated:
            self.gate.faults.add("drop_before", "authorize", times=None)
        operation = begin(vluna)
        self.gate.faults.clear()
        assert (operation.lease is not None) == gated
        if fate == "done":
            operation.finish(used(tokens))
        elif fate == "cancelled":
            operation.fail(TimeoutError())
        elif fate == "asleep":
            self.late.append(lambda: self._ends(vluna, operation, tokens))
            return
        elif fate == "left undelivered":
            self.gate.faults.add("drop_before", None, times=None)
            operation.finish(used(tokens))
            vluna.close(timeout=0.05)
            self.gate.faults.clear()
            self.late.append(lambda: self._starts_again(name))
            return
        if fate != "vanished":
            assert vluna.flush(10)
        vluna.close()

    def _ends(self, vluna: Vluna, operation: Operation, tokens: int) -> None:
        operation.finish(used(tokens))
        assert vluna.flush(10)
        vluna.close()

    def _starts_again(self, name: str) -> None:
        vluna = self.host(name)
        begin(vluna, principal_id="somebody else").fail()
        assert vluna.flush(10)
        vluna.close()

    def end(self) -> None:
        for act in self.late:
            act()


def one_story(gate: Sandbox, folder: Path, story: Sequence[tuple[str, bool]]) -> None:
    runs = Runs(gate, folder)
    for number, (fate, gated) in enumerate(story):
        runs.run(fate, gated=gated, tokens=100 + number)
    runs.end()
    known = sum(fate in ("done", "left undelivered", "asleep") for fate, _ in story)
    assert len(charged(gate)) == min(known, 1), story


STORIES = list(itertools.product(itertools.product(FATES, (True, False)), repeat=2))


@pytest.mark.parametrize(("first", "second"), STORIES, ids=lambda run: f"{run[0]}-{'gated' if run[1] else 'ungated'}")
def test_two_runs_of_a_job_on_two_hosts_are_charged_once(
    gate: Sandbox, tmp_path: Path, first: tuple[str, bool], second: tuple[str, bool]
) -> None:
    """In every order of their fates, with and without a gate that could be asked."""
    one_story(gate, tmp_path, [first, second])


@pytest.mark.slow
def test_three_runs_of_a_job_on_three_hosts_are_charged_once(tmp_path: Path) -> None:
    """A seeded sample of all stories of three, and of four."""
    chance = random.Random(17)
    kinds = list(itertools.product(FATES, (True, False)))
    for number in range(60):
        with Sandbox() as gate:
            story = [chance.choice(kinds) for _ in range(chance.choice((3, 3, 4)))]
            one_story(gate, tmp_path / str(number), story)


@pytest.mark.parametrize("restart", [False, True], ids=["same gate process", "gate restarted"])
@pytest.mark.parametrize("first", ["done", "cancelled"])
def test_a_second_run_after_the_gate_was_restarted_is_charged_no_more(
    gate: Sandbox, tmp_path: Path, first: str, restart: bool
) -> None:
    """The gate's process forgets its answers, its database does not."""
    runs = Runs(gate, tmp_path)
    runs.run(first, gated=True, tokens=100)
    for tokens in (101, 102):
        if restart:
            gate.restart()
        runs.run("done", gated=True, tokens=tokens)
    assert len(charged(gate)) == 1


def test_a_run_whose_charge_was_quarantined_does_not_settle_the_others(gate: Sandbox, tmp_path: Path) -> None:
    """Host A's commit met a missing price and is held there. Host B's run is looked up, not taken for settled; when A
    is repaired as well, that books nothing more."""
    runs = Runs(gate, tmp_path)
    meters = (FEATURE, *(f"{FEATURE}.tokens.{part}" for part in ("input", "cached", "output")))
    begin(runs.host(), principal_id="bob").fail()
    first = runs.host("a")
    operation = begin(first)
    for meter in meters:
        gate.unprice(meter)
    operation.finish(used())
    assert first.flush(10)
    assert charged(gate) == []
    for meter in meters:
        gate.price(meter, 5)
    runs.run("done", gated=True, tokens=101)
    assert charged(gate) == [121]
    runtime = first._running()
    row = runtime.ledger.apply(
        operation.operation_id, lambda now: now.evolve(state=now.state.repair(), path=None, body=None, attempts=0)
    )
    assert row is not None
    runtime.prices.forget(FEATURE)
    runtime.settler.enqueue(row)
    assert first.flush(10)
    assert charged(gate) == [121]
    first.close()


@pytest.mark.parametrize(("counts_attempts", "charges"), [(False, [121]), (True, [121, 122])])
def test_attempts_that_each_host_counts_for_itself_would_be_charged_twice(
    gate: Sandbox, tmp_path: Path, counts_attempts: bool, charges: list[int]
) -> None:
    """Why the keys hold no number of the attempt: A's first attempt is cancelled, B runs the job as its own first one
    and books it, A runs it again as its second. With the number in the key, nothing connects A's lease with B's
    booking."""
    runs = Runs(gate, tmp_path)
    attempts: Counter[str] = Counter()
    for host, tokens in (("a", None), ("b", 101), ("a", 102)):
        vluna = runs.host(host)
        number = attempts[host] if counts_attempts else 0
        attempts[host] += 1
        operation = begin(vluna, idempotency_key=f"job-42#{number}")
        if tokens is None:
            operation.fail()
        else:
            operation.finish(used(tokens))
        assert vluna.flush(10)
        vluna.close()
    assert charged(gate) == charges


@pytest.mark.parametrize(
    ("story", "counted"),
    [
        (["done"], 120),
        (["done", "done"], 120),
        (["vanished", "done", "cancelled"], 121),
        (["cancelled", "done", "done"], 0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_a_job_under_a_quota_is_charged_once_and_never_counted_twice(
    gate: Sandbox, tmp_path: Path, story: list[str], counted: int
) -> None:
    """What a commit books counts once against the quota. What an ingest books in its place, since the job's lease was
    cancelled by an earlier run, is charged and does not count (gate contract 9.4)."""
    gate.quota(1_000, feature=FEATURE)
    runs = Runs(gate, tmp_path)
    for number, fate in enumerate(story):
        runs.run(fate, gated=True, tokens=100 + number)
    assert len(charged(gate)) == 1
    vluna = runs.host()
    (limits,) = vluna.gate.limits(principal_id="ann", feature_code=FEATURE, expand=("quotas",))
    used_minor = [quota.used_minor for quota in limits.quotas if quota.limit_minor == 1_000]
    assert used_minor == [counted]
    vluna.close()


# -- two at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fates", [("done", "done"), ("done", "cancelled"), ("cancelled", "done")], ids="-".join)
@pytest.mark.parametrize("gated", [(True, True), (True, False), (False, False)], ids=str)
def test_a_job_that_runs_twice_at_once_is_charged_once(
    gate: Sandbox, tmp_path: Path, fates: tuple[str, str], gated: tuple[bool, bool]
) -> None:
    runs = Runs(gate, tmp_path)
    hosts = [runs.host(), runs.host()]
    operations = []
    for vluna, gated_one in zip(hosts, gated, strict=True):
        if not gated_one:
            gate.faults.add("drop_before", "authorize", times=None)
        operations.append(begin(vluna))
        gate.faults.clear()
    ready = threading.Barrier(2)

    def end(number: int) -> None:
        ready.wait(5)
        if fates[number] == "done":
            operations[number].finish(used(100 + number))
        else:
            operations[number].fail()
        assert hosts[number].flush(10)

    threads = [threading.Thread(target=end, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
    assert len(charged(gate)) == 1
    for vluna in hosts:
        vluna.close()


@pytest.mark.slow
def test_many_jobs_that_run_on_four_hosts_at_once_are_each_charged_once(gate: Sandbox, tmp_path: Path) -> None:
    """40 jobs of two calls each, on four hosts at once, a quarter of the runs failing, authorize failing at times."""
    runs = Runs(gate, tmp_path)
    gate.faults.add("error_before", "authorize", times=30, skip=5)
    gate.faults.add("error_after", "commits", times=20, skip=3)
    hosts = [runs.host() for _ in range(4)]
    completed: list[tuple[str, str]] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        for job in range(40):
            with call_context(principal_id=f"cust-{job % 5}", idempotency_key=f"job-{job}"):
                for step in ("first", "second"):
                    operation = hosts[number].begin(ask(step))
                    assert operation is not None
                    if chance.random() < 0.25:
                        operation.fail()
                    else:
                        operation.finish(used(100 + number))
                        completed.append((f"job-{job}", step))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for vluna in hosts:
        assert vluna.flush(60)
    total = sum(len(charged(gate, f"cust-{n}")) for n in range(5))
    assert total == len(set(completed))
    for vluna in hosts:
        vluna.close()


# -- other calls inside each time --------------------------------------------------------------------------------------


def test_other_calls_in_each_run_are_charged_each_and_the_common_one_once(gate: Sandbox, tmp_path: Path) -> None:
    """An agent takes another path each time; what two runs have in common is one piece of work."""
    runs = Runs(gate, tmp_path)
    paths = [["plan", "search"], ["plan", "read", "search"], ["read", "plan", "write"]]
    for path in paths:
        vluna = runs.host()
        with call_context(**JOB):
            for step in path:
                operation = vluna.begin(ask(step))
                assert operation is not None
                operation.finish(used(len(step)))
        assert vluna.flush(10)
        vluna.close()
    assert Counter(charged(gate)) == Counter(len(step) + 20 for step in ("plan", "search", "read", "write"))


def test_the_same_request_in_nested_contexts_of_a_job_is_two_pieces_of_work(gate: Sandbox, tmp_path: Path) -> None:
    """Occurrences are counted over the whole job, also where each step opens a context for its labels."""
    runs = Runs(gate, tmp_path)
    for _ in range(2):
        vluna = runs.host()
        with call_context(**JOB):
            for step in ("one", "two"):
                with call_context(labels={"step": step}):
                    operation = vluna.begin(ask())
                assert operation is not None
                operation.finish(used())
        assert vluna.flush(10)
        vluna.close()
    assert charged(gate) == [120, 120]


def test_a_job_that_is_run_again_inside_one_outer_context_is_still_the_same_job(gate: Sandbox, tmp_path: Path) -> None:
    """A worker that holds one context for its whole life, with one inside for each run."""
    vluna = Runs(gate, tmp_path).host()
    with call_context(principal_id="ann"):
        for _ in range(3):
            with call_context(idempotency_key="job-42"), call_context(labels={"part": "a"}):
                operation = vluna.begin(ask())
            assert operation is not None
            operation.finish(used())
            assert vluna.flush(10)
    assert charged(gate) == [120]
    vluna.close()


def test_customers_in_one_job_do_not_count_each_others_requests(gate: Sandbox, tmp_path: Path) -> None:
    """A job that serves several customers with one request, in another order the second time."""
    runs = Runs(gate, tmp_path)
    for order in (("ann", "bob"), ("bob", "ann")):
        vluna = runs.host()
        with call_context(idempotency_key="nightly"):
            for principal in order:
                with call_context(principal_id=principal):
                    operation = vluna.begin(ask())
                assert operation is not None
                operation.finish(used())
        assert vluna.flush(10)
        vluna.close()
    assert charged(gate, "ann") == charged(gate, "bob") == [120]


def test_work_that_is_no_model_call_is_a_piece_of_its_job(gate: Sandbox, tmp_path: Path) -> None:
    runs = Runs(gate, tmp_path)
    for quantity in (3, 4):
        vluna = runs.host()
        with call_context(**JOB), vluna.operation(feature_code="tools.search", estimate=1) as op:
            op.record(quantity=quantity)
        assert vluna.flush(10)
        vluna.close()
    assert charged(gate) == [3]


# -- the gate denies a lease that a job needs late ---------------------------------------------------------------------


def test_a_job_that_ran_ungated_waits_for_its_lease_and_is_not_booked_beside_it(gate: Sandbox, tmp_path: Path) -> None:
    """Its credit was used up by the first run. A gate that was restarted denies before it looks for the lease that
    exists (gate contract 7.4): to book by ingest now would charge the job twice."""
    runs = Runs(gate, tmp_path)
    runs.run("done", gated=True, tokens=100)
    gate.set_credit("ann", 0)
    gate.restart()
    vluna = runs.host()
    gate.faults.add("drop_before", "authorize", times=None)
    operation = begin(vluna)
    gate.faults.clear()
    operation.finish(used(101))
    assert not vluna.flush(1)
    assert charged(gate) == [120]
    gate.set_credit("ann", 1_000_000)
    runtime = vluna._running()
    row = runtime.ledger.get(operation.operation_id)
    assert row is not None
    assert "insufficient_credit" in (row.last_error or "")
    runtime.settler.enqueue(row)
    receipt = operation.wait(10)
    assert receipt is not None
    assert receipt.state == "lapsed"
    assert charged(gate) == [120]
    vluna.close()


def test_a_job_denied_its_late_lease_is_charged_once_when_the_customer_has_topped_up(
    gate: Sandbox, tmp_path: Path
) -> None:
    """The queue runs it again as long as it is denied; the run after the top-up and the one that waited are one."""
    runs = Runs(gate, tmp_path)
    waiting = runs.host()
    gate.faults.add("drop_before", "authorize", times=None)
    operation = begin(waiting)
    gate.faults.clear()
    gate.set_credit("ann", 0)
    operation.finish(used())
    assert not waiting.flush(1)
    again = runs.host()
    with pytest.raises(GateDenied):
        begin(again)
    gate.set_credit("ann", 1_000_000)
    second = begin(again)
    second.finish(used(101))
    assert again.flush(10)
    runtime = waiting._running()
    row = runtime.ledger.get(operation.operation_id)
    assert row is not None
    runtime.settler.enqueue(row)
    assert operation.wait(10) is not None
    assert charged(gate) == [121]
    waiting.close()
    again.close()


# -- processes that die ----------------------------------------------------------------------------------------------

RUN = """
import json, os, signal, sys, threading, time
from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.lifecycle import ModelCall

outbox, steps = sys.argv[1], json.loads(sys.argv[2])
vluna = Vluna(outbox=outbox, authorize_deadline=0.3)
with call_context(principal_id="ann", idempotency_key="job-42"):
    for step, fate in steps:
        operation = vluna.begin(ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": [step]}))
        if fate == "killed in the call":
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "failed":
            operation.fail()
            continue
        operation.finish(Ending("complete", usage=TokenUsage(len(step), 20), finished=True))
        if fate == "killed after":
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "killed while delivering":
            time.sleep(float(step.split()[-1]) / 1000)
            os.kill(os.getpid(), signal.SIGKILL)
vluna.close()
"""


def process(gate: Sandbox, outbox: Path, steps: Sequence[tuple[str, str]]) -> int:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(outbox), json.dumps(steps)],
        env={**os.environ, **gate.env(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        timeout=60,
        check=False,
    )
    return done.returncode


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("same_host", [True, False], ids=["same host", "another host"])
@pytest.mark.parametrize("fate", ["killed in the call", "killed after", "failed"])
def test_a_job_whose_process_was_killed_is_charged_once_when_it_is_run_again(
    gate: Sandbox, tmp_path: Path, fate: str, same_host: bool
) -> None:
    """The first call of the job is charged in the first run, the second meets its fate; both are asked again."""
    first, second = tmp_path / "a", tmp_path / ("a" if same_host else "b")
    code = process(gate, first, [("one", "done"), ("two-two", fate)])
    assert code == (0 if fate == "failed" else -signal.SIGKILL)
    assert process(gate, second, [("one", "done"), ("two-two", "done")]) == 0
    assert process(gate, first, [("one", "done")]) == 0, "the first host comes back and delivers what it left"
    assert sorted(charged(gate)) == [23, 27]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_job_killed_at_any_moment_of_its_delivery_is_charged_once(gate: Sandbox, tmp_path: Path) -> None:
    """Killed 0 to 30 ms after its usage was known, then run again on another host, then the first host comes back."""
    for milliseconds in range(0, 32, 4):
        step = f"step {milliseconds}"
        process(gate, tmp_path / "a", [(step, "killed while delivering")])
        assert process(gate, tmp_path / "b", [(step, "done")]) == 0
        assert process(gate, tmp_path / "a", [("last", "done")]) == 0
    assert Counter(charged(gate)) == Counter([26] * 3 + [27] * 5 + [24])
