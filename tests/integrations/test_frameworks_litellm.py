"""LiteLLM with a wrapped client handed to it: each model call is settled once.

LiteLLM pins the OpenAI SDK: the versions that are tested need ``openai>=2.20,<3``.
"""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from conftest import Bill, eventually
from provider import Provider

from vluna_llm import Vluna
from vluna_llm.context import current_context
from vluna_llm.sandbox import Sandbox

litellm = pytest.importorskip("litellm", reason="LiteLLM is not installed: pip install litellm 'openai<3'")

CALL: Any = {"model": "openai/gpt-4o", "messages": [{"role": "user", "content": "hi"}], "api_key": "sk"}


def sync_client(vluna: Vluna, provider: Provider) -> Any:
    return vluna.wrap(openai.OpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))


def async_client(vluna: Vluna, provider: Provider) -> Any:
    return vluna.wrap(openai.AsyncOpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))


@pytest.mark.parametrize("stream", [False, True])
def test_completion_is_settled_once(stream: bool, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """``completion(client=...)``."""
    client = sync_client(vluna, provider)

    def work() -> None:
        answer = litellm.completion(**CALL, api_base=provider.base_url, client=client, stream=stream)
        if stream:
            assert len(list(answer)) > 5

    bill: Bill = billed(vluna, work)
    bill.booked_once()


@pytest.mark.parametrize("stream", [False, True])
def test_acompletion_is_settled_once(stream: bool, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """``acompletion(client=...)``."""

    async def main() -> None:
        client = async_client(vluna, provider)
        answer = await litellm.acompletion(**CALL, api_base=provider.base_url, client=client, stream=stream)
        if stream:
            assert len([part async for part in answer]) > 5
        await client.close()

    bill: Bill = billed(vluna, lambda: asyncio.run(main()))
    bill.booked_once()


def test_embedding_is_settled_once(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """``embedding(client=...)``."""
    client = sync_client(vluna, provider)

    def work() -> None:
        litellm.embedding(
            model="openai/text-embedding-3-small",
            input=["hi"],
            api_key="sk",
            api_base=provider.base_url,
            client=client,
        )

    bill: Bill = billed(vluna, work)
    bill.booked_once(8)


def test_a_stream_that_is_left_is_settled_once(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """LiteLLM tells its callbacks nothing about an abandoned stream; the client knows."""
    import gc

    provider.behaviour = "hang"
    client = sync_client(vluna, provider)

    def work() -> None:
        answer = litellm.completion(**CALL, api_base=provider.base_url, client=client, stream=True)
        next(iter(answer))
        del answer
        # LiteLLM's logging threads hold on to the stream for a moment: it can be collected when they have let go.
        scope = current_context().scopes[-1]
        assert eventually(lambda: gc.collect() >= 0 and scope.pending == 0, 10)

    bill: Bill = billed(vluna, work)
    bill.cancelled_once()


def test_a_refusal_never_reaches_the_provider(make_vluna: Any, provider: Provider) -> None:
    """LiteLLM puts its own exception around `GateDenied`; the provider is not called."""
    with Sandbox() as gate:
        gate.set_credit("broke", 0)
        vluna = make_vluna(gate)
        bare = openai.OpenAI(base_url=provider.base_url, api_key="sk", max_retries=0)
        with pytest.raises(Exception, match=r"GateDenied|credit|402"):
            litellm.completion(**CALL, api_base=provider.base_url, client=vluna.bind(bare, principal_id="broke"))
        vluna.close()
    assert provider.requests == []
