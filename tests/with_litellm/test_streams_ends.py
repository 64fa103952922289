"""Streams that are read to where they end: the provider's numbers, an estimate, or nothing."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import litellm
import pytest
from books import Books
from provider import Provider
from streaming import APIS, CHAT, RESPONSES, Api, run, settled, settled_without_collecting, whole

from vluna_llm import Vluna

COLOURS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
CHAT_API = Api("completion", CHAT)
RESPONSES_API = Api("responses", RESPONSES)


@COLOURS
@pytest.mark.parametrize("api", APIS)
def test_a_stream_read_to_its_end_is_charged_by_the_providers_numbers(
    api: Api, is_async: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """Exactly what the provider reported last, although nobody asked it to; settled before the reader is done."""
    provider.pause = 0.01
    provider.behaviour = "slow"
    settled_without_collecting(metered, books, lambda: run(api, whole, provider, is_async=is_async))
    books.once()
    assert len(provider.posts()) == 1


@COLOURS
@pytest.mark.parametrize("api", [APIS[0], APIS[2]])
def test_an_answer_without_usage_is_estimated_and_labelled(
    api: Api, is_async: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """LiteLLM's own count of tokens is never taken for the provider's."""
    provider.behaviour = "no_usage"
    settled(metered, books, lambda: run(api, whole, provider, is_async=is_async))
    books.estimated_once()


@COLOURS
@pytest.mark.parametrize("behaviour", ["cut", "ends_early"])
@pytest.mark.parametrize("api", APIS)
def test_a_truncated_answer_costs_nothing_however_litellm_reports_it(
    api: Api, behaviour: str, is_async: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """Some versions of LiteLLM end such a stream without an error and log a success with an estimate."""
    provider.behaviour = behaviour

    def work() -> None:
        with suppress(Exception):
            run(api, whole, provider, is_async=is_async)

    settled(metered, books, work)
    books.cancelled()


@COLOURS
@pytest.mark.parametrize("api", APIS)
def test_an_error_in_the_middle_costs_nothing(
    api: Api, is_async: bool, metered: Vluna, provider: Provider, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider says that it failed, and reports no usage."""
    _stop_after_error(monkeypatch)
    provider.behaviour = "error_event"

    def work() -> None:
        with suppress(Exception):
            run(api, whole, provider, is_async=is_async)

    settled(metered, books, work)
    books.cancelled()


@COLOURS
def test_an_error_that_brings_usage_is_charged(
    is_async: bool, metered: Vluna, provider: Provider, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the provider says it used was used."""
    _stop_after_error(monkeypatch)
    provider.behaviour = "error_with_usage"

    def work() -> None:
        with suppress(Exception):
            run(CHAT_API, whole, provider, is_async=is_async)

    settled(metered, books, work)
    books.once()


@COLOURS
@pytest.mark.parametrize("behaviour", ["incomplete", "failed"])
def test_a_response_that_ended_badly_with_usage_is_charged(
    behaviour: str, is_async: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """``response.incomplete`` and ``response.failed`` carry what was used."""
    provider.behaviour = behaviour

    def work() -> None:
        with suppress(Exception):
            run(RESPONSES_API, whole, provider, is_async=is_async)

    settled(metered, books, work)
    books.once()


@COLOURS
@pytest.mark.parametrize("api", APIS[:1])
def test_plain_json_instead_of_a_stream_is_charged(
    api: Api, is_async: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """A server that ignores ``stream`` answers with one body; its usage counts."""
    provider.behaviour = "json"

    def work() -> None:
        with suppress(Exception):
            run(api, whole, provider, is_async=is_async)

    settled(metered, books, work)
    books.once()


@COLOURS
@pytest.mark.parametrize("api", APIS)
def test_a_compressed_stream_is_read(
    api: Api, is_async: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """The bytes may come gzipped."""
    provider.encoding = "gzip"
    settled(metered, books, lambda: run(api, whole, provider, is_async=is_async))
    books.once()


@COLOURS
def test_a_call_that_fails_before_its_stream_costs_nothing(
    is_async: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """The provider refuses the request; the exception is LiteLLM's."""
    provider.behaviour = "bad"

    def work() -> None:
        with pytest.raises(litellm.BadRequestError):
            run(CHAT_API, whole, provider, is_async=is_async)

    settled(metered, books, work)
    books.cancelled()


@COLOURS
def test_a_text_stream_that_fails_at_its_first_read_costs_nothing(
    is_async: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """LiteLLM asks for text completions only when they are read, and fails only then."""
    provider.behaviour = "bad"
    (param,) = APIS[2].values

    def work() -> None:
        with pytest.raises(Exception, match="bad request"):
            run(param, whole, provider, is_async=is_async)

    settled(metered, books, work)
    books.cancelled()


@COLOURS
def test_litellms_own_error_over_a_stream_costs_nothing(
    is_async: bool, metered: Vluna, provider: Provider, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule of the application stops the answer in the middle: the provider did not fail, the call did."""
    provider.behaviour = "slow"

    def no_third_word(text: str) -> bool:
        return "word2" not in text

    monkeypatch.setattr(litellm, "post_call_rules", [no_third_word])

    def work() -> None:
        with pytest.raises(Exception, match="LLM Response failed post-call-rule check"):
            run(CHAT_API, whole, provider, is_async=is_async)

    settled_without_collecting(metered, books, work)
    books.cancelled()


def _stop_after_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the provider send nothing more after its error, as real ones do."""
    import provider as module

    original = module._Handler._misbehave

    def misbehave(self: Any, index: int) -> Any:
        yield from original(self, index)
        if index == 2 and self.owner.behaviour.startswith("error"):
            self.owner.released.wait(1)
            raise module._Cut

    monkeypatch.setattr(module._Handler, "_misbehave", misbehave)
