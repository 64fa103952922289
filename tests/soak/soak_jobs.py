"""The at-least-once queue that the workers' jobs come from."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path
from typing import Any

from soak_words import records

_MOST_RUNS = 6
_REDELIVERED = 0.15
_TWICE = 0.1


class Jobs:
    """Gives out again what a dead worker had not done, a part of what it had, and some of it to two workers at once.

    Args:
        folder: where the callers' logs are.
        chance: what decides.
    """

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self._folder, self._chance = folder, chance
        self._queue: deque[dict[str, Any]] = deque()
        self._read_to: dict[int, int] = {}

    def take(self, most: int) -> list[dict[str, Any]]:
        """Jobs for a worker that starts."""
        return [self._queue.popleft() for _ in range(min(most, len(self._queue)))]

    def collect(self, slot: int, given: list[dict[str, Any]]) -> None:
        """A worker ended: look up in its log what it began and what it did."""
        path = self._folder / f"caller-{slot}.jsonl"
        begun = {job["job"]: job for job in given}
        done: set[str] = set()
        if path.exists():
            for record in records(path, self._read_to.get(slot, 0)):
                if record["e"] == "job":
                    begun[record["job"]] = {name: record[name] for name in ("job", "principal", "runs")}
                    if record["s"] == "done":
                        done.add(record["job"])
            self._read_to[slot] = path.stat().st_size
        for name, job in begun.items():
            again = {**job, "runs": job["runs"] + 1}
            if again["runs"] > _MOST_RUNS or (name in done and self._chance.random() > _REDELIVERED):
                continue
            self._queue.append(again)
            if self._chance.random() < _TWICE:
                self._queue.append(again)
