"""What the tests of Google ADK share: runners over real HTTP to a Gemini of ours, and the embedded gate's books."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("google.adk", reason="Google ADK is not installed: pip install google-adk")

from gemini_upstream import GeminiUpstream
from google.adk.agents import LlmAgent
from google.adk.agents.run_config import RunConfig, StreamingMode
from google.adk.apps import App
from google.adk.models import Gemini
from google.adk.runners import InMemoryRunner
from google.genai import types

from vluna_llm import Vluna, call_context
from vluna_llm.integrations.google_adk import VlunaPlugin, wrap_model
from vluna_llm.sandbox import Sandbox

NAME = "gemini-2.5-flash"
FEATURE = f"google.{NAME}"
SSE = RunConfig(streaming_mode=StreamingMode.SSE)


QUESTION = types.Content(role="user", parts=[types.Part(text="What is a lighthouse for?")])


def text_of(event: Any) -> str:
    """What an event that is whole says."""
    parts = event.content.parts or [] if event.content and not event.partial else []
    return "".join(part.text or "" for part in parts)


def lookup(word: str) -> dict[str, str]:
    """Look a word up."""
    return {"meaning": f"of {word}"}


@dataclass
class Bench:
    """Makes models and runs agents for one customer, whose books it reads."""

    vluna: Vluna
    gate: Sandbox
    upstream: GeminiUpstream
    customer: str

    def gemini(self, name: str = NAME) -> Gemini:
        options = {"api_key": "none", "http_options": types.HttpOptions(base_url=self.upstream.host)}
        return Gemini(model=name, client_kwargs=options)

    def agent(self, model: Any = None, **options: Any) -> LlmAgent:
        return LlmAgent(name="helper", model=model or wrap_model(self.gemini(), self.vluna), **options)

    def plugin(self, **options: Any) -> VlunaPlugin:
        """The plugin, by which the user of a session pays, unless told otherwise."""
        return VlunaPlugin(self.vluna, **{"identity": lambda ctx: {"principal_id": ctx.user_id}, **options})

    async def events(
        self, agent: Any, *plugins: Any, user: str = "ann", stream: bool = False, **options: Any
    ) -> AsyncIterator[Any]:
        """One message of a user to a runner of its own."""
        runner = InMemoryRunner(app=App(name="tests", root_agent=agent, plugins=list(plugins), **options))
        session = await runner.session_service.create_session(app_name="tests", user_id=user)
        events = runner.run_async(
            user_id=user, session_id=session.id, new_message=QUESTION, run_config=SSE if stream else None
        )
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def said(self, agent: Any, *plugins: Any, **options: Any) -> str:
        """The text of the last event."""
        texts = [text async for event in self.events(agent, *plugins, **options) if (text := text_of(event))]
        return texts[-1] if texts else ""

    def run(self, program: Coroutine[Any, Any, Any], *, nobody: bool = False) -> Any:
        """Run it in a loop of its own, for the customer, until everything is settled."""

        async def main() -> Any:
            with call_context(principal_id=None if nobody else self.customer):
                return await program

        try:
            return asyncio.run(main())
        finally:
            assert self.vluna.flush(10)

    def books(self, customer: str | None = None) -> list[tuple[str, int]]:
        """What was charged, as (feature, quantity), in the gate's order."""
        entries = self.gate.booked(customer or self.customer).entries
        assert all(entry.status == "applied" for entry in entries)
        return [(entry.feature, entry.quantity) for entry in entries]

    def leases(self, customer: str | None = None) -> list[str]:
        return [lease.state for lease in self.gate.leases(customer or self.customer)]

    def labels(self, *names: str, customer: str | None = None) -> list[tuple[str, ...]]:
        """These labels of each booking, with its feature in front."""
        entries = self.gate.booked(customer or self.customer).entries
        return [(entry.feature, *(entry.labels.get(name, "") for name in names)) for entry in entries]

    def charged(self, times: int, customer: str | None = None) -> None:
        """So many model requests were asked for and charged in full, and nothing else was asked."""
        assert self.books(customer) == [(FEATURE, 120)] * times
        assert self.leases(customer) == ["closed"] * times

    def cancelled(self, *earlier: tuple[str, int]) -> None:
        """The last lease was given back; only what came earlier is charged."""
        assert self.books() == list(earlier)
        assert self.leases() == [*["closed"] * len(earlier), "canceled"]


@pytest.fixture(name="bench")
def bench_fixture(vluna: Vluna, shared_gate: Sandbox, customer: str) -> Iterator[Bench]:
    with GeminiUpstream() as upstream:
        upstream.released.clear()
        yield Bench(vluna, shared_gate, upstream, customer)


@pytest.fixture(name="stream", params=[False, True], ids=["whole", "sse"])
def stream_fixture(request: pytest.FixtureRequest) -> bool:
    """Whether the answer is streamed."""
    return request.param is True
