"""What reading usage costs per chunk of a stream, in nanoseconds of CPU: ``python benchmarks/bench_reader.py``.

The streams are made up here to look like the real ones (sizes, members, order), 200 text events each, one event per
piece. The figure is the best of several runs for a whole stream, divided by its pieces, so that opening, the first
events, the usage chunk and the end are paid for. The baseline is the same loop with a method that does nothing.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

from vluna_llm.usage import make_reader

WORDS = [
    "the",
    " model",
    " answers",
    " in",
    " small",
    " pieces",
    ",",
    " one",
    " token",
    " at",
    " a",
    " time",
    ".",
    "\\n",
]


def chat(obfuscation: bool) -> list[bytes]:
    """Chat Completions as OpenAI sends it with include_usage: ``"usage":null`` in every chunk."""
    dice = random.Random(7)
    head = (
        'data: {"id":"chatcmpl-0123456789abcdefghijklmnopqrs","object":"chat.completion.chunk","created":1790000000,'
        '"model":"gpt-4o-mini-2024-07-18","service_tier":"default","system_fingerprint":"fp_0123456789","choices":'
    )

    def event(delta: str, finish: str = "null", usage: str = "null") -> bytes:
        pad = f',"obfuscation":"{"x" * dice.randint(1, 14)}"' if obfuscation else ""
        choice = f'[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish}}}]'
        return f'{head}{choice},"usage":{usage}{pad}}}\n\n'.encode()

    first = event('{"role":"assistant","content":"","refusal":null}')
    text = [event(f'{{"content":"{dice.choice(WORDS)}"}}') for _ in range(200)]
    counts = '{"prompt_tokens":20,"completion_tokens":200,"total_tokens":220}'
    last = f'{head}[],"usage":{counts}}}\n\n'.encode()
    return [first, *text, event("{}", '"stop"'), last, b"data: [DONE]\n\n"]


def two_choices() -> list[bytes]:
    """n=2: events of two choices take turns, so that none looks like the one before."""
    pieces = chat(False)
    return [piece.replace(b'"index":0', b'"index":1') if i % 2 else piece for i, piece in enumerate(pieces)]


def responses() -> list[bytes]:
    """The Responses API."""
    dice = random.Random(7)
    created = '{"id":"resp_0123","object":"response","status":"%s","model":"gpt-4o-mini","usage":%s}'
    counts = '{"input_tokens":20,"output_tokens":200,"total_tokens":220}'

    def event(kind: str, rest: str) -> bytes:
        return f'event: {kind}\ndata: {{"type":"{kind}",{rest}}}\n\n'.encode()

    text = [
        event(
            "response.output_text.delta",
            f'"sequence_number":{n},"item_id":"msg_0123456789abcdef0123456789abcdef","output_index":0,"content_index":0,'
            f'"delta":"{dice.choice(WORDS)}","logprobs":[],"obfuscation":"{"x" * dice.randint(1, 14)}"',
        )
        for n in range(200)
    ]
    return [
        event("response.created", '"response":' + created % ("in_progress", "null")),
        *text,
        event("response.completed", '"response":' + created % ("completed", counts)),
    ]


def anthropic() -> list[bytes]:
    """Anthropic Messages."""
    dice = random.Random(7)

    def event(kind: str, rest: str) -> bytes:
        return f'event: {kind}\ndata: {{"type":"{kind}"{rest}}}\n\n'.encode()

    text = [
        event("content_block_delta", f',"index":0,"delta":{{"type":"text_delta","text":"{dice.choice(WORDS)}"}}')
        for _ in range(200)
    ]
    start = ',"message":{"id":"msg_01","type":"message","model":"claude","usage":{"input_tokens":20,"output_tokens":1}}'
    return [
        event("message_start", start),
        *text,
        event("message_delta", ',"delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":200}'),
        event("message_stop", ""),
    ]


class Nothing:
    """The loop's own cost: a method that is called and does nothing."""

    def feed(self, data: bytes) -> bool:
        return False


def nanoseconds(make: Callable[[], Callable[[bytes], object]], pieces: list[bytes], rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        started = time.process_time_ns()
        for _ in range(20):
            feed = make()
            for piece in pieces:
                feed(piece)
        best = min(best, (time.process_time_ns() - started) / 20 / len(pieces))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    url, kind = "https://api.openai.com/v1/chat/completions", "text/event-stream"
    streams = {
        "chat, usage:null": chat(False),
        "chat, usage:null, obfuscation": chat(True),
        "chat, n=2 in turns": two_choices(),
        "responses": responses(),
        "anthropic": anthropic(),
    }
    print(f"{'nanoseconds of CPU per piece':34}{'bytes':>7}{'nothing':>9}{'observe':>9}{'and hide':>10}")
    for name, pieces in streams.items():
        reader = make_reader(url, kind)
        for piece in pieces:
            reader.feed(piece)
        assert reader.usage is not None
        assert reader.usage.total_tokens == 220
        nothing = nanoseconds(lambda: Nothing().feed, pieces, rounds)
        observe = nanoseconds(lambda: make_reader(url, kind).feed, pieces, rounds)
        hide = nanoseconds(lambda: make_reader(url, kind, hide_usage_chunk=True).pass_through, pieces, rounds)
        size = sum(map(len, pieces)) // len(pieces)
        print(f"{name:34}{size:7}{nothing:9.0f}{observe:9.0f}{hide:10.0f}")


if __name__ == "__main__":
    main()
