"""What the agents' tests share: runs against the scripted provider, and what the gate's own books say of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from agent_provider import QUANTITY, AgentProvider
from conftest import settled

from vluna_llm import Vluna, call_context
from vluna_llm.sandbox import Sandbox

agents = pytest.importorskip("agents", reason="openai-agents is not installed: pip install 'vluna-llm[agents]'")

from vluna_llm.integrations.openai_agents import VlunaModelProvider


@dataclass
class Bench:
    """A metering, a provider and a gate."""

    vluna: Vluna
    upstream: AgentProvider
    gate: Sandbox
    customer: str
    responses: bool = True

    def client(self, **options: Any) -> Any:
        """A bare client of the provider."""
        return openai.AsyncOpenAI(**{"base_url": self.upstream.base_url, "api_key": "sk", "max_retries": 0, **options})

    def bare(self, **options: Any) -> Any:
        """The SDK's own provider, unmetered."""
        return agents.OpenAIProvider(openai_client=self.client(**options), use_responses=self.responses)

    def config(self, inner: Any = None, identity: Any = None, **options: Any) -> Any:
        """A run's configuration with our provider."""
        provider = VlunaModelProvider(self.vluna, inner or self.bare(), identity=identity)
        return agents.RunConfig(model_provider=provider, tracing_disabled=True, **options)

    def bill(self, work: Callable[[], Awaitable[Any]], customer: str | None = None) -> Books:
        """Do it for the customer, wait until all is settled, and give the books."""
        with call_context(principal_id=customer or self.customer) as scope:
            asyncio.run(_main(work))
        settled(self.vluna, scope, self.gate, customer or self.customer)
        return self.books(customer)

    def books(self, customer: str | None = None) -> Books:
        """What the gate has written down for the customer."""
        name = customer or self.customer
        entries = self.gate.booked(name).entries
        assert all(entry.kind == "commit" and entry.status == "applied" for entry in entries), entries
        assert all(entry.quantity == QUANTITY or entry.feature.startswith("tools.") for entry in entries), entries
        return Books([entry.feature for entry in entries], [lease.state for lease in self.gate.leases(name)])


@dataclass
class Books:
    """The features that were charged, and how each lease ended, oldest first."""

    charged: list[str]
    leases: list[str]

    def are(self, *charged: str, canceled: int = 0) -> None:
        """These and no others were charged, each by a lease of its own; so many leases were given back."""
        assert (sorted(self.charged), sorted(self.leases)) == (
            sorted(charged),
            ["canceled"] * canceled + ["closed"] * len(charged),
        )


async def _main(work: Callable[[], Awaitable[Any]]) -> None:
    await work()
    # What runs on in the background belongs to the run.
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=10)


async def run(agent: Any, config: Any, prompt: Any = "hi", *, streamed: bool = False, **options: Any) -> Any:
    """The run's result, with all its events read."""
    if not streamed:
        return await agents.Runner.run(agent, prompt, run_config=config, **options)
    result = agents.Runner.run_streamed(agent, prompt, run_config=config, **options)
    async for _ in result.stream_events():
        pass
    return result


@pytest.fixture(scope="session")
def _upstream() -> Iterator[AgentProvider]:
    with AgentProvider() as provider:
        yield provider


@pytest.fixture
def upstream(_upstream: AgentProvider) -> AgentProvider:
    """The scripted provider, with nothing asked of it yet."""
    _upstream.behaviour = "ok"
    _upstream.pause = 0.02
    _upstream.says()
    _upstream.requests.clear()
    _upstream.flaked.clear()
    _upstream.responses.clear()
    _upstream.released.set()
    _upstream.released.clear()
    return _upstream


@pytest.fixture
def bench(vluna: Vluna, upstream: AgentProvider, shared_gate: Sandbox, customer: str) -> Bench:
    """With the gate that all share, and the Responses API."""
    agents.set_tracing_disabled(True)
    return Bench(vluna, upstream, shared_gate, customer)


@pytest.fixture(params=[True, False], ids=["responses", "chat"])
def both(bench: Bench, request: pytest.FixtureRequest) -> Bench:
    """`bench`, with either API."""
    bench.responses = request.param
    return bench


@pytest.fixture(params=[False, True], ids=["run", "streamed"])
def streamed(request: pytest.FixtureRequest) -> bool:
    """``Runner.run``, or ``Runner.run_streamed``."""
    return request.param is True


@pytest.fixture
def own_gate() -> Iterator[Sandbox]:
    """A gate for a test that changes it."""
    with Sandbox() as gate:
        yield gate
