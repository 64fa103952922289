"""One story for every framework, and what the gate's own books say of it.

A writer, who has a tool that is sold, uses it and then hands over to an editor, whose answer is streamed to the
consumer: three model calls and one tool. Each chapter of the story lets something happen in it. The models at the edge
are ours (`provider.Provider` and its kin), and each request in its turn may be answered in a way of its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai
from agent_provider import TEXT, AgentProvider, Say, call
from conftest import eventually
from gemini_upstream import GeminiUpstream, Turn
from provider import Provider, _data
from upstream import Upstream, _tool_call

from vluna_llm import Vluna
from vluna_llm.sandbox import Sandbox

TOOL = "tools.look_up"
EDITORS = 3
"""Which of the requests is the editor's."""


# -- the models --------------------------------------------------------------------------------------------------------


class _Planned:
    """Answers each request as the plan has it."""

    owner: Any
    command: str

    def _answer(self, path: str, body: Any) -> None:
        provider = type(self).owner
        provider.behaviour = provider.plan.get(len(provider.posts()), "ok")
        super()._answer(path, body)  # type: ignore[misc]


def planned(provider: Any) -> Any:
    """The provider, whose ``plan`` has the behaviour of each request by its number; ``ok`` where it has none."""
    provider.plan = {}
    kind = provider._server.RequestHandlerClass
    provider._server.RequestHandlerClass = type("Handler", (_Planned, kind), {"owner": provider})
    return provider


def openai_models() -> Any:
    """OpenAI's APIs: the model calls its tools in their order, two at once where they are branches."""
    provider = AgentProvider()

    def script(body: dict[str, Any]) -> Say:
        names = [tool.get("name") or tool["function"]["name"] for tool in body.get("tools") or ()]
        said = body["input"] if isinstance(body.get("input"), list) else body.get("messages") or []
        used = sum(item.get("type") == "function_call_output" or item.get("role") == "tool" for item in said)
        if "one" in names:
            return TEXT if used else call("one", "two")
        return call(names[used]) if used < len(names) else TEXT

    provider.script = script
    return planned(provider)


def gemini_models() -> Any:
    """Gemini's API, for ADK, whose tool for handing over has a name and an argument of its own."""
    upstream = GeminiUpstream()

    def script(body: dict[str, Any]) -> Turn:
        names = [one["name"] for tool in body.get("tools") or () for one in tool.get("functionDeclarations") or ()]
        used = sum("functionResponse" in part for content in body["contents"] for part in content["parts"])
        if "look_up" in names and not used:
            return Turn(calls=[("look_up", {})])
        return Turn(calls=[("transfer_to_agent", {"agent_name": "editor"})]) if "look_up" in names else Turn()

    upstream.script = script
    return planned(upstream)


class _Messages(_Planned):
    """Anthropic's streams with a call of a tool in them."""

    def _message_events(self, body: dict[str, Any]) -> Any:
        wanted = _tool_call(body)
        if wanted is None:
            yield from super()._message_events(body)  # type: ignore[misc]
            return

        def event(kind: str, **members: Any) -> str:
            return f"event: {kind}\n" + _data({"type": kind, **members})

        start = {**self._message(body, None), "usage": self._usage(1)}  # type: ignore[attr-defined]
        yield event("message_start", message=start)
        yield event("content_block_start", index=0, content_block={**wanted, "input": {}})
        yield event("content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": "{}"})
        yield event("content_block_stop", index=0)
        usage = {name: value for name, value in self._usage(20).items() if name.endswith("_tokens")}  # type: ignore[attr-defined]
        yield event("message_delta", delta={"stop_reason": "tool_use", "stop_sequence": None}, usage=usage)
        yield event("message_stop")


def anthropic_models() -> Any:
    """Anthropic's Messages."""
    provider: Any = Upstream()
    provider.plan = {}
    kind = provider._server.RequestHandlerClass
    provider._server.RequestHandlerClass = type("Handler", (_Messages, kind), {"owner": provider})
    return provider


# -- a chapter ---------------------------------------------------------------------------------------------------------


class Left(Exception):
    """The consumer has left."""


@dataclass
class Told:
    """What a run came to for the one who called it."""

    text: str = ""
    error: BaseException | None = None

    @property
    def same(self) -> tuple[str, type[BaseException] | None]:
        """By which two runs are compared."""
        return self.text, type(self.error) if self.error is not None else None


@dataclass
class Chapter:
    """One run of the story.

    Attributes:
        leave_at: after so many pieces of the editor's text the consumer leaves; never where it is 0.
        when_used: called by the tool.
        when_read: called with each piece of the editor's text.
        ready: what a branch waits for before it calls its model, by the branch's name.
        together: whether the branches are run in the place of the story.
    """

    leave_at: int = 0
    when_used: Callable[[], None] = lambda: None
    when_read: Callable[[], None] = lambda: None
    ready: dict[str, Callable[[], bool]] = field(default_factory=dict)
    together: bool = False
    _read: int = 0

    def read(self) -> bool:
        """A piece of the editor's text was read; whether the consumer leaves now."""
        self._read += 1
        self.when_read()
        return self._read == self.leave_at

    async def turn_of(self, branch: str) -> None:
        """Wait until it is this branch's turn."""
        if branch in self.ready:
            assert await asyncio.to_thread(eventually, self.ready[branch])


@dataclass
class Stage:
    """Where a framework plays the story.

    A subclass says how the story and its branches are played. ``vluna`` is None for a run without us, by which the
    others are measured.

    Attributes:
        writers, editors, others: the features of the models that the writer, the editor and the second branch have.
        parents: how many calls a parent makes before its branches do, and once more after them.
        labels: what is told of each booking.
        layered: whether what is below is metered as well, each layer by itself.
    """

    provider: Provider
    vluna: Vluna | None
    layered: bool = False
    closing: list[Any] = field(default_factory=list)

    name = ""
    package = ""
    writers = "openai.gpt-4o"
    editors = "openai.gpt-4o-mini"
    others = "openai.gpt-4.1"
    parents = 0
    labels: tuple[str, ...] = ()

    async def story(self, chapter: Chapter) -> str:
        """Play it, and give the editor's text."""
        raise NotImplementedError

    async def branches(self, chapter: Chapter) -> str:
        """Two agents at once, ``one`` and ``two``, each with a model of its own; both are streamed."""
        raise NotImplementedError

    def openai_client(self) -> Any:
        """A client of the provider, closed at the end."""
        client = openai.AsyncOpenAI(base_url=self.provider.base_url, api_key="sk", max_retries=0)
        self.closing.append(client)
        return self.vluna.wrap(client) if self.vluna is not None and self.layered else client

    async def play(self, chapter: Chapter) -> Told:
        """Play it to its end, whatever that is."""
        told = Told()
        asyncio.current_task().set_name("player")  # type: ignore[union-attr]
        try:
            told.text = await (self.branches(chapter) if chapter.together else self.story(chapter))
        except Left:
            told.text = "left"
        except BaseException as error:
            told.error = error
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:  # what runs on in the background belongs to the run
            await asyncio.wait(others, timeout=10)
        for client in self.closing:
            await client.close()
        self.closing.clear()
        return told


# -- the books ---------------------------------------------------------------------------------------------------------


def bill_of(gate: Sandbox, customer: str, stage: type[Stage]) -> str:
    """What was charged, in words, and how many leases were given back, by the gate's own books."""
    entries = gate.booked(customer).entries
    assert all(entry.kind == "commit" and entry.status == "applied" for entry in entries), entries
    models = [entry for entry in entries if entry.feature != TOOL]
    assert {entry.quantity for entry in models} <= {120}, entries
    assert {entry.feature for entry in models} <= {stage.writers, stage.editors, stage.others}, entries
    assert len({entry.labels["operation_id"] for entry in entries}) == len(entries), "an operation was charged twice"
    states = Counter(lease.state for lease in gate.leases(customer))
    assert states["closed"] == len(entries), (states, entries)
    assert set(states) <= {"closed", "canceled"}, states
    tools = len(entries) - len(models)
    charged = [f"{len(models)} call{'s' * (len(models) != 1)}"] if models else []
    charged += ["tool"] if tools == 1 else [f"{tools} tools"] if tools else []
    given_back = [f"{states['canceled']} cancelled"] if states["canceled"] else []
    return "; ".join([" + ".join(charged) or "nothing", *given_back])
