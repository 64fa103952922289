"""The README's table of frameworks and situations: each cell is a run of the story, by the gate's own books.

In each the run is also made without us, before: what the caller gets, text or exception, must be the same.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import itertools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from story import EDITORS, TOOL, Chapter, Stage, Told, bill_of
from story_stages import STAGES

from vluna_llm import Vluna, call_context
from vluna_llm.errors import BudgetExceeded, GateDenied
from vluna_llm.sandbox import Sandbox

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

README = Path(__file__).parents[2] / "README.md"
HEADING = "## Agent frameworks, side by side"


def cells() -> dict[tuple[str, str], str]:
    """The README's table: what stands under a framework in the row of a situation."""
    table = README.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", table, re.M)]
    head, body = rows[0], rows[2:]
    return {(row[0], name): cell for row in body for name, cell in zip(head[1:], row[1:], strict=True)}


CELLS = cells()


@dataclass
class Scene:
    """A framework before a gate of its own."""

    kind: Any
    gate: Sandbox
    vluna: Vluna
    provider: Any
    customer: str

    def play(
        self, chapter: Chapter, plan: dict[int, str] | None = None, *, layered: bool = False, **context: Any
    ) -> Told:
        """With us, until everything is settled."""
        return self._played(self.kind(self.provider, self.vluna, layered), chapter, plan, **context)

    def bare(self, chapter: Chapter, plan: dict[int, str] | None = None) -> Told:
        """Without us."""
        return self._played(self.kind(self.provider, None), chapter, plan)

    def _played(
        self, stage: Stage, chapter: Chapter, plan: dict[int, str] | None, customer: str = "", **limits: Any
    ) -> Told:
        self.provider.requests.clear()
        self.provider.released.clear()
        self.provider.plan = plan or {}
        with call_context(principal_id=customer or self.customer, **limits) as scope:
            told = _loop.run_until_complete(stage.play(chapter))
        self.provider.released.set()
        assert scope.wait(10)
        assert self.vluna.flush(10)
        assert (
            scope.settled_xusd == self.gate.booked(customer or self.customer).charged_xusd
        )  # the cost of the task, as the gate has it
        return told

    @property
    def bill(self) -> str:
        """What the gate has in its books."""
        return bill_of(self.gate, self.customer, self.kind)


_customers = itertools.count(1)
_loop = asyncio.new_event_loop()  # one for all: LangChain shares HTTP clients among models


@pytest.fixture(scope="module", params=list(STAGES))
def kind(request: pytest.FixtureRequest) -> Any:
    """The framework, where it is installed; each has an environment of its own."""
    found = STAGES[request.param]
    pytest.importorskip(found.package, reason=f"{request.param} is not installed here")
    found.name = request.param
    return found


@pytest.fixture(scope="module")
def gate(kind: Any) -> Iterator[Sandbox]:
    """A gate of its own for each framework, since what it refuses is changed."""
    with Sandbox() as gate:
        yield gate


@pytest.fixture(scope="module")
def provider(kind: Any) -> Iterator[Any]:
    with kind.models() as provider:
        yield provider


@pytest.fixture
def scene(kind: Any, gate: Sandbox, provider: Any, make_vluna: Any) -> Scene:
    return Scene(kind, gate, make_vluna(gate), provider, f"reader_{next(_customers)}")


def the_cell(scene: Scene, situation: str) -> None:
    """What the README says of it is what the gate has in its books."""
    assert (situation, scene.bill) == (situation, CELLS[situation, scene.kind.name])


# -- the rows ----------------------------------------------------------------------------------------------------------


def test_it_goes_well(scene: Scene) -> None:
    bare = scene.bare(Chapter())
    assert bare.error is None
    assert scene.play(Chapter()).same == bare.same
    the_cell(scene, "a tool is used, another agent takes over, its answer is streamed")


def test_refused_at_first(scene: Scene) -> None:
    scene.gate.set_credit(scene.customer, 0)
    told = scene.play(Chapter())
    assert type(told.error) is GateDenied
    assert told.error.reason == "insufficient_credit"
    assert scene.provider.posts() == []
    the_cell(scene, "refused by the gate")


def test_refused_in_the_middle(scene: Scene) -> None:
    told = scene.play(Chapter(when_used=lambda: scene.gate.set_credit(scene.customer, 0)))
    assert type(told.error) is GateDenied
    assert len(scene.provider.posts()) == 1
    the_cell(scene, "refused after the tool was used")


def test_beyond_the_budget_of_the_task(scene: Scene) -> None:
    """There is room for the first call, by what it is expected to take, and for the tool; not for two calls."""
    scene.play(Chapter(), customer=f"{scene.customer}_before")  # so that what is expected is what is used
    scene.gate.set_credit(scene.customer, 0)
    scene.play(Chapter())
    asked = scene.gate.requests[-1]
    assert asked.path.endswith("/authorize")
    scene.gate.set_credit(scene.customer, 10_000_000)
    told = scene.play(Chapter(), max_tokens=max(int(asked.body["estimated_quantity_minor"]), 121) + 1)
    assert type(told.error) is BudgetExceeded
    assert len(scene.provider.posts()) == 1
    the_cell(scene, "the task's `max_tokens` is used up")


def test_the_provider_fails(scene: Scene) -> None:
    bare = scene.bare(Chapter(), {EDITORS: "down"})
    assert bare.error is not None
    assert scene.play(Chapter(), {EDITORS: "down"}).same == bare.same
    the_cell(scene, "the provider answers 500")


def test_the_stream_is_cut(scene: Scene) -> None:
    bare = scene.bare(Chapter(), {EDITORS: "cut"})
    assert bare.error is not None
    assert scene.play(Chapter(), {EDITORS: "cut"}).same == bare.same
    the_cell(scene, "the stream is cut")


def test_the_task_is_cancelled(scene: Scene) -> None:
    def cancelling() -> Chapter:
        return Chapter(when_read=lambda: asyncio.get_running_loop().call_soon(stop))

    def stop() -> None:
        next(task for task in asyncio.all_tasks() if task.get_name() == "player").cancel()

    bare = scene.bare(cancelling(), {EDITORS: "slow"})
    assert type(bare.error) is asyncio.CancelledError
    assert scene.play(cancelling(), {EDITORS: "slow"}).same == bare.same
    the_cell(scene, "the task is cancelled while the stream is read")


def test_the_consumer_leaves(scene: Scene) -> None:
    assert scene.bare(Chapter(leave_at=2), {EDITORS: "slow"}).text == "left"
    assert scene.play(Chapter(leave_at=2), {EDITORS: "slow"}).text == "left"
    the_cell(scene, "the consumer leaves the stream")


def test_layers(scene: Scene) -> None:
    """A client or model that is metered already, below one that is metered again."""
    bare = scene.bare(Chapter())
    assert scene.play(Chapter(), layered=True).same == bare.same
    the_cell(scene, "what is below is metered as well")


def test_branches(scene: Scene) -> None:
    bare = scene.bare(Chapter(together=True))
    assert bare.error is None
    assert scene.play(Chapter(together=True)).same == bare.same
    the_cell(scene, "two branches at once")


def test_one_branch_is_refused(scene: Scene) -> None:
    """It asks when the other's answer is on its way; what becomes of that one is the framework's own doing."""
    scene.gate.feature(scene.kind.others, entitlement=True)
    scene.gate.customer(scene.customer, deny=(scene.kind.others,))
    on_its_way = Chapter(together=True, ready={"two": lambda: len(scene.provider.posts()) > scene.kind.parents})
    told = scene.play(on_its_way, dict.fromkeys(range(1, 9), "slow"))
    assert isinstance(told.error, GateDenied)
    assert told.error.reason == "entitlement"
    refused = scene.kind.others.partition(".")[2]
    assert not any(refused in f"{seen.path} {seen.body}" for seen in scene.provider.posts())
    the_cell(scene, "two branches at once, the gate refuses one")


def test_labels(scene: Scene) -> None:
    """By which the bookings of a run are found again."""
    assert scene.play(Chapter()).error is None
    known = {"run_id", "agent", "node", "tool"}
    models, tools = set(), set()
    for entry in scene.gate.booked(scene.customer).entries:
        (tools if entry.feature == TOOL else models).add(frozenset(known & entry.labels.keys()))
    assert models == {frozenset(scene.kind.labels)}
    (of_the_tool,) = tools
    cell = CELLS["labels of the bookings", scene.kind.name]
    assert of_the_tool | set(scene.kind.labels) == set(re.findall(r"`(.*?)`", cell))


def installed() -> list[Any]:
    """The frameworks that this environment has."""
    found = []
    for kind in STAGES.values():
        try:
            importlib.import_module(kind.package)
        except ImportError:
            continue
        found.append(kind)
    return found


def test_one_task_across_frameworks_and_threads(shared_gate: Sandbox, make_vluna: Any) -> None:
    """Its scope adds up what all of them were charged: each in a thread and a loop of its own, at once."""
    kinds = installed()
    if not kinds:
        pytest.skip("no framework is installed here")
    vluna, customer = make_vluna(), f"reader_{next(_customers)}"
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        stages = [kind(stack.enter_context(kind.models()), vluna) for kind in kinds]
        with call_context(principal_id=customer) as scope:
            runs = [
                threads.submit(contextvars.copy_context().run, asyncio.run, stage.play(Chapter())) for stage in stages
            ]
            tolds = [run.result(30) for run in runs]
        assert [told.error for told in tolds] == [None] * len(kinds)
    assert scope.wait(10)
    assert vluna.flush(10)
    booked = shared_gate.booked(customer)
    assert len(booked.entries) == 4 * len(kinds)
    assert (scope.settled_xusd, scope.estimated_xusd, scope.pending) == (booked.charged_xusd, 0, 0)
    assert booked.charged_xusd > 0
    assert {receipt.operation_id for receipt in scope.receipts} == {
        entry.labels["operation_id"] for entry in booked.entries
    }
