"""The incremental reader and the filter on hand-written streams: any cut, flat memory, one chunk taken out."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vluna_llm.usage import StreamReader, TokenUsage, UsageChunkFilter, make_reader

URL = "https://api.example.com/v1/chat/completions"
SSE = "text/event-stream"
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}

HEAD = '{"id":"c","model":"m","choices":[{"index":0,"delta":'
EVENTS = [
    ": OPENROUTER PROCESSING",
    'data: {"choices":[],"id":"","model":"","prompt_filter_results":[{"prompt_index":0}]}',
    f'data: {HEAD}{{"content":"a"}},"finish_reason":null}}],"usage":null}}',
    f'data: {HEAD}{{"content":"bc"}},"finish_reason":null}}],"usage":null}}',
    f'data: {HEAD}{{"content":"\\"q\\\\"}},"finish_reason":null}}],"usage":null}}',
    f'data: {HEAD}{{"content":"\u00e9\u4e2d"}},"finish_reason":null}}]}}',
    f'data:{HEAD}{{}},"finish_reason":"stop"}}]}}',
    f'event: message\ndata: {HEAD}{{}}}}],"usage":{{"prompt_tokens":3,"completion_tokens":4}}}}',
    'data: {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}}',
    'data: {"id":"c","usage":{"prompt_tokens":10,"completion_tokens":5},\ndata: "choices":[]}',
    'data: {"error":{"message":"x"}}',
    "data: [DONE]",
    "",
    "event: ping",
]
DROPPED = {8, 9}
streams = st.lists(st.integers(0, len(EVENTS) - 1), min_size=1, max_size=14)


def build(order: list[int], end: str, *, hidden: bool = False) -> bytes:
    kept = [EVENTS[n].replace("\n", end) + end + end for n in order if not (hidden and n in DROPPED)]
    return "".join(kept).encode()


def run(body: bytes, cuts: list[int], *, hide: bool) -> tuple[StreamReader, bytes]:
    reader = make_reader(URL, SSE, hide_usage_chunk=hide)
    passed = b"".join(reader.pass_through(body[a:b]) for a, b in itertools.pairwise([0, *cuts, len(body)]))
    return reader, passed + reader.flush()


def state(reader: StreamReader) -> tuple[Any, ...]:
    return (
        reader.usage,
        reader.finished,
        reader.finish_reason_seen,
        reader.failed,
        reader.response_id,
        reader.model,
    )


@settings(deadline=None, max_examples=300)
@given(streams, st.sampled_from(["\n", "\r\n"]), st.data())
def test_any_cut_says_and_passes_the_same(order: list[int], end: str, data: st.DataObject) -> None:
    """Any events in any order, cut anywhere: the same facts, and exactly the usage-only chunks taken out."""
    body = build(order, end)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(body)), max_size=40)))
    whole, _ = run(body, [], hide=False)
    seen, untouched = run(body, cuts, hide=False)
    assert state(seen) == state(whole)
    assert untouched == body
    hiding, passed = run(body, cuts, hide=True)
    assert state(hiding) == state(whole)
    assert passed == build(order, end, hidden=True)


@settings(deadline=None, max_examples=40)
@given(streams, st.sampled_from(["\n", "\r\n"]))
def test_byte_by_byte(order: list[int], end: str) -> None:
    body = build(order, end)
    reader, passed = run(body, list(range(1, len(body))), hide=True)
    assert state(reader) == state(run(body, [], hide=False)[0])
    assert passed == build(order, end, hidden=True)


@settings(deadline=None)
@given(st.lists(st.text(max_size=12), min_size=3, max_size=30), st.booleans(), st.booleans())
def test_short_cuts_do_not_miss_anything(texts: list[str], ascii_only: bool, padded: bool) -> None:
    """One event per piece, which is where bytes are compared instead of parsed: the same facts as with one piece."""
    events = []
    for n, text in enumerate(texts):
        obj: dict[str, Any] = {"id": "c", "model": "m", "choices": [{"index": 0, "delta": {"content": text}}]}
        if padded:
            obj["obfuscation"] = "x" * (n % 5)
        if n == len(texts) - 1:
            obj["choices"][0]["finish_reason"] = "stop"
            obj["usage"] = USAGE
        dumped = json.dumps(obj, ensure_ascii=ascii_only, separators=(",", ":"))
        events.append(f"data: {dumped}\n\n".encode())
    pieces = make_reader(URL, SSE)
    told = [pieces.feed(event) for event in events]
    assert not any(told[:-1])
    assert told[-1]
    whole = make_reader(URL, SSE)
    whole.feed(b"".join(events))
    assert state(pieces) == state(whole)
    assert pieces.usage == TokenUsage(10, 5)


def learned(hide: bool = True) -> StreamReader:
    """A reader that has seen enough text events to recognise them by their bytes."""
    reader = make_reader(URL, SSE, hide_usage_chunk=hide)
    for _ in range(4):
        reader.feed((EVENTS[2] + "\n\n").encode())
    return reader


@pytest.mark.parametrize(
    "told",
    [
        EVENTS[2].replace("null}]", '"xy"}]'),  # as long as null
        EVENTS[2].replace('"a"', '"\\\\"').replace("null}]", '"xy"}]'),
        EVENTS[2].replace("null}]", '"stop"}]') + "\n\n" + EVENTS[2],
        EVENTS[2] + "\n\n" + EVENTS[2].replace("null}]", '"stop"}]') + "\n\n" + EVENTS[2],
    ],
)
def test_what_only_looks_like_a_known_text_event_is_read(told: str) -> None:
    """A finish reason of the length of null, or between two ordinary ends, is seen."""
    reader = learned()
    assert not reader.finish_reason_seen
    assert reader.feed((told + "\n\n").encode())
    assert reader.finish_reason_seen


def test_choices_in_turns_are_told_apart_and_their_ends_seen() -> None:
    """Two shapes of text events may alternate; an end of either shape is not mistaken for text."""
    shapes = [EVENTS[2], EVENTS[2].replace('"index":0', '"index":1')]
    for ending in shapes:
        reader = make_reader(URL, SSE)
        for n in range(9):
            assert not reader.feed((shapes[n % 2] + "\n\n").encode())
        assert reader.feed((ending.replace("null}]", '"xy"}]') + "\n\n").encode())
        assert reader.finish_reason_seen
        assert reader.output_characters == pytest.approx(10, abs=4)


def test_a_known_text_event_after_an_unfinished_one_waits_its_turn() -> None:
    """What looks like a whole event in the middle of another one is not taken out of its order."""
    reader = learned()
    pieces = [b": half a comment\n", (EVENTS[2] + "\n\n").encode(), (EVENTS[8] + "\n\n").encode(), b"data: [DONE]\n\n"]
    passed = b"".join(reader.pass_through(piece) for piece in pieces) + reader.flush()
    assert passed == pieces[0] + pieces[1] + pieces[3]
    assert reader.usage == TokenUsage(10, 5)


def test_a_byte_order_mark_before_the_first_event() -> None:
    """A mark at the very start belongs to no event, however the bytes are cut."""
    body = b"\xef\xbb\xbf" + build([8, 11], "\n")
    for cuts in ([], [1], [2], [3], [1, 2, 3, 4]):
        reader, _ = run(body, cuts, hide=False)
        assert (reader.usage, reader.finished) == (TokenUsage(10, 5), True)


def test_feed_tells_when_something_became_known() -> None:
    """True exactly for the pieces that bring a finish reason, usage, an error or the end."""
    reader = make_reader(URL, SSE)
    told = [reader.feed((EVENTS[n] + "\n\n").encode()) for n in (0, 1, 2, 3, 3, 6, 8, 11, 11)]
    assert told == [False, False, False, False, False, True, True, True, False]


def test_only_what_may_be_the_usage_chunk_is_held_back() -> None:
    """Nothing is delayed beyond need: an event is passed on as soon as it shows choices, a held one with its end."""
    reader = UsageChunkFilter(URL)
    assert reader.feed(b'data: {"id":"c","choi') == b""
    assert reader.feed(b'ces":[{"index":0,') == b'data: {"id":"c","choices":[{"index":0,'
    assert reader.feed(b'"delta":{}}]}') == b'"delta":{}}]}'
    assert reader.feed(b"\n\njun") == b"\n\njun"
    assert reader.feed(b"k\n\n") == b"k\n\n"
    whole = UsageChunkFilter(URL)
    text = (EVENTS[2] + "\n\n").encode()
    assert whole.feed(text) == text
    assert whole.feed(b'data: {"choices":[],"usage":{"prompt_tokens":1}') == b""
    assert whole.feed(b"}\n\n") == b""
    assert whole.feed(b"data: [DO") == b""
    assert whole.flush() == b"data: [DO"


def test_azure_first_chunk_is_not_the_usage_chunk() -> None:
    """Empty choices without usage (``prompt_filter_results``) is passed, and so is ``usage: null``."""
    for event in (
        EVENTS[1],
        'data: {"choices":[],"usage":null}',
        'data: {"choices":[],"usage":{}}',
        'data: {"usage":{"a":1}}',
    ):
        body = (event + "\n\n").encode()
        hiding = UsageChunkFilter(URL)
        assert hiding.feed(body) + hiding.flush() == body


def test_anthropic_start_is_provisional() -> None:
    """The input is known after ``message_start``; nothing may be committed until ``message_delta``."""
    reader = make_reader("https://api.anthropic.com/v1/messages", SSE)
    start = {
        "type": "message_start",
        "message": {"id": "m", "model": "c", "usage": {"input_tokens": 9, "output_tokens": 1}},
    }
    reader.feed(f"event: message_start\ndata: {json.dumps(start)}\n\n".encode())
    assert reader.usage is None
    assert reader.provisional_usage == TokenUsage(9, 1)
    delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 7}}
    assert reader.feed(f"event: message_delta\ndata: {json.dumps(delta)}\n\n".encode())
    assert reader.usage == TokenUsage(9, 7)
    assert reader.finish_reason_seen
    assert not reader.finished


@pytest.mark.parametrize("kind", ["chat", "chat in turns", "responses", "anthropic"])
def test_output_is_counted_about_right(kind: str) -> None:
    """To bill an abandoned stream by estimate: within a tenth of the characters that were generated."""
    text = "some words of text "
    if kind == "responses":
        events = [
            f'event: response.output_text.delta\ndata: {{"type":"response.output_text.delta","delta":"{text}"}}\n\n'
        ] * 500
        created = {"type": "response.created", "response": {"id": "r", "model": "m", "status": "in_progress"}}
        events.insert(0, f"event: response.created\ndata: {json.dumps(created)}\n\n")
    elif kind == "anthropic":
        delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
        events = [f"event: content_block_delta\ndata: {json.dumps(delta)}\n\n"] * 500
        start = {"type": "message_start", "message": {"id": "m", "model": "c", "usage": {"input_tokens": 1}}}
        events.insert(0, f"event: message_start\ndata: {json.dumps(start)}\n\n")
    else:
        turns = kind == "chat in turns"
        head = 'data: {"id":"c","model":"m","choices":[{"index":%d,"delta":{"content":"%s"}}]}\n\n'
        events = [head % (n % 2 if turns else 0, text) for n in range(500)]
    reader = make_reader(URL, SSE)
    for event in events:
        reader.feed(event.encode())
    assert reader.output_characters == pytest.approx(500 * len(text), rel=0.1)


def test_memory_stays_flat_over_a_long_stream() -> None:
    """Only the event in progress is kept, whatever has passed."""
    reader = make_reader(URL, SSE, hide_usage_chunk=True)
    event = (EVENTS[2] + "\n\n").encode()
    for _ in range(2_000):
        reader.pass_through(event * 20)
        reader.pass_through(event[:50])
        reader.pass_through(event[50:])
    assert len(reader._pending) == 0


def test_an_event_too_large_to_keep_still_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a huge terminal event only head and tail are kept; its usage stands in the tail."""
    monkeypatch.setattr("vluna_llm.usage.stream._LARGEST", 300_000)
    monkeypatch.setattr("vluna_llm.usage.stream._KEPT_HEAD", 1_000)
    monkeypatch.setattr("vluna_llm.usage.stream._KEPT_TAIL", 20_000)
    reader = make_reader("https://api.example.com/v1/responses", SSE, hide_usage_chunk=True)
    response = {
        "id": "r",
        "output": ["x" * 1_000_000],
        "usage": {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7},
        "metadata": {},
    }
    event = {"type": "response.completed", "response": response}
    body = f"event: response.completed\ndata: {json.dumps(event)}\n\n".encode()
    passed = b""
    for start in range(0, len(body), 50_000):
        passed += reader.pass_through(body[start : start + 50_000])
        assert len(reader._pending) <= 350_000
    assert passed == body
    assert reader.usage == TokenUsage(3, 4)
    assert reader.finished


def test_a_json_body_is_read_at_its_end_and_too_large_a_one_from_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A streaming response that turns out to be plain JSON; beyond the bound its last members still tell."""
    body = json.dumps({"object": "list", "data": ["x" * 400_000], "model": "e", "usage": {"prompt_tokens": 8}}).encode()
    for bound in (32 * 1024 * 1024, 100_000):
        monkeypatch.setattr("vluna_llm.usage.stream._LARGEST", bound)
        monkeypatch.setattr("vluna_llm.usage.stream._KEPT_HEAD", 1_000)
        monkeypatch.setattr("vluna_llm.usage.stream._KEPT_TAIL", 5_000)
        reader = make_reader("https://api.example.com/v1/embeddings", SSE, hide_usage_chunk=True)
        passed = b"".join(reader.pass_through(body[n : n + 9_000]) for n in range(0, len(body), 9_000))
        assert reader.usage is None
        assert passed + reader.flush() == body
        assert reader.usage == TokenUsage(8, 0)
        assert (reader.finished, reader.model) == (True, "e")


def test_binary_answers_are_not_looked_at() -> None:
    """Speech is bytes of audio: passed, not kept, nothing said."""
    reader = make_reader("https://api.example.com/v1/audio/speech", "audio/mpeg", hide_usage_chunk=True)
    assert reader.pass_through(b'data: {"usage":{"total_tokens":3}}\n\n') != b""
    reader.end()
    assert reader.usage is None
    assert len(reader._pending) == 0
