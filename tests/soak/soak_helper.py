"""A process of the soak as the one that started it holds it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_START_SECONDS = 30.0
_FOREIGN = ("VLUNA_", "OPENAI_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
"""Variables that would make a run something else than it says."""


class Helper:
    """A process of ours that takes orders on its standard input and says things on its standard output."""

    def __init__(self, script: str, *args: str, heard: deque[tuple[Helper, dict[str, Any]]], errors: Path) -> None:
        self._heard = heard
        self._ready = threading.Event()
        self.greeting: dict[str, Any] = {}
        self._errors = open(errors, "ab")  # noqa: SIM115 - it belongs to the child
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={name: value for name, value in os.environ.items() if not name.upper().startswith(_FOREIGN)},
        )
        self._answers: dict[str, threading.Event] = {}
        self.last: dict[str, dict[str, Any]] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            said = message["said"]
            self.last[said] = message
            if said == "ready":
                self.greeting = message
                self._ready.set()
            self._answers.setdefault(said, threading.Event()).set()
            self._heard.append((self, message))

    def wait_ready(self) -> dict[str, Any]:
        if not self._ready.wait(_START_SECONDS):
            raise RuntimeError(f"{self.process.args} did not start; see its errors beside the logs")
        return self.greeting

    def tell(self, do: str, **more: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass

    def ask(self, do: str, said: str, timeout: float = 120.0) -> dict[str, Any]:
        event = self._answers.setdefault(said, threading.Event())
        event.clear()
        self.tell(do)
        if not event.wait(timeout):
            raise RuntimeError(f"{self.process.args} did not answer to {do!r}")
        return self.last[said]

    def end(self, number: int = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait()
        self._reader.join(5)
        self._errors.close()
