"""The OpenAI Agents SDK with a wrapped client: each model call is settled once."""

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

agents = pytest.importorskip("agents", reason="openai-agents is not installed: pip install openai-agents")


@pytest.fixture(autouse=True)
def _no_tracing() -> None:
    agents.set_tracing_disabled(True)


def agent(client: Any, *, responses: bool) -> Any:
    """An agent whose model is called through this client."""
    kind = agents.OpenAIResponsesModel if responses else agents.OpenAIChatCompletionsModel
    return agents.Agent(name="tester", model=kind(model="gpt-4o", openai_client=client))


@pytest.mark.parametrize("responses", [True, False], ids=["responses", "chat"])
@pytest.mark.parametrize("streamed", [False, True], ids=["run", "streamed"])
def test_a_run_is_settled_once(responses: bool, streamed: bool, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """Run and streamed, on both APIs."""

    async def main() -> str:
        client = vluna.wrap(openai.AsyncOpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))
        runner = agents.Runner
        if streamed:
            result = runner.run_streamed(agent(client, responses=responses), "hi")
            async for _ in result.stream_events():
                pass
        else:
            result = await runner.run(agent(client, responses=responses), "hi")
        await client.close()
        return str(result.final_output)

    outputs: list[str] = []
    bill: Bill = billed(vluna, lambda: outputs.append(asyncio.run(main())))
    bill.booked_once()
    assert outputs[0].strip() in ("hello world", " ".join(f"word{index}" for index in range(12)))


def test_a_cancelled_streamed_run_is_settled_once(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """``result.cancel()`` in the middle of the answer."""
    provider.behaviour = "hang"

    async def main() -> None:
        client = vluna.wrap(openai.AsyncOpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))
        result = agents.Runner.run_streamed(agent(client, responses=True), "hi")
        async for event in result.stream_events():
            if event.type == "raw_response_event":
                result.cancel()
        await client.close()

    bill: Bill = billed(vluna, lambda: asyncio.run(main()))
    bill.cancelled_once()


def test_an_incomplete_response_is_booked(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """The framework raises out of an answer that was spent."""
    provider.behaviour = "incomplete"

    async def main() -> None:
        client = vluna.wrap(openai.AsyncOpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))
        result = agents.Runner.run_streamed(agent(client, responses=True), "hi")
        with pytest.raises(agents.AgentsException):
            async for _ in result.stream_events():
                pass
        await client.close()

    bill: Bill = billed(vluna, lambda: asyncio.run(main()))
    bill.booked_once()


@pytest.mark.parametrize("responses", [True, False], ids=["responses", "chat"])
def test_a_refusal_reaches_the_product(responses: bool, make_vluna: Any, provider: Provider) -> None:
    """`GateDenied` passes through the framework as it is."""

    async def main(vluna: Vluna) -> None:
        bare = openai.AsyncOpenAI(base_url=provider.base_url, api_key="sk", max_retries=2)
        client = vluna.bind(bare, principal_id="broke")
        with pytest.raises(GateDenied):
            await agents.Runner.run(agent(client, responses=responses), "hi")
        await client.close()

    with Sandbox() as gate:
        gate.set_credit("broke", 0)
        vluna = make_vluna(gate)
        asyncio.run(main(vluna))
        vluna.close()
    assert provider.requests == []
