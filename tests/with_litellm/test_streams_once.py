"""Streams in company: a metered client below, a receipt that is waited for, and one call after another."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from books import Books
from provider import Provider
from streaming import APIS, Api, Reader, run, settled, two, whole

from vluna_llm import call_context

COLOURS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@COLOURS
@pytest.mark.parametrize("reading", [whole, two])
@pytest.mark.parametrize("api", [APIS[0], APIS[2]])
def test_a_metered_client_below_settles_and_litellm_does_not(
    api: Api, reading: Any, is_async: bool, metered: Any, provider: Provider, books: Books
) -> None:
    """One lease and one settlement, also where LiteLLM asks only at the first read."""
    provider.behaviour = "ok" if reading is whole else "slow"
    kind = openai.AsyncOpenAI if is_async else openai.OpenAI
    client = metered.wrap(kind(base_url=provider.base_url, api_key="sk-test", max_retries=0))
    settled(metered, books, lambda: run(api, reading, provider, is_async=is_async, client=client))
    if reading is whole:
        books.once()
    else:
        books.cancelled()


@COLOURS
@pytest.mark.parametrize("api", APIS)
def test_the_receipt_is_there_at_the_end_of_the_stream(
    api: Api, is_async: bool, make_vluna: Any, make_callback: Any, provider: Provider, books: Books
) -> None:
    """``settle="inline"``: whoever has read the stream finds what it cost."""
    vluna = make_vluna(settle="inline")
    make_callback(vluna)
    with call_context(principal_id=books.customer) as scope:

        async def look(reader: Reader) -> list[str]:
            await whole(reader)
            return [receipt.state for receipt in scope.receipts]

        assert run(api, look, provider, is_async=is_async) == ["booked"]
    books.once()


@COLOURS
@pytest.mark.parametrize("api", APIS)
def test_one_stream_after_another(api: Api, is_async: bool, metered: Any, provider: Provider, books: Books) -> None:
    """Each has an operation of its own."""
    for _ in range(3):
        settled(metered, books, lambda: run(api, whole, provider, is_async=is_async))
    assert [tokens for _, tokens in books.charged] == [120, 120, 120]
    assert [state for _, state in books.leases] == ["closed"] * 3
