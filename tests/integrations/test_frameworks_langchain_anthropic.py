"""LangChain's model of Anthropic: metered by its client where that can be wrapped, else by its messages."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Bill
from langchain_stage import Messages, run

from vluna_llm import Vluna
from vluna_llm.errors import GateDenied
from vluna_llm.integrations.langchain import wrap_model
from vluna_llm.sandbox import Sandbox

langchain_anthropic = pytest.importorskip(
    "langchain_anthropic", reason="langchain-anthropic is not installed: pip install langchain-anthropic"
)


@pytest.fixture
def upstream() -> Iterator[Messages]:
    """Anthropic's API."""
    server = Messages()
    yield server
    server.close()


@pytest.fixture(params=[True, False], ids=["usage", "no_usage"])
def bare(request: pytest.FixtureRequest, upstream: Messages) -> Any:
    """The model, with and without usage for the consumer."""
    return langchain_anthropic.ChatAnthropic(
        model="claude-sonnet-5", api_key="sk", base_url=upstream.host, max_retries=0, stream_usage=request.param
    )


def call(model: Any, how: str) -> list[Any]:
    """One call."""

    async def each() -> list[Any]:
        return [chunk async for chunk in model.astream("hi")]

    if how == "stream":
        return list(model.stream("hi"))
    if how == "astream":
        return run(each())  # type: ignore[no-any-return]
    return [model.invoke("hi") if how == "invoke" else run(model.ainvoke("hi"))]


WAYS = pytest.mark.parametrize("how", ["invoke", "stream", "ainvoke", "astream"])


@WAYS
def test_a_call_is_settled_once(how: str, bare: Any, vluna: Vluna, billed: Any) -> None:
    """Everything the model read is input, from the cache or not; the consumer sees what the bare model gives."""

    def seen(model: Any) -> list[Any]:
        return [(message.content, message.usage_metadata, message.response_metadata) for message in call(model, how)]

    expected, found = seen(bare), list[Any]()
    bill: Bill = billed(vluna, lambda: found.extend(seen(wrap_model(bare, vluna))))
    assert found == expected
    bill.booked_once(120)
    (entry,) = bill.gate.booked(bill.principal_id).entries
    assert entry.feature == "anthropic.claude-sonnet-5"
    assert {name.rpartition(".")[2]: n for name, n in entry.lines.items()} == {"input": 60, "cached": 40, "output": 20}


@pytest.mark.parametrize("how", ["stream", "astream"])
def test_a_stream_that_is_left_is_cancelled(how: str, bare: Any, upstream: Messages, vluna: Vluna, billed: Any) -> None:
    """The usage of the first event is none."""
    upstream.holds = True
    model = wrap_model(bare, vluna)

    def work() -> None:
        if how == "stream":
            parts = model.stream("hi")
            assert [next(parts) for _ in range(2)]
            parts.close()
            return

        async def main() -> None:
            parts = model.astream("hi")
            for _ in range(2):
                await parts.__anext__()
            await parts.aclose()
            await asyncio.sleep(0.2)  # the loop goes on: LangChain leaves the SDK's stream to it

        run(main())

    bill: Bill = billed(vluna, work)
    bill.cancelled_once()


@WAYS
def test_a_refusal_is_our_exception(how: str, bare: Any, make_vluna: Any, upstream: Messages) -> None:
    """Before the provider is asked."""
    with Sandbox() as gate:
        gate.set_credit("broke", 0)
        vluna = make_vluna(gate)
        with pytest.raises(GateDenied):
            call(wrap_model(bare, vluna, principal_id="broke"), how)
        vluna.close()
    assert upstream.asked == []


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_metered(
    way: str,
    bare: Any,
    vluna: Vluna,
    customer: str,
    shared_gate: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bare model can be copied and pickled, since it makes its clients late: so can the metered one."""
    import vluna_llm.vluna as facade

    monkeypatch.setattr(facade, "_default", vluna)
    model = wrap_model(bare, vluna, principal_id=customer)
    assert {"_client", "_async_client"}.isdisjoint(vars(bare))
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    copied.invoke("hi")
    assert vluna.flush(5)
    assert [entry.quantity for entry in shared_gate.booked(customer).entries] == [120]
