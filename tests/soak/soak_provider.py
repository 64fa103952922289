"""A fake of OpenAI's chat completions, in a process of its own: the outside witness of what was generated for whom.

Started as ``python soak_provider.py FOLDER SEED``; prints its port. Its log says which request arrived (``arrived``)
and which got its answer with its usage (``sent``, on the disk before the answer's last bytes leave). A request says how
it wants to be treated in ``x-soak-plan``: ``ok``, ``silent`` (no usage), ``held`` (never an end), ``cut``, ``flaky``
(first a 500); and who it is in ``x-soak-request``.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from soak_wire import Message, answer, listen, obey, read_message, reset, say
from soak_words import MODEL, Log, Tokens

_WORDS = ("the", "light", "turns", "and", "ships", "go", "by", "all", "night")


class SyncedLog:
    """A log whose writers share the waiting for the disk."""

    def __init__(self, path: Path) -> None:
        self._log = Log(path)
        self._waiting: list[asyncio.Future[None]] = []
        self._running = False

    def note(self, record: dict[str, Any]) -> None:
        self._log.write(record)

    async def write(self, record: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        self._log.write(record)
        future = loop.create_future()
        self._waiting.append(future)
        if not self._running:
            self._running = True
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                await loop.run_in_executor(None, self._log.sync)
                for each in waiting:
                    each.set_result(None)
            self._running = False
        await future


class Provider:
    """Answers chat completions and remembers."""

    def __init__(self, log: SyncedLog, seed: int) -> None:
        self._log, self._random = log, random.Random(seed)
        self._answers = 0
        self._flaked: set[str] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (request := await read_message(reader)) is not None:
            if not await self._answer(request, reader, writer):
                return

    async def _answer(self, request: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        who, plan = request.header("x-soak-request") or "?", request.header("x-soak-plan") or "ok"
        body = json.loads(request.body)
        self._log.note({"e": "arrived", "r": who})
        if plan == "flaky" and who not in self._flaked:
            self._flaked.add(who)
            writer.write(answer(500, b'{"error":{"message":"internal","type":"server_error"}}'))
            await writer.drain()
            return True
        self._answers += 1
        response_id = f"chatcmpl-{self._answers}-{who}"
        usage = None if plan == "silent" else self._usage()
        if body.get("stream"):
            return await self._stream(who, plan, response_id, usage, body, reader, writer)
        await asyncio.sleep(self._random.uniform(0, 0.1))
        if plan == "cut":
            reset(writer)
            return False
        done: dict[str, Any] = {
            "id": response_id,
            "object": "chat.completion",
            "created": 1,
            "model": MODEL,
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": " ".join(_WORDS)}, "finish_reason": "stop"}
            ],
        }
        if usage is not None:
            done["usage"] = _wire(usage)
        await self._log.write(_sent(who, response_id, usage))
        writer.write(answer(200, json.dumps(done).encode()))
        await writer.drain()
        return True

    async def _stream(
        self,
        who: str,
        plan: str,
        response_id: str,
        usage: Tokens | None,
        body: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        writer.write(b"HTTP/1.1 200 .\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        pause = self._random.choice((0.0, 0.005, 0.03))
        async for event in self._words(response_id):
            _chunk(writer, event)
            await writer.drain()
            await asyncio.sleep(pause)
        if plan == "cut":
            reset(writer)
            return False
        if plan == "held":
            await asyncio.wait_for(reader.read(1), 30)  # until the caller is gone
            return False
        await self._log.write(_sent(who, response_id, usage))
        _chunk(writer, _event(response_id, [{"index": 0, "delta": {}, "finish_reason": "stop"}]))
        if usage is not None and (body.get("stream_options") or {}).get("include_usage"):
            _chunk(writer, {**_event(response_id, []), "usage": _wire(usage)})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()
        return True

    async def _words(self, response_id: str) -> AsyncIterator[dict[str, Any]]:
        for n in range(self._random.randint(3, 10)):
            delta = {"content": _WORDS[n % len(_WORDS)] + " "}
            yield _event(response_id, [{"index": 0, "delta": delta, "finish_reason": None}])

    def _usage(self) -> Tokens:
        """Counts that hardly any other answer has."""
        read = self._random.randint(20, 60_000)
        cached = self._random.choice((0, self._random.randint(1, read)))
        return Tokens(read, cached, self._random.randint(3, 9_000))


def _event(response_id: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": response_id, "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": choices}


def _wire(usage: Tokens) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input,
        "completion_tokens": usage.output,
        "total_tokens": usage.total,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def _sent(who: str, response_id: str, usage: Tokens | None) -> dict[str, Any]:
    counts = None if usage is None else [usage.input, usage.cached, usage.output]
    return {"e": "sent", "r": who, "id": response_id, "u": counts}


def _chunk(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    data = b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


async def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    done, loop = asyncio.Event(), asyncio.get_running_loop()
    server, port = await listen(Provider(SyncedLog(folder / "provider.jsonl"), seed).serve)
    obey(lambda message: loop.call_soon_threadsafe(done.set) and None)
    say({"said": "ready", "port": port})
    await done.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
