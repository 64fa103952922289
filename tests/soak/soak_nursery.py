"""A warm parent that forks workers, as a pre-fork server does: ``python soak_nursery.py FOLDER KIND SLOT``.

Kinds of parent: ``bare`` has imported everything and made nothing; ``wrapped`` has made `Vluna` and its wrapped
clients, unused; ``busy`` uses its `Vluna` all the time, so that forks happen in the middle of journal writes and
deliveries. It is told ``spawn``, ``kill`` (any signal to one child) and ``quit``; it says which children ended. They
are reaped nowhere else, so that no signal ever meets a process id that was given away again.
"""

from __future__ import annotations

import gc
import json
import os
import random
import select
import signal
import sys
import threading
from typing import Any

import openai
from soak_wire import say
from soak_words import Setup
from soak_worker import Call, Kit, Order, Worker, make_kit, work


class Nursery:
    """Forks on demand, from its main thread."""

    def __init__(self, setup: Setup, kind: str, slot: int) -> None:
        self._setup, self._kind = setup, kind
        self._children: dict[int, int] = {}
        _warm()
        self._kit: Kit | None = None if kind == "bare" else make_kit(setup, "default")
        if kind == "busy":
            self._keep_busy(slot)

    def _keep_busy(self, slot: int) -> None:
        """Call through the very `Vluna` that the children inherit, over clients of its own."""
        assert self._kit is not None
        vluna = self._kit.vluna
        own = make_kit(self._setup, "default")
        bare = {"api_key": "none", "base_url": self._setup.provider_url, "max_retries": 2}
        kit = Kit(vluna, vluna.wrap(openai.OpenAI(**bare)), own.async_client)
        worker = Worker(self._setup, Order(slot, 0, threads=1, tasks=0), kit)
        # Everything is imported before the first fork: a module that another thread is half way through importing stays
        # half imported in a child for ever, with or without us.
        worker.make(Call(worker.request_id(), "customer-0", "answer", stream=True))
        threading.Thread(target=worker.run_thread, args=(f"{self._setup.seed}.busy",), daemon=True).start()

    def spawn(self, order: Order) -> bool:
        """Fork a worker; True in the child."""
        if self._kind == "bare":
            gc.freeze()
        pid = os.fork()
        if pid == 0:
            return True
        self._children[pid] = order.slot
        say({"said": "spawned", "slot": order.slot, "generation": order.generation, "pid": pid})
        return False

    def kill(self, pid: int, number: int) -> None:
        if pid in self._children:
            os.kill(pid, number)

    def reap(self) -> None:
        for pid, slot in list(self._children.items()):  # not -1: the SDK has children of its own (``lsb_release``)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._children[pid]
                say({"said": "ended", "slot": slot, "pid": pid, "code": os.waitstatus_to_exitcode(status)})


def _warm() -> None:
    """Load what the SDK loads on first use."""
    assert openai.OpenAI(api_key="none").chat.completions.create
    assert openai.AsyncOpenAI(api_key="none").chat.completions.create


def main() -> None:
    setup, kind, slot = Setup.load(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    nursery = Nursery(setup, kind, slot)
    say({"said": "ready", "pid": os.getpid()})
    heard = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.02)
        nursery.reap()
        if not ready:
            continue
        piece = os.read(0, 65_536)
        if not piece:
            return
        heard += piece
        *lines, heard = heard.split(b"\n")
        for line in lines:
            message: dict[str, Any] = json.loads(line)
            if message["do"] == "spawn":
                order = Order(**message["order"])
                if nursery.spawn(order):
                    os.close(0)
                    random.seed()
                    kit = nursery._kit
                    work(setup, order, kit if kind != "bare" else None)
                    return
            elif message["do"] == "kill":
                nursery.kill(message["pid"], message["signal"])
            else:
                return


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
