"""Pydantic AI with a wrapped client: each model call is settled once."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from conftest import Bill
from provider import Provider

from vluna_llm import Vluna
from vluna_llm.errors import GateDenied
from vluna_llm.sandbox import Sandbox

pydantic_ai = pytest.importorskip(
    "pydantic_ai", reason="Pydantic AI is not installed: pip install 'pydantic-ai-slim[openai]'"
)
models = pytest.importorskip("pydantic_ai.models.openai", reason="pip install 'pydantic-ai-slim[openai]'")
providers = pytest.importorskip("pydantic_ai.providers.openai", reason="pip install 'pydantic-ai-slim[openai]'")


def agent(client: Any, *, responses: bool) -> Any:
    """An agent whose model is called through this client."""
    kind = models.OpenAIResponsesModel if responses else models.OpenAIChatModel
    return pydantic_ai.Agent(kind("gpt-4o", provider=providers.OpenAIProvider(openai_client=client)))


def wrapped(vluna: Vluna, provider: Provider) -> Any:
    return vluna.wrap(openai.AsyncOpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))


APIS = pytest.mark.parametrize("responses", [True, False], ids=["responses", "chat"])


@APIS
@pytest.mark.parametrize("streamed", [False, True], ids=["run", "streamed"])
def test_a_run_is_settled_once(responses: bool, streamed: bool, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """Run and streamed, on both APIs."""

    async def main() -> None:
        client = wrapped(vluna, provider)
        tester = agent(client, responses=responses)
        if streamed:
            async with tester.run_stream("hi") as result:
                assert len([part async for part in result.stream_text(debounce_by=None)]) > 5
        else:
            await tester.run("hi")
        await client.close()

    bill: Bill = billed(vluna, lambda: asyncio.run(main()))
    bill.booked_once()


@APIS
def test_leaving_a_stream_is_settled_once(responses: bool, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """The consumer breaks off inside the context."""
    provider.behaviour = "hang"

    async def main() -> None:
        client = wrapped(vluna, provider)
        async with agent(client, responses=responses).run_stream("hi") as result:
            async for _ in result.stream_text(debounce_by=None):
                break
        await client.close()

    bill: Bill = billed(vluna, lambda: asyncio.run(main()))
    bill.cancelled_once()


def test_a_cancelled_run_is_settled_once(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """The task is cancelled before the provider answers."""
    provider.behaviour = "silent"

    async def main() -> None:
        client = wrapped(vluna, provider)
        task = asyncio.create_task(agent(client, responses=False).run("hi"))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.close()

    bill: Bill = billed(vluna, lambda: asyncio.run(main()))
    bill.cancelled_once()


@APIS
def test_a_refusal_reaches_the_product(responses: bool, make_vluna: Any, provider: Provider) -> None:
    """`GateDenied` passes through the framework as it is."""

    async def main(vluna: Vluna) -> None:
        bare = openai.AsyncOpenAI(base_url=provider.base_url, api_key="sk", max_retries=2)
        client = vluna.bind(bare, principal_id="broke")
        with pytest.raises(GateDenied):
            await agent(client, responses=responses).run("hi")
        await client.close()

    with Sandbox() as gate:
        gate.set_credit("broke", 0)
        vluna = make_vluna(gate)
        asyncio.run(main(vluna))
        vluna.close()
    assert provider.requests == []
