"""A provider that can hold a thousand streams open at once; how much each one used depends on its number."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WORDS = 8


def tokens_of(n: int) -> tuple[int, int]:
    """Input and output tokens of stream ``n``."""
    return 100 + n, 20 + n % 13


class StreamsProvider:
    """Answers chat completions with event streams. All wait after the first word until ``together`` have begun."""

    def __init__(self, together: int) -> None:
        self._together = together
        self.begun = 0
        self.most_at_once = 0
        self.open_now = 0
        self.sent_whole: set[int] = set()
        self._all_here: asyncio.Event | None = None
        self.port = 0

    @property
    def base_url(self) -> str:
        """What an SDK is given."""
        return f"http://127.0.0.1:{self.port}/v1"

    @contextmanager
    def running(self) -> Iterator[StreamsProvider]:
        """Serve on a thread of its own."""
        loop = asyncio.new_event_loop()

        async def start() -> asyncio.Server:
            self._all_here = asyncio.Event()
            return await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=4096)

        server = loop.run_until_complete(start())
        self.port = server.sockets[0].getsockname()[1]
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(server.close)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = int(head.split("content-length:")[1].split("\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                await self._stream(int(head.split("x-n:")[1].split("\r\n")[0]), body, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _stream(self, n: int, body: Any, writer: asyncio.StreamWriter) -> None:
        assert self._all_here is not None
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        self.begun += 1
        self.open_now += 1
        self.most_at_once = max(self.most_at_once, self.open_now)
        if self.begun >= self._together:
            self._all_here.set()
        try:
            for word in range(WORDS):
                await _send(writer, _chunk(n, {"content": f"word{word} "}))
                await self._all_here.wait()
                await asyncio.sleep(0.002)
            await _send(writer, _chunk(n, {}, finish="stop"))
            if body.get("stream_options", {}).get("include_usage"):
                given, made = tokens_of(n)
                usage = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
                await _send(writer, {**_chunk(n, {}), "choices": [], "usage": usage})
            await _send(writer, None)
            writer.write(b"0\r\n\r\n")
            await writer.drain()
            self.sent_whole.add(n)
        finally:
            self.open_now -= 1


def _chunk(n: int, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {
        "id": f"chatcmpl-{n}",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt-4o-mini-2024-07-18",
        "choices": [choice],
    }


async def _send(writer: asyncio.StreamWriter, event: dict[str, Any] | None) -> None:
    data = f"data: {'[DONE]' if event is None else json.dumps(event)}\n\n".encode()
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    await writer.drain()
