"""The other side, each in a process of its own: the embedded gate, and a provider that answers as fast as it can.

``python -m benchmarks.servers gate|provider`` prints one line of JSON when it serves, obeys one line of JSON at a time
on standard input, and ends with its input.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPT_TOKENS, OUTPUT_TOKENS = 900, 200
MODEL = "gpt-4o-mini"
_WORDS = ("the", " model", " answers", " in", " small", " pieces", ",", " one", " token", " at", " a", " time", ".")

_COUNTS = {
    "prompt_tokens": PROMPT_TOKENS,
    "completion_tokens": OUTPUT_TOKENS,
    "total_tokens": PROMPT_TOKENS + OUTPUT_TOKENS,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}


# -- the provider ------------------------------------------------------------------------------------------------------


@functools.cache
def stream_pieces(chunks: int, usage: bool) -> tuple[bytes, ...]:
    """A Chat Completions stream of ``chunks`` chunks for the caller, one HTTP chunk for each event.

    With ``usage`` each carries ``"usage":null`` and one more chunk carries the numbers, as OpenAI does when asked.
    """
    dice = random.Random(7)
    head = (
        '{"id":"chatcmpl-0123456789abcdefghijklmnopqrs","object":"chat.completion.chunk","created":1790000000,'
        '"model":"gpt-4o-mini-2024-07-18","service_tier":"default","system_fingerprint":"fp_0123456789","choices":'
    )

    def event(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        rest = ',"usage":null' if usage else ""
        pad = "x" * dice.randint(1, 14)
        return f'{head}{json.dumps([choice], separators=(",", ":"))}{rest},"obfuscation":"{pad}"}}'

    events = [event({"role": "assistant", "content": "", "refusal": None})]
    events += [event({"content": dice.choice(_WORDS)}) for _ in range(chunks - 2)]
    events.append(event({}, "stop"))
    if usage:
        events.append(f'{head}[],"usage":{json.dumps(_COUNTS, separators=(",", ":"))}}}')
    events.append("[DONE]")
    return tuple(_http_chunk(f"data: {text}\n\n".encode()) for text in events)


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n"
    b"x-request-id: req_0123456789\r\n\r\n"
)
_END = b"0\r\n\r\n"


@functools.cache
def _whole_stream(chunks: int, usage: bool) -> bytes:
    return _HEAD + b"".join(stream_pieces(chunks, usage)) + _END


@functools.cache
def _whole_answer() -> bytes:
    dice = random.Random(7)
    words = "".join(dice.choice(_WORDS) for _ in range(OUTPUT_TOKENS))
    message = {"role": "assistant", "content": words, "refusal": None, "annotations": []}
    body = {
        "id": "chatcmpl-0123456789abcdefghijklmnopqrs",
        "object": "chat.completion",
        "created": 1790000000,
        "model": "gpt-4o-mini-2024-07-18",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": _COUNTS,
        "service_tier": "default",
        "system_fingerprint": "fp_0123456789",
    }
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def _serve_caller(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer ``POST /<chunks>/<milliseconds to the first byte>/<milliseconds between>/v1/chat/completions``."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            target, *lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            chunks, first, between = (int(part) for part in target.split(" ")[1].split("/")[1:4])
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            if first:
                await asyncio.sleep(first / 1000)
            if not body.get("stream"):
                writer.write(_whole_answer())
            elif not between:
                writer.write(_whole_stream(chunks, usage))
            else:
                writer.write(_HEAD)
                for piece in stream_pieces(chunks, usage):
                    writer.write(piece)
                    await asyncio.sleep(between / 1000)
                writer.write(_END)
            await writer.drain()
    writer.close()


async def _provider() -> None:
    server = await asyncio.start_server(_serve_caller, "127.0.0.1", 0, backlog=2048)
    _tell({"port": server.sockets[0].getsockname()[1]})
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    await ended.wait()
    os._exit(0)  # callers that are still connected are nobody's concern


# -- the gate ----------------------------------------------------------------------------------------------------------


def _gate() -> None:
    from vluna_llm.sandbox import Sandbox

    with Sandbox(defaults={"credit_xusd": 10**15}) as gate:
        _tell(gate.env())
        for line in sys.stdin:
            order = json.loads(line)
            if "authorize_latency" in order:
                gate.faults.clear()
                if order["authorize_latency"]:
                    gate.faults.add("latency", "authorize", times=None, seconds=order["authorize_latency"])
                _tell({})
            elif "away" in order:
                gate.stop() if order["away"] else gate.start()
                _tell({})
            else:
                entries = [e for e in gate.booked().entries if e.principal_id.startswith(order["booked"])]
                _tell(
                    {
                        "applied": sum(entry.status == "applied" for entry in entries),
                        "quarantined": sum(entry.status != "applied" for entry in entries),
                        "quantity": sum(entry.quantity for entry in entries),
                        "by_ingest": sum(entry.kind == "ingest" for entry in entries),
                    }
                )


# -- the measuring process's view --------------------------------------------------------------------------------------


def _tell(message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class _Process:
    def __init__(self, kind: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.servers", kind],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.told: dict[str, Any] = {}

    def wait_until_ready(self) -> None:
        self.told = self._answer()

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        self._process.communicate(timeout=20)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a server of the benchmark ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class World:
    """Gate and provider, and a directory for journals."""

    gate: _Process
    provider: _Process
    directory: Path
    _made: int = field(default=0)

    def base_url(self, *, chunks: int, first_ms: int = 0, between_ms: int = 0) -> str:
        """The provider that behaves like this."""
        return f"http://127.0.0.1:{self.provider.told['port']}/{chunks}/{first_ms}/{between_ms}/v1"

    def settings(self, **settings: Any) -> dict[str, Any]:
        """What a `Vluna` needs to know: the gate, and a journal on disk."""
        env = self.gate.told
        self._made += 1
        return {
            "base_url": env["VLUNA_SERVICE_BASE_URL"],
            "realm_id": env["VLUNA_REALM_ID"],
            "key_id": env["VLUNA_SERVICE_KEY_ID"],
            "key_secret": env["VLUNA_SERVICE_KEY_SECRET"],
            "outbox": str(self.directory / str(self._made)),
            **settings,
        }


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Both servers, started and stopped."""
    with tempfile.TemporaryDirectory(prefix="vluna-llm-bench-") as directory, contextlib.ExitStack() as stack:
        gate, provider = _Process("gate"), _Process("provider")
        stack.callback(gate.stop)
        stack.callback(provider.stop)
        gate.wait_until_ready()
        provider.wait_until_ready()
        yield World(gate, provider, Path(directory))


if __name__ == "__main__":
    if sys.argv[1] == "gate":
        _gate()
    else:
        asyncio.run(_provider())
