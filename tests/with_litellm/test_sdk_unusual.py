"""Unusual calls of LiteLLM's functions: what is asked of the provider is what is billed."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import litellm
import pytest
from books import MESSAGES, Books
from provider import Provider

from vluna_llm import Vluna, call_context
from vluna_llm.errors import ConfigurationError, GateDenied
from vluna_llm.sandbox import Sandbox

PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 50


def _edit(api_base: str) -> Any:
    image = io.BytesIO(PNG)
    image.name = "a.png"
    return litellm.image_edit(
        image, "a lighthouse", "openai/gpt-image-1", api_base=api_base, api_key="sk", mock_response="made up"
    )


def test_an_image_is_edited_however_it_is_passed(metered: Vluna, provider: Provider, books: Books) -> None:
    """`image_edit` takes no notice of ``mock_response``, also where the image is a positional argument."""
    books.run(metered, lambda: _edit(provider.base_url))
    assert len(provider.posts()) == 1
    books.once("openai.gpt-image-1", 1050)


def test_a_deployment_that_embedding_takes_no_notice_of(metered: Vluna, provider: Provider, books: Books) -> None:
    """What LiteLLM asks for is what is billed."""
    work: Callable[[], Any] = lambda: litellm.embedding(  # noqa: E731
        "openai/text-embedding-3-small", ["hi"], deployment_id="cheap", api_base=provider.base_url, api_key="sk"
    )
    books.run(metered, work)
    books.once("openai.text-embedding-3-small", 8)


def test_a_retrying_function_asks_a_denied_customer_once(
    metered: Vluna, provider: Provider, shared_gate: Sandbox, customer: str
) -> None:
    """`completion_with_retries` is one call: what the gate has refused is not asked again."""
    shared_gate.set_credit(customer, 0)
    before = len(shared_gate.requests)
    with call_context(principal_id=customer), pytest.raises(GateDenied):
        litellm.completion_with_retries(
            model="openai/gpt-4o", messages=MESSAGES, num_retries=3, api_base=provider.base_url, api_key="sk"
        )
    asked = [seen for seen in shared_gate.requests[before:] if "authorize" in seen.path]
    assert len(asked) == 1


def test_a_retrying_function_is_one_operation(metered: Vluna, provider: Provider, books: Books) -> None:
    """`completion_with_retries`, the first try of which fails: one lease."""
    provider.behaviour = "flaky"
    options = {"api_base": provider.base_url, "api_key": "sk", "max_retries": 0}
    work: Callable[[], Any] = lambda: litellm.completion_with_retries(  # noqa: E731
        model="openai/gpt-4o", messages=MESSAGES, num_retries=2, **options
    )
    books.run(metered, work)
    books.once()


def _other_model(provider: Provider) -> Any:
    return litellm.completion(
        model="openai/gpt-4o",
        messages=MESSAGES,
        api_base=provider.base_url,
        api_key="sk",
        extra_body={"model": "o1-pro"},
    )


def test_two_models_in_one_call_are_refused_with_the_fix(metered: Vluna, provider: Provider, customer: str) -> None:
    """LiteLLM sends one or the other, by function and version: nobody could tell what is going to be sold."""
    with call_context(principal_id=customer), pytest.raises(ConfigurationError, match="write it as model="):
        _other_model(provider)
    assert provider.requests == []


def test_the_same_model_twice_is_no_contradiction(metered: Vluna, provider: Provider, books: Books) -> None:
    work: Callable[[], Any] = lambda: litellm.completion(  # noqa: E731
        model="openai/gpt-4o",
        messages=MESSAGES,
        api_base=provider.base_url,
        api_key="sk",
        extra_body={"model": "gpt-4o"},
    )
    books.run(metered, work)
    books.once()


def test_two_models_in_one_call_run_where_nothing_is_refused(metered: Vluna, provider: Provider, books: Books) -> None:
    metered.mode = "observe"
    books.run(metered, lambda: _other_model(provider))
    assert len(provider.posts()) == 1
    assert metered.telemetry.counts["vluna.endpoint.unmetered"] == 1
