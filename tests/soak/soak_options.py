"""What a run of the soak is told, and what it came to."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from soak_oracle import Verdict


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is like."""

    minutes: float = 10.0
    seed: int = 1
    workers: int = 6
    concurrency: int = 4
    kills_per_minute: float = 300.0
    cold_starts: int = 100
    fault_rate: float = 0.12
    customers: int = 150
    think: float = 0.05
    pauses_per_minute: float = 6.0
    gate_restarts_per_minute: float = 1.0
    drain_seconds: float = 420.0
    dialect: str = "lease_token"
    sabotage: str = ""
    keep: Path | None = None


@dataclass(slots=True)
class Result:
    """What a run came to."""

    options: Options
    verdict: Verdict
    seconds: float
    kills: int
    ends: int
    cold_starts: int
    pauses: int
    gate_restarts: int
    faults: dict[str, int]
    drained_in: float | None
    drained_last: list[str]
    states: dict[str, int]
    folder: Path
    trouble: list[str]

    @property
    def holds(self) -> bool:
        return self.verdict.holds and not self.trouble


def tidy(result: Result) -> None:
    """Remove the folder of a run that kept all promises, unless it was asked for."""
    if result.holds and result.options.keep is None:
        shutil.rmtree(result.folder, ignore_errors=True)
