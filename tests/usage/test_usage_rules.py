"""The traps in providers' usage, one test each. All bodies here are hand-written; the numbers are small and made up."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vluna_llm.ending import Ending, judge
from vluna_llm.usage import TokenUsage, read_body, read_usage
from vluna_llm.usage.normalize import normalize_usage

CHAT = "https://api.example.com/v1/chat/completions"
RESPONSES = "https://api.example.com/v1/responses"
MESSAGES = "https://api.anthropic.com/v1/messages"
JSON = "application/json"
SSE = "text/event-stream; charset=utf-8"


def sse(*events: Any, done: bool = True, end: str = "\n") -> bytes:
    """Hand-written event stream; a pair is (event name, object), a string is a line as it stands."""
    blocks = []
    for event in events:
        if isinstance(event, str):
            blocks.append(event)
        elif isinstance(event, tuple):
            blocks.append(f"event: {event[0]}{end}data: {json.dumps(event[1])}")
        else:
            blocks.append(f"data: {json.dumps(event)}")
    if done:
        blocks.append("data: [DONE]")
    return "".join(block + end + end for block in blocks).encode()


def chunk(text: str = "", finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m-1", "choices": [choice], **more}


def tail(**usage: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m-1", "choices": [], "usage": usage}


PLAIN = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def counted(usage: TokenUsage | None) -> tuple[int, int]:
    assert usage is not None
    return usage.input_tokens, usage.output_tokens


# -- meanings ----------------------------------------------------------------------------------------------------------


def test_openai_cached_is_part_of_the_input_and_reasoning_of_the_output() -> None:
    """OpenAI: nothing is added, the parts are parts, and nothing is marked."""
    usage = normalize_usage(
        {
            "prompt_tokens": 100,
            "completion_tokens": 50,
            "total_tokens": 150,
            "prompt_tokens_details": {"cached_tokens": 60, "audio_tokens": 3, "cache_write_tokens": 7},
            "completion_tokens_details": {"reasoning_tokens": 40, "audio_tokens": 2, "rejected_prediction_tokens": 4},
        }
    )
    assert usage == TokenUsage(100, 50, 60, 7, 40, 3, 2)
    assert usage.total_tokens == 150


def test_responses_names_mean_the_same() -> None:
    """Responses: ``input_tokens`` and ``output_tokens`` with OpenAI's details, not Anthropic's meaning."""
    usage = normalize_usage(
        {
            "input_tokens": 100,
            "input_tokens_details": {"cached_tokens": 60},
            "output_tokens": 50,
            "output_tokens_details": {"reasoning_tokens": 40},
            "total_tokens": 150,
        }
    )
    assert usage == TokenUsage(100, 50, 60, 0, 40)


def test_anthropic_cached_stands_beside_the_input() -> None:
    """Anthropic: what was read from and written to the cache is added to the input."""
    usage = normalize_usage(
        {"input_tokens": 2, "cache_read_input_tokens": 1000, "cache_creation_input_tokens": 20, "output_tokens": 9}
    )
    assert usage == TokenUsage(1022, 9, 1000, 20)


def test_anthropic_cache_creation_by_lifetime_is_summed_where_the_sum_is_missing() -> None:
    usage = normalize_usage(
        {
            "input_tokens": 1,
            "cache_read_input_tokens": 0,
            "cache_creation": {"ephemeral_5m_input_tokens": 3, "ephemeral_1h_input_tokens": 4},
            "output_tokens": 1,
        }
    )
    assert usage is not None
    assert (usage.input_tokens, usage.cache_write_tokens) == (8, 7)


def test_anthropic_iterations_are_not_added_and_a_foreign_model_beside_them_is_marked() -> None:
    """``iterations`` repeats what the top level has; what another model did beside it is seen in the mark."""
    steps = [{"type": "message", "input_tokens": 5, "output_tokens": 2}]
    base = {"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": 0}
    usage = normalize_usage({**base, "iterations": steps})
    assert usage == TokenUsage(5, 2)
    adviser = {"type": "advisor_message", "input_tokens": 90, "output_tokens": 9}
    marked = normalize_usage({**base, "iterations": [*steps, adviser]})
    assert counted(marked) == (5, 2)
    assert marked is not None
    assert marked.contradiction == "iterations_beside_usage"


def test_xai_reasoning_outside_the_output_is_found_by_the_total() -> None:
    """xAI: the total has the reasoning, the output has not."""
    usage = normalize_usage(
        {
            "prompt_tokens": 20,
            "completion_tokens": 4,
            "total_tokens": 324,
            "completion_tokens_details": {"reasoning_tokens": 300},
        }
    )
    assert usage == TokenUsage(20, 304, reasoning_tokens=300, contradiction="reasoning_beside_output")


def test_gemini_thoughts_and_tool_prompts_stand_beside() -> None:
    """Gemini: thoughts are output, tool-use prompts are input, cached content is inside the prompt."""
    usage = normalize_usage(
        {
            "promptTokenCount": 100,
            "cachedContentTokenCount": 60,
            "toolUsePromptTokenCount": 10,
            "candidatesTokenCount": 5,
            "thoughtsTokenCount": 30,
            "totalTokenCount": 145,
            "promptTokensDetails": [
                {"modality": "TEXT", "tokenCount": 40},
                {"modality": "IMAGE", "tokenCount": 50},
                {"modality": "AUDIO", "tokenCount": 10},
            ],
        }
    )
    assert usage == TokenUsage(110, 35, 60, 0, 30, 10, 0, 50)


def test_hidden_output_in_the_total_alone_is_output() -> None:
    """Gemini's OpenAI endpoint: thinking is in the total and nowhere else."""
    usage = normalize_usage({"prompt_tokens": 35, "completion_tokens": 12, "total_tokens": 109})
    assert usage == TokenUsage(35, 74, contradiction="hidden_output")


def test_mistral_audio_beside_the_prompt() -> None:
    """Mistral: ``prompt_tokens`` has the text, the audio is in the total."""
    usage = normalize_usage(
        {
            "prompt_audio_seconds": 3,
            "prompt_tokens": 5,
            "completion_tokens": 11,
            "total_tokens": 391,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 375},
        }
    )
    assert usage == TokenUsage(380, 11, audio_input_tokens=375, contradiction="audio_beside_input")


def test_audio_beside_the_prompt_while_reasoning_is_inside_the_output() -> None:
    """One part may stand beside its whole while another is inside: the total tells them apart."""
    usage = normalize_usage(
        {
            "prompt_tokens": 5,
            "completion_tokens": 11,
            "total_tokens": 36,
            "prompt_tokens_details": {"audio_tokens": 20},
            "completion_tokens_details": {"reasoning_tokens": 7},
        }
    )
    assert usage == TokenUsage(25, 11, 0, 0, 7, 20, contradiction="audio_beside_input")


def test_gemini_totals_that_do_not_fit_are_marked() -> None:
    """A larger total has hidden output; a smaller one is kept as stated parts."""
    counts = {"promptTokenCount": 10, "candidatesTokenCount": 5}
    assert normalize_usage({**counts, "totalTokenCount": 40}) == TokenUsage(10, 30, contradiction="hidden_output")
    assert normalize_usage({**counts, "totalTokenCount": 9}) == TokenUsage(10, 5, contradiction="total_below_parts")


def test_cached_beside_the_input_under_openai_names_is_found_by_the_total() -> None:
    """A proxy that keeps Anthropic's numbers under OpenAI's names."""
    usage = normalize_usage(
        {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 107, "cache_read_input_tokens": 100}
    )
    assert usage == TokenUsage(105, 2, 100, contradiction="cached_beside_input")


def test_cached_larger_than_the_input_is_cut_and_marked() -> None:
    """xAI, Mistral: cached counts whole blocks; the provider's total says what the input is."""
    usage = normalize_usage({**PLAIN, "prompt_tokens_details": {"cached_tokens": 16}})
    assert usage == TokenUsage(10, 5, 10, contradiction="cached_exceeds_input")
    assert normalize_usage({**PLAIN, "num_cached_tokens": 16}) == usage


def test_reasoning_larger_than_the_output_while_the_total_holds_is_cut_and_marked() -> None:
    """Vercel's gateway: the provider's own total wins over a part that does not fit."""
    usage = normalize_usage({**PLAIN, "completion_tokens_details": {"reasoning_tokens": 137}})
    assert usage == TokenUsage(10, 5, reasoning_tokens=5, contradiction="reasoning_exceeds_output")


def test_reasoning_larger_than_the_output_without_a_total_stands_beside_it() -> None:
    usage = normalize_usage({"input_tokens": 10, "output_tokens": 5, "output_tokens_details": {"reasoning_tokens": 30}})
    assert usage == TokenUsage(10, 35, reasoning_tokens=30, contradiction="reasoning_beside_output")


def test_a_total_below_its_parts_is_marked_and_the_parts_stand() -> None:
    usage = normalize_usage({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 12})
    assert usage == TokenUsage(10, 5, contradiction="total_below_parts")


def test_missing_output_is_none_of_it() -> None:
    """Embeddings and an old completion say input and total alone; a total without parts is input, marked."""
    assert normalize_usage({"prompt_tokens": 11, "total_tokens": 11}) == TokenUsage(11, 0)
    assert normalize_usage({"total_tokens": 7}) == TokenUsage(7, 0, contradiction="total_only")


@pytest.mark.parametrize(
    "more",
    [
        {"cached_tokens": 4},
        {"num_cached_tokens": 4},
        {"prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 6},
        {"cache_read_input_tokens": 4},
        {"prompt_tokens_details": {"cached_tokens": 4}, "prompt_cache_hit_tokens": 9},
    ],
)
def test_cached_goes_by_many_names(more: dict[str, Any]) -> None:
    """Together, Mistral, DeepSeek, LiteLLM; OpenAI's own name wins where both stand."""
    assert normalize_usage({**PLAIN, **more}) == TokenUsage(10, 5, 4)


def test_strings_floats_and_nulls_inside_usage_are_harmless() -> None:
    """Service tiers, times, costs and nulls beside the counts change nothing; counts as text or float are read."""
    odd = {
        "service_tier": "default",
        "queue_time": 0.2,
        "cost": 1.9e-05,
        "is_byok": False,
        "cost_details": {"upstream": None},
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    assert normalize_usage({**PLAIN, **odd}) == TokenUsage(10, 5)
    assert normalize_usage({"prompt_tokens": "10", "completion_tokens": 5.0}) == TokenUsage(10, 5)


@pytest.mark.parametrize("bad", [-1, 1.5, True, "x", "", "-3", [], {}, 10**400, float("inf"), float("nan"), None])
def test_a_count_that_is_none_is_not_a_count(bad: Any) -> None:
    assert normalize_usage({"prompt_tokens": bad, "completion_tokens": 5}) == TokenUsage(0, 5)


def test_audio_by_seconds() -> None:
    """Transcription billed by duration: no tokens, but the seconds."""
    body = b'{"text": "hello", "usage": {"type": "duration", "seconds": 7}}'
    usage = read_usage("https://api.example.com/v1/audio/transcriptions", JSON, body)
    assert usage == TokenUsage(audio_seconds=7.0)


def test_cohere_billed_units_are_not_what_was_read() -> None:
    """Cohere: ``tokens`` is what the model read and wrote; ``billed_units`` only where there is nothing else."""
    usage = {
        "billed_units": {"input_tokens": 8, "output_tokens": 9},
        "tokens": {"input_tokens": 37, "output_tokens": 16},
    }
    assert normalize_usage({**usage, "cached_tokens": 14}) == TokenUsage(37, 16, 14)
    assert normalize_usage({"billed_units": {"input_tokens": 8}}) == TokenUsage(8, 0)


def test_a_cost_alone_is_a_report_without_tokens() -> None:
    """xAI's images report a price and no tokens: not None, all zero, and the object is kept."""
    usage = read_usage("https://api.x.ai/v1/images/edits", JSON, b'{"data":[{}],"usage":{"cost_in_usd_ticks":7}}')
    assert usage == TokenUsage()
    assert usage is not None
    assert usage.raw == {"cost_in_usd_ticks": 7}


@pytest.mark.parametrize("nothing", [None, {}, {"prompt_tokens": None}, [], "12", 12])
def test_nothing_reported_is_none(nothing: Any) -> None:
    """Null, empty, or all members null: nothing was reported."""
    assert normalize_usage(nothing) is None
    assert read_usage(CHAT, JSON, json.dumps({"id": "c", "choices": [], "usage": nothing}).encode()) is None


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["input_tokens", "cached_tokens", "reasoning_tokens", "tokenCount"]), inner
                )
            ),
            max_leaves=8,
        ),
    )
)
def test_any_object_is_read_without_raising(raw: dict[str, Any]) -> None:
    normalize_usage(raw)


INPUT_NAMES = ["prompt_tokens", "input_tokens", "total_tokens", "cached_tokens", "num_cached_tokens"]
OUTPUT_NAMES = ["completion_tokens", "output_tokens", "reasoning_tokens"]
CACHE_NAMES = ["cache_read_input_tokens", "cache_creation_input_tokens"]
USAGE_NAMES = st.sampled_from([*INPUT_NAMES, *OUTPUT_NAMES, *CACHE_NAMES])
DETAIL_NAMES = st.sampled_from(["prompt_tokens_details", "completion_tokens_details", "output_tokens_details"])
COUNTS = st.integers(0, 1000)


@given(
    st.dictionaries(USAGE_NAMES, COUNTS),
    st.dictionaries(DETAIL_NAMES, st.dictionaries(st.sampled_from(["cached_tokens", "reasoning_tokens"]), COUNTS)),
)
def test_parts_never_exceed_their_whole_and_a_consistent_total_is_kept(counts: Any, details: Any) -> None:
    """Whatever a provider says: parts are parts, and a total that the stated parts do not overshoot is the total."""
    usage = normalize_usage({**counts, **details})
    if usage is None:
        return
    assert usage.cached_tokens <= usage.input_tokens
    assert usage.cache_write_tokens <= usage.input_tokens
    assert usage.reasoning_tokens <= usage.output_tokens
    if counts.get("total_tokens") and usage.contradiction != "total_below_parts":
        assert usage.total_tokens == counts["total_tokens"]


# -- places -----------------------------------------------------------------------------------------------------------


def test_usage_given_twice_is_counted_once() -> None:
    """Groq: in ``x_groq`` and again in ``usage``, on the finish chunk and on the extra one."""
    body = sse(chunk("a"), chunk(finish="stop", x_groq={"id": "r", "usage": PLAIN}, usage=PLAIN), tail(**PLAIN))
    assert read_usage(CHAT, SSE, body) == TokenUsage(10, 5)


def test_usage_in_x_groq_alone_is_read() -> None:
    body = sse(chunk("a", x_groq={"id": "r"}), chunk(finish="stop", x_groq={"id": "r", "usage": PLAIN}))
    assert read_usage(CHAT, SSE, body) == TokenUsage(10, 5)


def test_usage_on_every_chunk_means_the_last() -> None:
    """Perplexity, Gemini: the counts grow from chunk to chunk; they are not added up."""
    grow = [chunk("x", usage={"prompt_tokens": 10, "completion_tokens": n}) for n in (1, 2, 3)]
    assert read_usage(CHAT, SSE, sse(*grow, done=False)) == TokenUsage(10, 3)


def test_null_usage_on_every_chunk_does_not_undo_a_report() -> None:
    """OpenAI writes ``usage: null`` on all other chunks; chunks may follow the one with usage (LiteLLM's proxy)."""
    body = sse(chunk("a", usage=None), chunk(usage=PLAIN), chunk(usage=None), chunk())
    assert read_usage(CHAT, SSE, body) == TokenUsage(10, 5)


def test_usage_on_a_chunk_with_choices_and_without_a_finish_reason_is_read() -> None:
    body = sse(chunk("a"), chunk(finish="stop"), chunk(usage=PLAIN))
    assert read_usage(CHAT, SSE, body) == TokenUsage(10, 5)


def test_zeros_after_an_error_are_a_report_but_undo_nothing() -> None:
    """OpenAI ends a failed stream with zeros: reported as such, unless real counts came before."""
    error = {"error": {"message": "sorry", "type": "server_error"}}
    zeros = tail(prompt_tokens=0, completion_tokens=0, total_tokens=0)
    facts = read_body(CHAT, SSE, sse(chunk("a"), error, zeros))
    assert (facts.usage, facts.failed, facts.complete) == (TokenUsage(), True, True)
    assert read_usage(CHAT, SSE, sse(chunk("a", usage=PLAIN), error, zeros)) == TokenUsage(10, 5)


def test_anthropic_stream_takes_the_input_from_the_start_and_the_output_from_the_delta() -> None:
    """Old models give the output alone in ``message_delta``; new ones repeat and raise the input there."""
    start = {
        "type": "message_start",
        "message": {
            "id": "msg_1",
            "model": "c",
            "usage": {"input_tokens": 20, "output_tokens": 1, "cache_read_input_tokens": 5},
        },
    }
    stop = ("message_stop", {"type": "message_stop"})

    def delta(**usage: Any) -> tuple[str, dict[str, Any]]:
        return ("message_delta", {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage})

    old = sse(("message_start", start), delta(output_tokens=30), stop, done=False)
    assert read_usage(MESSAGES, SSE, old) == TokenUsage(25, 30, 5)
    new = sse(
        ("message_start", start),
        delta(input_tokens=40, cache_read_input_tokens=None, output_tokens=30),
        stop,
        done=False,
    )
    facts = read_body(MESSAGES, SSE, new)
    assert facts.usage == TokenUsage(45, 30, 5)
    assert (facts.response_id, facts.model, facts.finish_reason_seen, facts.complete) == ("msg_1", "c", True, True)


def test_anthropic_start_alone_is_no_report() -> None:
    """``message_start`` is neither final nor cumulative: a stream that ends there has reported nothing."""
    start = {"type": "message_start", "message": {"id": "msg_1", "usage": {"input_tokens": 20, "output_tokens": 1}}}
    facts = read_body(MESSAGES, SSE, sse(("message_start", start), done=False))
    assert (facts.usage, facts.complete, facts.finish_reason_seen) == (None, False, False)


@pytest.mark.parametrize(("last", "failed"), [("completed", False), ("incomplete", False), ("failed", True)])
def test_responses_end_by_their_terminal_event_and_keep_their_usage(last: str, failed: bool) -> None:
    """``response.incomplete`` and ``response.failed`` are spent and reported too; only the failed had no finish."""

    def event(kind: str, status: str, usage: Any) -> tuple[str, dict[str, Any]]:
        response = {"id": "resp_1", "object": "response", "model": "m", "status": status, "error": None, "usage": usage}
        return (f"response.{kind}", {"type": f"response.{kind}", "response": response})

    text = ("response.output_text.delta", {"type": "response.output_text.delta", "delta": "hi"})
    usage = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
    body = sse(event("created", "in_progress", None), text, event(last, last, usage), done=False)
    facts = read_body(RESPONSES, SSE, body)
    assert (facts.usage, facts.complete, facts.finish_reason_seen) == (TokenUsage(3, 4), True, not failed)
    assert (facts.failed, facts.status, facts.response_id) == (failed, last, "resp_1")


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_response_that_failed_and_reported_nothing_is_no_finished_answer(status: str) -> None:
    """Whole or streamed: nothing is owed for it, and nothing is estimated (design rule 4)."""
    response = {"id": "resp_1", "object": "response", "model": "m", "status": status, "output": [], "usage": None}
    whole = read_body(RESPONSES, JSON, json.dumps(response).encode())
    event = (f"response.{status}", {"type": f"response.{status}", "response": response})
    streamed = read_body(RESPONSES, SSE, sse(event, done=False))
    for facts in (whole, streamed):
        assert (facts.usage, facts.failed, facts.finish_reason_seen) == (None, True, False)
        ending = Ending("complete", finished=True, finish_reason_seen=facts.finish_reason_seen, failed=facts.failed)
        assert judge(ending, estimated_input=5, estimated_output=5, on_abort="estimate").work == "failed"


def test_background_response_has_a_status_and_no_usage() -> None:
    body = b'{"id":"resp_1","object":"response","status":"queued","background":true,"model":"m","usage":null}'
    facts = read_body(RESPONSES, JSON, body)
    assert (facts.status, facts.usage, facts.finish_reason_seen, facts.complete) == ("queued", None, False, True)


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("https://api.openai.com/v1/responses/input_tokens", b'{"object":"response.input_tokens","input_tokens":60}'),
        ("https://api.anthropic.com/v1/messages/count_tokens?beta=true", b'{"input_tokens":60}'),
        ("https://x.example/v1beta/models/m:countTokens", b'{"totalTokens":60,"usageMetadata":{"totalTokenCount":6}}'),
    ],
)
def test_token_counts_are_not_usage(url: str, body: bytes) -> None:
    assert read_usage(url, JSON, body) is None


def test_ollama_lines_and_cohere_and_assistants_streams() -> None:
    """Newline-delimited JSON; usage in ``delta``; usage on a run: each at its own place, each ended by its own sign."""
    first = b'{"model":"g","message":{"content":"a"},"done":false}\n'
    lines = first + b'{"model":"g","done":true,"prompt_eval_count":25,"eval_count":9}\n'
    for content_type in ("application/x-ndjson", JSON, None):
        facts = read_body("http://localhost:11434/api/chat", content_type, lines)
        assert (facts.usage, facts.complete, facts.finish_reason_seen) == (TokenUsage(25, 9), True, True)
    end = {
        "type": "message-end",
        "delta": {"finish_reason": "COMPLETE", "usage": {"tokens": {"input_tokens": 2, "output_tokens": 3}}},
    }
    facts = read_body("https://api.cohere.com/v2/chat", SSE, sse(("message-end", end), done=False))
    assert (facts.usage, facts.complete) == (TokenUsage(2, 3), True)
    run = {"object": "thread.run", "status": "completed", "usage": PLAIN}
    body = sse(("thread.run.queued", {"object": "thread.run", "usage": None}), ("thread.run.completed", run))
    assert read_usage("https://api.openai.com/v1/threads/t/runs", SSE, body) == TokenUsage(10, 5)


# -- framing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_line_end(end: str) -> None:
    body = sse(": ping", chunk("a"), tail(**PLAIN), end=end)
    facts = read_body(CHAT, SSE, body)
    assert (facts.usage, facts.complete) == (TokenUsage(10, 5), True)


def test_no_done_no_last_blank_line() -> None:
    """A stream that just stops after its usage has reported it, and is not finished."""
    body = sse(chunk("a"), chunk(finish="stop", usage=PLAIN), done=False)
    for cut in (body, body.rstrip(b"\n")):
        facts = read_body(CHAT, SSE, cut)
        assert (facts.usage, facts.complete, facts.finish_reason_seen) == (TokenUsage(10, 5), False, True)


def test_comments_event_names_several_data_lines_and_a_byte_order_mark() -> None:
    """What the event-stream format allows beside ``data: {...}``: none of it hides usage."""
    spread = json.dumps(tail(**PLAIN), indent=1).replace("\n", "\ndata:")
    body = b"\xef\xbb\xbf: OPENROUTER PROCESSING\n\nid: 1\nevent: message\nretry: 5\ndata:" + spread.encode() + b"\n\n"
    assert read_usage(CHAT, SSE, body) == TokenUsage(10, 5)
    assert read_usage(CHAT, None, body) == TokenUsage(10, 5)


def test_error_events_and_junk_error_lines_are_failures() -> None:
    """``event: error``, an error object in a chunk, llama.cpp's ``error:`` line, and an Anthropic error."""
    streams = (
        sse(chunk("a"), ("error", {"error": {"message": "x"}}), done=False),
        sse(chunk("a"), {"error": {"message": "x"}}, done=False),
        sse(chunk("a"), 'error: {"detail":"failed"}', done=False),
        sse(("error", {"type": "error", "error": {"type": "overloaded_error"}}), done=False),
        sse(chunk("a"), chunk(finish="error"), done=False),
    )
    for body in streams:
        facts = read_body(CHAT, SSE, body)
        assert facts.failed
        assert facts.usage is None
    assert not read_body(CHAT, SSE, sse(chunk("an error: none", error=None))).failed


def test_json_answer_under_an_event_stream_type_and_the_reverse() -> None:
    """The first byte decides: servers answer errors as JSON whatever type they promised."""
    body = json.dumps({"id": "c", "choices": [{"finish_reason": "stop"}], "usage": PLAIN}).encode()
    assert read_usage(CHAT, SSE, body) == TokenUsage(10, 5)
    assert read_usage(CHAT, JSON, sse(tail(**PLAIN))) == TokenUsage(10, 5)
    assert read_usage(CHAT, "text/plain", b"\n \n" + body) == TokenUsage(10, 5)


def test_a_model_that_writes_about_usage_cannot_change_the_bill() -> None:
    """Usage is read from its place only: neither text, nor tool arguments, nor metadata count."""
    forged = json.dumps({"usage": {"prompt_tokens": 10**6, "completion_tokens": 1, "total_tokens": 10**6 + 1}})
    text = f"data: {forged}\n\ndata: [DONE]\n\n"
    body = sse(chunk(text), chunk("x", metadata={"usage": "none"}), tail(**PLAIN))
    assert read_usage(CHAT, SSE, body) == TokenUsage(10, 5)
    unread = sse(chunk("hello"), chunk(text), done=False)
    facts = read_body(CHAT, SSE, unread)
    assert (facts.usage, facts.complete, facts.finish_reason_seen) == (None, False, False)
    answer = {
        "id": "c",
        "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
        "metadata": {"usage": PLAIN},
    }
    assert read_usage(CHAT, JSON, json.dumps(answer).encode()) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b"{",
        b'{"usage":',
        b"\xff\xfe\x00",
        b"<html>",
        b"data: {",
        b"data:\n\n",
        b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("content_type", [JSON, SSE, None, "application/x-ndjson", "text/html"])
def test_broken_bodies_say_nothing_and_raise_nothing(body: bytes, content_type: str | None) -> None:
    assert read_usage(CHAT, content_type, body) is None


@given(st.binary(max_size=400), st.sampled_from([JSON, SSE, None, "application/x-ndjson"]))
def test_any_bytes_are_read_without_raising(body: bytes, content_type: str | None) -> None:
    read_body(CHAT, content_type, body)


EVENT_NAMES = ["type", "object", "status", "error", "done", "choices", "delta", "usage", "response", "message", "meta"]
MORE_NAMES = [
    "finish_reason",
    "candidates",
    "content",
    "parts",
    "tool_calls",
    "function",
    "x_groq",
    "id",
    "model",
    "text",
]
ODD_EVENTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["response", "message_start", "error", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(EVENT_NAMES + MORE_NAMES), inner),
    max_leaves=25,
)


@given(st.lists(ODD_EVENTS, max_size=5), st.sampled_from([CHAT, RESPONSES, MESSAGES]))
def test_any_json_in_any_place_is_read_without_raising(events: list[Any], url: str) -> None:
    """Known names with values of the wrong kind, in bodies and in streams."""
    read_body(url, SSE, sse(*(event for event in events if not isinstance(event, str))))
    for event in events:
        read_body(url, JSON, json.dumps(event).encode())


# -- large bodies ------------------------------------------------------------------------------------------------------


def embeddings(usage_at: str, **more: Any) -> bytes:
    data = [{"object": "embedding", "index": n, "embedding": [0.25] * 1500} for n in range(4)]
    usage = {"prompt_tokens": 8, "total_tokens": 8}
    if usage_at == "end":
        return json.dumps({"object": "list", "data": data, "model": "e-1", "usage": usage, **more}).encode()
    if usage_at == "start":
        return json.dumps({"usage": usage, "model": "e-1", "data": data, **more}).encode()
    return json.dumps(
        {"object": "list", "data": [{**data[0], "usage": {"prompt_tokens": 99}}], "model": "e-1"}
    ).encode()


@pytest.mark.parametrize("path", ["embeddings", "images/generations", "chat/completions"])
def test_large_bodies_are_read_right_wherever_usage_stands(path: str) -> None:
    """At the end (read without the rest), at the start, followed by other members, or only inside an item: none."""
    url = f"https://api.example.com/v1/{path}"
    for body in (embeddings("end"), embeddings("start"), embeddings("end", extra={"usage": {"prompt_tokens": 1}})):
        facts = read_body(url, JSON, body)
        assert facts.usage == TokenUsage(8, 0)
        assert (facts.model, facts.complete) == ("e-1", True)
    assert read_usage(url, JSON, embeddings("inside")) is None


def test_a_large_body_with_null_usage_reports_nothing() -> None:
    body = embeddings("end").replace(b'{"prompt_tokens": 8, "total_tokens": 8}', b"null")
    assert read_usage("https://api.example.com/v1/embeddings", JSON, body) is None
