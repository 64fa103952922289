"""What happens in the demo: one function per step, each with the line that tells people what they are about to see."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..sandbox.replay import Served
from ..sandbox.upstream_faults import UpstreamFault
from .player import Call, Player
from .stage import Stage

BURST = 50
_AT_ONCE = 10
_SETTLE_SECONDS = 15.0

Advance = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One step: what it is called in the tables, the line that introduces it, and what it does.

    ``play`` gives the line that says how it went. ``ticks`` is how often it calls ``advance``; 0 for no progress bar.
    """

    name: str
    title: str
    play: Callable[[Stage, Player, Advance], str]
    ticks: int = 0


def _named(cassette: str, *numbers: int) -> list[str]:
    return [f"{cassette}#{number}" for number in numbers]


def _plain(stage: Stage, player: Player, advance: Advance) -> str:
    for name in (*_named("llama-server/chat_plain", 0, 1, 2, 3), "llama-server/chat_json_schema#0"):
        player.play("acme", name)
    player.play("acme", "llama-cpp-python-tools/tool_call#0")
    return "6 answers: one with a JSON schema, one that calls a tool"


def _streams(stage: Stage, player: Player, advance: Advance) -> str:
    for name in _named("llama-server/chat_stream", 0, 1, 2, 3):
        player.play("tea-house", name)
    player.play("tea-house", "llama-server/completions_stream#0")
    return "5 streams; the usage was asked for on the caller's behalf, the extra chunk was hidden again"


def _responses(stage: Stage, player: Player, advance: Advance) -> str:
    for name in (*_named("llama-server/responses_plain", 0, 1), *_named("llama-server/responses_stream", 2, 3)):
        player.play("sky-lab", name)
    return "2 plain, 2 streamed"


def _embeddings(stage: Stage, player: Player, advance: Advance) -> str:
    for name in _named("llama-server-embeddings/embeddings", 0, 1):
        player.play("lantern", name)
    return "2 answers, input tokens only"


def _cached(stage: Stage, player: Player, advance: Advance) -> str:
    names = (
        *_named("llama-server/chat_turns_cached", 0, 1, 2, 3),
        *_named("llama-server/chat_turns_cached_stream", 0, 1, 2),
        *_named("llama-server/responses_cached", 0, 1),
        "litellm/proxy_turns_cached#1",
    )
    calls = [player.play("puzzles", name) for name in names]
    cached = sum(served.tokens.cached for served in _served(stage, calls) if served.tokens)
    return f"{len(calls)} turns of conversations; {cached:,} prompt tokens came from the cache, at the cache's price"


def _burst(stage: Stage, player: Player, advance: Advance) -> str:
    customers = itertools.cycle(("acme", "tea-house", "sky-lab", "lantern", "puzzles"))
    recordings = itertools.cycle(
        (
            *_named("llama-server/chat_stream", 0, 1, 4, 5),
            *_named("llama-server/chat_plain", 4, 5),
            *_named("litellm/proxy_chat_stream", 1, 2),
            *_named("llama-server/responses_stream", 0, 1),
            *_named("litellm/proxy_chat_plain", 0, 3),
            "llama-server-embeddings/embeddings#1",
        )
    )
    pairs = zip(customers, recordings, strict=False)  # both without end
    calls = asyncio.run(_all_at_once(stage, player, advance, list(itertools.islice(pairs, BURST))))
    return f"{len(calls)} answers on one event loop, {_AT_ONCE} at a time, each billed to its own customer"


async def _all_at_once(stage: Stage, player: Player, advance: Advance, work: list[tuple[str, str]]) -> list[Call]:
    places = asyncio.Semaphore(_AT_ONCE)
    async with stage.async_client() as client:

        async def one(customer: str, recording: str) -> Call:
            async with places:
                call = await player.play_async(client, customer, recording)
            advance()
            return call

        calls = await asyncio.gather(*(one(customer, recording) for customer, recording in work))
    await stage.vluna.async_gate.aclose()
    return calls


def _almost_broke(stage: Stage, player: Player, advance: Advance) -> str:
    stage.gate.set_credit("last-coin", 50)
    player.play("last-coin", "llama-server/chat_plain#1")
    return "the gate lets the call run, and a hint says by how much its credit falls short"


def _broke(stage: Stage, player: Player, advance: Advance) -> str:
    stage.gate.set_credit("no-money", 0)
    call = player.play("no-money", "llama-server/chat_stream#0")
    return f"{call.detail}; requests that reached the provider: {call.upstream_requests}"


def _hurried(stage: Stage, player: Player, advance: Advance) -> str:
    stage.gate.rate(2, principal_id="hasty", window="hour")
    # A window may end between two calls, so the number of calls until the refusal is not quite fixed.
    calls = [player.play("hasty", "llama-server/completions_plain#0")]
    while calls[-1].outcome == "answered" and len(calls) < 6:
        calls.append(player.play("hasty", "llama-server/completions_plain#1"))
    return f"call {len(calls)}: {calls[-1].detail}; requests that reached the provider: {calls[-1].upstream_requests}"


def _left(stage: Stage, player: Player, advance: Advance) -> str:
    call = player.play("tea-house", "llama-server/chat_stream_long#0", leave_after=8)
    return f"{call.outcome} after 8 of 200 tokens: the lease is cancelled, nothing is charged"


def _broken(stage: Stage, player: Player, advance: Advance) -> str:
    stage.upstream.inject(UpstreamFault(cut_after=12), path="/v1/chat/completions", stream=True)
    call = player.play("acme", "llama-server/chat_stream#2")
    return f"the caller sees the SDK's own {call.detail or 'answer'}: the lease is cancelled, nothing is charged"


def _unreported(stage: Stage, player: Player, advance: Advance) -> str:
    for name in _named("llama-cpp-python/legacy_chat_stream_ignores_include_usage", 0, 1):
        player.play("museum", name)
    return "2 answers are booked by estimate, and labelled so at the gate"


def _gate_away(stage: Stage, player: Player, advance: Advance) -> str:
    stage.gate.stop()
    try:
        calls = [player.play("night-bus", name) for name in _named("llama-server/chat_plain", 2, 3)]
        calls.append(player.play("night-bus", "llama-server/chat_stream#4"))
    finally:
        stage.gate.start()
    settled = all(call.scope is not None and call.scope.wait(_SETTLE_SECONDS) for call in calls)
    calls.append(player.play("night-bus", "llama-server/chat_plain#5"))
    booked = len(stage.gate.booked("night-bus").ingests)
    late = "" if settled else " (not all of it yet)"
    return f"3 calls ran without a lease; the gate is back, {booked} were booked by ingest{late}; a 4th has its lease"


STEPS: tuple[Step, ...] = (
    Step("plain", "Plain chat answers", _plain),
    Step("stream", "Streamed answers, passed through untouched", _streams),
    Step("responses", "The Responses API", _responses),
    Step("embed", "Embeddings", _embeddings),
    Step("cached", "Prompts that the server has in its cache", _cached),
    Step("burst", f"A burst of {BURST} calls with asyncio, as five customers", _burst, BURST),
    Step("hint", "A customer whose credit is nearly gone", _almost_broke),
    Step("denied", "A customer without credit: refused before the provider is called", _broke),
    Step("rate", "A customer who may call twice an hour", _hurried),
    Step("left", "A caller who leaves in the middle of a stream", _left),
    Step("broken", "A provider that breaks off in the middle of a stream", _broken),
    Step("estimate", "A server that reports no usage on streams", _unreported),
    Step("ungated", "The gate goes away for a moment", _gate_away),
)


def _served(stage: Stage, calls: list[Call]) -> Iterator[Served]:
    wanted = {call.served_id for call in calls}
    return (one for one in stage.upstream.served if one.request_id in wanted)
