"""Whether memory stays flat: what each operation leaves behind after it was settled."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vluna_llm import Vluna, call_context

from .figures import Figure, Profile, mean_of
from .servers import world
from .streaming import consume, make_client

WARM_UP, OPERATIONS = 3_000, 3_000


def resident() -> int | None:
    """Bytes of memory of this process; None where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def memory(profile: Profile) -> list[Figure]:
    """Growth per operation of the Python heap and of the process, over 3,000 settled streams after a warm-up
    (which fills, among others, the 2 MB that SQLite keeps of its file)."""
    with world() as around, Vluna(**around.settings()) as vluna:
        client = vluna.wrap(make_client("sync", around.base_url(chunks=5)))
        blocks = profile.blocks
        each = max(2, profile.some(OPERATIONS) // blocks)

        def some(count: int) -> None:
            asyncio.run(_some(client, count))
            assert vluna.flush(30)

        some(profile.some(WARM_UP))
        group, figures = "memory", []
        if resident() is not None:
            grown = _growth(some, blocks, each, lambda: resident() or 0)
            figures.append(
                mean_of(group, "resident memory kept per operation", "B", grown, budget=256.0, note="pages, after GC")
            )
        tracemalloc.start()
        some(3 * each)
        grown = _growth(some, blocks, each, lambda: tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        figures.append(mean_of(group, "Python objects kept per operation", "B", grown, budget=32.0, note="after GC"))
        return figures


async def _some(client: Any, count: int) -> None:
    for number in range(count):
        with call_context(principal_id=f"customer_{number % 4}"):
            await consume(client)


def _growth(some: Callable[[int], None], blocks: int, each: int, now: Callable[[], int]) -> list[float]:
    gc.collect()
    marks = [now()]
    for _ in range(blocks):
        some(each)
        gc.collect()
        marks.append(now())
    return [(after - before) / each for before, after in itertools.pairwise(marks)]
