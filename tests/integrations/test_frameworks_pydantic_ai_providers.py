"""Pydantic AI with other providers than OpenAI: their real SDKs, a fake provider at the edge, the gate's books.

What is looked at is how their numbers become one meaning: Anthropic reports cached tokens beside the input, and the
input before there is an output; Gemini reports thoughts beside the candidates, on every chunk.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic_ai_agents import Bench, bench_fixture, pydantic_ai, scripted_fixture  # noqa: F401

from vluna_llm import call_context

WORDS = 6


class OtherProvider:
    """Speaks Anthropic's Messages and Gemini's ``generateContent``, plain and streamed. ``hangs`` stops it midway."""

    def __init__(self) -> None:
        self.hangs = False
        self.released = threading.Event()
        provider = self

        class Handler(_Handler):
            owner = provider

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> OtherProvider:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: OtherProvider

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        try:
            if self.path.startswith("/v1/messages"):
                self._answer(self._message_events() if body.get("stream") else self._message())
            else:
                self._answer(self._gemini_events() if "stream" in self.path else self._gemini("hello world", done=True))
        except OSError:
            pass  # the client has left

    def _answer(self, answer: dict[str, Any] | Iterator[str]) -> None:
        self.send_response(200)
        if isinstance(answer, dict):
            payload = json.dumps(answer).encode()
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)
            return
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for event in answer:
            self.wfile.write(event.encode())
            self.wfile.flush()

    def _words(self) -> Iterator[str]:
        for index in range(WORDS):
            if self.owner.hangs and index == 3:
                self.owner.released.wait(20)
                raise OSError
            time.sleep(0.01)
            yield f"word{index} "

    # Anthropic: 60 fresh tokens, 30 read from the cache, 10 written to it, 20 produced.

    def _message(self) -> dict[str, Any]:
        usage = {"input_tokens": 60, "cache_read_input_tokens": 30, "cache_creation_input_tokens": 10}
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude",
            "content": [{"type": "text", "text": "hello world"}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {**usage, "output_tokens": 20},
        }

    def _message_events(self) -> Iterator[str]:
        def event(kind: str, **members: Any) -> str:
            return f"event: {kind}\ndata: {json.dumps({'type': kind, **members})}\n\n"

        message = self._message()
        start = {**message, "content": [], "stop_reason": None, "usage": {**message["usage"], "output_tokens": 1}}
        yield event("message_start", message=start)
        yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        for word in self._words():
            yield event("content_block_delta", index=0, delta={"type": "text_delta", "text": word})
        yield event("content_block_stop", index=0)
        delta = {"stop_reason": "end_turn", "stop_sequence": None}
        yield event("message_delta", delta=delta, usage={"output_tokens": 20})
        yield event("message_stop")

    # Gemini: 100 prompt tokens of which 40 cached, 15 candidates and 5 thoughts.

    def _gemini(self, text: str, *, done: bool) -> dict[str, Any]:
        candidate: dict[str, Any] = {"content": {"role": "model", "parts": [{"text": text}]}, "index": 0}
        if done:
            candidate["finishReason"] = "STOP"
        usage = {"promptTokenCount": 100, "cachedContentTokenCount": 40, "candidatesTokenCount": 15}
        counts = {**usage, "thoughtsTokenCount": 5, "totalTokenCount": 120}
        return {"candidates": [candidate], "usageMetadata": counts, "modelVersion": "gemini", "responseId": "gem_1"}

    def _gemini_events(self) -> Iterator[str]:
        for index, word in enumerate(self._words()):
            yield f"data: {json.dumps(self._gemini(word, done=index == WORDS - 1))}\n\n"


@pytest.fixture
def other() -> Iterator[OtherProvider]:
    with OtherProvider() as provider:
        yield provider


def model_of(kind: str, other: OtherProvider) -> tuple[Any, Any]:
    """A model of Pydantic AI that asks the fake, and what has to be awaited when it is done with."""
    if kind == "anthropic":
        anthropic = pytest.importorskip("anthropic", reason="pip install 'pydantic-ai-slim[anthropic]'")
        models = pytest.importorskip("pydantic_ai.models.anthropic")
        providers = pytest.importorskip("pydantic_ai.providers.anthropic")
        client = anthropic.AsyncAnthropic(base_url=other.url, api_key="sk", max_retries=0)
        return models.AnthropicModel("claude", provider=providers.AnthropicProvider(anthropic_client=client)), client
    models = pytest.importorskip("pydantic_ai.models.google", reason="pip install 'pydantic-ai-slim[google]'")
    providers = pytest.importorskip("pydantic_ai.providers.google")
    return models.GoogleModel("gemini", provider=providers.GoogleProvider(api_key="sk", base_url=other.url)), None


FEATURES = {"anthropic": "anthropic.claude", "google": "google.gemini"}
KINDS = pytest.mark.parametrize("kind", FEATURES)


def run(bench: Bench, other: OtherProvider, kind: str, program: Any) -> None:
    async def main() -> None:
        model, client = model_of(kind, other)
        await program(bench.agent(model=model))
        if client is not None:
            await client.close()

    bench.run(main)


@KINDS
@pytest.mark.parametrize("streamed", [False, True], ids=["run", "streamed"])
def test_what_was_reported_is_charged(kind: str, streamed: bool, bench: Bench, other: OtherProvider) -> None:
    """Everything that the model read and produced, whatever stands beside what."""

    async def program(agent: Any) -> None:
        if not streamed:
            assert (await agent.run("hi")).output == "hello world"
            return
        async with agent.run_stream("hi") as result:
            assert len([part async for part in result.stream_text(debounce_by=None)]) > 3

    with call_context() as scope:
        run(bench, other, kind, program)
    assert bench.books() == [(FEATURES[kind], 120)]
    assert bench.leases() == ["closed"]
    usage = scope.usage
    assert (usage.input_tokens, usage.output_tokens) == (100, 20)
    if kind == "anthropic":
        assert (usage.cached_tokens, usage.cache_write_tokens) == (30, 10)
    else:
        assert usage.cached_tokens == 40


@KINDS
def test_a_stream_that_is_left(kind: str, bench: Bench, other: OtherProvider) -> None:
    """Anthropic's first report is neither final nor cumulative: cancelled. Gemini's are cumulative: charged."""
    other.hangs = True

    async def program(agent: Any) -> None:
        async with agent.run_stream("hi") as result:
            async for _ in result.stream_text(debounce_by=None):
                break

    run(bench, other, kind, program)
    assert bench.books() == ([] if kind == "anthropic" else [("google.gemini", 120)])
    assert bench.leases() == (["canceled"] if kind == "anthropic" else ["closed"])


@KINDS
def test_a_cancelled_task(kind: str, bench: Bench, other: OtherProvider) -> None:
    """The same, where the task is cancelled in the middle."""
    other.hangs = True

    async def program(agent: Any) -> None:
        async def work() -> None:
            async with agent.run_stream("hi") as result:
                await result.get_output()

        task = asyncio.create_task(work())
        await asyncio.sleep(0.7)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(bench, other, kind, program)
    assert bench.books() == ([] if kind == "anthropic" else [("google.gemini", 120)])
