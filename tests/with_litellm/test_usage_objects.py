"""What LiteLLM's own objects say about usage, and what of it is LiteLLM's own counting. No recordings are needed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from litellm.llms.anthropic.chat.transformation import AnthropicConfig
from litellm.types.llms.openai import ResponseAPIUsage
from litellm.types.utils import (
    Choices,
    Delta,
    EmbeddingResponse,
    ImageResponse,
    Message,
    ModelResponse,
    ModelResponseStream,
    StreamingChoices,
    TranscriptionResponse,
    Usage,
)

from vluna_llm.integrations._litellm_usage import (
    ChunkReader,
    answer_shown,
    chunk_usage,
    costs_nothing,
    ending_of,
    model_call_of,
    pending,
    spent,
    usage_of,
)
from vluna_llm.usage import TokenUsage

CHAT = model_call_of("chat.completions", {"model": "openai/gpt-4o"})
CLAUDE = model_call_of("chat.completions", {"model": "anthropic/claude-sonnet-5"})
OPENAI = {
    "prompt_tokens": 100,
    "completion_tokens": 20,
    "total_tokens": 120,
    "prompt_tokens_details": {"cached_tokens": 40, "audio_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 5, "audio_tokens": 2},
}
READ = TokenUsage(100, 20, cached_tokens=40, reasoning_tokens=5, audio_input_tokens=3, audio_output_tokens=2)
ANTHROPIC = {
    "input_tokens": 36,
    "cache_read_input_tokens": 40,
    "cache_creation_input_tokens": 24,
    "output_tokens": 20,
}
CLAUDE_READ = TokenUsage(100, 20, cached_tokens=40, cache_write_tokens=24)


def answer(usage: Usage | None, text: str = "hello there") -> ModelResponse:
    return ModelResponse(id="chatcmpl-1", model="m-1", choices=[Choices(message=Message(content=text))], usage=usage)


def converted(usage: dict[str, Any], thinking: str | None = None) -> Usage:
    """Anthropic's usage as LiteLLM converts it."""
    made: Usage = AnthropicConfig().calculate_usage(usage_object=usage, reasoning_content=thinking)
    return made


def test_a_chat_answer() -> None:
    """The parts are parts, and who answered is known."""
    ending = ending_of(answer(Usage(**OPENAI)), CHAT)
    assert (ending.usage, ending.response_id, ending.model, ending.failed) == (READ, "chatcmpl-1", "m-1", False)


def test_anthropic_s_cached_tokens_are_in_the_input_once() -> None:
    """LiteLLM has added them to the input already."""
    assert usage_of(converted(ANTHROPIC), CLAUDE) == CLAUDE_READ


def test_reasoning_that_litellm_counted_is_not_reported() -> None:
    """Anthropic said nothing of it; LiteLLM counts the words of a summary."""
    usage = converted(ANTHROPIC, "what could they possibly mean by that?")
    assert usage.completion_tokens_details.reasoning_tokens
    assert usage_of(usage, CLAUDE) == CLAUDE_READ


def test_an_answer_without_usage_has_none() -> None:
    """Zeros are what LiteLLM puts where the provider said nothing; the text is measured for the estimate."""
    for usage in (None, Usage(), Usage(prompt_tokens=0, completion_tokens=0, total_tokens=0)):
        ending = ending_of(answer(usage, "x" * 40), CHAT)
        assert (ending.usage, ending.output_tokens) == (None, 10)


@pytest.mark.parametrize("provider", ["replicate/m", "sagemaker/m", "petals/m", "bedrock/agentcore/arn", "langgraph/m"])
def test_usage_that_is_all_litellm_s_own_is_no_report(provider: str) -> None:
    """These providers report nothing: what LiteLLM shows is its tokenizer's."""
    call = model_call_of("chat.completions", {"model": provider})
    assert ending_of(answer(Usage(**OPENAI)), call).usage is None


def test_the_provider_s_body_wins() -> None:
    """Over what LiteLLM made of it, also where it says that nothing was reported."""
    body = {"id": "chatcmpl-2", "model": "m-2", "choices": [{"finish_reason": "stop"}], "usage": OPENAI}
    other = answer(Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2))
    ending = ending_of(other, CHAT, json.dumps(body))
    assert (ending.usage, ending.response_id, ending.model) == (READ, "chatcmpl-2", "m-2")
    assert ending_of(other, CHAT, json.dumps({**body, "usage": None})).usage is None
    for unreadable in ("", "not json", b"\xff\xfe", "{", object(), answer(None)):
        assert ending_of(answer(Usage(**OPENAI)), CHAT, unreadable).usage == READ


def test_a_body_of_bedrock_without_usage_proves_nothing() -> None:
    """Its tokens stand in the headers."""
    call = model_call_of("chat.completions", {"model": "bedrock/meta.llama3-8b-instruct-v1:0"})
    raw = json.dumps({"generation": "hi", "prompt_token_count": 7, "stop_reason": "stop"})
    assert ending_of(answer(Usage(**OPENAI)), call, raw).usage == READ


def test_zeros_that_the_provider_wrote_are_its_report() -> None:
    """Nothing was used, so nothing is estimated."""
    body = {"choices": [{"finish_reason": "stop"}], "usage": {"prompt_tokens": 0, "completion_tokens": 0}}
    assert ending_of(answer(Usage()), CHAT, json.dumps(body)).usage == TokenUsage()


def test_a_total_in_an_anthropic_message_is_litellm_s() -> None:
    """1.83 writes one into the caller's answer, without the cached tokens."""
    call = model_call_of("anthropic.messages", {"model": "anthropic/claude-sonnet-5"})
    message = {"type": "message", "id": "msg_1", "model": "c", "stop_reason": "end_turn"}
    ending = ending_of({**message, "usage": {**ANTHROPIC, "total_tokens": 56}}, call)
    assert (ending.usage, ending.response_id) == (CLAUDE_READ, "msg_1")


def test_responses_embeddings_images_and_transcriptions() -> None:
    """Each has a shape of its own; an image or a transcript without usage has none."""
    call = model_call_of("responses", {"model": "openai/gpt-4o"})
    details = {"input_tokens_details": {"cached_tokens": 40}, "output_tokens_details": {"reasoning_tokens": 5}}
    usage = ResponseAPIUsage(input_tokens=100, output_tokens=20, total_tokens=120, **details)
    assert usage_of(usage, call) == TokenUsage(100, 20, cached_tokens=40, reasoning_tokens=5)
    call = model_call_of("embeddings", {"model": "openai/text-embedding-3-small"})
    embedded = EmbeddingResponse(model="e", usage=Usage(prompt_tokens=8, total_tokens=8))
    assert ending_of(embedded, call).usage == TokenUsage(8, 0)
    call = model_call_of("images", {"model": "openai/gpt-image-1"})
    assert ending_of(ImageResponse(), call).usage is None
    call = model_call_of("audio", {"model": "openai/whisper-1"})
    heard = TranscriptionResponse(text="hello")
    assert ending_of(heard, call).usage is None
    raw = json.dumps({"text": "hello", "usage": {"type": "duration", "seconds": 7}})
    usage_heard = ending_of(heard, call, raw).usage
    assert usage_heard is not None
    assert usage_heard.audio_seconds == 7


def test_a_failed_response_without_usage_is_not_estimated() -> None:
    """Its model did not finish anything that was reported."""
    call = model_call_of("responses", {"model": "openai/gpt-4o"})
    ending = ending_of({"object": "response", "id": "r", "status": "failed", "error": {"code": "x"}}, call)
    assert (ending.usage, ending.failed, ending.finish_reason_seen) == (None, True, False)
    assert pending({"object": "response", "status": "queued"})
    assert not pending({"object": "response", "status": "completed"})


# -- nothing to pay, or paid for nothing -------------------------------------------------------------------------------


def test_what_came_out_of_a_cache_costs_nothing() -> None:
    """Marked by LiteLLM; not where a provider's body was seen: then only a part came from the cache."""
    cached = answer(Usage(**OPENAI))
    assert not costs_nothing(cached)
    cached._hidden_params["cache_hit"] = True
    assert costs_nothing(cached)
    assert not costs_nothing(cached, json.dumps({"usage": OPENAI}))
    keyed = answer(Usage(**OPENAI))
    keyed._hidden_params["cache_key"] = "36a1"  # set on hits only
    assert costs_nothing(keyed)
    assert not costs_nothing({"type": "message"})


def test_what_was_reported_is_spent_whatever_litellm_raises() -> None:
    """The body of an answer; not that of an error."""
    body = json.dumps({"id": "chatcmpl-2", "choices": [], "usage": OPENAI})
    ending = spent(body, CHAT)
    assert ending is not None
    assert (ending.usage, ending.response_id) == (READ, "chatcmpl-2")
    assert spent(json.dumps({"error": {"message": "overloaded"}}), CHAT) is None
    assert spent(None, CHAT) is None


def test_the_answer_is_kept_of_all_that_is_shown() -> None:
    """LiteLLM shows the text of its own exceptions after it, and coroutines before."""
    body = '{"usage": {}}'
    assert answer_shown(object(), None) is None
    assert answer_shown(body, None) == body
    assert answer_shown("Invalid response object Traceback ...", body) == body
    assert answer_shown(None, body) == body
    assert answer_shown(b' {"a": 1}', body) == b' {"a": 1}'


# -- chunks ------------------------------------------------------------------------------------------------------------


def chunk(text: str | None, finish: str | None = None, usage: Usage | None = None) -> ModelResponseStream:
    choices = [StreamingChoices(delta=Delta(content=text), finish_reason=finish)]
    return ModelResponseStream(id="chatcmpl-1", model="m-1", choices=choices, usage=usage)


def test_a_stream_of_chunks() -> None:
    """Usage, finish reason, text and identity, from LiteLLM's chunks."""
    reader = ChunkReader(CHAT)
    assert not reader.read(chunk("four"))
    assert not reader.read(chunk("five5"))
    assert reader.read(chunk(None, "stop"))
    assert (reader.usage, reader.finish_reason_seen) == (None, True)
    assert reader.read(ModelResponseStream(id="chatcmpl-1", choices=[], usage=Usage(**OPENAI)))
    ending = reader.ending("complete")
    assert (ending.usage, ending.output_tokens, ending.response_id, ending.model) == (READ, 3, "chatcmpl-1", "m-1")


def test_zeros_in_a_chunk_are_no_report() -> None:
    """LiteLLM's text completion chunks carry a usage of zeros each."""
    assert chunk_usage(chunk("hi", usage=Usage()), CHAT) is None
    assert chunk_usage(chunk("hi", usage=Usage(**OPENAI)), CHAT) == READ


@pytest.mark.parametrize("repeats_input", [True, False])
def test_both_halves_of_an_anthropic_stream(repeats_input: bool) -> None:
    """The start is neither final nor cumulative; older models do not repeat the input at the end."""
    reader = ChunkReader(CLAUDE)
    reader.read(chunk("", usage=converted({**ANTHROPIC, "output_tokens": 1})))
    assert reader.usage is None
    assert reader.provisional_usage == TokenUsage(100, 1, cached_tokens=40, cache_write_tokens=24)
    reader.read(chunk("hello"))
    reader.read(chunk("", "stop", converted(ANTHROPIC if repeats_input else {"output_tokens": 20})))
    assert reader.usage == CLAUDE_READ


def test_usage_after_the_finish_reason_is_final() -> None:
    """Bedrock's Converse sends it last, in the shape of Anthropic's."""
    reader = ChunkReader(CLAUDE)
    reader.read(chunk("", "stop"))
    reader.read(chunk("", usage=converted(ANTHROPIC)))
    assert reader.usage == CLAUDE_READ


def test_events_as_dicts_and_as_bytes() -> None:
    """Anthropic's own events are read as they are, in either form."""
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {"id": "msg_1", "model": "c", "usage": {**ANTHROPIC, "output_tokens": 1}}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "hello"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 20}},
        {"type": "message_stop"},
    ]
    decoded, wire = ChunkReader(CLAUDE), ChunkReader(CLAUDE)
    for event in events:
        decoded.read(event)
        wire.read(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
    for reader in (decoded, wire):
        assert (reader.usage, reader.finished, reader.response_id) == (CLAUDE_READ, True, "msg_1")
        assert reader.finish_reason_seen


def test_a_response_event() -> None:
    """The terminal event has the usage, the id and the status."""
    response = {
        "object": "response",
        "id": "resp_1",
        "status": "incomplete",
        "usage": {"input_tokens": 7, "output_tokens": 2},
    }
    reader = ChunkReader(model_call_of("responses", {"model": "openai/gpt-4o"}))
    reader.read({"type": "response.output_text.delta", "delta": "hello"})
    reader.read({"type": "response.incomplete", "response": response})
    assert (reader.usage, reader.finished, reader.status) == (TokenUsage(7, 2), True, "incomplete")
    assert (reader.response_id, reader.failed, reader.output_characters) == ("resp_1", False, 5)


@pytest.mark.parametrize("odd", [None, 5, [], {}, object(), {"choices": None}, {"choices": [None]}, {"usage": "x"}])
def test_odd_items_say_nothing(odd: Any) -> None:
    """A provider of the user's own may send anything."""
    assert chunk_usage(odd, CHAT) is None
    assert ending_of(odd, CHAT).usage is None
