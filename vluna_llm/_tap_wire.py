"""What a tap has to know of httpx and httpx2: content encodings, and how a blocking read is ended in time."""

from __future__ import annotations

import importlib
import inspect
import os
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any


def http_module(response: object) -> str:
    """The HTTP library that this response is of.

    Raises:
        TypeError: it is of neither.
    """
    for kind in type(response).__mro__:
        name = kind.__module__.partition(".")[0]
        if name in ("httpx", "httpx2"):
            return name
    raise TypeError(f"{type(response)!r} is not a response of httpx or httpx2")


class Decoder:
    """Decodes the content encoding of one response, with the response's own decoders."""

    __slots__ = ("_codec",)

    def __init__(self, codec: Any) -> None:
        self._codec = codec

    @classmethod
    def of(cls, response: Any) -> Decoder | None:
        """A decoder for ourselves; None where the bytes are not encoded."""
        encoding = response.headers.get("content-encoding")
        if not encoding or encoding.strip().lower() == "identity":
            return None
        codec = response._get_content_decoder()
        del response._decoder  # the response makes itself another one
        return None if type(codec).__name__ == "IdentityDecoder" else cls(codec)

    def take_over(self, response: Any) -> None:
        """The response will be given decoded bytes."""
        module = importlib.import_module(type(self._codec).__module__)
        response._decoder = module.IdentityDecoder()

    def decode(self, data: bytes) -> bytes:
        """The decoded bytes of the next piece."""
        return _joined(self._codec.decode(data))

    def flush(self) -> bytes:
        """What the decoder still holds."""
        return _joined(self._codec.flush())


def _joined(decoded: Any) -> bytes:
    return decoded if isinstance(decoded, bytes) else b"".join(decoded)


class Wire:
    """Bounds what is still read from a connection, in the sync colour: no time-out reaches a read that is under way.

    HTTP/1.1: the connection carries this answer alone and is shut down when the time is over. HTTP/2: it carries other
    answers too, and each read asks for its time-out anew. Where neither is to be had (a transport of somebody's own),
    the client's own time-out holds.
    """

    __slots__ = ("_is_ours_alone", "_stream", "_timeouts")

    def __init__(self, response: Any) -> None:
        self._stream = response.extensions.get("network_stream")
        self._timeouts = response.request.extensions.get("timeout")
        self._is_ours_alone = response.extensions.get("http_version") == b"HTTP/1.1"

    @property
    def is_open_to_us(self) -> bool:
        """Whether the connection is known: it is httpcore's."""
        return self._stream is not None

    @contextmanager
    def without_waiting(self) -> Generator[bool, None, None]:
        """Reads give what has arrived, or fail at once; False where the connection cannot be asked for that.

        In the async colour only what httpcore has taken from the socket already.
        """
        stream = self._stream
        if not self._is_ours_alone or not callable(getattr(stream, "read", None)):
            yield False
            return
        read = stream.read

        def read_now(max_bytes: int, timeout: float | None = None) -> Any:
            return read(max_bytes, 0)

        async def read_nothing(max_bytes: int, timeout: float | None = None) -> bytes:
            raise OSError("nothing is waited for")

        stream.read = read_nothing if inspect.iscoroutinefunction(read) else read_now
        try:
            yield True
        finally:
            del stream.read

    @contextmanager
    def cut_after(self, seconds: float) -> Generator[None, None, None]:
        """End whatever is being read after so many seconds."""
        if isinstance(self._timeouts, dict):
            self._timeouts["read"] = seconds
        timer: threading.Timer | None = None
        if self._socket() is not None:
            timer = threading.Timer(seconds, self._shut)
            timer.daemon = True
            try:
                timer.start()
            except RuntimeError:  # no new thread can be started while the interpreter exits
                timer = None
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def _socket(self) -> socket.socket | None:
        try:
            tls = self._stream.get_extra_info("ssl_object")
            if tls is not None and tls.selected_alpn_protocol() == "h2":
                return None
            found = self._stream.get_extra_info("socket")
        except Exception:
            return None
        return found if isinstance(found, socket.socket) else None

    def _shut(self) -> None:
        sock = self._socket()
        if sock is None:
            return
        with suppress(OSError):
            twin = socket.socket(fileno=os.dup(sock.fileno()))  # past a TLS object that another thread is reading from
            with twin:
                twin.shutdown(socket.SHUT_RDWR)
