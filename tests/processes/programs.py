"""Programs that run on their own against the embedded gate, and what the gate says in the end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.sandbox import Sandbox

TESTS = Path(__file__).resolve().parents[1]

PRELUDE = """
import asyncio, os, signal, sys, threading, time
from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.lifecycle import ModelCall

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True)

def begin(vluna, principal="ann"):
    with call_context(principal_id=principal):
        return vluna.begin(CALL)

def call(vluna, principal="ann"):
    begin(vluna, principal).finish(USED)
    return os.getpid()

def say(*words):
    print(*words, flush=True)

def left():
    return sorted(os.listdir(os.environ["VLUNA_LLM_OUTBOX"]))
"""


starts_threads_at_the_end = pytest.mark.skipif(
    (3, 12, 0) <= sys.version_info[:3] <= (3, 12, 1),
    reason="Python 3.12.0 and 3.12.1 start no thread once the main one has ended: what is left waits on disk",
)


class Ended(Protocol):
    """How a program ended."""

    returncode: int
    stdout: str
    stderr: str


class Program:
    """A program in a file of its own, started against the gate with one outbox; everything it starts dies with it."""

    def __init__(self, gate: Sandbox, outbox: Path, directory: Path) -> None:
        self.outbox = outbox
        self.directory = directory
        self._running: list[subprocess.Popen[str]] = []
        self._gate = gate

    def start(self, source: str, *arguments: str, python: str = sys.executable, **environment: str) -> Any:
        """Start it, and go on."""
        path = self.directory / f"program_{len(self._running)}.py"
        path.write_text(PRELUDE + textwrap.dedent(source), encoding="utf-8")
        running = subprocess.Popen(
            [python, str(path), *arguments],
            cwd=self.directory,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._running.append(running)
        return running

    def run(self, source: str, *arguments: str, timeout: float = 60, **environment: str) -> Ended:
        """Run it to its end."""
        running = self.start(source, *arguments, **environment)
        return self.ended(running, timeout)

    def ended(self, running: subprocess.Popen[str], timeout: float = 60) -> Ended:
        """Wait for its end."""
        out, err = running.communicate(timeout=timeout)
        return subprocess.CompletedProcess(running.args, running.returncode, out, err)

    def environment(self, **more: str) -> dict[str, str]:
        """What it finds in its environment."""
        return {
            **self._gate.env(),
            "VLUNA_LLM_OUTBOX": str(self.outbox),
            "PATH": os.environ.get("PATH", ""),
            # From Python 3.12 on every fork of a process with threads is warned of, whatever they do.
            "PYTHONWARNINGS": "ignore:This process:DeprecationWarning",
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path]),
            **more,
        }

    def kill(self) -> None:
        """End everything that was started, and what that started."""
        for running in self._running:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(running.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.communicate(timeout=5)


CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True)


def begin(vluna: Vluna, principal: str = "ann") -> Operation:
    """A call of this customer that was admitted."""
    with call_context(principal_id=principal):
        operation = vluna.begin(CALL)
    assert operation is not None
    return operation


def charged(gate: Sandbox, principal: str | None = "ann") -> list[int]:
    """The quantities that were charged."""
    return [entry.quantity for entry in gate.booked(principal).entries if entry.charged_xusd > 0]


def files(outbox: Path) -> list[str]:
    """What is left in the outbox."""
    return sorted(path.name for path in outbox.iterdir()) if outbox.is_dir() else []


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
