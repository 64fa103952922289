"""The provider of `provider.py` with a script: what the model says, turn by turn, tool calls included."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from provider import WORDS, Provider, _Cut, _data, _Handler


@dataclass(frozen=True)
class Step:
    """One answer: a text, or calls of tools (name, arguments); ``status`` for an error instead.

    ``finish_with_text`` sends the finish reason in the same chunk as the last word, as some providers do; what is
    ``unreadable`` reports usage beside a choice that is none.
    """

    text: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    status: int = 200
    pause: float = 0.0
    finish_with_text: bool = False
    hang_after_finish: bool = False
    unreadable: bool = False

    def tool_calls(self) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "id": f"call_{index}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments)},
            }
            for index, (name, arguments) in enumerate(self.calls)
        ]


Script = Callable[[dict[str, Any]], Step | None]


def turns(*steps: Step) -> Script:
    """The first step for a conversation without an answer, the second after one, and so on; the last one for ever."""

    def script(body: dict[str, Any]) -> Step:
        answers = sum(message["role"] == "assistant" for message in body["messages"])
        return steps[min(answers, len(steps) - 1)]

    return script


class ScriptedProvider(Provider):
    """Answers chat completions by ``script``; without one, or where it gives None, as `Provider` does."""

    def __init__(self) -> None:
        super().__init__()
        self.script: Script | None = None
        provider = self

        class Handler(_Scripted):
            owner = provider

        self._server.RequestHandlerClass = Handler


class _Scripted(_Handler):
    owner: ScriptedProvider

    def _answer(self, path: str, body: Any) -> None:
        if not path.endswith("/responses/compact"):
            return super()._answer(path, body)
        item = {"id": "cmp_1", "type": "compaction", "encrypted_content": "c2hvcnQ="}
        usage = self._response_usage()
        self._json({"id": "resp_c", "object": "response.compaction", "created_at": 1, "output": [item], "usage": usage})

    def _chat(self, body: dict[str, Any]) -> None:
        step = self.owner.script(body) if self.owner.script is not None else None
        if step is None:
            return super()._chat(body)
        time.sleep(step.pause)
        if step.status != 200:
            return self._json({"error": {"message": "scripted", "type": "server_error"}}, step.status)
        if body.get("stream"):
            return self._events(self._scripted_events(step, body))
        message: dict[str, Any] = {"role": "assistant", "content": step.text or None, "refusal": None}
        if step.calls:
            message["tool_calls"] = step.tool_calls()
        finish = "tool_calls" if step.calls else "stop"
        choice: Any = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        if step.unreadable:
            choice = {**choice, "message": "none"}
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"]}
        self._json({**head, "choices": [choice], "usage": self._chat_usage()})

    def _scripted_events(self, step: Step, body: dict[str, Any]) -> Iterator[str]:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}

        def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
            return _data({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None})

        yield chunk({"role": "assistant", "content": ""})
        words = WORDS if step.text else 0
        for index in range(words):
            yield from self._misbehave(index)
            last = step.finish_with_text and index == words - 1
            yield chunk({"content": f"{step.text}{index} "}, "stop" if last else None)
        if step.calls:
            yield chunk({"tool_calls": step.tool_calls()})
        if not step.finish_with_text:
            yield chunk({}, "tool_calls" if step.calls else "stop")
        if step.hang_after_finish:
            self.owner.released.wait(20)
            raise _Cut
        if (body.get("stream_options") or {}).get("include_usage"):
            yield _data({**head, "choices": [], "usage": self._chat_usage()})
        yield "data: [DONE]\n\n"
