"""Every route of a real LiteLLM proxy in every situation, against the books of the gate.

The proxy is a process of its own (`proxy`), between a client and an upstream of ours; the gate is in this process. Each
cell has a customer of its own. At the end every cell's books are looked at once more, so that nothing that came later
was charged; and the table is printed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="LiteLLM's proxy is not installed: pip install 'litellm[proxy]'")
pytest.importorskip("apscheduler", reason="LiteLLM's proxy is not installed: pip install 'litellm[proxy]'")

from books import TABLES, Books, eventually
from provider import _data
from proxy import MASTER_KEY, LiteLLMProxy, key
from proxy_paths import ROUTES, Outcome, Route, leave, send
from upstream import Recorded, Upstream, _UpstreamHandler

from vluna_llm.sandbox import Sandbox

Expect = list[tuple[str, str]]
VERSION = metadata.version("litellm")
OLD = tuple(map(int, VERSION.split(".")[:2])) < (1, 100)
NEVER_CACHED = {"images"}
"""What LiteLLM asks the provider for every time, with us and without."""
if OLD:
    NEVER_CACHED |= {
        "responses, stream",
        "messages",
        "messages, stream",
        "messages on an OpenAI model, stream",
    }


_CELLS: dict[tuple[str, str], str] = {}


class _Edge(Upstream):
    """The upstream, which also lets a text completion hang."""

    def __init__(self) -> None:
        super().__init__()
        edge = self

        class Handler(_UpstreamHandler):
            owner = edge

            def _completions(self, body: dict[str, Any]) -> None:
                if edge.behaviour != "hang" or not body.get("stream"):
                    return super()._completions(body)
                choice = {"text": "a ", "index": 0, "finish_reason": None, "logprobs": None}
                head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}

                def events() -> Iterator[str]:
                    for _ in range(3):
                        yield _data({**head, "choices": [choice]})
                    edge.released.wait(20)

                self._events(events())

        self._server.RequestHandlerClass = Handler


@dataclass
class Stage:
    """The proxy with what is before and behind it, and what the books said of each customer."""

    gate: Sandbox
    upstream: _Edge
    proxy: LiteLLMProxy
    books: dict[str, tuple[Expect, list[tuple[str, int]]]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def customer(self) -> str:
        """Somebody whom no other cell knows."""
        return f"proxy_customer_{next(self.numbers)}"

    def send(self, route: Route, customer: str, model: str = "", prompt: str = "") -> Outcome:
        """One request of this customer."""
        who = key(team_id=customer)
        return send(self.proxy.base_url, who, route, model or route.model, prompt or f"hello from {customer}")

    def calm(self) -> None:
        """The upstream behaves."""
        upstream = self.upstream
        upstream.behaviour, upstream.pause = "ok", 0.02
        upstream.requests.clear()
        upstream.flaked.clear()
        upstream.released.set()
        upstream.released.clear()

    def expect(self, customer: str, leases: Expect, charged: list[tuple[str, int]]) -> None:
        """The gate's books say this, soon, and at the end still."""
        books = Books(self.gate, customer)
        eventually(lambda: books.leases == leases and books.charged == charged, 10)
        assert (books.leases, books.charged) == (leases, charged)
        assert [entry.kind for entry in self.gate.booked(customer).entries] == ["commit"] * len(charged)
        self.books[customer] = (leases, charged)

    def asked(self) -> int:
        """How many model calls reached the upstream."""
        return len(self.upstream.posts())


def _config(upstream: _Edge) -> dict[str, Any]:
    down = upstream.replay("down", Recorded(500, "application/json", b'{"error": {"message": "down"}}', False))

    def model(name: str, concrete: str, base: str) -> dict[str, Any]:
        params = {"model": concrete, "api_base": base, "api_key": "sk-upstream", "max_retries": 0}
        return {"model_name": name, "litellm_params": {**params, "num_retries": 0} if base == down else params}

    openai, anthropic = upstream.base_url, upstream.anthropic_base
    models = {
        "gpt": ("openai/gpt-4o", "openai/gpt-4o-mini", openai),
        "claude": ("anthropic/claude-sonnet-4-5", "anthropic/claude-haiku-4-5", anthropic),
        "emb": ("openai/text-embedding-3-small", "openai/text-embedding-3-large", openai),
        "inst": ("text-completion-openai/gpt-3.5-turbo-instruct", "text-completion-openai/davinci-002", openai),
        "img": ("openai/gpt-image-1", "openai/gpt-image-1-mini", openai),
    }
    listed = []
    for name, (first, second, base) in models.items():
        listed += [model(name, first, base), model(f"{name}-down", first, down), model(f"{name}-other", second, base)]
    return {
        "model_list": listed,
        "litellm_settings": {"cache": True, "cache_params": {"type": "local"}},
        "router_settings": {
            "num_retries": 1,
            "retry_after": 0,
            "disable_cooldowns": True,
            "fallbacks": [{f"{name}-down": [f"{name}-other"]} for name in models],
        },
    }


@pytest.fixture(scope="module")
def stage(shared_gate: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One proxy for all cells; at its end every customer's books say what they said."""
    directory: Path = tmp_path_factory.mktemp("proxy")
    with _Edge() as upstream, LiteLLMProxy(directory, shared_gate.env(), _config(upstream)) as proxy:
        stage = Stage(shared_gate, upstream, proxy)
        yield stage
        upstream.released.set()
        for customer, (leases, charged) in stage.books.items():
            books = Books(shared_gate, customer)
            assert (books.leases, books.charged) == (leases, charged), f"{customer} was settled once more"


# -- the situations ----------------------------------------------------------------------------------------------------


def success(stage: Stage, route: Route) -> str:
    customer = stage.customer()
    got = stage.send(route, customer)
    assert (got.status, got.error) == (200, {})
    assert not route.stream or got.pieces > 1
    stage.expect(customer, [(route.feature, "closed")], [(route.feature, route.tokens)])
    (entry,) = stage.gate.booked(customer).entries
    assert entry.labels["usage_source"] == "provider"
    if named := got.headers.get("x-vluna-operation-id"):
        assert entry.labels["operation_id"] == named
    return f"charged {route.tokens}" + ("" if named else ", no header")


def failure(stage: Stage, route: Route) -> str:
    stage.upstream.behaviour = "bad"
    customer = stage.customer()
    got = stage.send(route, customer)
    assert got.status == 400
    assert "provider_specific_fields" not in got.error
    assert stage.asked() == 1
    stage.expect(customer, [(route.feature, "canceled")], [])
    return "400, cancelled"


def denial(stage: Stage, route: Route) -> str:
    customer = stage.customer()
    stage.gate.set_credit(customer, 0)
    got = stage.send(route, customer)
    assert (got.status, got.vluna["reason"], got.vluna["status"]) == (402, "insufficient_credit", 402)
    assert got.error["message"] == got.vluna["message"]
    assert got.error.get("code", got.vluna["code"]) == got.vluna["code"]  # Anthropic's errors have none
    assert stage.asked() == 0
    stage.expect(customer, [], [])
    return "402"


def rate_limit(stage: Stage, route: Route) -> str:
    customer = stage.customer()
    stage.gate.rate(1, principal_id=customer)
    assert stage.send(route, customer).status == 200
    got = stage.send(route, customer, prompt="and another one")
    assert (got.status, got.vluna["reason"]) == (429, "rate_limited")
    assert int(got.headers["retry-after"]) == got.vluna["retry_after"] > 0
    assert [hint["type"] for hint in got.vluna["hints"]] == ["rate.limit"]
    assert stage.asked() == 1
    stage.expect(customer, [(route.feature, "closed")], [(route.feature, route.tokens)])
    return "429, Retry-After"


def abort(stage: Stage, route: Route) -> str:
    stage.upstream.behaviour, stage.upstream.pause = ("hang", 0) if route.stream else ("slow_body", 0.35)
    customer = stage.customer()
    leave(stage.proxy.base_url, key(team_id=customer), route, route.model, f"bye from {customer}")
    if route.stream:
        stage.expect(customer, [(route.feature, "canceled")], [])
        return "cancelled at once"
    stage.expect(customer, [(route.feature, "closed")], [(route.feature, route.tokens)])
    return f"runs on, charged {route.tokens}"


def cache_hit(stage: Stage, route: Route) -> str:
    customer = stage.customer()
    assert stage.send(route, customer).status == 200
    stage.expect(customer, [(route.feature, "closed")], [(route.feature, route.tokens)])
    got = stage.send(route, customer)
    assert (got.status, got.error) == (200, {})
    if route.name in NEVER_CACHED:
        assert stage.asked() == 2
        stage.expect(customer, [(route.feature, "closed")] * 2, [(route.feature, route.tokens)] * 2)
        return "never cached by LiteLLM"
    assert stage.asked() == 1
    stage.expect(customer, [(route.feature, "closed"), (route.feature, "canceled")], [(route.feature, route.tokens)])
    return "free"


def retry(stage: Stage, route: Route) -> str:
    stage.upstream.behaviour = "flaky"
    customer = stage.customer()
    got = stage.send(route, customer)
    if not route.retried:
        return _not_retried(stage, route, customer, got)
    assert (got.status, got.error) == (200, {})
    assert stage.asked() == 2
    stage.expect(customer, [(route.feature, "closed")], [(route.feature, route.tokens)])
    return f"one lease, charged {route.tokens}"


def fallback(stage: Stage, route: Route) -> str:
    customer = stage.customer()
    got = stage.send(route, customer, model=f"{route.model}-down")
    if not route.retried:
        return _not_retried(stage, route, customer, got)
    assert (got.status, got.error) == (200, {})
    stage.expect(customer, [(route.feature, "canceled"), (route.other, "closed")], [(route.other, route.tokens)])
    return f"two leases, charged {route.tokens}"


def _not_retried(stage: Stage, route: Route, customer: str, got: Outcome) -> str:
    assert got.status == 500
    assert "provider_specific_fields" not in got.error
    stage.expect(customer, [(route.feature, "canceled")], [])
    return "LiteLLM does not: 500, cancelled"


def nobody(stage: Stage, route: Route) -> str:
    got = send(stage.proxy.base_url, MASTER_KEY, route, route.model, "who pays?")
    assert (got.status, got.vluna["reason"]) == (403, "missing_principal")
    assert "VLUNA_LLM_LITELLM_IDENTITY" in got.error["message"]
    assert stage.asked() == 0
    return "403"


SITUATIONS: tuple[Callable[[Stage, Route], str], ...] = (
    success,
    failure,
    denial,
    rate_limit,
    abort,
    cache_hit,
    retry,
    fallback,
    nobody,
)


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_the_books_are_right(stage: Stage, route: Route, situation: Callable[[Stage, Route], str]) -> None:
    """One route in one situation: what the client gets, what the upstream sees, and what the gate has written down."""
    stage.calm()
    cell = (route.name, situation.__name__.replace("_", " "))
    _CELLS[cell] = "WRONG"
    _CELLS[cell] = situation(stage, route)


def table() -> Iterator[str]:
    """The cells that were run, as markdown."""
    if not _CELLS:
        return
    columns = list(dict.fromkeys(column for _, column in _CELLS))
    yield f"| LiteLLM {VERSION}, proxy | " + " | ".join(columns) + " |"
    yield "| --- " * (len(columns) + 1) + "|"
    for row in dict.fromkeys(row for row, _ in _CELLS):
        yield f"| {row} | " + " | ".join(_CELLS.get((row, column), "-") for column in columns) + " |"


TABLES.append(table)
