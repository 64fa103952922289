"""Both gate clients over real sockets: what they send, how long they wait, what they make of a bad gate."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import inspect
import multiprocessing
import threading
import time
from typing import Any

import httpx
import pytest
from colours import COLOURS, Caller, Colour
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from wire_server import (
    FIRST_CALL_500,
    LEASE,
    SECRET,
    Seen,
    answer,
    dribble,
    drop,
    hang,
    ok,
    raw,
    refused,
    serving,
)

from vluna_llm.errors import (
    ConfigurationError,
    GateAuthError,
    GateDenied,
    GateRateLimited,
    GateUnavailable,
    InvalidGateRequest,
)
from vluna_llm.gate import AsyncGateClient, GateClient, GateRequest
from vluna_llm.gate.answers import parse_commit
from vluna_llm.gate.transport import HttpxTransport, SocketTransport, open_transport, proxy_applies
from vluna_llm.types import Lease

COMMIT: dict[str, Any] = {
    "commit_id": "d8a4504c-657e-47b2-b5d6-6bb154d78090",
    "amount_xusd": "9200",
    "cost_xusd": "6200",
    "lines": [],
}
A_LEASE = Lease("lease.x.y", "openai.gpt-4o")


@pytest.fixture(params=COLOURS)
def colour(request: pytest.FixtureRequest) -> Colour:
    value: Colour = request.param
    return value


def verified(seen: Seen) -> bool:
    """Check the signature as the gate does: over what came over the wire, in Latin-1, against the canonical string."""
    digest = "sha-256=:" + base64.b64encode(hashlib.sha256(seen.body).digest()).decode() + ":"
    fields = dict(part.split("=", 1) for part in seen.headers["authorization"].removeprefix("SVC-AUTH ").split(","))
    names = (
        "x-realm-id",
        "x-principal-id",
        "x-user-id",
        "x-billing-account-id",
        "x-billing-user-id",
        "idempotency-key",
    )
    canonical = "\n".join(
        [
            seen.method,
            seen.target,
            f"ts:{fields['ts']}",
            f"nonce:{fields['nonce']}",
            f"content-digest:{seen.headers['content-digest']}",
            f"content-type:{seen.headers.get('content-type', '')}",
            *(f"{name}:{seen.headers.get(name, '')}" for name in names),
        ]
    )
    mac = hmac.new(base64.b64decode(SECRET), canonical.encode(), hashlib.sha256).digest()
    return seen.headers["content-digest"] == digest and fields["sig"] == base64.b64encode(mac).decode()


def test_both_colours_have_the_same_methods() -> None:
    """What one client can, the other can, with the same arguments."""
    pairs = {"close": "aclose", "__enter__": "__aenter__", "__exit__": "__aexit__"}
    for name, function in inspect.getmembers(GateClient, inspect.isfunction):
        twin = inspect.signature(getattr(AsyncGateClient, pairs.get(name, name)))
        own = inspect.signature(function)
        assert list(own.parameters) == list(twin.parameters), name
        if name != "__init__":
            assert [p.default for p in own.parameters.values()] == [p.default for p in twin.parameters.values()], name


def test_authorize_is_signed_and_complete(colour: Colour) -> None:
    """The request on the wire verifies, names principal and user, and carries what was asked for."""
    with serving(ok(LEASE)) as gate, Caller(colour, gate.credentials()) as client:
        lease = client.authorize(
            principal_id="customer_123",
            feature_code="openai.gpt-4o",
            estimated_quantity=1200,
            lease="own-1",
            labels={"b": "2", "a": "1", "empty": ""},
        )
    (seen,) = gate.seen
    assert verified(seen)
    assert (seen.method, seen.target) == ("POST", "/mgt/v1/gate/authorize")
    assert seen.body == (
        b'{"feature_code":"openai.gpt-4o","estimated_quantity_minor":"1200","lease":"own-1","labels":{"a":"1","b":"2"}}'
    )
    assert seen.headers["x-principal-id"] == seen.headers["x-user-id"] == "customer_123"
    assert seen.headers["idempotency-key"].startswith("vluna-llm:")
    assert seen.headers["idempotency-key"].endswith(":authorize")
    assert len(seen.headers["x-request-id"]) == 32
    assert "x-realm-admin" not in seen.headers
    assert "x-billing-account-id" not in seen.headers
    assert (lease.dialect, lease.token) == ("lease_token", LEASE["lease_token"])
    assert client.client.dialect == "lease_token"


def test_latin1_ids_verify(colour: Colour) -> None:
    """An id outside ASCII goes out as Latin-1, which is how the gate reads it."""
    with serving(ok(LEASE)) as gate, Caller(colour, gate.credentials()) as client:
        client.authorize(principal_id="café é", user_id="ü ß", feature_code="f")
    assert gate.seen[0].headers["x-principal-id"] == "café é"
    assert verified(gate.seen[0])


def test_query_is_sent_as_it_was_signed(colour: Colour) -> None:
    """Percent-encoding happens once, before signing; also through a client of the caller's."""
    own: dict[str, Any] = {"http_client": httpx.Client() if colour == "sync" else httpx.AsyncClient()}
    for settings in ({}, own):
        with serving(ok([])) as gate, Caller(colour, gate.credentials(), **settings) as client:
            client.meters(principal_id="c", feature_code=["a/b@c:d", "e f"], expand=["pricing", "coverage"])
            client.ratings(principal_id="c", lease_id="650a1de9")
        assert [seen.target for seen in gate.seen] == [
            "/mgt/v1/gate/meters?feature_code=a%2Fb%40c:d,e%20f&expand=pricing,coverage",
            "/mgt/v1/ops/ratings?source_ref=gate_lease:650a1de9&limit=200",
        ]
        assert all(verified(seen) for seen in gate.seen)
        assert gate.seen[1].headers["x-realm-admin"] == "true"
        assert "idempotency-key" not in gate.seen[0].headers


def test_request_id_and_traceparent_go_along(colour: Colour) -> None:
    """Given ones as given; else a fresh request id and the current span of OpenTelemetry."""
    tracer = TracerProvider().get_tracer("test")
    with serving(ok(COMMIT)) as gate, Caller(colour, gate.credentials()) as client:
        given = f"00-{'a' * 32}-{'b' * 16}-01"
        client.commit(lease=A_LEASE, principal_id="c", quantity=1, request_id="req-1", traceparent=given)
        with tracer.start_as_current_span("model call") as span:
            result = client.commit(lease=A_LEASE, principal_id="c", quantity=1)
        client.commit(lease=A_LEASE, principal_id="c", quantity=1)
    first, second, third = gate.seen
    assert (first.headers["x-request-id"], first.headers["traceparent"]) == ("req-1", given)
    context = span.get_span_context()
    assert (
        second.headers["traceparent"] == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    )
    assert second.headers["x-request-id"] == result.request_id
    assert not trace.get_current_span().get_span_context().is_valid
    assert "traceparent" not in third.headers


def test_stored_bytes_go_out_again_unchanged(colour: Colour) -> None:
    """A stored settlement is the same bytes under the same key every time, with a fresh signature."""
    with serving(drop, FIRST_CALL_500, ok(COMMIT)) as gate, Caller(colour, gate.credentials()) as client:
        body = b'{"lease_token":"lease.x.y","feature_code":"f","quantity_minor":"3","odd":  1}'
        request = GateRequest.stored("commit", body, idempotency_key="k-1", principal_id="c", user_id="u")
        with pytest.raises(GateUnavailable) as caught:
            client.send(request)
        assert caught.value.meta["transport"] == "broken"
        with pytest.raises(GateUnavailable) as unexpected:
            parse_commit(client.send(request), now=0.0)
        assert unexpected.value.retryable
        result = parse_commit(client.send(request), now=0.0)
    assert result.commit_id == COMMIT["commit_id"]
    assert [seen.body for seen in gate.seen] == [body] * 3
    assert {seen.headers["idempotency-key"] for seen in gate.seen} == {"k-1"}
    assert len({seen.headers["authorization"] for seen in gate.seen}) == 3
    assert all(verified(seen) for seen in gate.seen)


@pytest.mark.parametrize("mishap", [FIRST_CALL_500, drop, answer(503, b"<html>", content_type="text/html")])
def test_authorize_asks_again_with_the_same_key_and_bytes(colour: Colour, mishap: Any) -> None:
    """The first call of every new principal fails: one quick retry, invisible to the caller."""
    with serving(mishap, ok(LEASE)) as gate, Caller(colour, gate.credentials()) as client:
        started = time.monotonic()
        assert client.authorize(principal_id="new", feature_code="f").lease_id == LEASE["lease_id"]
        assert time.monotonic() - started < 0.5
    first, second = gate.seen
    assert first.body == second.body
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert first.headers["authorization"] != second.headers["authorization"]


@pytest.mark.parametrize(
    "refusal",
    [
        refused(402, "SERVER.CONFIG", "grant balance exhausted"),
        refused(422, "RESOURCE.NOT_FOUND", "feature not found"),
        refused(429, "LIMIT.RATE_EXCEEDED", "rate limit exceeded"),
        refused(401, "AUTH.INVALID_SERVICE_SIGNATURE", "Signature mismatch"),
        refused(500, "SERVER.CONFIG", "no quota policy window configured for feature"),
    ],
)
def test_authorize_does_not_repeat_an_answer(colour: Colour, refusal: Any) -> None:
    """A refusal is asked for once, and never waited for."""
    expected = (GateDenied, InvalidGateRequest, GateRateLimited, GateAuthError, GateUnavailable)
    with serving(refusal) as gate, Caller(colour, gate.credentials()) as client, pytest.raises(expected):
        client.authorize(principal_id="c", feature_code="f")
    assert len(gate.seen) == 1


@pytest.mark.parametrize("bad", [hang, dribble, drop, FIRST_CALL_500])
def test_authorize_keeps_its_deadline(colour: Colour, bad: Any) -> None:
    """A gate that hangs, dribbles, drops or always fails costs the deadline and no more, and is asked again."""
    with serving(bad) as gate, Caller(colour, gate.credentials()) as client:
        started = time.monotonic()
        with pytest.raises(GateUnavailable) as caught:
            client.authorize(principal_id="c", feature_code="f", deadline=0.8)
        took = time.monotonic() - started
    assert took < 1.1
    assert caught.value.meta["attempts"] == len(gate.seen) >= 2
    assert len({seen.headers["idempotency-key"] for seen in gate.seen}) == 1


def test_a_dead_port_is_unavailable_at_once(colour: Colour) -> None:
    """No listener: the fault says that nothing was sent, and the address is named in the advice."""
    with serving(hang) as gate:
        credentials = gate.credentials()
    with Caller(colour, credentials) as client:
        with pytest.raises(GateUnavailable) as caught:
            client.commit(lease=A_LEASE, principal_id="c", quantity=1)
        assert caught.value.meta["transport"] == "connect"
        assert caught.value.retryable
        assert "VLUNA_SERVICE_BASE_URL" in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)


def test_a_time_out_bounds_a_whole_exchange(colour: Colour) -> None:
    """A number is the time for everything, even where bytes keep coming; then the client works on."""
    with serving(dribble, hang, ok(COMMIT)) as gate, Caller(colour, gate.credentials()) as client:
        for _ in range(2):
            started = time.monotonic()
            with pytest.raises(GateUnavailable) as caught:
                client.commit(lease=A_LEASE, principal_id="c", quantity=1, timeout=0.3)
            assert 0.2 < time.monotonic() - started < 0.6
            assert caught.value.meta["transport"] == "timeout"
        assert client.commit(lease=A_LEASE, principal_id="c", quantity=1).parsed


def test_time_between_bytes_does_not_add_up(colour: Colour) -> None:
    """Part of an answer, then silence: the whole is bounded, not only each wait."""

    def stall(_: Seen, connection: Any) -> None:
        time.sleep(0.35)
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        connection.recv(1)

    with serving(stall) as gate, Caller(colour, gate.credentials()) as client:
        started = time.monotonic()
        with pytest.raises(GateUnavailable):
            client.commit(lease=A_LEASE, principal_id="c", quantity=1, timeout=httpx.Timeout(0.4, connect=0.1))
        assert time.monotonic() - started < 0.65


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), httpx.Timeout(None)])
def test_a_call_without_a_time_out_is_refused(colour: Colour, timeout: Any) -> None:
    """Nothing may wait for ever."""
    with (
        serving(ok(COMMIT)) as gate,
        Caller(colour, gate.credentials()) as client,
        pytest.raises(ValueError, match="seconds"),
    ):
        client.commit(lease=A_LEASE, principal_id="c", quantity=1, timeout=timeout)


@pytest.mark.parametrize(
    ("script", "needle"),
    [
        (answer(302, b"", headers="location: https://elsewhere.example/\r\n"), "redirect"),
        (answer(404, b"<h1>Not Found</h1>", content_type="text/html"), "not a gate"),
        (answer(403, b"<h1>Forbidden</h1>", content_type="text/html"), "not a gate"),
        (answer(200, b"<html>welcome</html>", content_type="text/html"), "no lease"),
        (refused(404, "RESOURCE.NOT_FOUND", "Cannot POST /gate/authorize"), "Cannot POST"),
        (answer(404, {"message": "no Route matched with those values"}), "not a gate"),
        (answer(422, {"detail": "Unprocessable"}), "not a gate"),
        (answer(429, b"slow down", content_type="text/plain"), "not a gate"),
        (raw(b"SSH-2.0-OpenSSH_9.9\r\n\r\n"), "not HTTP"),
    ],
)
def test_what_is_not_a_gate_is_unavailable(colour: Colour, script: Any, needle: str) -> None:
    """Another server behind the address is no verdict on a customer; the setting is named."""
    with serving(script) as gate, Caller(colour, gate.credentials()) as client:
        with pytest.raises(GateUnavailable) as caught:
            client.authorize(principal_id="c", feature_code="f", deadline=0.3)
        assert needle in str(caught.value)
        assert "VLUNA_SERVICE_BASE_URL" in str(caught.value)


def test_an_unreadable_success_is_still_an_answer(colour: Colour) -> None:
    """A 2xx that cannot be read is kept raw and raises nothing, whatever the call."""
    for script in (answer(200, b"<html>"), answer(201, {"ok": True}), ok("what"), ok([1, "x"]), answer(200, [])):
        with serving(script) as gate, Caller(colour, gate.credentials()) as client:
            commit = client.commit(lease=A_LEASE, principal_id="c", quantity=1)
            ingest = client.ingest(principal_id="c", feature_code="f", quantity=1)
            cancel = client.cancel(lease=A_LEASE, principal_id="c")
            batch = client.send(GateRequest.stored("commit_batch", b"{}", idempotency_key="k", principal_id="c"))
            assert (commit.parsed, commit.charged, ingest.charged, cancel.parsed) == (False, None, None, False)
            assert commit.raw is not None
            assert batch.status in (200, 201)
            assert client.wallet_balance(principal_id="c").spendable_xusd == 0
            assert not client.health().healthy
            client.limits(principal_id="c")
            client.issue_token(principal_id="c")


def test_cancel_in_the_dialect_without_it_sends_nothing(colour: Colour) -> None:
    """A lease of that dialect lapses by itself; a gate that has no such route means the same."""
    script = refused(404, "RESOURCE.NOT_FOUND", "Cannot POST /mgt/v1/gate/cancel")
    with serving(script) as gate, Caller(colour, gate.credentials()) as client:
        result = client.cancel(lease=Lease("own-1", "f", dialect="lease"), principal_id="c")
        assert (result.lapsed, result.cancelled) == (True, False)
        assert gate.seen == []
        assert client.cancel(lease=A_LEASE, principal_id="c").lapsed


def test_health_is_outside_of_the_api_and_unsigned(colour: Colour) -> None:
    """The health check goes to the root and shows no key."""
    with serving(ok({"service": "vluna", "status": "healthy"})) as gate, Caller(colour, gate.credentials()) as client:
        assert client.health().healthy
    assert gate.seen[0].target == "/health"
    assert "authorization" not in gate.seen[0].headers


def test_connections_are_used_again_and_replaced_when_closed(colour: Colour) -> None:
    """Ten calls share a connection; one that the gate closed meanwhile is noticed before it is used."""

    def last(_: Seen, connection: Any) -> None:
        ok(LEASE)(_, connection)
        raise ConnectionAbortedError

    with serving(*[ok(LEASE)] * 9, last, ok(LEASE)) as gate, Caller(colour, gate.credentials()) as client:
        for _ in range(10):
            client.authorize(principal_id="c", feature_code="f")
        time.sleep(0.05)
        if client.loop is not None:
            client.loop.run_until_complete(asyncio.sleep(0.01))
        client.commit(lease=A_LEASE, principal_id="c", quantity=1)
    assert [seen.connection for seen in gate.seen] == [1] * 10 + [2]


def test_a_closing_or_chunked_answer_is_read(colour: Colour) -> None:
    """Proxies answer in chunks, without a length, or close: the answer is the same."""
    body = b'{"ok":true,"code":"OK","data":{"commit_id":"c-1","amount_xusd":"7"}}'
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    early = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"

    def until_close(_: Seen, connection: Any) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + body)
        raise ConnectionAbortedError

    with serving(raw(chunked), raw(early + chunked), until_close) as gate, Caller(colour, gate.credentials()) as client:
        for _ in range(4):
            assert client.commit(lease=A_LEASE, principal_id="c", quantity=1).amount_xusd == 7
    assert [seen.connection for seen in gate.seen] == [1, 1, 1, 2]


def test_bad_input_is_refused_before_anything_is_sent(colour: Colour) -> None:
    """Each mistake is one sentence that names the argument, and no byte goes out."""
    mistakes: list[tuple[str, str, dict[str, Any]]] = [
        ("authorize", "principal_id", {"principal_id": "", "feature_code": "f"}),
        ("authorize", "principal_id", {"principal_id": "x" * 256, "feature_code": "f"}),
        ("authorize", "principal_id", {"principal_id": " c", "feature_code": "f"}),
        ("authorize", "principal_id", {"principal_id": "a\r\nx-realm-admin: true", "feature_code": "f"}),
        ("authorize", "principal_id", {"principal_id": "顧客", "feature_code": "f"}),
        ("authorize", "principal_id", {"principal_id": None, "feature_code": "f"}),
        ("authorize", "user_id", {"principal_id": "c", "user_id": "u\n", "feature_code": "f"}),
        ("authorize", "feature_code", {"principal_id": "c", "feature_code": " "}),
        ("authorize", "estimated_quantity", {"principal_id": "c", "feature_code": "f", "estimated_quantity": -1}),
        ("authorize", "estimated_quantity", {"principal_id": "c", "feature_code": "f", "estimated_quantity": 1.5}),
        ("authorize", "idempotency_key", {"principal_id": "c", "feature_code": "f", "idempotency_key": "k" * 2001}),
        ("authorize", "request_id", {"principal_id": "c", "feature_code": "f", "request_id": "a\nb"}),
        ("authorize", "deadline", {"principal_id": "c", "feature_code": "f", "deadline": 0}),
        ("commit", "quantity", {"lease": A_LEASE, "principal_id": "c", "quantity": 0}),
        ("commit", "meter a", {"lease": A_LEASE, "principal_id": "c", "quantity": 1, "meters": {"a": -1}}),
        ("ingest", "quantity", {"principal_id": "c", "feature_code": "f"}),
        ("ratings", "limit", {"principal_id": "c", "limit": 500}),
        ("commit_batch", "items", {"items": [], "principal_id": "c"}),
    ]
    with serving(ok(LEASE)) as gate, Caller(colour, gate.credentials()) as client:
        for method, needle, arguments in mistakes:
            with pytest.raises(ConfigurationError) as caught:
                getattr(client, method)(**arguments)
            assert needle in str(caught.value)
            assert "\n" not in str(caught.value)
        assert gate.seen == []


def test_one_sync_client_serves_many_threads() -> None:
    """Fifty threads at once: every answer belongs to its own question."""

    def echo(seen: Seen, connection: Any) -> None:
        ok({**LEASE, "lease_id": seen.headers["x-principal-id"]})(seen, connection)

    with serving(echo) as gate, GateClient(gate.credentials()) as client:
        wrong: list[str] = []

        def work(number: int) -> None:
            for turn in range(10):
                name = f"c-{number}-{turn}"
                lease = client.authorize(principal_id=name, feature_code="f")
                if lease.lease_id != name:
                    wrong.append(name)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len(gate.seen) == 500


def test_one_async_client_serves_a_burst() -> None:
    """Three hundred at once share 64 connections, and every answer belongs to its own question."""

    def echo(seen: Seen, connection: Any) -> None:
        ok({**LEASE, "lease_id": seen.headers["x-principal-id"]})(seen, connection)

    async def burst(client: AsyncGateClient) -> list[str | None]:
        names = [f"c-{number}" for number in range(300)]
        leases = await asyncio.gather(*(client.authorize(principal_id=n, feature_code="f", deadline=20) for n in names))
        await client.aclose()
        return [lease.lease_id for lease in leases]

    with serving(echo) as gate:
        assert asyncio.run(burst(AsyncGateClient(gate.credentials()))) == [f"c-{number}" for number in range(300)]
        assert len({seen.connection for seen in gate.seen}) <= 64


def test_one_async_client_lives_through_many_loops() -> None:
    """`asyncio.run` again and again, without closing, and several loops in several threads at once."""
    with serving(ok(LEASE)) as gate:
        client = AsyncGateClient(gate.credentials())

        async def twice() -> None:
            for _ in range(2):
                await client.authorize(principal_id="c", feature_code="f")

        for _ in range(5):
            asyncio.run(twice())
        threads = [threading.Thread(target=lambda: asyncio.run(twice())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        asyncio.run(twice())
        pools: Any = client._transport
        assert len(pools._pools) <= 2
        assert len(gate.seen) == 20


def test_a_cancelled_call_leaves_no_half_exchange_behind() -> None:
    """Cancelling in mid-exchange closes that connection; the next call gets its own answer."""
    slow = threading.Event()

    def late(seen: Seen, connection: Any) -> None:
        slow.wait(0.3)
        ok({**LEASE, "lease_id": "late"})(seen, connection)

    async def run(client: AsyncGateClient) -> str | None:
        task = asyncio.create_task(client.authorize(principal_id="c", feature_code="f"))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        result = await client.commit(lease=A_LEASE, principal_id="c", quantity=1)
        await client.aclose()
        return result.commit_id

    with serving(late, ok(COMMIT)) as gate:
        assert asyncio.run(run(AsyncGateClient(gate.credentials()))) == COMMIT["commit_id"]
    assert [seen.connection for seen in gate.seen] == [1, 2]


def _in_child(client: GateClient, pipe: Any) -> None:
    lease = client.authorize(principal_id="child", feature_code="f")
    pipe.send(lease.lease_id)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this platform cannot fork")
def test_a_forked_child_uses_connections_of_its_own() -> None:
    """Parent and child share a client and never a connection."""
    with serving(ok(LEASE)) as gate, GateClient(gate.credentials()) as client:
        client.authorize(principal_id="parent", feature_code="f")
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        child = context.Process(target=_in_child, args=(client, there))
        child.start()
        assert here.poll(10)
        assert here.recv() == LEASE["lease_id"]
        child.join(10)
        client.authorize(principal_id="parent", feature_code="f")
    assert [(s.headers["x-principal-id"], s.connection) for s in gate.seen] == [
        ("parent", 1),
        ("child", 2),
        ("parent", 1),
    ]


def test_a_proxy_of_the_environment_is_used_but_never_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTPS_PROXY applies to a remote gate, NO_PROXY excepts, and loopback always goes straight."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert not proxy_applies("https://gate.example.com/mgt/v1")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert proxy_applies("https://gate.example.com/mgt/v1")
    assert not proxy_applies("http://127.0.0.1:4711/mgt/v1")
    assert not proxy_applies("http://localhost:4711/mgt/v1")
    assert isinstance(open_transport("https://gate.example.com/mgt/v1"), HttpxTransport)
    assert isinstance(open_transport("http://127.0.0.1:4711/mgt/v1"), SocketTransport)
    monkeypatch.setenv("no_proxy", "example.com")
    assert not proxy_applies("https://gate.example.com/mgt/v1")


def test_secrets_are_in_no_repr(colour: Colour) -> None:
    """Neither the service secret nor lease tokens, access tokens or bodies show in a repr or in an error's text."""
    hidden = [SECRET, repr(base64.b64decode(SECRET)), LEASE["lease_token"], "jwt-1"]
    token = ok({"access_token": "jwt-1", "refresh_token": "jwt-1-refresh", "expires_in": 900})
    scripts = (ok(LEASE), token, ok(LEASE), answer(200, {"ok": True}))
    with serving(*scripts) as gate, Caller(colour, gate.credentials()) as client:
        lease = client.authorize(principal_id="c", feature_code="f")
        issued = client.issue_token(principal_id="c")
        request = GateRequest.stored("cancel", LEASE["lease_token"].encode(), idempotency_key="k", principal_id="c")
        answered = client.send(request)
        with pytest.raises(GateUnavailable) as caught:
            client.authorize(principal_id="c", feature_code="f")
        shown = [gate.credentials(), client.client, lease, issued, request, answered, caught.value]
        sealed = client.client.sealed(request, None, None)
        text = " ".join(repr(thing) + str(thing) for thing in [*shown, sealed, client.client._signer])
    assert issued.access_token == "jwt-1"
    for secret in hidden:
        assert secret not in text
    assert "SVC-AUTH" not in text
