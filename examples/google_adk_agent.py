"""Two agents of Google ADK, billed to whoever asks: a tool that is sold, a handoff to a larger model, streamed.

    python examples/google_adk_agent.py           # with scripted answers and an embedded gate: no key, no account
    python examples/google_adk_agent.py --live    # with your GOOGLE_API_KEY and your gate (VLUNA_SERVICE_BASE_URL, ...)

It needs ``pip install '.[google-adk,sandbox]'`` in this checkout.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.adk.agents import LlmAgent
from google.adk.agents.run_config import RunConfig, StreamingMode
from google.adk.apps import App
from google.adk.models import Gemini
from google.adk.runners import InMemoryRunner
from google.genai import types

from vluna_llm import Vluna
from vluna_llm.errors import GateDenied
from vluna_llm.integrations.google_adk import VlunaPlugin
from vluna_llm.sandbox import Sandbox

CUSTOMERS = {"ada": "customer_1", "bob": "customer_2"}
"""The application's users, and the customers of ours who pay for them."""


def search_orders(customer_name: str) -> str:
    """Search the orders of a customer."""
    return f"Order 1042 of {customer_name}: a brass lantern, sent on Monday, in customs since Wednesday."


def shop(vluna: Vluna, options: dict[str, Any]) -> App:
    """The application: the plugin is all that billing needs."""
    writer = LlmAgent(
        name="writer",
        model=Gemini(model="gemini-2.5-pro", client_kwargs=options),
        description="Writes letters to customers.",
        instruction="Write a kind letter of three sentences about what was found.",
    )
    clerk = LlmAgent(
        name="clerk",
        model=Gemini(model="gemini-2.5-flash", client_kwargs=options),
        instruction="Look the customer's orders up, then hand over to the writer.",
        tools=[search_orders],
        sub_agents=[writer],
    )
    billing = VlunaPlugin(
        vluna,
        identity=lambda ctx: {"principal_id": CUSTOMERS[ctx.user_id], "end_user": ctx.user_id},
        tools={"search_orders": "tools.order_search"},
    )
    return App(name="shop", root_agent=clerk, plugins=[billing])


async def answer(runner: InMemoryRunner, user: str) -> None:
    """One question of one user, the answer as it comes."""
    session = await runner.session_service.create_session(app_name="shop", user_id=user)
    question = types.Content(role="user", parts=[types.Part(text="Where is my lantern?")])
    streamed = RunConfig(streaming_mode=StreamingMode.SSE)
    say(f"{user} asks. ")
    try:
        async for event in runner.run_async(
            user_id=user, session_id=session.id, new_message=question, run_config=streamed
        ):
            for part in event.content.parts or [] if event.content else []:
                if part.function_call and not event.partial:
                    say(f"[{event.author}: {part.function_call.name}] ")
                elif part.text and event.partial:
                    say(part.text)
        say("\n")
    except GateDenied as denied:
        say(f"Refused: {denied.reason}; no model was called\n")


def say(text: str) -> None:
    """Print what has come so far."""
    sys.stdout.write(text)
    sys.stdout.flush()


# -- models without a key ----------------------------------------------------------------------------------------------


class _ScriptedGemini(BaseHTTPRequestHandler):
    """Streams as much of Gemini's API as this example needs. A fake: it says the same to everybody."""

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        answers = sum(content["role"] == "model" for content in body["contents"])
        if "gemini-2.5-pro" in self.path:
            letter = "Your lantern left on Monday. It has been with customs since Wednesday. We are sorry for the wait."
            parts: list[dict[str, Any]] = [{"text": f"{word} "} for word in letter.split()]
        elif answers == 0:
            parts = [{"functionCall": {"name": "search_orders", "args": {"customer_name": "Ada"}}}]
        else:
            parts = [{"functionCall": {"name": "transfer_to_agent", "args": {"agent_name": "writer"}}}]
        read, written = 80 + 30 * answers, 4 * len(parts)
        usage = {"promptTokenCount": read, "candidatesTokenCount": written, "totalTokenCount": read + written}
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for number, part in enumerate(parts, start=1):
            candidate: dict[str, Any] = {"index": 0, "content": {"role": "model", "parts": [part]}}
            last = number == len(parts)
            chunk = {"candidates": [{**candidate, "finishReason": "STOP"} if last else candidate]}
            data = json.dumps({**chunk, "usageMetadata": usage} if last else chunk)
            self.wfile.write(f"data: {data}\r\n\r\n".encode())
            self.wfile.flush()


@contextmanager
def scripted_gemini() -> Iterator[dict[str, Any]]:
    """Serves the models on this machine; gives the options by which ADK's client asks them."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _ScriptedGemini)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    here = types.HttpOptions(base_url=f"http://127.0.0.1:{server.server_address[1]}")
    try:
        yield {"api_key": "none", "http_options": here}
    finally:
        server.shutdown()
        server.server_close()


# -- the program -------------------------------------------------------------------------------------------------------


logging.getLogger("google_adk").setLevel(logging.CRITICAL)  # it logs whatever ends a run, with its traceback


async def serve(vluna: Vluna, options: dict[str, Any], users: list[str]) -> None:
    """Serve one user after the other."""
    async with vluna, InMemoryRunner(app=shop(vluna, options)) as runner:
        for user in users:
            await answer(runner, user)


def main() -> None:
    """Serve a user who has credit and, where the gate is ours, one who has none; then show the gate's books."""
    if "--live" in sys.argv:
        asyncio.run(serve(Vluna(), {}, ["ada"]))
        return
    with Sandbox() as gate, scripted_gemini() as options:
        gate.set_credit(CUSTOMERS["bob"], 0)
        key = {"realm_id": gate.realm_id, "key_id": gate.key_id, "key_secret": gate.key_secret}
        asyncio.run(serve(Vluna(base_url=gate.base_url, outbox="memory", **key), options, list(CUSTOMERS)))
        for entry in gate.booked(CUSTOMERS["ada"]).entries:
            say(f"{entry.feature:25} {entry.labels['agent']:6} {entry.quantity:4} {entry.charged_xusd:6} XUSD\n")
        for user, customer in CUSTOMERS.items():
            say(f"{user} pays {gate.booked(customer).charged_xusd} XUSD\n")


if __name__ == "__main__":
    main()
