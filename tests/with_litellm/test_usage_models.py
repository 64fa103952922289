"""Which model a call through LiteLLM goes to, as the feature code has it."""

from __future__ import annotations

from typing import Any

import litellm
import pytest

from vluna_llm.integrations._litellm_usage import model_call_of, model_of
from vluna_llm.usage import FeatureMap, normalize_feature_code

CODES = [
    ({"model": "gpt-4o"}, "openai.gpt-4o"),
    ({"model": "openai/gpt-4o"}, "openai.gpt-4o"),
    ({"model": "openai/responses/gpt-5"}, "openai.gpt-5"),
    ({"model": "text-completion-openai/gpt-3.5-turbo-instruct"}, "openai.gpt-3.5-turbo-instruct"),
    ({"model": "claude-sonnet-4-20250514"}, "anthropic.claude-sonnet-4-20250514"),
    ({"model": "anthropic/claude-sonnet-5"}, "anthropic.claude-sonnet-5"),
    ({"model": "bedrock/us.anthropic.claude-sonnet-4-v1:0"}, "bedrock.us.anthropic.claude-sonnet-4-v1:0"),
    ({"model": "bedrock/converse/us.anthropic.claude-sonnet-4-v1:0"}, "bedrock.us.anthropic.claude-sonnet-4-v1:0"),
    ({"model": "bedrock/us-gov-west-1/anthropic.claude-v2:1"}, "bedrock.anthropic.claude-v2:1"),
    ({"model": "azure/ours"}, "azure.ours"),
    ({"model": "azure/ours", "base_model": "azure/gpt-4o"}, "azure.gpt-4o"),
    ({"model": "azure/ours", "model_info": {"base_model": "gpt-4o-mini"}}, "azure.gpt-4o-mini"),
    ({"model": "azure/ours", "metadata": {"model_info": {"base_model": "gpt-4o"}}}, "azure.gpt-4o"),
    ({"model": "azure/command-r-plus"}, "azure.command-r-plus"),
    ({"model": "azure_ai/grok-3"}, "azure.grok-3"),
    ({"model": "gpt-4o", "custom_llm_provider": "azure"}, "azure.gpt-4o"),
    ({"model": "gpt-4", "deployment_id": "ours"}, "azure.ours"),
    ({"model": "vertex_ai/claude-sonnet-4@20250514"}, "vertex_ai.claude-sonnet-4@20250514"),
    ({"model": "gemini/gemini-2.5-flash"}, "google.gemini-2.5-flash"),
    ({"model": "openrouter/anthropic/claude-3.5-sonnet"}, "openrouter.anthropic/claude-3.5-sonnet"),
    ({"model": "together_ai/meta-llama/Llama-3-8b"}, "together.meta-llama/llama-3-8b"),
    ({"model": "openai/deepseek-chat", "api_base": "https://api.deepseek.com/v1"}, "deepseek.deepseek-chat"),
    ({"model": "openai/ours", "api_base": "http://127.0.0.1:8000/v1"}, "openai.ours"),
    ({"model": "llama", "api_base": "https://api.groq.com/openai/v1"}, "groq.llama"),
    ({"model": "nobody-knows-this"}, "unknown.nobody-knows-this"),
    ({"model": None}, "unknown.unknown"),
]


@pytest.mark.parametrize(("given", "code"), CODES)
def test_the_feature_names_the_real_provider_and_model(given: dict[str, Any], code: str) -> None:
    """Twice the same: the second time from what was learned."""
    for _ in range(2):
        provider, model = model_of(given)
        assert normalize_feature_code(model, provider) == code


def test_an_alias_is_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """``litellm.model_alias_map`` names a model for the program; what is sold is what it stands for."""
    monkeypatch.setattr(litellm, "model_alias_map", {"best": "anthropic/claude-sonnet-5"})
    assert model_of({"model": "best"}) == ("anthropic", "claude-sonnet-5")


def test_a_named_provider_is_not_asked_for_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM's own reading of a name also reads keys and tokens, maybe over the network: not for our sake."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(litellm, "get_llm_provider", fail)
    assert model_of({"model": "github_copilot/gpt-9"}) == ("github_copilot", "gpt-9")


def test_the_configured_mapping_knows_the_model() -> None:
    """`VLUNA_LLM_FEATURES` matches the model's name and the whole code."""
    features = FeatureMap({"bedrock.*claude*": {"feature": "chat.claude", "family": "chat"}, "gpt-4o": "chat.gpt"})
    call = model_call_of("chat.completions", {"model": "bedrock/converse/eu.anthropic.claude-sonnet-4-v1:0"})
    assert features.resolve(call.model, call.provider).feature_code == "chat.claude"
    call = model_call_of("chat.completions", {"model": "azure/ours", "base_model": "gpt-4o"})
    assert features.resolve(call.model, call.provider).feature_code == "chat.gpt"


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("chat.completions", ("gpt-4o", [{"role": "user", "content": "hi"}])),
        ("responses", ("hi", "gpt-4o")),
        ("completions", ("hi", "gpt-4o")),
        ("embeddings", ("gpt-4o", ["hi"])),
        ("images", ("hi", "gpt-4o")),
        ("anthropic.messages", (100, [{"role": "user", "content": "hi"}], "gpt-4o")),
    ],
)
def test_positional_arguments_are_the_same_call(kind: str, args: tuple[Any, ...]) -> None:
    """A call is described the same, however its arguments are given."""
    call = model_call_of(kind, {"stream": True}, args)
    assert (call.provider, call.model, call.stream) == ("openai", "gpt-4o", True)
    assert call.body is not None
    assert any("hi" in str(value) for value in call.body.values())


def test_the_body_is_the_request_and_nothing_else() -> None:
    """Neither keys nor clients nor metadata are part of it; LiteLLM's own messages are as good as dicts."""
    message = litellm.Message(role="assistant", content="earlier")
    given = {"model": "gpt-4o", "messages": [message], "max_tokens": 5, "api_key": "sk-secret", "metadata": {"a": 1}}
    call = model_call_of("chat.completions", given)
    assert call.body is not None
    assert set(call.body) == {"model", "messages", "max_tokens"}
    assert call.body["messages"][0]["content"] == "earlier"
