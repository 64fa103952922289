"""Who pays for a call in LangChain: the model's binding, the config of the run, a handler's function, the context."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from langchain_stage import HttpModel, openai_model, run
from provider import Provider

from vluna_llm import Vluna, call_context
from vluna_llm.errors import ConfigurationError, GateDenied, MissingPrincipal
from vluna_llm.integrations.langchain import VlunaCallbackHandler, may_retry, wrap_model
from vluna_llm.sandbox import Sandbox

from langchain_core.runnables import RunnableLambda, RunnableParallel  # isort: skip  # after it is known to be there


@pytest.fixture(params=["client", "messages"])
def bare(request: pytest.FixtureRequest, provider: Provider) -> Any:
    """A model of each layer."""
    return openai_model(provider.base_url) if request.param == "client" else HttpModel(base_url=provider.base_url)


@pytest.fixture
def model(bare: Any, vluna: Vluna) -> Any:
    """The same, metered."""
    return wrap_model(bare, vluna)


def paying(principal_id: str, **more: Any) -> dict[str, Any]:
    """A config that names the customer."""
    return {"metadata": {"vluna": {"principal_id": principal_id, **more}}}


def tenant(metadata: Mapping[str, Any]) -> str | None:
    """An application's own way to say whose request it is."""
    return metadata.get("tenant")


async def _acollect(items: Any) -> list[Any]:
    return [item async for item in items]


def use(model: Any, how: str, config: Any) -> None:
    """One call."""
    if how == "invoke":
        model.invoke("hi", config)
    elif how == "ainvoke":
        run(model.ainvoke("hi", config))
    elif how == "stream":
        list(model.stream("hi", config))
    elif how == "astream":
        run(_acollect(model.astream("hi", config)))
    elif how == "astream_events":
        run(_acollect(model.astream_events("hi", config, version="v2")))
    elif how == "stream_events_v3":
        assert model.stream_events("hi", config, version="v3").output.text


WAYS = pytest.mark.parametrize("how", ["invoke", "ainvoke", "stream", "astream", "astream_events"])


def booked(gate: Sandbox, vluna: Vluna, customer: str) -> int:
    """How many calls this customer paid for."""
    assert vluna.flush(10)
    return len(gate.booked(customer).entries)


@WAYS
def test_the_config_names_the_customer(how: str, model: Any, vluna: Vluna, customer: str, shared_gate: Sandbox) -> None:
    """``config["metadata"]["vluna"]``, over the surrounding context, with what else a call context takes."""
    with call_context(principal_id=f"{customer}_other"):
        use(model, how, paying(customer, labels={"plan": "pro"}, end_user="ann"))
    assert booked(shared_gate, vluna, customer) == 1
    assert booked(shared_gate, vluna, f"{customer}_other") == 0
    (entry,) = shared_gate.booked(customer).entries
    assert (entry.labels["plan"], entry.labels["end_user"]) == ("pro", "ann")


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_the_third_version_of_events_names_the_customer(
    model: Any, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """A stream that LangChain reads when the consumer asks for it."""
    use(model, "stream_events_v3", paying(customer))
    assert booked(shared_gate, vluna, customer) == 1


@WAYS
def test_a_handler_names_the_customer(how: str, model: Any, vluna: Vluna, customer: str, shared_gate: Sandbox) -> None:
    """By a function of the metadata."""
    config = {"metadata": {"tenant": customer}, "callbacks": [VlunaCallbackHandler(tenant, vluna)]}
    use(model, how, config)
    assert booked(shared_gate, vluna, customer) == 1


@pytest.mark.parametrize("how", ["invoke", "ainvoke"])
def test_a_stream_inside_of_a_whole_call_has_the_same_run(
    how: str, model: Any, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """As LangGraph streams: LangChain hands its own ``_stream`` no run manager."""
    if how == "invoke":
        model.invoke("hi", paying(customer), stream=True)
    else:
        run(model.ainvoke("hi", paying(customer), stream=True))
    assert booked(shared_gate, vluna, customer) == 1
    assert len(shared_gate.booked(customer).entries[0].labels["run_id"]) == 36


def test_a_customer_that_cannot_be_right_is_told_where_nothing_is_refused(
    bare: Any, make_vluna: Any, customer: str, shared_gate: Sandbox
) -> None:
    """Observed, the call goes on, and the surrounding context pays."""
    vluna = make_vluna(mode="observe")
    with call_context(principal_id=customer):
        wrap_model(bare, vluna).invoke("hi", {"metadata": {"vluna": 7}})
    assert booked(shared_gate, vluna, customer) == 1


@WAYS
def test_a_handler_is_inherited(how: str, model: Any, vluna: Vluna, customer: str, shared_gate: Sandbox) -> None:
    """Through a chain, whose config names neither model nor customer."""
    chain = RunnableLambda(lambda text: text) | model
    config = {"metadata": {"tenant": customer}, "callbacks": [VlunaCallbackHandler(tenant, vluna)]}
    use(chain, how, config)
    assert booked(shared_gate, vluna, customer) == 1


@WAYS
def test_the_binding_wins(how: str, bare: Any, vluna: Vluna, customer: str, shared_gate: Sandbox) -> None:
    """What a client writes into a config bills nobody else."""
    model = wrap_model(bare, vluna, principal_id=customer)
    with call_context(principal_id=f"{customer}_context"):
        use(model, how, paying(f"{customer}_config"))
    assert booked(shared_gate, vluna, customer) == 1
    assert [booked(shared_gate, vluna, f"{customer}_{name}") for name in ("context", "config")] == [0, 0]


def test_wrapping_again_binds_more_closely(bare: Any, vluna: Vluna, customer: str, shared_gate: Sandbox) -> None:
    """One model for all, one of them for each customer."""
    everybody = wrap_model(bare, vluna, labels={"app": "shop"})
    wrap_model(everybody, vluna, principal_id=customer).invoke("hi")
    assert booked(shared_gate, vluna, customer) == 1
    assert shared_gate.booked(customer).entries[0].labels["app"] == "shop"
    with pytest.raises(MissingPrincipal):
        everybody.invoke("hi")


@pytest.mark.parametrize("how", ["sync", "async"])
def test_branches_pay_for_themselves(how: str, model: Any, make_vluna: Any, bare: Any) -> None:
    """Eight customers at once in `RunnableParallel`, one of whom may not: only that branch fails."""
    with Sandbox() as gate:
        gate.set_credit("c3", 0)
        vluna = make_vluna(gate)
        model = wrap_model(bare, vluna)

        def answer(result: Any) -> str:
            return "denied" if isinstance(result, GateDenied) else result.content

        def branch(n: int) -> Any:
            refused = RunnableLambda(lambda _: "denied")
            chain = model.with_config(paying(f"c{n}")) | RunnableLambda(answer)
            return chain.with_fallbacks([refused], exceptions_to_handle=(GateDenied,))

        together = RunnableParallel({f"b{n}": branch(n) for n in range(8)})
        found = together.invoke("hi") if how == "sync" else run(together.ainvoke("hi"))
        assert vluna.flush(10)
        assert [found[f"b{n}"] == "denied" for n in range(8)] == [n == 3 for n in range(8)]
        assert [len(gate.booked(f"c{n}").entries) for n in range(8)] == [int(n != 3) for n in range(8)]
        vluna.close()


def test_one_denial_ends_the_parallel_step_as_itself(bare: Any, make_vluna: Any) -> None:
    """Without a fallback `GateDenied` is what the caller sees; the other branch is charged, since it ran."""
    with Sandbox() as gate:
        gate.set_credit("poor", 0)
        vluna = make_vluna(gate)
        model = wrap_model(bare, vluna)
        together = RunnableParallel(rich=model.with_config(paying("rich")), poor=model.with_config(paying("poor")))
        with pytest.raises(GateDenied):
            together.invoke("hi")
        assert vluna.flush(10)
        assert gate.booked("poor").entries == ()
        assert len(gate.booked("rich").entries) == 1
        vluna.close()


@pytest.mark.parametrize("how", ["batch", "abatch"])
def test_each_config_of_a_batch_pays(how: str, model: Any, vluna: Vluna, customer: str, shared_gate: Sandbox) -> None:
    """In LangChain's threads, and in its tasks."""
    configs = [paying(f"{customer}_{n}") for n in range(6)]
    if how == "batch":
        model.batch(["hi"] * 6, configs)
    else:
        run(model.abatch(["hi"] * 6, configs))
    assert [booked(shared_gate, vluna, f"{customer}_{n}") for n in range(6)] == [1] * 6


def test_a_cancelled_call_leaves_no_customer_behind(
    bare: Any, vluna: Vluna, provider: Provider, customer: str, shared_gate: Sandbox
) -> None:
    """The next call in the same task is not billed to the one before, of whose end LangChain tells nothing."""
    model = wrap_model(bare, vluna)

    async def main() -> None:
        provider.behaviour = "silent"
        config = {"metadata": {"tenant": customer}, "callbacks": [VlunaCallbackHandler(tenant, vluna)]}
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(model.ainvoke("hi", config), 0.3)
        provider.behaviour = "ok"
        with pytest.raises(MissingPrincipal):
            await model.ainvoke("hi")
        with call_context(principal_id=f"{customer}_next"):
            await model.ainvoke("hi")

    run(main())
    assert booked(shared_gate, vluna, customer) == 0
    assert booked(shared_gate, vluna, f"{customer}_next") == 1


@pytest.mark.parametrize("said", [7, ["c"], {"principal": "c"}, {"principal_id": ""}, {"principal_id": " c"}])
def test_a_customer_that_cannot_be_right_is_refused(said: Any, model: Any, provider: Provider) -> None:
    """Before the provider is called, with the name of what is wrong."""
    with pytest.raises(ConfigurationError, match=r"metadata|principal_id"):
        model.invoke("hi", {"metadata": {"vluna": said}})
    with pytest.raises(ConfigurationError, match=r"identity function|principal_id"):
        model.invoke("hi", {"callbacks": [VlunaCallbackHandler(lambda metadata: said)]})
    assert provider.requests == []


def test_a_handler_tells_of_a_model_that_nobody_wrapped(
    provider: Provider, vluna: Vluna, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning, and the call goes on; a wrapped one is not told."""
    handler = VlunaCallbackHandler(vluna=vluna)
    openai_model(provider.base_url).invoke("hi", {"callbacks": [handler]})
    assert "langchain.ChatOpenAI (not given to wrap_model) costs money and is not metered" in caplog.text
    caplog.clear()
    wrap_model(HttpModel(base_url=provider.base_url), vluna).invoke("hi", {"callbacks": [handler], **paying("c_told")})
    assert "not metered" not in caplog.text


@pytest.mark.parametrize("how", ["invoke", "ainvoke", "stream", "astream"])
def test_a_handler_can_refuse_a_model_that_nobody_wrapped(how: str, provider: Provider, make_vluna: Any) -> None:
    """``on_unmetered="deny"``: the exception comes through LangChain, and the provider is not asked."""
    handler = VlunaCallbackHandler(vluna=make_vluna(on_unmetered="deny"))
    with pytest.raises(ConfigurationError, match="not given to wrap_model"):
        use(openai_model(provider.base_url), how, {"callbacks": [handler]})
    assert provider.requests == []


def test_a_chain_that_retries_can_ask_what_may_be_retried(bare: Any, make_vluna: Any, provider: Provider) -> None:
    """``may_retry`` for what retries more than a model."""
    with Sandbox() as gate:
        gate.set_credit("broke", 0)
        vluna = make_vluna(gate)
        chain = RunnableLambda(lambda text: text) | wrap_model(bare, vluna, principal_id="broke")
        with pytest.raises(GateDenied) as refused:
            chain.with_retry(retry_if_exception_type=may_retry, stop_after_attempt=5).invoke("hi")
        assert len([seen for seen in gate.requests if seen.path.endswith("/authorize")]) == 1
        vluna.close()
    assert not may_retry(refused.value)
    assert may_retry(TimeoutError())
    assert provider.requests == []
