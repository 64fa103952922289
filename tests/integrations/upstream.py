"""The provider at the edge of the tests: all that `provider.Provider` speaks, Anthropic's Messages, and replay.

Anthropic's numbers are those of the other APIs in other words: 100 tokens read, of which 40 came from the cache and 24
were put into it, and 20 written, so that every test counts with the same 120.

A recorded answer is served under an address of its own (`Upstream.replay`), byte for byte, whatever is asked; so any
number of them may be under way at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from provider import CACHED, INPUT, OUTPUT, WORDS, Provider, _Cut, _data, _Handler

WRITTEN = 24
FRESH = INPUT - CACHED - WRITTEN


@dataclass(frozen=True)
class Recorded:
    """An answer to be given again."""

    status: int
    content_type: str
    body: bytes
    stream: bool


class Upstream(Provider):
    """The server; ``behaviour`` is as `provider.Provider` has it, for Anthropic's Messages, too.

    ``no_usage`` leaves usage out of Anthropic's answers, which the real one never does; ``old_delta`` has only
    ``output_tokens`` in ``message_delta``, as older models do; ``thinking`` puts thinking before the answer; ``busy``
    (529, then ok), ``limited`` (429 for ever); ``searched`` (a server tool was used). A request with tools is answered
    by a call of the first one until it brings a result; one with an output format by JSON. The model ``cautious``
    refuses, and streams nothing before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: dict[str, Recorded] = {}
        self._server.RequestHandlerClass = type("Handler", (_UpstreamHandler,), {"owner": self})

    @property
    def anthropic_base(self) -> str:
        """What a client is given as the address of Anthropic."""
        return f"{self.host}/anthropic"

    def replay(self, key: str, answer: Recorded) -> str:
        """An address under which every request gets this answer; paths may be added to it."""
        self.recorded[key] = answer
        return f"{self.host}/recorded/{key}"


class _UpstreamHandler(_Handler):
    owner: Upstream

    def _answer(self, path: str, body: Any) -> None:
        if path.startswith("/recorded/"):
            return self._replay(self.owner.recorded[path.split("/")[2]])
        if path.startswith("/anthropic/") and not path.endswith("/messages"):
            known = _others(path)
            if known is not None:
                return self._json(known)
            return self._json({"type": "error", "error": {"type": "not_found_error", "message": "no such path"}}, 404)
        how = self.owner.behaviour
        if path.startswith("/anthropic/") and how not in ("silent", "html", "broken"):
            if how == "down" or (how == "flaky" and not self._flaked()):
                return self._anthropic_error(500, "api_error")
            if how == "busy" and not self._flaked():
                return self._anthropic_error(529, "overloaded_error")
            if how == "limited":
                return self._anthropic_error(429, "rate_limit_error")
            if how == "bad":
                return self._anthropic_error(400, "invalid_request_error")
            return self._messages(body)
        return super()._answer(path, body)

    def _replay(self, answer: Recorded) -> None:
        self.send_response(answer.status)
        self.send_header("content-type", answer.content_type)
        self.send_header("content-length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    # -- Anthropic's Messages ----------------------------------------------------------------------------------------

    def _anthropic_error(self, status: int, kind: str) -> None:
        self._json({"type": "error", "error": {"type": kind, "message": "as told"}}, status)

    def _usage(self, output: int) -> dict[str, Any]:
        searched = {"server_tool_use": {"web_search_requests": 1}} if self.owner.behaviour == "searched" else {}
        return {
            **searched,
            "input_tokens": FRESH,
            "cache_read_input_tokens": CACHED,
            "cache_creation_input_tokens": WRITTEN,
            "cache_creation": {"ephemeral_5m_input_tokens": WRITTEN, "ephemeral_1h_input_tokens": 0},
            "output_tokens": output,
            "service_tier": "standard",
        }

    def _messages(self, body: dict[str, Any]) -> None:
        if body.get("stream") and self.owner.behaviour != "json":
            return self._events(self._message_events(body))
        answer = self._message(body, "end_turn")
        answer["content"] = [{"type": "text", "text": "hello world"}]
        if call := _tool_call(body):
            answer |= {"content": [call], "stop_reason": "tool_use"}
        elif "output_config" in body or "output_format" in body:
            answer["content"] = [{"type": "text", "text": '{"answer": 42}'}]
        if body["model"] == "cautious":
            answer["stop_reason"] = "refusal"
        if self.owner.behaviour == "thinking":
            answer["content"].insert(0, {"type": "thinking", "thinking": "what could they mean?", "signature": "c2ln"})
        if self.owner.behaviour == "length":
            answer["stop_reason"] = "max_tokens"
        if self.owner.behaviour != "no_usage":
            answer["usage"] = self._usage(OUTPUT)
        self._json(answer)

    def _message(self, body: dict[str, Any], stop: str | None) -> dict[str, Any]:
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": [],
            "stop_reason": stop,
            "stop_sequence": None,
        }

    def _message_events(self, body: dict[str, Any]) -> Iterator[str]:
        how = self.owner.behaviour

        def event(kind: str, **members: Any) -> str:
            return f"event: {kind}\n" + _data({"type": kind, **members})

        start = self._message(body, None)
        if how != "no_usage":
            start["usage"] = self._usage(1)
        yield event("message_start", message=start)
        if how == "thinking":
            yield event(
                "content_block_start", index=0, content_block={"type": "thinking", "thinking": "", "signature": ""}
            )
            yield event(
                "content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "what do they mean?"}
            )
            yield event("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "c2ln"})
            yield event("content_block_stop", index=0)
        if body["model"] != "cautious":
            yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        yield event("ping")
        for index in range(0 if body["model"] == "cautious" else WORDS):
            if index == 2 and how == "error_event":
                yield event("error", error={"type": "overloaded_error", "message": "overloaded"})
                return
            if index != 2 or how not in ("error_event", "error_with_usage"):
                yield from self._misbehave(index)
            yield event("content_block_delta", index=0, delta={"type": "text_delta", "text": f"word{index} "})
        if body["model"] != "cautious":
            yield event("content_block_stop", index=0)
        stop = "refusal" if body["model"] == "cautious" else "max_tokens" if how == "length" else "end_turn"
        delta: dict[str, Any] = {"delta": {"stop_reason": stop}}
        delta["delta"]["stop_sequence"] = None
        if how == "old_delta":
            delta["usage"] = {"output_tokens": OUTPUT}
        elif how != "no_usage":
            delta["usage"] = {name: value for name, value in self._usage(OUTPUT).items() if name.endswith("_tokens")}
        yield event("message_delta", **delta)
        if how == "hang_after_finish":
            self.owner.released.wait(20)
            raise _Cut
        yield event("message_stop")


def _tool_call(body: dict[str, Any]) -> dict[str, Any] | None:
    """A call of the first tool, until a result of it has come."""
    own = [tool for tool in body.get("tools") or () if "input_schema" in tool]
    if not own or "tool_result" in json.dumps(body["messages"][-1]):
        return None
    return {"type": "tool_use", "id": "toolu_1", "name": own[0]["name"], "input": {}}


def _others(path: str) -> dict[str, Any] | None:
    """What is answered at Anthropic's other addresses; None for one that nobody knows."""
    return {
        "/anthropic/v1/messages/count_tokens": {"input_tokens": 100},
        "/anthropic/v1/messages/batches": {"id": "msgbatch_1", "type": "message_batch", "processing_status": "ended"},
        "/anthropic/v1/models": {"data": [], "has_more": False, "first_id": None, "last_id": None},
        "/anthropic/v1/files": {"data": [], "has_more": False, "first_id": None, "last_id": None},
        "/anthropic/v1/agents": {"id": "agent_1", "type": "agent"},
        "/anthropic/v1/sessions": {"id": "sesn_1", "type": "session"},
        "/anthropic/v1/complete": {
            "id": "compl_1",
            "type": "completion",
            "completion": " hello",
            "stop_reason": "stop_sequence",
            "model": "claude-2.1",
        },
    }.get(path)
