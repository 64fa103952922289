"""The world of the model: processes, customers, the gate and the network, and what is true about every call.

The truth is kept here, outside the package: what the provider reported for each call, whether the product was told that
its call had ended, and what the owner of each call decided. The gate's books are compared with it after every step and,
when everything has calmed down, at the end.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_gate import GateBox, Network
from model_process import START, Clock, Kernel, SimProcess, Waiting, simulated

from vluna_llm import TokenUsage, call_context
from vluna_llm.ending import Ending
from vluna_llm.errors import VlunaError
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.outbox import Row, orders
from vluna_llm.outbox.reading import journals_below, read_journal
from vluna_llm.preparation import context_of
from vluna_llm.usage.meters import MeterLine

SECRET = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
PRINCIPALS = ("ann", "bob", "eve")
MODELS = ("gpt-a", "gpt-b")
FEATURES = tuple(f"openai.{model}" for model in MODELS)
LONGEST = 301.0


@dataclass(eq=False)
class Call:
    """One model call and what is true about it.

    ``known`` is the usage with which the product was told that the call is over: it must be charged. ``unsure`` is one
    that died with its process before that: it may be charged, once. ``ended`` notes that its owner ended it without.
    """

    number: int
    process: SimProcess
    principal: str
    model: str
    tokens: int
    job: str | None = None
    waiting: Waiting | None = None
    operation: Operation | None = None
    group: str = ""
    known: int | None = None
    unsure: int | None = None
    ended: bool = False
    parked: str | None = None
    denied: bool = False

    @property
    def running(self) -> bool:
        """Whether its process could still end it."""
        return self.operation is not None and not self.process.dead


@dataclass
class Truth:
    """What is true of everything that shares one settlement key: one call, all runs of a job, a background response."""

    calls: list[Call] = field(default_factory=list)
    known: list[int] = field(default_factory=list)
    unsure: list[int] = field(default_factory=list)
    cancelled: bool = False

    def allowed_now(self) -> set[int]:
        """What may be charged at any moment."""
        return {0, *self.known, *self.unsure}

    def allowed_at_last(self) -> set[int]:
        """What may be charged when everything was delivered."""
        charged = {tokens for tokens in (*self.known, *self.unsure) if tokens}
        return charged if any(self.known) else {0, *charged}


class World:
    """Everything there is. Use as a context manager: the simulated clocks and files are put under the package."""

    def __init__(self, **gate: Any) -> None:
        self.clock = Clock()
        self.kernel = Kernel()
        self.gate = GateBox(key_id="pk-model", key_secret=SECRET, **gate)
        self.gate.sandbox.clock.hold(int(START * 1000))
        self.network = Network(self.gate)
        self.network.before = self._sending
        self.network.after = self._answered
        shm = Path("/dev/shm")
        self.directory = Path(tempfile.mkdtemp(prefix="vluna-model-", dir=shm if shm.is_dir() else None))
        self.processes: list[SimProcess] = []
        self.calls: list[Call] = []
        self.truths: defaultdict[str, Truth] = defaultdict(Truth)
        self.meanwhile: list[Callable[[], None]] = []
        self.meanwhile_after: list[Callable[[], None]] = []
        self.bodies: defaultdict[tuple[str, str], set[bytes]] = defaultdict(set)
        self.responses = 0
        self.broken: list[str] = []
        self._ordered: Counter[str] = Counter()
        self.left: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (-1, 0))
        """By settlement key: the number of its latest ingest, and the tokens that this one booked as 0."""
        self._checked = 0
        self._charged: dict[str, int] = {}
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> World:
        self._undo.enter_context(simulated(self.kernel, self.clock))
        return self

    def __exit__(self, *args: object) -> None:
        try:
            for process in self.processes:
                process.die("the end")
            for call in self.calls:
                if call.waiting is not None:
                    call.waiting.abandon()
        finally:
            self._undo.close()
            self.gate.sandbox.close()
            shutil.rmtree(self.directory, ignore_errors=True)

    # -- processes -------------------------------------------------------------------------------------------------

    def start(self, **settings: Any) -> SimProcess:
        """A new process of the product."""
        process = SimProcess(
            self.kernel, self.network, self.directory, f"p{len(self.processes)}", allow_plaintext=True, **settings
        )
        self.processes.append(process)
        return process

    def alive(self) -> list[SimProcess]:
        """The processes that do something."""
        return [process for process in self.processes if process.runs]

    def kill(self, process: SimProcess) -> None:
        """``kill -9``."""
        process.die()
        self._buried(process)

    def _buried(self, process: SimProcess) -> None:
        for call in self.calls:
            if call.process is process and call.waiting is not None:
                call.waiting.abandon()
                call.waiting = None

    # -- calls -----------------------------------------------------------------------------------------------------

    def begin(
        self, process: SimProcess, principal: str, model: str, tokens: int, *, job: str | None, crash_at: int | None
    ) -> Call:
        """The product makes a call, on a thread."""
        call = self._call(process, principal, model, tokens, job)

        def ask() -> Operation | None:
            with call_context(principal_id=principal, idempotency_key=job):
                return process.vluna.begin(self._request(model))

        def admitted() -> None:
            try:
                self._admitted(call, ask())
            except VlunaError:
                call.denied = True

        process.act(admitted, crash_at)
        self._look(process)
        return call

    def begin_async(
        self, process: SimProcess, principal: str, model: str, tokens: int, *, job: str | None, crash_at: int | None
    ) -> Call:
        """The product makes a call in a coroutine, which runs to its first await."""
        call = self._call(process, principal, model, tokens, job)

        async def ask() -> Operation | None:
            with call_context(principal_id=principal, idempotency_key=job):
                return await process.vluna.abegin(self._request(model))

        call.waiting = Waiting(process, ask())
        self.go_on(call, crash_at)
        return call

    def go_on(self, call: Call, crash_at: int | None = None, *, cancel: bool = False) -> None:
        """A coroutine runs to its next await, or is cancelled in this one."""
        waiting = call.waiting
        assert waiting is not None
        waiting.step(crash_at, cancel=cancel)
        if waiting.done:
            call.waiting = None
            if waiting.error is not None:
                call.denied = True
                if not isinstance(waiting.error, VlunaError) and not (cancel and _is_cancelled(waiting.error)):
                    raise waiting.error
            elif not waiting.died:
                self._admitted(call, waiting.result)
        self._look(call.process)

    def _call(self, process: SimProcess, principal: str, model: str, tokens: int, job: str | None) -> Call:
        call = Call(len(self.calls), process, principal, model, tokens, job)
        self.calls.append(call)
        return call

    @staticmethod
    def _request(model: str) -> ModelCall:
        return ModelCall("chat.completions", "openai", model, {"messages": [], "max_tokens": 50})

    def _admitted(self, call: Call, operation: Operation | None) -> None:
        assert operation is not None
        call.operation = operation
        call.group = operation._row.settle_key
        self.truths[call.group].calls.append(call)

    def end(
        self,
        call: Call,
        ending: Ending,
        expected: int | None,
        crash_at: int | None = None,
        meters: tuple[MeterLine, ...] = (),
    ) -> None:
        """The answer ended; ``expected`` tokens are thereby known, or none (the call is given up).

        With ``meters`` the caller records them instead, beside a total of 1 that nobody is to be charged for.
        """
        operation, truth = call.operation, self.truths[call.group]
        assert operation is not None
        told_before = call.known is not None
        if expected is None:
            truth.cancelled = True
        elif not told_before:
            # From here on it may be charged, but nobody was promised anything yet.
            truth.unsure.append(expected)
            truth.cancelled |= expected == 0
        finish = (lambda: operation.record_quantity(1, meters)) if meters else (lambda: operation.finish(ending))
        alive, _ = call.process.act(finish, crash_at)
        alive = alive and not call.process.dead
        if expected is None:
            call.ended = call.ended or alive
        elif not told_before:
            if alive and call.parked is None:
                truth.unsure.remove(expected)
                truth.known.append(expected)
                call.known = expected
            else:
                call.unsure = expected
        self._look(call.process)

    def park(self, call: Call, crash_at: int | None = None) -> None:
        """The provider works on in the background."""
        operation = call.operation
        assert operation is not None
        self.responses += 1
        response = f"resp_{self.responses}"
        self.truths[call.group].cancelled = call.ended = True  # nothing more is known of it from here on
        alive, _ = call.process.act(lambda: operation.park(response), crash_at)
        if alive and not call.process.dead:
            call.parked = response
        self._look(call.process)

    def retrieve(self, process: SimProcess, call: Call, crash_at: int | None = None) -> None:
        """Some process retrieves a background response, with its usage."""
        assert call.parked is not None
        response, usage = call.parked, usage_of(call.tokens)
        truth = self.truths[f"background {response}"]
        truth.unsure.append(call.tokens)

        def book() -> None:
            bound = context_of(call.operation._row)  # type: ignore[union-attr]
            process.vluna.book_background(response, usage, self._request(call.model), bound)

        alive, _ = process.act(book, crash_at)
        if alive and not process.dead:
            truth.unsure.remove(call.tokens)
            truth.known.append(call.tokens)
        self._look(process)

    # -- what is seen on the way -----------------------------------------------------------------------------------

    def _sending(self, process: str, wire: Any) -> None:
        sender = next(found for found in self.processes if found.name == process)
        if sender.busy:
            self.broken.append(f"{process} sends while it holds a lock, or has a transaction open")
        path = wire.target.partition("?")[0]
        key = next((value for name, value in wire.headers if name == "idempotency-key"), "")
        if wire.method == "POST" and not path.endswith("/authorize"):
            base = base_of(key)
            seen = self.bodies[(path, key)]
            seen.add(wire.body)
            runs = 1 if base.startswith("vluna-llm:") and ":job:" not in base and ":background:" not in base else 1_000
            if len(seen) > runs:
                self.broken.append(f"{key} was sent with {len(seen)} different bodies")
            if path.endswith("/cancel") and not self.truths[base].cancelled:
                self.broken.append(f"{process} cancelled {base}, whose owner never gave it up")
        while self.meanwhile and wire.method == "POST":
            self.meanwhile.pop()()

    def _answered(self, process: str, wire: Any) -> None:
        while self.meanwhile_after and wire.method == "POST":
            self.meanwhile_after.pop()()

    def _look(self, process: SimProcess) -> None:
        if process.dead:
            self._buried(process)

    # -- the books -------------------------------------------------------------------------------------------------

    def charged(self) -> dict[str, int]:
        """Tokens that the gate charged, by settlement key (or background response)."""
        store = self.gate.sandbox._store
        rows = list(store.ratings.rows.values())
        for rating in rows[self._checked :]:
            if not rating.applied:
                continue
            base = base_of(rating.idempotency_key)
            group = f"background {rating.labels['response_id']}" if ":background:" in base else base
            tokens = sum(line.quantity for line in rating.lines if line.priced)
            self._charged[group] = self._charged.get(group, 0) + tokens
            if rating.kind == "ingest":
                number = rating.idempotency_key[len(base) :].rpartition(":")[2]
                left = sum(line.quantity for line in rating.lines if not line.priced)
                self.left[group] = max(self.left[group], (int(number) if number.isdecimal() else 0, left))
        self._checked = len(rows)
        return self._charged

    def check(self) -> None:
        """What holds at every moment: nothing is charged twice, nothing unknown is, nobody cancels another's call."""
        assert not self.broken, self.broken
        if len(self.gate.sandbox._store.ratings) == self._checked:
            return
        for group, tokens in self.charged().items():
            allowed = self.truths[group].allowed_now()
            total = tokens + self.left[group][1]  # what was booked as 0 is still to come
            assert {tokens, total} & allowed, f"{group}: {tokens} tokens are charged, known are {sorted(allowed)}"

    # -- the end ---------------------------------------------------------------------------------------------------

    def mend(self) -> None:
        """Everything works again: the network, the gate, its catalogue, its customers."""
        self.network.calm()
        self.meanwhile.clear()
        self.meanwhile_after.clear()
        gate = self.gate.sandbox
        for feature in FEATURES:
            gate.feature(feature, active=True)
            for part, price in (("", 5), (".tokens.input", 3), (".tokens.cached", 1), (".tokens.output", 12)):
                gate.price(f"{feature}{part}", price)
        for principal in PRINCIPALS:
            gate.disable_user(principal, active=True)
            gate.credit(principal, 10**12)

    def drain(self) -> SimProcess:
        """All processes are gone, a last one takes over and delivers everything; the operator repairs what is held."""
        for process in self.processes:
            self.kill(process)
        self.mend()
        heir = self.start()
        for _ in range(200):
            heir.act(heir.adopt)
            heir.act(lambda: heir.deliver(50))
            heir.act(heir.chores)
            self.check()
            rows = self.rows()
            moving = [row for row in rows if row.state.settlement in ("pending", "sent") or row.arrived_from]
            if not moving and len(self.files()) == 1 and not self._order_all():
                return heir
            self.pass_time(LONGEST)
        left = [
            (
                row.operation_id,
                row.state,
                row.last_error,
                row.arrived_from,
                row.held,
                row.next_attempt_at - self.clock.wall,
            )
            for row in self.rows()
            if row.state.settlement not in ("lost", "booked", "rebooked", "lapsed")
        ]
        heard = heir.vluna.telemetry.counts
        raise AssertionError(f"not drained: {left} in {self.files()}; the last process told {dict(heard)}")

    def order(self, row: Row, what: orders.What) -> None:
        """An operator's order, put into whatever journal holds the operation at present."""
        for path in self.files():
            if any(found.operation_id == row.operation_id for found in read_journal(path).rows):
                orders.place(path, [(row.operation_id, what)])
                return

    def _order_all(self) -> bool:
        """What an operator does when all is mended: retry what was refused, then repair what is still not charged."""
        waiting = [row for row in self.rows() if row.state.settlement in ("refused", "quarantined")]
        ordered = False
        for row in waiting:
            tried = self._ordered[row.operation_id]
            if tried < 2:
                self._ordered[row.operation_id] += 1
                self.order(row, "retry" if row.state.settlement == "refused" and not tried else "repair")
                ordered = True
        return ordered

    def pass_time(self, seconds: float) -> None:
        """Time passes for everybody alike."""
        self.clock.sleep(seconds)
        self.gate.sandbox.clock.advance(seconds)

    def files(self) -> list[Path]:
        """The journals there are."""
        return journals_below(self.directory)

    def rows(self) -> list[Row]:
        """All rows of all journals."""
        found = []
        for path in self.files():
            journal = read_journal(path)
            # A process may have died while it made its file.
            assert journal.problem is None or "no such table" in journal.problem, journal.problem
            found += journal.rows
        return found

    def balance(self) -> None:
        """At the end: every known usage is charged exactly, nothing else is, and what is not charged is listed."""
        charged, rows = self.charged(), self.rows()
        held = defaultdict(list)
        for row in rows:
            background = ":background:" in row.settle_key
            held[f"background {row.response_id}" if background else row.settle_key].append(row)
        for group, truth in self.truths.items():
            tokens = charged.get(group, 0)
            allowed = truth.allowed_at_last()
            if tokens in allowed:
                continue
            found = [(row.state, row.last_error) for row in held[group]]
            raise AssertionError(f"{group}: {tokens} tokens are charged, should be {sorted(allowed)}; {found}")
        unknown = set(charged) - set(self.truths)
        assert not unknown, f"charged, and nobody knows why: {unknown}"
        listed = {row.operation_id for row in rows if row.state.settlement == "lost"}
        for call in self.calls:
            if call.operation is None or call.ended or call.known is not None or call.parked is not None:
                continue
            if not charged.get(call.group) and not self.truths[call.group].cancelled:
                assert call.operation.operation_id in listed, f"{call.operation.operation_id} died and is not listed"

    def tell(self, ends: Counter[str]) -> None:
        """What this history came to, for the summary."""
        ends["bookings charged"] += sum(1 for tokens in self.charged().values() if tokens)
        ends["requests"] += self.network.requests
        ends["boundaries"] += self.kernel.boundaries
        for rating in self.gate.sandbox._store.ratings.rows.values():
            ends[f"{rating.kind} {'applied' if rating.applied else 'quarantined'}"] += 1
            if rating.kind == "ingest" and any(not line.priced for line in rating.lines):
                some = any(line.priced for line in rating.lines)
                ends[f"ingest booked {'in part' if some else 'wholly'} as 0"] += 1
        for row in self.rows():
            ends[f"row {row.state.settlement}"] += 1
        for process in self.processes:
            if process.died_at not in (None, "killed"):
                ends[f"died {process.died_at}"] += 1


def base_of(key: str) -> str:
    """The part of a settlement's key that all its requests have in common."""
    return re.sub(r":(commit|cancel|ingest(:\d+)?)$", "", key)


def usage_of(tokens: int) -> TokenUsage:
    """A usage of so many tokens, split like a real one."""
    return TokenUsage(tokens - tokens // 3, tokens // 3, cached_tokens=tokens // 5)


def complete(tokens: int) -> Ending:
    """The whole answer was read, and reported its usage."""
    return Ending("complete", usage=usage_of(tokens), finished=True, response_id="resp_x")


def _is_cancelled(error: BaseException) -> bool:
    return type(error).__name__ == "CancelledError"


def dump(world: World) -> str:
    """For a person who looks at a failure."""
    lines = [f"{sent.process} {sent.route} {sent.key[-60:]} {sent.fate}" for sent in world.network.log]
    for row in world.rows():
        state = row.state
        lines.append(
            f"{row.operation_id} {state.admission} {state.work} {state.settlement} {state.route} {row.last_error}"
        )
    for rating in world.gate.sandbox._store.ratings.rows.values():
        booked = f"{rating.kind} {rating.idempotency_key} {rating.quantity} applied={rating.applied}"
        lines.append(f"{booked} {json.dumps(rating.labels)}")
    return "\n".join(lines)
