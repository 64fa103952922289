"""`VlunaCallback` as users hold it: twice, beside others, early-bound names, without wrappers; what it tells them."""

from __future__ import annotations

import asyncio
import gc
import inspect
import pickle
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import litellm
import openai
import pytest
from books import MESSAGES, MODEL, Books, eventually
from litellm.integrations.custom_logger import CustomLogger
from provider import Provider

from vluna_llm import Vluna, call_context
from vluna_llm.errors import ConfigurationError, GateDenied
from vluna_llm.integrations import litellm as integration
from vluna_llm.integrations.litellm import VlunaCallback

CHAT: dict[str, Any] = {"model": f"openai/{MODEL}", "messages": MESSAGES, "api_key": "sk-test"}


# -- how often it meters -----------------------------------------------------------------------------------------------


def test_two_callbacks_meter_once(vluna: Vluna, provider: Provider, books: Books) -> None:
    """The same one twice, and another one that was made beside it."""
    one = VlunaCallback(vluna)
    litellm.callbacks = [one, one, VlunaCallback(vluna)]
    books.run(vluna, lambda: litellm.completion(**CHAT, api_base=provider.base_url))
    books.once()


def test_made_in_many_threads_at_once(vluna: Vluna, provider: Provider, books: Books) -> None:
    """Installing is safe from any thread: LiteLLM's functions are wrapped once."""
    ready = threading.Barrier(8)

    def make() -> None:
        ready.wait()
        VlunaCallback(vluna)

    before = litellm.completion
    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inspect.unwrap(litellm.completion, stop=lambda f: f is before) is before
    assert litellm.completion.__wrapped__ is before  # type: ignore[attr-defined]
    litellm.callbacks = [VlunaCallback(vluna)]
    books.run(vluna, lambda: litellm.completion(**CHAT, api_base=provider.base_url))
    books.once()


class Other(CustomLogger):
    """Somebody else's callback, which counts what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def told_of(self, customer: str) -> list[Any]:
        """The calls of this customer: LiteLLM delivers events of a loop that is gone in the next one."""
        found = [(kwargs, (kwargs["litellm_params"].get("metadata") or {}).get("vluna")) for kwargs in self.told]
        return [kwargs for kwargs, trace in found if trace is not None and trace["principal_id"] == customer]

    def log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        self.told.append(kwargs)

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        self.told.append(kwargs)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_other_callbacks_see_what_it_cost(
    stream: bool, is_async: bool, vluna: Vluna, make_callback: Any, provider: Provider, books: Books
) -> None:
    """Operation and amount stand in the metadata that LiteLLM's logging callbacks read, and on the answer."""
    other = Other()
    make_callback(vluna, other)
    answers: list[Any] = []

    async def main() -> None:
        answer: Any = await litellm.acompletion(**CHAT, api_base=provider.base_url, stream=stream)
        answers.append(answer)
        if stream:
            assert [part async for part in answer]
        for _ in range(40):
            if other.told_of(books.customer):
                break
            await asyncio.sleep(0.05)

    def work() -> None:
        answers.append(litellm.completion(**CHAT, api_base=provider.base_url, stream=stream))
        if stream:
            assert list(answers[0])

    scope = books.run(vluna, (lambda: asyncio.run(main())) if is_async else work)
    books.once()
    (receipt,) = scope.receipts
    assert answers[0]._hidden_params["vluna_operation_id"] == receipt.operation_id
    assert eventually(lambda: bool(other.told_of(books.customer)))
    for kwargs in other.told_of(books.customer):
        told = kwargs["litellm_params"]["metadata"]["vluna"]
        assert told["operation_id"] == receipt.operation_id
        assert (told["state"], told["charged_xusd"]) == ("booked", receipt.charged_xusd)
        payload = kwargs.get("standard_logging_object")
        assert payload is None or payload["metadata"]["vluna"]["charged_xusd"] == receipt.charged_xusd


def test_beside_opentelemetry(vluna: Vluna, make_callback: Any, provider: Provider, books: Books) -> None:
    """LiteLLM's own OpenTelemetry callback: it works on, names operation and amount, and the call is settled once."""
    pytest.importorskip("opentelemetry.sdk")
    from litellm.integrations.opentelemetry import OpenTelemetry, OpenTelemetryConfig
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans = InMemorySpanExporter()
    make_callback(vluna, OpenTelemetry(config=OpenTelemetryConfig(exporter=spans)))
    scope = books.run(vluna, lambda: litellm.completion(**CHAT, api_base=provider.base_url))
    books.once()
    (receipt,) = scope.receipts

    def told() -> list[str]:
        return [str((span.attributes or {}).get("metadata.vluna", "")) for span in spans.get_finished_spans()]

    assert eventually(lambda: any(receipt.operation_id in text for text in told()))
    assert any(f"'charged_xusd': {receipt.charged_xusd}" in text for text in told())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("behaviour", ["ok", "flaky"])
@pytest.mark.parametrize("is_async", [False, True])
def test_with_a_wrapped_client_underneath(
    is_async: bool, behaviour: str, stream: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """``client=vluna.wrap(...)``: the client takes the operation over and settles it, once, also after a retry."""
    provider.behaviour = behaviour

    async def main() -> None:
        client = metered.wrap(openai.AsyncOpenAI(base_url=provider.base_url, api_key="sk", max_retries=2))
        answer: Any = await litellm.acompletion(**CHAT, client=client, stream=stream, max_retries=2)
        if stream:
            assert [part async for part in answer]
        await client.close()

    def work() -> None:
        client = metered.wrap(openai.OpenAI(base_url=provider.base_url, api_key="sk", max_retries=2))
        answer: Any = litellm.completion(**CHAT, client=client, stream=stream, max_retries=2)
        if stream:
            assert list(answer)

    books.run(metered, (lambda: asyncio.run(main())) if is_async else work)
    books.once()


@pytest.mark.parametrize("is_async", [False, True])
def test_litellms_retries_above_a_wrapped_client(
    is_async: bool, metered: Vluna, provider: Provider, books: Books
) -> None:
    """``num_retries`` above a client that settles by itself (LiteLLM lets the client do them): one operation."""
    pytest.importorskip("tenacity", reason="LiteLLM's retries need tenacity")
    provider.behaviour = "flaky"

    async def main() -> None:
        client = metered.wrap(openai.AsyncOpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))
        await litellm.acompletion(**CHAT, client=client, max_retries=0, num_retries=2)
        await client.close()

    def work() -> None:
        client = metered.wrap(openai.OpenAI(base_url=provider.base_url, api_key="sk", max_retries=0))
        litellm.completion(**CHAT, client=client, max_retries=0, num_retries=2)

    books.run(metered, (lambda: asyncio.run(main())) if is_async else work)
    books.once()
    assert len(provider.posts()) == 2


# -- names that were bound before --------------------------------------------------------------------------------------


def early() -> types.ModuleType:
    """A module of the user's that imported LiteLLM's functions before there was a callback."""
    module = types.ModuleType("a_users_module")
    source = """
from litellm import completion, acompletion as ask
from litellm.main import completion as from_main
import litellm
class Held:
    method = staticmethod(completion)
table = {"completion": completion}
def call(**given):
    return completion(**given)
"""
    exec(source, vars(module))
    sys.modules[module.__name__] = module
    return module


@pytest.fixture
def users_module() -> Any:
    module = early()
    yield module
    del sys.modules[module.__name__]


@pytest.mark.parametrize("how", ["call", "completion", "from_main", "ask"])
def test_names_imported_before_are_covered(
    how: str, users_module: Any, vluna: Vluna, provider: Provider, books: Books
) -> None:
    """``from litellm import completion`` before `VlunaCallback()` was made, under whatever name."""
    litellm.callbacks = [VlunaCallback(vluna)]

    def work() -> None:
        answer = getattr(users_module, how)(**CHAT, api_base=provider.base_url)
        if inspect.iscoroutine(answer):
            asyncio.run(answer)

    books.run(vluna, work)
    books.once()
    integration.uninstall()
    assert users_module.completion is litellm.completion


@pytest.mark.parametrize("where", ["class", "table"])
def test_what_escapes_is_told(
    where: str, users_module: Any, vluna: Vluna, provider: Provider, books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    """A function held in a class or a dict stays LiteLLM's own. 1.106 goes on through a name that is covered; in 1.83
    the call runs unbilled, and is told by name."""
    litellm.callbacks = [VlunaCallback(vluna)]
    held = users_module.Held.method if where == "class" else users_module.table["completion"]
    books.run(vluna, lambda: held(**CHAT, api_base=provider.base_url))
    if "litellm.chat_completions.dispatch" in sys.modules:
        books.once()
        return
    books.nothing()
    assert "litellm.completion (called by a name bound before VlunaCallback())" in caplog.text


def test_uninstalled_wrappers_do_nothing(vluna: Vluna, provider: Provider, books: Books) -> None:
    """A wrapper that somebody kept calls LiteLLM as it is once the callback is gone."""
    litellm.callbacks = [VlunaCallback(vluna)]
    kept = litellm.completion
    integration.uninstall()
    litellm.callbacks = []
    books.run(vluna, lambda: kept(**CHAT, api_base=provider.base_url))
    books.nothing()


def test_functions_can_be_pickled(metered: Vluna) -> None:
    """A pool of processes names functions by module and name: the wrapped one is found there."""
    for name in ("completion", "acompletion", "responses", "embedding"):
        function = getattr(litellm, name)
        assert pickle.loads(pickle.dumps(function)) is function


# -- what is not metered -----------------------------------------------------------------------------------------------


def speak(provider: Provider) -> Any:
    return litellm.speech(model="openai/tts-1", input="hi", voice="alloy", api_key="sk", api_base=provider.base_url)


def test_speech_is_told(metered: Vluna, provider: Provider, books: Books, caplog: pytest.LogCaptureFixture) -> None:
    """What costs money and brings no usage runs unbilled, and is told once, sync or async."""
    books.run(metered, lambda: speak(provider))
    assert caplog.text.count("litellm.speech costs money and is not metered") == 1
    books.run(
        metered,
        lambda: asyncio.run(
            litellm.aspeech(model="openai/tts-1", input="hi", voice="alloy", api_key="sk", api_base=provider.base_url)
        ),
    )
    assert caplog.text.count("costs money and is not metered") == 2
    books.nothing()


def test_speech_is_refused(make_vluna: Any, make_callback: Any, provider: Provider, books: Books) -> None:
    """``on_unmetered="deny"``: before the provider is asked."""
    vluna = make_vluna(on_unmetered="deny")
    make_callback(vluna)
    with call_context(principal_id=books.customer), pytest.raises(ConfigurationError, match=r"litellm\.speech"):
        speak(provider)
    assert provider.requests == []


# -- without wrappers --------------------------------------------------------------------------------------------------


async def _hooks_only(vluna: Vluna, provider: Provider, *, stream: bool) -> None:
    answer: Any = await litellm.acompletion(
        **CHAT, api_base=provider.base_url, stream=stream, stream_options={"include_usage": True} if stream else None
    )
    if stream:
        assert [part async for part in answer]
    await asyncio.sleep(0.3)


@pytest.mark.parametrize("stream", [False, True])
def test_hooks_alone_cover_async_calls(
    stream: bool, vluna: Vluna, make_callback: Any, provider: Provider, books: Books
) -> None:
    """``install=False``: LiteLLM's functions are as they were; its hooks ask and settle what they can see."""
    before = litellm.acompletion
    make_callback(vluna, install=False)
    assert litellm.acompletion is before
    books.run(vluna, lambda: asyncio.run(_hooks_only(vluna, provider, stream=stream)))
    books.once()


def test_hooks_alone_bill_each_call_to_its_own(
    vluna: Vluna, make_callback: Any, provider: Provider, books: Books
) -> None:
    """``install=False``: calls of several customers in one task, before LiteLLM has told of any of them."""
    make_callback(vluna, install=False)
    named = [f"{books.customer}.{letter}" for letter in "aaabc"]

    async def main() -> None:
        for customer in named:
            about = {"vluna": {"principal_id": customer}}
            await litellm.acompletion(**CHAT, api_base=provider.base_url, metadata=about)
        await asyncio.sleep(0.5)

    books.run(vluna, lambda: asyncio.run(main()))
    books.nothing()
    charged = {customer: len(books.gate.booked(customer).applied) for customer in named}
    assert charged == {customer: named.count(customer) for customer in named}


def test_amounts_are_shown_beside_streams(metered: Vluna, provider: Provider, books: Books) -> None:
    """LiteLLM logs each chunk of a sync stream: none of them waits for a receipt that cannot have come."""
    found: list[Any] = []

    class Reads(CustomLogger):  # type: ignore[misc]
        def log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
            if kwargs.get("stream") is not True:
                found.append(kwargs["litellm_params"]["metadata"]["vluna"])

    litellm.callbacks.append(Reads())

    def work() -> None:
        assert list(litellm.completion(**CHAT, api_base=provider.base_url, stream=True))
        litellm.completion(**CHAT, api_base=provider.base_url)
        assert eventually(lambda: bool(found), 10)

    books.run(metered, work)
    assert [entry.get("state") for entry in found] == ["booked"], found


def test_hooks_alone_refuse_async_calls(vluna: Vluna, make_callback: Any, provider: Provider, books: Books) -> None:
    """``install=False``: an asynchronous call is refused before the provider, with the gate's own exception."""
    make_callback(vluna, install=False)
    books.gate.set_credit(books.customer, 0)
    with call_context(principal_id=books.customer), pytest.raises(GateDenied):
        asyncio.run(_hooks_only(vluna, provider, stream=False))
    assert provider.requests == []


def test_hooks_alone_tell_what_they_cannot_cover(
    vluna: Vluna, make_callback: Any, provider: Provider, books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    """``install=False``: a synchronous call runs unbilled, and that is told."""
    make_callback(vluna, install=False)
    books.run(vluna, lambda: litellm.completion(**CHAT, api_base=provider.base_url))
    books.nothing()
    assert "litellm.completion (installed with install=False) costs money and is not metered" in caplog.text


@pytest.mark.parametrize("install", [True, False])
def test_uninstalling_leaves_nothing_of_ours(
    install: bool, vluna: Vluna, make_callback: Any, provider: Provider, books: Books
) -> None:
    """Not in LiteLLM's stream class either, also where a stream was made meanwhile."""
    before = litellm.CustomStreamWrapper.__init__
    make_callback(vluna, install=install)
    text: dict[str, Any] = {"model": f"text-completion-openai/{MODEL}", "prompt": "hi", "api_key": "sk"}

    async def main() -> None:
        stream: Any = await litellm.atext_completion(**text, api_base=provider.base_url, stream=True)
        assert [chunk async for chunk in stream]
        await asyncio.sleep(0.3)

    books.run(vluna, lambda: asyncio.run(main()))
    if install:
        books.once()
    else:
        books.estimated_once()  # hooks alone ask no upstream of the user's own for usage
    integration.uninstall()
    assert litellm.CustomStreamWrapper.__init__ is before


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["completion", "acompletion", "text_completion", "atext_completion"])
def test_an_unknown_model_is_litellms_own_error(
    name: str, stream: bool, metered: Vluna, books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    """A misspelt name: nothing is charged, and nothing of ours is told to be broken."""
    asked = {"messages": MESSAGES} if "text" not in name else {"prompt": "hi"}

    async def main() -> None:
        answer = getattr(litellm, name)(model="no-such-model", stream=stream, **asked)
        if inspect.isawaitable(answer):
            await answer

    def work() -> None:
        with pytest.raises(litellm.BadRequestError, match="LLM Provider NOT provided"):
            asyncio.run(main())

    books.run(metered, work)
    assert books.gate.booked(books.customer).entries == ()
    assert "vluna.internal_error" not in caplog.text


# -- imports and the proxy's name --------------------------------------------------------------------------------------


def test_importing_vluna_llm_leaves_litellm_alone() -> None:
    """`import vluna_llm` is light; the integration itself needs no settings, and the proxy's callback is made late."""
    code = (
        "import sys, vluna_llm\n"
        "assert 'litellm' not in sys.modules\n"
        "import vluna_llm.integrations.litellm as integration\n"
        "assert 'litellm' in sys.modules and 'proxy_callback' not in vars(integration)\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=_bare_environment(), timeout=60)


def _bare_environment() -> dict[str, str]:
    import os

    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLUNA_")}
    return {**kept, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


def test_the_proxys_callback_is_made_from_the_environment(
    shared_gate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``callbacks: vluna_llm.integrations.litellm.proxy_callback``: one instance, made when it is asked for."""
    import vluna_llm.vluna as facade

    for name, value in {**shared_gate.env(), "VLUNA_LLM_OUTBOX": "memory"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(facade, "_default", None)
    made = integration.proxy_callback
    assert isinstance(made, VlunaCallback)
    assert integration.proxy_callback is made
    assert made.vluna is Vluna.default()
    made.vluna.close()


def test_nothing_is_kept(metered: Vluna, provider: Provider, books: Books) -> None:
    """Calls leave nothing behind: there are no more of them after twenty than after one."""
    from vluna_llm.integrations._litellm_attempt import Attempt
    from vluna_llm.integrations._litellm_call import LogicalCall

    def left() -> int:
        gc.collect()
        return sum(isinstance(found, (Attempt, LogicalCall)) for found in gc.get_objects())

    def call() -> None:
        books.run(metered, lambda: litellm.completion(**CHAT, api_base=provider.base_url))

    call()
    some = left()
    for _ in range(20):
        call()
    # Threads and loops that LiteLLM starts at a call hold on to that one's context.
    assert eventually(lambda: left() <= some + 3), (some, left())
