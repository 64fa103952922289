"""A web application whose requests are billed to their customers: a real server, real clients, the gate's books."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from provider import INPUT, OUTPUT, Provider
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from vluna_llm import Vluna, call_context
from vluna_llm.errors import GateDenied, MissingPrincipal
from vluna_llm.integrations.asgi import VlunaMiddleware
from vluna_llm.sandbox import Sandbox

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


class Service:
    """The application under test. The customer is what its (pretended) authentication found in the key."""

    def __init__(self, metering: Vluna, provider: Provider, **options: Any) -> None:
        self.client = metering.wrap(openai.OpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))
        self.aclient = metering.wrap(openai.AsyncOpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))
        routes = [
            Route("/plain", self.plain),
            Route("/threads", self.threads),
            Route("/stream", self.stream),
            Route("/thread-stream", self.thread_stream),
            Route("/background", self.background),
            Route("/spent", self.spent),
            Route("/late", self.late),
            WebSocketRoute("/ws", self.socket),
        ]
        self.app = Starlette(routes=routes)
        self.app.add_middleware(VlunaMiddleware, **{"identity": customer_of, **options})

    async def plain(self, request: Request) -> Response:
        await self.ask()
        return PlainTextResponse("done")

    def threads(self, request: Request) -> Response:
        self.client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES)
        return PlainTextResponse("done")

    async def stream(self, request: Request) -> Response:
        async def words() -> AsyncIterator[str]:
            stream = await self.aclient.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES, stream=True)
            async with stream:
                async for chunk in stream:
                    yield chunk.choices[0].delta.content or ""

        return StreamingResponse(words())

    def thread_stream(self, request: Request) -> Response:
        def words() -> Iterator[str]:
            with self.client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES, stream=True) as stream:
                for chunk in stream:
                    yield chunk.choices[0].delta.content or ""

        return StreamingResponse(words())

    async def background(self, request: Request) -> Response:
        return PlainTextResponse("later", background=BackgroundTask(self.ask))

    async def spent(self, request: Request) -> Response:
        await self.ask()
        scope = request.state.vluna
        await scope.wait_async(5)
        return JSONResponse({"xusd": scope.settled_xusd, "tokens": scope.usage.total_tokens})

    async def late(self, request: Request) -> Response:
        async def words() -> AsyncIterator[str]:
            yield "begun "
            await self.ask()

        return StreamingResponse(words())

    async def socket(self, socket: WebSocket) -> None:
        await socket.accept()
        await self.ask()
        await socket.close()

    async def ask(self) -> None:
        await self.aclient.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES)


def customer_of(scope: Any) -> dict[str, str] | None:
    key = dict(scope["headers"]).get(b"authorization", b"").decode()
    return {"principal_id": key.removeprefix("Bearer "), "end_user": "u-1"} if key else None


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The application on a real server; leaving it is an orderly shutdown."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(15)
            assert not thread.is_alive()


def as_customer(customer: str) -> dict[str, str]:
    return {"authorization": f"Bearer {customer}"}


@pytest.mark.parametrize("path", ["/plain", "/threads", "/stream", "/thread-stream", "/background"])
def test_whatever_a_request_does_is_billed_to_its_customer(
    vluna: Vluna, shared_gate: Sandbox, provider: Provider, customer: str, path: str
) -> None:
    """Also a generator that runs after the handler has returned, in the loop or in a thread, and a background task."""
    with served(Service(vluna, provider).app) as url:
        answer = httpx.get(url + path, headers=as_customer(customer))
        assert answer.status_code == 200
        assert answer.text
    assert vluna.flush(5)
    (entry,) = shared_gate.booked(customer).entries
    assert entry.quantity == INPUT + OUTPUT
    assert entry.labels["end_user"] == "u-1"


def test_a_client_that_leaves_a_stream_pays_nothing(
    vluna: Vluna, shared_gate: Sandbox, provider: Provider, customer: str
) -> None:
    provider.behaviour = "hang"
    with served(Service(vluna, provider).app) as url:
        with httpx.stream("GET", url + "/stream", headers=as_customer(customer)) as answer:
            next(answer.iter_text())
        deadline = time.monotonic() + 5
        while shared_gate.leases(customer)[0].state == "active" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert shared_gate.leases(customer)[0].state == "canceled"
        provider.released.set()
    assert shared_gate.booked(customer).entries == ()


def test_requests_at_the_same_time_are_never_mixed_up(
    vluna: Vluna, shared_gate: Sandbox, provider: Provider, customer: str
) -> None:
    provider.behaviour = "slow"
    customers = [f"{customer}-{n}" for n in range(10)]

    async def main(url: str) -> None:
        async with httpx.AsyncClient() as client:
            paths = ["/stream", "/plain", "/threads"]
            jobs = [client.get(url + paths[n % 3], headers=as_customer(customers[n % 10])) for n in range(30)]
            assert {answer.status_code for answer in await asyncio.gather(*jobs)} == {200}

    with served(Service(vluna, provider).app) as url:
        asyncio.run(main(url))
    assert vluna.flush(10)
    assert [len(shared_gate.booked(one).entries) for one in customers] == [3] * 10


def test_a_refusal_is_an_answer(vluna: Vluna, shared_gate: Sandbox, provider: Provider, customer: str) -> None:
    shared_gate.set_credit(customer, 0)
    with served(Service(vluna, provider).app) as url:
        answer = httpx.get(url + "/plain", headers=as_customer(customer))
    assert answer.status_code == 402
    error = answer.json()["error"]
    assert error["type"] == "insufficient_credit"
    assert error["provider_specific_fields"]["vluna"]["reason"] == "insufficient_credit"
    assert provider.requests == []


def test_a_rate_limit_says_when_to_come_again(
    vluna: Vluna, shared_gate: Sandbox, provider: Provider, customer: str
) -> None:
    shared_gate.rate(1, principal_id=customer)
    with served(Service(vluna, provider).app) as url:
        first, second = (httpx.get(url + "/plain", headers=as_customer(customer)) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 429)
    assert int(second.headers["retry-after"]) >= 1


def test_without_refusals_they_are_the_servers(
    vluna: Vluna, shared_gate: Sandbox, provider: Provider, customer: str
) -> None:
    shared_gate.set_credit(customer, 0)
    with served(Service(vluna, provider, refusals=False).app) as url:
        assert httpx.get(url + "/plain", headers=as_customer(customer)).status_code == 500


def test_a_refusal_behind_the_first_byte_ends_the_answer(
    vluna: Vluna, shared_gate: Sandbox, provider: Provider, customer: str
) -> None:
    shared_gate.set_credit(customer, 0)
    service = Service(vluna, provider)
    with served(service.app) as url, pytest.raises(httpx.RemoteProtocolError):
        httpx.get(url + "/late", headers=as_customer(customer))

    async def what_the_server_sees() -> None:
        transport = httpx.ASGITransport(service.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            await client.get("/late", headers=as_customer(customer))

    with pytest.raises(GateDenied):
        asyncio.run(what_the_server_sees())


def test_a_task_beyond_its_limit_is_a_refusal_too(
    vluna: Vluna, shared_gate: Sandbox, provider: Provider, customer: str
) -> None:
    identity = lambda scope: {"principal_id": customer, "max_tokens": 1}  # noqa: E731
    with served(Service(vluna, provider, identity=identity).app) as url:
        answer = httpx.get(url + "/plain")
    assert (answer.status_code, answer.json()["error"]["code"]) == (402, "budget_exceeded")


def test_nobody_is_served_for_nothing(vluna: Vluna, provider: Provider) -> None:
    with served(Service(vluna, provider).app) as url:
        assert httpx.get(url + "/plain").status_code == 500
    assert provider.requests == []


def test_identity_may_be_a_coroutine_and_its_errors_are_the_servers(
    vluna: Vluna, shared_gate: Sandbox, provider: Provider, customer: str
) -> None:
    async def identity(scope: Any) -> dict[str, str]:
        await asyncio.sleep(0)
        if scope["path"] == "/threads":
            raise PermissionError
        return {"principal_id": customer}

    with served(Service(vluna, provider, identity=identity).app) as url:
        assert httpx.get(url + "/plain").status_code == 200
        assert httpx.get(url + "/threads").status_code == 500
    assert vluna.flush(5)
    assert len(shared_gate.booked(customer).entries) == 1


def test_the_handler_sees_what_its_request_cost(
    vluna: Vluna, shared_gate: Sandbox, provider: Provider, customer: str
) -> None:
    with served(Service(vluna, provider).app) as url:
        told = httpx.get(url + "/spent", headers=as_customer(customer)).json()
    assert told == {"xusd": shared_gate.booked(customer).charged_xusd, "tokens": INPUT + OUTPUT}


def test_a_context_of_the_server_is_not_taken_over(
    vluna: Vluna, shared_gate: Sandbox, provider: Provider, customer: str
) -> None:
    """A server may be started inside somebody's context (a test, a notebook): requests name their own customers."""
    service = Service(vluna, provider)

    async def main() -> list[int]:
        statuses: list[int] = []
        async with call_context(principal_id="whoever-started-it", end_user="operator"):
            transport = httpx.ASGITransport(service.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
                statuses.append((await client.get("/plain", headers=as_customer(customer))).status_code)
                with pytest.raises(MissingPrincipal):
                    await client.get("/plain")
        return statuses

    assert asyncio.run(main()) == [200]
    assert vluna.flush(5)
    (entry,) = shared_gate.booked(customer).entries
    assert entry.labels["end_user"] == "u-1"


@pytest.mark.parametrize("gives_it", [True, False])
def test_at_shutdown_everything_is_delivered(
    make_vluna: Callable[..., Vluna], gate: Sandbox, provider: Provider, customer: str, gives_it: bool
) -> None:
    vluna = make_vluna(gate=gate)
    gate.faults.add("latency", "commits", times=1, seconds=0.7)
    options = {"vluna": vluna} if gives_it else {}
    with served(Service(vluna, provider, **options).app) as url:
        assert httpx.get(url + "/plain", headers=as_customer(customer)).status_code == 200
    assert len(gate.booked(customer).entries) == (1 if gives_it else 0)
    assert vluna.flush(5)
    assert len(gate.booked(customer).entries) == 1


def test_bare_asgi_scopes_pass(vluna: Vluna) -> None:
    """Other types than HTTP, WebSocket and lifespan belong to the application alone."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asked: list[Any] = []
    middleware = VlunaMiddleware(app, identity=asked.append)  # type: ignore[arg-type]
    asyncio.run(middleware({"type": "something.new"}, None, None))  # type: ignore[arg-type]
    assert (seen, asked) == (["something.new"], [])


@pytest.mark.parametrize("named", [{"principal_id": ""}, {"customer": "x"}])
@pytest.mark.parametrize("mode", ["observe", "off"])
def test_who_cannot_be_billed_is_served_unless_in_enforce(
    make_vluna: Callable[..., Vluna], provider: Provider, mode: Any, named: Any
) -> None:
    """A page that calls no model, too, would fail for everybody who has not signed in."""
    vluna = make_vluna()
    with served(Service(vluna, provider, vluna=vluna, identity=lambda scope: named).app) as url:
        assert httpx.get(url + "/plain").status_code == 500
        vluna.mode = mode
        assert httpx.get(url + "/plain").status_code == 200
    assert len(provider.requests) == 1


@pytest.mark.parametrize("inner", ["same", "other"])
def test_an_application_inside_of_another_one_is_within_its_limit(
    vluna: Vluna, shared_gate: Sandbox, provider: Provider, customer: str, inner: str
) -> None:
    """Each has a middleware; the inner one may name another customer, or nobody: then it is the outer one's."""
    named = {"same": None, "other": {"principal_id": f"{customer}_other"}}[inner]
    inside = Service(vluna, provider, identity=lambda scope: named).app

    def outer(scope: Any) -> dict[str, Any]:
        return {"principal_id": customer, "max_tokens": 1 if scope["path"] == "/threads" else None}

    with served(VlunaMiddleware(inside, identity=outer)) as url:
        assert httpx.get(url + "/plain").status_code == 200
        assert httpx.get(url + "/threads").status_code == 402
    assert vluna.flush(5)
    payer = customer if inner == "same" else f"{customer}_other"
    assert len(shared_gate.booked(payer).entries) == len(provider.requests) == 1
