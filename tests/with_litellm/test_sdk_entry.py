"""LiteLLM's entry functions: each logical call is admitted once, settled once, and refused before the provider."""

from __future__ import annotations

import asyncio
import inspect
import sys
from typing import Any

import litellm
import pytest
from books import FEATURE, MESSAGES, MODEL, Books
from provider import Provider

from vluna_llm import Vluna, call_context
from vluna_llm.errors import GateDenied, GateUnavailable


def options(provider: Provider, **more: Any) -> dict[str, Any]:
    return {"api_base": provider.base_url, "api_key": "sk-test", **more}


async def _all(stream: Any) -> list[Any]:
    return [item async for item in stream]


CHAT: dict[str, Any] = {"model": f"openai/{MODEL}", "messages": MESSAGES}
RESPONSES: dict[str, Any] = {"model": f"openai/{MODEL}", "input": "hi"}
TEXT: dict[str, Any] = {"model": f"text-completion-openai/{MODEL}", "prompt": "hi"}
EMBED: dict[str, Any] = {"model": "openai/text-embedding-3-small", "input": ["hi"]}
IMAGE: dict[str, Any] = {"model": "openai/gpt-image-1", "prompt": "a cat"}
SOUND: dict[str, Any] = {"model": "openai/gpt-4o-transcribe", "file": ("a.wav", b"RIFF0000WAVE")}
ANTHROPIC: dict[str, Any] = {"model": f"openai/{MODEL}", "messages": MESSAGES, "max_tokens": 100}

CALLS: list[Any] = [
    pytest.param("completion", CHAT, FEATURE, 120, id="chat"),
    pytest.param("completion", {**CHAT, "stream": True}, FEATURE, 120, id="chat-stream"),
    pytest.param("responses", RESPONSES, FEATURE, 120, id="responses"),
    pytest.param("responses", {**RESPONSES, "stream": True}, FEATURE, 120, id="responses-stream"),
    pytest.param("text_completion", TEXT, FEATURE, 120, id="text"),
    pytest.param("text_completion", {**TEXT, "stream": True}, FEATURE, 120, id="text-stream"),
    pytest.param("embedding", EMBED, "openai.text-embedding-3-small", 8, id="embedding"),
    pytest.param("image_generation", IMAGE, "openai.gpt-image-1", 1050, id="image"),
    pytest.param("transcription", SOUND, "openai.gpt-4o-transcribe", 59, id="transcription"),
]


def make(name: str, arguments: dict[str, Any], *, is_async: bool) -> Any:
    """Call the function of this name, sync or async, and read what it gives."""
    if not is_async:
        answer = getattr(litellm, name)(**arguments)
        return list(answer) if arguments.get("stream") else answer

    async def main() -> Any:
        answer = await getattr(litellm, f"a{name}")(**arguments)
        return [item async for item in answer] if arguments.get("stream") else answer

    return asyncio.run(main())


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("name", "arguments", "feature", "tokens"), CALLS)
def test_each_call_is_settled_once(
    name: str,
    arguments: dict[str, Any],
    feature: str,
    tokens: int,
    is_async: bool,
    metered: Vluna,
    provider: Provider,
    books: Books,
) -> None:
    """One lease, one charge, the provider's own numbers; and the provider was asked once."""
    scope = books.run(metered, lambda: make(name, {**arguments, **options(provider)}, is_async=is_async))
    books.once(feature, tokens)
    assert len(provider.posts()) == 1
    assert [receipt.state for receipt in scope.receipts] == ["booked"]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("name", "arguments", "feature", "tokens"), CALLS)
def test_a_refusal_comes_before_the_provider(
    name: str,
    arguments: dict[str, Any],
    feature: str,
    tokens: int,
    is_async: bool,
    metered: Vluna,
    provider: Provider,
    books: Books,
) -> None:
    """The caller gets the gate's own exception, and the provider is never asked."""
    books.gate.set_credit(books.customer, 0)
    with call_context(principal_id=books.customer) as scope, pytest.raises(GateDenied) as caught:
        make(name, {**arguments, **options(provider, num_retries=2)}, is_async=is_async)
    error: Any = caught.value
    assert type(error) is GateDenied
    assert (error.reason, error.status_code, error.gate_status) == ("insufficient_credit", 400, 402)
    assert scope.last_denial is error
    assert provider.requests == []
    books.nothing()


@pytest.mark.parametrize("behaviour", ["refuses_option", "refuses_everything_new"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_an_upstream_that_refuses_to_tell_usage(
    is_async: bool, behaviour: str, metered: Vluna, provider: Provider, books: Books
) -> None:
    """The call is made again without the option, once; this upstream is not asked any more; an estimate is charged."""
    provider.behaviour = behaviour
    given = {**CHAT, **options(provider, max_retries=0), "stream": True, "api_base": f"{provider.base_url}/{behaviour}"}
    given["api_base"] += "/async" if is_async else ""
    books.run(metered, lambda: make("completion", given, is_async=is_async))
    books.run(metered, lambda: make("completion", given, is_async=is_async))
    assert len(provider.posts()) == 3
    assert [state for _, state in books.leases] == ["closed", "closed"]
    assert {entry.labels["usage_source"] for entry in books.gate.booked(books.customer).entries} == {"estimated"}


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("stream", [False, True])
def test_settled_inline_the_receipt_is_there_with_the_answer(
    stream: bool, is_async: bool, make_vluna: Any, make_callback: Any, provider: Provider, books: Books
) -> None:
    """``settle="inline"``: who has the whole answer has the receipt."""
    vluna = make_vluna(settle="inline")
    make_callback(vluna)
    with call_context(principal_id=books.customer) as scope:
        make("completion", {**CHAT, **options(provider), "stream": stream}, is_async=is_async)
        assert [receipt.state for receipt in scope.receipts] == ["booked"]
    books.once()


@pytest.mark.parametrize("stream", [False, True])
def test_the_sync_messages_of_anthropic(stream: bool, metered: Vluna, provider: Provider, books: Books) -> None:
    """``litellm.anthropic.messages.create``: refused before the provider, settled once. (1.83 breaks its own stream of
    an OpenAI model after the first event, so there is nothing to charge.)"""
    breaks = stream and "litellm.chat_completions.dispatch" not in sys.modules

    def work() -> None:
        answer: Any = litellm.anthropic.messages.create(**ANTHROPIC, **options(provider), stream=stream)
        if stream:
            assert list(answer) if hasattr(answer, "__next__") else asyncio.run(_all(answer))

    books.run(metered, work, collect=breaks)
    books.cancelled() if breaks else books.once()
    books.gate.set_credit(books.customer, 0)
    with call_context(principal_id=books.customer), pytest.raises(GateDenied):
        work()
    assert len(provider.posts()) == 1


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("allowed", [True, False])
def test_without_a_gate(
    allowed: bool, is_async: bool, make_vluna: Any, make_callback: Any, provider: Provider, books: Books
) -> None:
    """No gate: by default the call goes on, ungated; with ``deny`` it is refused before the provider."""
    vluna = Vluna(
        base_url="http://127.0.0.1:9/mgt/v1",
        realm_id="r",
        key_id="k",
        key_secret="c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0czI=",
        outbox="memory",
        authorize_deadline=0.5,
        on_gate_unavailable="allow" if allowed else "deny",
    )
    make_callback(vluna)
    with call_context(principal_id=books.customer):
        if allowed:
            make("completion", {**CHAT, **options(provider)}, is_async=is_async)
        else:
            with pytest.raises(GateUnavailable) as caught:
                make("completion", {**CHAT, **options(provider)}, is_async=is_async)
            assert (caught.value.status_code, caught.value.gate_status) == (400, None)  # type: ignore[attr-defined]
    assert len(provider.posts()) == (1 if allowed else 0)
    vluna.close(0.1)


@pytest.mark.parametrize("name", ["completion", "acompletion", "responses", "aresponses", "embedding", "aembedding"])
def test_wrapped_functions_look_as_before(name: str, vluna: Vluna, make_callback: Any) -> None:
    """Name, signature, kind of function: as LiteLLM made them; and they come back."""
    before = getattr(litellm, name)
    make_callback(vluna)
    after = getattr(litellm, name)
    assert after is not before
    assert (after.__name__, after.__qualname__, after.__module__) == (
        before.__name__,
        before.__qualname__,
        before.__module__,
    )
    assert inspect.signature(after) == inspect.signature(before)
    assert inspect.iscoroutinefunction(after) == inspect.iscoroutinefunction(before)
    from vluna_llm.integrations import litellm as integration

    integration.uninstall()
    assert getattr(litellm, name) is before
