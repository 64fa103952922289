"""`VlunaCallback(install=False)`: streams are billed by what the provider reported, never by LiteLLM's count."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from importlib import metadata
from typing import Any

import httpx
import litellm
import openai
import pytest
from books import MESSAGES, MODEL, Books, eventually
from moved import hide
from provider import Provider
from streaming import CHAT, RESPONSES, TEXT, Api, Reader, run, settled, two, whole

from vluna_llm import Vluna
from vluna_llm.integrations import litellm as integration
from vluna_llm.integrations._litellm_parts import STREAM
from vluna_llm.integrations._openai_usage_option import REFUSERS

OLD = tuple(map(int, metadata.version("litellm").split(".")[:2])) < (1, 100)
CHAT_API = Api("completion", CHAT)
RESPONSES_API = Api("responses", RESPONSES)
TEXT_API = Api("text_completion", TEXT)


async def _end(reader: Reader) -> list[Any]:
    """Read all of it, and give LiteLLM's logging the time to tell of it."""
    items = await whole(reader)
    await asyncio.sleep(0.3)
    return items


def _seen(chunks: list[Any]) -> list[Any]:
    return [
        [(choice.delta.content, choice.finish_reason) for choice in chunk.choices] + [getattr(chunk, "usage", None)]
        for chunk in chunks
    ]


@pytest.fixture
def hooks_only(vluna: Vluna, make_callback: Any, provider: Provider) -> Vluna:
    """LiteLLM as it was, with our hooks."""
    make_callback(vluna, install=False)
    return vluna


@pytest.fixture
def by_name(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a call that names a provider of LiteLLM's and no upstream: that is in the environment."""
    monkeypatch.setenv("OPENAI_BASE_URL", provider.base_url)
    monkeypatch.setenv("OPENAI_API_BASE", provider.base_url)
    return {"api_base": None}


@pytest.fixture(autouse=True)
def _nobody_has_refused() -> Any:
    yield
    REFUSERS._known.clear()


@pytest.mark.parametrize("api", [CHAT_API, TEXT_API, RESPONSES_API], ids=lambda api: api.name)
def test_the_usage_of_a_stream_is_the_providers(
    api: Api, hooks_only: Vluna, provider: Provider, books: Books, by_name: dict[str, Any]
) -> None:
    """Nobody asked for it: it is asked for, and what the provider reports is charged, labelled as that."""
    settled(hooks_only, books, lambda: run(api, _end, provider, is_async=True, **by_name))
    books.once()


@pytest.mark.parametrize("api", [CHAT_API, TEXT_API], ids=lambda api: api.name)
def test_an_upstream_of_the_users_own_is_not_asked(
    api: Api, hooks_only: Vluna, provider: Provider, books: Books
) -> None:
    """It may refuse the option, and nobody could make the call again: such a stream is estimated, labelled as that."""
    settled(hooks_only, books, lambda: run(api, _end, provider, is_async=True))
    books.estimated_once()
    assert "stream_options" not in provider.posts()[0].body


def test_what_the_caller_asks_for_is_charged(hooks_only: Vluna, provider: Provider, books: Books) -> None:
    asked = {"include_usage": True}
    settled(hooks_only, books, lambda: run(CHAT_API, _end, provider, is_async=True, stream_options=asked))
    books.once()


def test_the_caller_sees_no_chunk_more(
    hooks_only: Vluna, provider: Provider, books: Books, by_name: dict[str, Any]
) -> None:
    """The chunk that brings the usage is for us alone: the caller gets what LiteLLM gives without us."""
    found: list[Any] = []
    settled(hooks_only, books, lambda: found.append(run(CHAT_API, _end, provider, is_async=True, **by_name)))
    integration.uninstall()
    litellm.callbacks.clear()
    bare = run(CHAT_API, _end, provider, is_async=True, **by_name)
    assert _seen(found[0]) == _seen(bare)
    assert provider.posts()[0].body["stream_options"] == {"include_usage": True}
    assert "stream_options" not in provider.posts()[1].body


def test_a_model_that_is_named_by_position(
    hooks_only: Vluna, provider: Provider, books: Books, by_name: dict[str, Any]
) -> None:
    """``acompletion("openai/gpt-4o", messages)``: 1.83 does not tell its hook which model that is."""
    given = CHAT_API.asked(provider, **by_name)
    model, messages = given.pop("model"), given.pop("messages")

    async def main() -> None:
        stream: Any = await litellm.acompletion(model, messages, **given)
        await _end(Reader(stream, True))

    settled(hooks_only, books, lambda: asyncio.run(main()))
    if OLD:
        books.estimated_once("unknown.unknown")
    else:
        books.once()


@pytest.mark.parametrize("asked", [None, {"include_usage": True}], ids=["unasked", "asked"])
def test_without_a_report_it_is_estimated(asked: Any, hooks_only: Vluna, provider: Provider, books: Books) -> None:
    """A provider that reports nothing although it was asked: LiteLLM counts by itself, and that is no report."""
    provider.behaviour = "no_usage"
    settled(hooks_only, books, lambda: run(CHAT_API, _end, provider, is_async=True, stream_options=asked))
    books.estimated_once()


@pytest.mark.parametrize("behaviour", ["cut", "ends_early"])
def test_a_cut_stream_costs_nothing(behaviour: str, hooks_only: Vluna, provider: Provider, books: Books) -> None:
    """LiteLLM's older line, and both where the bytes just end, report an answer that was cut as a success."""
    provider.behaviour = behaviour

    def work() -> None:
        with suppress(httpx.HTTPError, openai.APIError):  # the newer line raises where the connection was cut
            run(CHAT_API, _end, provider, is_async=True)

    settled(hooks_only, books, work)
    books.cancelled()


async def _closed(reader: Reader) -> None:
    await two(reader)
    await reader.stream.aclose()


@pytest.mark.parametrize("reading", [two, _closed])
def test_a_stream_that_is_left_costs_nothing(reading: Any, hooks_only: Vluna, provider: Provider, books: Books) -> None:
    """Dropped or closed in the middle: no hook of LiteLLM tells of that."""
    provider.behaviour = "slow"
    settled(hooks_only, books, lambda: run(CHAT_API, reading, provider, is_async=True))
    books.cancelled()


def test_a_responses_stream_that_is_left_gives_its_lease_back(
    hooks_only: Vluna, provider: Provider, books: Books
) -> None:
    """Streams of other kinds are not watched; what no hook tells of is found by the collector."""
    provider.behaviour = "slow"
    settled(hooks_only, books, lambda: run(RESPONSES_API, two, provider, is_async=True))
    books.cancelled()


def test_an_upstream_that_refuses_the_option_is_remembered(
    hooks_only: Vluna, provider: Provider, books: Books, by_name: dict[str, Any]
) -> None:
    """Nobody can make the call again here: the first one fails as the upstream said, the next ones are not asked."""
    provider.behaviour = "refuses_option"

    def work() -> None:
        with pytest.raises(litellm.BadRequestError, match="stream_options"):
            run(CHAT_API, _end, provider, is_async=True, **by_name)
        assert eventually(lambda: "litellm:openai" in REFUSERS)
        assert run(CHAT_API, _end, provider, is_async=True, **by_name)

    settled(hooks_only, books, work)
    assert [state for _, state in books.leases] == ["canceled", "closed"]
    (entry,) = books.gate.booked(books.customer).entries
    assert entry.labels["usage_source"] == "estimated"
    assert "stream_options" not in provider.posts()[-1].body


def test_a_cached_stream_is_free(hooks_only: Vluna, provider: Provider, books: Books, by_name: dict[str, Any]) -> None:
    """The second time LiteLLM plays the answer back."""
    from litellm.caching.caching import Cache

    litellm.cache = Cache(type="local")  # type: ignore[arg-type]
    litellm.success_callback.append("cache")

    async def main() -> None:
        for _ in range(2):
            stream: Any = await litellm.acompletion(**CHAT_API.asked(provider, caching=True, **by_name))
            assert [chunk async for chunk in stream]
            await asyncio.sleep(0.5)

    settled(hooks_only, books, lambda: asyncio.run(main()))
    assert len(provider.posts()) == 1
    assert [state for _, state in books.leases] == ["closed", "canceled"]
    assert [tokens for _, tokens in books.charged] == [120]


def test_where_streams_cannot_be_watched_no_count_is_a_report(
    vluna: Vluna,
    make_callback: Any,
    provider: Provider,
    books: Books,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A LiteLLM that has its streams elsewhere: what it says of an unasked stream is estimated, and that is told."""
    hide(monkeypatch, STREAM)
    with caplog.at_level(logging.WARNING, "vluna_llm"):
        make_callback(vluna, install=False)
    assert "streaming_handler.CustomStreamWrapper" in caplog.text
    settled(vluna, books, lambda: run(CHAT_API, _end, provider, is_async=True))
    books.estimated_once()


def test_an_unknown_model_is_litellms_own_error(
    hooks_only: Vluna, books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    """A misspelt name: nothing is charged, and nothing of ours is told to be broken."""

    async def main() -> None:
        with pytest.raises(litellm.BadRequestError, match="LLM Provider NOT provided"):
            await litellm.acompletion(model=f"no-such-{MODEL}", messages=MESSAGES, stream=True)
        await asyncio.sleep(0.3)

    settled(hooks_only, books, lambda: asyncio.run(main()))
    assert books.gate.booked(books.customer).entries == ()
    assert "vluna.internal_error" not in caplog.text
