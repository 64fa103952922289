"""A model provider on this machine that streams scripted answers as OpenAI's Responses API does: for examples."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[dict[str, Any]], "str | tuple[str, dict[str, Any]]"]
"""From a request's body to its answer: a text, or the name and the arguments of a tool to call."""


class ScriptedOpenAI:
    """``with ScriptedOpenAI(script) as provider``: an SDK is given ``provider.base_url`` and any key."""

    def __init__(self, script: Script) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                for number, event in enumerate(events(body, script(body))):
                    data = json.dumps({**event, "sequence_number": number})
                    self.wfile.write(f"event: {event['type']}\ndata: {data}\n\n".encode())
                    self.wfile.flush()

            def log_message(self, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ScriptedOpenAI:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def events(body: dict[str, Any], answer: str | tuple[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The events of one answer; a token is four characters, and half of a longer conversation is cached."""
    item: dict[str, Any]
    if isinstance(answer, str):
        text = {"type": "output_text", "text": answer, "annotations": [], "logprobs": []}
        item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [text]}
        pieces = [word + " " for word in answer.split(" ")]
        kind, length = "response.output_text.delta", len(answer)
    else:
        name, arguments = answer
        pieces = [json.dumps(arguments)]
        call = {"call_id": f"call_{len(body['input'])}", "name": name, "arguments": pieces[0], "status": "completed"}
        item = {"type": "function_call", "id": "fc_1", **call}
        kind, length = "response.function_call_arguments.delta", len(pieces[0]) + len(name)
    read, written = len(json.dumps(body)) // 4, -(-length // 4)
    usage = {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": read // 2 if len(body["input"]) > 1 else 0, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }
    response = {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": body["model"],
        "status": "in_progress",
        "output": [],
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
        "usage": None,
    }
    yield {"type": "response.created", "response": response}
    yield {"type": "response.output_item.added", "output_index": 0, "item": item}
    for piece in pieces:
        extra = {"content_index": 0, "logprobs": []} if isinstance(answer, str) else {}
        yield {"type": kind, "item_id": item["id"], "output_index": 0, "delta": piece, **extra}
    yield {"type": "response.output_item.done", "output_index": 0, "item": item}
    done = {**response, "status": "completed", "output": [item], "usage": usage}
    yield {"type": "response.completed", "response": done}
