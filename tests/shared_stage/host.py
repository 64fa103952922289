"""A host in a process of its own: its own outbox directory and home, told over its standard input what to do.

Commands are JSON objects, a line each, answered by a line each: ``{"do": "work", "customers": [...], "each": 3}``,
``{"do": "record", "customers": [...], "meters": {...}}``, ``{"do": "flush", "seconds": 10}``, ``counts``, ``stages``,
``fork``, ``close``.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKENS = 15


class Host:
    """One host, seen from the test."""

    def __init__(
        self,
        name: str,
        folder: Path,
        gate: Mapping[str, str],
        database: str | None,
        *,
        ttl: float = 2.0,
        stop_at: str = "",
        kill_at: str = "",
    ) -> None:
        self.name = name
        self.folder = folder / name
        self.outbox = self.folder / "outbox"
        self.outbox.mkdir(parents=True, exist_ok=True)
        self.errors = self.folder / "stderr"
        environment = {
            **gate,
            "HOME": str(self.folder),
            "PATH": "",
            "PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path]),
            "VLUNA_LLM_OUTBOX": str(self.outbox),
            **({} if database is None else {"VLUNA_LLM_OUTBOX_SHARED": database}),
            "HOST_TTL": str(ttl),
            "HOST_STOP_AT": stop_at,
            "HOST_KILL_AT": kill_at,
        }
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "host"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        assert self.answer() == "ready"

    def ask(self, do: str, **details: Any) -> Any:
        """Have it do something, and wait for its answer."""
        self.tell(do, **details)
        return self.answer()

    def tell(self, do: str, **details: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **details}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"host {self.name} is gone: {self.errors.read_text()}"
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)
        self.wait_until_paused()

    def wait_until_paused(self, seconds: float = 10.0) -> None:
        """Wait until it is stopped, by `pause` or by itself."""
        status = Path(f"/proc/{self.process.pid}/stat")
        until = time.monotonic() + seconds
        while status.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < until, f"host {self.name} does not stop"
            time.sleep(0.01)

    def wake(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def end(self) -> None:
        """Whatever it does, let it be gone."""
        if self.process.poll() is None:
            self.wake()
            self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def main() -> None:
    """The program of a host."""
    from vluna_llm import TokenUsage, Vluna, call_context, failpoints
    from vluna_llm.ending import Ending
    from vluna_llm.lifecycle import ModelCall
    from vluna_llm.sharing import stage

    stage.TTL = float(os.environ["HOST_TTL"])
    vluna = Vluna()
    stop_at, kill_at, guard = os.environ["HOST_STOP_AT"], os.environ["HOST_KILL_AT"], threading.Lock()

    def moment(name: str) -> None:
        nonlocal stop_at
        if name == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with guard:
            here, stop_at = name == stop_at, "" if name == stop_at else stop_at
        if here:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.3)  # another thread may take the signal: this one must not get any further

    if stop_at or kill_at:
        failpoints.arm(moment)

    def work(customer: str) -> tuple[str, float]:
        """One call: its id, and the seconds that its end cost its caller."""
        with call_context(principal_id=customer):
            operation = vluna.begin(ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []}))
        assert operation is not None
        began = time.perf_counter()
        operation.finish(Ending("complete", usage=TokenUsage(10, TOKENS - 10), finished=True))
        return operation.operation_id, time.perf_counter() - began

    def record(customer: str, meters: dict[str, int]) -> str:
        """Work on meters of its own."""
        with call_context(principal_id=customer), vluna.operation(feature_code="tools.ocr") as op:
            op.record(meters=meters)
        return op.operation_id

    def fork() -> int:
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        code = 1
        try:
            work("forked")
            code = 0 if vluna.flush(20) and vluna.close(5) else 2
        finally:
            os._exit(code)

    def answer(said: Any) -> None:
        print(json.dumps(said), flush=True)

    answer("ready")
    for line in sys.stdin:
        order = json.loads(line)
        do = order["do"]
        if do == "start":
            vluna._running()
            answer(True)
        elif do == "work":
            ids, took = zip(*(work(customer) for customer in order["customers"] * order.get("each", 1)), strict=True)
            answer({"ids": ids, "median": statistics.median(took), "slowest": max(took)})
        elif do == "record":
            answer([record(customer, order["meters"]) for customer in order["customers"]])
        elif do == "fork":
            answer(fork())
        elif do == "flush":
            answer(vluna.flush(order["seconds"]))
        elif do == "counts":
            answer({**vluna.telemetry.counts, "outstanding": vluna._running().settler.outstanding})
        elif do == "stages":
            rows = vluna._running().ledger.journal.rows()
            answer([[row.operation_id, row.stage, row.state.settlement] for row in rows])
        elif do == "close":
            answer(vluna.close(order.get("seconds", 5.0)))
        else:
            raise ValueError(do)


if __name__ == "__main__":
    main()
