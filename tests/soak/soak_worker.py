"""A worker: threads and an event loop that make metered calls until somebody kills the process.

Runs in a fork of a warm parent (`soak_nursery.py`) or as a fresh interpreter: ``python soak_worker.py FOLDER ORDER``.
What it saw of each answer goes into a log: ``began`` before the call, ``seen`` with the disk's word for it once the
answer was seen to its end, ``left``, ``refused``, ``failed``, or ``surprise`` where something came that a bare client
would not have met.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import openai
from soak_gate import POOR
from soak_words import MODEL, WORK_FEATURE, Kind, Log, Setup

from vluna_llm import Vluna, call_context
from vluna_llm.errors import GateDenied, GateRateLimited, GateUnavailable

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "inline": {"settle": "inline"},
    "overlap": {"authorize": "overlap"},
    "drain": {"on_abort": "drain"},
    "estimate": {"on_abort": "estimate"},
}
"""How a worker's `Vluna` may be set, by name."""

_REFUSALS = (GateDenied, GateRateLimited, GateUnavailable)
_TIMEOUT = 20.0


@dataclass(frozen=True, slots=True)
class Order:
    """What one worker is told."""

    slot: int
    generation: int
    threads: int
    tasks: int
    variant: str = "default"
    jobs: list[dict[str, Any]] = field(default_factory=list)

    def dump(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class Kit:
    """A `Vluna` and the clients that it wraps; may be made before a fork."""

    vluna: Vluna
    client: openai.OpenAI
    async_client: openai.AsyncOpenAI


def make_kit(setup: Setup, variant: str) -> Kit:
    """The kit of this variant; nothing is sent."""
    if setup.sabotage:
        from soak_sabotage import commit_sabotage

        commit_sabotage(setup.sabotage)
    vluna = Vluna(
        base_url=setup.base_url,
        realm_id=setup.realm_id,
        key_id=setup.key_id,
        key_secret=setup.key_secret,
        outbox=str(setup.outbox),
        **VARIANTS[variant],
    )
    how: dict[str, Any] = {"api_key": "none", "base_url": setup.provider_url, "timeout": _TIMEOUT, "max_retries": 2}
    return Kit(vluna, vluna.wrap(openai.OpenAI(**how)), vluna.wrap(openai.AsyncOpenAI(**how)))


@dataclass(frozen=True, slots=True)
class Call:
    """One operation as its caller plans it."""

    request_id: str
    principal: str
    kind: Kind
    stream: bool = False
    ask_usage: bool = False
    flaky: bool = False
    leave_after: int = 0
    quantity: int = 0
    content: str = "hello"
    group: str | None = None
    inside: Call | None = None

    @property
    def plan(self) -> str:
        """How the provider is asked to treat it."""
        if self.flaky:
            return "flaky"
        return {"silent": "silent", "held": "held", "cut": "cut"}.get(self.kind, "ok")

    @property
    def body(self) -> dict[str, Any]:
        said: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": self.content}]}
        if self.stream:
            said["stream"] = True
            if self.ask_usage:
                said["stream_options"] = {"include_usage": True}
        said["extra_headers"] = {"x-soak-request": self.request_id, "x-soak-plan": self.plan}
        return said


class Worker:
    """The callers of one process."""

    def __init__(self, setup: Setup, order: Order, kit: Kit) -> None:
        self.setup, self.order, self.kit = setup, order, kit
        self.log = Log(setup.path / f"caller-{order.slot}.jsonl")
        self.stopping = threading.Event()
        self._count = 0
        self._guard = threading.Lock()
        self._jobs = list(order.jobs)
        self._tag = f"{order.slot}.{order.generation}"

    # -- what is asked -----------------------------------------------------------------------------------------------

    def request_id(self) -> str:
        with self._guard:
            self._count += 1
            return f"{self._tag}.{self._count}"

    def next_call(self, chance: random.Random) -> Call:
        request_id = self.request_id()
        principal = f"customer-{chance.randrange(self.setup.customers)}"
        if chance.random() < 0.04:
            principal = f"new-{request_id}"
        elif chance.random() < 0.03:
            principal = POOR
        may_hold = self.order.variant != "drain"
        kinds: dict[Kind, float] = {"answer": 66, "silent": 3, "early": 6, "held": 9 * may_hold, "cut": 4, "work": 8}
        kind = chance.choices(list(kinds), list(kinds.values()))[0]
        leaves = kind in ("early", "held")
        return Call(
            request_id,
            principal,
            kind,
            stream=leaves or chance.random() < 0.55,
            ask_usage=chance.random() < 0.5,
            flaky=kind == "answer" and chance.random() < 0.02,
            leave_after=chance.randint(1, 3) if leaves else 0,
            quantity=chance.randint(1, 10_000),
            inside=self._inner(principal, chance) if kind == "work" and chance.random() < 0.4 else None,
        )

    def _inner(self, principal: str, chance: random.Random) -> Call:
        """A model call inside of other work, which is charged for itself."""
        return Call(self.request_id(), principal, "answer", stream=chance.random() < 0.5)

    def next_job(self, chance: random.Random) -> dict[str, Any] | None:
        """A job that somebody began before, or a new one now and then."""
        with self._guard:
            if self._jobs:
                return self._jobs.pop()
        if chance.random() > 0.08:
            return None
        name = f"job-{self.request_id()}"
        return {"job": name, "principal": f"customer-{chance.randrange(self.setup.customers)}", "runs": 0}

    def steps(self, job: dict[str, Any], chance: random.Random) -> Iterator[Call]:
        """The calls of one run of a job: some are the same in every run, one of them twice, one is this run's own."""
        about = random.Random(job["job"])
        for step in range(about.randint(1, 2)):
            stream, ask_usage = about.random() < 0.5, about.random() < 0.5
            for nth in range(about.choice((1, 1, 2))):
                yield Call(
                    self.request_id(),
                    job["principal"],
                    "answer",
                    stream=stream,
                    ask_usage=ask_usage,
                    content=f"step {step} of {job['job']}",
                    group=f"{job['job']}/{step}/{nth}",
                )
        if chance.random() < 0.3:
            request_id = self.request_id()
            yield Call(request_id, job["principal"], "answer", content=f"only now: {request_id}")

    # -- what is noted -----------------------------------------------------------------------------------------------

    def began(self, call: Call) -> None:
        record = {
            "e": "began",
            "r": call.request_id,
            "p": call.principal,
            "k": call.kind,
            "v": self.order.variant,
            "g": call.group,
            "q": call.quantity if call.kind == "work" else 0,
        }
        self.log.write(record)

    def seen(self, call: Call, response_id: str | None, usage: Any) -> None:
        """The answer was seen to its end: from the moment this is on the disk it is acknowledged."""
        counts = None
        if usage is not None:
            details = usage.prompt_tokens_details
            counts = [usage.prompt_tokens, (details.cached_tokens or 0) if details else 0, usage.completion_tokens]
        self.log.write({"e": "seen", "r": call.request_id, "id": response_id, "u": counts}, sync=True)

    def missed(self, call: Call, error: BaseException) -> bool:
        """How a call that raised is noted; True where a bare client might have raised too, or the gate refused."""
        name = type(error).__name__
        if isinstance(error, _REFUSALS):
            self.log.write({"e": "refused", "r": call.request_id, "w": name})
        elif call.kind == "cut" and isinstance(error, openai.APIConnectionError):
            self.log.write({"e": "failed", "r": call.request_id, "w": name})
        else:
            what = "".join(traceback.format_exception(error))
            self.log.write({"e": "surprise", "r": call.request_id, "w": name, "t": what[-4_000:]})
            return False
        return True

    def left(self, call: Call) -> None:
        self.log.write({"e": "left", "r": call.request_id}, sync=True)

    # -- threads -----------------------------------------------------------------------------------------------------

    def run_thread(self, seed: str) -> None:
        chance = random.Random(seed)
        while not self.stopping.is_set():
            job = self.next_job(chance)
            if job is not None:
                self.run_job(job, chance)
            else:
                self.make(self.next_call(chance))
            self.stopping.wait(chance.expovariate(1 / self.setup.think))

    def run_job(self, job: dict[str, Any], chance: random.Random) -> None:
        self.log.write({"e": "job", "s": "began", **job})
        with call_context(principal_id=job["principal"], idempotency_key=job["job"]):
            for call in self.steps(job, chance):
                if not self.make(call) or self.stopping.is_set():
                    return
        self.log.write({"e": "job", "s": "done", **job})

    def make(self, call: Call) -> bool:
        """One operation; True where it was seen to its end."""
        self.began(call)
        try:
            with call_context(principal_id=call.principal, request_id=call.request_id):
                if call.kind == "work":
                    with self.kit.vluna.operation(feature_code=WORK_FEATURE, estimate=call.quantity) as op:
                        if call.inside is not None:
                            self.make(call.inside)
                        op.record(quantity=call.quantity)
                    self.seen(call, None, None)
                elif call.stream:
                    return self._stream(call)
                else:
                    answer = self.kit.client.chat.completions.create(**call.body)
                    self.seen(call, answer.id, answer.usage)
        except Exception as error:
            self.missed(call, error)
            return False
        return True

    def _stream(self, call: Call) -> bool:
        response_id = usage = None
        with self.kit.client.chat.completions.create(**call.body) as stream:
            for n, chunk in enumerate(stream, 1):
                response_id, usage = chunk.id, chunk.usage or usage
                if call.leave_after and n >= call.leave_after:
                    break
        if call.leave_after:
            self.left(call)
            return False
        self.seen(call, response_id, usage)
        return True

    # -- the event loop ----------------------------------------------------------------------------------------------

    async def run_loop(self, seed: str) -> None:
        async def caller(n: int) -> None:
            chance = random.Random(f"{seed}.{n}")
            while not self.stopping.is_set():
                job = self.next_job(chance)
                if job is not None:
                    await self.arun_job(job, chance)
                else:
                    await self.amake(self.next_call(chance), cancel=chance.random() < 0.4)
                await asyncio.sleep(chance.expovariate(1 / self.setup.think))

        await asyncio.gather(*(caller(n) for n in range(self.order.tasks)))

    async def arun_job(self, job: dict[str, Any], chance: random.Random) -> None:
        self.log.write({"e": "job", "s": "began", **job})
        async with call_context(principal_id=job["principal"], idempotency_key=job["job"]):
            for call in self.steps(job, chance):
                if not await self.amake(call) or self.stopping.is_set():
                    return
        self.log.write({"e": "job", "s": "done", **job})

    async def amake(self, call: Call, *, cancel: bool = False) -> bool:
        """As `make`; with ``cancel`` a stream that is left is left by cancelling its task."""
        self.began(call)
        try:
            async with call_context(principal_id=call.principal, request_id=call.request_id):
                if call.kind == "work":
                    async with self.kit.vluna.operation(feature_code=WORK_FEATURE, estimate=call.quantity) as op:
                        if call.inside is not None:
                            await self.amake(call.inside)
                        op.record(quantity=call.quantity)
                    self.seen(call, None, None)
                elif call.stream and call.leave_after and cancel:
                    await self._cancelled(call)
                    return False
                elif call.stream:
                    return await self._astream(call)
                else:
                    answer = await self.kit.async_client.chat.completions.create(**call.body)
                    self.seen(call, answer.id, answer.usage)
        except Exception as error:
            self.missed(call, error)
            return False
        return True

    async def _astream(self, call: Call) -> bool:
        response_id = usage = None
        stream = await self.kit.async_client.chat.completions.create(**call.body)
        async with stream:
            n = 0
            async for chunk in stream:
                n += 1
                response_id, usage = chunk.id, chunk.usage or usage
                if call.leave_after and n >= call.leave_after:
                    break
        if call.leave_after:
            self.left(call)
            return False
        self.seen(call, response_id, usage)
        return True

    async def _cancelled(self, call: Call) -> None:
        reached = asyncio.Event()

        async def read() -> None:
            stream = await self.kit.async_client.chat.completions.create(**call.body)
            async with stream:
                n = 0
                async for _ in stream:
                    n += 1
                    if n >= call.leave_after:
                        reached.set()
                        if call.kind == "early":
                            await asyncio.sleep(60)

        task = asyncio.create_task(read())
        waiter = asyncio.create_task(reached.wait())
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        self.log.write({"e": "cancelled", "r": call.request_id}, sync=True)

    # -- life --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until told to stop (SIGTERM), then end as a program does."""
        signal.signal(signal.SIGTERM, lambda *_: self.stopping.set())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.log.write({"e": "alive", "pid": os.getpid(), "gen": self.order.generation})
        seed = f"{self.setup.seed}.{self._tag}"
        threads = [
            threading.Thread(target=self.run_thread, args=(f"{seed}.{n}",), daemon=True)
            for n in range(self.order.threads)
        ]
        if self.order.tasks:
            threads.append(threading.Thread(target=lambda: asyncio.run(self.run_loop(f"{seed}.loop")), daemon=True))
        for thread in threads:
            thread.start()
        parent = os.getppid()
        while not self.stopping.wait(0.2):
            if os.getppid() != parent:
                os._exit(3)  # whoever watched over the run is gone
        deadline = time.monotonic() + 10
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        late = sum(thread.is_alive() for thread in threads)
        self.log.write({"e": "ended", "gen": self.order.generation, "late": late})


def redirect(setup: Setup, slot: int) -> None:
    """What the process says goes to a file; SIGUSR1 makes it tell where its threads are."""
    fd = os.open(setup.path / f"stderr-{slot}.txt", os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)
    os.dup2(fd, 2)
    os.dup2(fd, 1)
    os.close(fd)
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__ or sys.stderr, all_threads=True)


def work(setup: Setup, order: Order, kit: Kit | None) -> None:
    """Be this worker; makes its own kit where none was made before the fork."""
    redirect(setup, order.slot)
    Worker(setup, order, kit or make_kit(setup, order.variant)).run()


if __name__ == "__main__":
    work(Setup.load(sys.argv[1]), Order(**json.loads(sys.argv[2])), None)
