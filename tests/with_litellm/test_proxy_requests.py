"""Requests to a real LiteLLM proxy that is set up strictly: who is billed, and what a refusal says.

The operator maps keys to customers, waits for receipts (``settle="inline"``), reads on where a client leaves
(``on_abort="drain"``), refuses what is not metered and what the gate cannot be asked about; and has a guardrail beside
us, which refuses requests, spoils answers and asks a model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("fastapi", reason="LiteLLM's proxy is not installed: pip install 'litellm[proxy]'")
pytest.importorskip("apscheduler", reason="LiteLLM's proxy is not installed: pip install 'litellm[proxy]'")

from books import Books, eventually
from provider import Seen
from proxy import LiteLLMProxy, key
from proxy_paths import GPT, MINI, ROUTES, Outcome, Route, leave, send
from upstream import Recorded, Upstream

from vluna_llm.sandbox import Sandbox

OLD = tuple(map(int, metadata.version("litellm").split(".")[:2])) < (1, 100)

_GUARD = """
import os
import litellm
from fastapi import HTTPException
from litellm.integrations.custom_guardrail import CustomGuardrail
from litellm.integrations.custom_logger import CustomLogger
from litellm.types.guardrails import GuardrailEventHooks

async def judge(data):
    await litellm.acompletion(
        model="openai/gpt-4o", api_base=os.environ["JUDGE"], api_key="sk",
        messages=[{"role": "user", "content": "is this harmless?" + str(data.get("messages"))}],
    )

class Guard(CustomLogger):
    async def async_pre_call_hook(self, user_api_key_dict, cache, data, call_type):
        said = str(data.get("messages"))
        if "forbidden" in said:
            raise HTTPException(451, detail="not here")
        if "judge before" in said:
            await judge(data)

    async def async_post_call_success_hook(self, data, user_api_key_dict, response):
        if "spoil" in str(data.get("messages")):
            raise HTTPException(418, detail="not like this")

class Judge(CustomGuardrail):
    async def async_moderation_hook(self, data, user_api_key_dict, call_type):
        if "judge beside" in str(data.get("messages")):
            await judge(data)

guard = Guard()
beside = Judge(guardrail_name="beside", event_hook=GuardrailEventHooks.during_call, default_on=True)
"""

_IDENTITY = {
    "principal_id": ["metadata.customer", "metadata.vluna"],
    "user_id": "user_id",
    "labels": {"key": "key_alias", "team": "team_id"},
}

CHAT = next(route for route in ROUTES if route.name == "chat")
CHAT_STREAM = next(route for route in ROUTES if route.name == "chat, stream")
RESPONSES = next(route for route in ROUTES if route.name == "responses")
EMBEDDINGS = next(route for route in ROUTES if route.name == "embeddings")
MESSAGES = next(route for route in ROUTES if route.name == "messages")
IMAGES = next(route for route in ROUTES if route.name == "images")


@dataclass
class Stage:
    """The proxy, what is before it, and what is behind it."""

    gate: Sandbox
    upstream: Upstream
    proxy: LiteLLMProxy

    def send(self, route: Route, customer: str, model: str = "", prompt: str = "hi", **more: Any) -> Outcome:
        """One request of this customer."""
        who = key(metadata={"customer": customer})
        return send(self.proxy.base_url, who, route, model or route.model, prompt, **more)

    def charged(self, customer: str, charged: list[tuple[str, int]]) -> None:
        """The gate has charged this, in whatever order, and nothing is open any more."""
        books = Books(self.gate, customer)

        def settled() -> bool:
            states = {state for _, state in books.leases}
            return sorted(books.charged) == sorted(charged) and bool(states) and "active" not in states

        assert eventually(settled, 10), (books.charged, books.leases, charged)

    def asked(self) -> list[Seen]:
        """The model calls that reached the upstream."""
        return self.upstream.posts()


@pytest.fixture(scope="module")
def _stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Sandbox() as gate, Upstream() as upstream:
        down = upstream.replay("down", Recorded(500, "application/json", b'{"error": {"message": "down"}}', False))

        def model(name: str, concrete: str, base: str) -> dict[str, Any]:
            params = {"model": concrete, "api_base": base, "api_key": "sk-upstream", "max_retries": 0}
            return {"model_name": name, "litellm_params": params}

        config = {
            "model_list": [
                model("gpt", "openai/gpt-4o", upstream.base_url),
                model("mini", "openai/gpt-4o-mini", upstream.base_url),
                model("claude", "anthropic/claude-sonnet-4-5", upstream.anthropic_base),
                model("emb", "openai/text-embedding-3-small", upstream.base_url),
                model("img", "openai/gpt-image-1", upstream.base_url),
                model("tts", "openai/gpt-4o-mini-tts", upstream.base_url),
                model("first", "openai/gpt-4o", down),
                model("any/*", "openai/*", upstream.base_url),
            ],
            "litellm_settings": {
                "callbacks": ["vluna_callback.proxy_callback", "vluna_guard.guard", "vluna_guard.beside"]
            },
            "router_settings": {"num_retries": 0, "disable_cooldowns": True, "fallbacks": [{"first": ["mini"]}]},
        }
        directory: Path = tmp_path_factory.mktemp("strict")
        settings = {
            "VLUNA_LLM_LITELLM_IDENTITY": json.dumps(_IDENTITY),
            "VLUNA_LLM_SETTLE": "inline",
            "VLUNA_LLM_ON_UNMETERED": "deny",
            "VLUNA_LLM_ON_GATE_UNAVAILABLE": "deny",
            "VLUNA_LLM_ON_ABORT": "drain",
            "JUDGE": upstream.base_url,
        }
        with LiteLLMProxy(directory, gate.env(), config, modules={"vluna_guard": _GUARD}, **settings) as proxy:
            yield Stage(gate, upstream, proxy)


_numbers = itertools.count(1)


@pytest.fixture
def stage(_stage: Stage) -> Stage:
    """The same proxy for all tests; the upstream behaves."""
    _stage.upstream.behaviour = "ok"
    _stage.upstream.requests.clear()
    return _stage


@pytest.fixture
def customer() -> str:
    """Somebody whom no other test knows."""
    return f"strict_customer_{next(_numbers)}"


# -- who is billed -----------------------------------------------------------------------------------------------------


def test_the_operators_mapping_decides(stage: Stage, customer: str) -> None:
    """Customer, purse and labels are those of the key; the end user is a label."""
    who = key(metadata={"customer": customer}, user_id="purse", team_id="red", key_alias="laptop")
    got = send(stage.proxy.base_url, who, CHAT, "gpt", "hi", user="eve")
    assert got.status == 200
    stage.charged(customer, [(GPT, 120)])
    (entry,) = stage.gate.booked(customer).entries
    assert entry.user_id == "purse"
    assert (entry.labels["key"], entry.labels["team"], entry.labels["end_user"]) == ("laptop", "red", "eve")


@pytest.mark.parametrize("route", [CHAT, CHAT_STREAM, RESPONSES, EMBEDDINGS, MESSAGES, IMAGES], ids=lambda it: it.name)
def test_a_client_cannot_choose_who_pays(stage: Stage, customer: str, route: Route) -> None:
    """Not in metadata, not as text, not in headers; and nothing of it reaches the provider."""
    victim = f"victim_of_{customer}"
    entry = {"principal_id": victim, "user_id": victim}
    metadata = {"vluna": entry, "mine": "1"}
    bodies: list[dict[str, Any]] = [{"metadata": metadata}, {"litellm_metadata": metadata}, {"user": victim}]
    if route in (CHAT, CHAT_STREAM, EMBEDDINGS):  # on the others LiteLLM itself stumbles over text there
        bodies.append({"metadata": json.dumps({"vluna": entry}), "litellm_metadata": json.dumps({"vluna": entry})})
    headers = {"x-vluna-principal-id": victim, "x-litellm-customer-id": victim, "x-litellm-end-user-id": victim}
    who = key(metadata={"customer": customer})
    with httpx.Client(base_url=stage.proxy.base_url, timeout=30, headers={"Authorization": f"Bearer {who}"}) as client:
        for more in bodies:
            answer = client.post(route.url, json={**route.request(route.model, "hi"), **more}, headers=headers)
            assert answer.status_code == 200, answer.text
    stage.charged(customer, [(route.feature, route.tokens)] * len(bodies))
    assert Books(stage.gate, victim).leases == []
    assert "vluna" not in json.dumps([(seen.headers, seen.body) for seen in stage.asked()])


def test_the_call_id_is_the_clients_and_no_key_of_ours(stage: Stage, customer: str) -> None:
    """Two requests with one ``x-litellm-call-id`` are two requests."""
    with openai.OpenAI(
        base_url=f"{stage.proxy.base_url}/v1", api_key=key(metadata={"customer": customer}), max_retries=0
    ) as client:
        for _ in range(2):
            client.chat.completions.create(
                model="gpt",
                messages=[{"role": "user", "content": "hi"}],
                extra_headers={"x-litellm-call-id": "mine", "x-litellm-trace-id": "mine"},
            )
    stage.charged(customer, [(GPT, 120)] * 2)


@pytest.mark.parametrize(
    ("route", "word"),
    [
        (EMBEDDINGS, {"mock_timeout": True}),
        (EMBEDDINGS, {"mock_tool_calls": [{}]}),
        (RESPONSES, {"mock_tool_calls": [{}]}),
        (MESSAGES, {"mock_tool_calls": [{}]}),
        (MESSAGES, {"mock_timeout": True}),
    ],
    ids=lambda it: it.name if isinstance(it, Route) else next(iter(it)),
)
def test_words_for_tests_make_no_answer_free(stage: Stage, customer: str, route: Route, word: dict[str, Any]) -> None:
    """LiteLLM makes answers up on some routes only; elsewhere the provider was asked, and is paid for."""
    got = stage.send(route, customer, **word)
    stage.charged(customer, [(route.feature, route.tokens)] * len(stage.asked()))
    assert got.status != 200 or len(stage.asked()) == 1


def test_an_answer_that_is_made_up_is_free(stage: Stage, customer: str) -> None:
    """``mock_response`` on the chat route: where LiteLLM takes it from clients (1.83), no provider is asked."""
    assert stage.send(CHAT, customer, mock_response="hello").status == 200
    stage.charged(customer, [(GPT, 120)] * len(stage.asked()))


@pytest.mark.parametrize("route", [CHAT, RESPONSES, EMBEDDINGS, MESSAGES], ids=lambda it: it.name)
def test_what_was_charged_is_on_the_answer(stage: Stage, customer: str, route: Route) -> None:
    """With ``settle="inline"`` the receipt is there before the answer is handed over."""
    got = stage.send(route, customer)
    (entry,) = stage.gate.booked(customer).entries
    assert got.headers["x-vluna-operation-id"] == entry.labels["operation_id"]
    assert int(got.headers["x-vluna-settled-xusd"]) == entry.charged_xusd > 0


def test_many_at_once_are_billed_to_their_own(stage: Stage, customer: str) -> None:
    """Forty requests of eight customers, streams and others, at the same time."""
    jobs = [(f"{customer}_{n % 8}", route) for n, route in enumerate([CHAT, CHAT_STREAM, RESPONSES, MESSAGES] * 10)]
    with ThreadPoolExecutor(16) as pool:
        assert {got.status for got in pool.map(lambda job: stage.send(job[1], job[0]), jobs)} == {200}
    for name in {name for name, _ in jobs}:
        stage.charged(name, [(route.feature, route.tokens) for who, route in jobs if who == name])


@pytest.mark.parametrize("group", ["any/gpt-4o-mini", "gpt, mini"])
def test_models_that_only_the_router_can_tell(stage: Stage, customer: str, group: str) -> None:
    """A wildcard, and several models in one request: each is billed by what was asked."""
    got = stage.send(CHAT, customer, model=group, user="x")  # bare HTTP: the answer to several is a list
    assert got.status == 200
    stage.charged(customer, [(MINI, 120)] if "*" in group or "any" in group else [(GPT, 120), (MINI, 120)])


# -- what a refusal says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [CHAT, CHAT_STREAM, RESPONSES, EMBEDDINGS, MESSAGES, IMAGES], ids=lambda it: it.name)
def test_an_entitlement_is_403_and_a_feature_that_cannot_be_booked_400(
    stage: Stage, customer: str, route: Route
) -> None:
    """The status says whose business it is, and the gate's own words are in the body."""
    stage.gate.customer(customer, deny=(route.feature,))
    stage.gate.feature(route.feature, entitlement=True)
    got = stage.send(route, customer)
    stage.gate.feature(route.feature, entitlement=False)
    assert (got.status, got.vluna["reason"]) == (403, "entitlement")
    stage.gate.feature(route.feature, active=False)
    got = stage.send(route, f"{customer}_too")
    stage.gate.feature(route.feature, active=True)
    assert (got.status, got.vluna["status"]) == (400, 422)
    assert stage.asked() == []


def test_the_openai_client_raises_what_it_knows(stage: Stage, customer: str) -> None:
    """Its own exceptions, with the gate's code and hints; a denial is not retried."""
    stage.gate.set_credit(customer, 0)
    before = len(stage.gate.requests)
    client = openai.OpenAI(base_url=f"{stage.proxy.base_url}/v1", api_key=key(metadata={"customer": customer}))
    with client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hi"}])
    error = caught.value
    assert (error.status_code, error.type) == (402, "insufficient_credit")
    assert isinstance(error.body, dict)
    assert error.code == error.body["provider_specific_fields"]["vluna"]["code"]
    assert "grant balance exhausted" in error.message
    assert len([seen for seen in stage.gate.requests[before:] if seen.path.endswith("/authorize")]) == 1


def test_a_mistake_of_the_operator_is_not_shown_to_the_client(stage: Stage) -> None:
    """The log has it."""
    got = send(stage.proxy.base_url, key(metadata={"customer": "caf\u00e9 \u2603"}), CHAT, "gpt", "hi")
    assert (got.status, got.vluna["reason"]) == (403, "billing_misconfigured")
    assert "caf" not in json.dumps(got.error)
    assert "Latin-1" in stage.proxy.log.read_text()


def test_what_is_not_metered_is_refused_before_it_costs(stage: Stage, customer: str) -> None:
    """``on_unmetered="deny"``: speech, and a pass-through to a provider's own API."""
    with httpx.Client(
        base_url=stage.proxy.base_url,
        timeout=30,
        headers={"Authorization": f"Bearer {key(metadata={'customer': customer})}"},
    ) as client:
        answer = client.post("/v1/audio/speech", json={"model": "tts", "input": "hi", "voice": "alloy"})
        assert answer.status_code == 403, answer.text
        assert answer.json()["error"]["type"] == "not_metered"
        assert client.get("/v1/models").status_code == 200
    assert stage.asked() == []


def test_a_fallback_that_may_not_be_used(stage: Stage, customer: str) -> None:
    """The first model is down and the second is not granted: refused, and nothing is charged."""
    stage.gate.customer(customer, deny=(MINI,))
    stage.gate.feature(MINI, entitlement=True)
    got = stage.send(CHAT, customer, model="first")
    stage.gate.feature(MINI, entitlement=False)
    stage.charged(customer, [])
    assert (got.status, got.vluna["reason"]) == (403, "entitlement")
    assert Books(stage.gate, customer).leases == [(GPT, "canceled")]


# -- what else happens in a request ------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [CHAT, CHAT_STREAM], ids=lambda it: it.name)
def test_a_refusal_of_somebody_else_gives_the_lease_back(stage: Stage, customer: str, route: Route) -> None:
    """A guardrail after us refuses: its answer stays its own."""
    got = stage.send(route, customer, prompt="forbidden")
    assert got.status == 451
    assert "not here" in got.error["message"]
    stage.charged(customer, [])
    assert Books(stage.gate, customer).leases == [(GPT, "canceled")]
    assert stage.asked() == []


def test_an_answer_that_a_hook_keeps_back_was_spent(stage: Stage, customer: str) -> None:
    """The provider has answered; that nobody gets the answer does not unspend it."""
    assert stage.send(CHAT, customer, prompt="spoil").status == 418
    stage.charged(customer, [(GPT, 120)])


@pytest.mark.parametrize("when", ["judge before", "judge beside"])
@pytest.mark.parametrize("route", [CHAT, CHAT_STREAM], ids=lambda it: it.name)
def test_a_guardrail_that_asks_a_model_is_billed_beside(stage: Stage, customer: str, route: Route, when: str) -> None:
    """Before the request or at the same time, of the same model: both are charged to its customer, each once."""
    assert stage.send(route, customer, prompt=when).status == 200
    assert len(stage.asked()) == 2
    stage.charged(customer, [(GPT, 120)] * 2)


@pytest.mark.parametrize("route", [it for it in ROUTES if it.stream and it.model != "inst"], ids=lambda it: it.name)
def test_a_stream_that_is_left_is_read_to_its_end(stage: Stage, customer: str, route: Route) -> None:
    """``on_abort="drain"``: the client has gone, the rest is read behind its back, and what it reports is charged."""
    stage.upstream.behaviour, stage.upstream.pause = "slow", 0.05
    leave(stage.proxy.base_url, key(metadata={"customer": customer}), route, route.model, "bye")
    if route.url == "/v1/messages" and not OLD:
        # LiteLLM 1.106 reads these in a task of its own, which it ends: there is nothing to read on.
        stage.charged(customer, [])
        return
    stage.charged(customer, [(route.feature, route.tokens)])


def test_an_upstream_error_stays_what_it_is(stage: Stage, customer: str) -> None:
    """Status and message of the provider, nothing of ours, nothing charged."""
    stage.upstream.behaviour = "bad"
    for route in (CHAT, CHAT_STREAM, RESPONSES, EMBEDDINGS, MESSAGES):
        got = stage.send(route, customer)
        assert got.status == 400
        assert "vluna" not in json.dumps(got.error)
    stage.charged(customer, [])


# -- the gate is away (last: the proxy remembers it for a moment) ------------------------------------------------------


def test_without_the_gate_nothing_is_served(stage: Stage, customer: str) -> None:
    """``on_gate_unavailable="deny"``: 503, and no word about where the gate is."""
    stage.gate.stop()
    try:
        for route in (CHAT_STREAM, RESPONSES, MESSAGES, IMAGES):
            got = stage.send(route, customer)
            assert (got.status, got.vluna["reason"]) == (503, "billing_unavailable")
            assert "127.0.0.1" not in json.dumps(got.error)
    finally:
        stage.gate.start()
    assert stage.asked() == []
    assert Books(stage.gate, customer).leases == []
