"""A support agent of Pydantic AI, billed to whoever asks: a tool that is sold by itself, and two turns, one streamed.

Runs as it is, without any account or key: against the embedded gate, and a model of a few lines in this file that says
what a script holds. With ``OPENAI_API_KEY`` and the gate's variables (``VLUNA_SERVICE_BASE_URL``, ...) set it asks the
real ones. It needs ``pip install '.[pydantic-ai,openai,sandbox]'``, and Pydantic AI's own extra ``openai``.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
from pydantic_ai import Agent, RunContext
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from vluna_llm import Scope, Settings, Vluna, call_context
from vluna_llm.errors import GateDenied
from vluna_llm.integrations.pydantic_ai import VlunaCapability
from vluna_llm.sandbox import Sandbox

MODEL = "gpt-4o-mini"
ORDERS = {"7": "left the warehouse this morning"}


@dataclass
class Customer:
    """What the application knows of who is asking."""

    customer_id: str
    name: str


def support_agent(vluna: Vluna, client: openai.AsyncOpenAI) -> Agent[Customer, str]:
    """The agent: the capability is all that billing needs."""
    agent = Agent(
        OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client)),
        deps_type=Customer,
        name="support",
        instructions="You help customers of a small shop. Look up orders before you speak of them.",
        capabilities=[
            VlunaCapability(
                vluna,
                identity=lambda ctx: {"principal_id": ctx.deps.customer_id, "end_user": ctx.deps.name},
                tools={"order_status": "tools.order_status"},
            )
        ],
    )

    @agent.tool
    def order_status(ctx: RunContext[Customer], order_id: str) -> str:
        """Where an order is."""
        return ORDERS.get(order_id, "unknown")

    return agent


async def conversation(agent: Agent[Customer, str], customer: Customer) -> Scope:
    """Two turns; gives what they cost."""
    with call_context() as scope:
        first = await agent.run("Where is my order 7?", deps=customer)
        print(f"{customer.name}: {first.output}")
        async with agent.run_stream(
            "And when is it here?", deps=customer, message_history=first.all_messages()
        ) as second:
            print(f"{customer.name}: ", end="")
            async for piece in second.stream_text(delta=True):
                print(piece, end="", flush=True)
            print()
    await scope.wait_async(10)
    return scope


async def main(vluna: Vluna, base_url: str | None, customers: list[Customer]) -> None:
    """Each customer asks; who has no credit is told so before the model is."""
    async with vluna, openai.AsyncOpenAI(base_url=base_url) as client:
        agent = support_agent(vluna, client)
        for customer in customers:
            try:
                scope = await conversation(agent, customer)
            except GateDenied as denied:
                print(f"{customer.name}: not answered ({denied.reason}). {denied.advice}")
                continue
            for receipt in scope.receipts:
                print(f"  {receipt.feature_code}: {receipt.quantity} for {receipt.charged_xusd} XUSD")
            print(f"  together {scope.settled_xusd} XUSD")


# -- a model without a key ---------------------------------------------------------------------------------------------


class _ScriptedModel(BaseHTTPRequestHandler):
    """Speaks as much of OpenAI's Chat Completions as this example needs. A fake: it says the same to everybody."""

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        answers = sum(message["role"] == "assistant" for message in body["messages"])
        usage = {"prompt_tokens": 60 + 20 * answers, "completion_tokens": 12, "total_tokens": 72 + 20 * answers}
        head = {"id": f"chatcmpl-{answers}", "created": 1, "model": body["model"]}
        if answers == 0:
            call = {"id": "call_1", "type": "function"}
            call["function"] = {"name": "order_status", "arguments": '{"order_id": "7"}'}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
            self._whole({**head, "usage": usage}, message, "tool_calls")
        elif not body.get("stream"):
            text = "Your order has left the warehouse this morning."
            self._whole({**head, "usage": usage}, {"role": "assistant", "content": text}, "stop")
        else:
            self._stream(head, ["It ", "comes ", "tomorrow."], usage)

    def _whole(self, head: dict[str, object], message: dict[str, object], finish: str) -> None:
        choice = {"index": 0, "message": message, "finish_reason": finish}
        self._send("application/json", json.dumps({**head, "object": "chat.completion", "choices": [choice]}))

    def _stream(self, head: dict[str, object], pieces: list[str], usage: dict[str, int]) -> None:
        chunks: list[dict[str, object]] = [
            {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces
        ]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        chunks.append({"choices": [], "usage": usage})
        events = [json.dumps({**head, "object": "chat.completion.chunk", **chunk}) for chunk in chunks]
        self._send("text/event-stream", "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]))

    def _send(self, content_type: str, text: str) -> None:
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@contextmanager
def scripted_model() -> Iterator[str]:
    """Serves the model on this machine; gives its base URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _ScriptedModel)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def run_here() -> None:
    """Everything on this machine."""
    os.environ.setdefault("OPENAI_API_KEY", "none")
    customers = [Customer("customer_1", "Ann"), Customer("customer_2", "Bob")]
    with Sandbox() as gate, scripted_model() as base_url:
        gate.set_credit("customer_2", 0)
        settings = Settings(
            base_url=gate.base_url,
            realm_id=gate.realm_id,
            key_id=gate.key_id,
            key_secret=gate.key_secret,
            outbox="memory",
        )
        asyncio.run(main(Vluna(settings), base_url, customers))
        print(f"The gate has charged Ann {gate.booked('customer_1').charged_xusd} XUSD and Bob nothing.")


if __name__ == "__main__":
    if "VLUNA_SERVICE_BASE_URL" in os.environ and "OPENAI_API_KEY" in os.environ:
        asyncio.run(main(Vluna(), None, [Customer("customer_1", "Ann")]))
    else:
        run_here()
