"""Work that is no model call: generators, and operations inside operations."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

import pytest

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.context import current_context, telling, within
from vluna_llm.ending import Ending
from vluna_llm.errors import GateDenied
from vluna_llm.lifecycle import ModelCall
from vluna_llm.sandbox import Sandbox

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": [{"role": "user", "content": "hi"}]})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True)


def booked(gate: Sandbox, customer: str = "ann") -> list[tuple[str, int]]:
    return [(entry.feature, entry.quantity) for entry in gate.booked(customer).entries]


def test_a_decorated_generator_is_one_operation_from_its_first_item_to_its_last(vluna: Vluna, gate: Sandbox) -> None:
    @vluna.operation(feature_code="tools.pages", estimate=3)
    def pages(count: int) -> Iterator[int]:
        yield from range(count)

    assert inspect.isgeneratorfunction(pages)
    with call_context(principal_id="ann") as scope:
        running = pages(2)
        assert scope.pending == 0
        assert next(running) == 0
        assert scope.pending == 1
        assert list(running) == [1]
        assert scope.wait(5)
    assert booked(gate) == [("tools.pages", 3)]


def test_a_decorated_generator_passes_on_what_it_is_sent_thrown_and_returns(vluna: Vluna, gate: Sandbox) -> None:
    @vluna.operation(feature_code="tools.pages")
    def echo(op: Any = None) -> Generator[object, object, str]:
        heard: object = "nothing"
        for n in range(3):
            try:
                heard = yield heard
            except KeyError as error:
                heard = error
            op.record(quantity=n + 1)
        return "done"

    with call_context(principal_id="ann"):
        running = echo()
        assert next(running) == "nothing"
        assert running.send("hello") == "hello"
        error = KeyError("x")
        assert running.throw(error) is error
        with pytest.raises(StopIteration) as stop:
            next(running)
    assert stop.value.value == "done"
    assert vluna.flush(5)
    assert booked(gate) == [("tools.pages", 3)]


@pytest.mark.parametrize("records", [True, False])
def test_a_generator_that_is_left_early_books_what_was_recorded_and_else_nothing(
    vluna: Vluna, gate: Sandbox, records: bool
) -> None:
    @vluna.operation(feature_code="tools.pages", estimate=9)
    def plain() -> Iterator[int]:
        yield from range(5)

    @vluna.operation(feature_code="tools.pages", estimate=9)
    def counted(op: Any = None) -> Iterator[int]:
        for n in range(5):
            op.record(quantity=n + 1)
            yield n

    with call_context(principal_id="ann") as scope:
        running = counted() if records else plain()
        next(running)
        next(running)
        running.close()  # type: ignore[attr-defined]
        assert scope.wait(5)
    assert booked(gate) == ([("tools.pages", 2)] if records else [])


def test_a_decorated_async_generator(vluna: Vluna, gate: Sandbox) -> None:
    @vluna.operation(feature_code="tools.pages", estimate=4)
    async def pages() -> AsyncIterator[int]:
        for n in range(3):
            await asyncio.sleep(0)
            yield n

    assert inspect.isasyncgenfunction(pages)

    async def main() -> list[int]:
        async with call_context(principal_id="ann"):
            whole = [n async for n in pages()]
            left = pages()
            assert await left.__anext__() == 0
            await left.aclose()  # type: ignore[attr-defined]
            return whole

    assert asyncio.run(main()) == [0, 1, 2]
    assert vluna.flush(5)
    assert booked(gate) == [("tools.pages", 4)]


def test_an_async_generator_that_raises_books_nothing(vluna: Vluna, gate: Sandbox) -> None:
    @vluna.operation(feature_code="tools.pages", estimate=4)
    async def pages() -> AsyncIterator[int]:
        yield 1
        raise LookupError

    async def main() -> None:
        async with call_context(principal_id="ann"):
            async for _ in pages():
                pass

    with pytest.raises(LookupError):
        asyncio.run(main())
    assert vluna.flush(5)
    assert booked(gate) == []


def test_a_denied_generator_never_begins(vluna: Vluna, gate: Sandbox) -> None:
    gate.set_credit("ann", 0)
    begun = []

    @vluna.operation(feature_code="tools.pages", estimate=4)
    def pages() -> Iterator[int]:
        begun.append(1)
        yield 1

    with call_context(principal_id="ann"), pytest.raises(GateDenied):
        next(pages())
    assert begun == []


def test_work_inside_knows_its_parent_and_the_books_do_too(vluna: Vluna, gate: Sandbox) -> None:
    with call_context(principal_id="ann"):
        with vluna.operation(feature_code="tools.report") as report:
            report.record(quantity=1)
            with vluna.operation(feature_code="tools.search") as search:
                search.record(quantity=1)
                inner = vluna.begin(CALL)
                assert inner is not None
                inner.finish(USED)
        after = vluna.begin(CALL)
        assert after is not None
        after.finish(USED)
    assert (report.parent_operation_id, search.parent_operation_id) == (None, report.operation_id)
    assert vluna.flush(5)
    parents = {
        entry.labels["operation_id"]: entry.labels.get("parent_operation_id") for entry in gate.booked("ann").entries
    }
    assert parents == {
        report.operation_id: None,
        search.operation_id: report.operation_id,
        inner.operation_id: search.operation_id,
        after.operation_id: None,
    }


def test_between_two_items_the_context_is_the_consumers(vluna: Vluna, gate: Sandbox) -> None:
    """A generator shares its consumer's thread: what is done with an item is no work of the generator's."""
    seen: list[str | None] = []

    @vluna.operation(feature_code="tools.pages")
    def pages(op: Any = None) -> Iterator[int]:
        op.record(quantity=1)
        for n in range(2):
            seen.append(current_context().parent_operation_id)
            yield n

    @vluna.operation(feature_code="tools.pages")
    async def apages(op: Any = None) -> AsyncIterator[int]:
        op.record(quantity=1)
        for n in range(2):
            seen.append(current_context().parent_operation_id)
            yield n

    async def main() -> None:
        async for _ in apages():
            seen.append(current_context().parent_operation_id)

    with call_context(principal_id="ann"):
        for _ in pages():
            seen.append(current_context().parent_operation_id)
        asyncio.run(main())
    assert [one is None for one in seen] == [False, True] * 4
    assert len({one for one in seen if one}) == 2
    assert vluna.flush(5)


def test_calls_of_one_decorated_function_may_overlap(vluna: Vluna, gate: Sandbox) -> None:
    @vluna.operation(feature_code="tools.search", estimate=1)
    async def search(n: int) -> int:
        await asyncio.sleep(0.01 * (3 - n))
        return n

    async def main() -> list[int]:
        async with call_context(principal_id="ann"):
            return list(await asyncio.gather(*map(search, range(3))))

    assert asyncio.run(main()) == [0, 1, 2]
    assert vluna.flush(5)
    assert booked(gate) == [("tools.search", 1)] * 3


def test_a_label_of_the_callers_own_wins_over_what_a_framework_tells(vluna: Vluna, gate: Sandbox) -> None:
    with (
        call_context(principal_id="ann", labels={"run_id": "mine"}) as scope,
        within(telling(run_id="theirs", agent="writer")),
        vluna.operation(feature_code="tools.search") as op,
    ):
        op.record(quantity=1)
    assert scope.wait(5)
    (entry,) = gate.booked("ann").entries
    assert (entry.labels["run_id"], entry.labels["agent"]) == ("mine", "writer")


def test_what_a_framework_tells_takes_no_room_from_the_callers_labels(vluna: Vluna, gate: Sandbox) -> None:
    own = {f"own{n}": str(n) for n in range(31)}
    with (
        call_context(principal_id="ann", labels=own) as scope,
        within(telling(run_id="r", agent="writer")),
        vluna.operation(feature_code="tools.search") as op,
    ):
        op.record(quantity=1)
    assert scope.wait(5)
    (entry,) = gate.booked("ann").entries
    assert own.items() <= entry.labels.items()
    assert [name in entry.labels for name in ("run_id", "agent")] == [True, False]


def test_one_object_entered_by_several_tasks_at_once_is_an_operation_of_each(vluna: Vluna, gate: Sandbox) -> None:
    """Whichever is left first ends its own, with what was recorded there."""
    search = vluna.operation(feature_code="tools.search", estimate=1)

    async def task(name: str, turns: int) -> None:
        with call_context(principal_id=name):
            async with search as op:
                await asyncio.sleep(0.01 * turns)
                op.record(quantity=turns)
            assert current_context().parent_operation_id is None

    async def main() -> None:
        await asyncio.gather(task("ann", 1), task("bob", 3), task("cid", 2))

    asyncio.run(main())
    assert vluna.flush(5)
    assert [booked(gate, name) for name in ("ann", "bob", "cid")] == [[("tools.search", n)] for n in (1, 3, 2)]


def test_what_reads_a_decorated_functions_signature_does_not_ask_for_the_operation(vluna: Vluna) -> None:
    """Frameworks make a tool's schema, or a request's parameters, of it: the operation is nobody's to give but ours."""

    def search(word: str, op: Any, *, limit: int = 3) -> str:
        return word * limit

    decorated = vluna.operation(feature_code="tools.search")(search)
    assert [*inspect.signature(decorated).parameters] == ["word", "limit"]
    assert [*inspect.signature(search).parameters] == ["word", "op", "limit"]
