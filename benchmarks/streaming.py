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

Kind = Literal["bare", "metered", "asking", "metered asking"]
"""Who calls: a caller who does not ask for usage (metering does, so that every chunk is longer by ``"usage":null``),
and one who asks himself (then metering only passes the chunks through)."""


@dataclass(frozen=True)
class Spent:
    """One call, in seconds."""

    cpu: float
    wall: float


def make_client(colour: Colour, base_url: str, **options: Any) -> Any:
    kind = openai.AsyncOpenAI if colour == "async" else openai.OpenAI
    return kind(base_url=base_url, api_key="sk-bench", max_retries=0, **options)


async def consume(client: Any, *, asking: bool = False) -> int:
    """Read a stream as an application does; the number of chunks that carry a choice."""
    asked: dict[str, Any] = {"stream_options": {"include_usage": True}} if asking else {}
    stream: Any = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **asked)
    count = size = 0
    if inspect.isawaitable(stream):
        async for chunk in await stream:
            if chunk.choices:
                size += len(chunk.choices[0].delta.content or "")
                count += 1
    else:
        for chunk in stream:
            if chunk.choices:
                size += len(chunk.choices[0].delta.content or "")
                count += 1
    return count


async def _bare(client: Any, chunks: int, asking: bool) -> Spent:
    wall, cpu = time.perf_counter(), time.process_time()
    count = await consume(client, asking=asking)
    spent = Spent(time.process_time() - cpu, time.perf_counter() - wall)
    assert count == chunks, f"{count} chunks instead of {chunks}"
    return spent


async def _metered(client: Any, chunks: int, asking: bool, vluna: Vluna) -> Spent:
    """The same, with its commit delivered: `flush` is part of what is measured."""
    wall, cpu = time.perf_counter(), time.process_time()
    with call_context(principal_id="customer_1") as scope:
        count = await consume(client, asking=asking)
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

    async def call(kind: Kind, chunks: int) -> Spent:
        asking = kind.endswith("asking")
        if kind.startswith("metered"):
            return await _metered(metered[chunks], chunks, asking, vluna)
        return await _bare(bare[chunks], chunks, asking)

    pairs, few = (2, 1) if profile.quick else (6, 2)
    turns: list[tuple[Kind, int]] = []
    both: tuple[tuple[Kind, Kind], ...] = (("bare", "metered"), ("asking", "metered asking"))
    for kind in both[0]:
        turns += [(kind, SHORT)] * pairs + [(kind, LONG)] * few
    for kind in both[1]:
        turns += [(kind, SHORT)] * few + [(kind, LONG)] * few
    for turn in turns:
        await call(*turn)
    gc.collect()
    gc.freeze()
    added: dict[str, list[float]] = defaultdict(list)
    for _ in range(profile.blocks):
        dice.shuffle(turns)
        spent: dict[tuple[Kind, int], list[Spent]] = defaultdict(list)
        for turn in turns:
            spent[turn].append(await call(*turn))
        cpu = {key: sum(s.cpu for s in calls) / len(calls) for key, calls in spent.items()}
        wall = {key: sum(s.wall for s in calls) / len(calls) for key, calls in spent.items()}

        def slope(kind: Kind, cpu: dict[tuple[Kind, int], float] = cpu) -> float:
            return 1e6 * (cpu[kind, LONG] - cpu[kind, SHORT]) / (LONG - SHORT)

        more = cpu["metered", SHORT] - cpu["bare", SHORT]
        added["percent"].append(100 * more / cpu["bare", SHORT])
        added["call"].append(1e6 * more)
        added["passed"].append(slope("metered asking") - slope("asking"))
        added["chunk"].append(slope("metered") - slope("bare"))
        added["bare"].append(slope("bare"))
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
            "CPU added per chunk passed through",
            "µs",
            added["passed"],
            budget=1.0,
            note=f"slope between {SHORT} and {LONG} chunks; the caller asks for usage",
        ),
        mean_of(
            group,
            "CPU added per chunk where metering asks",
            "µs",
            added["chunk"],
            note='the SDK parses "usage":null as well',
        ),
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
    who: dict[str, Any] = {"principal_id": "customer_1", "user_id": "customer_1"}
    ask: dict[str, Any] = {**who, "feature_code": f"openai.{MODEL}", "estimated_quantity": 1_000}
    total = TokenUsage(input_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS).total_tokens
    spent: dict[str, list[float]] = defaultdict(list)
    for block in range(profile.blocks + 1):
        started = time.process_time()
        leases = [gate.authorize(**ask) for _ in range(many)]
        authorized = time.process_time()
        for lease in leases:
            gate.commit(lease=lease, quantity=total, **who)
        committed = time.process_time()
        for _ in range(many):
            await async_gate.authorize(**ask)
        ended = time.process_time()
        if block:  # the first one opened the connections
            spent["authorize"].append(1e6 * (authorized - started) / many)
            spent["commit"].append(1e6 * (committed - authorized) / many)
            spent["async authorize"].append(1e6 * (ended - committed) / many)
    await async_gate.aclose()
    return [mean_of("gate client", f"CPU of one {name}", "µs", values) for name, values in spent.items()]
