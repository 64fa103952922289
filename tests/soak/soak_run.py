"""One soak: starts the gate, the road, the provider and the workers, kills workers for a while, drains, and judges."""

from __future__ import annotations

import base64
import heapq
import json
import random
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soak_helper import Helper
from soak_jobs import Jobs
from soak_options import Options, Result
from soak_oracle import judge, read_witnesses
from soak_words import Setup, records
from soak_worker import VARIANTS, Order

NURSERIES = ("bare", "wrapped", "busy")
BUSY_SLOT = 900
_COMPLAINTS = ("vluna.internal_error", "Traceback", "Fatal", "The journal ", "Exception ignored")
_SILENT_SECONDS = 45.0
"""A worker that notes nothing for so long while it is neither stopped nor dead is stuck."""


@dataclass(slots=True)
class Slot:
    """One place for a worker."""

    number: int
    generation: int = 0
    nursery: Helper | None = None
    cold: Helper | None = None
    pid: int | None = None
    stopped: bool = False
    asked_to_end: float | None = None
    grew_at: float = 0.0
    size: int = 0
    told_stuck: bool = False
    jobs: list[dict[str, Any]] = field(default_factory=list)


class Soak:
    """Runs once. ``progress`` is called a few times a second with what is counted so far."""

    def __init__(self, options: Options, progress: Callable[[Soak, float], None] | None = None) -> None:
        self.options = options
        self.folder = options.keep or Path(tempfile.mkdtemp(prefix="vluna-soak-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._progress = progress or (lambda soak, share: None)
        self._random = random.Random(options.seed)
        self._told: deque[tuple[Helper, dict[str, Any]]] = deque()
        self._jobs = Jobs(self.folder, self._random)
        self._slots = [Slot(number) for number in range(options.workers)]
        self._generations = 0
        self.kills = self.ends = self.cold_starts = self.pauses = self.gate_restarts = 0
        self._habits: Counter[str] = Counter()
        self.trouble: list[str] = []
        self.phase = "starting"
        self._helpers: list[Helper] = []
        self._nurseries: list[Helper] = []

    # -- what is counted meanwhile -----------------------------------------------------------------------------------

    def faults(self) -> Counter[str]:
        """The faults so far, by kind."""
        found = Counter(self._habits)
        counts = self._proxy.last.get("calm", self._proxy.last.get("stats", {})).get("counts", {})
        found.update(counts)
        found.update(self._gate.last.get("habits_off", self._gate.last.get("stats", {})).get("habits", {}))
        return found

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        started = time.monotonic()
        try:
            self._start()
            self._rage()
            return self._finish(started)
        finally:
            for helper in self._helpers:
                helper.end()
            for slot in self._slots:
                if slot.cold is not None:
                    slot.cold.end()

    def _start(self) -> None:
        options, folder = self.options, self.folder
        self._key_id = "pk-soak"
        self._secret = base64.b64encode(self._random.randbytes(32)).decode()
        self._gate = self._start_gate(0)
        port = self._gate.wait_ready()["base_url"].split(":")[2].partition("/")[0]
        self._gate_port = int(port)
        self._proxy = self._help("soak_proxy.py", port, str(options.seed), str(options.fault_rate))
        self._provider = self._help("soak_provider.py", str(folder), str(options.seed))
        setup = Setup(
            folder=str(folder),
            seed=options.seed,
            base_url=f"http://127.0.0.1:{self._proxy.wait_ready()['port']}/mgt/v1",
            realm_id="realm-soak",
            key_id=self._key_id,
            key_secret=self._secret,
            provider_url=f"http://127.0.0.1:{self._provider.wait_ready()['port']}/v1",
            concurrency=options.concurrency,
            customers=options.customers,
            think=options.think,
            sabotage=options.sabotage,
        )
        setup.outbox.mkdir(mode=0o700, exist_ok=True)
        setup.save()
        self._nurseries = [
            self._help("soak_nursery.py", str(folder), kind, str(BUSY_SLOT + n)) for n, kind in enumerate(NURSERIES)
        ]
        for nursery in self._nurseries:
            nursery.wait_ready()

    def _help(self, script: str, *args: str) -> Helper:
        helper = Helper(script, *args, heard=self._told, errors=self.folder / f"{Path(script).stem}.txt")
        self._helpers.append(helper)
        return helper

    def _start_gate(self, port: int) -> Helper:
        seed = str(self._random.randrange(1 << 30))
        return self._help(
            "soak_gate.py", str(self.folder), str(port), self._key_id, self._secret, seed, self.options.dialect
        )

    # -- the middle: kills, pauses, restarts -------------------------------------------------------------------------

    def _rage(self) -> None:
        """Keep every slot filled and let things happen at random moments until the time is over."""
        options = self.options
        began = time.monotonic()
        ends_at = began + options.minutes * 60
        happenings: list[tuple[float, int, Callable[[], None], float]] = []

        def plan(what: Callable[[], None], per_minute: float) -> None:
            if per_minute > 0:
                mean = 60 / per_minute
                rare = mean > 5  # what is rare must not be left to luck
                wait = self._random.uniform(0.5, 1.5) * mean if rare else self._random.expovariate(1 / mean)
                heapq.heappush(happenings, (time.monotonic() + wait, len(happenings), what, per_minute))

        self.phase = "raging"
        self._cold_due = [
            began + self._random.uniform(0.02, 0.95) * options.minutes * 60 for _ in range(options.cold_starts)
        ]
        self._cold_due.sort()
        for slot in self._slots:
            self._fill(slot)
        plan(self._kill_somebody, options.kills_per_minute)
        plan(self._pause_somebody, options.pauses_per_minute)
        plan(self._restart_gate, options.gate_restarts_per_minute)
        resumes: list[tuple[float, int]] = []
        self._resumes = resumes
        shown = 0.0
        while (now := time.monotonic()) < ends_at:
            while happenings and happenings[0][0] <= now:
                _, _, what, per_minute = heapq.heappop(happenings)
                what()
                plan(what, per_minute)
            while resumes and resumes[0][0] <= now:
                self._resume(heapq.heappop(resumes)[1])
            self._listen()
            self._see_to_helpers()
            if now - shown > 0.5:
                shown = now
                self._watch(now)
                self._progress(self, (now - began) / (options.minutes * 60))
            time.sleep(0.005)

    def _see_to_helpers(self) -> None:
        for helper in (self._proxy, self._provider, self._gate, *self._nurseries):
            if helper.process.poll() is not None:
                raise RuntimeError(f"{helper.process.args} ended by itself; see its errors in {self.folder}")

    def _listen(self) -> None:
        while self._told:
            _, message = self._told.popleft()
            if message["said"] == "spawned":
                slot = self._slots[message["slot"]]
                if slot.generation == message["generation"]:
                    slot.pid = message["pid"]
            elif message["said"] == "ended":
                slot = self._slots[message["slot"]]
                if slot.pid == message["pid"]:
                    self._ended(slot, message["code"])
        for slot in self._slots:
            if slot.cold is not None and slot.cold.process.poll() is not None:
                code = slot.cold.process.returncode
                slot.cold.end()
                slot.cold = None
                self._ended(slot, code)

    def _fill(self, slot: Slot) -> None:
        self._generations += 1
        slot.generation = self._generations
        slot.stopped, slot.asked_to_end, slot.told_stuck = False, None, False
        slot.grew_at, slot.pid = time.monotonic(), None
        slot.jobs = self._jobs.take(3)
        concurrency = self.options.concurrency
        threads = self._random.choice((0, concurrency // 2, concurrency))
        variant = self._random.choices(list(VARIANTS), (6, 1, 2, 2, 2))[0]
        order = Order(slot.number, slot.generation, threads, concurrency - threads, variant, slot.jobs)
        if self._cold_due and self._cold_due[0] <= time.monotonic():
            self._cold_due.pop(0)
            self.cold_starts += 1
            slot.nursery = None
            errors = self.folder / f"stderr-{slot.number}.txt"
            slot.cold = Helper(
                "soak_worker.py", str(self.folder), json.dumps(order.dump()), heard=self._told, errors=errors
            )
            slot.pid = slot.cold.process.pid
            return
        slot.nursery = self._random.choice(self._nurseries)
        if slot.nursery is not self._nurseries[0]:
            order = Order(slot.number, slot.generation, threads, concurrency - threads, "default", slot.jobs)
        slot.nursery.tell("spawn", order=order.dump())

    def _signal(self, slot: Slot, number: int) -> bool:
        if slot.pid is None:
            return False
        if slot.cold is not None:
            slot.cold.process.send_signal(number)
        elif slot.nursery is not None:
            slot.nursery.tell("kill", pid=slot.pid, signal=number)
        return True

    def _kill_somebody(self) -> None:
        slot = self._random.choice(self._slots)
        if slot.asked_to_end is not None:
            return
        if self._random.random() < 0.04 and not slot.stopped:
            if self._signal(slot, signal.SIGTERM):
                self.ends += 1
                slot.asked_to_end = time.monotonic()
        elif self._signal(slot, signal.SIGKILL):
            self.kills += 1
            slot.asked_to_end = time.monotonic()

    def _pause_somebody(self) -> None:
        slot = self._random.choice(self._slots)
        if slot.asked_to_end is None and not slot.stopped and self._signal(slot, signal.SIGSTOP):
            self.pauses += 1
            slot.stopped = True
            heapq.heappush(self._resumes, (time.monotonic() + self._random.uniform(0.3, 14.0), slot.generation))

    def _resume(self, generation: int) -> None:
        for slot in self._slots:
            if slot.generation == generation and slot.stopped:
                slot.stopped, slot.grew_at = False, time.monotonic()
                self._signal(slot, signal.SIGCONT)

    def _restart_gate(self) -> None:
        """Kill the gate itself: its books are on disk, its process's memory of idempotency keys is gone."""
        self._habits.update(self._gate.last.get("stats", {}).get("habits", {}))
        self._gate.end()
        self.gate_restarts += 1
        self._gate = self._start_gate(self._gate_port)

    def _ended(self, slot: Slot, code: int) -> None:
        asked = slot.asked_to_end is not None
        if asked and code == -signal.SIGTERM:  # before it had learned to end in good order: a kill
            self.kills, self.ends = self.kills + 1, self.ends - 1
        elif code not in (0, -signal.SIGKILL) or (code == 0 and not asked):
            self.trouble.append(f"the worker {slot.number}.{slot.generation} ended by itself with code {code}")
        self._jobs.collect(slot.number, slot.jobs)
        self._fill(slot)

    def _watch(self, now: float) -> None:
        """Tell a worker that is stuck, with what its threads do."""
        for slot in self._slots:
            path = self.folder / f"caller-{slot.number}.jsonl"
            size = path.stat().st_size if path.exists() else 0
            if size != slot.size or slot.stopped:
                slot.size, slot.grew_at = size, now
            late = slot.asked_to_end is not None and now - slot.asked_to_end > 30
            if (now - slot.grew_at > _SILENT_SECONDS or late) and not slot.told_stuck:
                slot.told_stuck = True
                why = "does not end" if late else f"was silent for {_SILENT_SECONDS:.0f} s"
                self.trouble.append(
                    f"the worker {slot.number}.{slot.generation} (pid {slot.pid}) {why}: see stderr-{slot.number}.txt"
                )
                self._signal(slot, signal.SIGUSR1)
                time.sleep(0.3)
                self._signal(slot, signal.SIGKILL)
                self.kills += 1
                slot.asked_to_end = now

    # -- the end -----------------------------------------------------------------------------------------------------

    def _finish(self, started: float) -> Result:
        self.phase = "draining"
        for slot in self._slots:
            if slot.pid is not None or slot.cold is not None:
                self._signal(slot, signal.SIGKILL)
                if slot.asked_to_end is None:
                    self.kills += 1
        deadline = time.monotonic() + 10
        alive = {slot.number for slot in self._slots}
        while alive and time.monotonic() < deadline:
            while self._told:
                helper, message = self._told.popleft()
                if message["said"] == "spawned" and (message["slot"] in alive):
                    helper.tell("kill", pid=message["pid"], signal=signal.SIGKILL)
                elif message["said"] == "ended":
                    alive.discard(message["slot"])
            for slot in self._slots:
                if slot.cold is not None and slot.cold.process.poll() is not None:
                    alive.discard(slot.number)
            time.sleep(0.01)
        for nursery in self._nurseries:
            nursery.end()
        self.kills += 1  # the busy parent, which had one call in flight
        for slot in self._slots:
            if slot.cold is not None:
                slot.cold.end()
                slot.cold = None
        rage = time.monotonic() - started
        self._gate.wait_ready()
        self._proxy.ask("calm", "calm")
        self._gate.ask("habits_off", "habits_off")
        faults = dict(self.faults())
        drained = self._drain()
        self._gate.ask("books", "books", 300)
        self.phase = "judging"
        seen = read_witnesses(self.folder)
        self._read_complaints()
        states = Counter(drained.get("states", {}))
        seen.kills, seen.concurrency, seen.lost = self.kills, self.options.concurrency, drained.get("lost", [])
        finished = ("booked", "rebooked", "lapsed", "lost", "denied")
        seen.left_over = {state: count for state, count in states.items() if state not in finished}
        verdict = judge(seen)
        return Result(
            self.options,
            verdict,
            rage,
            self.kills,
            self.ends,
            self.cold_starts,
            self.pauses,
            self.gate_restarts,
            faults,
            drained.get("seconds"),
            drained.get("last", []),
            dict(states),
            self.folder,
            self.trouble,
        )

    def _read_complaints(self) -> None:
        """What workers said that no fault explains: errors of ours, and threads that did not end when asked to."""
        said: Counter[str] = Counter()
        for path in (*self.folder.glob("stderr-*.txt"), *self.folder.glob("soak_*.txt")):
            for line in path.read_bytes().decode("utf-8", "replace").splitlines():
                if line.startswith(_COMPLAINTS):
                    said[line[:160]] += 1
        for path in self.folder.glob("caller-*.jsonl"):
            for record in records(path):
                if record["e"] == "ended" and record["late"]:
                    said[f"{record['late']} caller(s) of a worker that was asked to end went on for 10 s"] += 1
        self.trouble += [f"{count} times: {line}" for line, count in said.most_common(20)]

    def _drain(self) -> dict[str, Any]:
        seconds = self.options.drain_seconds
        drain = self._help("soak_drain.py", str(self.folder), str(seconds))
        deadline = time.monotonic() + seconds + 60
        while drain.process.poll() is None and time.monotonic() < deadline:
            self._progress(self, 1.0)
            time.sleep(0.1)
        if drain.process.poll() is None:
            drain.process.send_signal(signal.SIGKILL)
            self.trouble.append("the last process did not end")
        drain.process.wait()
        drain._reader.join(5)
        drained = drain.last.get("drained", {})
        if not drained:
            self.trouble.append("the last process said nothing: see soak_drain.txt")
        return drained
