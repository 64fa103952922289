"""The model provider of the agents' tests: `provider.Provider`, with a script of what the model does next.

``script`` is asked about each request that creates, by its body, and says how it is answered: with calls of tools, or
with text; and in which way the answer goes wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from provider import Provider, _data, _Handler

QUANTITY = 120
"""The tokens of any answer."""


@dataclass(frozen=True)
class Say:
    """How a request is answered: calls of these tools, or text where there are none."""

    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    behaviour: str | None = None


TEXT = Say()


def call(*names: str, behaviour: str | None = None, **arguments: Any) -> Say:
    """An answer that calls these tools, each with the same arguments."""
    return Say(tuple((name, arguments) for name in names), behaviour)


def has_results(body: Any) -> bool:
    """Whether a tool has answered the model already."""
    return any(
        item.get("type") == "function_call_output" or item.get("role") == "tool"
        for item in (body.get("input") if isinstance(body.get("input"), list) else body.get("messages") or [])
    )


class _View:
    """The provider as one request sees it: with a behaviour of its own."""

    def __init__(self, provider: Any, behaviour: str) -> None:
        self._provider = provider
        self.behaviour = behaviour

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)


class _ScriptedHandler(_Handler):
    said: Say = TEXT

    def _answer(self, path: str, body: Any) -> None:
        provider: Any = type(self).owner
        self.said = TEXT
        if self.command == "POST" and isinstance(body, dict):
            self.said = provider.script(body)
        self.owner = _View(provider, self.said.behaviour or provider.behaviour)  # type: ignore[assignment]
        super()._answer(path, body)

    # -- Responses ---------------------------------------------------------------------------------------------------

    def _items(self) -> list[dict[str, Any]]:
        return [
            {
                "type": "function_call",
                "id": f"fc_{index}",
                "call_id": f"call_{id(self)}_{len(type(self).owner.requests)}_{index}",
                "name": name,
                "arguments": json.dumps(arguments),
                "status": "completed",
            }
            for index, (name, arguments) in enumerate(self.said.calls)
        ]

    def _response(self, body: dict[str, Any], response_id: str, status: str) -> dict[str, Any]:
        answer = super()._response(body, response_id, status)
        if self.said.calls and answer["output"]:
            answer["output"] = self._items()
        return answer

    def _response_events(self, body: dict[str, Any], response_id: str) -> Iterator[str]:
        if not self.said.calls:
            yield from super()._response_events(body, response_id)
            return
        events: list[dict[str, Any]] = [
            {"type": "response.created", "response": self._response(body, response_id, "in_progress")}
        ]
        done = self._response(body, response_id, "completed")
        for index, item in enumerate(done["output"]):
            place = {"item_id": item["id"], "output_index": index}
            arguments = item["arguments"]
            events += [
                {"type": "response.output_item.added", "output_index": index, "item": {**item, "arguments": ""}},
                {"type": "response.function_call_arguments.delta", "delta": arguments, **place},
                {"type": "response.output_item.done", "output_index": index, "item": item},
            ]
        events.append({"type": "response.completed", "response": done})
        for number, event in enumerate(events):
            yield f"event: {event['type']}\n" + _data({"sequence_number": number, **event})

    # -- Chat Completions --------------------------------------------------------------------------------------------

    def _tool_calls(self) -> list[dict[str, Any]]:
        return [
            {"id": item["call_id"], "type": "function", "function": {k: item[k] for k in ("name", "arguments")}}
            for item in self._items()
        ]

    def _json(self, value: Any, status: int = 200) -> None:
        if self.said.calls and isinstance(value, dict) and value.get("object") == "chat.completion":
            (choice,) = value["choices"]
            choice["message"].update(content=None, tool_calls=self._tool_calls())
            choice["finish_reason"] = "tool_calls"
        super()._json(value, status)

    def _chat_events(self, body: dict[str, Any], model: str) -> Iterator[str]:
        if not self.said.calls:
            yield from super()._chat_events(body, model)
            return
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": model}
        calls = [{"index": index, **one} for index, one in enumerate(self._tool_calls())]
        for delta, finish in (({"role": "assistant", "tool_calls": calls}, None), ({}, "tool_calls")):
            yield _data({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})
        if (body.get("stream_options") or {}).get("include_usage"):
            yield _data({**head, "choices": [], "usage": self._chat_usage()})
        yield "data: [DONE]\n\n"


class AgentProvider(Provider):
    """The provider with a script; without one every answer is text."""

    handler = _ScriptedHandler

    def __init__(self) -> None:
        super().__init__()
        self.script: Callable[[dict[str, Any]], Say] = lambda body: TEXT

    def says(self, *answers: Say) -> None:
        """Answer the requests in this order, and with text ever after."""
        waiting = list(answers)
        self.script = lambda body: waiting.pop(0) if waiting else TEXT
