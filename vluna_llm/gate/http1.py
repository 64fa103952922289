"""One HTTP/1.1 exchange after another on one connection, without I/O: bytes out, bytes in. The protocol is h11's."""

from __future__ import annotations

import h11

from .wire import Answer, TransportError, WireRequest

MAX_ANSWER_BYTES = 64 * 1024 * 1024


class Http1:
    """The client's side of one connection. Both transports drive it; neither knows HTTP."""

    __slots__ = ("_body", "_h11", "_head", "_request_id", "_size", "reusable")

    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.CLIENT)
        self._request_id = ""
        self._head: h11.Response | None = None
        self._body: list[bytes] = []
        self._size = 0
        self.reusable = True
        """Whether another exchange may follow: only after a complete answer that keeps the connection."""

    def send(self, request: WireRequest, host: str) -> bytes:
        """The bytes of the request. Header values are Latin-1, as the gate reads them (gate contract 3.2)."""
        self.reusable = False
        self._request_id = request.request_id
        self._head, self._body, self._size = None, [], 0
        lines = [f"{request.method} {request.target} HTTP/1.1", f"host: {host}"]
        lines += [f"{name}: {value}" for name, value in request.headers]
        if request.body:
            lines.append(f"content-length: {len(request.body)}")
        head = "\r\n".join(lines)
        try:
            # h11 checks the request line and keeps the state of the exchange, from which it frames the answer. It would
            # check the other headers one by one, for a third of the exchange's CPU: ours are checked where they are
            # made (`credentials.header_value`), and as a whole here.
            self._h11.send(h11.Request(method=request.method, target=request.target, headers=[("host", host)]))
            self._h11.send(h11.EndOfMessage())
            if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1 or "\0" in head:
                raise TransportError("connect", "the request cannot be written: a header has a line break")
            return head.encode("latin-1") + b"\r\n\r\n" + request.body
        except (h11.LocalProtocolError, UnicodeEncodeError) as error:
            raise TransportError("connect", f"the request cannot be written: {error}") from error

    def receive(self, data: bytes) -> Answer | None:
        """Take bytes from the network (none: the other side closed); the answer once it is complete.

        Raises:
            TransportError: what came is not HTTP, too much, or ended too early.
        """
        connection = self._h11
        try:
            connection.receive_data(data)
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    return None
                if isinstance(event, h11.Response):
                    self._head = event
                elif isinstance(event, h11.Data):
                    self._body.append(bytes(event.data))
                    self._size += len(event.data)
                    if self._size > MAX_ANSWER_BYTES:
                        raise TransportError("broken", f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
                elif isinstance(event, h11.EndOfMessage):
                    return self._finished()
                elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                    raise TransportError("broken", "the gate closed the connection before it answered")
        except h11.RemoteProtocolError as error:
            text = "the gate closed the connection in the middle" if not data else f"what answers is not HTTP: {error}"
            raise TransportError("broken", text) from error

    def _finished(self) -> Answer:
        head, connection = self._head, self._h11
        assert head is not None
        if connection.our_state is h11.DONE and connection.their_state is h11.DONE and not connection.trailing_data[0]:
            connection.start_next_cycle()
            self.reusable = True
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
        return Answer(head.status_code, headers, b"".join(self._body), self._request_id)
