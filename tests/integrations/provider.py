"""The model provider at the edge of the tests: a small HTTP server that answers as OpenAI's API does, or misbehaves.

It is the only fake in the integration tests: the SDKs, the sockets, the journal and the gate are real. How it answers
is set in ``behaviour``; what it was sent is in ``requests``.
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

INPUT, CACHED, OUTPUT, REASONING = 100, 40, 20, 5
WORDS = 12


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


class Provider:
    """The server. ``behaviour`` is one of:

    ``ok``; ``flaky`` (500, then ok), ``down`` (500 for ever), ``bad`` (400), ``refuses_option`` (400 on
    ``stream_options``), ``refuses_everything_new`` (422 without naming it); ``cut`` (the connection is cut after
    3 events), ``ends_early`` (a clean end of bytes after 3 events), ``error_event`` (after 3 events),
    ``error_with_usage``, ``hang`` (3 events, then nothing), ``hang_after_finish``, ``silent`` (no answer at all),
    ``slow`` (a pause before each event); ``no_usage`` (the option is ignored), ``json`` (JSON although a stream was
    asked), ``html``, ``broken``, ``error200``; ``length`` (the model ran out of tokens), ``filtered``; ``incomplete``,
    ``failed``, ``queued`` (Responses API); ``slow_body`` (JSON in small pieces). ``encoding`` compresses answers.
    """

    handler: Any = None  # a subclass may answer in a way of its own

    def __init__(self) -> None:
        self.behaviour = "ok"
        self.encoding = "identity"
        self.pause = 0.02
        self.requests: list[Seen] = []
        self.responses: dict[str, dict[str, Any]] = {}
        self.released = threading.Event()
        self.flaked: set[str] = set()
        provider = self

        class Handler(self.handler or _Handler):  # type: ignore[misc]
            owner = provider

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def base_url(self) -> str:
        """What an SDK is given."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def host(self) -> str:
        """Scheme and address without a path."""
        return self.base_url.removesuffix("/v1")

    def posts(self) -> list[Seen]:
        """The requests that create."""
        return [seen for seen in self.requests if seen.method == "POST"]

    def __enter__(self) -> Provider:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is not worth a traceback."""


class _Cut(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Provider

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _serve(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("transfer-encoding") == "chunked":
            raw = self._dechunk()
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            body = raw
        self.owner.requests.append(Seen(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        try:
            self._answer(self.path.partition("?")[0], body)
        except _Cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.close_connection = True

    def _dechunk(self) -> bytes:
        out = b""
        while size := int(self.rfile.readline(), 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    # -- routing -----------------------------------------------------------------------------------------------------

    def _answer(self, path: str, body: Any) -> None:
        how = self.owner.behaviour
        if how == "silent":
            self.owner.released.wait(20)
            raise _Cut
        if how == "down" or (how == "flaky" and not self._flaked()):
            return self._json({"error": {"message": "internal", "type": "server_error"}}, 500)
        if how == "bad":
            return self._json({"error": {"message": "bad request", "type": "invalid_request_error"}}, 400)
        asked = isinstance(body, dict) and "stream_options" in body
        if how == "refuses_option" and asked:
            message = "Unrecognized request argument supplied: stream_options"
            return self._json({"error": {"message": message, "type": "invalid_request_error"}}, 400)
        if how == "refuses_everything_new" and asked:
            return self._json({"detail": [{"type": "extra_forbidden", "msg": "Extra inputs are not permitted"}]}, 422)
        if how == "html":
            return self._raw(b"<html><body>gateway</body></html>", "text/html")
        if how == "broken":
            return self._raw(b'{"id": "chatcmpl-1", "choices": [', "application/json")
        if how == "error200":
            return self._json({"error": {"message": "overloaded", "code": 529}})
        if path.endswith("/chat/completions"):
            return self._chat(body)
        if path.endswith("/completions"):
            return self._completions(body)
        if path.endswith("/responses") and self.command == "POST":
            return self._responses(body)
        if "/responses/" in path:
            return self._retrieve(path.rpartition("/responses/")[2].partition("/")[0])
        if path.endswith("/embeddings"):
            return self._embeddings(body)
        if "/images/" in path:
            usage = {"input_tokens": 50, "output_tokens": 1000, "total_tokens": 1050}
            usage["input_tokens_details"] = {"text_tokens": 10, "image_tokens": 40}  # type: ignore[assignment]
            return self._json({"created": 1, "data": [{"b64_json": "aGk=" * 20}], "usage": usage})
        if path.endswith("/audio/transcriptions"):
            if isinstance(body, bytes) and b"\r\n\r\nsrt\r\n" in body:
                return self._raw(b"1\n00:00:00,000 --> 00:00:01,000\nhello\n", "text/plain; charset=utf-8")
            usage = {"type": "tokens", "input_tokens": 14, "output_tokens": 45, "total_tokens": 59}
            usage["input_token_details"] = {"text_tokens": 0, "audio_tokens": 14}  # type: ignore[assignment]
            return self._json({"text": "hello", "usage": usage})
        if path.endswith("/audio/speech"):
            return self._raw(b"\x00\x01" * 100, "audio/mpeg")
        if path.endswith("/models"):
            return self._json({"object": "list", "data": []})
        if path.endswith("/moderations"):
            return self._json({"id": "modr-1", "model": "omni", "results": []})
        if path.endswith("/batches"):
            return self._json({"id": "batch_1", "object": "batch", "status": "validating", "endpoint": "/v1/x"})
        return self._json({"error": {"message": "no such path"}}, 404)

    def _flaked(self) -> bool:
        key = self.path
        if key in self.owner.flaked:
            return True
        self.owner.flaked.add(key)
        return False

    # -- the APIs ----------------------------------------------------------------------------------------------------

    def _chat_usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": INPUT,
            "completion_tokens": OUTPUT,
            "total_tokens": INPUT + OUTPUT,
            "prompt_tokens_details": {"cached_tokens": CACHED},
            "completion_tokens_details": {"reasoning_tokens": REASONING},
        }

    def _chat(self, body: dict[str, Any]) -> None:
        how = self.owner.behaviour
        model = body.get("model") or "deployment"
        if body.get("stream") and how != "json":
            return self._events(self._chat_events(body, model))
        content = "hello world"
        if body.get("response_format"):
            content = '{"answer": 42}' if how not in ("length", "invalid") else '{"answer": '
        finish = {"length": "length", "filtered": "content_filter"}.get(how, "stop")
        message = {"role": "assistant", "content": content, "refusal": None}
        answer = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": f"{model}-2026-01-01",
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
            "usage": self._chat_usage(),
        }
        if how == "no_usage":
            del answer["usage"]
        self._json(answer)

    def _chat_events(self, body: dict[str, Any], model: str) -> Iterator[str]:
        how = self.owner.behaviour
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": f"{model}-2026-01-01"}
        asked = (body.get("stream_options") or {}).get("include_usage") is True and how != "no_usage"
        null = {"usage": None} if asked else {}

        def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
            return _data({**head, "choices": [choice], **null})

        yield chunk({"role": "assistant", "content": ""})
        for index in range(WORDS):
            yield from self._misbehave(index)
            yield chunk({"content": f"word{index} "})
        yield chunk({}, "length" if how == "length" else "stop")
        if how == "hang_after_finish":
            self.owner.released.wait(20)
            raise _Cut
        if asked:
            yield _data({**head, "choices": [], "usage": self._chat_usage()})
        yield "data: [DONE]\n\n"

    def _misbehave(self, index: int) -> Iterator[str]:
        how = self.owner.behaviour
        if how == "slow":
            time.sleep(self.owner.pause)
        if index != 2:
            return
        if how == "cut":
            time.sleep(0.02)
            raise _Cut
        if how == "ends_early":
            raise StopIteration
        if how == "hang":
            self.owner.released.wait(20)
            raise _Cut
        if how == "error_event":
            yield _data({"error": {"message": "overloaded", "type": "server_error", "code": None}})
        if how == "error_with_usage":
            yield _data({"error": {"message": "overloaded"}, "usage": self._chat_usage(), "choices": []})

    def _completions(self, body: dict[str, Any]) -> None:
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}
        choice = {"text": "hello", "index": 0, "finish_reason": "stop", "logprobs": None}
        if not body.get("stream"):
            return self._json({**head, "choices": [choice], "usage": self._chat_usage()})

        def events() -> Iterator[str]:
            for index, word in enumerate(("a ", "b ", "c ")):
                yield from self._misbehave(index)
                yield _data({**head, "choices": [{**choice, "text": word, "finish_reason": None}]})
            yield _data({**head, "choices": [{**choice, "text": ""}]})
            if (body.get("stream_options") or {}).get("include_usage") and self.owner.behaviour != "no_usage":
                yield _data({**head, "choices": [], "usage": self._chat_usage()})
            yield "data: [DONE]\n\n"

        self._events(events())

    def _response_usage(self) -> dict[str, Any]:
        return {
            "input_tokens": INPUT,
            "input_tokens_details": {"cached_tokens": CACHED, "cache_write_tokens": 0},
            "output_tokens": OUTPUT,
            "output_tokens_details": {"reasoning_tokens": REASONING},
            "total_tokens": INPUT + OUTPUT,
        }

    def _response(self, body: dict[str, Any], response_id: str, status: str) -> dict[str, Any]:
        done = status in ("completed", "incomplete", "failed")
        text = '{"answer": 42}' if body.get("text") else "hello world"
        content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
        item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": content}
        return {
            "id": response_id,
            "object": "response",
            "created_at": 1,
            "model": f"{body.get('model', 'm')}-2026-01-01",
            "status": status,
            "background": body.get("background") is True,
            "error": {"code": "server_error", "message": "broke"} if status == "failed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": None,
            "metadata": {},
            "output": [item] if done else [],
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": self._response_usage() if done else None,
        }

    def _responses(self, body: dict[str, Any]) -> None:
        how = self.owner.behaviour
        response_id = f"resp_{len(self.owner.responses) + 1}"
        self.owner.responses[response_id] = body
        if body.get("stream") and how != "json":
            return self._events(self._response_events(body, response_id))
        status = "queued" if body.get("background") else how if how in ("incomplete", "failed") else "completed"
        self._json(self._response(body, response_id, status))

    def _retrieve(self, response_id: str) -> None:
        body = self.owner.responses.get(response_id, {"model": "m", "background": True})
        if "stream=true" in self.path:
            return self._events(self._response_events(body, response_id))
        how = self.owner.behaviour
        self._json(
            self._response(body, response_id, how if how in ("queued", "in_progress", "failed") else "completed")
        )

    def _response_events(self, body: dict[str, Any], response_id: str) -> Iterator[str]:
        how = self.owner.behaviour
        number = 0

        def event(kind: str, **members: Any) -> str:
            nonlocal number
            number += 1
            return f"event: {kind}\n" + _data({"type": kind, "sequence_number": number, **members})

        yield event("response.created", response=self._response(body, response_id, "in_progress"))
        item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield event("response.output_item.added", output_index=0, item=item)
        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        yield event("response.content_part.added", part=part, **place)
        for index in range(WORDS):
            yield from self._misbehave(index)
            yield event("response.output_text.delta", delta=f"word{index} ", logprobs=[], **place)
        status = how if how in ("incomplete", "failed") else "completed"
        yield event(f"response.{status}", response=self._response(body, response_id, status))

    def _embeddings(self, body: dict[str, Any]) -> None:
        base64 = body.get("encoding_format") == "base64"
        vector: Any = "AACAPwAAAEA=" if base64 else [1.0, 2.0]
        data = [{"object": "embedding", "index": 0, "embedding": vector}]
        usage = {"prompt_tokens": 8, "total_tokens": 8}
        self._json({"object": "list", "data": data, "model": body["model"], "usage": usage})

    # -- the wire ----------------------------------------------------------------------------------------------------

    def _json(self, value: Any, status: int = 200) -> None:
        self._raw(json.dumps(value).encode(), "application/json", status)

    def _raw(self, payload: bytes, content_type: str, status: int = 200) -> None:
        gzipped = self.owner.encoding == "gzip" and status == 200
        if gzipped:
            payload = gzip.compress(payload)
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(payload)))
        self.send_header("x-request-id", "req_1")
        if gzipped:
            self.send_header("content-encoding", "gzip")
        self.end_headers()
        if self.owner.behaviour == "slow_body":
            for start in range(0, len(payload), 100):
                self.wfile.write(payload[start : start + 100])
                self.wfile.flush()
                time.sleep(self.owner.pause)
        else:
            self.wfile.write(payload)

    def _events(self, events: Iterator[str]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.send_header("x-request-id", "req_1")
        gzipped = self.owner.encoding == "gzip"
        if gzipped:
            self.send_header("content-encoding", "gzip")
        self.end_headers()
        packer = zlib.compressobj(wbits=31)
        try:
            for event in events:
                data = event.encode()
                if gzipped:
                    data = packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)
                self._piece(data)
        except RuntimeError:  # a generator that raised StopIteration: a clean end before the protocol's own
            pass
        if gzipped:
            self._piece(packer.flush())
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def _piece(self, data: bytes) -> None:
        if data:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()


def _data(value: Any) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
