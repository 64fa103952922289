"""A small raw HTTP server for tests: says exactly the bytes that it is told to, and remembers what it was sent."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vluna_llm.gate import GateCredentials

SECRET = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
LEASE = {
    "lease_token": "lease.650a1de9-2643-475e-8b7a-b2b73e307720.6a11919a0c385da7",
    "lease_id": "650a1de9-2643-475e-8b7a-b2b73e307720",
    "feature_code": "openai.gpt-4o",
}


@dataclass
class Seen:
    """One request as it came over the wire."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int


Script = Callable[[Seen, socket.socket], None]
"""Answers one request by writing to the socket; raises ``ConnectionAbortedError`` to drop the connection."""


@dataclass
class WireServer:
    """Listens on loopback and answers every request by the next script, the last one again and again."""

    scripts: list[Script]
    seen: list[Seen] = field(default_factory=list)
    port: int = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/mgt/v1"

    def credentials(self, **changes: Any) -> GateCredentials:
        return GateCredentials(
            **{"base_url": self.base_url, "realm_id": "realm-demo", "key_id": "pk-test", "secret": SECRET, **changes}
        )


@contextlib.contextmanager
def serving(*scripts: Script, tls: ssl.SSLContext | None = None) -> Iterator[WireServer]:
    """A server with these scripts, over TLS where a context is given."""
    server = WireServer(list(scripts))
    listener = socket.create_server(("127.0.0.1", 0))
    server.port = listener.getsockname()[1]
    stop = threading.Event()
    open_sockets: list[socket.socket] = []

    def accept() -> None:
        number = 0
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            open_sockets.append(connection)
            number += 1
            threading.Thread(target=_serve, args=(server, connection, number, tls), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server
    finally:
        stop.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept(); closing alone does not
        listener.close()
        for connection in open_sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def _serve(server: WireServer, connection: socket.socket, number: int, tls: ssl.SSLContext | None) -> None:
    buffer = b""
    try:
        if tls is not None:
            connection = tls.wrap_socket(connection, server_side=True)
        while True:
            while b"\r\n\r\n" not in buffer:
                data = connection.recv(65536)
                if not data:
                    return
                buffer += data
            head, _, buffer = buffer.partition(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            method, target, _ = first.split(" ")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            length = int(headers.get("content-length", "0"))
            while len(buffer) < length:
                buffer += connection.recv(65536)
            body, buffer = buffer[:length], buffer[length:]
            seen = Seen(method, target, headers, body, number)
            server.seen.append(seen)
            script = server.scripts.pop(0) if len(server.scripts) > 1 else server.scripts[0]
            script(seen, connection)
    except OSError:
        pass
    finally:
        connection.close()


def raw(data: bytes) -> Script:
    """Exactly these bytes."""
    return lambda _, connection: connection.sendall(data)


def answer(status: int, body: object, *, headers: str = "", content_type: str = "application/json") -> Script:
    """One whole answer; ``body`` is JSON unless it is bytes."""
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ncontent-length: {len(payload)}\r\n{headers}\r\n"
    return raw(head.encode() + payload)


def ok(data: object, **members: object) -> Script:
    """A success envelope."""
    return answer(200, {"ok": True, "code": "OK", "data": data, **members})


def refused(status: int, code: str, message: str, **members: object) -> Script:
    """A failure envelope."""
    return answer(status, {"ok": False, "code": code, "message": message, "meta": {"status": status}, **members})


def drop(_: Seen, connection: socket.socket) -> None:
    """Close without an answer."""
    raise ConnectionAbortedError


def hang(_: Seen, connection: socket.socket) -> None:
    """Never answer; ends when the other side gives up."""
    connection.recv(1)
    raise ConnectionAbortedError


def dribble(_: Seen, connection: socket.socket) -> None:
    """One byte of an answer every 50 ms, for ever."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


FIRST_CALL_500 = answer(500, {"ok": False, "code": "SERVER.UNEXPECTED", "message": "Unexpected server error."})
