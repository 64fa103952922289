"""How a call of Anthropic's client ends when it does not end well: left, cancelled, cut, failed, retried."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from claude import MESSAGE, STREAM, Claude, anthropic
from conftest import Bill, MakeVluna, ask, cancelled, each, entered, gone
from upstream import Upstream

from vluna_llm import Vluna, call_context
from vluna_llm.sandbox import Sandbox


async def opened(client: Any, api: str = "messages", events: int = 0) -> Any:
    """A stream of which so many events were read."""
    messages = client.messages if api == "messages" else client.beta.messages
    stream = await ask(messages.create(**STREAM))
    for _ in range(events):
        await ask(stream.__anext__() if hasattr(stream, "__anext__") else next(stream))
    return stream


# -- left early --------------------------------------------------------------------------------------------------------


class _Consumer(Exception):
    """Raised by the consumer's own code."""


async def left_by_with(client: Any, api: str) -> None:
    async with entered(await opened(client, api, 3)):
        pass


async def closed_twice(client: Any, api: str) -> None:
    stream = await opened(client, api, 3)
    await ask(stream.close())
    await ask(stream.close())


async def consumer_raises(client: Any, api: str) -> None:
    with suppress(_Consumer):
        async with entered(await opened(client, api)) as stream:
            async for _ in each(stream):
                raise _Consumer


async def dropped(client: Any, api: str) -> None:
    stream = await opened(client, api, 3)
    del stream
    await gone()


async def never_iterated(client: Any, api: str) -> None:
    stream = await opened(client, api)
    del stream
    await gone()


async def raw_never_parsed(client: Any, api: str) -> None:
    messages = client.messages if api == "messages" else client.beta.messages
    raw = await ask(messages.with_raw_response.create(**STREAM))
    del raw
    await gone()


async def lines_broken_off(client: Any, api: str) -> None:
    messages = client.messages if api == "messages" else client.beta.messages
    async with entered(messages.with_streaming_response.create(**STREAM)) as response:
        async for _ in each(response.iter_lines()):
            break


async def helper_left(client: Any, api: str) -> None:
    messages = client.messages if api == "messages" else client.beta.messages
    async with entered(messages.stream(**MESSAGE)) as events:
        async for _ in each(events.text_stream):
            break


LEFT = [
    left_by_with,
    closed_twice,
    consumer_raises,
    dropped,
    never_iterated,
    raw_never_parsed,
    lines_broken_off,
    helper_left,
]
FORGOTTEN = (never_iterated, raw_never_parsed)
IN_A_CYCLE = "_iterator" not in vars(anthropic.Stream)
"""Where a stream holds itself, dropping it leaves it to the garbage collector, and nothing more can be read from it."""


@pytest.mark.parametrize("on_abort", ["cancel", "estimate", "drain"])
@pytest.mark.parametrize("api", ["messages", "beta"])
@pytest.mark.parametrize("way", LEFT, ids=lambda one: one.__name__)
def test_a_stream_that_is_left(
    way: Any, api: str, on_abort: str, claude: Claude, make_vluna: MakeVluna, provider: Upstream, billed: Any
) -> None:
    """``cancel``: nothing, though ``message_start`` named tokens. ``estimate``: labelled. ``drain``: what is reported,
    where somebody is left to read on."""
    collected = way in FORGOTTEN or (way is dropped and IN_A_CYCLE)
    drained = on_abort == "drain" and not collected
    provider.behaviour, provider.pause = "slow" if drained else "hang", 0.01
    vluna = make_vluna(on_abort=on_abort)

    async def program(client: Any) -> None:
        await way(client, api)
        await asyncio.sleep(0.5 if drained else 0)

    bill: Bill = billed(vluna, lambda: claude.run(program, vluna.wrap(claude.bare())))
    if on_abort == "estimate":
        bill.booked_an_estimate()
    elif drained:
        bill.booked_once()
    else:
        bill.cancelled_once()


async def _up_to_the_stop_reason(stream: Any) -> None:
    async for event in each(stream):
        if event.type == "message_delta":
            assert event.delta.stop_reason == "end_turn"
            return


@pytest.mark.parametrize("behaviour", ["ok", "old_delta", "hang_after_finish"])
@pytest.mark.parametrize("close", [True, False])
def test_stopping_behind_the_stop_reason_is_no_abort(
    behaviour: str, close: bool, claude: Claude, vluna: Vluna, provider: Upstream, billed: Any
) -> None:
    """``message_delta`` is cumulative: it is committed, though ``message_stop`` never came (design rule 3)."""
    provider.behaviour = behaviour

    async def program(client: Any) -> None:
        stream = await opened(client)
        await _up_to_the_stop_reason(stream)
        if close:
            await ask(stream.close())
        del stream
        await gone()

    bill: Bill = billed(vluna, lambda: claude.run(program, vluna.wrap(claude.bare())))
    bill.booked_once()


def test_a_plain_answer_never_read_is_charged(claude: Claude, vluna: Vluna, billed: Any) -> None:
    """``with_streaming_response`` left without a look: the model has done its work (design rule 3)."""

    async def program(client: Any) -> None:
        async with entered(client.messages.with_streaming_response.create(**MESSAGE)):
            pass

    bill: Bill = billed(vluna, lambda: claude.run(program, vluna.wrap(claude.bare())))
    bill.booked_once()


# -- broken on the way -------------------------------------------------------------------------------------------------


async def plain(client: Any) -> None:
    await ask(client.messages.create(**MESSAGE))


async def streamed(client: Any) -> None:
    async for _ in each(await opened(client)):
        pass


async def helped(client: Any) -> None:
    async with entered(client.messages.stream(**MESSAGE)) as events:
        await ask(events.until_done())


def outcomes(claude: Claude, program: Any, vluna: Vluna, billed: Any, **options: Any) -> tuple[Any, Any, Bill]:
    """How it ends without us, how it ends with us, and the bill."""
    seen: list[Any] = []

    async def run(client: Any) -> None:
        try:
            await program(client)
            seen.append(None)
        except Exception as error:
            seen.append((type(error), str(error), type(error.__cause__), getattr(error, "status_code", None)))
        await gone()

    claude.run(run, claude.bare(**options))
    provider = claude.provider
    provider.flaked.clear()
    provider.requests.clear()
    bill = billed(vluna, lambda: claude.run(run, vluna.wrap(claude.bare(**options))))
    return seen[0], seen[1], bill


@pytest.mark.parametrize("behaviour", ["cut", "ends_early", "error_event"])
@pytest.mark.parametrize("program", [streamed, helped], ids=lambda one: one.__name__)
def test_a_stream_that_breaks_costs_nothing(
    behaviour: str, program: Any, claude: Claude, vluna: Vluna, provider: Upstream, billed: Any
) -> None:
    """The consumer gets what it would have got; usage of ``message_start`` is not usage."""
    provider.behaviour = behaviour
    bare, metered, bill = outcomes(claude, program, vluna, billed)
    assert bare == metered
    assert (bare is None) == (behaviour == "ends_early")
    bill.cancelled_once()


@pytest.mark.parametrize(
    ("behaviour", "status"), [("down", 500), ("bad", 400), ("limited", 429)], ids=["500", "400", "429"]
)
@pytest.mark.parametrize("program", [plain, streamed, helped], ids=lambda one: one.__name__)
def test_a_refusal_of_the_provider_is_given_back(
    behaviour: str, status: int, program: Any, claude: Claude, vluna: Vluna, provider: Upstream, billed: Any
) -> None:
    """The SDK's own exception, and one lease for all its attempts."""
    provider.behaviour = behaviour
    bare, metered, bill = outcomes(claude, program, vluna, billed, max_retries=1)
    assert bare == metered
    assert bare[3] == status
    assert len(provider.requests) == (1 if status == 400 else 2)
    bill.cancelled_once()


@pytest.mark.parametrize("behaviour", ["flaky", "busy"])
@pytest.mark.parametrize("program", [plain, streamed, helped], ids=lambda one: one.__name__)
def test_a_retry_belongs_to_the_same_call(
    behaviour: str, program: Any, claude: Claude, vluna: Vluna, provider: Upstream, billed: Any
) -> None:
    """500 or 529, then an answer: one lease, one charge (design rule 1)."""
    provider.behaviour = behaviour
    bare, metered, bill = outcomes(claude, program, vluna, billed, max_retries=2)
    assert bare is metered is None
    assert len(provider.requests) == 2
    bill.booked_once()


@pytest.mark.parametrize("behaviour", ["html", "broken", "error200"])
def test_a_2xx_that_is_no_answer_is_given_back(
    behaviour: str, claude: Claude, vluna: Vluna, provider: Upstream, billed: Any
) -> None:
    """A page of a proxy, JSON that ends in the middle, an error under 200."""
    provider.behaviour = behaviour
    if behaviour == "error200":
        address = f"{provider.host}/plain"  # Anthropic never does: what a proxy before it may do
        bare, metered, bill = outcomes(claude, plain, vluna, billed, base_url=address)
    else:
        bare, metered, bill = outcomes(claude, plain, vluna, billed)
    assert bare == metered
    bill.cancelled_once()


def test_no_answer_in_time_is_given_back(claude: Claude, vluna: Vluna, provider: Upstream, billed: Any) -> None:
    """A time-out before the headers, and no connection at all."""
    provider.behaviour = "silent"
    bare, metered, bill = outcomes(claude, plain, vluna, billed, timeout=0.3)
    assert bare == metered
    assert bare[0] is anthropic.APITimeoutError
    bill.cancelled_once()
    bare, metered, _ = outcomes(claude, plain, vluna, billed, base_url="http://127.0.0.1:9")
    assert bare == metered
    assert bare[0] is anthropic.APIConnectionError


def test_a_stream_that_stalls_is_given_back(claude: Claude, vluna: Vluna, provider: Upstream, billed: Any) -> None:
    """Past the client's read time-out."""
    provider.behaviour = "hang"
    bare, metered, bill = outcomes(claude, streamed, vluna, billed, timeout=0.3)
    assert bare == metered
    assert bare is not None
    bill.cancelled_once()


@pytest.mark.parametrize(
    "place",
    [
        "vluna_llm.integrations._anthropic_call.classify",
        "vluna_llm.integrations._anthropic_call.request_body",
        "vluna_llm.integrations._anthropic_call.read_body",
        "vluna_llm.integrations._sdk_call.tap",
        "vluna_llm.tap.StreamReader.pass_through",
        "vluna_llm.tap.StreamReader.end",
        "vluna_llm.lifecycle.Operation.finish",
    ],
)
@pytest.mark.parametrize("program", [plain, streamed, helped], ids=lambda one: one.__name__)
def test_a_fault_of_ours_does_not_reach_the_product(
    place: str, program: Any, claude: Claude, vluna: Vluna, customer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of ours raises, the call goes on as if we were not there (promise 1)."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(place, broken)
    claude.run(program, vluna.bind(claude.bare(), principal_id=customer))


# -- async only: cancellation ------------------------------------------------------------------------------------------


async def while_reading(client: Any) -> None:
    async def work() -> None:
        async for _ in await opened(client):
            pass

    await cancelled(work)


async def while_reading_in_with(client: Any) -> None:
    async def work() -> None:
        async with await opened(client) as stream:
            async for _ in stream:
                pass

    await cancelled(work)


async def while_the_helper_reads(client: Any) -> None:
    async def work() -> None:
        async with client.messages.stream(**MESSAGE) as events:
            await events.until_done()

    await cancelled(work)


async def in_the_consumer(client: Any) -> None:
    async def work() -> None:
        async for _ in await opened(client):
            await asyncio.sleep(10)

    await cancelled(work)
    await gone()


async def by_a_scope(client: Any) -> None:
    import anyio

    with anyio.move_on_after(0.15):
        async with await opened(client) as stream:
            async for _ in stream:
                pass


async def with_its_generator(client: Any) -> None:
    async def product() -> AsyncIterator[str]:
        async for event in await opened(client):
            yield event.type

    async for _ in product():
        break
    await gone()


async def by_the_end_of_the_loop(client: Any) -> None:
    client._kept = await opened(client, events=2)


CANCELLED = [
    while_reading,
    while_reading_in_with,
    while_the_helper_reads,
    in_the_consumer,
    by_a_scope,
    with_its_generator,
    by_the_end_of_the_loop,
]


@pytest.mark.parametrize("program", CANCELLED, ids=lambda one: one.__name__)
def test_a_cancelled_consumer_is_charged_nothing(program: Any, vluna: Vluna, provider: Upstream, billed: Any) -> None:
    """Wherever the cancellation hits, also when the loop is torn down with the stream open."""
    provider.behaviour = "hang"
    claude = Claude(True, provider)

    def work() -> None:
        claude.run(program, vluna.wrap(claude.bare()))
        gc.collect()

    bill: Bill = billed(vluna, work)
    bill.cancelled_once()


def test_cancelled_behind_the_stop_reason_is_charged(vluna: Vluna, provider: Upstream, billed: Any) -> None:
    """Anthropic has told the usage with the stop reason, so it is no estimate."""
    provider.behaviour = "hang_after_finish"
    claude = Claude(True, provider)

    async def program(client: Any) -> None:
        stopped = asyncio.Event()

        async def work() -> None:
            async with await opened(client) as stream:
                async for event in stream:
                    if event.type == "message_delta":
                        stopped.set()

        task = asyncio.create_task(work())
        await asyncio.wait_for(stopped.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    bill: Bill = billed(vluna, lambda: claude.run(program, vluna.wrap(claude.bare())))
    bill.booked_once()


def test_cancelled_before_the_headers_is_given_back(vluna: Vluna, provider: Upstream, billed: Any) -> None:
    """The provider has not answered at all."""
    provider.behaviour = "silent"
    claude = Claude(True, provider)

    async def program(client: Any) -> None:
        await cancelled(lambda: opened(client))

    bill: Bill = billed(vluna, lambda: claude.run(program, vluna.wrap(claude.bare())))
    bill.cancelled_once()


def test_usage_is_written_down_before_the_consumer_sees_the_end(
    claude: Claude, vluna: Vluna, provider: Upstream, customer: str
) -> None:
    """Killed right behind the last event, a process would still owe what it used."""

    async def program(client: Any) -> int:
        with call_context(principal_id=customer) as scope:
            async for event in each(await opened(client)):
                if event.type == "message_stop":
                    return scope.usage.total_tokens
        return 0

    assert claude.run(program, vluna.wrap(claude.bare())) == 120


def test_the_receipt_is_there_when_settling_inline(claude: Claude, make_vluna: MakeVluna, customer: str) -> None:
    """``settle="inline"``: whole answers and streams."""

    async def program(client: Any) -> None:
        with call_context(principal_id=customer) as scope:
            await plain(client)
            await streamed(client)
            assert [receipt.state for receipt in scope.receipts] == ["booked"] * 2

    claude.run(program, make_vluna(settle="inline").wrap(claude.bare()))


_AT_EXIT = """
import os
import anthropic
from vluna_llm import Vluna

client = Vluna().bind(anthropic.Anthropic(api_key="k", base_url=os.environ["UPSTREAM"]), principal_id="leaver")
stream = client.messages.create(**eval(os.environ["STREAM"]))
next(stream)
"""


def test_a_stream_that_is_open_when_the_process_exits(provider: Upstream, tmp_path: Path) -> None:
    """It is settled at exit, and the interpreter ends without a word."""
    provider.behaviour = "hang"
    with Sandbox() as gate:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLUNA_", "ANTHROPIC_"))}
        settings = {**gate.env(), "VLUNA_LLM_OUTBOX": str(tmp_path), "UPSTREAM": provider.anthropic_base}
        done = subprocess.run(
            [sys.executable, "-c", _AT_EXIT],
            env={**kept, **settings, "STREAM": repr(STREAM)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert [lease.state for lease in gate.leases("leaver")] == ["canceled"]
        assert gate.booked("leaver").entries == ()
