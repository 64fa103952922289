"""The road between the workers and the gate, and what happens on it: a fault proxy in a process of its own.

Started as ``python soak_proxy.py GATE_PORT SEED RATE``; prints its port. Told on its standard input: ``calm`` (from now
on nothing goes wrong), ``quit``.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from typing import Any

from soak_wire import Message, answer, listen, obey, read_message, reset, say

_FAULTS: tuple[tuple[str, float], ...] = (
    ("dropped before the gate", 3),
    ("reset before the gate", 2),
    ("502", 1),
    ("503", 2),
    ("504", 1),
    ("delayed", 6),
    ("answer lost", 4),
    ("answer reset in the middle", 4),
    ("504 although processed", 2),
    ("slower than the time-out", 1),
    ("delivered twice", 4),
    ("delivered long after its 504", 2),
    ("answer in crumbs", 3),
)
_TOO_MANY = b'{"ok":false,"code":"LIMIT.RATE_EXCEEDED","message":"rate limit exceeded","meta":{"status":429}}'
_STORM_EVERY, _STORM_SECONDS = 18.0, 1.0
_OUTAGE_EVERY, _OUTAGE_SECONDS = 10.0, 2.0


class Proxy:
    """Forwards whole requests, and lets about ``rate`` of them meet an accident."""

    def __init__(self, gate_port: int, seed: int, rate: float) -> None:
        self._gate_port, self._random, self._rate = gate_port, random.Random(seed), rate
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._later: set[asyncio.Task[Any]] = set()
        self.counts: Counter[str] = Counter()
        self.calm = False
        self._storm = self._outage = (0.0, 0.0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a worker."""
        while (request := await read_message(reader)) is not None:
            if not await self._handle(request, writer):
                return

    async def weather(self) -> None:
        """Storms of 429 and short outages, every so often."""
        while True:
            await asyncio.sleep(0.1)
            now = time.monotonic()
            if now > self._storm[1] and self._random.random() < 0.1 / _STORM_EVERY:
                self._storm = (now, now + self._random.expovariate(1 / _STORM_SECONDS))
            if now > self._outage[1] and self._random.random() < 0.1 / _OUTAGE_EVERY:
                self._outage = (now, now + self._random.expovariate(1 / _OUTAGE_SECONDS))

    async def _handle(self, request: Message, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False where the connection is over."""
        now = time.monotonic()
        fault = None
        if not self.calm:
            if self._outage[0] <= now < self._outage[1]:
                self.counts["outage"] += 1
                reset(writer)
                return False
            if self._storm[0] <= now < self._storm[1] and self._random.random() < 0.8:
                self.counts["429"] += 1
                body = (
                    b'{"ok":false,"code":"LIMIT.RATE_EXCEEDED","message":"rate limit exceeded","meta":{"status":429}}'
                )
                return await self._send(writer, answer(429, body, retry_after="1"))
            if self._random.random() < self._rate:
                fault = self._random.choices([name for name, _ in _FAULTS], [weight for _, weight in _FAULTS])[0]
                self.counts[fault] += 1
        if fault is not None:
            return await self._accident(fault, request, writer)
        return await self._send(writer, await self._forward(request))

    async def _accident(self, fault: str, request: Message, writer: asyncio.StreamWriter) -> bool:
        chance = self._random
        if fault == "dropped before the gate":
            return False
        if fault == "reset before the gate":
            reset(writer)
            return False
        if fault in ("502", "503", "504"):
            return await self._send(writer, answer(int(fault), b"<html>upstream</html>", "text/html"))
        if fault == "delayed":
            await asyncio.sleep(chance.uniform(0.05, 0.8))
            return await self._send(writer, await self._forward(request))
        if fault == "delivered long after its 504":
            self._in_background(self._deliver_later(request, chance.uniform(0.3, 5.0)))
            return await self._send(writer, answer(504, b"<html>upstream</html>", "text/html"))
        got = await self._forward(request)
        if fault == "answer lost":
            return False
        if fault == "answer reset in the middle":
            writer.write(got[: chance.randrange(len(got))])
            await writer.drain()
            await asyncio.sleep(0.005)  # a reset must not overtake what was sent
            reset(writer)
            return False
        if fault == "504 although processed":
            return await self._send(writer, answer(504, b"<html>upstream</html>", "text/html"))
        if fault == "slower than the time-out":
            await asyncio.sleep(chance.uniform(2.1, 6.5))
            return await self._send(writer, got)
        if fault == "delivered twice":
            return await self._send(writer, await self._forward(request))
        for at in range(0, len(got), 97):
            writer.write(got[at : at + 97])
            await writer.drain()
            await asyncio.sleep(0.002)
        return True

    async def _send(self, writer: asyncio.StreamWriter, raw: bytes) -> bool:
        writer.write(raw)
        await writer.drain()
        return True

    def _in_background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def _deliver_later(self, request: Message, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._forward(request)

    async def _forward(self, request: Message) -> bytes:
        """What the gate answers; a 502 where it is not there."""
        for fresh in (False, True):
            try:
                if self._idle and not fresh:
                    reader, writer = self._idle.pop()
                else:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self._gate_port)
                writer.write(request.raw)
                await writer.drain()
                got = await read_message(reader)
            except OSError:
                got = None
            if got is not None:
                self._idle.append((reader, writer))
                return got.raw
            if fresh:
                self.counts["no answer from the gate"] += 1
        return answer(502, b"<html>no gate</html>", "text/html")


async def main() -> None:
    gate_port, seed, rate = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    proxy, done, loop = Proxy(gate_port, seed, rate), asyncio.Event(), asyncio.get_running_loop()

    def command(message: dict[str, Any]) -> None:
        if message["do"] == "calm":
            proxy.calm = True
            say({"said": "calm", "counts": dict(proxy.counts)})
        else:
            loop.call_soon_threadsafe(done.set)

    server, port = await listen(proxy.serve)
    obey(command)
    say({"said": "ready", "port": port})
    weather = asyncio.create_task(proxy.weather())
    while not done.is_set():
        say({"said": "stats", "counts": dict(proxy.counts)})
        try:
            await asyncio.wait_for(done.wait(), 0.5)
        except asyncio.TimeoutError:
            pass
    weather.cancel()
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
