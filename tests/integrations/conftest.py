"""What the integration tests share: a provider, a gate, and both colours of one program.

A test program is written once, as a coroutine that takes either client: `ask` awaits what has to be awaited, `each`
iterates what has to be iterated. So sync and async are never copied by hand.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the OpenAI SDK is not installed: pip install 'vluna-llm[openai]'")
pytest.importorskip("uvicorn", reason="the embedded gate is not installed: pip install 'vluna-llm[sandbox]'")

sys.path.insert(0, str(Path(__file__).parent))

import openai
from provider import Provider
from upstream import Upstream

from vluna_llm import Scope, Vluna, call_context
from vluna_llm.sandbox import Sandbox
from vluna_llm.types import Receipt

_customers = itertools.count(1)


@pytest.fixture(scope="session")
def shared_gate() -> Iterator[Sandbox]:
    """One embedded gate for all tests that do not change it; every test has customers of its own."""
    with Sandbox() as gate:
        yield gate


@pytest.fixture(scope="session")
def _provider() -> Iterator[Provider]:
    with Upstream() as provider:
        yield provider


@pytest.fixture
def provider(_provider: Provider) -> Provider:
    """The provider, well-behaved, with nothing asked of it yet."""
    _provider.behaviour = "ok"
    _provider.encoding = "identity"
    _provider.pause = 0.02
    _provider.requests.clear()
    _provider.flaked.clear()
    _provider.responses.clear()
    _provider.released.set()
    _provider.released.clear()
    return _provider


MakeVluna = Callable[..., Vluna]


@pytest.fixture
def make_vluna(shared_gate: Sandbox) -> Iterator[MakeVluna]:
    """Makes metering against the shared gate; closed after the test."""
    made: list[Vluna] = []

    def make(gate: Sandbox = shared_gate, **settings: Any) -> Vluna:
        vluna = Vluna(
            base_url=gate.base_url,
            realm_id=gate.realm_id,
            key_id=gate.key_id,
            key_secret=gate.key_secret,
            outbox="memory",
            **settings,
        )
        made.append(vluna)
        return vluna

    yield make
    for vluna in made:
        vluna.close()


@pytest.fixture
def vluna(make_vluna: MakeVluna) -> Vluna:
    """Metering with the default settings."""
    return make_vluna()


@pytest.fixture
def customer() -> str:
    """A customer whom no other test knows."""
    return f"customer_{next(_customers)}"


@pytest.fixture(params=["sync", "async"])
def colour(request: pytest.FixtureRequest, provider: Provider) -> Colour:
    """Sync or async."""
    return Colour(request.param == "async", provider)


@pytest.fixture(params=["sync", "async"])
def claude(request: pytest.FixtureRequest, provider: Provider) -> Colour:
    """Sync or async, of Anthropic's client."""
    from claude import Claude  # where its SDK is installed

    return Claude(request.param == "async", provider)


@dataclass
class Colour:
    """One of the two clients, and how to run a program with it."""

    is_async: bool
    provider: Provider

    def bare(self, **options: Any) -> Any:
        """An unwrapped client."""
        kind = openai.AsyncOpenAI if self.is_async else openai.OpenAI
        options = {"base_url": self.provider.base_url, "api_key": "sk-test", "max_retries": 0, **options}
        return kind(**options)

    def run(self, program: Callable[[Any], Awaitable[Any]], client: Any) -> Any:
        """Run the program with this client, in a loop of its own, and close the client."""

        async def main() -> Any:
            try:
                return await program(client)
            finally:
                await ask(client.close())

        return asyncio.run(main())


async def ask(value: Any) -> Any:
    """The value, awaited where it has to be."""
    return await value if inspect.isawaitable(value) else value


async def each(stream: Any) -> AsyncIterator[Any]:
    """All items of a sync or async iterable."""
    if hasattr(stream, "__aiter__"):
        async for item in stream:
            yield item
    else:
        for item in stream:
            yield item


@asynccontextmanager
async def entered(manager: Any) -> AsyncIterator[Any]:
    """A sync or async context manager."""
    if hasattr(manager, "__aenter__"):
        async with manager as value:
            yield value
    else:
        with manager as value:
            yield value


async def gone() -> None:
    """What was dropped is collected, and what its collection scheduled has run."""
    for _ in range(3):
        gc.collect()
        await asyncio.sleep(0.01)


async def cancelled(work: Callable[[], Any], after: float = 0.15) -> None:
    """Run it in a task of its own, and cancel that after a moment."""
    task = asyncio.create_task(work())
    await asyncio.sleep(after)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@dataclass
class Bill:
    """What came of one program: the receipts, and what the gate itself has written down."""

    receipts: list[Receipt]
    gate: Sandbox
    principal_id: str

    @property
    def only(self) -> Receipt:
        """The one receipt there must be."""
        assert len(self.receipts) == 1, self.receipts
        return self.receipts[0]

    def booked_once(self, quantity: int = 120, *, source: str = "provider") -> Receipt:
        """Exactly one lease was taken and committed, with these tokens."""
        receipt = self.only
        entries = self.gate.booked(self.principal_id).entries
        assert [(entry.kind, entry.status, entry.quantity) for entry in entries] == [("commit", "applied", quantity)]
        assert [lease.state for lease in self.gate.leases(self.principal_id)] == ["closed"]
        assert (receipt.state, receipt.quantity, receipt.usage_source) == ("booked", quantity, source)
        return receipt

    def booked_an_estimate(self) -> Receipt:
        """Exactly one commit, labelled as an estimate."""
        receipt = self.booked_once(self.only.quantity, source="estimated")
        assert receipt.quantity > 0
        (entry,) = self.gate.booked(self.principal_id).entries
        assert entry.labels["usage_source"] == "estimated"
        return receipt

    def cancelled_once(self) -> None:
        """Exactly one lease was taken and given back; nothing was charged."""
        assert self.only.state in ("cancelled", "lapsed"), self.receipts
        assert self.gate.booked(self.principal_id).entries == ()
        assert [lease.state for lease in self.gate.leases(self.principal_id)] == ["canceled"]

    def nothing(self) -> None:
        """The gate was not asked for anything."""
        assert self.receipts == []
        assert self.gate.booked(self.principal_id).entries == ()
        assert self.gate.leases(self.principal_id) == []


@pytest.fixture
def billed(shared_gate: Sandbox, customer: str) -> Callable[[Vluna, Callable[[], Any]], Bill]:
    """Runs something for one customer, waits until it is settled, and gives the bill."""

    def run(vluna: Vluna, work: Callable[[], Any]) -> Bill:
        with call_context(principal_id=customer) as scope:
            work()
        return settled(vluna, scope, shared_gate, customer)

    return run


def settled(vluna: Vluna, scope: Scope, gate: Sandbox, principal_id: str) -> Bill:
    """Wait until nothing is owed any more."""
    assert scope.wait(10), "an operation was never settled"
    assert vluna.flush(10)
    return Bill(scope.receipts, gate, principal_id)


def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
