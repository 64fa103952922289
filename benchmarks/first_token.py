"""How much later the first chunk comes: strict waits for one round trip of the gate, overlap for none."""

from __future__ import annotations

import asyncio
import inspect
import random
import time
from collections import defaultdict
from typing import Any

from vluna_llm import Vluna, call_context

from .figures import Figure, Profile, mean_of
from .servers import MODEL, World, world
from .streaming import MESSAGES, Colour, make_client

MODEL_MS = 50
GATE_SECONDS = 0.010


def first_token(profile: Profile, colour: Colour) -> list[Figure]:
    """The rows of one colour; the model answers after 50 ms, the gate after 10 ms."""
    with world() as around:
        around.gate.ask({"authorize_latency": GATE_SECONDS})
        with Vluna(**around.settings()) as strict, Vluna(**around.settings(authorize="overlap")) as overlap:
            return asyncio.run(_first_token(profile, colour, around, strict, overlap))


async def _first_token(profile: Profile, colour: Colour, around: World, strict: Vluna, overlap: Vluna) -> list[Figure]:
    dice = random.Random(12)
    bare = make_client(colour, around.base_url(chunks=20, first_ms=MODEL_MS))
    clients = {"bare": bare, "strict": strict.wrap(bare), "overlap": overlap.wrap(bare)}
    times: dict[str, list[float]] = defaultdict(list)
    for block in range(profile.blocks + 2):
        took: dict[str, float] = {}
        for kind in dice.sample(["bare", "strict", "overlap", "gate"], 4):
            if kind == "gate":
                took[kind] = await _authorize(colour, strict)
            else:
                took[kind] = await _until_first(clients[kind])
            for vluna in (strict, overlap):
                assert vluna.flush(10)
        if block >= 2:
            times["bare"].append(1e3 * took["bare"])
            times["gate"].append(1e3 * took["gate"])
            times["trips"].append((took["strict"] - took["bare"]) / took["gate"])
            times["overlap"].append(1e3 * (took["overlap"] - took["bare"]))
    group = f"first token, {colour}"
    return [
        mean_of(
            group,
            "strict adds",
            "round trips",
            times["trips"],
            budget=1.25,
            note="one, and a quarter for everything else",
        ),
        mean_of(
            group,
            "overlap adds",
            "ms",
            times["overlap"],
            budget=1.0,
            note=f"model {MODEL_MS} ms, gate {GATE_SECONDS * 1000:.0f} ms: a 50th of the wait counts as nothing",
        ),
        mean_of(group, "bare client", "ms", times["bare"]),
        mean_of(group, "one authorize", "ms", times["gate"]),
    ]


async def _authorize(colour: Colour, vluna: Vluna) -> float:
    ask: dict[str, Any] = {"principal_id": "customer_1", "feature_code": f"openai.{MODEL}", "estimated_quantity": 100}
    started = time.perf_counter()
    if colour == "async":
        await vluna.async_gate.authorize(**ask)
    else:
        vluna.gate.authorize(**ask)
    return time.perf_counter() - started


async def _until_first(client: Any) -> float:
    with call_context(principal_id="customer_1"):
        started = time.perf_counter()
        stream: Any = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        if inspect.isawaitable(stream):
            stream = await stream
            await stream.__anext__()
            took = time.perf_counter() - started
            async for _ in stream:
                pass
        else:
            next(stream)
            took = time.perf_counter() - started
            for _ in stream:
                pass
    return took
