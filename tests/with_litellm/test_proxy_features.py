"""A client of the proxy chooses its model from those that are offered, and not what is billed for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
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

PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 50

CHAT: dict[str, Any] = {"messages": MESSAGES}
CLAUDE: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 50}
INPUT: dict[str, Any] = {"input": "hi"}
PROMPT: dict[str, Any] = {"prompt": "hi"}

GPT, MINI = ("openai.gpt-4o", 120), ("openai.gpt-4o-mini", 120)
SONNET = ("anthropic.claude-sonnet-4-5", 120)
EMBEDDING = ("openai.text-embedding-3-small", 8)


@dataclass
class Stage:
    """The proxy, what is before it, and what is behind it."""

    gate: Sandbox
    upstream: Upstream
    proxy: LiteLLMProxy

    def post(self, team: str, path: str, body: dict[str, Any]) -> httpx.Response:
        """One request of this team, read to its end."""
        who = {"Authorization": f"Bearer {key(team_id=team)}"}
        return httpx.post(f"{self.proxy.base_url}{path}", json=body, headers=who, timeout=30)

    def charged(self, customer: str) -> list[tuple[str, int]]:
        """What this customer has paid for, once nothing is open any more."""
        books = Books(self.gate, customer)
        eventually(lambda: bool(books.leases) and all(state != "active" for _, state in books.leases), 5)
        return books.charged

    def asked(self) -> list[Seen]:
        """The model calls that reached the upstream and were answered."""
        return [seen for seen in self.upstream.posts() if not seen.path.startswith("/recorded/")]


@pytest.fixture(scope="module")
def _stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Sandbox() as gate, Upstream() as upstream:
        down = upstream.replay("down", Recorded(500, "application/json", b'{"error": {"message": "down"}}', False))

        def model(name: str, concrete: str, base: str = "", **more: Any) -> dict[str, Any]:
            params = {"model": concrete, "api_base": base or upstream.base_url, "api_key": "sk", "max_retries": 0}
            return {"model_name": name, "litellm_params": {**params, **more}}

        azure = model("azure", "azure/my-deployment", upstream.host, api_version="2024-10-21")
        config = {
            "model_list": [
                model("gpt", "openai/gpt-4o"),
                model("gpt-down", "openai/gpt-4o", down),
                model("mini", "openai/gpt-4o-mini"),
                model("claude", "anthropic/claude-sonnet-4-5", upstream.anthropic_base),
                model("claude-down", "anthropic/claude-sonnet-4-5", down),
                model("emb", "openai/text-embedding-3-small"),
                model("emb-down", "openai/text-embedding-3-small", down),
                model("img", "openai/gpt-image-1"),
                {**azure, "model_info": {"base_model": "azure/gpt-4o"}},
            ],
            "router_settings": {"num_retries": 0, "disable_cooldowns": True},
        }
        with LiteLLMProxy(tmp_path_factory.mktemp("findings"), gate.env(), config) as proxy:
            yield Stage(gate, upstream, proxy)


@pytest.fixture
def stage(_stage: Stage) -> Stage:
    """The same proxy for all tests; the upstream behaves."""
    _stage.upstream.behaviour = "ok"
    _stage.upstream.requests.clear()
    return _stage


_numbers = itertools.count(1)


@pytest.fixture
def team() -> str:
    """Somebody whom no other test knows."""
    return f"findings_team_{next(_numbers)}"


# -- a client names another feature ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "model", "body", "entry"),
    [
        ("/v1/responses", "gpt", INPUT, GPT),
        ("/v1/messages", "claude", CLAUDE, SONNET),
        ("/v1/embeddings", "emb", INPUT, EMBEDDING),
        ("/v1/images/generations", "img", PROMPT, ("openai.gpt-image-1", 1050)),
    ],
    ids=["responses", "messages", "embeddings", "images"],
)
def test_a_deployment_that_litellm_takes_no_notice_of_is_no_feature(
    stage: Stage, team: str, path: str, model: str, body: dict[str, Any], entry: Any
) -> None:
    """Only chat completions take ``deployment_id`` for the model; elsewhere the model that was asked is sold."""
    answer = stage.post(team, path, {"model": model, **body, "deployment_id": "cheap"})
    assert stage.charged(team) == ([entry] if stage.asked() else []), answer.text


@pytest.mark.parametrize(
    ("path", "model", "body"),
    [
        ("/v1/chat/completions", "mini", CHAT),
        ("/v1/responses", "mini", INPUT),
        ("/v1/messages", "mini", CLAUDE),
        ("/v1/embeddings", "emb", INPUT),
    ],
    ids=["chat", "responses", "messages on an OpenAI model", "embeddings"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_model_in_extra_body_is_the_one_that_is_billed(
    stage: Stage, team: str, path: str, model: str, body: dict[str, Any], stream: bool
) -> None:
    """LiteLLM may lay ``extra_body`` over the request: another model is asked than the one of the deployment."""
    if stream and model == "emb":
        pytest.skip("embeddings are no stream")
    stage.post(team, path, {"model": model, **body, "stream": stream, "extra_body": {"model": "o1-pro"}})
    asked = [f"openai.{seen.body['model']}" for seen in stage.asked()]
    assert [feature for feature, _ in stage.charged(team)] == asked


def test_the_client_says_nothing_about_an_azure_deployment(stage: Stage, team: str) -> None:
    """``base_model`` is the operator's word; 1.83 lets it through from the body."""
    stage.post(team, "/v1/chat/completions", {"model": "azure", **CHAT, "base_model": "azure/gpt-4o-mini"})
    assert stage.charged(team) == [("azure.gpt-4o", 120)]
