"""LangChain with a wrapped client: each model call is settled once."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from conftest import Bill
from provider import Provider

from vluna_llm import Vluna
from vluna_llm.errors import GateDenied
from vluna_llm.sandbox import Sandbox

langchain_openai = pytest.importorskip(
    "langchain_openai", reason="langchain-openai is not installed: pip install langchain-openai"
)


def model(vluna: Vluna, provider: Provider, customer: str | None = None, **options: Any) -> Any:
    """A chat model that is given the wrapped clients, in both colours."""
    wrap = vluna.wrap if customer is None else lambda client: vluna.bind(client, principal_id=customer)
    root = wrap(openai.OpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))
    aroot = wrap(openai.AsyncOpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))
    return langchain_openai.ChatOpenAI(
        model="gpt-4o",
        api_key="sk",
        base_url=provider.base_url,
        root_client=root,
        client=root.chat.completions,
        root_async_client=aroot,
        async_client=aroot.chat.completions,
        **options,
    )


APIS = pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])


@APIS
@pytest.mark.parametrize("how", ["invoke", "stream", "ainvoke", "astream"])
def test_a_call_is_settled_once(how: str, responses: bool, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """Whole and streamed, both colours, both APIs."""
    llm = model(vluna, provider, use_responses_api=responses)

    def work() -> None:
        if how == "invoke":
            llm.invoke("hi")
        elif how == "stream":
            assert len(list(llm.stream("hi"))) > 5
        elif how == "ainvoke":
            asyncio.run(llm.ainvoke("hi"))
        else:

            async def main() -> None:
                assert len([part async for part in llm.astream("hi")]) > 5

            asyncio.run(main())

    bill: Bill = billed(vluna, work)
    bill.booked_once()


@APIS
def test_leaving_a_stream_is_settled_once(responses: bool, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """LangChain's generator is closed early."""
    provider.behaviour = "hang"
    llm = model(vluna, provider, use_responses_api=responses)

    def work() -> None:
        parts = llm.stream("hi")
        next(parts)
        parts.close()

    bill: Bill = billed(vluna, work)
    bill.cancelled_once()


def test_a_cancelled_ainvoke_is_settled_once(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """LangChain tells its callbacks nothing here; the client knows."""
    provider.behaviour = "silent"
    llm = model(vluna, provider)

    async def main() -> None:
        task = asyncio.create_task(llm.ainvoke("hi"))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    bill: Bill = billed(vluna, lambda: asyncio.run(main()))
    bill.cancelled_once()


def test_structured_output_is_settled_once(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """``with_structured_output`` goes through the SDK's parse helpers."""
    llm = model(vluna, provider).with_structured_output({"title": "A", "type": "object", "properties": {}})
    bill: Bill = billed(vluna, lambda: llm.invoke("hi"))
    bill.booked_once()


def test_embeddings_are_settled_once(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """The embeddings class takes the wrapped resource."""
    client = vluna.wrap(openai.OpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))
    embeddings = langchain_openai.OpenAIEmbeddings(
        model="text-embedding-3-small",
        api_key="sk",
        base_url=provider.base_url,
        client=client.embeddings,
        check_embedding_ctx_length=False,
    )
    bill: Bill = billed(vluna, lambda: embeddings.embed_query("hi"))
    bill.booked_once(8)


def test_a_refusal_reaches_the_product(make_vluna: Any, provider: Provider) -> None:
    """`GateDenied` passes through the framework as it is."""
    with Sandbox() as gate:
        gate.set_credit("broke", 0)
        vluna = make_vluna(gate)
        with pytest.raises(GateDenied):
            model(vluna, provider, "broke").invoke("hi")
        vluna.close()
    assert provider.requests == []
