"""Who pays for a call through LiteLLM, by its metadata and by the call context; and what nobody else sees of that."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
import pytest
from books import FEATURE, MESSAGES, MODEL, Books
from litellm.integrations.custom_logger import CustomLogger
from provider import Provider

from vluna_llm import Vluna, call_context
from vluna_llm.errors import ConfigurationError, MissingPrincipal

CHAT: dict[str, Any] = {"model": f"openai/{MODEL}", "messages": MESSAGES, "api_key": "sk-test"}


def entry_of(books: Books) -> Any:
    (entry,) = books.gate.booked(books.customer).entries
    return entry


def test_metadata_names_the_customer(metered: Vluna, provider: Provider, books: Books) -> None:
    """Everything that `call_context` takes can be said with the call."""
    books.gate.feature("chat.premium")
    books.gate.price("chat.premium", 1)
    said = {
        "principal_id": books.customer,
        "user_id": "seat_7",
        "feature_code": "chat.premium",
        "labels": {"team": "red", "floor": 3},
        "end_user": "alice",
        "request_id": "req-1",
    }
    litellm.completion(**CHAT, api_base=provider.base_url, metadata={"vluna": said, "tag": "x"})
    books.settled(metered)
    entry = entry_of(books)
    assert (entry.user_id, entry.feature, entry.quantity) == ("seat_7", "chat.premium", 120)
    assert entry.labels["team"] == "red"
    assert entry.labels["floor"] == "3"
    assert entry.labels["end_user"] == "alice"
    assert entry.labels["request_id"] == "req-1"


def test_metadata_wins_over_the_context(metered: Vluna, provider: Provider, books: Books) -> None:
    """A field of the call replaces that of the context; the others stay, and the context's scope adds the call up."""
    with call_context(principal_id="somebody_else", labels={"run": "1"}) as scope:
        litellm.completion(**CHAT, api_base=provider.base_url, metadata={"vluna": {"principal_id": books.customer}})
    assert scope.wait(10)
    books.settled(metered)
    books.once()
    assert entry_of(books).labels["run"] == "1"
    assert scope.usage.total_tokens == 120


@pytest.mark.parametrize(
    ("given", "end_user"),
    [
        ({"user": "alice@example.com"}, "alice@example.com"),
        ({"user": "alice", "metadata": {"vluna": {"end_user": "bob"}}}, "bob"),
        ({"user": "名前"}, None),
    ],
)
def test_litellms_user_is_the_end_user(
    given: dict[str, Any], end_user: str | None, metered: Vluna, provider: Provider, books: Books
) -> None:
    """``user=`` becomes a label where nobody else was named and it can be stored; the provider gets it all the same."""
    books.run(metered, lambda: litellm.completion(**CHAT, api_base=provider.base_url, **given))
    assert entry_of(books).labels.get("end_user") == end_user
    assert provider.posts()[0].body["user"] == given["user"]


def test_the_contexts_end_user_stays(metered: Vluna, provider: Provider, books: Books) -> None:
    """Who was named on purpose wins over LiteLLM's ``user``."""
    books.run(metered, lambda: litellm.completion(**CHAT, api_base=provider.base_url, user="alice"), end_user="carol")
    assert entry_of(books).labels["end_user"] == "carol"


WRONG: list[Any] = [
    pytest.param("customer_1", 'metadata\\["vluna"\\] is a str', id="no-dict"),
    pytest.param({"principal": "c"}, "has the key 'principal'; it takes principal_id", id="unknown-key"),
    pytest.param({"principal_id": ""}, "principal_id is empty", id="empty"),
    pytest.param({"principal_id": 7}, "principal_id must be text", id="number"),
    pytest.param({"principal_id": "c", "labels": "x"}, 'labels"\\] is a str', id="labels"),
    pytest.param({"principal_id": "c", "feature_code": "A B"}, "feature_code", id="code"),
]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("said", "told"), WRONG)
def test_what_cannot_be_used_is_said_clearly(
    said: Any, told: str, is_async: bool, metered: Vluna, provider: Provider
) -> None:
    """One sentence, before the provider is asked."""
    given = {**CHAT, "api_base": provider.base_url, "metadata": {"vluna": said}}
    with pytest.raises(ConfigurationError, match=told) as caught:
        asyncio.run(litellm.acompletion(**given)) if is_async else litellm.completion(**given)
    assert "\n" not in str(caught.value)
    assert caught.value.status_code == 400  # type: ignore[attr-defined]
    assert provider.requests == []


def test_nobody_pays(metered: Vluna, provider: Provider) -> None:
    """No customer: `MissingPrincipal` itself, not wrapped, and no request."""
    with pytest.raises(MissingPrincipal) as caught:
        litellm.completion(**CHAT, api_base=provider.base_url)
    assert type(caught.value) is MissingPrincipal
    with pytest.raises(MissingPrincipal):
        asyncio.run(litellm.aresponses(model=f"openai/{MODEL}", input="x", api_key="sk", api_base=provider.base_url))
    assert provider.requests == []


def test_observed_nothing_is_refused(
    make_vluna: Any, make_callback: Any, provider: Provider, books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    """``mode="observe"``: nobody to bill, a wrong entry, an empty purse; the calls go on, and it is told."""
    vluna = make_vluna(mode="observe")
    make_callback(vluna)
    litellm.completion(**CHAT, api_base=provider.base_url)
    litellm.completion(**CHAT, api_base=provider.base_url, metadata={"vluna": {"nonsense": 1}})
    books.gate.set_credit(books.customer, 0)
    books.run(vluna, lambda: litellm.completion(**CHAT, api_base=provider.base_url))
    assert len(provider.posts()) == 3
    assert "No principal" in caplog.text
    assert "has the key 'nonsense'" in caplog.text


def test_off_and_on_again_at_run_time(metered: Vluna, provider: Provider, books: Books) -> None:
    """The kill switch works on wrapped functions."""
    metered.mode = "off"
    litellm.completion(**CHAT, api_base=provider.base_url)
    books.nothing()
    metered.mode = "enforce"
    books.run(metered, lambda: litellm.completion(**CHAT, api_base=provider.base_url))
    books.once()


class Recorder(CustomLogger):
    """Another callback, before ours: keeps all that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def log_pre_api_call(self, model: Any, messages: Any, kwargs: Any) -> None:
        self.seen.append(json.dumps(kwargs, default=str))

    def log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        self.seen.append(json.dumps(kwargs, default=str))

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        self.seen.append(json.dumps(kwargs, default=str))


SECRET = "customer-of-ours"


@pytest.mark.parametrize("name", ["completion", "responses", "anthropic", "text_completion", "embedding"])
def test_identity_goes_nowhere_else(
    name: str, vluna: Vluna, make_callback: Any, provider: Provider, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said to us reaches neither the provider nor other callbacks; their own metadata does."""
    monkeypatch.setattr(litellm, "enable_preview_features", True)  # LiteLLM then sends metadata of chats, too
    recorder = Recorder()
    litellm.callbacks = [recorder, make_callback(vluna)]
    mine: dict[str, Any] = {"vluna": {"principal_id": books.customer, "labels": {"secret": SECRET}}}
    if name in ("completion", "responses"):
        mine["tag"] = "blue"
    given: dict[str, Any] = {"api_key": "sk", "api_base": provider.base_url, "metadata": mine}

    async def main() -> None:
        if name == "completion":
            await litellm.acompletion(model=f"openai/{MODEL}", messages=MESSAGES, **given)
        elif name == "responses":
            await litellm.aresponses(model=f"openai/{MODEL}", input="hi", **given)
        elif name == "anthropic":
            await litellm.anthropic.messages.acreate(model=f"openai/{MODEL}", messages=MESSAGES, max_tokens=10, **given)
        elif name == "text_completion":
            await litellm.atext_completion(model=f"text-completion-openai/{MODEL}", prompt="hi", **given)
        else:
            await litellm.aembedding(model="openai/text-embedding-3-small", input=["hi"], **given)
        await asyncio.sleep(0.3)

    before = json.loads(json.dumps(mine))
    asyncio.run(main())
    books.settled(vluna)
    assert len(books.charged) == 1
    assert entry_of(books).labels["secret"] == SECRET
    assert provider.posts()
    for seen in provider.posts():
        assert SECRET not in json.dumps(seen.body)
        assert "vluna" not in json.dumps(seen.body)
        assert "vluna" not in json.dumps(seen.headers)
    assert recorder.seen
    assert all(SECRET not in text for text in recorder.seen)
    assert mine == before, "the caller's own dict was changed"
    if name in ("completion", "responses"):
        assert any("blue" in text for text in recorder.seen)


def test_a_job_run_twice_is_charged_once(metered: Vluna, provider: Provider, books: Books) -> None:
    """``idempotency_key`` with the call: the second run's answer is already settled."""
    for _ in range(2):
        litellm.completion(
            **CHAT,
            api_base=provider.base_url,
            metadata={"vluna": {"principal_id": books.customer, "idempotency_key": "job-42"}},
        )
        books.settled(metered)
    assert len(provider.posts()) == 2
    assert books.charged == [(FEATURE, 120)]
