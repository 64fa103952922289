"""The bytes of one exchange: written as they were signed, and nothing that could be read as two requests."""

from __future__ import annotations

import pytest

from vluna_llm.gate.http1 import Http1
from vluna_llm.gate.wire import TransportError, WireRequest


def test_a_request_is_written_as_it_was_signed() -> None:
    request = WireRequest(
        "POST", "/mgt/v1/x?a=%2F", [("x-principal-id", "caf\xe9 1"), ("x-empty", "")], b'{"a":1}', "r"
    )
    assert Http1().send(request, "gate:8080") == (
        b"POST /mgt/v1/x?a=%2F HTTP/1.1\r\nhost: gate:8080\r\nx-principal-id: caf\xe9 1\r\nx-empty: \r\n"
        b'content-length: 7\r\n\r\n{"a":1}'
    )


def test_a_request_without_a_body_has_no_length() -> None:
    assert Http1().send(WireRequest("GET", "/health", [], b"", "r"), "g") == b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n"


@pytest.mark.parametrize("bad", ["a\r\nx-evil: 1", "a\nb", "a\rb", "a\0b", "日本"])
def test_a_header_that_could_be_read_as_more_is_never_sent(bad: str) -> None:
    with pytest.raises(TransportError, match="cannot be written"):
        Http1().send(WireRequest("GET", "/x", [("x-user-id", bad)], b"", "r"), "g")


@pytest.mark.parametrize("target", ["/x y", "/x\r\nhost: evil", "/ä"])
def test_a_target_that_is_none_is_never_sent(target: str) -> None:
    with pytest.raises(TransportError, match="cannot be written"):
        Http1().send(WireRequest("GET", target, [], b"", "r"), "g")


def test_two_exchanges_follow_each_other_on_one_connection() -> None:
    http = Http1()
    for body in (b"one", b"two"):
        http.send(WireRequest("POST", "/x", [], b"{}", "r"), "g")
        assert not http.reusable
        answer = http.receive(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n" + body)
        assert answer is not None
        assert answer.body == body
        assert http.reusable
