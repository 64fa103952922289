"""An agent that uses a tool that costs money, streamed, with every call in the gate's books.

It runs as it is: a gate and a model of our own answer on this machine. ::

    pip install '.[langchain,sandbox]'
    python examples/langgraph_agent.py

With ``OPENAI_API_KEY`` set the real model is called, and with ``VLUNA_SERVICE_BASE_URL`` (and the three variables
beside it) the real gate is asked.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver

from vluna_llm import Vluna, call_context
from vluna_llm.integrations.langchain import VlunaMiddleware, wrap_model
from vluna_llm.sandbox import Sandbox

CUSTOMER = "customer_123"
QUESTION = "When is high water in Dover today?"


@tool
def tide_table(port: str) -> str:
    """Look up today's tides of a port."""
    return f"High water at {port}: 11:52 and 23:58."


def main() -> None:
    """Ask the agent, print its words as they come, then what they cost."""
    with ExitStack() as stack:
        vluna = stack.enter_context(a_gate())
        options = stack.enter_context(a_model())
        agent = create_agent(
            wrap_model(ChatOpenAI(model="gpt-4o-mini", **options), vluna),  # each model call is an operation
            [tide_table],
            middleware=[VlunaMiddleware(vluna, tools={"tide_table": "tools.tides"})],  # and each use of this tool
            checkpointer=InMemorySaver(),
        )
        asked = {"messages": [{"role": "user", "content": QUESTION}]}
        with call_context(principal_id=CUSTOMER) as scope:  # who pays
            for message, _ in agent.stream(asked, {"configurable": {"thread_id": "1"}}, stream_mode="messages"):
                if message.type == "AIMessageChunk" and message.text:
                    print(message.text, end="", flush=True)
            print()
        scope.wait(5)
        for receipt in scope.receipts:
            print(f"{receipt.feature_code}: {receipt.quantity} units, {receipt.charged_xusd} XUSD, {receipt.state}")
        print(f"{scope.settled_xusd} XUSD charged to {CUSTOMER}")


# -- everything below only stands in for what you have: a gate, and a model --------------------------------------------


@contextmanager
def a_gate() -> Iterator[Vluna]:
    """The gate of the environment, or one of our own."""
    if "VLUNA_SERVICE_BASE_URL" in os.environ:
        with Vluna() as vluna:
            yield vluna
        return
    with Sandbox() as gate:
        settings = {"base_url": gate.base_url, "realm_id": gate.realm_id}
        with Vluna(**settings, key_id=gate.key_id, key_secret=gate.key_secret, outbox="memory") as vluna:
            yield vluna


@contextmanager
def a_model() -> Iterator[dict[str, Any]]:
    """The options of the real model, or those of a scripted one."""
    if "OPENAI_API_KEY" in os.environ:
        yield {}
        return
    server = ThreadingHTTPServer(("127.0.0.1", 0), ScriptedModel)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield {"base_url": f"http://127.0.0.1:{server.server_address[1]}/v1", "api_key": "none"}
    finally:
        server.shutdown()
        server.server_close()


class ScriptedModel(BaseHTTPRequestHandler):
    """Calls the tool, then says what it answered; streamed, as OpenAI's chat API is."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        """Answer one request."""
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        last = asked["messages"][-1]
        deltas: list[dict[str, Any]]
        if last["role"] == "tool":
            deltas, finish = [{"content": word + " "} for word in last["content"].split()], "stop"
        else:
            call = {"name": "tide_table", "arguments": json.dumps({"port": "Dover"})}
            deltas, finish = [{"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": call}]}], ""
        events = [
            {"choices": [{"index": 0, "delta": {"role": "assistant", **delta}, "finish_reason": None}]}
            for delta in deltas
        ]
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish or "tool_calls"}]})
        if (asked.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 85, "completion_tokens": 16, "total_tokens": 101}
            events.append({"choices": [], "usage": usage})
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": asked["model"]}
        lines = [json.dumps({**head, **event}) for event in events]
        payload = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


if __name__ == "__main__":
    sys.exit(main())
