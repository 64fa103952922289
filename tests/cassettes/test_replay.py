"""The replay upstream answers real SDK clients over real HTTP with what was recorded, and breaks when it is told to."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from vluna_llm.sandbox.recordings import Recording, Repertoire, load_recordings
from vluna_llm.sandbox.replay import ReplayUpstream, UpstreamFault

SMALL = "smollm2-135m-instruct"
WITH_USAGE: Any = {"include_usage": True}
# What the SDK raises when a stream breaks depends on its major: the transport's own error, or one of the SDK's.
BROKEN = (openai.APIConnectionError, httpx.TransportError)
try:
    import httpx2
except ImportError:
    pass
else:
    BROKEN = (*BROKEN, httpx2.TransportError)


@pytest.fixture
def upstream() -> Iterator[ReplayUpstream]:
    with ReplayUpstream() as running:
        yield running


@pytest.fixture
def client(upstream: ReplayUpstream) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=upstream.base_url, api_key="not-looked-at", max_retries=0, timeout=10) as made:
        yield made


def _recorded(name: str) -> Recording:
    return next(one for one in load_recordings() if one.name == name)


def _user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def _request(name: str) -> Any:
    return dict(_recorded(name).request or {})


def _read(stream: Any, seen: list[object]) -> None:
    """Read to the end or to the error; what came is in ``seen`` either way."""
    for chunk in stream:
        seen.append(chunk)


def test_a_plain_answer_has_the_recorded_bytes(upstream: ReplayUpstream) -> None:
    """Body, status and content type are the recording's; the answer says that it is a replay, and of what."""
    recorded = _recorded("llama-server/chat_plain#2")
    answer = httpx.post(f"{upstream.base_url}/chat/completions", json=recorded.request)
    assert answer.content == recorded.body
    assert answer.headers["content-type"] == recorded.content_type
    assert answer.headers["x-replay-recording"] == "llama-server/chat_plain#2"
    assert answer.headers["x-request-id"] == upstream.served[0].request_id


@pytest.mark.parametrize("one", [one for one in load_recordings() if one.request], ids=lambda one: one.name)
def test_every_recording_can_be_asked_for_by_name(one: Recording, bare: httpx.Client) -> None:
    """Named by the header, each recording comes back byte for byte."""
    answer = bare.request(one.method, one.path, json=one.request, headers={"x-replay-cassette": one.name})
    assert (answer.status_code, answer.content) == (one.status, one.body)


@pytest.fixture(scope="module")
def bare() -> Iterator[httpx.Client]:
    with ReplayUpstream() as running, httpx.Client(base_url=running.root_url) as made:
        yield made


def test_a_stream_arrives_event_by_event(upstream: ReplayUpstream, client: openai.OpenAI) -> None:
    """The SDK sees each recorded chunk, the last one with the usage that the index reports."""
    recorded = _recorded("llama-server/chat_stream#0")
    chunks = list(client.chat.completions.create(**_request(recorded.name)))
    assert len(chunks) == len(recorded.parts) - 1  # all but [DONE]
    assert chunks[-1].usage is not None
    assert recorded.tokens is not None
    assert chunks[-1].usage.completion_tokens == recorded.tokens.output
    [served] = upstream.served
    assert (served.tokens, served.usage_sent, served.complete) == (recorded.tokens, True, True)


def test_events_are_spread_over_time() -> None:
    """With a delay between events the first is there long before the last: it is a stream, not one body."""
    with ReplayUpstream(event_delay=0.01) as upstream:
        client = openai.OpenAI(base_url=upstream.base_url, api_key="x", max_retries=0)
        begun = time.monotonic()
        arrivals = [
            time.monotonic() - begun for _ in client.chat.completions.create(**_request("llama-server/chat_stream#1"))
        ]
        client.close()
    assert arrivals[0] < 0.3
    assert arrivals[-1] - arrivals[0] >= 0.01 * (len(arrivals) - 2)


def test_who_does_not_ask_for_usage_does_not_get_it(upstream: ReplayUpstream, client: openai.OpenAI) -> None:
    """The same answer as for a caller who asks, less the usage-only chunk."""
    asking = list(client.chat.completions.create(**_request("llama-server/chat_stream#0")))
    request = _request("llama-server/chat_stream#0")
    del request["stream_options"]
    silent = list(client.chat.completions.create(**request))
    assert silent == asking[:-1]
    assert [one.usage_sent for one in upstream.served] == [True, False]


def test_leaving_the_usage_out_is_what_the_real_server_does() -> None:
    """Recorded without include_usage, the real stream has the same shape as the replay makes of the other one."""
    real = _recorded("llama-server/chat_stream_without_usage#0")
    made = _recorded("llama-server/chat_stream#0").parts_without_usage
    assert real.question == _recorded("llama-server/chat_stream#0").question

    def shape(part: bytes) -> object:
        data = part.removeprefix(b"data: ").strip()
        return data if data == b"[DONE]" else json.loads(data)["choices"]

    assert list(map(shape, made)) == list(map(shape, real.parts))


def test_other_endpoints_are_replayed_too(upstream: ReplayUpstream, client: openai.OpenAI) -> None:
    """Responses plain and streamed, embeddings, legacy completions and the list of models parse in the SDK."""
    response = client.responses.create(model=SMALL, input="What is a lighthouse for?")
    assert response.usage is not None
    events = list(client.responses.create(model=SMALL, input="What is a lighthouse for?", stream=True))
    assert events[-1].type == "response.completed"
    embedded = client.embeddings.create(model="smollm2-135m-embed", input=["a", "b"])
    assert len(embedded.data[0].embedding) == 576
    assert client.completions.create(model=SMALL, prompt="The capital of France is").choices[0].text
    assert client.models.list().data[0].id == SMALL
    assert all(one.complete for one in upstream.served)


def test_a_conversation_finds_its_own_cached_turns(client: openai.OpenAI) -> None:
    """Replayed turn by turn, the recorded conversation shows the cached tokens that the server reported."""
    cached = []
    for turn in range(4):
        done = client.chat.completions.create(**_request(f"llama-server/chat_turns_cached#{turn}"))
        assert done.usage is not None
        assert done.usage.prompt_tokens_details is not None
        cached.append(done.usage.prompt_tokens_details.cached_tokens or 0)
    assert cached == sorted(cached)
    assert cached[-1] > 100


def test_unknown_questions_take_turns(upstream: ReplayUpstream, client: openai.OpenAI) -> None:
    """A question that nobody recorded gets the successful answers of that model one after another."""
    ids = {client.chat.completions.create(model=SMALL, messages=_user(f"new {n}")).id for n in range(5)}
    assert len(ids) == 5
    assert {one.status for one in upstream.served} == {200}


def test_a_server_that_ignores_include_usage_is_replayed_as_such(
    upstream: ReplayUpstream, client: openai.OpenAI
) -> None:
    """Asked for usage, that server's stream ends without any."""
    chunks = list(
        client.chat.completions.create(
            model="smollm2-135m-legacy", messages=_user("What?"), stream=True, stream_options=WITH_USAGE
        )
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert upstream.served[0].complete
    assert upstream.served[0].tokens is None


def test_a_streamed_tool_call_is_assembled_by_the_sdk(client: openai.OpenAI) -> None:
    """The recorded tool call is one the SDK understands, plain and streamed."""
    plain = client.chat.completions.create(**_request("llama-cpp-python-tools/tool_call#0"))
    assert plain.choices[0].message.tool_calls
    pieces = ""
    for chunk in client.chat.completions.create(**_request("llama-cpp-python-tools/tool_call#1")):
        for call in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            pieces += (call.function.arguments or "") if call.function else ""
    assert set(json.loads(pieces)) == {"city", "unit"}


def test_recorded_errors_come_back_as_the_sdk_s_exceptions(client: openai.OpenAI) -> None:
    """The same question that was refused is refused again; a name picks what no question can."""
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**_request("litellm/proxy_errors#0"))
    request = _request("llama-server/errors#1")  # refused for asking two choices
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**request)
    assert client.chat.completions.create(**{**request, "n": 1}).choices
    with pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(
            model=SMALL, messages=[], extra_headers={"x-replay-cassette": "llama-server/errors#4"}
        )


def test_what_was_never_recorded_is_said_plainly(upstream: ReplayUpstream, client: openai.OpenAI) -> None:
    """An unknown model gets a 404 of the replay's own and no other model's answer."""
    with pytest.raises(openai.NotFoundError, match=r"nothing was recorded.*recorded models are .*smollm2-135m"):
        client.chat.completions.create(model="another-model", messages=_user("hello"))
    assert upstream.served[0].recording is None
    assert upstream.served[0].tokens is None


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_stream_breaks_in_the_caller_s_hands(
    upstream: ReplayUpstream, client: openai.OpenAI, reset: bool
) -> None:
    """The events before the cut arrive, then the connection is gone: an error, never a quiet end."""
    upstream.inject(UpstreamFault(cut_after=5, reset=reset), stream=True)
    stream = client.chat.completions.create(**_request("llama-server/chat_stream_long#0"))
    seen: list[object] = []
    with pytest.raises(BROKEN):
        _read(stream, seen)
    assert len(seen) == 5
    [served] = upstream.served
    assert (served.parts_sent, served.usage_sent, served.complete) == (5, False, False)
    assert len(list(client.chat.completions.create(**_request("llama-server/chat_stream_long#0")))) > 5


def test_a_plain_answer_can_be_cut_too(upstream: ReplayUpstream, client: openai.OpenAI) -> None:
    """Before the first byte, or in the middle of the body, the caller gets a connection error."""
    for after in (0, 1):
        upstream.inject(UpstreamFault(cut_after=after))
        with pytest.raises(BROKEN):
            client.chat.completions.create(model=SMALL, messages=_user("hello"))
    assert [one.complete for one in upstream.served] == [False, False]


def test_an_error_status_can_be_asked_for(upstream: ReplayUpstream, client: openai.OpenAI) -> None:
    """By injection with its time to wait, or by the header of one request."""
    upstream.inject(UpstreamFault(status=429, retry_after=7))
    with pytest.raises(openai.RateLimitError) as limited:
        client.chat.completions.create(model=SMALL, messages=_user("hello"))
    assert limited.value.response.headers["retry-after"] == "7"
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(
            model=SMALL, messages=_user("hello"), extra_headers={"x-replay-fault": "status=500"}
        )
    with pytest.raises(openai.BadRequestError, match="unknown fault"):
        client.chat.completions.create(
            model=SMALL, messages=_user("hello"), extra_headers={"x-replay-fault": "explode=1"}
        )


def test_a_hanging_answer_ends_with_the_caller_s_patience(upstream: ReplayUpstream, client: openai.OpenAI) -> None:
    """Silence after some events is a time-out in the caller; the upstream can be stopped all the same."""
    upstream.inject(UpstreamFault(hang_after=3))
    stream = client.with_options(timeout=0.3).chat.completions.create(**_request("llama-server/chat_stream#0"))
    seen: list[object] = []
    with pytest.raises((openai.APITimeoutError, *BROKEN)):
        _read(stream, seen)
    assert len(seen) == 3
    assert upstream.served[0].parts_sent == 3


def test_stopping_does_not_wait_for_a_hanging_caller() -> None:
    """The end of the block drops hanging connections at once."""
    with ReplayUpstream() as upstream:
        upstream.inject(UpstreamFault(hang_after=0))
        with httpx.Client(timeout=0.2) as client, pytest.raises(httpx.ReadTimeout):
            client.get(f"{upstream.base_url}/models")
        upstream.inject(UpstreamFault(delay=60))
        with httpx.Client(timeout=0.2) as client, pytest.raises(httpx.ReadTimeout):
            client.get(f"{upstream.base_url}/models")
        begun = time.monotonic()
    assert time.monotonic() - begun < 1


def test_a_delay_before_the_first_byte(upstream: ReplayUpstream, client: openai.OpenAI) -> None:
    """The answer comes later, and whole."""
    upstream.inject(UpstreamFault(delay=0.2))
    begun = time.monotonic()
    assert client.chat.completions.create(model=SMALL, messages=_user("hello")).usage is not None
    assert time.monotonic() - begun >= 0.2


def test_a_compressed_stream_reads_the_same(upstream: ReplayUpstream, client: openai.OpenAI) -> None:
    """With gzip the events are the same to the SDK, and really compressed on the wire."""
    name = "llama-server/chat_stream#3"
    plain = list(client.chat.completions.create(**_request(name)))
    squeezed = list(client.chat.completions.create(**_request(name), extra_headers={"x-replay-fault": "gzip"}))
    assert squeezed == plain
    with httpx.stream(
        "POST", f"{upstream.base_url}/chat/completions", json=_request(name), headers={"x-replay-fault": "gzip"}
    ) as answer:
        assert answer.headers["content-encoding"] == "gzip"
        assert b"".join(answer.iter_raw())[:2] == b"\x1f\x8b"


def test_fifty_at_once_are_all_answered_and_logged(upstream: ReplayUpstream) -> None:
    """Fifty concurrent async streams end complete, each with its own entry, and the sums agree."""

    async def one(client: openai.AsyncOpenAI, number: int) -> int:
        stream = await client.chat.completions.create(
            model=SMALL, messages=_user(f"burst {number}"), stream=True, stream_options=WITH_USAGE
        )
        last = [chunk async for chunk in stream][-1]
        assert last.usage is not None
        return last.usage.total_tokens

    async def burst() -> list[int]:
        async with openai.AsyncOpenAI(base_url=upstream.base_url, api_key="x", max_retries=0, timeout=30) as client:
            return await asyncio.gather(*(one(client, number) for number in range(50)))

    totals = asyncio.run(burst())
    served = upstream.served
    assert len({entry.request_id for entry in served}) == 50
    assert all(entry.complete and entry.usage_sent for entry in served)
    assert sum(totals) == sum(entry.tokens.input + entry.tokens.output for entry in served if entry.tokens)


def test_an_abandoned_stream_is_logged_as_such() -> None:
    """A caller who leaves early is not waited for, and the log says how far the answer got."""
    with ReplayUpstream(event_delay=0.01) as upstream:
        with openai.OpenAI(base_url=upstream.base_url, api_key="x", max_retries=0) as client:
            stream = client.chat.completions.create(**_request("llama-server/chat_stream_long#0"))
            next(iter(stream))
            stream.close()
        time.sleep(0.2)
        [served] = upstream.served
        before = served.parts_sent
        time.sleep(0.1)
        assert upstream.served[0].parts_sent == before < served.parts_total
        assert not served.usage_sent


def test_azure_paths_find_the_deployment_s_model() -> None:
    """A deployment in the path is the model."""
    choice = Repertoire(load_recordings()).choose(
        "POST", f"/openai/deployments/{SMALL}/chat/completions", {"messages": _user("hello")}
    )
    assert choice is not None
    assert choice.recording.model == SMALL


def test_the_log_holds_no_prompt_and_no_key(upstream: ReplayUpstream, client: openai.OpenAI) -> None:
    """Neither what was asked nor who asked can be read from an entry or from a recording's repr."""
    client.chat.completions.create(model=SMALL, messages=_user("my secret question"))
    assert "secret" not in repr(upstream.served)
    assert "not-looked-at" not in repr(upstream.served)
    assert "lighthouse" not in repr(upstream.recordings[0])


@pytest.mark.parametrize("bad", [{"cut_after": 1, "hang_after": 1}, {"delay": -1.0}, {"cut_after": -1}])
def test_a_senseless_fault_is_refused(bad: Any) -> None:
    """A fault that contradicts itself never reaches the upstream."""
    with pytest.raises(ValueError, match=r"give cut_after or hang_after|must not be negative"):
        UpstreamFault(**bad)
