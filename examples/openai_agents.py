"""A run of the OpenAI Agents SDK, gated and billed: turns, a tool that is sold, a handoff to a larger model, streamed.

    python examples/openai_agents.py           # with scripted answers and an embedded gate: no key, no account
    python examples/openai_agents.py --live    # with your OPENAI_API_KEY and your gate (VLUNA_SERVICE_BASE_URL, ...)

It needs ``pip install '.[agents,sandbox]'`` in this checkout.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import Any

from agents import Agent, ModelProvider, OpenAIProvider, RunConfig, Runner, function_tool
from openai import AsyncOpenAI
from scripted_openai import ScriptedOpenAI

from vluna_llm import Vluna
from vluna_llm.errors import GateDenied
from vluna_llm.integrations.openai_agents import VlunaModelProvider, VlunaRunHooks, gated_tool
from vluna_llm.sandbox import Sandbox


@dataclass
class Customer:
    """The application's own idea of who is served; the run's context object."""

    account: str
    name: str


def payer(customer: Customer) -> dict[str, str]:
    """Who pays for a run, by its context object."""
    return {"principal_id": customer.account, "end_user": customer.name}


def make_agents(vluna: Vluna) -> Agent[Customer]:
    """The first of two agents; the second is reached by a handoff."""

    @gated_tool(feature_code="tools.order_search", estimate=1, vluna=vluna)
    @function_tool
    async def search_orders(customer_name: str) -> str:
        """Search the orders of a customer."""
        return f"Order 1042 of {customer_name}: a brass lantern, sent on Monday, in customs since Wednesday."

    writer = Agent[Customer](
        name="writer", model="gpt-4o", instructions="Write a kind letter of three sentences about what was found."
    )
    return Agent[Customer](
        name="clerk",
        model="gpt-4o-mini",
        instructions="Look the customer's orders up, then hand over to the writer.",
        tools=[search_orders],
        handoffs=[writer],
    )


async def answer(vluna: Vluna, models: ModelProvider | None, customer: Customer) -> None:
    """One run for one customer, its text as it comes."""
    result = Runner.run_streamed(
        make_agents(vluna),
        f"{customer.name} asks: where is my lantern?",
        context=customer,
        hooks=VlunaRunHooks(),
        run_config=RunConfig(model_provider=VlunaModelProvider(vluna, models, identity=payer), tracing_disabled=True),
    )
    try:
        async for event in result.stream_events():
            if event.type == "agent_updated_stream_event":
                say(f"[{event.new_agent.name}] ")
            elif event.type == "run_item_stream_event" and event.name == "tool_called":
                say("looks the orders up ... ")
            elif event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                say(event.data.delta)
        say("\n")
    except GateDenied as denied:
        say(f"refused for {customer.name}: {denied.reason}; no model was called\n")


def say(text: str) -> None:
    """Print what has come so far."""
    sys.stdout.write(text)
    sys.stdout.flush()


def script(body: dict[str, Any]) -> str | tuple[str, dict[str, Any]]:
    """What the models say."""
    if body["model"] == "gpt-4o":
        return (
            "Your lantern left on Monday. It has been with customs since Wednesday. We are sorry that it takes so long."
        )
    searched = any(item.get("type") == "function_call_output" for item in body["input"])
    return ("transfer_to_writer", {}) if searched else ("search_orders", {"customer_name": "Ada"})


def main() -> None:
    """Serve one customer who has credit and, where the gate is ours, one who has none; then show the gate's books."""
    ada, bob = Customer("customer_1", "Ada"), Customer("customer_2", "Bob")
    if "--live" in sys.argv:
        asyncio.run(live(ada))
        return
    with Sandbox() as gate, ScriptedOpenAI(script) as provider:
        gate.set_credit(bob.account, 0)
        asyncio.run(scripted(gate, provider.base_url, [ada, bob]))
        for entry in sorted(gate.booked(ada.account).entries, key=lambda one: one.rated_at):
            say(f"{entry.feature:20} {entry.quantity:5} {entry.charged_xusd:7} XUSD\n")
        for customer in (ada, bob):
            say(f"{customer.name} pays {gate.booked(customer.account).charged_xusd} XUSD\n")


async def live(customer: Customer) -> None:
    """Settings and keys from the environment."""
    async with Vluna() as vluna:
        await answer(vluna, None, customer)


async def scripted(gate: Sandbox, base_url: str, customers: list[Customer]) -> None:
    """The embedded gate, and a provider of our own."""
    key = {"realm_id": gate.realm_id, "key_id": gate.key_id, "key_secret": gate.key_secret}
    async with (
        Vluna(base_url=gate.base_url, outbox="memory", **key) as vluna,
        AsyncOpenAI(base_url=base_url, api_key="none") as client,
    ):
        for customer in customers:
            await answer(vluna, OpenAIProvider(openai_client=client), customer)


if __name__ == "__main__":
    main()
