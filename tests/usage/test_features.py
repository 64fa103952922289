"""Feature codes: every model name becomes one that the gate takes, and configuration has the last word."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vluna_llm.errors import ConfigurationError
from vluna_llm.usage.features import Feature, FeatureMap, MeterNames, is_code, normalize_feature_code

CODE = re.compile(r"[a-z0-9]([a-z0-9._/@:-]{0,126}[a-z0-9])?")


@pytest.mark.parametrize(
    ("model", "code"),
    [
        ("gpt-4o-mini", "openai.gpt-4o-mini"),
        ("GPT-4o-mini", "openai.gpt-4o-mini"),
        ("gpt-4o-2024-08-06", "openai.gpt-4o-2024-08-06"),
        ("openai/gpt-4o", "openai.gpt-4o"),
        ("meta-llama/Llama-3.1-8B Instruct", "openai.meta-llama/llama-3.1-8b-instruct"),
        ("ft:gpt-4o-mini:acme::Ab12", "openai.ft:gpt-4o-mini:acme::ab12"),
        ("modèle spécial!", "openai.mod-le-sp-cial"),
        ("  gpt-4o  ", "openai.gpt-4o"),
        ("", "openai.unknown"),
        (None, "openai.unknown"),
        ("???", "openai.unknown"),
    ],
)
def test_model_names_become_codes(model: str | None, code: str) -> None:
    """Provider in front, lower case, illegal runs replaced, edges cleaned, dates kept."""
    assert normalize_feature_code(model) == code


@given(st.text(max_size=300), st.sampled_from(["openai", "anthropic", "Azure OpenAI", "", "--"]))
def test_every_name_becomes_a_legal_code(model: str, provider: str) -> None:
    """Whatever a caller puts into ``model``, the code is one that the gate takes, and so are its meters."""
    code = normalize_feature_code(model, provider)
    assert CODE.fullmatch(code)
    assert normalize_feature_code(model, provider) == code
    meters = MeterNames().codes(code)
    assert all(CODE.fullmatch(meter) for meter in (meters.input, meters.cached, meters.output))
    assert len({meters.input, meters.cached, meters.output}) == 3


def test_long_names_are_cut_to_128() -> None:
    assert len(normalize_feature_code("x" * 500)) == 128


def test_meters_of_a_feature() -> None:
    """Default meters are suffixes of the feature code; a whole code may be given instead."""
    codes = MeterNames(output="chat.written").codes("openai.gpt-4o")
    assert (codes.input, codes.cached, codes.output) == (
        "openai.gpt-4o.tokens.input",
        "openai.gpt-4o.tokens.cached",
        "chat.written",
    )


FILE: dict[str, Any] = json.loads("""{
  "gpt-4o": "chat.large",
  "gpt-4o-*": {"feature": "chat.dated", "family": "chat"},
  "gpt-*": {"family": "chat"},
  "anthropic.claude-*": {"feature": "chat.claude", "meters": {"input": ".in", "cached": ".in.cached", "output": ".out"}}
}""")


def test_exact_before_glob_before_default() -> None:
    """An exact name wins over a pattern, the first pattern over a later one, and any over the default."""
    features = FeatureMap.from_dict(FILE)
    assert features.resolve("gpt-4o") == Feature("chat.large")
    assert features.resolve("GPT-4O") == Feature("chat.large")
    assert features.resolve("gpt-4o-mini") == Feature("chat.dated", "chat")
    assert features.resolve("gpt-5") == Feature("openai.gpt-5", "chat")
    assert features.resolve("o3") == Feature("openai.o3")


def test_patterns_see_the_code_with_its_provider() -> None:
    """A pattern may be written against ``provider.model``; its meters are found again by feature code."""
    features = FeatureMap(FILE)
    claude = features.resolve("claude-sonnet", provider="anthropic")
    assert claude == Feature("chat.claude", None, MeterNames(".in", ".in.cached", ".out"))
    assert features.names("chat.claude") == claude.names
    assert features.names("never.seen") == MeterNames()


def test_meters_of_a_pattern_without_a_feature_are_found_by_code() -> None:
    """A family-wide naming applies to each default code that the pattern covers."""
    features = FeatureMap({"gpt-*": {"meters": {"output": ".written"}}})
    assert features.resolve("gpt-5").names.output == ".written"
    assert features.names("openai.gpt-5").output == ".written"
    assert FeatureMap({"gpt-*": {"meters": {"output": ".written"}}}).names("openai.gpt-5").output == ".written"


def test_a_function_is_asked_last_and_checked() -> None:
    """A function knows what the file does not; an answer that is no code is refused with the model named."""
    features = FeatureMap({"gpt-4o": "chat.large"}, function=lambda model: "Bad Code" if "bad" in model else "by.fn")
    assert features.resolve("gpt-4o").feature_code == "chat.large"
    assert features.resolve("other").feature_code == "by.fn"
    with pytest.raises(ConfigurationError, match="'bad-model'"):
        features.resolve("bad-model")


def test_invented_model_names_do_not_grow_memory() -> None:
    features = FeatureMap()
    for number in range(5_000):
        features.resolve(f"model-{number}")
    assert len(features._known) <= 2_000


@pytest.mark.parametrize(
    ("rules", "what"),
    [
        ([], "must hold an object"),
        ({"gpt-4o": 3}, "must be a feature code or an object"),
        ({"gpt-4o": {}}, "must be a feature code or an object"),
        ({"gpt-4o": "Chat Large"}, "feature_code 'Chat Large'"),
        ({"gpt-4o": {"feature": "a", "price": 3}}, "unknown member 'price'"),
        ({"gpt-4o": {"feature": "a", "family": ""}}, "family_code ''"),
        ({"gpt-4o": {"feature": "a", "meters": {"in": ".x"}}}, "input, cached or output"),
        ({"gpt-4o": {"feature": "a", "meters": {"input": ".X!"}}}, "the input meter"),
        ({"": "a"}, "must not be empty"),
        ({"a": {"feature": "f", "meters": {"input": ".x"}}, "b": "f"}, "other meters elsewhere"),
    ],
)
def test_wrong_configuration_is_one_clear_sentence(rules: Any, what: str) -> None:
    """Each mistake names the setting, the entry and what is wrong with it."""
    with pytest.raises(ConfigurationError, match="VLUNA_LLM_FEATURES") as caught:
        FeatureMap(rules)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_codes_are_judged_as_the_gate_does() -> None:
    assert is_code("a")
    assert is_code("a.b/c@d:e-f_g")
    assert not any(map(is_code, ["", ".a", "a.", "A", "a b", "ä", "a" * 129]))
