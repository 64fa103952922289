"""What the LangChain tests share: models against the tests' provider, and an upstream that follows a script.

`HttpModel` is what an application writes for a provider that has no package: the SDK clients that are metered are not
in it, so it is settled by its messages.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

pytest.importorskip("langchain_openai", reason="LangChain is not installed: pip install 'vluna-llm[langchain]'")

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI

_loop = asyncio.new_event_loop()


def run(coroutine: Any) -> Any:
    """Run it in the loop of all tests: LangChain shares its HTTP clients among models, and they stay in their loop."""
    return _loop.run_until_complete(coroutine)


def openai_model(base_url: str, model: str = "gpt-4o", **options: Any) -> Any:
    """LangChain's own model, bare."""
    return ChatOpenAI(model=model, api_key="sk", base_url=base_url, max_retries=0, **options)


class SyncHttpModel(BaseChatModel):
    """A model of an application's own: it speaks HTTP itself, and knows no async."""

    base_url: str
    model: str = "own-1"
    stream_usage: bool = False

    @property
    def _llm_type(self) -> str:
        return "own"

    def _get_ls_params(self, stop: Any = None, **kwargs: Any) -> Any:
        return {"ls_provider": "own", "ls_model_name": self.model, "ls_model_type": "chat"}

    def _body(self, messages: Any, **more: Any) -> dict[str, Any]:
        said = [{"role": message.type, "content": message.content} for message in messages]
        return {"model": self.model, "messages": said, **more}

    def _streamed(self, messages: Any, usage: bool) -> dict[str, Any]:
        return self._body(messages, stream=True, **({"stream_options": {"include_usage": True}} if usage else {}))

    def _url(self) -> str:
        return f"{self.base_url}/chat/completions"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        return _result(httpx.post(self._url(), json=self._body(messages), timeout=30))

    def _stream(
        self,
        messages: Any,
        stop: Any = None,
        run_manager: Any = None,
        *,
        stream_usage: bool | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        usage = self.stream_usage if stream_usage is None else stream_usage
        with httpx.stream("POST", self._url(), json=self._streamed(messages, usage), timeout=30) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if (chunk := _chunk(line)) is not None:
                    yield chunk


class HttpModel(SyncHttpModel):
    """The same with its own async methods."""

    async def _agenerate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        async with httpx.AsyncClient(timeout=30) as client:
            return _result(await client.post(self._url(), json=self._body(messages)))

    async def _astream(
        self,
        messages: Any,
        stop: Any = None,
        run_manager: Any = None,
        *,
        stream_usage: bool | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        body = self._streamed(messages, self.stream_usage if stream_usage is None else stream_usage)
        async with (
            httpx.AsyncClient(timeout=30) as client,
            client.stream("POST", self._url(), json=body) as response,
        ):
            response.raise_for_status()
            async for line in response.aiter_lines():
                if (chunk := _chunk(line)) is not None:
                    yield chunk


def _usage(said: Any) -> Any:
    if not said:
        return None
    return {
        "input_tokens": said["prompt_tokens"],
        "output_tokens": said["completion_tokens"],
        "total_tokens": said["total_tokens"],
        "input_token_details": {"cache_read": said["prompt_tokens_details"]["cached_tokens"]},
        "output_token_details": {"reasoning": said["completion_tokens_details"]["reasoning_tokens"]},
    }


def _result(response: httpx.Response) -> ChatResult:
    response.raise_for_status()
    answer = response.json()
    metadata = {"id": answer["id"], "model_name": answer["model"]}
    message = AIMessage(
        content=answer["choices"][0]["message"]["content"],
        usage_metadata=_usage(answer.get("usage")),
        response_metadata=metadata,
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def _chunk(line: str) -> ChatGenerationChunk | None:
    if not line.startswith("data: {"):
        return None
    event = json.loads(line[6:])
    usage = _usage(event.get("usage"))
    if not event["choices"]:
        return ChatGenerationChunk(message=AIMessageChunk(content="", usage_metadata=usage)) if usage else None
    choice = event["choices"][0]
    info = {"finish_reason": choice["finish_reason"]} if choice["finish_reason"] else None
    message = AIMessageChunk(content=choice["delta"].get("content") or "", usage_metadata=usage, id=event["id"])
    return ChatGenerationChunk(message=message, generation_info=info)


class Upstream:
    """A small HTTP server; ``asked`` has the bodies that came. With ``holds`` its answers stop after 1,000 bytes."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.holds = False
        self.released = threading.Event()
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                """Quiet."""

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                upstream.asked.append(body)
                content_type, payload = upstream.answer(body)
                self.send_response(200)
                self.send_header("content-type", content_type)
                self.send_header("content-length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload[:1000] if upstream.holds else payload)
                if upstream.holds:
                    self.wfile.flush()
                    upstream.released.wait(20)
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def host(self) -> str:
        """Scheme and address."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def base_url(self) -> str:
        """What an SDK is given."""
        return f"{self.host}/v1"

    def close(self) -> None:
        """Serve no more."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, body: dict[str, Any]) -> tuple[str, bytes]:
        """Content type and body of an answer."""
        raise NotImplementedError


class Messages(Upstream):
    """Anthropic's API: cached tokens stand beside the input there, which makes 100 in and 20 out."""

    def answer(self, body: dict[str, Any]) -> tuple[str, bytes]:
        """Whole, or as events."""
        start = {"input_tokens": 50, "cache_read_input_tokens": 40, "cache_creation_input_tokens": 10}
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "content": []}
        if not body.get("stream"):
            said = {"content": [{"type": "text", "text": "hello world"}], "stop_reason": "end_turn"}
            usage = {**start, "output_tokens": 20}
            return "application/json", json.dumps({**message, **said, "usage": usage}).encode()
        events: list[dict[str, Any]] = [
            {"type": "message_start", "message": {**message, "usage": {**start, "output_tokens": 1}}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            *(
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": f"word{n} "}}
                for n in range(12)
            ),
            {"type": "content_block_stop", "index": 0},
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                "usage": {**start, "output_tokens": 20},
            },
            {"type": "message_stop"},
        ]
        return "text/event-stream", "".join(
            f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events
        ).encode()


class Script(Upstream):
    """An upstream of OpenAI's chat API whose model calls each tool once, in their order, and then answers.

    ``INPUT`` and ``OUTPUT`` are the tokens of each call.
    """

    INPUT, OUTPUT = 30, 7

    def answer(self, body: dict[str, Any]) -> tuple[str, bytes]:
        """Content type and body."""
        answered = sum(message["role"] == "tool" for message in body["messages"])
        tools = body.get("tools") or []
        if answered < len(tools):
            call = {"name": tools[answered]["function"]["name"], "arguments": json.dumps({"what": "tides"})}
            delta: dict[str, Any] = {
                "content": None,
                "tool_calls": [{"id": f"call_{answered}", "type": "function", "function": call}],
            }
            finish = "tool_calls"
        else:
            delta, finish = {"content": "The tide turns at noon."}, "stop"
        head = {"id": "chatcmpl-2", "created": 1, "model": f"{body['model']}-2026-01-01"}
        total = self.INPUT + self.OUTPUT
        usage = {"prompt_tokens": self.INPUT, "completion_tokens": self.OUTPUT, "total_tokens": total}
        if not body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", **delta}, "finish_reason": finish}
            return "application/json", json.dumps(
                {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
            ).encode()
        for call in delta.get("tool_calls", ()):
            call["index"] = 0
        events: list[Any] = [
            {"choices": [{"index": 0, "delta": {"role": "assistant", **delta}, "finish_reason": None}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]},
        ]
        if (body.get("stream_options") or {}).get("include_usage"):
            events.append({"choices": [], "usage": usage})
        lines = [json.dumps({**head, "object": "chat.completion.chunk", **event}) for event in events]
        return "text/event-stream", "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()
