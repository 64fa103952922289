"""What the agents' tests share: runs against the scripted provider, and what the gate's own books say of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import agents
import openai
from agent_provider import QUANTITY, AgentProvider
from conftest import settled

from vluna_llm import Vluna, call_context
from vluna_llm.integrations.openai_agents import VlunaModelProvider
from vluna_llm.sandbox import Sandbox


@dataclass
class Bench:
    """A metering, a provider and a gate."""

    vluna: Vluna
    upstream: AgentProvider
    gate: Sandbox
    customer: str
    responses: bool = True
    clients: list[Any] = field(default_factory=list)

    def client(self, **options: Any) -> Any:
        """A bare client of the provider, closed at the end of the work."""
        options = {"base_url": self.upstream.base_url, "api_key": "sk", "max_retries": 0, **options}
        self.clients.append(openai.AsyncOpenAI(**options))
        return self.clients[-1]

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
            self.do(work)
        settled(self.vluna, scope, self.gate, customer or self.customer)
        return self.books(customer)

    def do(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Do it for nobody in particular."""
        return asyncio.run(_main(work, self.clients))

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


async def _main(work: Callable[[], Awaitable[Any]], clients: list[Any]) -> Any:
    try:
        return await work()
    finally:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:  # what runs on in the background belongs to the run
            await asyncio.wait(others, timeout=10)
        for client in clients:
            await client.close()
        clients.clear()


async def run(agent: Any, config: Any, prompt: Any = "hi", *, streamed: bool = False, **options: Any) -> Any:
    """The run's result, with all its events read."""
    if not streamed:
        return await agents.Runner.run(agent, prompt, run_config=config, **options)
    result = agents.Runner.run_streamed(agent, prompt, run_config=config, **options)
    async for _ in result.stream_events():
        pass
    return result
