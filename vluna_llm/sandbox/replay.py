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
from dataclasses import dataclass, replace
from types import TracebackType

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vluna_llm.sandbox.recordings import Choice, Recording, Repertoire, ReportedTokens, load_recordings
from vluna_llm.sandbox.upstream_faults import PlannedFault, UpstreamFault

SCENARIO_HEADER = "x-replay-cassette"
FAULT_HEADER = "x-replay-fault"

_STOP_SECONDS = 5.0


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
    fault: UpstreamFault | None = None

    @property
    def complete(self) -> bool:
        """Whether the whole answer was handed to the connection."""
        return self.parts_sent == self.parts_total


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
        self._planned: list[PlannedFault] = []
        self._lock = threading.Lock()
        self._connections = _Connections()
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
        fault: UpstreamFault,
        *,
        times: int = 1,
        path: str | None = None,
        model: str | None = None,
        stream: bool | None = None,
    ) -> None:
        """Let the next ``times`` matching requests meet this fault; a fault in the request's own header goes first."""
        with self._lock:
            self._planned.append(PlannedFault(fault, times, path, model, stream))

    def start(self) -> ReplayUpstream:
        """Listen on a free port of 127.0.0.1.

        Raises:
            RuntimeError: it runs already, or could not be started.
        """
        if self._thread is not None:
            raise RuntimeError("this replay upstream was started before")
        # With the protocol named, asyncio switches Nagle off on what it accepts: no event waits for an ACK.
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.bind(("127.0.0.1", 0))
        listening.listen(2048)
        self._port = listening.getsockname()[1]
        config = uvicorn.Config(
            Starlette(routes=[Route("/{path:path}", self._answer, methods=["GET", "POST", "DELETE"])]),
            http=_protocol_with_transports(self._connections),
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
        if self._server is None or self._thread is None or not self._thread.is_alive():
            return
        self._server.should_exit = True
        if self._connections.loop is not None:
            self._connections.loop.call_soon_threadsafe(self._connections.drop_all)
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
        scenario = request.headers.get(SCENARIO_HEADER)
        choice = None if fault.status is not None else self._repertoire.choose(request.method, path, body, scenario)
        entry = Served(
            number=0,
            request_id="",
            method=request.method,
            path=path,
            model=model,
            stream=stream,
            recording=None if choice is None else choice.recording.name,
            status=fault.status or (404 if choice is None else choice.recording.status),
            fault=None if fault == UpstreamFault() else fault,
        )
        with self._lock:
            self._served.append(entry)
            entry.number = len(self._served)
            entry.request_id = f"replay-{entry.number:06d}"
        labels = {"x-request-id": entry.request_id, "server": "vluna-llm-replay"}
        if fault.status is not None:
            if fault.delay:
                await _left_within(fault.delay, request)
            if fault.retry_after is not None:
                labels["retry-after"] = f"{fault.retry_after:g}"
            return _error(fault.status, "a fault made by the replay upstream", "replay_fault", labels)
        if choice is None:
            wanted = f"{request.method} {path}, stream={stream}, model={model!r}"
            known = sorted({one.model for one in self.recordings if one.model and one.path == path})
            hint = f"; recorded models are {', '.join(known)}" if known and model not in known else ""
            return _error(404, f"nothing was recorded for {wanted}{hint}", "replay_no_recording", labels)
        labels["x-replay-recording"] = choice.recording.name
        labels["content-type"] = choice.recording.content_type
        if "retry-after" in choice.recording.headers:
            labels["retry-after"] = choice.recording.headers["retry-after"]
        return _Replay(self, choice, entry, fault, labels)

    def _fault_for(self, header: str | None, path: str, model: str | None, stream: bool) -> UpstreamFault:
        if header is not None:
            return UpstreamFault.parse(header)
        with self._lock:
            for planned in self._planned:
                if planned.fits(path, model, stream):
                    planned.left -= 1
                    return planned.fault
        return UpstreamFault()


class _Replay(Response):
    """One recorded answer on its way: part by part, until the end, the fault, or the caller's leaving."""

    def __init__(
        self, upstream: ReplayUpstream, choice: Choice, entry: Served, fault: UpstreamFault, headers: Mapping[str, str]
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
        delay = fault.delay or upstream._first_byte_delay
        if (delay and await _left_within(delay, request)) or await self._ended_by_fault(0, request):
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
            if await request.is_disconnected():
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
            await _left(request)
            return True
        if self._fault.cut_after == sent:
            await self._drop(request)
            return True
        return False

    async def _drop(self, request: Request) -> None:
        """Close the socket under the answer, so that the caller sees a broken connection and not an ended body."""
        transport = self._upstream._connections.open.get(request.scope.get("client"))
        if transport is not None:
            connection = transport.get_extra_info("socket")
            if self._fault.reset and connection is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
            await _left(request)


async def _left(request: Request) -> None:
    """Wait until the connection is gone: the caller left, it was dropped, or the upstream stops."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _left_within(seconds: float, request: Request) -> bool:
    try:
        await asyncio.wait_for(_left(request), seconds)
    except asyncio.TimeoutError:
        return False
    return True


def _error(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "code": str(status)}}, status, headers)


class _Connections:
    """The open connections by the address of the caller. Used on the server's event loop only."""

    def __init__(self) -> None:
        self.open: dict[object, asyncio.Transport] = {}
        self.loop: asyncio.AbstractEventLoop | None = None

    def drop_all(self) -> None:
        for transport in list(self.open.values()):
            transport.abort()


def _protocol_with_transports(connections: _Connections) -> type[H11Protocol]:
    """uvicorn's HTTP protocol that also keeps its transport at hand: an ASGI app alone cannot drop a connection."""

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections.loop = self.loop
            connections.open[self.client] = transport

        def connection_lost(self, exc: Exception | None) -> None:
            connections.open.pop(self.client, None)
            super().connection_lost(exc)

    return Protocol
