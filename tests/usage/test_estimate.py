"""What authorize is told before the call: sensible at once, better with each call, never in the way."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vluna_llm.usage.estimate import Estimate, Estimator
from vluna_llm.usage.request import measure_request, text_tokens
from vluna_llm.usage.types import TokenUsage

SENTENCE = "The customer wrote that the parcel arrived late and asked for a refund of the fee. "


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}], **more}


def guess(body: Any, kind: str = "chat") -> Estimate:
    return Estimator().predict("f", body, kind=kind)


def test_english_is_about_a_token_per_word_and_a_bit() -> None:
    """Sixteen common words and a full stop: near one token each, without knowing any vocabulary."""
    assert text_tokens(SENTENCE * 20) == pytest.approx(17 * 20, rel=0.15)


def test_other_scripts_count_more_per_character() -> None:
    """A Chinese character is most of a token, a Latin one a quarter."""
    assert 0.5 < text_tokens("请把这封信翻译成英文" * 20) / 200 < 1.3
    assert text_tokens("a" * 200) < text_tokens("é" * 200) < text_tokens("文" * 200)


def test_each_part_of_a_request_adds_to_the_input() -> None:
    """System text, more messages, tools, schemas, images, audio and files are all seen."""
    plain = guess(chat("hello")).input_tokens
    tool = {"type": "function", "function": {"name": "f", "description": SENTENCE, "parameters": {"type": "object"}}}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"description": SENTENCE}}}

    def part(**value: Any) -> dict[str, Any]:
        return {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}, value]}]}

    more = {
        "tools": chat("hello", tools=[tool]),
        "functions": chat("hello", functions=[{"name": "f", "description": SENTENCE}]),
        "schema": chat("hello", response_format=schema),
        "instructions": {"model": "m", "input": "hello", "instructions": SENTENCE},
        "system": chat("hello", system=SENTENCE),
        "image": part(type="image_url", image_url={"url": "https://x.example/a.png"}),
        "audio": part(type="input_audio", input_audio={"data": "A" * 200_000, "format": "wav"}),
        "file": part(type="file", file={"file_data": "data:application/pdf;base64," + "A" * 40_000}),
        "tool result": {"model": "m", "input": ["hello", {"type": "function_call_output", "output": SENTENCE}]},
        "own tool of the provider": {"model": "m", "input": "hello", "tools": [{"type": "web_search"}]},
    }
    for name, body in more.items():
        assert guess(body).input_tokens > plain + 8, name


def test_a_picture_counts_by_its_size_not_by_its_base64() -> None:
    """OpenAI's tiles: 85 tokens at low detail, 765 for a square of 1024; the text of the base64 does not count."""

    def picture(width: int, height: int, **more: Any) -> int:
        png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, height) + b"\0" * 60_000
        url = "data:image/png;base64," + base64.b64encode(png).decode()
        part = {"type": "image_url", "image_url": {"url": url, **more}}
        return guess({"model": "m", "messages": [{"role": "user", "content": [part]}]}).input_tokens

    base = guess(chat("")).input_tokens
    assert picture(1024, 1024) - base == pytest.approx(765, abs=3)
    assert picture(4096, 8192) - base == pytest.approx(1105, abs=3)
    assert picture(200, 100) - base == pytest.approx(255, abs=3)
    assert picture(1024, 1024, detail="low") - base == pytest.approx(85, abs=3)


def test_token_lists_are_exact() -> None:
    """An embedding of token numbers is as many tokens as it has, calibrated or not, and produces none."""
    estimator = Estimator()
    for given_input, tokens in (([1, 2, 3], 3), ([[1, 2], [3, 4, 5]], 5)):
        found = estimator.predict("e", {"model": "e", "input": given_input}, kind="embeddings")
        assert (found.input_tokens, found.output_tokens, found.total) == (tokens, 0, tokens)
        estimator.update("e", found, TokenUsage(input_tokens=tokens * 7))
    assert guess({"prompt": [1, 2, 3], "max_tokens": 5}, "completions").input_tokens == 3
    assert guess({"input": ["two words", "more"]}, "embeddings").output_tokens == 0


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_the_request_limits_the_output(name: str) -> None:
    """A small limit is what will be used; no guess exceeds limit times choices, also after large outputs."""
    assert guess(chat("x", **{name: 7})).output_tokens == 7
    assert guess(chat("x", **{name: 7}, n=3)).output_tokens == 21
    estimator = Estimator()
    for _ in range(10):
        estimator.update("f", estimator.predict("f", chat("x"), kind="chat"), TokenUsage(9, 5_000))
    assert estimator.predict("f", chat("x", **{name: 7}), kind="chat").output_tokens == 7
    assert estimator.predict("f", chat("x"), kind="chat").output_tokens == 5_000


def test_several_choices_multiply_what_is_usual() -> None:
    """n=4 is four times what one choice produces, and a call with n=4 teaches a quarter of its output."""
    estimator = Estimator()
    for _ in range(10):
        one = estimator.predict("f", chat("x", n=4), kind="chat")
        estimator.update("f", one, TokenUsage(9, 400))
    assert estimator.predict("f", chat("x", n=4), kind="chat").output_tokens == 400
    assert estimator.predict("f", chat("x"), kind="chat").output_tokens == 100


def test_a_hidden_prompt_is_learned() -> None:
    """A provider that adds 346 tokens to each call with tools and reads text differently: near after ten calls."""
    estimator = Estimator()
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

    def call(words: int) -> tuple[dict[str, Any], TokenUsage]:
        body = chat("word " * words, tools=[tool])
        return body, TokenUsage(input_tokens=346 + 30 + round(words * 1.4), output_tokens=40)

    assert estimator.predict("f", call(100)[0], kind="chat").input_tokens < 250
    for words in (10, 200, 30, 80, 400, 60, 20, 150, 90, 300):
        body, usage = call(words)
        estimator.update("f", estimator.predict("f", body, kind="chat"), usage)
    for words in (15, 120, 500):
        body, usage = call(words)
        found = estimator.predict("f", body, kind="chat")
        assert found.basis == "calibrated"
        assert found.total == pytest.approx(usage.total_tokens, rel=0.15)


def test_features_learn_apart_and_kinds_of_calls_within_one() -> None:
    """Short answers of one call and long ones of another are told apart; another feature knows nothing of either."""
    estimator = Estimator()
    short, long = chat("yes or no?"), chat(SENTENCE * 40)
    for _ in range(8):
        estimator.update("f", estimator.predict("f", short, kind="chat"), TokenUsage(11, 2))
        estimator.update("f", estimator.predict("f", long, kind="chat"), TokenUsage(690, 900))
    assert estimator.predict("f", short, kind="chat").output_tokens == 2
    assert estimator.predict("f", long, kind="chat").output_tokens == 900
    assert estimator.predict("g", short, kind="chat") == guess(short)


def test_uncalibrated_is_the_same_whatever_was_learned() -> None:
    """Under a derived key two processes must say the same number (design rule 17)."""
    estimator = Estimator()
    before = estimator.uncalibrated(chat(SENTENCE), kind="chat")
    for _ in range(20):
        estimator.update("f", before, TokenUsage(900, 900))
    assert estimator.uncalibrated(chat(SENTENCE), kind="chat") == before
    assert before.basis == "uncalibrated"
    assert before == guess(chat(SENTENCE))


def test_one_absurd_report_does_not_spoil_a_feature() -> None:
    """A single wild usage moves the guess by a bounded amount, and the next calls bring it back."""
    estimator = Estimator()
    body = chat(SENTENCE * 10)
    usual = TokenUsage(175, 50)
    for _ in range(20):
        estimator.update("f", estimator.predict("f", body, kind="chat"), usual)
    estimator.update("f", estimator.predict("f", body, kind="chat"), TokenUsage(10**7, 10**6))
    assert estimator.predict("f", body, kind="chat").total < 3 * usual.total_tokens
    other = estimator.predict("f", chat(SENTENCE * 100), kind="chat").input_tokens
    assert other == pytest.approx(1_700, rel=0.5)
    for _ in range(3):
        estimator.update("f", estimator.predict("f", body, kind="chat"), usual)
    assert estimator.predict("f", body, kind="chat").total == pytest.approx(usual.total_tokens, rel=0.15)


def test_memory_is_bounded_and_holds_no_text() -> None:
    """At most 1,000 features and a few numbers per call; nothing of a request is kept."""
    estimator = Estimator()
    secret = "the-secret-word"
    for number in range(3_000):
        found = estimator.predict(f"f{number}", chat(secret), kind="chat")
        estimator.update(f"f{number}", found, TokenUsage(5, 5))
    assert len(estimator._past) <= 1_000
    assert "f2999" in estimator._past
    for _ in range(200):
        estimator.update("f", estimator.predict("f", chat(secret), kind="chat"), TokenUsage(5, 5))
    assert len(estimator._past["f"].calls) <= 24
    assert secret not in repr(estimator._past)
    assert all(isinstance(number, float) for number in guess(chat(secret)).features_for_update)


class Hostile(dict[str, Any]):
    """A mapping whose every access raises."""

    def get(self, *args: object) -> Any:
        raise RuntimeError("no")


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "text", "content", "image_url", "url", "detail", "data", "x"]), inner
        )
    ),
    max_leaves=12,
)
members = st.sampled_from(
    ["messages", "input", "prompt", "tools", "functions", "response_format", "text", "n", "max_tokens", "model", "size"]
)
kinds = st.sampled_from(["chat", "responses", "completions", "embeddings", "images", "audio", "messages", "?"])


@settings(deadline=None)
@given(st.none() | st.dictionaries(members, json_values), kinds, st.integers(0, 10**6), st.integers(0, 10**6))
def test_odd_bodies_never_raise(body: Any, kind: str, read: int, wrote: int) -> None:
    """Whatever stands in a request, and whatever usage comes back, there is a positive whole number of tokens."""
    estimator = Estimator()
    for _ in range(3):
        found = estimator.predict("f", body, kind=kind)
        assert found.total >= 1
        assert found.input_tokens >= 0
        assert found.output_tokens >= 0
        estimator.update("f", found, TokenUsage(read, wrote))


def test_hostile_and_endless_bodies_are_survived() -> None:
    """Objects that raise, and a structure that contains itself."""
    loop: list[Any] = []
    loop.append(loop)
    assert guess(Hostile()).total >= 1
    assert guess({"messages": loop}).total >= 1
    assert guess({"messages": [{"content": loop}] * 10, "tools": [loop, object()]}).total >= 1
    assert measure_request({"input": 3, "n": 10**400, "max_tokens": 10**400}, "chat").limit is None


def test_images_are_estimated_by_size_quality_and_number() -> None:
    """OpenAI's table: 272 tokens for a low square, 1056 for a medium one, each times n."""
    assert guess({"prompt": "a cat", "size": "1024x1024", "quality": "low"}, "images").output_tokens == 272
    assert guess({"prompt": "a cat", "size": "1024x1536", "quality": "medium", "n": 2}, "images").output_tokens == 3168


@pytest.mark.parametrize(
    ("short", "full"),
    [("chat", "chat.completions"), ("images", "images.generations"), ("images", "images/edits"), ("audio", "audio.x")],
)
def test_an_api_is_known_by_its_first_word(short: str, full: str) -> None:
    """``images.generations`` is measured as images, with images' output."""
    body = {"model": "m", "prompt": "a cat", "size": "1024x1024", "quality": "low"}
    assert guess(body, full) == guess(body, short)


def test_an_update_with_foreign_numbers_is_ignored() -> None:
    """An estimate that was not ours, or usage without tokens, teaches nothing and breaks nothing."""
    estimator = Estimator()
    estimator.update("f", Estimate(1, 1, "uncalibrated"), TokenUsage(5, 5))
    estimator.update("f", estimator.predict("f", chat("x"), kind="chat"), TokenUsage())
    assert not estimator._past
