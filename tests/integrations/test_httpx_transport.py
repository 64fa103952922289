"""Model calls over bare HTTP, on httpx and httpx2: the same bytes as without us, one charge, refusals as answers."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import Bill, MakeVluna, ask, each, entered, settled
from upstream import Recorded, Upstream

from vluna_llm import Vluna, call_context
from vluna_llm.errors import BudgetExceeded, ConfigurationError, GateRateLimited, MissingPrincipal
from vluna_llm.integrations.httpx import AsyncMeteringTransport, MeteringTransport
from vluna_llm.sandbox import Sandbox

HI = [{"role": "user", "content": "hi"}]
CHAT = {"model": "gpt-4o", "messages": HI}
CLAUDE = {"model": "claude-sonnet-5", "max_tokens": 100, "messages": HI}
VERSION = {"anthropic-version": "2023-06-01"}


@dataclass
class Http:
    """One of the two libraries, in one of the two colours."""

    module: Any
    is_async: bool
    provider: Upstream

    def transport(self, vluna: Vluna | None, **who: Any) -> Any:
        """A real one, metered where a ``vluna`` is given."""
        inner = (self.module.AsyncHTTPTransport if self.is_async else self.module.HTTPTransport)()
        if vluna is None:
            return inner
        return (AsyncMeteringTransport if self.is_async else MeteringTransport)(inner, vluna, **who)

    def client(self, vluna: Vluna | None, **who: Any) -> Any:
        """A client of this library."""
        kind = self.module.AsyncClient if self.is_async else self.module.Client
        return kind(base_url=self.provider.host, transport=self.transport(vluna, **who), timeout=5)

    def run(self, program: Callable[[Any], Any], client: Any) -> Any:
        """Run the program in a loop of its own, and close the client."""

        async def main() -> Any:
            try:
                return await program(client)
            finally:
                await ask(client.aclose() if self.is_async else client.close())

        return asyncio.run(main())


@pytest.fixture(params=["httpx", "httpx2"])
def module(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


@pytest.fixture(params=["sync", "async"])
def http(request: pytest.FixtureRequest, module: Any, provider: Upstream) -> Http:
    return Http(module, request.param == "async", provider)


@pytest.fixture
def gate() -> Iterator[Sandbox]:
    with Sandbox() as gate:
        yield gate


def post(path: str, body: Any, **more: Any) -> Callable[[Any], Any]:
    """A request that is answered at once."""

    async def program(client: Any) -> Any:
        response = await ask(client.post(path, json=body, **more))
        return response.status_code, response.content

    return program


def lines(path: str, body: Any, **more: Any) -> Callable[[Any], Any]:
    """A request whose answer is read as it comes."""

    async def program(client: Any) -> Any:
        async with entered(client.stream("POST", path, json=body, **more)) as response:
            iterate = response.aiter_bytes if hasattr(client, "aclose") else response.iter_bytes
            return response.status_code, b"".join([piece async for piece in each(iterate())])

    return program


ASKED = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
PROGRAMS = {
    "chat": (post("/v1/chat/completions", CHAT), "openai.gpt-4o", 120),
    "chat-stream": (lines("/v1/chat/completions", {**CHAT, "stream": True}), "openai.gpt-4o", 120),
    "chat-stream-asked": (lines("/v1/chat/completions", ASKED), "openai.gpt-4o", 120),
    "responses": (post("/v1/responses", {"model": "gpt-4o", "input": "hi"}), "openai.gpt-4o", 120),
    "responses-stream": (
        lines("/v1/responses", {"model": "gpt-4o", "input": "hi", "stream": True}),
        "openai.gpt-4o",
        120,
    ),
    "embeddings": (post("/v1/embeddings", {"model": "text-3", "input": "hi"}), "openai.text-3", 8),
    "azure": (
        post("/openai/deployments/mine/chat/completions?api-version=1", {"messages": HI}),
        "openai.mine",
        120,
    ),
    "messages": (post("/anthropic/v1/messages", CLAUDE, headers=VERSION), "anthropic.claude-sonnet-5", 120),
    "messages-stream": (
        lines("/anthropic/v1/messages", {**CLAUDE, "stream": True}, headers=VERSION),
        "anthropic.claude-sonnet-5",
        120,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_the_same_bytes_and_one_charge(
    name: str, encoding: str, http: Http, vluna: Vluna, provider: Upstream, billed: Any
) -> None:
    """Where usage was asked for on the caller's behalf the chunk that this adds is not handed on; the others then say
    that they have none, as they say it to whoever asks."""
    program, feature, quantity = PROGRAMS[name]
    provider.encoding = encoding
    status, content = http.run(program, http.client(None))
    provider.responses.clear()
    answers: list[Any] = []
    bill: Bill = billed(vluna, lambda: answers.append(http.run(program, http.client(vluna))))
    if name == "chat-stream":
        answers = [(code, got.replace(b',"usage":null', b"")) for code, got in answers]
    assert answers == [(200, content)]
    assert status == 200
    assert bill.booked_once(quantity).feature_code == feature


def test_a_file_is_sent_as_it_is_and_its_model_is_found(http: Http, vluna: Vluna, billed: Any) -> None:
    """A transcription is a form."""

    async def program(client: Any) -> Any:
        files = {"file": ("a.wav", b"RIFF0000WAVE")}
        return (await ask(client.post("/v1/audio/transcriptions", data={"model": "whisper-2"}, files=files))).json()

    bill: Bill = billed(vluna, lambda: http.run(program, http.client(vluna)))
    assert bill.booked_once(59).feature_code == "openai.whisper-2"


NATIVE = {
    "google": (
        "/v1beta/models/gemini-2.5-flash:generateContent",
        {"contents": []},
        {
            "candidates": [{"finishReason": "STOP"}],
            "usageMetadata": {"promptTokenCount": 70, "candidatesTokenCount": 9},
        },
        ("google.gemini-2.5-flash", 79),
    ),
    "cohere": (
        "/v2/chat",
        {"model": "command-r", "messages": HI},
        {"id": "c", "finish_reason": "COMPLETE", "usage": {"tokens": {"input_tokens": 5, "output_tokens": 6}}},
        ("cohere.command-r", 11),
    ),
    "ollama": (
        "/api/chat",
        {"model": "llama3", "messages": HI},
        {"model": "llama3", "done": True, "prompt_eval_count": 7, "eval_count": 8},
        ("ollama.llama3", 15),
    ),
}


@pytest.mark.parametrize("name", NATIVE)
def test_providers_own_apis(name: str, http: Http, vluna: Vluna, provider: Upstream, billed: Any) -> None:
    """What the readers know is metered."""
    path, body, answer, (feature, quantity) = NATIVE[name]
    provider.replay(name, Recorded(200, "application/json", json.dumps(answer).encode(), False))
    bill: Bill = billed(vluna, lambda: http.run(post(f"/recorded/{name}{path}", body), http.client(vluna)))
    assert bill.booked_once(quantity).feature_code == feature


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat", "chat-stream", "messages", "messages-stream"])
def test_a_denial_is_an_answer_in_the_providers_shape(
    name: str, http: Http, gate: Sandbox, make_vluna: MakeVluna, provider: Upstream
) -> None:
    """402, and nobody is asked."""
    gate.set_credit("broke", 0)
    status, content = http.run(PROGRAMS[name][0], http.client(make_vluna(gate), principal_id="broke"))
    body = json.loads(content)
    assert status == 402
    assert body["error"]["type"] == "insufficient_credit"
    assert ("type" in body) == name.startswith("messages")
    assert provider.requests == []


def test_the_exception_is_beside_the_answer(http: Http, gate: Sandbox, make_vluna: MakeVluna) -> None:
    """For programs that want its hints."""
    gate.faults.add("rate_limited", "authorize", seconds=7, times=None)

    async def program(client: Any) -> Any:
        return await ask(client.post("/v1/chat/completions", json=CHAT))

    response = http.run(program, http.client(make_vluna(gate), principal_id="alice"))
    assert (response.status_code, response.headers["x-should-retry"]) == (429, "false")
    assert int(response.headers["retry-after"]) >= 1
    assert isinstance(response.extensions["vluna_error"], GateRateLimited)
    nobody = http.run(program, http.client(make_vluna(gate)))
    assert nobody.status_code == 403
    assert isinstance(nobody.extensions["vluna_error"], MissingPrincipal)


def test_a_task_beyond_its_limit_is_refused_as_a_budget(
    http: Http, make_vluna: MakeVluna, gate: Sandbox, provider: Upstream
) -> None:
    """402 like every want of money, not a fault of the request."""

    async def program(client: Any) -> Any:
        with call_context(max_tokens=1):
            return await ask(client.post("/v1/chat/completions", json=CHAT))

    response = http.run(program, http.client(make_vluna(gate), principal_id="alice"))
    assert (response.status_code, json.loads(response.content)["error"]["type"]) == (402, "budget")
    assert isinstance(response.extensions["vluna_error"], BudgetExceeded)
    assert provider.requests == []


@pytest.mark.parametrize(("fault", "status"), [("credit", 402), ("rate", 429)])
@pytest.mark.parametrize("sdk", ["openai", "anthropic"])
def test_an_sdk_above_does_not_try_again(
    sdk: str, fault: str, status: int, http: Http, gate: Sandbox, make_vluna: MakeVluna, provider: Upstream
) -> None:
    """Its own exception for that status, after one authorize; no broken connection."""
    library = pytest.importorskip(sdk)
    base = importlib.import_module(f"{sdk}._base_client")
    used = getattr(base, "httpx2", None) or base.httpx
    if used is not http.module:
        pytest.skip(f"this {sdk} is not made for {http.module.__name__}")
    if fault == "credit":
        gate.set_credit("alice", 0)
    else:
        gate.faults.add("rate_limited", "authorize", seconds=7, times=None)
    kind = {
        ("openai", False): "OpenAI",
        ("openai", True): "AsyncOpenAI",
        ("anthropic", False): "Anthropic",
        ("anthropic", True): "AsyncAnthropic",
    }[sdk, http.is_async]
    address = provider.base_url if sdk == "openai" else provider.anthropic_base
    client = getattr(library, kind)(
        api_key="k", base_url=address, max_retries=3, http_client=http.client(make_vluna(gate), principal_id="alice")
    )

    async def program() -> None:
        if sdk == "openai":
            await ask(client.chat.completions.create(**CHAT))
        else:
            await ask(client.messages.create(**CLAUDE))

    with pytest.raises(library.APIStatusError) as caught:
        asyncio.run(program())
    assert caught.value.status_code == status
    assert provider.requests == []
    assert len([seen for seen in gate.requests if "authorize" in seen.path]) == 1


# -- how it ends -----------------------------------------------------------------------------------------------------


async def _two_pieces(client: Any, path: str, body: Any) -> None:
    async with entered(client.stream("POST", path, json={**body, "stream": True}, headers=VERSION)) as response:
        iterate = response.aiter_bytes if hasattr(client, "aclose") else response.iter_bytes
        count = 0
        async for _ in each(iterate()):
            count += 1
            if count == 2:
                break


APIS = [("/v1/chat/completions", CHAT), ("/anthropic/v1/messages", CLAUDE)]


@pytest.mark.parametrize("on_abort", ["cancel", "estimate"])
@pytest.mark.parametrize(("path", "body"), APIS, ids=["chat", "messages"])
def test_an_answer_that_is_left(
    path: str, body: Any, on_abort: str, http: Http, make_vluna: MakeVluna, provider: Upstream, billed: Any
) -> None:
    """As ``on_abort`` says."""
    provider.behaviour = "hang"
    vluna = make_vluna(on_abort=on_abort)
    client = http.client(vluna)
    bill: Bill = billed(vluna, lambda: http.run(lambda client: _two_pieces(client, path, body), client))
    if on_abort == "estimate":
        bill.booked_an_estimate()
    else:
        bill.cancelled_once()


@pytest.mark.parametrize("behaviour", ["down", "bad", "cut", "html"])
@pytest.mark.parametrize(("path", "body"), APIS, ids=["chat", "messages"])
def test_what_fails_is_given_back(
    path: str, body: Any, behaviour: str, http: Http, vluna: Vluna, provider: Upstream, billed: Any
) -> None:
    """Errors of the provider, a cut, a page of a proxy: as without us, and nothing is charged."""
    provider.behaviour = behaviour
    program = lines(path, {**body, "stream": behaviour == "cut"})
    seen: list[Any] = []

    async def run(client: Any) -> None:
        try:
            seen.append(await program(client))
        except http.module.HTTPError as error:
            seen.append(type(error))

    http.run(run, http.client(None))
    bill: Bill = billed(vluna, lambda: http.run(run, http.client(vluna)))
    assert seen[0] == seen[1]
    bill.cancelled_once()


def test_an_upstream_without_the_option_is_asked_again(
    http: Http, vluna: Vluna, provider: Upstream, billed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``include_usage`` is ours: its refusal does not reach the caller (design rule 2), and is remembered."""
    provider.behaviour = "refuses_option"
    program = PROGRAMS["chat-stream"][0]
    bare = http.run(program, http.client(None))
    provider.requests.clear()
    answers: list[Any] = []

    async def twice(client: Any) -> None:
        answers.extend([await program(client), await program(client)])

    from vluna_llm.integrations._openai_usage_option import Refusers

    monkeypatch.setattr("vluna_llm.integrations._openai_call.REFUSERS", Refusers())
    bill: Bill = billed(vluna, lambda: http.run(twice, http.client(vluna)))
    assert answers == [bare, bare]
    assert ["stream_options" in seen.body for seen in provider.posts()] == [True, False, False]
    assert [entry.labels["usage_source"] for entry in bill.gate.booked(bill.principal_id).entries] == ["estimated"] * 2


def test_a_background_response_is_booked_when_it_is_retrieved(
    http: Http, gate: Sandbox, make_vluna: MakeVluna, provider: Upstream, customer: str
) -> None:
    """However often."""
    vluna = make_vluna(gate)

    async def program(client: Any) -> Any:
        with call_context(principal_id=customer) as scope:
            made = await ask(client.post("/v1/responses", json={"model": "gpt-4o", "input": "hi", "background": True}))
            for _ in range(2):
                await ask(client.get(f"/v1/responses/{made.json()['id']}"))
        return scope

    scope = http.run(program, http.client(vluna))
    settled(vluna, scope, gate, customer)
    assert [(one.kind, one.quantity) for one in gate.booked(customer).entries] == [("ingest", 120)]


# -- beside it -------------------------------------------------------------------------------------------------------


def test_below_a_metered_client_nothing_is_metered_again(vluna: Vluna, provider: Upstream, billed: Any) -> None:
    """Metering happens at one layer."""
    base = importlib.import_module("openai._base_client")
    http = Http(getattr(base, "httpx2", None) or base.httpx, False, provider)
    client = vluna.wrap(openai.OpenAI(api_key="k", base_url=provider.base_url, http_client=http.client(vluna)))
    bill: Bill = billed(vluna, lambda: client.chat.completions.create(**CHAT))
    bill.booked_once()


def test_other_requests_pass_unread(http: Http, make_vluna: MakeVluna, provider: Upstream, billed: Any) -> None:
    """An upload is not collected in memory, free endpoints are not asked for, and ``off`` is off."""
    vluna = make_vluna(on_unmetered="deny")
    read: list[int] = []

    def pieces() -> Iterator[bytes]:
        for number in range(3):
            read.append(number)
            yield b"x" * 10

    async def apieces() -> Any:
        for piece in pieces():
            yield piece

    async def program(client: Any) -> None:
        body = apieces() if http.is_async else pieces()
        await ask(client.post("/v1/files", content=body, headers={"content-type": "application/octet-stream"}))
        await ask(client.get("/v1/models"))
        await ask(client.post("/v1/moderations", json={"input": "hi", "model": "omni"}))

    bill: Bill = billed(vluna, lambda: http.run(program, http.client(vluna)))
    bill.nothing()
    vluna.mode = "off"
    assert http.run(PROGRAMS["chat"][0], http.client(vluna))[0] == 200


def test_what_is_not_metered_is_refused_on_request(http: Http, make_vluna: MakeVluna, provider: Upstream) -> None:
    """``on_unmetered="deny"``: an answer, too."""
    program = post("/v1/batches", {"input_file_id": "f"})
    status, content = http.run(program, http.client(make_vluna(on_unmetered="deny")))
    assert status == 400
    assert "VLUNA_LLM_ON_UNMETERED" in json.loads(content)["error"]["message"]
    assert provider.requests == []


def test_it_is_a_transport_of_the_library(http: Http, vluna: Vluna) -> None:
    """And takes nothing else."""
    transport = http.transport(vluna)
    kind = http.module.AsyncBaseTransport if http.is_async else http.module.BaseTransport
    assert isinstance(transport, kind)
    assert isinstance(transport, AsyncMeteringTransport if http.is_async else MeteringTransport)
    with pytest.raises(ConfigurationError, match="HTTPTransport"):
        MeteringTransport(object(), vluna)


def test_the_snippet_of_the_readme_runs_as_it_stands(provider: Upstream, tmp_path: Path) -> None:
    """But for the address. It needs no SDK; a customer without credit gets the refusal printed."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    (shown,) = [snippet for snippet in snippets if "MeteringTransport(" in snippet]
    blocked = "import sys; sys.modules.update(openai=None, anthropic=None)\n"
    program = blocked + shown.replace("https://api.openai.com", provider.host)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLUNA_")}
    with Sandbox() as gate:
        settings = {**kept, **gate.env(), "OPENAI_API_KEY": "k", "VLUNA_LLM_OUTBOX": str(tmp_path)}
        said = []
        for credit in (None, 0):
            if credit is not None:
                gate.set_credit("customer_123", credit)
            done = subprocess.run([sys.executable, "-c", program], env=settings, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, "")
            said.append(done.stdout)
        assert said[0] == "200 None\n"
        assert said[1].startswith("402 {")
        assert "insufficient_credit" in said[1]
        assert [entry.quantity for entry in gate.booked("customer_123").entries] == [120]
