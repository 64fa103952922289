"""Models of the OpenAI Agents SDK that are not OpenAI's over HTTP, the default client of the process, and settings."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from agent_provider import TEXT, call, has_results
from conftest import settled

pytest.importorskip("agents", reason="openai-agents is not installed: pip install 'vluna-llm[agents]'")
pytest.importorskip("httpx2", reason="the OpenAI SDK is not of the line that is made for httpx2")

import agents
import httpx2
import websockets
from agent_bench import Bench, run
from agents.models import _openai_shared
from agents.testing import ModelStep, ScriptedModel, assistant_message, function_call
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails

from vluna_llm import call_context
from vluna_llm.errors import ConfigurationError, GateDenied, GateRateLimited, MissingPrincipal
from vluna_llm.integrations import openai_agents
from vluna_llm.integrations.openai_agents import VlunaModel, VlunaModelProvider, install, uninstall
from vluna_llm.sandbox import Sandbox
from vluna_llm.vluna import Vluna

pytest_plugins = ["agent_fixtures"]

BIG = "openai.gpt-4o"


@agents.function_tool
async def look_up() -> str:
    """Looks it up."""
    return "found"


def writer(**options: Any) -> Any:
    return agents.Agent(**{"name": "writer", "model": "gpt-4o", "tools": [look_up], **options})


def plain() -> Any:
    """A configuration with the SDK's own provider, which remembers the default client that it has seen."""
    return agents.RunConfig(tracing_disabled=True)


# -- a model of the application's own ----------------------------------------------------------------------------------


class Own(agents.Model):
    """A model of the application's own, over a client of any kind, that makes an answer of Chat Completions."""

    def __init__(self, client: Any, model: str = "acme/large") -> None:
        self.client = client
        self.model = model
        self.asked = 0
        self.closed = False

    async def get_response(self, *args: Any, **kwargs: Any) -> Any:
        self.asked += 1
        answer = await self.client.chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": "what?"}]
        )
        usage = agents.Usage(
            requests=1,
            input_tokens=answer.usage.prompt_tokens,
            output_tokens=answer.usage.completion_tokens,
            total_tokens=answer.usage.total_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=40, cache_write_tokens=0),
            output_tokens_details=OutputTokensDetails(reasoning_tokens=5),
        )
        item = assistant_message(answer.choices[0].message.content)
        return agents.ModelResponse(output=[item], usage=usage, response_id=None)

    async def stream_response(self, *args: Any, **kwargs: Any) -> Any:
        self.asked += 1
        kwargs = {**dict.fromkeys(("previous_response_id", "conversation_id", "prompt")), **kwargs}
        inner = agents.OpenAIResponsesModel("gpt-4o", self.client)
        async for event in inner.stream_response(*args, **kwargs):
            yield event

    async def close(self) -> None:
        self.closed = True


def test_a_model_of_the_applications_own(bench: Bench, streamed: bool) -> None:
    """It is asked for under the name it gives itself, and settled by the usage of its answer."""
    model = Own(bench.client())
    metered = VlunaModel(model, bench.vluna)
    bench.bill(lambda: run(writer(model=metered), plain(), streamed=streamed)).are("acme.large")
    (entry,) = bench.gate.booked(bench.customer).entries
    assert dict(entry.lines) == {
        "acme.large.tokens.input": 60,
        "acme.large.tokens.cached": 40,
        "acme.large.tokens.output": 20,
    }
    assert isinstance(metered, Own)
    assert repr(metered).startswith("VlunaModel(<")
    asyncio.run(metered.close())
    assert model.closed


def test_a_model_of_the_applications_own_over_a_metered_client(bench: Bench, streamed: bool) -> None:
    """One lease, taken over by the client: one settlement."""
    model = VlunaModel(Own(bench.vluna.wrap(bench.client())), bench.vluna)
    bench.bill(lambda: run(writer(model=model), plain(), streamed=streamed)).are("acme.large")


def test_a_model_of_the_applications_own_that_bills_another(bench: Bench, streamed: bool) -> None:
    """A client bound to somebody else asks for itself, and the model's lease is given back."""
    other = f"{bench.customer}_other"
    model = VlunaModel(Own(bench.vluna.bind(bench.client(), principal_id=other)), bench.vluna)
    bench.bill(lambda: run(writer(model=model), plain(), streamed=streamed)).are(canceled=1)
    assert bench.vluna.flush(10)
    bench.books(other).are(BIG)


def test_a_provider_of_the_applications_own(bench: Bench, streamed: bool) -> None:
    """`VlunaModelProvider` meters whatever models it gives, each call under its own lease."""
    made: list[Own] = []

    class Provider(agents.ModelProvider):
        closed = False

        def get_model(self, model_name: str | None) -> Any:
            made.append(Own(bench.client(), f"acme/{model_name}"))
            return made[-1]

        async def aclose(self) -> None:
            self.closed = True

    inner = Provider()
    bench.bill(lambda: run(writer(), bench.config(inner), streamed=streamed)).are("acme.gpt-4o")
    provider = VlunaModelProvider(bench.vluna, inner)
    assert provider.closed is False
    asyncio.run(provider.aclose())
    assert inner.closed


def test_a_refusal_is_not_retried_with_such_a_model(
    bench: Bench, own_gate: Sandbox, make_vluna: Any, streamed: bool
) -> None:
    """Whatever the retry policy says, and although the model itself has no advice to give."""
    poor = Bench(make_vluna(own_gate), bench.upstream, own_gate, bench.customer)
    own_gate.rate(1, principal_id=poor.customer)
    retry = agents.ModelRetrySettings(max_retries=3, policy=lambda context: True, backoff={"initial_delay": 0.01})
    agent = writer(model=VlunaModel(Own(poor.client()), poor.vluna), model_settings=agents.ModelSettings(retry=retry))

    async def work() -> None:
        await run(agent, plain(), streamed=streamed)
        with pytest.raises(GateRateLimited):
            await run(agent, plain(), streamed=streamed)

    poor.bill(work).are("acme.large")
    assert len([one for one in own_gate.requests if one.path.endswith("/gate/authorize")]) == 2


def test_a_refusal_before_a_model_of_the_applications_own(
    bench: Bench,
    own_gate: Sandbox,
    make_vluna: Any,
    streamed: bool,
) -> None:
    """It is not called."""
    poor = Bench(make_vluna(own_gate), bench.upstream, own_gate, bench.customer)
    own_gate.set_credit(poor.customer, 0)
    model = Own(poor.client())

    async def work() -> None:
        with pytest.raises(GateDenied):
            await run(writer(model=VlunaModel(model, poor.vluna)), plain(), streamed=streamed)

    poor.bill(work).are()
    assert model.asked == 0


@pytest.mark.parametrize("behaviour", ["down", "cut"])
def test_a_model_of_the_applications_own_that_fails(behaviour: str, bench: Bench) -> None:
    """Its error passes, and the lease is given back."""
    bench.upstream.behaviour = behaviour
    model = VlunaModel(Own(bench.client()), bench.vluna)

    async def work() -> None:
        with pytest.raises(openai.APIError):
            await run(writer(model=model), plain(), streamed=True)

    bench.bill(work).are(canceled=1)


@pytest.mark.parametrize("status", ["incomplete", "failed"])
def test_an_answer_of_such_a_model_that_did_not_complete(status: str, bench: Bench) -> None:
    """What the last event reports is charged."""
    bench.upstream.behaviour = status
    model = VlunaModel(Own(bench.client()), bench.vluna)

    async def work() -> None:
        with pytest.raises(agents.ModelBehaviorError):
            await run(writer(model=model), plain(), streamed=True)

    bench.bill(work).are("acme.large")


@pytest.mark.parametrize("how", ["cancel", "task", "closed", "dropped", "never"])
def test_a_stream_of_such_a_model_that_is_left(how: str, bench: Bench) -> None:
    """However: the lease is given back, and nothing is charged."""
    bench.upstream.behaviour = "hang"
    model = VlunaModel(Own(bench.client()), bench.vluna)
    settings, tracing = agents.ModelSettings(), agents.ModelTracing.DISABLED

    async def work() -> None:
        if how == "cancel":
            result = agents.Runner.run_streamed(writer(model=model), "hi", run_config=plain())
            async for event in result.stream_events():
                if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                    result.cancel()
        elif how == "task":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(run(writer(model=model), plain(), streamed=True), 0.5)
        else:
            keywords: dict[str, Any] = dict.fromkeys(("previous_response_id", "conversation_id", "prompt"))
            events = model.stream_response(None, "hi", settings, [], None, [], tracing, **keywords)
            if how != "never":
                assert (await events.__anext__()).type == "response.created"
            if how == "closed":
                await events.aclose()
            del events
            gc.collect()

    bench.bill(work).are(canceled=0 if how == "never" else 1)


def test_a_stream_of_such_a_model_whose_loop_is_gone(bench: Bench) -> None:
    """Nobody can close it any more: that it was forgotten is noticed all the same."""
    bench.upstream.behaviour = "hang"
    keywords: dict[str, Any] = dict.fromkeys(("previous_response_id", "conversation_id", "prompt"))
    tracing = agents.ModelTracing.DISABLED
    http = httpx2.AsyncClient()
    model = VlunaModel(Own(bench.client(http_client=http)), bench.vluna)
    bench.clients.clear()
    with call_context(principal_id=bench.customer) as scope:
        loop = asyncio.new_event_loop()
        events = model.stream_response(None, "hi", agents.ModelSettings(), [], None, [], tracing, **keywords)

        async def first(events: Any) -> str:
            return str((await events.__anext__()).type)

        assert loop.run_until_complete(first(events)) == "response.created"
        loop.run_until_complete(http.aclose())
        loop.close()
        del events
        gc.collect()
        bill = settled(bench.vluna, scope, bench.gate, bench.customer)
    bill.cancelled_once()


def test_estimates_of_what_was_left(bench: Bench, make_vluna: Any) -> None:
    """``on_abort="estimate"`` charges what was generated, and says that it guessed."""
    bench.vluna = make_vluna(on_abort="estimate")
    bench.upstream.behaviour = "hang"
    model = VlunaModel(Own(bench.client()), bench.vluna)

    async def work() -> None:
        result = agents.Runner.run_streamed(writer(model=model), "hi", run_config=plain())
        async for event in result.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                result.cancel()

    with call_context(principal_id=bench.customer) as scope:
        bench.do(work)
    bill = settled(bench.vluna, scope, bench.gate, bench.customer)
    assert 0 < bill.booked_an_estimate().quantity < 100


def test_an_answer_without_usage_is_estimated(bench: Bench, streamed: bool) -> None:
    """The SDK fills in zeros; no answer costs nothing."""
    script = ScriptedModel([ModelStep([assistant_message("a word or two, that nobody counted")], usage=agents.Usage())])
    model = VlunaModel(script, bench.vluna)
    with call_context(principal_id=bench.customer) as scope:
        bench.do(lambda: run(writer(model=model), plain(), streamed=streamed))
    bill = settled(bench.vluna, scope, bench.gate, bench.customer)
    assert bill.booked_an_estimate().quantity > 8


def test_the_sdks_own_test_double(bench: Bench, streamed: bool) -> None:
    """Two turns, each by what the double says it used."""
    usage = agents.Usage(requests=1, input_tokens=100, output_tokens=20, total_tokens=120)
    script = ScriptedModel(
        [
            ModelStep([function_call("look_up", {}, call_id="call_1")], usage=usage),
            ModelStep([assistant_message("done")], usage=usage),
        ]
    )
    model = VlunaModel(script, bench.vluna)
    bench.bill(lambda: run(writer(model=model), plain(), streamed=streamed)).are(*["openai.scriptedmodel"] * 2)


def test_waiting_for_the_receipt(bench: Bench, make_vluna: Any, streamed: bool) -> None:
    """``settle="inline"``: it is there when the run has ended."""
    bench.vluna = make_vluna(settle="inline")
    for model in (Own(bench.client()), agents.OpenAIResponsesModel("gpt-4o", bench.client())):
        with call_context(principal_id=bench.customer) as scope:

            async def work(model: Any = model, scope: Any = scope) -> None:
                await run(writer(model=VlunaModel(model, bench.vluna)), plain(), streamed=streamed)
                assert [receipt.state for receipt in scope.receipts] == ["booked"]

            asyncio.run(work())


# -- Responses over a WebSocket ----------------------------------------------------------------------------------------


@asynccontextmanager
async def socket(bench: Bench) -> AsyncIterator[Any]:
    """The SDK's provider over a WebSocket to a server of ours, which sends what the provider says over HTTP."""
    bodies: list[dict[str, Any]] = []

    async def serve(connection: Any) -> None:
        async for message in connection:
            body = {**json.loads(message), "stream": True}
            body.pop("type", None)
            bodies.append(body)
            async with httpx.AsyncClient() as http:
                answer = await http.post(f"{bench.upstream.base_url}/responses", json=body)
            for line in answer.text.splitlines():
                if line.startswith("data: "):
                    await connection.send(line.removeprefix("data: "))

    async with websockets.serve(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = openai.AsyncOpenAI(
            base_url=bench.upstream.base_url, websocket_base_url=f"ws://127.0.0.1:{port}", api_key="sk"
        )
        inner = agents.OpenAIProvider(openai_client=client, use_responses=True, use_responses_websocket=True)
        yield inner
        await inner.aclose()
        await client.close()
    assert bodies


def test_responses_over_a_websocket(bench: Bench, streamed: bool) -> None:
    """No client sees these: the calls are settled by the usage of their last event, and the connection is kept."""
    bench.upstream.says(call("look_up"))

    async def work() -> None:
        async with socket(bench) as inner:
            provider = VlunaModelProvider(bench.vluna, inner)
            config = agents.RunConfig(model_provider=provider, tracing_disabled=True)
            await run(writer(), config, streamed=streamed)
            assert provider.get_model("gpt-4o")._vluna_inner is inner.get_model("gpt-4o")

    bench.bill(work).are(BIG, BIG)


def test_a_response_over_a_websocket_that_did_not_complete(bench: Bench) -> None:
    """What its last event reports is charged."""
    bench.upstream.behaviour = "incomplete"

    async def work() -> None:
        async with socket(bench) as inner:
            with pytest.raises(agents.ModelBehaviorError):
                await run(writer(), bench.config(inner), streamed=True)

    bench.bill(work).are(BIG)


# -- LiteLLM -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def litellm_agent(bench: Bench) -> Any:
    pytest.importorskip("litellm", reason="LiteLLM is not installed: pip install litellm")
    from agents.extensions.models.litellm_model import LitellmModel

    return writer(model=LitellmModel("openai/gpt-4o", base_url=bench.upstream.base_url, api_key="sk"))


@pytest.mark.parametrize("callback", [False, True], ids=["alone", "with the callback"])
def test_litellms_model_settles_once(callback: bool, bench: Bench, litellm_agent: Any, streamed: bool) -> None:
    """Named as LiteLLM's own integration names it, which takes the lease over where it is at work, too."""
    import litellm

    from vluna_llm.integrations.litellm import VlunaCallback
    from vluna_llm.integrations.litellm import uninstall as leave_litellm

    model = VlunaModel(litellm_agent.model, bench.vluna)
    bench.upstream.script = lambda body: TEXT if has_results(body) else call("look_up")
    before = list(litellm.callbacks)
    try:
        if callback:
            litellm.callbacks = [VlunaCallback(bench.vluna)]
        bench.bill(lambda: run(writer(model=model), plain(), streamed=streamed)).are(BIG, BIG)
    finally:
        litellm.callbacks = before
        leave_litellm()


def test_an_upstream_that_refuses_to_be_asked(bench: Bench, litellm_agent: Any) -> None:
    """The call is made once more without the option, and its usage is estimated; the next one does not ask."""
    bench.upstream.behaviour = "refuses_option"
    model = VlunaModel(litellm_agent.model, bench.vluna)
    with call_context(principal_id=bench.customer) as scope:
        bench.do(lambda: run(writer(model=model), plain(), streamed=True))
        bench.do(lambda: run(writer(model=model), plain(), streamed=True))
    settled(bench.vluna, scope, bench.gate, bench.customer)
    assert ["stream_options" in seen.body for seen in bench.upstream.posts()] == [True, False, False]
    assert [receipt.usage_source for receipt in scope.receipts] == ["estimated"] * 2


def test_litellms_names(bench: Bench) -> None:
    """Through the SDK's own prefix, by the default provider; a refusal is ours."""
    pytest.importorskip("litellm", reason="LiteLLM is not installed: pip install litellm")
    model = VlunaModelProvider(bench.vluna).get_model("litellm/anthropic/claude-sonnet-5")
    assert model.model == "anthropic/claude-sonnet-5"
    from vluna_llm.integrations._agents_call import named

    assert named(model) == ("anthropic", "claude-sonnet-5")

    async def work() -> None:
        with pytest.raises(MissingPrincipal):
            await run(writer(model=model), plain())

    bench.do(work)


# -- for the whole process ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    yield
    uninstall()
    _openai_shared.set_default_openai_client(None)
    _openai_shared.set_use_responses_by_default(True)


def test_the_default_client(both: Bench, streamed: bool) -> None:
    """`install` meters it, and `uninstall` gives back the one that was there."""
    mine = both.client()
    agents.set_default_openai_client(mine, use_for_tracing=False)
    agents.set_default_openai_api("responses" if both.responses else "chat_completions")
    both.upstream.says(call("look_up"))
    install(both.vluna)
    install(both.vluna)
    both.bill(lambda: run(writer(), plain(), streamed=streamed)).are(BIG, BIG)
    uninstall()
    assert _openai_shared.get_default_openai_client() is mine
    uninstall()
    assert _openai_shared.get_default_openai_client() is mine


def test_the_default_transport_that_no_client_sees(bench: Bench, make_vluna: Any) -> None:
    """`install` cannot meter Responses over a WebSocket, and says so, or refuses to be installed."""
    agents.set_default_openai_client(bench.client(), use_for_tracing=False)
    agents.set_default_openai_responses_transport("websocket")
    try:
        with pytest.raises(ConfigurationError, match="WebSocket"):
            install(make_vluna(on_unmetered="deny"))
        assert openai_agents._installed is None
        install(bench.vluna)
    finally:
        agents.set_default_openai_responses_transport("http")


def test_no_default_client(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is made as the SDK would make it; a client that somebody sets afterwards is left alone."""
    monkeypatch.setenv("OPENAI_BASE_URL", bench.upstream.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    install(bench.vluna)
    made = _openai_shared.get_default_openai_client()
    assert str(made.base_url).rstrip("/") == bench.upstream.base_url
    uninstall()
    assert _openai_shared.get_default_openai_client() is None
    install(bench.vluna)
    other = bench.client()
    agents.set_default_openai_client(other, use_for_tracing=False)
    uninstall()
    assert _openai_shared.get_default_openai_client() is other
    monkeypatch.delenv("OPENAI_API_KEY")
    _openai_shared.set_default_openai_client(None)
    with pytest.raises(openai.OpenAIError):
        install(bench.vluna)
    assert openai_agents._installed is None


def test_everything_from_the_environment(bench: Bench, monkeypatch: pytest.MonkeyPatch, streamed: bool) -> None:
    """No argument at all: `Vluna.default()` and the SDK's own provider, looked up at the first call."""
    for name, value in {**bench.gate.env(), "VLUNA_LLM_OUTBOX": "memory"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("vluna_llm.vluna._default", None)
    agents.set_default_openai_client(bench.client(), use_for_tracing=False)
    config = agents.RunConfig(model_provider=VlunaModelProvider(), tracing_disabled=True)
    bench.vluna = Vluna.default()

    async def work() -> None:
        await run(writer(), config, streamed=streamed)
        await run(writer(model=VlunaModel(config.model_provider.get_model("gpt-4o"))), plain(), streamed=streamed)

    bench.bill(work).are(BIG, BIG)
    Vluna.default().close()


def test_making_a_provider_needs_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the gate's nor the provider's: both are looked up when they are needed."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    provider = VlunaModelProvider()
    assert provider.openai_provider is not None
    with pytest.raises(openai.OpenAIError):
        provider.get_model("gpt-4o")


def test_the_example(tmp_path: Path) -> None:
    """``examples/openai_agents.py`` runs as it stands: turns, a sold tool, a handoff, and a customer without credit."""
    program = Path(__file__).resolve().parents[2] / "examples" / "openai_agents.py"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLUNA_", "OPENAI_"))}
    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    said, refused, *booked = done.stdout.splitlines()
    assert said.startswith("[clerk] looks the orders up ... [writer] Your lantern")
    assert refused == "[clerk] refused for Bob: insufficient_credit; no model was called"
    rows = [line.split() for line in booked[:-2]]
    features = ["openai.gpt-4o-mini", "tools.order_search", "openai.gpt-4o-mini", "openai.gpt-4o"]
    assert sorted(row[0] for row in rows) == sorted(features)
    assert booked[-2:] == [f"Ada pays {sum(int(row[2]) for row in rows)} XUSD", "Bob pays 0 XUSD"]


def test_the_readmes_snippet(bench: Bench, tmp_path: Path) -> None:
    """It runs as pasted, and charges the customer whom it names."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    part = readme.partition("## OpenAI Agents SDK\n")[2].partition("```python\n")[2].partition("```")[0]
    with Sandbox() as gate:
        told = {
            **gate.env(),
            "OPENAI_BASE_URL": bench.upstream.base_url,
            "OPENAI_API_KEY": "none",
            "OPENAI_AGENTS_DISABLE_TRACING": "1",
            "XDG_STATE_HOME": str(tmp_path),
        }
        done = subprocess.run(
            [sys.executable, "-c", part], env={**os.environ, **told}, capture_output=True, text=True, timeout=100
        )
        assert (done.returncode, done.stdout) == (0, "hello world\n"), done.stderr
        assert [entry.feature for entry in gate.booked("customer_123").entries] == ["openai.gpt-4o-mini"]


def test_the_extra_is_named(tmp_path: Path) -> None:
    """Without the SDK the import says what to install."""
    (tmp_path / "agents.py").write_text("raise ImportError('no agents here')")
    program = "import sys; sys.path.insert(0, '.'); import vluna_llm.integrations.openai_agents"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pip install 'vluna-llm[agents]'" in done.stderr
