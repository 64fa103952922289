"""A thousand streams open at once on one event loop, a third of them left in the middle, each way of leaving."""

from __future__ import annotations

import asyncio
import gc
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from programs import files
from streams_provider import WORDS, StreamsProvider, tokens_of

from vluna_llm import Vluna, call_context
from vluna_llm.sandbox import Sandbox

pytest.importorskip("openai", reason="the OpenAI SDK is not installed: pip install 'vluna-llm[openai]'")

Leaving = Literal["cancel", "close", "break", "forget", "raise"]
WAYS: tuple[Leaving, ...] = ("cancel", "close", "break", "forget", "raise")


@pytest.fixture
def _many_descriptors() -> Any:
    """Both ends of every connection are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8_192
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this machine allows {hard} open files, and {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Mishap(Exception):
    """An error of the product, in the middle of an answer."""


async def one(client: Any, n: int, leave_at: int | None, how: Leaving, reached: asyncio.Event) -> int:
    """Read stream ``n``, to its end or until word ``leave_at``; gives the words that were read."""
    words = 0
    with call_context(principal_id=f"customer_{n % 25}", labels={"n": str(n)}):
        stream = await client.chat.completions.create(
            model="gpt-4o-mini",
            messages=[{"role": "user", "content": "Hello"}],
            stream=True,
            extra_headers={"x-n": str(n)},
        )
    async for chunk in stream:
        words += bool(chunk.choices and chunk.choices[0].delta.content)
        if words == leave_at:
            reached.set()
            if how == "cancel":
                await asyncio.sleep(60)
            elif how == "close":
                await stream.close()
                return words
            elif how == "raise":
                raise Mishap
            elif how == "break":
                break
            else:
                return words
    return words


async def all_of_them(client: Any, count: int, left: dict[int, int]) -> list[Any]:
    async def run(n: int) -> Any:
        reached = asyncio.Event()
        how = WAYS[n // 3 % len(WAYS)]
        task = asyncio.ensure_future(one(client, n, left.get(n), how, reached))
        if n in left and how == "cancel":
            await reached.wait()
            task.cancel()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    results = await asyncio.gather(*(run(n) for n in range(count)))
    gc.collect()
    await client.close()
    await asyncio.sleep(0.05)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others, others
    return results


@pytest.mark.slow
@pytest.mark.usefixtures("_many_descriptors")
@pytest.mark.parametrize(("on_abort", "count"), [("cancel", 1000), ("estimate", 300)])
def test_a_thousand_streams_of_which_a_third_is_left(
    gate: Sandbox,
    make_vluna: Callable[..., Vluna],
    tmp_path: Path,
    on_abort: str,
    count: int,
) -> None:
    """The rest to the token, those that were left given back or estimated, no operation lost, nothing left over."""
    import openai

    dice = random.Random(11)
    left = {n: dice.randint(1, WORDS - 1) for n in range(0, count, 3)}
    outbox = tmp_path / "outbox"
    vluna = make_vluna(outbox=str(outbox), authorize_deadline=60.0, on_abort=on_abort)
    with StreamsProvider(count).running() as provider:
        client = vluna.wrap(openai.AsyncOpenAI(base_url=provider.base_url, api_key="sk-test", max_retries=0))
        results = asyncio.run(all_of_them(client, count, left))
        assert provider.most_at_once == count
    for n, result in enumerate(results):
        if n not in left:
            assert result == WORDS
        elif WAYS[n // 3 % len(WAYS)] in ("cancel", "raise"):
            assert isinstance(result, (asyncio.CancelledError, Mishap))
    assert vluna.flush(60)
    booked: dict[int, Any] = {}
    for entry in gate.booked().entries:
        n = int(entry.labels["n"])
        assert n not in booked, "charged twice"
        assert entry.charged_xusd > 0
        booked[n] = entry
    for n in range(count):
        if n not in left:
            assert booked[n].quantity == sum(tokens_of(n))
            assert booked[n].labels["usage_source"] == "provider"
    if on_abort == "cancel":
        assert set(booked) == set(range(count)) - set(left)
    else:
        assert set(booked) == set(range(count))
        assert {booked[n].labels["usage_source"] for n in left} == {"estimated"}
    states = [lease.state for lease in gate.leases()]
    assert len(states) == count
    assert states.count("closed") == len(booked)
    assert states.count("canceled") == count - len(booked)
    assert vluna.telemetry.counts["vluna.internal_error"] == 0
    assert vluna._running().settler.outstanding == 0
    assert vluna.close(10)
    assert files(outbox) == []
