"""Responses that a provider works on in the background: nothing is charged until a retrieve tells what was used."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import litellm
import pytest
from books import FEATURE, MODEL, Books
from provider import Provider

from vluna_llm import Vluna, call_context
from vluna_llm.sandbox import Sandbox


@pytest.fixture
def own(make_vluna: Any, make_callback: Any, customer: str) -> Iterator[tuple[Vluna, Books]]:
    """A gate for each test: what is booked by a response's id is booked once in a realm, for ever."""
    with Sandbox() as gate:
        vluna = make_vluna(gate)
        make_callback(vluna)
        yield vluna, Books(gate, customer)
        vluna.close()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_background_response_is_booked_by_its_retrieve(
    is_async: bool, own: tuple[Vluna, Books], provider: Provider
) -> None:
    """Created: parked. Retrieved, however often: booked once, for whoever created it."""
    metered, books = own
    given: dict[str, Any] = {"api_key": "sk", "api_base": provider.base_url}

    async def amain() -> str:
        response: Any = await litellm.aresponses(model=f"openai/{MODEL}", input="hi", background=True, **given)
        return str(response.id)

    def main() -> str:
        response: Any = litellm.responses(model=f"openai/{MODEL}", input="hi", background=True, **given)
        return str(response.id)

    made: list[str] = []
    books.run(metered, lambda: made.append(asyncio.run(amain()) if is_async else main()))
    assert books.charged == []
    provider.behaviour = "in_progress"
    for behaviour in ("in_progress", "ok", "ok"):
        provider.behaviour = behaviour
        response: Any = (
            asyncio.run(litellm.aget_responses(response_id=made[0], **given))
            if is_async
            else litellm.get_responses(response_id=made[0], **given)
        )
    assert response.usage.input_tokens == 100
    books.settled(metered)
    assert books.charged == [(FEATURE, 120)]


@pytest.mark.parametrize("whole", [True, False])
def test_a_background_stream_is_booked_once(whole: bool, own: tuple[Vluna, Books], provider: Provider) -> None:
    """Read to its end or left: with the retrieves after it, it is booked once."""
    metered, books = own
    given: dict[str, Any] = {"api_key": "sk", "api_base": provider.base_url}
    found: list[str] = []

    async def main() -> None:
        stream: Any = await litellm.aresponses(
            model=f"openai/{MODEL}", input="hi", background=True, stream=True, **given
        )
        async for event in stream:
            if event.type == "response.created":
                found.append(event.response.id)
                if not whole:
                    break
        del event, stream

    books.run(metered, lambda: asyncio.run(main()), collect=True)
    with call_context(principal_id=books.customer):  # of a stream that was forgotten nobody knows who made it
        for _ in range(2):
            litellm.get_responses(response_id=found[0], custom_llm_provider="openai", **given)
    books.settled(metered)
    assert [tokens for _, tokens in books.charged] == [120]
    if whole:  # of one that was forgotten only the retrieve tells the model, by its dated name
        assert books.charged == [(FEATURE, 120)]
