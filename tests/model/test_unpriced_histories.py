"""Seeded histories in which prices go away while ingests are on their way, and processes die: all is charged once."""

from __future__ import annotations

import logging
import random
from collections import Counter
from typing import Any

import pytest
from model_world import World, complete

from vluna_llm.ending import Ending
from vluna_llm.usage.meters import MeterLine

FEATURE = "openai.gpt-a"
METERS = tuple(f"{FEATURE}.tokens.{part}" for part in ("input", "cached", "output"))
SEEN: Counter[str] = Counter()


def story(world: World, kind: str, chance: random.Random) -> None:
    gate = world.gate.sandbox
    processes = [world.start() for _ in range(2)]
    for meter in (FEATURE, *METERS):
        gate.price(meter, 3)
    if kind.endswith("job"):
        # The lease of all its runs is cancelled: their commits charge nothing, and are repaired by ingest.
        world.end(world.begin(processes[0], "ann", "gpt-a", 70, job="job-1", crash_at=None), Ending("closed"), None)
        processes[0].act(lambda: processes[0].deliver(3))
    else:
        world.network.outage = "refused_connection"  # they run without a lease
    calls = []
    for number, process in enumerate(processes):
        job = "job-1" if kind.endswith("job") else None
        calls.append(world.begin(process, "ann", "gpt-a", 70 + number, job=job, crash_at=None))
    if kind == "background":
        world.park(calls[0])
        for process in processes:
            world.retrieve(process, calls[0])
    else:
        for number, call in enumerate(calls):
            named = [MeterLine(METERS[0], 40), MeterLine(METERS[2], 30 + number)] if "named" in kind else []
            world.end(call, complete(70 + number), 70 + number, meters=tuple(named))
    world.network.outage = None

    armed, before = [False], world.network.before

    def sending(process: str, wire: Any) -> None:
        if armed[0] and wire.target.endswith("/ingest"):
            for meter in METERS:
                if chance.random() < 0.5:
                    gate.unprice(meter)
        before(process, wire)

    world.network.before = sending
    for _ in range(chance.randrange(4, 12)):
        if chance.random() < 0.5:
            for meter in METERS:
                gate.price(meter, 3)
        if chance.random() < 0.2:
            world.gate.restart()
        alive = world.alive()
        process = chance.choice(alive) if alive else world.start()
        armed[0] = chance.random() < 0.7
        if chance.random() < 0.2:
            world.network.fates.append(chance.choice(("answer_lost", "twice", "garbage_after", "error_after")))
        crash_at = chance.randrange(1, 40) if chance.random() < 0.4 else None
        process.act(process.adopt)
        process.act(lambda process=process: process.deliver(3), crash_at)  # type: ignore[misc]
        world.check()
        world.pass_time(chance.choice((1.0, 61.0, 301.0)))
    armed[0] = False
    world.drain()
    world.balance()
    world.tell(SEEN)


@pytest.mark.parametrize("kind", ["one", "job", "background", "named", "named job"])
def test_what_is_booked_as_0_on_the_way_is_charged_once_in_the_end(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "vluna_llm")
    SEEN.clear()
    for number in range(40):
        with World() as world:
            story(world, kind, random.Random(f"{kind} {number}"))
    assert SEEN["ingest booked in part as 0"] > 10, "the histories come to what they are about"
    assert SEEN["ingest booked wholly as 0"] > 3
