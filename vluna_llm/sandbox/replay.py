"""A local upstream that replays recorded model answers over real HTTP with real event streams.

It is no model: every answer was recorded from a server that really ran, and says so in its headers
(``x-replay-recording``). It listens on 127.0.0.1 only, needs no key and looks at none. Faults that real upstreams have
(a connection that breaks in mid-stream, an error status, silence) are made on request, by `ReplayUpstream.inject` or
by the ``x-replay-fault`` header of one request.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vluna_llm.sandbox.recordings import Choice, Recording, Repertoire, ReportedTokens, load_recordings

SCENARIO_HEADER = "x-replay-cassette"
FAULT_HEADER = "x-replay-fault"

_STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong with one answer. Parts are events of a stream; a plain body counts as one part.

    ``status``: answer with this error instead (``retry_after`` seconds go along). ``cut_after``: really drop the
    connection after so many parts, 0 before the first byte; a plain body is cut in its middle; ``reset`` drops it with
    a TCP reset instead of an orderly end. ``hang_after``: fall silent after so many parts, 0 before the first byte,
    until the caller leaves. ``delay``: seconds before the first byte. ``gzip``: a compressed answer.

    Raises:
        ValueError: a number is negative, or both ``cut_after`` and ``hang_after`` are given.
    """

    status: int | None = None
    retry_after: float | None = None
    cut_after: int | None = None
    reset: bool = False
    hang_after: int | None = None
    delay: float = 0.0
    gzip: bool = False

    def __post_init__(self) -> None:
        if self.cut_after is not None and self.hang_after is not None:
            raise ValueError("a connection is either cut or left hanging: give cut_after or hang_after")
        for name in ("status", "retry_after", "cut_after", "hang_after", "delay"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, not {value!r}")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read the form of the header: ``cut_after=5, reset`` or ``status=429, retry_after=1``.

        Raises:
            ValueError: an unknown name, or a value that is not a number.
        """
        kinds = {one.name: str(one.type) for one in fields(cls)}
        given: dict[str, Any] = {}
        for item in text.split(","):
            name, _, value = (part.strip() for part in item.partition("="))
            if name not in kinds:
                raise ValueError(f"unknown fault {name!r}; known: {', '.join(kinds)}")
            kind = kinds[name]
            given[name] = True if kind == "bool" else float(value) if "float" in kind else int(value)
        return cls(**given)


@dataclass(slots=True)
class Served:
    """One answer of the replay upstream: no prompt, no answer text, no key.

    ``tokens`` is what the recording's server reported, and ``usage_sent`` whether that usage was handed to the
    connection: False where it was cut before, left out, or never reported. ``parts_sent`` of ``parts_total`` counts
    events.
    """

    number: int
    request_id: str
    method: str
    path: str
    model: str | None
    stream: bool
    recording: str | None
    status: int
    tokens: ReportedTokens | None = None
    parts_total: int = 0
    parts_sent: int = 0
    usage_sent: bool = False
    fault: Fault | None = None

    @property
    def complete(self) -> bool:
        """Whether the whole answer was handed to the connection."""
        return self.parts_sent == self.parts_total


@dataclass(slots=True)
class _Planned:
    fault: Fault
    left: int
    path: str | None
    model: str | None
    stream: bool | None

    def fits(self, path: str, model: str | None, stream: bool) -> bool:
        return (
            self.left > 0
            and self.path in (None, path)
            and self.model in (None, model)
            and self.stream in (None, stream)
        )


class ReplayUpstream:
    """The replay upstream, served by a thread of its own while the ``with`` block runs.

    ``event_delay`` and ``first_byte_delay`` are seconds: between two events, and before each answer.
    `served` and `inject` may be used from any thread.
    """

    def __init__(
        self,
        recordings: Iterable[Recording] | None = None,
        *,
        event_delay: float = 0.0,
        first_byte_delay: float = 0.0,
    ) -> None:
        self._repertoire = Repertoire(load_recordings() if recordings is None else recordings)
        self._event_delay = event_delay
        self._first_byte_delay = first_byte_delay
        self._served: list[Served] = []
        self._planned: list[_Planned] = []
        self._lock = threading.Lock()
        self._transports: dict[object, asyncio.Transport] = {}
        self._stopping = False
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._port = 0

    @property
    def recordings(self) -> tuple[Recording, ...]:
        """Everything that can be replayed."""
        return self._repertoire.recordings

    @property
    def base_url(self) -> str:
        """The base URL for an OpenAI client, ``http://127.0.0.1:PORT/v1``; empty port 0 while not started."""
        return f"{self.root_url}/v1"

    @property
    def root_url(self) -> str:
        """The same without ``/v1``, for clients that add it themselves."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def served(self) -> tuple[Served, ...]:
        """What was answered so far, in the order in which the requests came."""
        with self._lock:
            return tuple(replace(one) for one in self._served)

    def inject(
        self,
        fault: Fault,
        *,
        times: int = 1,
        path: str | None = None,
        model: str | None = None,
        stream: bool | None = None,
    ) -> None:
        """Let the next ``times`` matching requests meet this fault; a fault in the request's own header goes first."""
        with self._lock:
            self._planned.append(_Planned(fault, times, path, model, stream))

    def start(self) -> ReplayUpstream:
        """Listen on a free port of 127.0.0.1.

        Raises:
            RuntimeError: it runs already, or could not be started.
        """
        if self._thread is not None:
            raise RuntimeError("this replay upstream was started before")
        listening = socket.create_server(("127.0.0.1", 0))
        self._port = listening.getsockname()[1]
        config = uvicorn.Config(
            Starlette(routes=[Route("/{path:path}", self._answer, methods=["GET", "POST", "DELETE"])]),
            http=_protocol_with_transports(self._transports),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listening]}, name="vluna-replay-upstream", daemon=True
        )
        self._thread.start()
        give_up = time.monotonic() + _STOP_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > give_up:
                raise RuntimeError("the replay upstream could not be started")
            time.sleep(0.005)
        return self

    def stop(self) -> None:
        """End every connection, hanging ones too, and wait for the thread; may be called twice."""
        self._stopping = True
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(_STOP_SECONDS)

    def __enter__(self) -> ReplayUpstream:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def _answer(self, request: Request) -> Response:
        raw = await request.body()
        try:
            body = json.loads(raw) if raw else {}
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return _error(400, "the request body is not a JSON object", "replay_bad_request")
        path, model, stream = request.url.path.rstrip("/"), body.get("model"), body.get("stream") is True
        try:
            fault = self._fault_for(request.headers.get(FAULT_HEADER), path, model, stream)
        except ValueError as error:
            return _error(400, f"{FAULT_HEADER}: {error}", "replay_bad_request")
        choice = self._repertoire.choose(request.method, path, body, request.headers.get(SCENARIO_HEADER))
        failed = fault.status is not None
        entry = Served(
            number=0,
            request_id="",
            method=request.method,
            path=path,
            model=model,
            stream=stream,
            recording=None if choice is None or failed else choice.recording.name,
            status=fault.status or (404 if choice is None else choice.recording.status),
            fault=None if fault == Fault() else fault,
        )
        with self._lock:
            self._served.append(entry)
            entry.number = len(self._served)
            entry.request_id = f"replay-{entry.number:06d}"
        labels = {"x-request-id": entry.request_id, "server": "vluna-llm-replay"}
        if fault.status is not None:
            if fault.delay:
                await asyncio.sleep(fault.delay)
            if fault.retry_after is not None:
                labels["retry-after"] = f"{fault.retry_after:g}"
            return _error(fault.status, "a fault made by the replay upstream", "replay_fault", labels)
        if choice is None:
            wanted = f"{request.method} {path}, stream={stream}, model={model!r}"
            return _error(404, f"nothing was recorded for {wanted}", "replay_no_recording", labels)
        labels["x-replay-recording"] = choice.recording.name
        labels["content-type"] = choice.recording.content_type
        if "retry-after" in choice.recording.headers:
            labels["retry-after"] = choice.recording.headers["retry-after"]
        return _Replay(self, choice, entry, fault, labels)

    def _fault_for(self, header: str | None, path: str, model: str | None, stream: bool) -> Fault:
        if header is not None:
            return Fault.parse(header)
        with self._lock:
            for planned in self._planned:
                if planned.fits(path, model, stream):
                    planned.left -= 1
                    return planned.fault
        return Fault()


class _Replay(Response):
    """One recorded answer on its way: part by part, until the end, the fault, or the caller's leaving."""

    def __init__(
        self, upstream: ReplayUpstream, choice: Choice, entry: Served, fault: Fault, headers: Mapping[str, str]
    ) -> None:
        self.background = None
        self.status_code = choice.recording.status
        self._upstream = upstream
        self._entry = entry
        self._fault = fault
        self._own_headers = dict(headers)
        self._parts = choice.parts
        self._usage_after = choice.recording.usage_complete_after(choice.parts)
        entry.tokens = choice.recording.tokens
        entry.parts_total = len(self._parts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        fault, upstream = self._fault, self._upstream
        if fault.delay or upstream._first_byte_delay:
            await asyncio.sleep(fault.delay or upstream._first_byte_delay)
        if await self._ended_by_fault(0, request):
            return
        squeeze = zlib.compressobj(wbits=31) if fault.gzip else None
        headers = dict(self._own_headers)
        if squeeze is not None:
            headers["content-encoding"] = "gzip"
        streaming = headers["content-type"].startswith("text/event-stream")
        if not streaming and squeeze is None:
            headers["content-length"] = str(sum(map(len, self._parts)))
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
            }
        )
        for number, part in enumerate(self._parts, start=1):
            if number > 1:
                await asyncio.sleep(upstream._event_delay)
            if upstream._stopping or await request.is_disconnected():
                return
            if not streaming and fault.cut_after is not None:
                await send({"type": "http.response.body", "body": part[: len(part) // 2], "more_body": True})
                await self._drop(request)
                return
            data = part if squeeze is None else squeeze.compress(part) + squeeze.flush(zlib.Z_SYNC_FLUSH)
            self._entry.parts_sent = number
            self._entry.usage_sent = self._usage_after is not None and number >= self._usage_after
            await send({"type": "http.response.body", "body": data, "more_body": True})
            if await self._ended_by_fault(number, request):
                return
        await send({"type": "http.response.body", "body": b"" if squeeze is None else squeeze.flush()})

    async def _ended_by_fault(self, sent: int, request: Request) -> bool:
        if self._fault.hang_after == sent:
            while not self._upstream._stopping and not await request.is_disconnected():
                await asyncio.sleep(0.02)
            await self._drop(request)
            return True
        if self._fault.cut_after == sent:
            await self._drop(request)
            return True
        return False

    async def _drop(self, request: Request) -> None:
        """Close the socket under the answer, so that the caller sees a broken connection and not an ended body."""
        transport = self._upstream._transports.get(request.scope.get("client"))
        if transport is not None:
            connection = transport.get_extra_info("socket")
            if self._fault.reset and connection is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        while not await request.is_disconnected():
            await asyncio.sleep(0)


def _error(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "code": str(status)}}, status, headers)


def _protocol_with_transports(transports: dict[object, asyncio.Transport]) -> type[H11Protocol]:
    """uvicorn's HTTP protocol that also keeps its transport at hand: an ASGI app alone cannot drop a connection."""

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            transports[self.client] = transport

        def connection_lost(self, exc: Exception | None) -> None:
            transports.pop(self.client, None)
            super().connection_lost(exc)

    return Protocol
