"""One logical call of LiteLLM is one operation: retries, fallbacks, bridges, caches, batches and calls inside calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import litellm
import pytest
from books import FEATURE, MESSAGES, MODEL, Books
from litellm.integrations.custom_logger import CustomLogger
from provider import Provider

from vluna_llm import Vluna, call_context
from vluna_llm.errors import GateDenied

CHAT: dict[str, Any] = {"model": f"openai/{MODEL}", "messages": MESSAGES, "api_key": "sk-test"}
OTHER = "gpt-4o-mini"


@pytest.fixture(params=["sync", "async"])
def complete(request: pytest.FixtureRequest, provider: Provider) -> Callable[..., Any]:
    """``completion`` or ``acompletion`` of our upstream."""

    def call(**arguments: Any) -> Any:
        given = {**CHAT, "api_base": provider.base_url, "max_retries": 0, **arguments}
        if request.param == "sync":
            answer = litellm.completion(**given)
            return list(answer) if given.get("stream") and not given.get("complete_response") else answer

        async def main() -> Any:
            answer = await litellm.acompletion(**given)
            if given.get("stream"):
                answer = [part async for part in answer]
            if litellm.cache is not None:
                await asyncio.sleep(0.2)  # LiteLLM fills its cache in a task of its own
            return answer

        return asyncio.run(main())

    return call


def test_a_retry_is_inside(complete: Any, metered: Vluna, provider: Provider, books: Books) -> None:
    """``num_retries``: the second attempt is answered under the lease of the first."""
    pytest.importorskip("tenacity", reason="LiteLLM's retries need tenacity")
    provider.behaviour = "flaky"
    books.run(metered, lambda: complete(num_retries=2))
    books.once()
    assert len(provider.posts()) == 2


def test_retries_in_vain_charge_nothing(complete: Any, metered: Vluna, provider: Provider, books: Books) -> None:
    """Every attempt fails: one lease, given back; the caller sees LiteLLM's own error."""
    pytest.importorskip("tenacity", reason="LiteLLM's retries need tenacity")
    provider.behaviour = "down"

    def work() -> None:
        with pytest.raises(litellm.InternalServerError):
            complete(num_retries=2)

    books.run(metered, work)
    books.cancelled()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", ["completion", "responses", "text_completion"])
def test_a_retry_of_any_function_is_inside(
    name: str, stream: bool, is_async: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """The first attempt has asked the provider in vain: what the second one brings is not billed for both."""
    pytest.importorskip("tenacity", reason="LiteLLM's retries need tenacity")
    provider.behaviour = "flaky"
    about: dict[str, Any] = {"completion": {"messages": MESSAGES}, "responses": {"input": "hi"}}.get(
        name, {"prompt": "hi"}
    )
    given = {"model": f"openai/{MODEL}", "api_key": "sk-test", "api_base": provider.base_url, **about}
    given |= {"num_retries": 2, "max_retries": 0, "stream": stream}
    failed = False

    async def main() -> None:
        answer = await getattr(litellm, f"a{name}")(**given)
        assert not stream or [part async for part in answer]

    def work() -> None:
        nonlocal failed
        try:
            if is_async:
                asyncio.run(main())
            else:
                answer = getattr(litellm, name)(**given)
                assert not stream or list(answer)
        except Exception:
            failed = True  # LiteLLM does not retry this one

    books.run(metered, work)
    if failed:
        assert len(provider.posts()) == 1
        books.cancelled()
    else:
        assert books.charged == [(FEATURE, 120)], books.leases


def test_a_fallback_is_another_feature(
    complete: Any, metered: Vluna, provider: Provider, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``fallbacks=``: the first lease ends, a second one is asked for and charged."""
    _fails_for(monkeypatch, provider, MODEL)
    books.run(metered, lambda: complete(fallbacks=[f"openai/{OTHER}"]))
    assert books.leases == [(FEATURE, "canceled"), (f"openai.{OTHER}", "closed")]
    assert books.charged == [(f"openai.{OTHER}", 120)]


def test_a_fallback_on_an_event_loop(
    metered: Vluna, provider: Provider, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sync function on a running loop works in another thread, which knows nothing of the caller's context."""
    _fails_for(monkeypatch, provider, MODEL)

    async def main() -> None:
        litellm.completion(**CHAT, api_base=provider.base_url, max_retries=0, fallbacks=[f"openai/{OTHER}"])

    books.run(metered, lambda: asyncio.run(main()))
    assert books.leases == [(FEATURE, "canceled"), (f"openai.{OTHER}", "closed")]
    assert books.charged == [(f"openai.{OTHER}", 120)]


def test_a_refused_fallback_is_told_as_it_is(
    complete: Any, metered: Vluna, provider: Provider, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LiteLLM makes one text of all failures; the caller gets the gate's own exception."""
    _fails_for(monkeypatch, provider, MODEL)
    books.gate.feature(f"openai.{OTHER}", entitlement=True)
    with call_context(principal_id=books.customer) as scope, pytest.raises(GateDenied) as caught:
        complete(fallbacks=[f"openai/{OTHER}"])
    books.gate.feature(f"openai.{OTHER}", entitlement=False)
    assert caught.value.reason == "entitlement"
    assert scope.last_denial is caught.value
    assert {seen.body["model"] for seen in provider.posts()} == {MODEL}
    assert scope.wait(10)
    books.settled(metered)
    books.cancelled()


def test_a_context_window_fallback(
    complete: Any, metered: Vluna, provider: Provider, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``context_window_fallback_dict``: LiteLLM goes on with another model, and that one is charged."""
    _fails_for(monkeypatch, provider, MODEL, message="This model's maximum context length is 10 tokens.")
    answer: list[Any] = []
    books.run(
        metered,
        lambda: answer.append(complete(context_window_fallback_dict={f"openai/{MODEL}": f"openai/{OTHER}"})),
    )
    assert answer[0].choices[0].message.content == "hello world"
    assert books.leases == [(FEATURE, "canceled"), (f"openai.{OTHER}", "closed")]
    assert books.charged == [(f"openai.{OTHER}", 120)]


def test_completion_with_retries(metered: Vluna, provider: Provider, books: Books) -> None:
    """LiteLLM's older function, which calls `completion` for each attempt: nothing is charged for the failed one."""
    pytest.importorskip("tenacity", reason="LiteLLM's retries need tenacity")
    provider.behaviour = "flaky"
    books.run(metered, lambda: litellm.completion_with_retries(**CHAT, api_base=provider.base_url, max_retries=0))
    assert books.charged == [(FEATURE, 120)]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_through_the_responses_api(
    complete: Any, stream: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """A bridge: ``openai/responses/<model>`` speaks chat to the caller and Responses to the provider."""
    books.run(metered, lambda: complete(model=f"openai/responses/{MODEL}", stream=stream))
    assert [seen.path for seen in provider.posts()] == ["/v1/responses"]
    books.once()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
def test_responses_through_the_chat_api(
    is_async: bool, stream: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """The other bridge: a provider that knows no Responses API."""
    given: dict[str, Any] = {
        "model": "deepseek/deepseek-chat",
        "input": "hi",
        "api_key": "sk-test",
        "api_base": provider.base_url,
        "stream": stream,
    }

    async def amain() -> None:
        answer: Any = await litellm.aresponses(**given)
        if stream:
            assert [event async for event in answer]

    def main() -> None:
        answer: Any = litellm.responses(**given)
        if stream:
            assert list(answer)

    books.run(metered, (lambda: asyncio.run(amain())) if is_async else main)
    assert [seen.path for seen in provider.posts()] == ["/v1/chat/completions"]
    books.once("deepseek.deepseek-chat")


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_messages_of_an_openai_model(stream: bool, metered: Vluna, provider: Provider, books: Books) -> None:
    """A third bridge: Anthropic's Messages to the caller, Responses (or chat) to the provider."""

    async def main() -> None:
        answer: Any = await litellm.anthropic.messages.acreate(
            model=f"openai/{MODEL}",
            messages=MESSAGES,
            max_tokens=100,
            stream=stream,
            api_key="sk-test",
            api_base=provider.base_url,
        )
        if stream:
            assert [part async for part in answer]

    books.run(metered, lambda: asyncio.run(main()))
    assert len(provider.posts()) == 1
    books.once()


def test_a_mock_costs_nothing(complete: Any, metered: Vluna, provider: Provider, books: Books) -> None:
    """``mock_response``: nobody is asked, nobody pays."""
    books.run(metered, lambda: complete(mock_response="hello"))
    books.nothing()
    assert provider.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_cache_hit_costs_nothing(
    complete: Any, stream: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """The second call comes out of LiteLLM's cache: its lease is given back."""
    litellm.cache = litellm.Cache(type="local")
    books.run(metered, lambda: complete(stream=stream))
    books.run(metered, lambda: complete(stream=stream))
    assert len(provider.posts()) == 1
    assert books.leases == [(FEATURE, "closed"), (FEATURE, "canceled")]
    assert books.charged == [(FEATURE, 120)]


def test_a_cached_embedding_costs_nothing(metered: Vluna, provider: Provider, books: Books) -> None:
    """Embeddings: LiteLLM caches each input by itself."""
    litellm.cache = litellm.Cache(type="local")
    given: dict[str, Any] = {"model": "openai/text-embedding-3-small", "api_key": "sk", "api_base": provider.base_url}

    async def main() -> None:
        await litellm.aembedding(**given, input=["hi"])
        await asyncio.sleep(0.2)  # LiteLLM fills its cache in a task of its own
        await litellm.aembedding(**given, input=["hi"])

    books.run(metered, lambda: asyncio.run(main()))
    assert len(provider.posts()) == 1
    assert [state for _, state in books.leases] == ["closed", "canceled"]
    assert [tokens for _, tokens in books.charged] == [8]


def test_a_complete_response_is_read_and_settled(metered: Vluna, provider: Provider, books: Books) -> None:
    """``stream=True, complete_response=True``: LiteLLM reads the stream itself and returns a whole answer."""
    answers: list[Any] = []

    def work() -> None:
        answers.append(litellm.completion(**CHAT, api_base=provider.base_url, stream=True, complete_response=True))

    books.run(metered, work)
    assert answers[0].choices[0].message.content.startswith("word0 word1")
    books.once()


@pytest.mark.parametrize("named", ["context", "metadata"])
def test_a_batch_is_one_operation_for_each_call(named: str, metered: Vluna, provider: Provider, books: Books) -> None:
    """`batch_completion` works in threads that know nothing of the caller's context."""
    extra: dict[str, Any] = {} if named == "context" else {"metadata": {"vluna": {"principal_id": books.customer}}}
    answers: list[Any] = []

    def work() -> None:
        given = {**CHAT, "messages": [MESSAGES] * 3, "api_base": provider.base_url, **extra}
        answers.extend(litellm.batch_completion(**given))

    if named == "context":
        books.run(metered, work)
    else:
        work()
        books.settled(metered)
    assert [answer.choices[0].message.content for answer in answers] == ["hello world"] * 3
    assert books.charged == [(FEATURE, 120)] * 3
    assert len(provider.posts()) == 3


def test_the_first_of_many_models(metered: Vluna, provider: Provider, books: Books) -> None:
    """`batch_completion_models` asks several models at once: each that answered was paid for."""
    books.run(
        metered,
        lambda: litellm.batch_completion_models(
            models=[f"openai/{MODEL}", f"openai/{OTHER}"], messages=MESSAGES, api_key="sk", api_base=provider.base_url
        ),
    )
    assert sorted(books.charged) == sorted([(FEATURE, 120), (f"openai.{OTHER}", 120)])


class Judge(CustomLogger):
    """Somebody's callback that asks a model of its own before each call."""

    def __init__(self, provider: Provider, model: str, *, embeds: bool = False, payer: str | None = None) -> None:
        super().__init__()
        self.metadata = {} if payer is None else {"metadata": {"vluna": {"principal_id": payer}}}
        self.provider = provider
        self.model = model
        self.embeds = embeds
        self.busy = False

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: Any) -> Any:
        if not self.busy:
            self.busy = True
            given: dict[str, Any] = {"api_key": "sk", "api_base": self.provider.base_url, **self.metadata}
            if self.embeds:
                await litellm.aembedding(model="openai/text-embedding-3-small", input=["hi"], **given)
            else:
                await litellm.acompletion(model=f"openai/{self.model}", messages=MESSAGES, **given)
        return None


@pytest.mark.parametrize("model", [OTHER, MODEL])
@pytest.mark.parametrize("routed", [False, True], ids=["function", "router"])
def test_a_call_inside_a_call_may_name_another_customer(
    routed: bool, model: str, vluna: Vluna, make_callback: Any, provider: Provider, books: Books
) -> None:
    """``metadata["vluna"]`` of the inner call: it is billed to whom that names, and the outer one to its own."""
    judged = f"{books.customer}.judge"
    make_callback(vluna, Judge(provider, model, payer=judged))
    params = {"model": f"openai/{MODEL}", "api_key": "sk", "api_base": provider.base_url}
    router = litellm.Router(model_list=[{"model_name": "chat", "litellm_params": params}])

    async def main() -> None:
        if routed:
            await router.acompletion(model="chat", messages=MESSAGES)
        else:
            await litellm.acompletion(**CHAT, api_base=provider.base_url)

    books.run(vluna, lambda: asyncio.run(main()))
    assert books.charged == [(FEATURE, 120)]
    assert [(entry.feature, entry.quantity) for entry in books.gate.booked(judged).applied] == [
        (f"openai.{model}", 120)
    ]


@pytest.mark.parametrize(("model", "embeds"), [(OTHER, False), (MODEL, False), ("", True)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_inside_a_call_is_charged_for_itself(
    stream: bool, model: str, embeds: bool, vluna: Vluna, make_callback: Any, provider: Provider, books: Books
) -> None:
    """A callback of the user asks a model: two answers, two charges, whichever models they were."""
    make_callback(vluna, Judge(provider, model, embeds=embeds))

    async def main() -> None:
        answer: Any = await litellm.acompletion(**CHAT, api_base=provider.base_url, stream=stream)
        if stream:
            assert [part async for part in answer]

    books.run(vluna, lambda: asyncio.run(main()))
    assert len(provider.posts()) == 2
    inner = ("openai.text-embedding-3-small", 8) if embeds else (f"openai.{model}", 120)
    assert sorted(books.charged) == sorted([(FEATURE, 120), inner])


def test_calls_side_by_side_are_charged_each(metered: Vluna, provider: Provider, books: Books) -> None:
    """Tasks of one loop share nothing."""

    async def main() -> None:
        await asyncio.gather(
            *(
                litellm.acompletion(**{**CHAT, "model": f"openai/{model}"}, api_base=provider.base_url)
                for model in (MODEL, OTHER, MODEL, OTHER)
            )
        )

    books.run(metered, lambda: asyncio.run(main()))
    assert sorted(books.charged) == sorted([(FEATURE, 120), (f"openai.{OTHER}", 120)] * 2)


def test_threads_are_charged_each(metered: Vluna, provider: Provider, books: Books) -> None:
    """Sync calls in threads, each naming its customer with the call."""

    def work() -> None:
        litellm.completion(**CHAT, api_base=provider.base_url, metadata={"vluna": {"principal_id": books.customer}})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    books.settled(metered)
    assert books.charged == [(FEATURE, 120)] * 4


def _fails_for(
    monkeypatch: pytest.MonkeyPatch, provider: Provider, model: str, *, message: str = "bad request"
) -> None:
    """Let the upstream refuse this model with 400."""
    from provider import _Handler

    answer = _Handler._answer

    def refusing(self: Any, path: str, body: Any) -> None:
        if isinstance(body, dict) and body.get("model") == model:
            return self._json({"error": {"message": message, "type": "invalid_request_error", "code": None}}, 400)
        return answer(self, path, body)

    monkeypatch.setattr(_Handler, "_answer", refusing)
