"""Gemini at the edge of the tests: a fake, small server that speaks ``generateContent`` and its event stream.

The numbers are those of `provider.Provider` in Gemini's words: 100 tokens read (40 of them cached), 15 written and 5
thought, so that every test counts with the same 120. ``script`` says what the model does, by the request's body and
the ``model`` of its path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from provider import CACHED, INPUT, OUTPUT, REASONING, WORDS, Provider, _Cut, _data, _Handler


@dataclass(frozen=True)
class Turn:
    """One answer: a text or calls of tools; with another ``status``, an error; ``finish`` is its finish reason.

    ``usage`` is reported with the answer; of a stream with every chunk (``each``), with its last, or not at all.
    """

    text: str = "word"
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    status: int = 200
    finish: str | None = "STOP"
    usage: str | None = "last"


Script = Callable[[dict[str, Any]], Turn]


def turns(*answers: Turn) -> Script:
    """The first answer for a conversation without one, the second after one, and so on; the last one for ever."""

    def script(body: dict[str, Any]) -> Turn:
        given = sum(content.get("role") == "model" for content in body["contents"])
        return answers[min(given, len(answers) - 1)]

    return script


def usage(share: float = 1.0) -> dict[str, Any]:
    """Usage after this share of the output."""
    visible, thoughts = round((OUTPUT - REASONING) * share), REASONING
    return {
        "promptTokenCount": INPUT,
        "cachedContentTokenCount": CACHED,
        "candidatesTokenCount": visible,
        "thoughtsTokenCount": thoughts,
        "totalTokenCount": INPUT + visible + thoughts,
    }


class GeminiUpstream(Provider):
    """The server; ``behaviour`` is as `provider.Provider` has it, ``script`` decides what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.script: Script = turns(Turn())
        self._server.RequestHandlerClass = type("Handler", (_Gemini,), {"owner": self})


class _Gemini(_Handler):
    owner: GeminiUpstream

    def _answer(self, path: str, body: Any) -> None:
        if self.owner.behaviour in ("silent", "down", "bad"):
            return super()._answer(path, body)
        model = path.rpartition("/models/")[2].partition(":")[0]
        turn = self.owner.script({**body, "model": model})
        if turn.status != 200:
            error = {"code": turn.status, "message": "scripted", "status": "INTERNAL"}
            return self._json({"error": error}, turn.status)
        if path.endswith(":streamGenerateContent"):
            return self._events(self._chunks(turn))
        answer = self._candidate(turn, turn.text, turn.finish)
        self._json({**answer, "usageMetadata": usage()} if turn.usage else answer)

    def _candidate(self, turn: Turn, text: str, finish: str | None) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{"text": text}] if text else []
        if turn.calls and (finish or not text):
            parts = [{"functionCall": {"name": name, "args": args}} for name, args in turn.calls]
        candidate: dict[str, Any] = {"index": 0, "content": {"role": "model", "parts": parts}}
        if finish:
            candidate["finishReason"] = finish
        return {"candidates": [candidate], "modelVersion": "gemini-fake", "responseId": "resp_1"}

    def _chunks(self, turn: Turn) -> Iterator[str]:
        for index in range(0 if turn.calls else WORDS):
            yield from self._misbehave(index)
            chunk = self._candidate(turn, f"{turn.text}{index} ", None)
            if turn.usage == "each":
                chunk["usageMetadata"] = usage(0.4)  # so that it does not matter after which one is left
            yield _data(chunk)
        if self.owner.behaviour == "hang_after_finish":
            self.owner.released.wait(20)
            raise _Cut
        time.sleep(0.01)
        last = self._candidate(turn, "" if turn.calls else "end", turn.finish)
        yield _data({**last, "usageMetadata": usage()} if turn.usage else last)
