"""The readers against recorded provider traffic: the same usage as the provider's, under one meaning, at any cut.

What is expected is worked out here, per provider and API, from what the recordings' own README says about their
numbers; none of the package's code takes part in it.
"""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vluna_llm.usage import TokenUsage, make_reader, read_body, read_usage

SAME_NAME = (
    "cache_write_tokens",
    "audio_input_tokens",
    "audio_output_tokens",
    "image_output_tokens",
)


def expected(rec: Any) -> dict[str, int] | None:
    """Input, output, cached and the parts that this recording must be read as; None where nothing was reported."""
    truth = rec.truth
    if truth is None:
        return None
    read, wrote = truth.get("input_tokens", 0), truth.get("output_tokens", 0)
    cached, written = truth.get("cached_tokens", 0), truth.get("cache_write_tokens", 0)
    reasoning = truth.get("reasoning_tokens", 0)
    model = str((rec.request or {}).get("model", "")) + rec.url
    from_xai = rec.provider == "xai" or (rec.provider.startswith("azure") and "grok" in model)
    if rec.api == "anthropic.messages":
        read += cached + written
    elif rec.api == "gemini.generateContent":
        wrote += reasoning
    elif rec.api == "chat.completions" and from_xai:
        wrote += reasoning  # xAI, also behind Azure: reasoning stands beside the output
    elif rec.provider == "mistral":
        read += truth.get("audio_input_tokens", 0)  # the total contains the audio, prompt_tokens does not
    elif rec.provider == "google-gemini":
        wrote = truth["total_tokens"] - read  # thinking is in the total alone
    want = {
        "input_tokens": read,
        "output_tokens": wrote,
        "cached_tokens": min(cached, read),
        "reasoning_tokens": min(reasoning, wrote),
        **{name: truth.get(name, 0) for name in SAME_NAME},
    }
    if truth.get("total_tokens") is not None:
        assert want["input_tokens"] + want["output_tokens"] == truth["total_tokens"], "the expectation itself is wrong"
    return want


def check(rec: Any, usage: TokenUsage | None) -> None:
    want = expected(rec)
    if want is None:
        assert usage is None
        return
    assert usage is not None
    if rec.provider == "cohere":
        want["reasoning_tokens"] = rec.truth["raw"]["tokens"].get("reasoning_tokens", 0)
    assert {name: getattr(usage, name) for name in want} == want
    if "image_input_tokens" in rec.truth:
        assert usage.image_input_tokens == rec.truth["image_input_tokens"]
    assert usage.audio_seconds == rec.truth.get("audio_seconds")


def test_reads_what_the_provider_reported(recording: Any, tally: dict[str, bool]) -> None:
    """The whole body gives the provider's numbers, and None exactly where none were reported."""
    tally[recording.id] = False
    check(recording, read_usage(recording.url, recording.content_type, recording.body))
    tally[recording.id] = True


def test_content_type_is_not_needed(recording: Any) -> None:
    """A server that forgets the content type is read all the same."""
    check(recording, read_usage(recording.url, None, recording.body))


def in_pieces(rec: Any, cuts: list[int], *, hide: bool = False) -> Any:
    reader = make_reader(rec.url, rec.content_type, hide_usage_chunk=hide)
    passed = b""
    for start, stop in itertools.pairwise([0, *cuts, len(rec.body)]):
        passed += reader.pass_through(rec.body[start:stop])
    passed += reader.flush()
    return reader, passed


def facts(reader: Any) -> tuple[Any, ...]:
    return (
        reader.usage,
        reader.finished,
        reader.finish_reason_seen,
        reader.failed,
        reader.response_id,
        reader.model,
        reader.status,
    )


def test_any_cut_reads_the_same(recording: Any) -> None:
    """Cut byte by byte at the end, at random, and into single events, a body says what it says as a whole."""
    whole, _ = in_pieces(recording, [])
    size = len(recording.body)
    dice = random.Random(recording.id)
    tail = list(range(max(size - 2000, 0), size))
    ends = [i + 2 for i in range(size) if recording.body[i : i + 2] == b"\n\n"]
    for cuts in (tail, ends, *(sorted(dice.sample(range(size), min(size, count))) for count in (1, 3, 40, 400))):
        reader, passed = in_pieces(recording, cuts)
        assert facts(reader) == facts(whole)
        assert passed == recording.body


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_of_any_recording(recordings: dict[str, Any], data: st.DataObject) -> None:
    """Whatever recording and whatever pieces: the usage is the same, and nothing but the usage chunk is taken out."""
    small = [rec for rec in recordings.values() if len(rec.body) < 20_000]
    rec = data.draw(st.sampled_from(small), label="recording")
    cuts = sorted(data.draw(st.sets(st.integers(0, len(rec.body)), max_size=60), label="cuts"))
    whole, wanted = in_pieces(rec, [], hide=True)
    reader, passed = in_pieces(rec, cuts, hide=True)
    assert facts(reader) == facts(whole)
    assert passed == wanted


def test_hidden_is_the_usage_only_chunk_and_nothing_else(recording: Any) -> None:
    """With hiding on, exactly the events with empty choices and a usage object are missing, byte for byte."""
    _, passed = in_pieces(recording, [], hide=True)
    separator = b"\r\n\r\n" if b"\r\n\r\n" in recording.body else b"\n\n"
    kept = []
    for event in recording.body.split(separator):
        payload = event.removeprefix(b"data:").strip()
        if recording.stream and payload.startswith(b"{"):
            obj = json.loads(payload) if b'"choices"' in payload else {}
            if obj.get("choices") == [] and obj.get("usage"):
                continue
        kept.append(event)
    assert passed == separator.join(kept)


def test_stream_end_is_read_from_the_protocol(recordings: dict[str, Any]) -> None:
    """``[DONE]`` and the terminal events finish a stream; one that lacks them is never taken for finished."""
    markers = (
        b"[DONE]",
        b'"response.completed"',
        b'"response.incomplete"',
        b'"message_stop"',
        b'"done":true',
        b'"transcript.text.done"',
    )
    streams = [rec for rec in recordings.values() if rec.stream]
    assert len(streams) > 80
    for rec in streams:
        found = read_body(rec.url, rec.content_type, rec.body)
        assert found.complete == any(marker in rec.body for marker in markers), rec.id
        if any(note.startswith("finish:") for note in rec.notes):
            assert found.finish_reason_seen, rec.id
        troubled = any("error event in stream" in note or "junk line:error" in note for note in rec.notes)
        assert found.failed == troubled, rec.id


def test_response_id_and_model_are_found(recordings: dict[str, Any]) -> None:
    """An answer with usage names its id and model to the reader, wherever the provider put them."""
    apis = ("chat.completions", "responses", "anthropic.messages", "completions")
    answers = [rec for rec in recordings.values() if rec.truth is not None and rec.api in apis]
    nameless = set()
    for rec in answers:
        found = read_body(rec.url, rec.content_type, rec.body)
        if found.response_id is None:
            nameless.add(rec.id)
        assert found.model, rec.id
    assert nameless == {  # these bodies have no id at all
        "google-gemini-chat-completions-80503f60",
        "google-gemini-chat-completions-eb4dddb8",
        "snowflake-cortex-chat-completions-39ea0a95",
    }


def test_the_recordings_are_all_there(recordings: dict[str, Any]) -> None:
    """The index and the files agree, so that the tally counts all of them."""
    assert len(recordings) == 210
