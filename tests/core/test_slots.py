"""An outer layer admits early; the first metered call inside takes the operation over, and nobody is billed twice."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any, cast

import pytest

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.context import make_context, within
from vluna_llm.ending import Ending
from vluna_llm.errors import GateDenied
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.sandbox import Sandbox
from vluna_llm.slot import Slot, inside, open_slot

CALL = ModelCall("chat.completions", "openai", "gpt-4o", {"messages": []})
USED = Ending("complete", usage=TokenUsage(input_tokens=10, output_tokens=5), finished=True)


@pytest.fixture
def gate() -> Any:
    with Sandbox() as gate:
        yield gate


def vluna_for(gate: Sandbox, **settings: Any) -> Vluna:
    return Vluna(
        base_url=gate.base_url,
        realm_id=gate.realm_id,
        key_id=gate.key_id,
        key_secret=gate.key_secret,
        outbox="memory",
        **settings,
    )


def charged(gate: Sandbox, principal: str) -> list[int]:
    return [entry.quantity for entry in gate.booked(principal).entries]


def test_the_first_call_inside_takes_it_over_and_the_second_is_its_own(gate: Sandbox) -> None:
    with vluna_for(gate) as vluna, call_context(principal_id="ann"):
        slot = Slot()
        slot.offer(vluna.begin(CALL))
        with inside(slot):
            first, second = vluna.begin(CALL), vluna.begin(CALL)
        assert first is slot.operation
        assert slot.claimed
        assert second is not first
        for operation in (first, second):
            assert operation is not None
            operation.finish(USED)
        assert vluna.flush(5)
        assert charged(gate, "ann") == [15, 15]
        assert len(gate.leases("ann")) == 2


def test_it_is_taken_once_whoever_comes_at_the_same_time(gate: Sandbox) -> None:
    with vluna_for(gate) as vluna, call_context(principal_id="ann"):
        slot = Slot()
        slot.offer(vluna.begin(CALL))
        found: list[object] = []
        start = threading.Barrier(8)

        def claim() -> None:
            start.wait()
            found.append(slot.claim(gate=(gate.base_url, gate.realm_id), customer=(None, None)))

        threads = [threading.Thread(target=claim) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [one for one in found if one is not None] == [slot.operation]


def test_a_call_in_the_middle_of_a_claim_gets_it_or_not_and_nobody_waits_for_ever(gate: Sandbox) -> None:
    """A signal handler or a finalizer may run anywhere, also between any two steps of ours, in the same thread."""
    with vluna_for(gate) as vluna, call_context(principal_id="ann"):
        admitted = vluna.begin(CALL)
        assert admitted is not None
        slot, taken = Slot(), []

        class Interrupted:
            def __getattribute__(self, name: str) -> Any:
                if name == "customer" and not taken:
                    taken.append("interrupting")
                    taken.append(slot.claim(gate=admitted.gate, customer=("ann", None)))
                return getattr(admitted, name)

        slot.offer(cast(Operation, Interrupted()))
        claim = threading.Thread(
            target=lambda: taken.append(slot.claim(gate=admitted.gate, customer=("ann", None))), daemon=True
        )
        claim.start()
        claim.join(5)
        assert not claim.is_alive()
        assert sum(one is not None for one in taken[1:]) == 1
        admitted.fail()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_does_not_take_over_what_its_parent_has_admitted(gate: Sandbox) -> None:
    """The parent settles it; what the child asks the provider for is work of its own, and billed."""
    with vluna_for(gate) as vluna, call_context(principal_id="ann"):
        slot = Slot()
        slot.offer(vluna.begin(CALL))
        with inside(slot):
            if (pid := os.fork()) == 0:
                billed = False
                try:
                    operation = vluna.begin(CALL)
                    assert operation is not None
                    operation.finish(USED)
                    billed = vluna.flush(5)
                finally:
                    os._exit(0 if billed else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert charged(gate, "ann") == [15]
        assert not slot.claimed
        assert slot.operation is not None
        slot.operation.finish(USED)
        assert vluna.flush(5)
        assert charged(gate, "ann") == [15, 15]


def test_work_of_another_kind_does_not_take_it_over(gate: Sandbox) -> None:
    """A model that embeds its question before it asks: the lease of the answer is left for the answer."""
    embedding = ModelCall("embeddings", "openai", "text-embedding-3-small", {"input": ["hi"]})
    with vluna_for(gate) as vluna, call_context(principal_id="ann"):
        slot = Slot()
        slot.offer(vluna.begin(CALL))
        share = slot.share
        assert share is not None
        with inside(slot):
            inner = vluna.begin(embedding)
        assert inner is not None
        assert inner is not slot.operation
        inner.finish(Ending("complete", usage=TokenUsage(8, 0), finished=True))
        share.finish(USED)
        assert vluna.flush(5)
    booked = sorted((entry.feature, entry.quantity) for entry in gate.booked("ann").entries)
    assert booked == [("openai.gpt-4o", 15), ("openai.text-embedding-3-small", 8)]


@pytest.mark.parametrize("other", ["principal", "gate"])
def test_work_for_somebody_else_is_passed_on(gate: Sandbox, other: str) -> None:
    """A client inside that is bound to another customer, or to another gate, bills there and nowhere else."""
    with vluna_for(gate) as vluna, Sandbox() as second, vluna_for(second) as elsewhere:
        with call_context(principal_id="ann"):
            slot = Slot()
            slot.offer(vluna.begin(CALL))
            with inside(slot):
                if other == "gate":
                    inner = elsewhere.begin(CALL)
                else:
                    inner = vluna.begin(CALL, make_context(principal_id="bob"))
        assert inner is not slot.operation
        assert slot.passed_on
        assert not slot.claimed


def test_what_has_ended_is_not_taken_over(gate: Sandbox) -> None:
    with vluna_for(gate) as vluna, call_context(principal_id="ann"):
        slot = Slot()
        operation = vluna.begin(CALL)
        assert operation is not None
        slot.offer(operation)
        operation.fail()
        assert operation.ended
        with inside(slot):
            assert vluna.begin(CALL) is not operation


def test_it_reaches_tasks_and_ends_with_its_block(gate: Sandbox) -> None:
    async def main() -> None:
        async with vluna_for(gate) as vluna:
            with within(make_context(principal_id="ann")):
                slot = Slot()
                slot.offer(await vluna.abegin(CALL))
                with inside(slot):
                    assert await asyncio.create_task(vluna.abegin(CALL)) is slot.operation
                assert open_slot() is None
            slot.operation.fail()  # type: ignore[union-attr]

    asyncio.run(main())


def test_a_denial_is_kept_whole_where_the_caller_can_find_it(gate: Sandbox) -> None:
    """Frameworks put exceptions of their own in its place."""
    gate.set_credit("broke", 0)
    with vluna_for(gate) as vluna, call_context(principal_id="broke") as outer:
        with call_context(labels={"part": "inner"}) as scope, pytest.raises(GateDenied) as raised:
            vluna.begin(CALL)
        assert scope.last_denial is outer.last_denial is raised.value
        assert raised.value.reason == "insufficient_credit"
    with call_context(principal_id="ann") as scope:
        assert scope.last_denial is None


@pytest.mark.parametrize("inside_is", ["nobody", "the same customer", "another customer"])
@pytest.mark.parametrize("later", [False, True], ids=["", "after the slot was filled anew"])
def test_what_the_outer_layer_tells_counts_only_where_nobody_inside_settles(
    gate: Sandbox, inside_is: str, later: bool
) -> None:
    """Whoever has claimed the operation settles it; what is billed to somebody else is not owed twice."""
    with vluna_for(gate) as vluna, call_context(principal_id="ann"):
        slot = Slot()
        slot.offer(vluna.begin(CALL))
        share = slot.share
        assert share is not None
        inner: Operation | None = None
        if inside_is != "nobody":
            payer = make_context(principal_id="ann" if inside_is == "the same customer" else "bob")
            with inside(slot), within(payer):
                inner = vluna.begin(CALL)
        if later:
            slot.offer(vluna.begin(CALL))
            assert slot.operation is not None
            slot.operation.fail()
        assert share.claimed is (inside_is == "the same customer")
        assert share.passed_on is (inside_is == "another customer")
        share.finish(Ending("complete", usage=TokenUsage(7, 0), finished=True))
        if inner is not None:
            inner.finish(USED)
        assert vluna.flush(5)
    assert charged(gate, "ann") == {"nobody": [7], "the same customer": [15], "another customer": []}[inside_is]
    assert charged(gate, "bob") == ([15] if inside_is == "another customer" else [])
