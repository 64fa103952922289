"""A client of a real LiteLLM proxy that would rather have another customer pay: whatever it writes, and wherever.

Every way into the proxy ends in the same: the customer of the key pays for what its request asked of a provider, and
the customer whom the client names is not even known to the gate.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata as installed
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="LiteLLM's proxy is not installed: pip install 'litellm[proxy]'")
pytest.importorskip("apscheduler", reason="LiteLLM's proxy is not installed: pip install 'litellm[proxy]'")

from books import MESSAGES, Books, eventually
from provider import Seen
from proxy import LiteLLMProxy, key
from upstream import Recorded, Upstream

from vluna_llm.sandbox import Sandbox

OLD = tuple(map(int, installed.version("litellm").split(".")[:2])) < (1, 100)

CHAT: dict[str, Any] = {"messages": MESSAGES}
CLAUDE: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 50}
INPUT: dict[str, Any] = {"input": "hi"}
GEMINI: dict[str, Any] = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}

GPT, MINI = ("openai.gpt-4o", 120), ("openai.gpt-4o-mini", 120)
SONNET = ("anthropic.claude-sonnet-4-5", 120)
EMBEDDING = ("openai.text-embedding-3-small", 8)
WHISPER = "openai.gpt-4o-transcribe"

_DOWN = Recorded(500, "application/json", b'{"error": {"message": "down"}}', False)
_LONG = Recorded(
    400,
    "application/json",
    b'{"error": {"message": "This model\'s maximum context length is 10 tokens.", "code": "context_length_exceeded"}}',
    False,
)
_POLICY = Recorded(
    400,
    "application/json",
    b'{"error": {"message": "rejected: content_policy_violation", "code": "content_policy_violation"}}',
    False,
)


@dataclass
class Stage:
    """The proxy, what is before it, and what is behind it."""

    gate: Sandbox
    upstream: Upstream
    proxy: LiteLLMProxy

    def post(self, team: str, path: str, body: dict[str, Any], **more: Any) -> httpx.Response:
        """One request of this team, read to its end."""
        headers = {"Authorization": f"Bearer {key(team_id=team)}", **more.pop("headers", {})}
        given = more or {"json": body}
        return httpx.post(f"{self.proxy.base_url}{path}", headers=headers, timeout=30, **given)

    def charged(self, customer: str) -> list[tuple[str, int]]:
        """What this customer has paid for, once nothing is open any more."""
        books = Books(self.gate, customer)
        assert eventually(lambda: all(state != "active" for _, state in books.leases), 5), books.leases
        return books.charged

    def asked(self) -> list[Seen]:
        """The model calls that reached the upstream and were answered."""
        return [seen for seen in self.upstream.posts() if not seen.path.startswith("/recorded/")]

    def only(self, team: str, victim: str) -> None:
        """The team has paid for every call that was answered, each once, and the victim is not known to the gate."""
        asked = self.asked()
        eventually(lambda: len(Books(self.gate, team).charged) == len(asked), 5)
        assert sorted(feature for feature, _ in self.charged(team)) == sorted(map(_feature, asked))
        assert Books(self.gate, victim).leases == []
        assert Books(self.gate, victim).charged == []


def _feature(seen: Seen) -> str:
    if seen.path.endswith("/audio/transcriptions"):
        return WHISPER
    return f"{'anthropic' if seen.path.startswith('/anthropic/') else 'openai'}.{seen.body['model']}"


@pytest.fixture(scope="module")
def _stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Sandbox() as gate, Upstream() as upstream:
        down, long = upstream.replay("down", _DOWN), upstream.replay("long", _LONG)

        def model(name: str, concrete: str, base: str = "") -> dict[str, Any]:
            params = {"model": concrete, "api_base": base or upstream.base_url, "api_key": "sk", "max_retries": 0}
            return {"model_name": name, "litellm_params": params}

        config = {
            "model_list": [
                model("gpt", "openai/gpt-4o"),
                model("gpt-down", "openai/gpt-4o", down),
                model("gpt-long", "openai/gpt-4o", long),
                model("gpt-policy", "openai/gpt-4o", upstream.replay("policy", _POLICY)),
                model("mini", "openai/gpt-4o-mini"),
                model("mini-down", "openai/gpt-4o-mini", down),
                model("claude", "anthropic/claude-sonnet-4-5", upstream.anthropic_base),
                model("claude-down", "anthropic/claude-sonnet-4-5", down),
                model("emb", "openai/text-embedding-3-small"),
                model("emb-down", "openai/text-embedding-3-small", down),
                model("whisper", "openai/gpt-4o-transcribe"),
                model("tts", "openai/gpt-4o-mini-tts"),
            ],
            "router_settings": {"num_retries": 0, "disable_cooldowns": True},
        }
        with LiteLLMProxy(tmp_path_factory.mktemp("clients"), gate.env(), config) as proxy:
            yield Stage(gate, upstream, proxy)


_numbers = itertools.count(1)


@pytest.fixture
def stage(_stage: Stage) -> Stage:
    """The same proxy for all tests; the upstream behaves."""
    _stage.upstream.behaviour = "ok"
    _stage.upstream.requests.clear()
    return _stage


@pytest.fixture
def team() -> str:
    """Somebody whom no other test knows."""
    return f"clients_team_{next(_numbers)}"


@pytest.fixture
def victim(team: str) -> str:
    """Somebody else, whom the client would have pay."""
    return f"victim_of_{team}"


# -- what a body brings along ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", ["metadata", "litellm_metadata"])
@pytest.mark.parametrize(
    ("path", "model", "other", "body", "entry"),
    [
        ("/v1/chat/completions", "gpt-down", "mini", CHAT, MINI),
        ("/v1/responses", "gpt-down", "mini", INPUT, MINI),
        ("/v1/messages", "claude-down", "claude", CLAUDE, SONNET),
        ("/v1/embeddings", "emb-down", "emb", INPUT, EMBEDDING),
    ],
    ids=["chat", "responses", "messages", "embeddings"],
)
def test_a_fallback_that_the_client_writes_names_no_customer(
    stage: Stage,
    team: str,
    victim: str,
    path: str,
    model: str,
    other: str,
    body: dict[str, Any],
    entry: Any,
    bucket: str,
) -> None:
    """The Router lays a fallback's own arguments over the request, long after the pre-call hook has cleaned it."""
    fallback = {"model": other, bucket: {"vluna": {"principal_id": victim}}}
    answer = stage.post(team, path, {"model": model, **body, "fallbacks": [fallback]})
    assert stage.charged(team) == ([entry] if answer.status_code == 200 else [])
    stage.only(team, victim)


def _said(victim: str) -> dict[str, Any]:
    return {"vluna": {"principal_id": victim, "feature_code": MINI[0], "idempotency_key": "mine"}}


def _key_of(victim: str) -> dict[str, Any]:
    """What LiteLLM's proxy itself writes down about a key."""
    entry = {"principal_id": victim}
    known = {"team_id": victim, "user_id": victim, "metadata": {"vluna": entry}, "team_metadata": {"vluna": entry}}
    return {
        "user_api_key_auth": known,
        "user_api_key_team_id": victim,
        "user_api_key_user_id": victim,
        "user_api_key_metadata": {"vluna": entry},
        "user_api_key_team_metadata": {"vluna": entry},
    }


def _bodies(victim: str) -> dict[str, dict[str, Any]]:
    said, known = {"metadata": _said(victim)}, {"metadata": _key_of(victim)}
    mini = {"model": "mini", **said, "litellm_metadata": _said(victim)}
    deep = {"model": "mini-down", **said, "fallbacks": [{"model": "mini-down", **said, "fallbacks": [mini]}]}
    return {
        "fallbacks in fallbacks": {"model": "gpt-down", "fallbacks": [deep, mini]},
        "a fallback for each group": {"model": "gpt-down", "fallbacks": [{"gpt-down": [mini]}]},
        "fallbacks with a key": {"model": "gpt-down", "fallbacks": [{**mini, **known, "litellm_metadata": known}]},
        "fallbacks without a call": {
            "model": "gpt-down",
            "fallbacks": [{**mini, "litellm_logging_obj": None, "litellm_call_id": "x", "user_api_key_auth": known}],
        },
        "fallbacks of the module": {"model": "gpt-down", "default_fallbacks": [mini]},
        "context window": {"model": "gpt-long", "context_window_fallbacks": [{"gpt-long": [mini]}]},
        "context window, plain": {"model": "gpt-long", "context_window_fallbacks": [mini]},
        "context window, fallbacks": {"model": "gpt-long", "fallbacks": [mini]},
        "content policy": {"model": "gpt-policy", "content_policy_fallbacks": [{"gpt-policy": [mini]}]},
        "extra_body": {"model": "gpt", "extra_body": {**said, "litellm_metadata": _said(victim), **_said(victim)}},
        "litellm_params": {"model": "gpt", "litellm_params": {**said, **known, "litellm_metadata": _said(victim)}},
        "proxy_server_request": {"model": "gpt", "proxy_server_request": {"body": said, "headers": _said(victim)}},
        "secret_fields": {"model": "gpt", "secret_fields": said},
        "the root": {"model": "gpt", **_said(victim), "principal_id": victim, "call_context": said},
        "a key of its own": {"model": "gpt", **known, "litellm_metadata": _key_of(victim), **_key_of(victim)},
        "headers": {"model": "gpt", "headers": _said(victim), "extra_headers": {"x-vluna-principal-id": victim}},
        "several models": {"model": "gpt, mini", **said, "litellm_metadata": _said(victim)},
        "text": {"model": "gpt", "metadata": json.dumps(_said(victim)), "litellm_metadata": json.dumps(_said(victim))},
        "no mapping": {"model": "gpt-down", "fallbacks": [{"model": "mini", "metadata": {"vluna": victim}}]},
        "odd": {"model": "gpt-down", "fallbacks": [{"model": "mini", "metadata": {"vluna": {"x": 1}}}]},
    }


WAYS = list(_bodies(""))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/queue/chat/completions"], ids=["chat", "queue"])
@pytest.mark.parametrize("way", WAYS)
def test_whatever_a_body_brings_the_key_pays(stage: Stage, team: str, victim: str, way: str, path: str) -> None:
    """On the route that asks every hook, and on the one that asks none."""
    headers = {"x-vluna-principal-id": victim, "x-litellm-spend-logs-metadata": json.dumps(_said(victim))}
    stage.post(team, path, {"priority": 0, **CHAT, **_bodies(victim)[way]}, headers=headers)
    stage.only(team, victim)


def test_the_ways_are_ways(stage: Stage, team: str, victim: str) -> None:
    """Fallbacks of the body do lead to a provider, or the tests above would show nothing."""
    for way in ("fallbacks in fallbacks", "context window, fallbacks", "fallbacks with a key"):
        answer = stage.post(team, "/v1/chat/completions", {**CHAT, **_bodies(victim)[way]})
        assert answer.status_code == 200, answer.text
    assert stage.charged(team) == [MINI] * 3


def test_a_form_names_no_customer(stage: Stage, team: str, victim: str) -> None:
    """Fields of a form are text, and LiteLLM parses them."""
    said = json.dumps(_said(victim))
    for fields in ({"metadata": said}, {"litellm_metadata": said}, {"metadata[vluna][principal_id]": victim}):
        files = {"file": ("a.wav", b"RIFF0000WAVE", "audio/wav")}
        answer = stage.post(team, "/v1/audio/transcriptions", {}, data={"model": "whisper", **fields}, files=files)
        assert answer.status_code == 200, answer.text
    stage.only(team, victim)
    assert len(stage.charged(team)) == 3


def test_a_fallback_whose_answer_is_made_up_gives_the_lease_back(stage: Stage, team: str) -> None:
    """No provider has answered: nothing is charged, and nothing of the customer's is held until it lapses."""
    fallback = {"model": "mini", "mock_response": "made up"}
    stage.post(team, "/v1/chat/completions", {"model": "gpt-down", **CHAT, "fallbacks": [fallback]})
    assert eventually(lambda: {state for _, state in Books(stage.gate, team).leases} == {"canceled"}, 5)
    assert stage.charged(team) == [MINI] * len(stage.asked())


# -- routes that no hook sees ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("bucket", ["metadata", "litellm_metadata"])
def test_a_queued_chat_bills_the_key_and_nobody_else(
    stage: Stage, team: str, victim: str, bucket: str, stream: bool
) -> None:
    """LiteLLM's ``/queue/chat/completions`` calls the Router without asking any hook."""
    body = {"model": "gpt", "priority": 0, "stream": stream, **CHAT, bucket: _said(victim)}
    answer = stage.post(team, "/queue/chat/completions", body)
    assert answer.status_code == 200, answer.text
    stage.only(team, victim)
    assert stage.charged(team) == [GPT]


def test_a_queued_chat_is_billed_by_the_keys_own_entry(stage: Stage, team: str) -> None:
    """The operator's mapping is asked, as on any other route."""
    who = {"Authorization": f"Bearer {key(metadata={'vluna': {'principal_id': team, 'labels': {'plan': 'gold'}}})}"}
    answer = stage.post("another", "/queue/chat/completions", {"model": "gpt", "priority": 0, **CHAT}, headers=who)
    assert answer.status_code == 200, answer.text
    assert stage.charged(team) == [GPT]
    (entry,) = stage.gate.booked(team).entries
    assert entry.labels["plan"] == "gold"


def test_a_queued_chat_of_nobody_is_refused(stage: Stage, victim: str) -> None:
    """A key that belongs to no customer: nobody is asked, whomever the client names."""
    who = {"Authorization": f"Bearer {key()}"}
    body = {"model": "gpt", "priority": 0, **CHAT, "metadata": {**_said(victim), **_key_of(victim)}}
    answer = stage.post("", "/queue/chat/completions", body, headers=who)
    assert answer.status_code == 400, answer.text
    assert "No principal" in answer.text
    assert stage.asked() == []
    assert Books(stage.gate, victim).leases == []


def test_requests_of_one_connection_are_their_own(stage: Stage, team: str) -> None:
    """A pipelined request begins in the context of the one before it: a proxy in front may send many customers' on one
    connection."""

    def request(who: str, path: str) -> bytes:
        body = json.dumps({"model": "gpt", "priority": 0, **CHAT}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {who}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    queue = "/queue/chat/completions"
    with socket.create_connection(("127.0.0.1", stage.proxy.port), 30) as connection:
        first = request(key(team_id=f"{team}_1"), "/v1/chat/completions")
        second, third = request(key(team_id=f"{team}_2"), queue), request(key(), queue)
        connection.sendall(first + second + third)
        answers = b""
        while answers.count(b"HTTP/1.1 ") < 3 and (more := connection.recv(65536)):
            answers += more
    assert answers.count(b"HTTP/1.1 200") == 2
    assert (stage.charged(f"{team}_1"), stage.charged(f"{team}_2")) == ([GPT], [GPT])
    assert len(stage.asked()) == 2


@pytest.mark.parametrize("where", ["the event", "the response", "both"])
def test_a_websocket_bills_the_key_and_nobody_else(stage: Stage, team: str, victim: str, where: str) -> None:
    """The events of ``/v1/responses`` as a WebSocket come long after the hook, and are calls of their own."""
    client = pytest.importorskip("websockets.sync.client", reason="pip install websockets")
    said: dict[str, Any] = {"metadata": _said(victim), "litellm_metadata": {**_said(victim), **_key_of(victim)}}
    # 1.83 takes the event's model for LiteLLM's own name of it, and knows the proxy's names at the connection alone.
    asking: dict[str, Any] = {"model": "anthropic/claude-sonnet-4-5" if OLD else "claude", "input": "hi"}
    event = {"type": "response.create", **asking, **(said if where != "the response" else {})}
    if where != "the event":
        event["response"] = {**asking, **said}
    address = stage.proxy.base_url.replace("http", "ws") + "/v1/responses?model=claude"
    who = {"Authorization": f"Bearer {key(team_id=team)}"}
    with client.connect(address, additional_headers=who) as connection:
        connection.send(json.dumps(event))
        for said_back in connection:
            if '"response.completed"' in said_back[:60] or '"error"' in said_back[:60]:
                break
    stage.only(team, victim)
    assert stage.charged(team) == [SONNET]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1beta/models/gpt:generateContent", GEMINI),
        ("/v1beta/models/gpt:streamGenerateContent", GEMINI),
        ("/v1beta/interactions", {"model": "gpt", **INPUT}),
    ],
    ids=["generateContent", "streamGenerateContent", "interactions"],
)
def test_a_route_that_ends_in_a_metered_function_bills_the_key(
    stage: Stage, team: str, victim: str, path: str, body: dict[str, Any]
) -> None:
    """LiteLLM translates it for another provider: the proxy knows whose key it is, whatever the client says."""
    answer = stage.post(team, path, {**body, "metadata": _said(victim), "litellm_metadata": _said(victim)})
    assert answer.status_code == 200, answer.text
    stage.only(team, victim)
    assert stage.charged(team) == [GPT]


def test_what_is_not_metered_is_told_with_its_customer(stage: Stage, team: str, victim: str) -> None:
    """Speech: nobody is billed and no lease is taken, and the operator learns whose key it was."""
    body = {"model": "tts", "input": "hi", "voice": "alloy", "metadata": _said(victim)}
    assert stage.post(team, "/v1/audio/speech", body).status_code == 200
    told = f"endpoint=litellm.aspeech principal.id={team}\n"
    assert eventually(lambda: told in stage.proxy.log.read_text(), 5)
    assert Books(stage.gate, team).leases == []
    assert Books(stage.gate, victim).leases == []
