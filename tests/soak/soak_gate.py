"""The embedded gate in a process of its own, with its bad habits on and its books on disk.

Started as ``python soak_gate.py FOLDER PORT KEY_ID KEY_SECRET SEED DIALECT``; may be killed and started again on the
same folder and port. Told on its standard input: ``habits_off``, ``books``, ``quit``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from soak_wire import obey, say
from soak_words import MODEL_FEATURE, PRICES, WORK_FEATURE

from vluna_llm.sandbox import Fault, FaultKind, Sandbox

LEASE_SECONDS = 1.0
GRACE_SECONDS = 0.5
"""Short, so that settlements come in time, within the grace and beyond it: all three are habits of a real gate."""

CREDIT = 10**15
POOR = "poor"

_HABITS: tuple[tuple[FaultKind, str | None, float], ...] = (
    ("error_before", "authorize", 2),
    ("error_before", "commits", 5),
    ("error_before", "ingest", 3),
    ("error_after", "authorize", 2),
    ("error_after", "commits", 5),
    ("error_after", "ingest", 3),
    ("error_after", "cancel", 1),
    ("drop_after", "commits", 2),
    ("drop_before", "commits", 1),
    ("garbage", "commits", 0.5),
    ("garbage", "ingest", 0.5),
    ("garbage", "authorize", 0.5),
    ("rate_limited", "authorize", 1),
    ("latency", None, 3),
    ("status", "meters", 1),
)
"""What goes wrong inside the gate, where, and how often beside the others."""


def config(folder: Path, key_id: str, secret: str, dialect: str) -> dict[str, Any]:
    """The gate's configuration: two features with prices, nothing springs up by itself, everybody is rich but one."""
    tokens = [meter for meter in PRICES if meter.startswith(f"{MODEL_FEATURE}.")]
    return {
        "dialect": dialect,
        "realm_id": "realm-soak",
        "key_id": key_id,
        "key_secret": secret,
        "state": str(folder / "gate.sqlite3"),
        "auto_registry": False,
        "first_call_fails": True,
        "lease_ttl_seconds": LEASE_SECONDS,
        "grace_ms": round(GRACE_SECONDS * 1000),
        "defaults": {"credit_xusd": CREDIT},
        "features": {MODEL_FEATURE: {"meters": tokens}, WORK_FEATURE: {"meters": []}},
        "prices": {meter: {"unit_price_xusd": price} for meter, price in PRICES.items()},
        "credit": {POOR: 0},
    }


class Habits:
    """Lets something go wrong in the gate every so often."""

    def __init__(self, gate: Sandbox, seed: int, every: float = 0.08) -> None:
        self._gate, self._random, self._every = gate, random.Random(seed), every
        self._on = threading.Event()
        self._on.set()
        self._made: list[Fault] = []
        self._counts: Counter[str] = Counter()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        kinds, weights = [habit[:2] for habit in _HABITS], [habit[2] for habit in _HABITS]
        while self._on.wait():
            time.sleep(self._random.expovariate(1 / self._every))
            kind, route = self._random.choices(kinds, weights)[0]
            if self._on.is_set() and len(self._made) < 5:
                seconds = self._random.uniform(0.2, 1.5)
                self._made.append(self._gate.faults.add(kind, route, seconds=seconds, body="<html>Bad day</html>"))
            self._tally()

    def _tally(self) -> None:
        for fault in [fault for fault in self._made if fault.hits]:
            self._counts[f"gate {fault.kind}"] += 1
            self._made.remove(fault)

    def counts(self) -> dict[str, int]:
        return dict(self._counts)

    def off(self) -> None:
        self._on.clear()
        time.sleep(0.2)
        self._tally()
        self._gate.faults.clear()


def books(gate: Sandbox, path: Path) -> None:
    """Write what was rated, one JSON object a line."""
    with open(path, "w") as file:
        for entry in gate.booked().entries:
            record = {
                "kind": entry.kind,
                "commit_id": entry.commit_id,
                "principal": entry.principal_id,
                "feature": entry.feature,
                "quantity": entry.quantity,
                "lines": dict(entry.lines),
                "status": entry.status,
                "reasons": list(entry.reason_codes),
                "charged": entry.charged_xusd,
                "labels": dict(entry.labels),
                "key": entry.idempotency_key,
            }
            file.write(json.dumps(record) + "\n")


def main() -> None:
    folder, port, key_id, secret, seed = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5])
    done = threading.Event()
    with Sandbox(config(folder, key_id, secret, sys.argv[6]), port=port) as gate:
        habits = Habits(gate, seed)

        def command(message: dict[str, Any]) -> None:
            if message["do"] == "habits_off":
                habits.off()
                say({"habits": habits.counts(), "said": "habits_off"})
            elif message["do"] == "books":
                books(gate, folder / "books.jsonl")
                say({"said": "books"})
            else:
                done.set()

        obey(command)
        say({"said": "ready", "base_url": gate.base_url, "realm_id": gate.realm_id, "pid": os.getpid()})
        while not done.wait(0.5):
            say({"habits": habits.counts(), "said": "stats"})


if __name__ == "__main__":
    main()
