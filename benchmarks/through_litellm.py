"""What `VlunaCallback` adds to calls through LiteLLM, against the same calls with an empty ``CustomLogger``.

All sides take turns in one process, block by block. After each call LiteLLM's logging and our settler are waited for:
what is measured is a call, not a fight of threads for one lock.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from vluna_llm import Vluna, call_context
from vluna_llm.context import Scope

from .figures import Figure, Profile, mean_of
from .local import AtHand
from .servers import MODEL, World, world

Colour = Literal["sync", "async"]
Side = Literal["empty", "off", "metered", "at hand"]
SIDES: tuple[Side, ...] = ("empty", "off", "metered", "at hand")
"""An empty callback; ours with ``mode="off"``; ours; ours with a gate client that answers without a round trip."""

SENTENCE = "The customer wrote that the parcel arrived late and asked for a refund of the fee. "
MESSAGES = [{"role": "system", "content": SENTENCE * 12}, {"role": "user", "content": SENTENCE * 37}]
SHORT, LONG = 20, 220
_LISTS = (
    "callbacks",
    "input_callback",
    "success_callback",
    "failure_callback",
    "_async_success_callback",
    "_async_failure_callback",
    "_async_input_callback",
    "service_callback",
)


@dataclass
class Spent:
    """CPU of some calls, in seconds each: of the caller's thread, of the process, of that thread with logging."""

    caller: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)


class Tells:
    """A callback that says when LiteLLM has logged a call."""

    logged: threading.Event
    logged_async: asyncio.Event

    def log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        self.logged.set()

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        await super().async_log_success_event(kwargs, response_obj, start_time, end_time)  # type: ignore[misc]
        self.logged_async.set()


class Stand:
    """LiteLLM with one of the callbacks at a time."""

    def __init__(self, around: World) -> None:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # LiteLLM otherwise asks the network for its price list
        import litellm
        from litellm.integrations.custom_logger import CustomLogger

        from vluna_llm.integrations import litellm as integration

        class Empty(Tells, CustomLogger):  # type: ignore[misc]
            pass

        class Metered(Tells, integration.VlunaCallback):  # type: ignore[misc]
            pass

        self.litellm, self._integration, self._around = litellm, integration, around
        self.loop = asyncio.new_event_loop()
        Tells.logged, Tells.logged_async = self.logged, self.logged_async = threading.Event(), asyncio.Event()
        self.vlunas: dict[Side, Vluna] = {side: Vluna(**around.settings()) for side in SIDES if side != "empty"}
        self._callbacks: dict[Side, Any] = {side: Metered(vluna) for side, vluna in self.vlunas.items()}
        self._callbacks["empty"] = Empty()
        self.at_hand = AtHand(self.vlunas["at hand"].gate)
        self.vlunas["off"].mode = "off"

    @contextmanager
    def using(self, side: Side) -> Iterator[None]:
        self._integration.uninstall()
        for name in _LISTS:
            if isinstance(found := getattr(self.litellm, name, None), list):
                found.clear()
        self.litellm.callbacks = [self._callbacks[side]]
        if side != "empty":
            self._integration.install(self.vlunas[side])
        yield

    def close(self) -> None:
        self.loop.close()
        for vluna in self.vlunas.values():
            assert vluna.close(30)

    def arguments(self, chunks: int, **more: Any) -> dict[str, Any]:
        base = self._around.base_url(chunks=chunks)
        return {"model": f"openai/{MODEL}", "api_base": base, "api_key": "sk-bench", "messages": MESSAGES, **more}

    def block(self, side: Side, colour: Colour, turns: Sequence[tuple[Spent, dict[str, Any]]]) -> None:
        """Make these calls one after another."""
        if colour == "sync":
            for spent, arguments in turns:
                self._call(side, spent, arguments)
        else:
            self.loop.run_until_complete(self._acalls(side, turns))

    def _call(self, side: Side, spent: Spent, arguments: dict[str, Any]) -> None:
        self.logged.clear()
        thread, process = time.thread_time(), time.process_time()
        with call_context(principal_id="customer_1") as scope:
            answer = self.litellm.completion(**arguments)
            if "stream" in arguments:
                for _ in answer:
                    pass
        spent.caller.append(time.thread_time() - thread)
        assert self.logged.wait(30), "LiteLLM did not log the call"
        self._delivered(side, spent, thread, process, scope)

    async def _acalls(self, side: Side, turns: Sequence[tuple[Spent, dict[str, Any]]]) -> None:
        if side == "at hand":
            self.vlunas[side].async_gate.authorize = self.at_hand.aauthorize  # type: ignore[method-assign]
        for spent, arguments in turns:
            self.logged_async.clear()
            thread, process = time.thread_time(), time.process_time()
            with call_context(principal_id="customer_1") as scope:
                answer = await self.litellm.acompletion(**arguments)
                if "stream" in arguments:
                    async for _ in answer:
                        pass
            spent.caller.append(time.thread_time() - thread)
            await asyncio.wait_for(self.logged_async.wait(), 30)
            self._delivered(side, spent, thread, process, scope)

    def _delivered(self, side: Side, spent: Spent, thread: float, process: float, scope: Scope) -> None:
        meters = side in ("metered", "at hand")
        if meters:
            assert self.vlunas[side].flush(30)
        spent.process.append(time.process_time() - process)
        spent.loop.append(time.thread_time() - thread)
        states = [receipt.state for receipt in scope.receipts]
        assert states == (["booked"] if meters else []), f"{side}: {scope.receipts}"


def calls(profile: Profile) -> list[Figure]:
    """What is added to a call that is no stream."""
    with world() as around:
        return _calls(profile, around)


def _calls(profile: Profile, around: World) -> list[Figure]:
    stand, dice = Stand(around), random.Random(11)
    colours: tuple[Colour, ...] = ("sync", "async")
    arguments, many = stand.arguments(SHORT), profile.some(16)
    series: dict[tuple[Side, Colour], list[Spent]] = defaultdict(list)
    turns = [(side, colour) for side in SIDES for colour in colours]
    for block in range(profile.blocks + 2):
        dice.shuffle(turns)
        for side, colour in turns:
            with stand.using(side):
                spent = Spent()
                stand.block(side, colour, [(Spent(), arguments), *[(spent, arguments)] * many])
            if block >= 2:
                series[side, colour].append(spent)
        if block == 1:
            gc.collect()
            gc.freeze()
    stand.close()
    figures = []
    for colour in colours:
        group = f"LiteLLM, {'completion' if colour == 'sync' else 'acompletion'}"
        bare = series["empty", colour]

        def row(name: str, side: Side, what: str, budget: float | None = None, *, note: str = "") -> None:
            added = [
                1e6 * (_mean(getattr(with_it, what)) - _mean(getattr(without, what)))
                for with_it, without in zip(series[side, colour], bare, strict=True)  # noqa: B023
            ]
            figures.append(_row(group, name, added, budget, note))  # noqa: B023

        row("caller's CPU, local work", "at hand", "caller", 100.0, note="no round trip")
        row("caller's CPU", "metered", "caller", note="with the authorize round trip")
        if colour == "async":
            row("loop's CPU", "metered", "loop", note="with LiteLLM's logging task")
        row("process's CPU", "metered", "process", note="with logging, commit and flush")
        row("process's CPU, no round trips", "at hand", "process")
        row('caller\'s CPU, mode="off"', "off", "caller")
        figures.append(_row(group, "LiteLLM, caller's CPU", [1e6 * _mean(s.caller) for s in bare], note="empty logger"))
        figures.append(_row(group, "LiteLLM, process's CPU", [1e6 * _mean(s.process) for s in bare]))
    return figures


def chunks(profile: Profile, colour: Colour) -> list[Figure]:
    """What is added to each chunk of a stream, as the slope between short and long ones."""
    with world() as around:
        return _chunks(profile, around, colour)


def _chunks(profile: Profile, around: World, colour: Colour) -> list[Figure]:
    stand, dice = Stand(around), random.Random(13)
    sides: tuple[Side, ...] = ("empty", "metered")
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    arguments = {size: stand.arguments(size, **asked) for size in (SHORT, LONG)}
    many = profile.some(4)
    series: dict[tuple[Side, str], list[float]] = defaultdict(list)
    for block in range(profile.blocks + 2):
        spent = {(side, size): Spent() for side in sides for size in arguments}
        turns = [side for side in sides for _ in range(2)]
        dice.shuffle(turns)
        for side in turns:
            with stand.using(side):
                order = [(spent[side, size], arguments[size]) for size in arguments for _ in range(many // 2)]
                dice.shuffle(order)
                stand.block(side, colour, [(Spent(), arguments[SHORT]), *order])
        if block >= 2:
            for side in sides:
                for what in ("caller", "process"):
                    rise = _mean(getattr(spent[side, LONG], what)) - _mean(getattr(spent[side, SHORT], what))
                    series[side, what].append(1e6 * rise / (LONG - SHORT))
        elif block == 1:
            gc.collect()
            gc.freeze()
    stand.close()
    group = f"LiteLLM, stream, {colour}"

    def added(what: str) -> list[float]:
        return [x - y for x, y in zip(series["metered", what], series["empty", what], strict=True)]

    return [
        _row(group, "caller's CPU added per chunk", added("caller"), 1.0, f"slope between {SHORT} and {LONG}"),
        _row(group, "process's CPU added per chunk", added("process"), note="LiteLLM logs every chunk"),
        _row(group, "LiteLLM, caller's CPU per chunk", series["empty", "caller"], note="empty logger"),
        _row(group, "LiteLLM, process's CPU per chunk", series["empty", "process"]),
    ]


def _row(group: str, name: str, samples: list[float], budget: float | None = None, note: str = "") -> Figure:
    said = f"median {statistics.median(samples):,.1f}"
    return mean_of(group, name, "µs", samples, budget=budget, note=f"{said}; {note}" if note else said)


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)
