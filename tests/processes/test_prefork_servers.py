"""Real servers with many workers, killed and recycled under load: every answer that was seen is charged once.

What counts is outside of our code: what the provider was asked, what the clients of the server saw to its end, and the
gate's own books. Each request has a number that goes to all three.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import Program, eventually, files

pytest.importorskip("openai", reason="the OpenAI SDK is not installed: pip install 'vluna-llm[openai]'")

from provider import Provider

from vluna_llm import Vluna
from vluna_llm.sandbox import Sandbox

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="servers that fork")]


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as running:
        yield running


class Server:
    """A server that runs, and the clients that ask it."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                cwd=Path(__file__).parent,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        found: list[re.Match[str]] = []

        def listens() -> bool:
            found.extend(re.finditer(r"(?:Listening at:|running on) http://127\.0\.0\.1:(\d+)", self.log()))
            return bool(found) or self.process.poll() is not None

        assert eventually(listens, 20)
        assert found, self.log()
        self.port = int(found[0][1])
        self.answered: dict[str, int] = {}
        self.workers: set[int] = set()
        self._asked = iter(range(1, 1_000_000))
        self._guard = threading.Lock()
        self._stop = False

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def ask(self) -> bool:
        """One request; False where no whole answer came."""
        with self._guard:
            n = str(next(self._asked))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", f"/?n={n}")
            answer = connection.getresponse()
            worker = int(answer.read())
            assert answer.status == 200
        except (OSError, http.client.HTTPException, ValueError, AssertionError):
            return False
        finally:
            connection.close()
        with self._guard:
            self.answered[n] = worker
            self.workers.add(worker)
        return True

    def load(self, seconds: float, clients: int, kill_every: float | None) -> int:
        """Ask without a pause from so many clients, and kill a worker now and then; gives how many were killed."""

        def client() -> None:
            while not self._stop:
                if not self.ask():
                    time.sleep(0.01)

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        until, killed, dice = time.monotonic() + seconds, 0, random.Random(7)
        while time.monotonic() < until:
            time.sleep(kill_every or 0.1)
            with self._guard:
                living = [worker for worker in self.workers if _lives(worker)]
            if kill_every and living:
                victim = dice.choice(sorted(living))
                with self._guard:
                    self.workers.discard(victim)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                    killed += 1
        self._stop = True
        for thread in threads:
            thread.join(40)
        return killed

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(30)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(5)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


@pytest.fixture
def serve(program: Program, provider: Provider, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(*command: str, **environment: str) -> Server:
        made.append(
            Server(
                [sys.executable, "-m", *command],
                program.environment(PROVIDER=provider.base_url, PYTHONUNBUFFERED="1", **environment),
                tmp_path / f"server_{len(made)}.log",
            )
        )
        return made[-1]

    yield start
    for server in made:
        server.kill()


def books_agree(gate: Sandbox, provider: Provider, server: Server, *, unseen: int, also: tuple[str, ...] = ()) -> None:
    """All that was seen is charged once; what was not seen at most once, and at most ``unseen`` of it."""
    charged = Counter(entry.labels["n"] for entry in gate.booked().entries if entry.charged_xusd > 0)
    sent = Counter(seen.headers["x-n"] for seen in provider.posts())
    seen = {*server.answered, *also}
    print(f"asked {len(sent)}, seen {len(seen)}, charged {len(charged)}, most often {max(charged.values())}")
    assert len(seen) > 50
    assert set(sent.values()) == {1}
    assert set(charged.values()) == {1}, "doubled"
    assert seen <= set(charged), "acknowledged and not charged"
    assert set(charged) <= set(sent), "charged for nothing"
    assert len(set(sent) - seen) <= unseen
    assert {entry.quantity for entry in gate.booked().entries} == {120}


@pytest.mark.parametrize(("kind", "threads"), [("sync", 1), ("gthread", 3)])
def test_gunicorn_with_eight_workers_that_are_killed_and_recycled(
    gate: Sandbox,
    provider: Provider,
    serve: Callable[..., Server],
    program: Program,
    heir: Callable[[], Vluna],
    kind: str,
    threads: int,
) -> None:
    """The application is loaded before the fork and was used there: ``--preload``, with our threads in the parent."""
    pytest.importorskip("gunicorn", reason="gunicorn is not installed: pip install 'vluna-llm[dev]'")
    server = serve(
        *("gunicorn", "--preload", "--workers", "8", "--worker-class", kind, "--threads", str(threads)),
        *("--max-requests", "30", "--max-requests-jitter", "15", "--graceful-timeout", "10"),
        *("--bind", "127.0.0.1:0", "prefork_app:application"),
        WARM="1",
    )
    killed = server.load(5.0, clients=8, kill_every=0.4)
    assert killed >= 6
    assert server.stop() == 0
    # A connection to a worker that is recycled or killed breaks at times: what it was about was maybe not seen.
    vluna = heir()
    assert eventually(lambda: vluna.flush(1), 20)
    books_agree(gate, provider, server, unseen=threads * killed + 10, also=("warm",))
    lost = vluna._running().ledger.journal.rows("lost")
    assert len(lost) <= threads * killed
    print(f"killed {killed}, lost in flight {len(lost)}")
    assert all(row.state.usage is None for row in lost)
    said = server.log()
    assert "Traceback" not in said
    assert "internal_error" not in said


@pytest.mark.parametrize("closes", [True, False])
def test_uvicorn_with_workers_that_are_stopped(
    gate: Sandbox,
    provider: Provider,
    serve: Callable[..., Server],
    program: Program,
    heir: Callable[[], Vluna],
    closes: bool,
) -> None:
    """uvicorn ends itself by the signal that stopped it, so that nothing runs at exit: a lifespan that closes pays.

    Without it nothing is lost either; what was not delivered yet waits for the next process.
    """
    server = serve(
        *("uvicorn", "--workers", "2", "--port", "0", "--factory", "prefork_app:asgi"),
        **({"CLOSES": "1"} if closes else {}),
    )
    assert eventually(server.ask, 20)
    gate.faults.add("latency", "commits", times=None, seconds=0.05)
    server.load(1.5, clients=6, kill_every=None)
    server.stop()
    if closes:
        assert files(program.outbox) == []
    else:
        heir()
    books_agree(gate, provider, server, unseen=6)
