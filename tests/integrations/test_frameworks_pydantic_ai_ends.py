"""How a request of Pydantic AI ends when it does not end well, and what that costs."""

from __future__ import annotations

import asyncio
import gc
import warnings
from contextlib import suppress
from typing import Any

import anyio
import pytest
from conftest import eventually
from provider import WORDS
from pydantic_ai_agents import WAYS, Bench, VlunaModel, bench_fixture, pydantic_ai, scripted_fixture  # noqa: F401
from scripted_chat import Step, turns

from vluna_llm import call_context
from vluna_llm.integrations import _pydantic_ai_call, _pydantic_ai_model

direct = pytest.importorskip("pydantic_ai.direct")

ALL_WAYS = pytest.mark.parametrize("way", WAYS)
OURS = pytest.mark.parametrize("way", ["capability", "model", "both"])
"""Where the model itself watches the stream; a metered client inside reads the bytes."""


async def leave(agent: Any, after: int = 2, seen: list[str] | None = None) -> None:
    """Break out of a stream of text."""
    seen = [] if seen is None else seen
    async with agent.run_stream("hi") as result:
        async for text in result.stream_text(delta=True, debounce_by=None):
            seen.append(text)
            if len(seen) == after:
                break


@ALL_WAYS
@pytest.mark.parametrize("how", ["run", "run_stream"])
@pytest.mark.parametrize("behaviour", ["down", "bad"])
def test_the_provider_refuses(way: str, how: str, behaviour: str, bench: Bench) -> None:
    """Pydantic AI's own exception; nothing is charged."""
    bench.provider.behaviour = behaviour

    async def program() -> None:
        agent = bench.agent(way)
        with pytest.raises(pydantic_ai.ModelHTTPError):
            await (agent.run("hi") if how == "run" else leave(agent))

    bench.run(program)
    bench.cancelled()


@ALL_WAYS
@pytest.mark.parametrize("behaviour", ["cut", "error_event", "ends_early"])
def test_a_stream_that_breaks(way: str, behaviour: str, bench: Bench) -> None:
    """Cut, an error in the middle, a clean end of bytes before the model had finished: nothing is charged."""
    bench.provider.behaviour = behaviour

    async def program() -> None:
        async def read() -> None:
            async with bench.agent(way).run_stream("hi") as result:
                await result.get_output()

        if behaviour == "ends_early":
            await read()  # Pydantic AI takes it for a whole answer
        else:
            with pytest.raises(pydantic_ai.exceptions.ModelAPIError):
                await read()

    bench.run(program)
    bench.cancelled()


def test_an_error_that_carries_usage(bench: Bench) -> None:
    """What was reported was spent: a metered client reads it from the bytes, before Pydantic AI raises."""
    bench.provider.behaviour = "error_with_usage"

    async def program() -> None:
        with suppress(Exception):
            await leave(bench.agent("with_metered_client"), after=100)

    bench.run(program)
    bench.charged(1)


@ALL_WAYS
def test_the_consumer_breaks_out(way: str, bench: Bench) -> None:
    """By default what was generated is given away."""
    bench.provider.behaviour = "hang"
    bench.run(lambda: leave(bench.agent(way)))
    bench.cancelled()


@ALL_WAYS
def test_the_consumer_raises(way: str, bench: Bench) -> None:
    """The product's own exception comes out; the request is settled as one that was left."""
    bench.provider.behaviour = "hang"

    async def work() -> None:
        async with bench.agent(way).run_stream("hi") as result:
            async for _ in result.stream_text(debounce_by=None):
                raise KeyError("mine")

    async def program() -> None:
        with pytest.raises(KeyError):
            await work()

    bench.run(program)
    bench.cancelled()


@ALL_WAYS
def test_what_was_generated_may_be_billed(way: str, bench: Bench, make_vluna: Any) -> None:
    """``on_abort="estimate"``; labelled."""
    bench.vluna = make_vluna(on_abort="estimate")
    bench.provider.behaviour = "hang"
    bench.run(lambda: leave(bench.agent(way)))
    ((feature, quantity),) = bench.books()
    assert (feature, bench.labels()[0]["usage_source"]) == ("openai.gpt-4o", "estimated")
    assert 0 < quantity < 120
    assert bench.leases() == ["closed"]


@OURS
def test_leaving_after_the_finish_reason_is_no_abort(way: str, bench: Bench) -> None:
    """The rest is read for its usage."""
    bench.provider.script = turns(Step(text="w", finish_with_text=True))
    bench.run(lambda: leave(bench.agent(way), after=12))
    bench.charged(1)


@OURS
def test_the_rest_is_not_waited_for_long(way: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the usage does not come in time, what the model had finished is estimated."""
    monkeypatch.setattr(_pydantic_ai_call, "REST_SECONDS", 0.2)
    bench.provider.script = turns(Step(text="w", finish_with_text=True, hang_after_finish=True))
    bench.run(lambda: leave(bench.agent(way), after=12))
    assert [label["usage_source"] for label in bench.labels()] == ["estimated"]


@ALL_WAYS
def test_cancelled_after_the_finish_reason(way: str, bench: Bench) -> None:
    """The model had finished when the task was cancelled: spent, so estimated."""
    bench.provider.behaviour = "hang_after_finish"

    async def program() -> None:
        seen: list[str] = []
        task = asyncio.create_task(leave(bench.agent(way), after=100, seen=seen))
        await asyncio.to_thread(eventually, lambda: len(seen) >= WORDS)
        await asyncio.sleep(0.3)  # the finish reason comes right behind the last word
        await stop(task)

    bench.run(program)
    assert [label["usage_source"] for label in bench.labels()] == ["estimated"]


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@ALL_WAYS
@pytest.mark.parametrize("how", ["run", "run_stream", "iter"])
@pytest.mark.parametrize("behaviour", ["silent", "hang"])
def test_the_task_is_cancelled(way: str, how: str, behaviour: str, bench: Bench) -> None:
    """Before the provider answers, and in the middle of a stream."""
    if how == "run":
        behaviour = "silent"  # a whole answer has no middle
    bench.provider.behaviour = behaviour

    async def work() -> None:
        agent = bench.agent(way)
        if how == "run":
            await agent.run("hi")
        elif how == "run_stream":
            await leave(agent, after=100)
        else:
            async with agent.iter("hi") as run:
                async for node in run:
                    if pydantic_ai.Agent.is_model_request_node(node):
                        async with node.stream(run.ctx) as stream:
                            async for _ in stream:
                                pass

    async def program() -> None:
        task = asyncio.create_task(work())
        await asyncio.to_thread(eventually, lambda: bool(bench.provider.posts()))
        await asyncio.sleep(0.2)
        await stop(task)

    bench.run(program)
    bench.cancelled()


@ALL_WAYS
def test_a_cancelled_scope(way: str, bench: Bench) -> None:
    """A deadline of anyio's around the run."""
    bench.provider.behaviour = "hang"

    async def program() -> None:
        with anyio.move_on_after(0.5) as scope:
            await leave(bench.agent(way), after=100)
        assert scope.cancelled_caught

    bench.run(program)
    bench.cancelled()


@ALL_WAYS
def test_pydantic_ais_own_cancel(way: str, bench: Bench, make_vluna: Any) -> None:
    """`result.cancel()` in the middle of a stream: it was left, and is billed as the settings say."""
    bench.provider.behaviour = "hang"

    async def program() -> None:
        async with bench.agent(way).run_stream("hi") as result:
            async for _ in result.stream_text(debounce_by=None):
                await result.cancel()
                break

    bench.run(program)
    bench.cancelled()
    bench.vluna = make_vluna(on_abort="estimate")
    bench.run(program)
    assert [label["usage_source"] for label in bench.labels()] == ["estimated"]


@ALL_WAYS
def test_leaving_the_iteration_over_a_run(way: str, bench: Bench) -> None:
    """The first request is charged, the second one is never asked for."""
    bench.provider.script = turns(Step(calls=[("weather", {})]), Step(text="sunny"))
    agent = bench.agent(way)

    @agent.tool_plain
    def weather() -> str:
        return "sun"

    async def program() -> None:
        async with agent.iter("hi") as run:
            async for node in run:
                if pydantic_ai.Agent.is_call_tools_node(node):
                    break

    bench.run(program)
    assert len(bench.provider.posts()) == 1
    bench.charged(1)


@ALL_WAYS
def test_events_that_are_left(way: str, bench: Bench) -> None:
    """Out of `run_stream_events`, in the middle of an answer."""
    bench.provider.behaviour = "hang"

    async def program() -> None:
        async with bench.agent(way).run_stream_events("hi") as events:
            async for event in events:
                if type(event).__name__ == "PartDeltaEvent":
                    break

    bench.run(program)
    bench.cancelled()


@pytest.mark.parametrize("loop_is_gone", [False, True])
def test_a_stream_that_is_dropped(loop_is_gone: bool, bench: Bench) -> None:
    """Nobody leaves its context: it is settled when Python collects it, also after its loop was closed."""
    bench.provider.behaviour = "hang"
    held: list[Any] = []

    async def hold() -> None:
        model = VlunaModel(bench.model(), bench.vluna)
        opening = direct.model_request_stream(model, [pydantic_ai.ModelRequest.user_text_prompt("hi")])
        stream = await opening.__aenter__()
        held.append((opening, stream))
        async for _ in stream:
            break
        if not loop_is_gone:
            del stream, opening
            held.clear()
            gc.collect()
            await asyncio.sleep(0.2)

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # Pydantic AI's own generators complain of being dropped
    with call_context(principal_id=bench.customer) as scope:
        loop.run_until_complete(hold())
    loop.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held.clear()
        gc.collect()
    assert scope.wait(10)
    assert bench.vluna.flush(10)
    bench.cancelled()


def test_an_answer_that_the_agent_cannot_use(bench: Bench) -> None:
    """It fails after the answer: spent and reported, so charged."""
    bench.provider.script = turns(Step(text="", calls=[("nothing", {})]))

    async def program() -> None:
        with pytest.raises(pydantic_ai.UnexpectedModelBehavior):
            await bench.agent("capability", retries=0).run("hi")

    bench.run(program)
    bench.charged(1)


@pytest.mark.parametrize("way", ["capability", "with_metered_client"])
def test_an_answer_that_pydantic_ai_cannot_read(way: str, bench: Bench) -> None:
    """Its usage is lost with it, so nothing is charged; a metered client has read it before."""
    bench.provider.script = turns(Step(text="x", unreadable=True))

    async def program() -> None:
        with pytest.raises(pydantic_ai.UnexpectedModelBehavior):
            await bench.agent(way).run("hi")

    bench.run(program)
    if way == "capability":
        bench.cancelled()
    else:
        bench.charged(1)


def test_errors_of_ours_break_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in what is read of a request nor in what is read of an answer; the run is that of the bare agent."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError

    async def program() -> None:
        assert (await bench.agent().run("hi")).output == "hello world"
        async with bench.agent().run_stream("hi") as result:
            assert await result.get_output()

    for name in ("ending_of", "stream_ending_of"):
        monkeypatch.setattr(_pydantic_ai_call, name, broken)
    bench.run(program)
    monkeypatch.setattr(_pydantic_ai_model, "model_call_of", broken)
    bench.run(program)
    assert bench.books() == []
