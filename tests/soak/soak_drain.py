"""The last process of a soak: it takes over what the dead ones left, and delivers all of it.

``python soak_drain.py FOLDER SECONDS`` makes one call, as any process that starts does, and waits until no journal
holds anything that still has to be delivered.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from soak_wire import say
from soak_words import Setup
from soak_worker import Call, Order, Worker, make_kit

SLOT = 999
_STATES = (
    "SELECT CASE WHEN settlement = 'none' AND admission = 'denied' THEN 'denied' ELSE settlement END AS state, "
    "count(*) FROM operations GROUP BY state"
)
_ABOUT = ("operation_id", "request_id", "principal_id", "created_at")
_LOST = f"SELECT {', '.join(_ABOUT)} FROM operations WHERE settlement = 'lost'"
_WAITING = "SELECT route, attempts, last_error FROM operations WHERE settlement IN ('pending', 'sent') LIMIT 5"


def journals(outbox: Path) -> tuple[Counter[str], list[dict[str, Any]]]:
    """How many operations are in each state over all journals, and those that are lost: read only, from outside."""
    states: Counter[str] = Counter()
    lost: list[dict[str, Any]] = []
    for path in outbox.glob("journal-*.sqlite3"):
        try:
            with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=5)) as db:
                states.update(dict(db.execute(_STATES)))
                lost += [dict(zip(_ABOUT, row, strict=True)) for row in db.execute(_LOST)]
        except sqlite3.Error as error:
            if path.exists():
                states[f"unreadable ({error})"] += 1
    return states, lost


def last_ones(outbox: Path) -> list[str]:
    """Of what is still to be delivered: how often it was tried, and what it met."""
    found: list[str] = []
    for path in outbox.glob("journal-*.sqlite3"):
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db,
        ):
            found += [f"{route} after {tries} attempts: {error}" for route, tries, error in db.execute(_WAITING)]
    return found


def main() -> None:
    setup, seconds = Setup.load(sys.argv[1]), float(sys.argv[2])
    kit = make_kit(setup, "default")
    worker = Worker(setup, Order(SLOT, 1, 1, 0), kit)
    started = time.monotonic()
    worker.make(Call(worker.request_id(), "customer-0", "answer"))
    calm = 0
    last: list[str] = []
    while time.monotonic() - started < seconds:
        delivered = kit.vluna.flush(2.0)
        states, _ = journals(setup.outbox)
        waiting = sum(states[name] for name in ("pending", "sent", "none"))
        calm = calm + 1 if delivered and waiting == 0 else 0
        if calm >= 2:
            break
        last = last_ones(setup.outbox) or last
        say({"said": "draining", "left": waiting})
        time.sleep(0.2)
    took = time.monotonic() - started
    kit.vluna.close(5.0)
    states, lost = journals(setup.outbox)
    say({"said": "drained", "seconds": took, "states": dict(states), "lost": lost, "last": last})


if __name__ == "__main__":
    main()
