"""The processes that are killed: forked from one warm, single-threaded parent, each is a real process of its own.

``python failpoint_child.py`` reads one order (a line of JSON) after the other and answers each with how the child that
carried it out ended. A child notes in an fsynced log what its product was told: that is what the gate's books are
compared with, and nothing of ours takes part in it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from vluna_llm import TokenUsage, Vluna, call_context, failpoints
from vluna_llm.ending import Ending
from vluna_llm.errors import GateDenied
from vluna_llm.lifecycle import ModelCall, Operation

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": [], "max_tokens": 20})
PRINCIPALS = ("ann", "bob")
USED = {"ann": 120, "bob": 75}
PAGES = {who: {"tools.ocr.pages": used // 3, "tools.ocr.seconds": used - used // 3} for who, used in USED.items()}
NEVER = 30.0


class Log:
    """What the product of one process saw, on disk before it goes on."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, event: str, who: str, tokens: int = 0) -> None:
        os.write(self._fd, json.dumps([event, who, tokens]).encode() + b"\n")
        os.fsync(self._fd)


def begin(vluna: Vluna, principal: str, **context: Any) -> Operation:
    with call_context(principal_id=principal, **context):
        operation = vluna.begin(CALL)
    assert operation is not None
    return operation


def used(principal: str) -> Ending:
    total = USED[principal]
    usage = TokenUsage(total - total // 4, total // 4)
    return Ending("complete", usage=usage, finished=True, response_id=f"resp_{principal}")


def calls(log: Log, **context: Any) -> None:
    """Two customers' calls, each told to the product before and after."""
    vluna = Vluna()
    for principal in PRINCIPALS:
        log.note("calls", principal, USED[principal])
        operation = begin(vluna, principal, **context)
        log.note("runs", principal, USED[principal])
        operation.finish(used(principal))
        log.note("known", principal, USED[principal])
    vluna.flush(NEVER)


def pages(log: Log) -> None:
    """Work on meters of its own; the total beside them is another number."""
    vluna = Vluna()
    for principal in PRINCIPALS:
        log.note("calls", principal, USED[principal])
        with call_context(principal_id=principal), vluna.operation(feature_code="tools.ocr") as op:
            log.note("runs", principal, USED[principal])
            op.record(quantity=1, meters=PAGES[principal])
        log.note("known", principal, USED[principal])
    vluna.flush(NEVER)


def leave_pages(log: Log) -> None:
    """A process that dies with such work undelivered."""
    vluna = Vluna()
    log.note("calls", "ann", USED["ann"])
    with call_context(principal_id="ann"), vluna.operation(feature_code="tools.ocr") as op:
        log.note("runs", "ann", USED["ann"])
        op.record(quantity=1, meters=PAGES["ann"])
        vluna._running().settler.stop(0.0)
    log.note("known", "ann", USED["ann"])
    os.kill(os.getpid(), signal.SIGKILL)


def job(log: Log) -> None:
    """The same as an at-least-once caller."""
    calls(log, idempotency_key="job-1")


def late(log: Log) -> None:
    """Calls that outlive their lease and its grace."""
    vluna = Vluna()
    running = []
    for principal in PRINCIPALS:
        log.note("calls", principal, USED[principal])
        running.append(begin(vluna, principal))
        log.note("runs", principal, USED[principal])
    time.sleep(0.3)
    for principal, operation in zip(PRINCIPALS, running, strict=True):
        operation.finish(used(principal))
        log.note("known", principal, USED[principal])
    vluna.flush(NEVER)


def given_up(log: Log) -> None:
    """Calls whose consumer leaves: cancelled."""
    vluna = Vluna()
    for principal in PRINCIPALS:
        operation = begin(vluna, principal)
        log.note("given up", principal)
        operation.finish(Ending("closed"))
    vluna.flush(NEVER)


def denied(log: Log) -> None:
    """Calls that the gate refuses."""
    vluna = Vluna()
    for principal in PRINCIPALS:
        log.note("given up", principal)
        try:
            begin(vluna, principal)
        except GateDenied:
            continue
        raise AssertionError("it was not denied")


def parked(log: Log) -> None:
    """Background responses, retrieved by this process or the next."""
    vluna = Vluna()
    for principal in PRINCIPALS:
        operation = begin(vluna, principal)
        log.note("given up", principal)
        operation.park(f"resp_{principal}")
    retrieved(log)


def retrieved(log: Log) -> None:
    """The usage of background responses."""
    vluna = Vluna()
    for principal in PRINCIPALS:
        usage = used(principal).usage
        assert usage is not None
        with call_context(principal_id=principal):
            log.note("calls", principal, USED[principal])
            vluna.book_background(f"resp_{principal}", usage, CALL)
            log.note("known", principal, USED[principal])
    vluna.flush(NEVER)


def leave(log: Log) -> None:
    """A process that dies with one call whose usage is known and undelivered, and with one in flight."""
    vluna = Vluna()
    for principal in PRINCIPALS:
        log.note("calls", principal, USED[principal])
    ann, _ = (begin(vluna, principal) for principal in PRINCIPALS)
    for principal in PRINCIPALS:
        log.note("runs", principal, USED[principal])
    ann.finish(used("ann"))
    log.note("known", "ann", USED["ann"])
    os.kill(os.getpid(), signal.SIGKILL)


def leave_refused(log: Log) -> None:
    """A process that dies when the gate has refused what it sent."""
    vluna = Vluna()
    running = [begin(vluna, principal) for principal in PRINCIPALS]
    for principal, operation in zip(PRINCIPALS, running, strict=True):
        log.note("calls", principal, USED[principal])
        operation.finish(used(principal))
        log.note("known", principal, USED[principal])
    while any(operation.wait(0.01) is None for operation in running):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def run(log: Log) -> None:
    """A process that does nothing of its own, and takes over what others left."""
    vluna = Vluna()
    vluna._process.running()
    until = time.monotonic() + NEVER
    while time.monotonic() < until:
        time.sleep(0.02)


def recover(log: Log) -> None:
    """The same until nothing is left to be delivered, then the end of a process as it should be."""
    vluna = Vluna()
    runtime: Any = vluna._process.running()
    until = time.monotonic() + NEVER
    while time.monotonic() < until:
        runtime._adopt()
        vluna.flush(1)
        counts = runtime.ledger.journal.counts()
        directory = runtime.ledger.journal.directory
        alone = len(list(directory.glob("journal-*.sqlite3"))) == 1
        if alone and not counts.get("pending", 0) + counts.get("sent", 0) and not runtime.ledger.journal.orders():
            break
        time.sleep(0.02)
    assert vluna.close(5)


SCENARIOS: dict[str, Callable[[Log], None]] = {
    name: act
    for name, act in globals().items()
    if callable(act) and getattr(act, "__module__", "") == __name__ and name not in ("Log", "begin", "used")
}


def kill_at(name: str, nth: int) -> Callable[[str], None]:
    """A handler that ends the process at the n-th time (from 1) that this moment comes."""
    left = [nth]

    def handler(hit: str) -> None:
        if hit == name:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return handler


def child(order: dict[str, Any]) -> int:
    os.environ.update(order["environment"])
    sys.stdout = sys.stderr
    if "VLUNA_LLM_OUTBOX_SHARED" in os.environ:
        import vluna_llm.sharing.stage

        vluna_llm.sharing.stage.TTL = 1.0  # a claim of somebody dead is waited for
    if order["failpoint"]:
        failpoints.arm(kill_at(order["failpoint"], order["nth"]))
    SCENARIOS[order["scenario"]](Log(order["log"]))
    return 0


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = child(order)
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
