"""What metering adds to a streamed call, and what the gate's two round trips cost in CPU."""

from __future__ import annotations

import asyncio
import gc
import inspect
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import openai

from vluna_llm import Vluna, call_context
from vluna_llm.usage.types import TokenUsage

from .figures import Figure, Profile, mean_of
from .servers import MODEL, OUTPUT_TOKENS, PROMPT_TOKENS, World, world

Colour = Literal["sync", "async"]

SHORT, LONG = 200, 1_000
SENTENCE = "The customer wrote that the parcel arrived late and asked for a refund of the fee. "
MESSAGES = [
    {"role": "system", "content": SENTENCE * 3},
    {"role": "user", "content": SENTENCE * 9},
]
_PAIRS_A_BLOCK = 5


@dataclass(frozen=True)
class Spent:
    """One call, in seconds."""

    cpu: float
    wall: float


def make_client(colour: Colour, base_url: str, **options: Any) -> Any:
    kind = openai.AsyncOpenAI if colour == "async" else openai.OpenAI
    return kind(base_url=base_url, api_key="sk-bench", max_retries=0, **options)


async def consume(client: Any) -> int:
    """Read a stream as an application does; the number of chunks that carry a choice."""
    stream: Any = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    count = size = 0
    if inspect.isawaitable(stream):
        async for chunk in await stream:
            size += len(chunk.choices[0].delta.content or "")
            count += 1
    else:
        for chunk in stream:
            size += len(chunk.choices[0].delta.content or "")
            count += 1
    return count


async def _bare(client: Any, chunks: int) -> Spent:
    wall, cpu = time.perf_counter(), time.process_time()
    count = await consume(client)
    spent = Spent(time.process_time() - cpu, time.perf_counter() - wall)
    assert count == chunks, f"{count} chunks instead of {chunks}"
    return spent


async def _metered(client: Any, chunks: int, vluna: Vluna) -> Spent:
    """The same, with its commit delivered: `flush` is part of what is measured."""
    wall, cpu = time.perf_counter(), time.process_time()
    with call_context(principal_id="customer_1") as scope:
        count = await consume(client)
    delivered = vluna.flush(10)
    spent = Spent(time.process_time() - cpu, time.perf_counter() - wall)
    assert count == chunks, f"{count} chunks instead of {chunks}"
    assert delivered
    assert [receipt.state for receipt in scope.receipts] == ["booked"], scope.receipts
    return spent


def streaming(profile: Profile, colour: Colour) -> list[Figure]:
    """The rows of one colour."""
    with world() as around, Vluna(**around.settings()) as vluna:
        return asyncio.run(_streaming(profile, colour, around, vluna))


async def _streaming(profile: Profile, colour: Colour, around: World, vluna: Vluna) -> list[Figure]:
    dice = random.Random(11)
    bare = {n: make_client(colour, around.base_url(chunks=n)) for n in (SHORT, LONG)}
    metered = {n: vluna.wrap(client) for n, client in bare.items()}
    for _ in range(5):
        for n in (SHORT, LONG):
            await _bare(bare[n], n)
            await _metered(metered[n], n, vluna)
    gc.collect()
    gc.freeze()
    added: dict[str, list[float]] = defaultdict(list)
    for _ in range(profile.blocks):
        turns = [(kind, SHORT) for kind in ("bare", "metered") for _ in range(_PAIRS_A_BLOCK)]
        turns += [(kind, LONG) for kind in ("bare", "metered") for _ in range(2)]
        dice.shuffle(turns)
        spent: dict[tuple[str, int], list[Spent]] = defaultdict(list)
        for kind, chunks in turns:
            if kind == "bare":
                spent[kind, chunks].append(await _bare(bare[chunks], chunks))
            else:
                spent[kind, chunks].append(await _metered(metered[chunks], chunks, vluna))
        cpu = {key: sum(s.cpu for s in calls) / len(calls) for key, calls in spent.items()}
        wall = {key: sum(s.wall for s in calls) / len(calls) for key, calls in spent.items()}
        short, long = (cpu["metered", n] - cpu["bare", n] for n in (SHORT, LONG))
        added["percent"].append(100 * short / cpu["bare", SHORT])
        added["call"].append(1e6 * short)
        added["chunk"].append(1e6 * (long - short) / (LONG - SHORT))
        added["fixed"].append(1e6 * short - SHORT * added["chunk"][-1])
        added["bare"].append(1e6 * (cpu["bare", LONG] - cpu["bare", SHORT]) / (LONG - SHORT))
        added["wall"].append(100 * (wall["metered", SHORT] / wall["bare", SHORT] - 1))
    group = f"streaming, {colour}"
    return [
        mean_of(
            group,
            f"CPU added to a call of {SHORT} chunks",
            "%",
            added["percent"],
            budget=3.0,
            note="authorize, commit and flush included",
        ),
        mean_of(
            group,
            "CPU added per chunk",
            "µs",
            added["chunk"],
            budget=1.0,
            note=f"slope between {SHORT} and {LONG} chunks",
        ),
        mean_of(group, "CPU added per call, any length", "µs", added["fixed"], note="what is left without the chunks"),
        mean_of(group, f"CPU added to a call of {SHORT} chunks, absolute", "µs", added["call"]),
        mean_of(group, "CPU of the bare client per chunk", "µs", added["bare"]),
        mean_of(
            group, f"time added to a call of {SHORT} chunks", "%", added["wall"], note="until the commit is booked"
        ),
    ]


def round_trips(profile: Profile) -> list[Figure]:
    """CPU of this process for one authorize and one commit, sent one after another on a kept connection."""
    with world() as around, Vluna(**around.settings()) as vluna:
        return asyncio.run(_round_trips(profile, vluna))


async def _round_trips(profile: Profile, vluna: Vluna) -> list[Figure]:
    gate, async_gate, many = vluna.gate, vluna.async_gate, profile.some(40)
    who = {"principal_id": "customer_1", "user_id": "customer_1"}
    ask = {**who, "feature_code": f"openai.{MODEL}", "estimated_quantity": 1_000}
    total = TokenUsage(input_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS).total_tokens
    spent: dict[str, list[float]] = defaultdict(list)
    for block in range(profile.blocks + 1):
        started = time.process_time()
        leases = [gate.authorize(**ask) for _ in range(many)]  # type: ignore[arg-type]
        authorized = time.process_time()
        for lease in leases:
            gate.commit(lease=lease, quantity=total, **who)
        committed = time.process_time()
        for _ in range(many):
            await async_gate.authorize(**ask)  # type: ignore[arg-type]
        ended = time.process_time()
        if block:  # the first one opened the connections
            spent["authorize"].append(1e6 * (authorized - started) / many)
            spent["commit"].append(1e6 * (committed - authorized) / many)
            spent["async authorize"].append(1e6 * (ended - committed) / many)
    await async_gate.aclose()
    return [mean_of("gate client", f"CPU of one {name}", "µs", values) for name, values in spent.items()]
