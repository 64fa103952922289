"""Streams of other shapes: Anthropic, Gemini (asked at the first read), Bedrock (binary), custom ones, made-up ones."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import litellm
import pytest
from books import MESSAGES, Books
from litellm.types.utils import GenericStreamingChunk
from streaming import Api, Reader, never, run, settled, settled_without_collecting, two, whole
from upstream import Recorded, Upstream

from vluna_llm import Vluna, call_context

COLOURS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
CLAUDE = "claude-sonnet-4-5"
FEATURE = f"anthropic.{CLAUDE}"
ANTHROPIC = Api("completion", {"model": f"anthropic/{CLAUDE}", "messages": MESSAGES, "max_tokens": 100})


@pytest.fixture(scope="module")
def running() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.fixture
def upstream(running: Upstream) -> Upstream:
    running.behaviour = "ok"
    running.pause = 0.02
    running.requests.clear()
    running.released.set()
    running.released.clear()
    return running


# -- Anthropic through chat completions --------------------------------------------------------------------------------


@COLOURS
@pytest.mark.parametrize("behaviour", ["ok", "slow", "old_delta", "thinking"])
def test_anthropics_two_halves_of_usage_are_put_together(
    behaviour: str, is_async: bool, metered: Vluna, upstream: Upstream, books: Books
) -> None:
    """The input of ``message_start`` with the output of ``message_delta``, cached and cache-written tokens inside."""
    upstream.behaviour = behaviour
    settled(
        metered, books, lambda: run(ANTHROPIC, whole, upstream, is_async=is_async, api_base=upstream.anthropic_base)
    )
    books.once(FEATURE)


@COLOURS
@pytest.mark.parametrize("reading", [never, two])
def test_what_message_start_says_is_not_charged(
    reading: Any, is_async: bool, metered: Vluna, upstream: Upstream, books: Books
) -> None:
    """A stream of Anthropic's begins with a usage that is neither final nor cumulative."""
    upstream.behaviour = "slow"
    settled(
        metered, books, lambda: run(ANTHROPIC, reading, upstream, is_async=is_async, api_base=upstream.anthropic_base)
    )
    books.cancelled(FEATURE)


def test_aclose_of_an_anthropic_stream_settles_at_once(metered: Vluna, upstream: Upstream, books: Books) -> None:
    """Also on the line of LiteLLM whose iterator for Anthropic has no way to close."""
    upstream.behaviour = "slow"

    async def close(reader: Reader) -> None:
        await two(reader)
        await reader.stream.aclose()

    base = upstream.anthropic_base
    settled_without_collecting(metered, books, lambda: run(ANTHROPIC, close, upstream, is_async=True, api_base=base))
    books.cancelled(FEATURE)


def test_aclose_of_an_anthropic_stream_drains_it(
    make_vluna: Any, make_callback: Any, upstream: Upstream, books: Books
) -> None:
    """``on_abort="drain"``, also on the line of LiteLLM whose iterator for Anthropic has no way to close."""
    vluna = make_vluna(on_abort="drain")
    make_callback(vluna)
    upstream.behaviour = "slow"
    upstream.pause = 0.01

    async def leave(reader: Reader) -> None:
        await two(reader)
        await reader.stream.aclose()
        await asyncio.sleep(1)

    base = upstream.anthropic_base
    settled_without_collecting(vluna, books, lambda: run(ANTHROPIC, leave, upstream, is_async=True, api_base=base))
    books.once(FEATURE)


@COLOURS
@pytest.mark.parametrize("behaviour", ["cut", "ends_early", "error_event"])
def test_a_truncated_anthropic_stream_costs_nothing(
    behaviour: str, is_async: bool, metered: Vluna, upstream: Upstream, books: Books
) -> None:
    """Whatever LiteLLM makes of it."""
    upstream.behaviour = behaviour

    def work() -> None:
        with suppress(Exception):
            run(ANTHROPIC, whole, upstream, is_async=is_async, api_base=upstream.anthropic_base)

    settled(metered, books, work)
    books.cancelled(FEATURE)


# -- Anthropic's own API -----------------------------------------------------------------------------------------------


def messages(upstream: Upstream, reading: Any, **more: Any) -> Any:
    """``litellm.anthropic.messages.acreate``, read in this way."""

    async def main() -> Any:
        stream = await litellm.anthropic.messages.acreate(
            **{
                "model": f"anthropic/{CLAUDE}",
                "messages": MESSAGES,
                "max_tokens": 100,
                "stream": True,
                "api_base": upstream.anthropic_base,
                "api_key": "sk-test",
                **more,
            }
        )
        reader = Reader(stream, True)
        del stream
        return await reading(reader)

    return asyncio.run(main())


def test_messages_are_charged_by_the_providers_numbers(metered: Vluna, upstream: Upstream, books: Books) -> None:
    """Bytes of Anthropic's event stream pass unchanged."""
    bare: list[Any] = []
    got: list[Any] = []
    settled(metered, books, lambda: got.extend(messages(upstream, whole)))
    bare.extend(got)
    assert b"message_stop" in b"".join(bare)
    books.once(FEATURE)


@pytest.mark.parametrize("reading", [never, two])
def test_messages_that_are_left_cost_nothing(reading: Any, metered: Vluna, upstream: Upstream, books: Books) -> None:
    """Never read, or dropped in the middle."""
    upstream.behaviour = "slow"
    settled(metered, books, lambda: messages(upstream, reading))
    books.cancelled(FEATURE)


@pytest.mark.parametrize("behaviour", ["cut", "ends_early", "error_event"])
def test_truncated_messages_cost_nothing(behaviour: str, metered: Vluna, upstream: Upstream, books: Books) -> None:
    """A cut, an early end, an error in the stream."""
    upstream.behaviour = behaviour

    def work() -> None:
        with suppress(Exception):
            messages(upstream, whole)

    settled(metered, books, work)
    books.cancelled(FEATURE)


@pytest.mark.parametrize(
    ("behaviour", "reading", "charged"), [("ok", whole, True), ("slow", never, False), ("slow", two, False)]
)
def test_messages_of_an_openai_model(
    behaviour: str, reading: Any, charged: bool, metered: Vluna, upstream: Upstream, books: Books
) -> None:
    """LiteLLM translates in both directions; the inner call is the one that is watched."""
    upstream.behaviour = behaviour
    settled(metered, books, lambda: messages(upstream, reading, model="openai/gpt-4o", api_base=upstream.base_url))
    if charged:
        books.once()
    else:
        books.cancelled()


# -- Responses API over a provider that has none -----------------------------------------------------------------------


@COLOURS
@pytest.mark.parametrize(("behaviour", "reading", "charged"), [("ok", whole, True), ("slow", two, False)])
def test_responses_bridged_to_chat(
    behaviour: str, reading: Any, charged: bool, is_async: bool, metered: Vluna, upstream: Upstream, books: Books
) -> None:
    """The stream below the bridge is the one that counts."""
    upstream.behaviour = behaviour
    api = Api("responses", {"model": f"anthropic/{CLAUDE}", "input": "hi"})
    settled(metered, books, lambda: run(api, reading, upstream, is_async=is_async, api_base=upstream.anthropic_base))
    if charged:
        books.once(FEATURE)
    else:
        books.cancelled(FEATURE)


# -- Gemini: the request is sent at the first read ---------------------------------------------------------------------


def gemini(*, finish: bool = True) -> bytes:
    """A stream as Google sends it: usage on every chunk, no end of its own."""
    events = []
    for index in range(4):
        candidate: dict[str, Any] = {"content": {"parts": [{"text": f"word{index} "}], "role": "model"}, "index": 0}
        usage = {"promptTokenCount": 100, "candidatesTokenCount": 5 * (index + 1)}
        usage["totalTokenCount"] = usage["promptTokenCount"] + usage["candidatesTokenCount"]
        if index == 3 and finish:
            candidate["finishReason"] = "STOP"
        events.append({"candidates": [candidate], "usageMetadata": usage, "responseId": "r", "modelVersion": "g"})
    return b"".join(b"data: " + json.dumps(event).encode() + b"\r\n\r\n" for event in events)


GEMINI = Api("completion", {"model": "gemini/gemini-2.0-flash", "messages": MESSAGES})


@COLOURS
def test_gemini_is_charged_by_its_last_usage(is_async: bool, metered: Vluna, upstream: Upstream, books: Books) -> None:
    """LiteLLM asks Google only when the stream is read."""
    base = upstream.replay("gemini", Recorded(200, "text/event-stream", gemini(), True))
    settled(metered, books, lambda: run(GEMINI, whole, upstream, is_async=is_async, api_base=base))
    books.once("google.gemini-2.0-flash")


@COLOURS
def test_gemini_that_is_never_read_was_never_asked(
    is_async: bool, make_vluna: Any, make_callback: Any, upstream: Upstream, books: Books
) -> None:
    """There is nothing to pay for, not even an estimate."""
    vluna = make_vluna(on_abort="estimate")
    make_callback(vluna)
    base = upstream.replay("gemini", Recorded(200, "text/event-stream", gemini(), True))
    settled(vluna, books, lambda: run(GEMINI, never, upstream, is_async=is_async, api_base=base))
    assert upstream.requests == []
    books.cancelled("google.gemini-2.0-flash")


@COLOURS
def test_gemini_that_fails_at_its_first_read_costs_nothing(
    is_async: bool, metered: Vluna, upstream: Upstream, books: Books
) -> None:
    """The error is the consumer's, as ever."""
    answer = json.dumps({"error": {"code": 400, "message": "no", "status": "INVALID_ARGUMENT"}}).encode()
    base = upstream.replay("gemini", Recorded(400, "application/json", answer, False))

    def work() -> None:
        with pytest.raises(litellm.BadRequestError):
            run(GEMINI, whole, upstream, is_async=is_async, api_base=base)

    settled(metered, books, work)
    books.cancelled("google.gemini-2.0-flash")


# -- Bedrock: binary events --------------------------------------------------------------------------------------------


def aws(kind: str, payload: dict[str, Any]) -> bytes:
    """One message in AWS's event stream encoding."""
    headers = b""
    for name, value in ((":event-type", kind), (":content-type", "application/json"), (":message-type", "event")):
        headers += bytes([len(name)]) + name.encode() + b"\x07" + len(value).to_bytes(2, "big") + value.encode()
    body = json.dumps(payload).encode()
    prelude = (16 + len(headers) + len(body)).to_bytes(4, "big") + len(headers).to_bytes(4, "big")
    message = prelude + binascii.crc32(prelude).to_bytes(4, "big") + headers + body
    return message + binascii.crc32(message).to_bytes(4, "big")


def converse(*, whole_answer: bool = True) -> bytes:
    """``ConverseStream``."""
    out = aws("messageStart", {"role": "assistant"})
    for index in range(4):
        out += aws("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": f"word{index} "}})
    if not whole_answer:
        return out
    out += aws("contentBlockStop", {"contentBlockIndex": 0}) + aws("messageStop", {"stopReason": "end_turn"})
    usage = {"inputTokens": 36, "outputTokens": 20, "totalTokens": 120}
    usage |= {"cacheReadInputTokens": 40, "cacheWriteInputTokens": 24}
    return out + aws("metadata", {"usage": usage, "metrics": {"latencyMs": 1}})


def invoke() -> bytes:
    """``InvokeModelWithResponseStream`` of an Anthropic model: Anthropic's events, wrapped."""
    usage = {"input_tokens": 36, "cache_read_input_tokens": 40, "cache_creation_input_tokens": 24, "output_tokens": 1}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": CLAUDE, "content": [], "usage": usage}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 20}},
        {"type": "message_stop"},
    ]
    return b"".join(aws("chunk", {"bytes": base64.b64encode(json.dumps(event).encode()).decode()}) for event in events)


BEDROCK = f"anthropic.{CLAUDE}-v1:0"
KEYS = {"aws_access_key_id": "AKIA", "aws_secret_access_key": "s", "aws_region_name": "us-east-1", "api_key": None}


@COLOURS
@pytest.mark.parametrize(
    ("route", "body"), [("converse", converse()), ("invoke", invoke())], ids=["converse", "invoke"]
)
def test_bedrock_is_charged_by_its_numbers(
    route: str, body: bytes, is_async: bool, metered: Vluna, upstream: Upstream, books: Books
) -> None:
    """Cached tokens stand beside the input there, and belong to it."""
    pytest.importorskip("botocore", reason="LiteLLM signs requests to Bedrock with botocore")
    body = converse() if route == "converse" else invoke()
    base = upstream.replay("bedrock", Recorded(200, "application/vnd.amazon.eventstream", body, True))
    api = Api("completion", {"model": f"bedrock/{route}/{BEDROCK}", "messages": MESSAGES, **KEYS})
    given = {**KEYS, "api_base": base, "aws_bedrock_runtime_endpoint": base}
    settled(metered, books, lambda: run(api, whole, upstream, is_async=is_async, **given))
    ((feature, tokens),) = books.charged
    assert tokens == 120
    books.once(feature)


@COLOURS
def test_a_truncated_bedrock_stream_costs_nothing(
    is_async: bool, metered: Vluna, upstream: Upstream, books: Books
) -> None:
    """The bytes end before the usage."""
    pytest.importorskip("botocore", reason="LiteLLM signs requests to Bedrock with botocore")
    body = converse(whole_answer=False)
    base = upstream.replay("bedrock", Recorded(200, "application/vnd.amazon.eventstream", body, True))
    api = Api("completion", {"model": f"bedrock/converse/{BEDROCK}", "messages": MESSAGES, **KEYS})
    given = {**KEYS, "api_base": base, "aws_bedrock_runtime_endpoint": base}

    def work() -> None:
        with suppress(Exception):
            run(api, whole, upstream, is_async=is_async, **given)

    settled(metered, books, work)
    assert books.charged == []
    assert [state for _, state in books.leases] == ["canceled"]


# -- what has no HTTP response -----------------------------------------------------------------------------------------


def generic(text: str, finish: str = "", usage: Any = None) -> GenericStreamingChunk:
    return GenericStreamingChunk(
        text=text, is_finished=bool(finish), finish_reason=finish, usage=usage, index=0, tool_use=None
    )


USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}


class Own(litellm.CustomLLM):
    """A provider that an application has written itself."""

    usage: Any = USAGE

    def streaming(self, *args: Any, **kwargs: Any) -> Iterator[GenericStreamingChunk]:  # type: ignore[override]
        for index in range(4):
            yield generic(f"word{index} ")
        yield generic("", "stop", self.usage)

    async def astreaming(self, *args: Any, **kwargs: Any) -> AsyncIterator[GenericStreamingChunk]:  # type: ignore[override]
        for index in range(4):
            yield generic(f"word{index} ")
        yield generic("", "stop", self.usage)


@pytest.fixture
def own() -> Iterator[Own]:
    """It is known to LiteLLM as ``own/``."""
    provider = Own()
    before = list(litellm.provider_list), list(litellm._custom_providers), list(litellm.custom_provider_map)
    litellm.custom_provider_map = [{"provider": "own", "custom_handler": provider}]
    litellm.utils.custom_llm_setup()
    yield provider
    litellm.provider_list, litellm._custom_providers, litellm.custom_provider_map = before


@COLOURS
@pytest.mark.parametrize("usage", [USAGE, None], ids=["usage", "no-usage"])
def test_a_provider_of_the_applications_own(
    usage: Any, is_async: bool, own: Own, metered: Vluna, upstream: Upstream, books: Books
) -> None:
    """Its items are read: its usage, or an estimate where it reports none."""
    own.usage = usage
    api = Api("completion", {"model": "own/model", "messages": MESSAGES})
    settled(metered, books, lambda: run(api, whole, upstream, is_async=is_async))
    if usage is None:
        books.estimated_once("own.model")
    else:
        books.once("own.model")


@COLOURS
def test_a_provider_of_the_applications_own_that_is_left(
    is_async: bool, own: Own, metered: Vluna, upstream: Upstream, books: Books
) -> None:
    """Dropped in the middle."""
    api = Api("completion", {"model": "own/model", "messages": MESSAGES})
    settled(metered, books, lambda: run(api, two, upstream, is_async=is_async))
    books.cancelled("own.model")


@COLOURS
def test_a_mocked_stream_costs_nothing(is_async: bool, metered: Vluna, upstream: Upstream, books: Books) -> None:
    """``mock_response``: nobody is asked, whatever usage LiteLLM makes up."""
    api = Api("completion", {"model": "openai/gpt-4o", "messages": MESSAGES, "mock_response": "hello"})
    with call_context(principal_id=books.customer) as scope:
        run(api, whole, upstream, is_async=is_async)
    assert scope.wait(5)
    assert books.charged == []


@COLOURS
@pytest.mark.parametrize("reading", [whole, never])
def test_a_stream_made_of_a_whole_answer_is_charged_at_once(
    reading: Any, is_async: bool, metered: Vluna, upstream: Upstream, books: Books
) -> None:
    """LiteLLM makes streams up for models that have none: the whole answer was paid for, read or not."""
    api = Api("responses", {"model": "openai/o1-pro", "input": "hi"})
    settled(metered, books, lambda: run(api, reading, upstream, is_async=is_async))
    assert upstream.posts()[0].body.get("stream") is not True
    books.once("openai.o1-pro")
