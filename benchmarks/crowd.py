"""A thousand streams at once, and the event loop while a backlog drains."""

from __future__ import annotations

import asyncio
import importlib
import logging
import random
import threading
import time
from typing import Any

import openai

from vluna_llm import Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.lifecycle import ModelCall
from vluna_llm.outbox import Row
from vluna_llm.usage.types import TokenUsage

from .figures import Figure, Profile, mean_of, percentile
from .memory import resident
from .servers import MODEL, OUTPUT_TOKENS, PROMPT_TOKENS, world
from .streaming import consume, make_client

STREAMS, CHUNKS = 1_000, 40
BACKLOG, CUSTOMERS = 2_000, 100
TICK, RUNS = 0.002, 6


# -- a thousand streams ------------------------------------------------------------------------------------------------


def crowd_side(profile: Profile, kind: str) -> dict[str, float]:
    """One side, in a process of its own so that its memory is its own: ``bare`` or ``metered``."""
    count = profile.some(STREAMS)
    logging.getLogger("vluna_llm").setLevel(logging.ERROR)  # who was not answered in time is counted instead
    with world() as around, Vluna(**around.settings()) as vluna:
        before = resident() or 0
        base_url = around.base_url(chunks=CHUNKS, between_ms=20 if profile.quick else 100)
        figures = asyncio.run(_crowd(kind, count, base_url, vluna))
        figures["resident"] = (resident() or 0) - before
        if kind == "metered":
            started = time.perf_counter()
            assert vluna.flush(60)
            figures["flush"] = time.perf_counter() - started
            booked = around.gate.ask({"booked": "crowd_"})
            total = count * (PROMPT_TOKENS + OUTPUT_TOKENS)
            figures["lost"] = count - booked["applied"]
            figures["tokens off"] = abs(total - booked["quantity"]) + booked["quarantined"]
            figures["by ingest"] = booked["by_ingest"]
        return figures


async def _crowd(kind: str, count: int, base_url: str, vluna: Vluna) -> dict[str, float]:
    # httpx or httpx2, whichever this SDK is built on: its default pool has fewer connections than we have streams.
    library: Any = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])
    limits = library.Limits(max_connections=None, max_keepalive_connections=None)
    client = make_client("async", base_url, http_client=library.AsyncClient(limits=limits, timeout=60))
    used = vluna.wrap(client) if kind == "metered" else client

    async def one(number: int) -> None:
        with call_context(principal_id=f"crowd_{number % CUSTOMERS}"):
            assert await consume(used) == CHUNKS

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*map(one, range(count)))
    figures = {"wall": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    await client.close()
    if kind == "metered":
        await vluna.async_gate.aclose()
    return figures


def crowd_figures(profile: Profile, bare: dict[str, float], metered: dict[str, float]) -> list[Figure]:
    """Both sides compared."""
    count = profile.some(STREAMS)
    group = f"{count:,} streams at once"
    return [
        Figure(
            group,
            "settlements lost or doubled",
            "",
            abs(metered["lost"]),
            budget=0,
            exact=True,
            note="gate's own books",
        ),
        Figure(group, "tokens that the gate's books are off", "", metered["tokens off"], budget=0, exact=True),
        Figure(group, "booked by ingest (authorize too slow)", "", metered["by ingest"]),
        Figure(group, "time, bare", "s", bare["wall"]),
        Figure(group, "time, metered", "s", metered["wall"], note="all authorized at the same moment"),
        Figure(group, "settled after the last stream in", "s", metered["flush"]),
        Figure(group, "CPU, bare", "s", bare["cpu"]),
        Figure(group, "CPU, metered", "s", metered["cpu"]),
        Figure(group, "memory, bare", "MB", bare["resident"] / 1e6),
        Figure(group, "memory, metered", "MB", metered["resident"] / 1e6),
    ]


# -- the loop while a backlog drains -----------------------------------------------------------------------------------


def loop_lag(profile: Profile) -> list[Figure]:
    """How late an idle event loop wakes up, with and without a backlog of 2,000 settlements draining beside it."""
    with world() as around, Vluna(**around.settings()) as vluna:
        runs, windows = (1, 3) if profile.quick else (RUNS, 6)
        idle: list[float] = []
        draining: list[float] = []
        seconds = 0.0
        for _ in range(runs):
            rows = _backlog(vluna, profile.some(BACKLOG))
            lags, took = asyncio.run(_while_draining(vluna, rows))
            seconds += took
            quiet = asyncio.run(_while_idle(max(took, 0.3)))
            draining += _windows(lags, windows)
            idle += _windows(quiet, windows)
        random.Random(13).shuffle(idle)
        group = "event loop"
        return [
            mean_of(
                group,
                "p99 lag added while a backlog drains",
                "ms",
                [after - before for before, after in zip(idle, draining, strict=True)],
                budget=2.0,
                note=f"{profile.some(BACKLOG):,} settlements of {CUSTOMERS} customers",
            ),
            mean_of(group, "p99 lag, idle", "ms", idle),
            mean_of(group, "p99 lag, draining", "ms", draining),
            Figure(group, "settlements a second", "1/s", runs * profile.some(BACKLOG) / seconds),
        ]


def _windows(lags: list[float], count: int) -> list[float]:
    size = len(lags) // count
    return [1e3 * percentile(lags[n * size : (n + 1) * size], 0.99) for n in range(count)]


def _backlog(vluna: Vluna, count: int) -> list[Row]:
    """Leased and finished operations whose delivery has not begun."""
    settler = vluna._running().settler
    held: list[Row] = []
    settler.enqueue = lambda row, *, due=0.0: held.append(row)  # type: ignore[method-assign]
    try:
        call = ModelCall("chat.completions", "openai", MODEL, {"messages": []}, True)
        usage = TokenUsage(input_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS)
        for number in range(count):
            with call_context(principal_id=f"backlog_{number % CUSTOMERS}"):
                operation = vluna.begin(call)
            assert operation is not None
            operation.finish(Ending("complete", usage, finished=True))
    finally:
        del settler.enqueue
    assert len(held) == count
    return held


async def _while_draining(vluna: Vluna, rows: list[Row]) -> tuple[list[float], float]:
    settler = vluna._running().settler
    lags: list[float] = []

    def feed() -> None:
        for row in rows:
            settler.enqueue(row)

    started = time.perf_counter()
    threading.Thread(target=feed).start()
    while True:
        lags += await _probe(5)
        if not settler.outstanding:
            break
    took = time.perf_counter() - started
    assert await vluna.aflush(30)
    return lags, took


async def _while_idle(seconds: float) -> list[float]:
    until, lags = time.perf_counter() + seconds, []
    while time.perf_counter() < until:
        lags += await _probe(5)
    return lags


async def _probe(times: int) -> list[float]:
    lags = []
    for _ in range(times):
        started = time.perf_counter()
        await asyncio.sleep(TICK)
        lags.append(time.perf_counter() - started - TICK)
    return lags
