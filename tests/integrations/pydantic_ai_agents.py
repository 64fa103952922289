"""What the tests of Pydantic AI share: a scripted provider, models that ask it, agents, and the gate's books."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from scripted_chat import ScriptedProvider

from vluna_llm import Vluna, call_context
from vluna_llm.sandbox import Sandbox

pydantic_ai = pytest.importorskip(
    "pydantic_ai", reason="Pydantic AI is not installed: pip install 'pydantic-ai-slim[openai]'"
)
models = pytest.importorskip("pydantic_ai.models.openai", reason="pip install 'pydantic-ai-slim[openai]'")
providers = pytest.importorskip("pydantic_ai.providers.openai", reason="pip install 'pydantic-ai-slim[openai]'")
integration = pytest.importorskip("vluna_llm.integrations.pydantic_ai", reason="pip install 'vluna-llm[pydantic-ai]'")

VlunaCapability = integration.VlunaCapability
VlunaModel = integration.VlunaModel

WAYS = ("capability", "model", "both", "with_metered_client")


@dataclass
class Bench:
    """Makes models and agents for one test, and knows what the gate has booked for its customer."""

    vluna: Vluna
    gate: Sandbox
    provider: ScriptedProvider
    customer: str
    _clients: list[Any] = field(default_factory=list)

    def client(self) -> Any:
        client = openai.AsyncOpenAI(base_url=self.provider.base_url, api_key="sk", max_retries=0)
        self._clients.append(client)
        return client

    def model(self, name: str = "gpt-4o", *, client: Any = None, responses: bool = False) -> Any:
        kind = models.OpenAIResponsesModel if responses else models.OpenAIChatModel
        return kind(name, provider=providers.OpenAIProvider(openai_client=client or self.client()))

    def agent(self, way: str = "capability", *, responses: bool = False, **options: Any) -> Any:
        """An agent that is metered in one of the ways; whoever `deps` names pays, else the surrounding context."""
        client = self.vluna.wrap(self.client()) if way == "with_metered_client" else None
        model = options.pop("model", None) or self.model(client=client, responses=responses)
        if way in ("model", "both"):
            model = VlunaModel(model, self.vluna)
        capabilities = [] if way == "model" else [self.capability()]
        return pydantic_ai.Agent(model, deps_type=str, name="tester", capabilities=capabilities, **options)

    def capability(self, **options: Any) -> Any:
        options.setdefault("identity", lambda ctx: {"principal_id": ctx.deps} if ctx.deps else None)
        return VlunaCapability(self.vluna, **options)

    def run(self, program: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run the program in a loop of its own, for the customer, and wait until everything is settled."""

        async def main() -> None:
            try:
                with call_context(principal_id=self.customer):
                    await program()
            finally:
                for client in self._clients:
                    await client.close()

        asyncio.run(main())
        assert self.vluna.flush(10)

    def books(self, customer: str | None = None) -> list[tuple[str, int]]:
        """What was charged, as (feature, quantity), in the gate's order."""
        entries = self.gate.booked(customer or self.customer).entries
        assert all(entry.status == "applied" for entry in entries)
        return [(entry.feature, entry.quantity) for entry in entries]

    def leases(self, customer: str | None = None) -> list[str]:
        return [lease.state for lease in self.gate.leases(customer or self.customer)]

    def labels(self) -> list[dict[str, Any]]:
        return [dict(entry.labels) for entry in self.gate.booked(self.customer).entries]

    def charged(self, times: int, customer: str | None = None) -> None:
        """So many model requests were asked for and charged in full, and nothing else was asked."""
        assert self.books(customer) == [("openai.gpt-4o", 120)] * times
        assert self.leases(customer) == ["closed"] * times

    def cancelled(self, times: int = 1) -> None:
        """So many leases were taken and given back; nothing was charged."""
        assert self.books() == []
        assert self.leases() == ["canceled"] * times


@pytest.fixture(name="scripted")
def scripted_fixture() -> Iterator[ScriptedProvider]:
    with ScriptedProvider() as provider:
        yield provider


@pytest.fixture(name="bench")
def bench_fixture(vluna: Vluna, shared_gate: Sandbox, scripted: ScriptedProvider, customer: str) -> Bench:
    return Bench(vluna, shared_gate, scripted, customer)
