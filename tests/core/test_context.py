"""The call context: who pays, captured where it was entered."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Iterator

import pytest

from vluna_llm import Receipt, Scope, TokenUsage, call_context
from vluna_llm.context import current_context, telling, within
from vluna_llm.errors import ConfigurationError


def receipt(amount: int, state: str = "booked") -> Receipt:
    charged = amount if state == "booked" else 0
    return Receipt("op", state, "f", "ann", amount_xusd=amount, charged_xusd=charged)  # type: ignore[arg-type]


def test_contexts_nest_and_the_inner_one_wins() -> None:
    with call_context(principal_id="ann", feature_code="a", labels={"x": "1"}):
        with call_context(feature_code="b", labels={"y": 2}):
            inner = current_context()
            assert (inner.principal_id, inner.feature_code) == ("ann", "b")
            assert inner.labels == {"x": "1", "y": "2"}
            assert len(inner.scopes) == 2
        assert current_context().feature_code == "a"
    assert current_context().principal_id is None


def test_another_principal_takes_nothing_over_that_is_personal() -> None:
    with (
        call_context(principal_id="ann", user_id="u", budget_id="b", end_user="e", feature_code="f"),
        call_context(principal_id="bob"),
    ):
        found = current_context()
        assert (found.user_id, found.budget_id, found.end_user, found.feature_code) == (None, None, None, "f")


def test_tasks_started_inside_have_it_and_siblings_do_not() -> None:
    async def who() -> str | None:
        await asyncio.sleep(0)
        return current_context().principal_id

    async def main() -> list[str | None]:
        async with call_context(principal_id="ann"):
            inside = asyncio.ensure_future(who())
        async with call_context(principal_id="bob"):
            other = asyncio.ensure_future(who())
        return [await inside, await other, await who()]

    assert asyncio.run(main()) == ["ann", "bob", None]


def test_leaving_in_another_context_than_entering_is_no_error() -> None:
    """A generator that holds the context may be closed by another task: its token belongs elsewhere."""

    def generator() -> Iterator[int]:
        with call_context(principal_id="ann"):
            yield 1

    running = generator()
    contextvars.copy_context().run(next, running)
    running.close()
    assert current_context().principal_id is None


def test_an_async_generator_closed_by_another_task_is_no_error() -> None:
    async def generator() -> AsyncIterator[int]:
        async with call_context(principal_id="ann"):
            yield 1

    async def main() -> None:
        running = generator()
        await asyncio.create_task(running.__anext__())  # type: ignore[arg-type]
        await running.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_labels_are_text_and_bounded() -> None:
    with call_context(labels={"n": 3, "b": True}):
        assert current_context().labels == {"n": "3", "b": "True"}
    for labels, what in [
        ({"x": []}, "list"),
        ({"": "x"}, "non-empty"),
        ({"x": "y" * 600}, "600"),
        ({str(n): "x" for n in range(40)}, "40"),
    ]:
        with pytest.raises(ConfigurationError, match=what):
            call_context(labels=labels)


def test_what_frameworks_tell_is_the_innermosts() -> None:
    with within(telling(run_id="r", agent="writer", tool=None)), within(telling(agent="helper")):
        assert current_context().told == {"run_id": "r", "agent": "helper"}
        assert current_context().labels == {}


def test_a_scope_adds_up_and_tells_when_all_is_settled() -> None:
    scope = Scope()
    scope.opened("a", 100)
    scope.opened("b", 50)
    assert (scope.pending, scope.estimated_xusd) == (2, 150)
    assert not scope.wait(0.01)
    scope.used(TokenUsage(10, 5))
    scope.used(TokenUsage(1, 1))
    scope.closed("a", receipt(90))
    scope.closed("b", receipt(40, "quarantined"))
    assert scope.wait(0)
    assert (scope.settled_xusd, scope.estimated_xusd, scope.usage.total_tokens) == (90, 0, 17)
    assert len(scope.receipts) == 2


def test_a_scope_can_be_waited_for_on_a_loop() -> None:
    async def main() -> bool:
        scope = Scope()
        scope.opened("a")
        asyncio.get_running_loop().call_later(0.05, scope.closed, "a", None)
        return await scope.wait_async(2)

    assert asyncio.run(main())


def test_one_object_entered_by_several_tasks_at_once_gives_each_its_own_back() -> None:
    """Whichever is left first: work after the ``with`` is billed to whom it was billed before."""
    shared = call_context(principal_id="bob")

    async def task(name: str, turns: int) -> tuple[str | None, str | None]:
        with call_context(principal_id=name):
            with shared:
                for _ in range(turns):
                    await asyncio.sleep(0)
                inside = current_context().principal_id
            return inside, current_context().principal_id

    async def main() -> list[tuple[str | None, str | None]]:
        return await asyncio.gather(task("ann", 1), task("cid", 3), task("dan", 2))

    assert asyncio.run(main()) == [("bob", "ann"), ("bob", "cid"), ("bob", "dan")]
