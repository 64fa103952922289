"""Chat models of LangChain that `wrap_model` has metered: each call is settled once, however it ends."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Bill, settled
from langchain_stage import HttpModel, SyncHttpModel, openai_model, run
from provider import CACHED, INPUT, OUTPUT, Provider

from vluna_llm import Vluna, call_context
from vluna_llm.errors import ConfigurationError, GateDenied, MissingPrincipal
from vluna_llm.integrations.langchain import wrap_model
from vluna_llm.sandbox import Sandbox

KINDS: dict[str, Callable[..., Any]] = {
    "client": openai_model,
    "responses": lambda base_url, **options: openai_model(base_url, use_responses_api=True, **options),
    "messages": lambda base_url, **options: HttpModel(base_url=base_url, **options),
    "sync_messages": lambda base_url, **options: SyncHttpModel(base_url=base_url, **options),
}


@pytest.fixture(params=KINDS)
def bare(request: pytest.FixtureRequest, provider: Provider) -> Any:
    """A model of each kind, not metered."""
    return KINDS[request.param](provider.base_url)


@pytest.fixture(params=["client", "messages"])
def bare_of_layer(request: pytest.FixtureRequest, provider: Provider) -> Any:
    """A model of each layer, not metered."""
    return KINDS[request.param](provider.base_url)


async def _collect(items: Any) -> list[Any]:
    return [item async for item in items]


def call(model: Any, how: str, text: str = "hi", **options: Any) -> Any:
    """One call, in one of LangChain's ways."""
    if how == "invoke":
        return model.invoke(text, **options)
    if how == "stream":
        return list(model.stream(text, **options))
    if how == "ainvoke":
        return run(model.ainvoke(text, **options))
    if how == "astream":
        return run(_collect(model.astream(text, **options)))
    assert how == "astream_events"
    return run(_collect(model.astream_events(text, version="v2", **options)))


WAYS = pytest.mark.parametrize("how", ["invoke", "stream", "ainvoke", "astream", "astream_events"])


@WAYS
def test_a_call_is_settled_once(how: str, bare: Any, vluna: Vluna, billed: Any) -> None:
    """By what the provider reported, cached tokens and reasoning as parts, with the run in the books."""
    model = wrap_model(bare, vluna)
    bill: Bill = billed(vluna, lambda: call(model, how))
    bill.booked_once(INPUT + OUTPUT)
    (entry,) = bill.gate.booked(bill.principal_id).entries
    assert {name.rpartition(".")[2]: n for name, n in entry.lines.items()} == {
        "input": INPUT - CACHED,
        "cached": CACHED,
        "output": OUTPUT,
    }
    assert len(entry.labels["run_id"]) == 36
    assert entry.labels["response_id"]


@pytest.mark.parametrize("how", ["stream", "astream"])
def test_the_chunks_are_those_of_the_bare_model(
    how: str, bare: Any, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """As many, of the same content, without usage that nobody asked for."""

    def seen(model: Any) -> list[Any]:
        provider.responses.clear()
        return [(type(c), c.content, c.usage_metadata, c.response_metadata, c.chunk_position) for c in call(model, how)]

    expected = seen(bare)
    found: list[Any] = []
    bill: Bill = billed(vluna, lambda: found.extend(seen(wrap_model(bare, vluna))))
    assert found == expected
    bill.booked_once()


def test_usage_that_was_asked_for_is_handed_on(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """``stream_usage=True`` of the application's own."""
    model = wrap_model(HttpModel(base_url=provider.base_url, stream_usage=True), vluna)
    found: list[Any] = []
    bill: Bill = billed(vluna, lambda: found.extend(model.stream("hi")))
    assert [c.usage_metadata["total_tokens"] for c in found if c.usage_metadata] == [INPUT + OUTPUT]
    bill.booked_once()


@pytest.mark.parametrize("how", ["batch", "abatch"])
def test_each_of_a_batch_is_an_operation(
    how: str, bare: Any, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """In LangChain's threads and tasks the surrounding context pays."""
    model = wrap_model(bare, vluna)
    with call_context(principal_id=customer) as scope:
        if how == "batch":
            model.batch(["a", "b", "c"])
        else:
            run(model.abatch(["a", "b", "c"]))
    bill = settled(vluna, scope, shared_gate, customer)
    entries = bill.gate.booked(customer).entries
    assert [(entry.status, entry.quantity) for entry in entries] == [("applied", 120)] * 3
    assert len({entry.labels["run_id"] for entry in entries}) == 3


# -- how it ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "drop", "aclose", "abreak", "cancel"])
def test_a_stream_that_is_left_is_cancelled(how: str, bare: Any, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """Closed, forgotten, left by ``break``, or with its task cancelled."""
    provider.behaviour = "hang"
    model = wrap_model(bare, vluna)

    def work() -> None:
        if how in ("close", "drop"):
            parts = model.stream("hi")
            next(parts)
            if how == "close":
                parts.close()
            del parts
            gc.collect()
            return

        async def main() -> None:
            parts = model.astream("hi")
            if how == "aclose":
                await parts.__anext__()
                await parts.aclose()
                await asyncio.sleep(0.2)  # the loop goes on: LangChain leaves the SDK's stream to it
            elif how == "abreak":
                async for _ in parts:
                    break
                del parts
                await asyncio.sleep(0.2)  # the loop goes on, and closes what was left in it
            else:
                first = asyncio.Event()

                async def read() -> None:
                    async for _ in parts:
                        first.set()

                task = asyncio.create_task(read())
                await first.wait()
                await asyncio.sleep(0.1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                provider.released.set()

        run(main())

    bill: Bill = billed(vluna, work)
    bill.cancelled_once()


def test_a_cancelled_ainvoke_is_cancelled(bare_of_layer: Any, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """LangChain tells callbacks nothing here."""
    provider.behaviour = "silent"
    model = wrap_model(bare_of_layer, vluna)

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(model.ainvoke("hi"), 0.3)

    bill: Bill = billed(vluna, lambda: run(main()))
    bill.cancelled_once()


@pytest.mark.parametrize("how", ["stream", "astream"])
def test_a_stream_that_is_left_after_the_finish_is_charged(
    how: str, bare_of_layer: Any, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """The rest is read for the usage, without the consumer."""
    model = wrap_model(bare_of_layer, vluna)

    def finished(chunk: Any) -> bool:
        return bool(chunk.response_metadata.get("finish_reason"))

    def work() -> None:
        if how == "stream":
            parts = model.stream("hi")
            next(part for part in parts if finished(part))
            parts.close()
            return

        async def main() -> None:
            parts = model.astream("hi")
            async for part in parts:
                if finished(part):
                    break
            await parts.aclose()
            await asyncio.sleep(0.05)  # LangChain leaves the SDK's own generator to the loop, which closes it in a task
            if closing := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(closing, timeout=5)

        run(main())

    bill: Bill = billed(vluna, work)
    bill.booked_once()


@pytest.mark.parametrize(("on_abort", "source"), [("estimate", "estimated"), ("drain", "provider")])
@pytest.mark.parametrize("how", ["stream", "astream"])
def test_on_abort_is_obeyed(
    how: str, on_abort: str, source: str, bare_of_layer: Any, make_vluna: Any, provider: Provider, billed: Any
) -> None:
    """``estimate`` bills what was written by then, ``drain`` reads on in the background."""
    provider.behaviour = "slow"
    provider.pause = 0.02
    vluna = make_vluna(on_abort=on_abort)
    model = wrap_model(bare_of_layer, vluna)

    def work() -> None:
        if how == "stream":
            parts = model.stream("hi")
            assert [next(parts).content for _ in range(3)]
            parts.close()
            return

        async def main() -> None:
            parts = model.astream("hi")
            for _ in range(3):
                await parts.__anext__()
            await parts.aclose()
            await asyncio.sleep(0.8)

        run(main())

    bill: Bill = billed(vluna, work)
    assert bill.only.usage_source == source
    assert (bill.only.quantity == INPUT + OUTPUT) == (source == "provider")


@WAYS
@pytest.mark.parametrize("behaviour", ["bad", "down"])
def test_a_call_that_the_upstream_refuses_is_cancelled(
    how: str, behaviour: str, bare_of_layer: Any, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """400 and 500 raise what the bare model raises."""
    provider.behaviour = behaviour
    with pytest.raises(Exception, match=r".") as expected:
        call(bare_of_layer, how)

    def work() -> None:
        with pytest.raises(type(expected.value)):
            call(wrap_model(bare_of_layer, vluna), how)

    bill: Bill = billed(vluna, work)
    bill.cancelled_once()


@pytest.mark.parametrize("how", ["stream", "astream"])
def test_a_stream_that_is_cut_is_cancelled(how: str, bare: Any, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """The connection breaks after some events."""
    provider.behaviour = "cut"

    def work() -> None:
        with pytest.raises(Exception, match=r"."):
            call(wrap_model(bare, vluna), how)

    bill: Bill = billed(vluna, work)
    bill.cancelled_once()


@pytest.mark.parametrize("how", ["stream", "astream"])
def test_no_usage_is_estimated(how: str, bare_of_layer: Any, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """The upstream ignores the option."""
    provider.behaviour = "no_usage"
    bill: Bill = billed(vluna, lambda: call(wrap_model(bare_of_layer, vluna), how))
    bill.booked_an_estimate()


@WAYS
def test_a_refusal_is_our_exception(how: str, bare: Any, make_vluna: Any, provider: Provider) -> None:
    """The provider is not asked, and the gate once."""
    with Sandbox() as gate:
        gate.set_credit("broke", 0)
        vluna = make_vluna(gate)
        with call_context(principal_id="broke") as scope, pytest.raises(GateDenied) as refused:
            call(wrap_model(bare, vluna), how)
        assert refused.value.reason == "insufficient_credit"
        assert scope.last_denial is refused.value
        vluna.close()
    assert provider.requests == []


@WAYS
def test_nobody_is_refused(how: str, bare: Any, vluna: Vluna, provider: Provider) -> None:
    """No principal, no call."""
    with pytest.raises(MissingPrincipal):
        call(wrap_model(bare, vluna), how)
    assert provider.requests == []


@WAYS
def test_inline_settling_waits_for_the_receipt(how: str, bare_of_layer: Any, make_vluna: Any, customer: str) -> None:
    """The receipt is there with the answer."""
    with call_context(principal_id=customer) as scope:
        call(wrap_model(bare_of_layer, make_vluna(settle="inline")), how)
        assert [receipt.state for receipt in scope.receipts] == ["booked"]


@pytest.mark.parametrize("mode", ["observe", "off"])
def test_other_modes_refuse_nothing(mode: str, bare_of_layer: Any, make_vluna: Any, provider: Provider) -> None:
    """Observed, a call without customer is told and made; off, the gate is not asked."""
    model = wrap_model(bare_of_layer, make_vluna(mode=mode))
    assert call(model, "invoke").content == "hello world"
    assert len(call(model, "stream")) > 5
    assert len(provider.requests) == 2


def test_a_cache_hit_is_free(bare_of_layer: Any, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """LangChain repeats the usage, and neither provider nor gate is asked."""
    from langchain_core.caches import InMemoryCache

    bare_of_layer.cache = InMemoryCache()
    model = wrap_model(bare_of_layer, vluna)

    def work() -> None:
        first, second = model.invoke("hi"), model.invoke("hi")
        assert second.usage_metadata["total_tokens"] == first.usage_metadata["total_tokens"] == 120
        run(model.ainvoke("hi"))

    bill: Bill = billed(vluna, work)
    bill.booked_once()
    assert len(provider.requests) == 1


def test_the_global_cache_is_shared_with_the_bare_model(vluna: Vluna, provider: Provider, customer: str) -> None:
    """The metered model has the name of the bare one."""
    from langchain_core.caches import InMemoryCache
    from langchain_core.globals import set_llm_cache

    bare = openai_model(provider.base_url)
    set_llm_cache(InMemoryCache())
    try:
        bare.invoke("hi")
        with call_context(principal_id=customer) as scope:
            wrap_model(bare, vluna).invoke("hi")
        assert scope.receipts == []
        assert scope.pending == 0
        assert len(provider.requests) == 1
    finally:
        set_llm_cache(None)


# -- the model itself --------------------------------------------------------------------------------------------------


def test_the_model_stays_what_it_was(bare_of_layer: Any, vluna: Vluna) -> None:
    """A copy of the same class and name; the given one is not touched; twice is once."""
    from langchain_core.load import dumpd

    before = dict(vars(bare_of_layer))
    model = wrap_model(bare_of_layer, vluna)
    assert isinstance(model, type(bare_of_layer))
    assert vars(bare_of_layer) == before
    assert type(model).__name__ == type(bare_of_layer).__name__
    assert dumpd(model) == dumpd(bare_of_layer)
    assert model._serialized == bare_of_layer._serialized
    assert model._get_llm_string() == bare_of_layer._get_llm_string()
    assert wrap_model(model, vluna) is model
    assert type(wrap_model(bare_of_layer, vluna)) is type(model)


@pytest.mark.parametrize("way", ["deepcopy", "copy", "model_copy"])
def test_a_copy_is_metered_and_bound(
    way: str, vluna: Vluna, provider: Provider, customer: str, shared_gate: Sandbox
) -> None:
    """Also where a model copies itself."""
    import copy

    model = wrap_model(HttpModel(base_url=provider.base_url), vluna, principal_id=customer)
    ways = {"deepcopy": copy.deepcopy, "copy": copy.copy, "model_copy": lambda m: m.model_copy()}
    ways[way](model).invoke("hi")
    assert vluna.flush(5)
    assert [entry.quantity for entry in shared_gate.booked(customer).entries] == [INPUT + OUTPUT]


def test_a_pickle_is_metered_by_the_settings_of_who_reads_it(
    provider: Provider, shared_gate: Sandbox, customer: str, monkeypatch: pytest.MonkeyPatch, vluna: Vluna
) -> None:
    """A worker that reads a model never calls it unmetered."""
    import pickle

    import vluna_llm.vluna as facade

    for name, value in {**shared_gate.env(), "VLUNA_LLM_OUTBOX": "memory"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(facade, "_default", None)
    model = wrap_model(HttpModel(base_url=provider.base_url), vluna, principal_id=customer, labels={"a": "b"})
    read = pickle.loads(pickle.dumps(model))
    assert isinstance(read, HttpModel)
    read.invoke("hi")
    with Vluna.default():
        pass
    (entry,) = shared_gate.booked(customer).entries
    assert (entry.quantity, entry.labels["a"]) == (120, "b")


def test_configurable_fields_stay_metered_and_bound(
    bare_of_layer: Any, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """LangChain makes another model for the config."""
    from langchain_core.runnables import ConfigurableField

    field = "model_name" if hasattr(bare_of_layer, "model_name") else "model"
    model = wrap_model(bare_of_layer, vluna, principal_id=customer)
    chosen = model.configurable_fields(**{field: ConfigurableField(id="chosen")})
    chosen.invoke("hi", config={"configurable": {"chosen": "other-model"}})
    assert vluna.flush(5)
    (entry,) = shared_gate.booked(customer).entries
    assert entry.feature.endswith("other-model")


def test_a_model_made_from_the_metered_class_is_metered(
    provider: Provider, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """``type(model)(...)``, as frameworks do."""
    made = type(wrap_model(openai_model(provider.base_url), vluna))(
        model="gpt-4o", api_key="sk", base_url=provider.base_url
    )
    with call_context(principal_id=customer):
        made.invoke("hi")
    assert vluna.flush(5)
    assert [entry.quantity for entry in shared_gate.booked(customer).entries] == [120]


def test_structured_output_and_tools_are_metered(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """What ``with_structured_output`` and ``bind_tools`` give goes through the metered model."""
    schema = {"title": "Answer", "type": "object", "properties": {"answer": {"type": "integer"}}}
    model = wrap_model(openai_model(provider.base_url), vluna)
    bill: Bill = billed(vluna, lambda: model.with_structured_output(schema).invoke("hi"))
    bill.booked_once()


def test_a_binding_is_wrapped_through(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """``wrap_model(model.bind(...))``."""
    bound = wrap_model(openai_model(provider.base_url).bind(stop=["x"]), vluna)
    bill: Bill = billed(vluna, lambda: bound.invoke("hi"))
    bill.booked_once()
    assert provider.requests[-1].body["stop"] == ["x"]


def test_what_is_no_model_is_refused(vluna: Vluna) -> None:
    """With a sentence that says what to do."""
    from langchain_core.runnables import RunnableLambda

    with pytest.raises(ConfigurationError, match="wrap each model"):
        wrap_model(RunnableLambda(lambda x: x), vluna)


def test_a_wrapped_client_in_a_wrapped_model_is_metered_once(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """Handed in by hand before."""
    import openai

    root = vluna.wrap(openai.OpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))
    model = wrap_model(openai_model(provider.base_url, root_client=root, client=root.chat.completions), vluna)
    bill: Bill = billed(vluna, lambda: model.invoke("hi"))
    bill.booked_once()


@pytest.mark.parametrize("how", ["invoke", "stream"])
def test_a_metered_client_inside_takes_the_operation_over(
    how: str, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """A model of the application's own around a metered model: the gate is asked once."""

    class Around(HttpModel):
        inner: Any = None

        def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
            return self.inner._generate(messages)

        def _stream(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
            yield from self.inner._stream(messages)

    inner = wrap_model(openai_model(provider.base_url), vluna)
    model = wrap_model(Around(base_url=provider.base_url, inner=inner), vluna)
    bill: Bill = billed(vluna, lambda: call(model, how))
    bill.booked_once()


def test_a_model_that_reads_its_own_stream_is_metered_once(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """``_generate`` made of ``_stream``, as many have it."""
    from langchain_core.language_models.chat_models import generate_from_stream

    class Streaming(SyncHttpModel):
        def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
            return generate_from_stream(self._stream(messages, stop, run_manager, stream_usage=True))

    model = wrap_model(Streaming(base_url=provider.base_url), vluna)
    bill: Bill = billed(vluna, lambda: call(model, "ainvoke"))
    bill.booked_once()


class Wordless(HttpModel):
    """A provider that says neither why an answer ends nor what it used."""

    words: int = 3

    def _stream(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        yield from list(super()._stream(messages))[: self.words]


@pytest.mark.parametrize("words", [3, 0])
def test_the_end_of_a_stream_is_its_end(words: int, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """What was read to its end was used, and is estimated; nothing at all is no answer."""
    model = wrap_model(Wordless(base_url=provider.base_url, words=words), vluna)

    def work() -> None:
        if words:
            assert len(list(model.stream("hi"))) >= words
            return
        with pytest.raises(ValueError, match="No generation chunks"):
            list(model.stream("hi"))

    bill: Bill = billed(vluna, work)
    bill.booked_an_estimate() if words else bill.cancelled_once()


def test_an_iterator_that_is_forgotten_is_cancelled(vluna: Vluna, provider: Provider, billed: Any) -> None:
    """Below LangChain's own generators, and with nobody to close it."""
    from langchain_core.messages import HumanMessage

    provider.behaviour = "hang"
    model = wrap_model(HttpModel(base_url=provider.base_url), vluna)

    def work() -> None:
        chunks = model._stream([HumanMessage("hi")])
        next(chunks)
        del chunks
        gc.collect()

    bill: Bill = billed(vluna, work)
    bill.cancelled_once()


def test_tokens_that_were_put_into_a_cache_are_known() -> None:
    """Under the one name and under those that tell how long they stay."""
    from langchain_core.messages import AIMessage

    from vluna_llm.integrations._langchain_call import usage_of

    for written in ({"cache_creation": 7}, {"cache_creation": 0, "ephemeral_5m_input_tokens": 7}):
        said: Any = {"input_tokens": 30, "output_tokens": 4, "total_tokens": 34}
        said["input_token_details"] = {"cache_read": 5, **written}
        usage = usage_of(AIMessage("hi", usage_metadata=said))
        assert usage is not None
        assert (usage.input_tokens, usage.cached_tokens, usage.cache_write_tokens) == (30, 5, 7)


# -- retries and fallbacks ---------------------------------------------------------------------------------------------


def test_each_retry_is_an_operation(bare_of_layer: Any, vluna: Vluna, provider: Provider, customer: str) -> None:
    """The first fails and is given back, the second is charged."""
    provider.behaviour = "flaky"
    model = wrap_model(bare_of_layer, vluna).with_retry(wait_exponential_jitter=False)
    with call_context(principal_id=customer) as scope:
        model.invoke("hi")
        assert scope.wait(5)
    assert [receipt.state for receipt in scope.receipts] in (["cancelled", "booked"], ["lapsed", "booked"])
    assert scope.settled_xusd > 0


def test_a_refusal_is_not_retried(bare_of_layer: Any, make_vluna: Any, provider: Provider) -> None:
    """The gate is asked once."""
    with Sandbox() as gate:
        gate.set_credit("broke", 0)
        vluna = make_vluna(gate)
        model = wrap_model(bare_of_layer, vluna, principal_id="broke")
        with pytest.raises(GateDenied):
            model.with_retry(stop_after_attempt=5).invoke("hi")
        with pytest.raises(GateDenied):
            run(model.bind(stop=["x"]).with_retry(stop_after_attempt=5).ainvoke("hi"))
        asked = [seen for seen in gate.requests if seen.path.endswith("/authorize")]
        vluna.close()
    assert len(asked) == 2
    assert provider.requests == []


def test_a_refused_model_leads_to_a_fallback_that_asks_for_itself(make_vluna: Any, provider: Provider) -> None:
    """The fallback runs where the customer may use it; its operation is its own, and the refused one cost nothing."""
    with Sandbox() as gate:
        gate.customer("thrifty", deny=("openai.gpt-4o",))
        vluna = make_vluna(gate)
        first, second = (openai_model(provider.base_url, name) for name in ("gpt-4o", "gpt-4o-mini"))
        model = wrap_model(first, vluna).with_fallbacks([second])
        with call_context(principal_id="thrifty") as scope:
            assert model.invoke("hi").content == "hello world"
            assert isinstance(scope.last_denial, GateDenied)
        vluna.close()
        assert [entry.feature for entry in gate.booked("thrifty").entries] == ["openai.gpt-4o-mini"]
    assert [seen.body["model"] for seen in provider.posts()] == ["gpt-4o-mini"]


@pytest.mark.parametrize("how", ["invoke", "ainvoke", "stream", "astream"])
def test_a_fallback_is_no_way_round_a_refusal(how: str, make_vluna: Any, provider: Provider) -> None:
    """A bare model that is given as a fallback is metered, too; where all are refused, the first refusal is raised."""
    with Sandbox() as gate:
        gate.set_credit("broke", 0)
        vluna = make_vluna(gate)
        tools = openai_model(provider.base_url, "gpt-4o-mini").bind(stop=["x"])
        model = wrap_model(openai_model(provider.base_url), vluna, principal_id="broke").with_fallbacks([tools])
        with pytest.raises(GateDenied):
            call(model, how)
        vluna.close()
    assert provider.requests == []


def test_a_fallback_after_a_failure_is_charged_alone(vluna: Vluna, provider: Provider, customer: str) -> None:
    """The lease of the model that failed is given back."""
    provider.behaviour = "flaky"
    model = wrap_model(openai_model(provider.base_url), vluna).with_fallbacks([HttpModel(base_url=provider.base_url)])
    with call_context(principal_id=customer) as scope:
        model.invoke("hi")
        assert scope.wait(5)
    assert [(receipt.state, receipt.feature_code) for receipt in scope.receipts][-1] == ("booked", "own.own-1")
    assert sum(receipt.state == "booked" for receipt in scope.receipts) == 1
