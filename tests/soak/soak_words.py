"""What the parts of the soak agree on: the catalogue, the records in the logs, and how they are written and read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MODEL = "soak-1"
MODEL_FEATURE = f"openai.{MODEL}"
WORK_FEATURE = "tools.search"
PRICES: Mapping[str, int] = {
    MODEL_FEATURE: 5,
    f"{MODEL_FEATURE}.tokens.input": 3,
    f"{MODEL_FEATURE}.tokens.cached": 1,
    f"{MODEL_FEATURE}.tokens.output": 12,
    WORK_FEATURE: 2_500,
}
"""XUSD per unit, of every meter that the gate sells."""

Kind = Literal["answer", "early", "held", "cut", "silent", "work"]
"""What a caller is about to do.

* ``answer``: read an answer to its end; ``silent``: the same, and the provider reports no usage.
* ``early``: leave a stream that the provider sends to its end.
* ``held``: leave a stream whose end the provider never sends.
* ``cut``: the provider breaks off.
* ``work``: ``vluna.operation`` with a quantity.
"""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A usage as it is billed: ``input`` holds ``cached``."""

    input: int
    cached: int
    output: int

    @property
    def total(self) -> int:
        return self.input + self.output

    @property
    def lines(self) -> dict[str, int]:
        """What a commit of it has to say."""
        split = {"input": self.input - self.cached, "cached": self.cached, "output": self.output}
        return {f"{MODEL_FEATURE}.tokens.{name}": count for name, count in split.items() if count}


class Log:
    """An append-only file of JSON records, one write each, that several processes may share.

    Each record is written behind a line feed of its own, so that a record that a crash tore spoils no other.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)

    def write(self, record: Mapping[str, Any], *, sync: bool = False) -> None:
        """Append a record; with ``sync`` it is on the disk before this returns."""
        os.write(self._fd, b"\n" + json.dumps(record, separators=(",", ":")).encode())
        if sync:
            os.fdatasync(self._fd)

    def sync(self) -> None:
        """Everything written so far is on the disk when this returns."""
        os.fdatasync(self._fd)


def records(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """The records of a log from this offset on; a torn one is left out."""
    with open(path, "rb") as file:
        file.seek(start)
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


@dataclass(frozen=True, slots=True)
class Setup:
    """What every process of one soak is told, by way of a file in the run's folder."""

    folder: str
    seed: int
    base_url: str
    realm_id: str
    key_id: str
    key_secret: str
    provider_url: str
    concurrency: int
    customers: int
    think: float
    sabotage: str = ""

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def outbox(self) -> Path:
        return self.path / "outbox"

    def save(self) -> None:
        (self.path / "setup.json").write_text(json.dumps({name: getattr(self, name) for name in self.__slots__}))

    @classmethod
    def load(cls, folder: str | Path) -> Setup:
        return cls(**json.loads((Path(folder) / "setup.json").read_text()))
