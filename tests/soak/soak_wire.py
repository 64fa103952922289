"""As much HTTP/1.1 as the provider and the fault proxy need: whole messages in, whole or broken ones out."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MOST = 1 << 20


@dataclass(slots=True)
class Message:
    """A request or an answer: ``head`` reaches to the empty line and holds it."""

    head: bytes
    body: bytes

    @property
    def start(self) -> str:
        """Its first line."""
        return self.head.partition(b"\r\n")[0].decode("latin-1")

    def header(self, name: str) -> str | None:
        """The value of a header, by its lower-case name."""
        lowered = self.head.lower()
        mark = b"\r\n" + name.encode() + b":"
        at = lowered.find(mark)
        if at < 0:
            return None
        return self.head[at + len(mark) : self.head.index(b"\r\n", at + 2)].strip().decode("latin-1")

    @property
    def raw(self) -> bytes:
        return self.head + self.body


async def read_message(reader: asyncio.StreamReader) -> Message | None:
    """The next message with its body; None at the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        message = Message(head, b"")
        length = int(message.header("content-length") or 0)
        if length:
            message.body = await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError):
        return None
    return message


def answer(status: int, body: bytes, content_type: str = "application/json", **headers: str) -> bytes:
    """An answer with its length."""
    lines = [f"HTTP/1.1 {status} .", f"content-type: {content_type}", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def reset(writer: asyncio.StreamWriter) -> None:
    """Break the connection with a reset, so that the other side reads an error and not an end."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass
    writer.transport.abort()


async def listen(
    handler: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any], port: int = 0
) -> tuple[asyncio.Server, int]:
    """Serve connections on loopback; gives the server and its port."""

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(guarded, "127.0.0.1", port, limit=_MOST, backlog=1024)
    return server, int(server.sockets[0].getsockname()[1])


def say(message: dict[str, Any]) -> None:
    """One message to the process that started this one."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def obey(command: Callable[[dict[str, Any]], None]) -> None:
    """Call ``command`` for every message of the process that started this one, in a thread; end with it."""

    def listen_to_parent() -> None:
        for line in sys.stdin:
            command(json.loads(line))
        command({"do": "quit"})

    threading.Thread(target=listen_to_parent, name="parent", daemon=True).start()
