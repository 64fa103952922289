"""The story of `story.py`, played by each framework as its users would write it. Each stage imports its framework."""

from __future__ import annotations

import asyncio
import importlib
from contextlib import aclosing
from typing import Any

from story import TOOL, Chapter, Left, Stage, anthropic_models, gemini_models, openai_models


class Agents(Stage):
    """The OpenAI Agents SDK: a handoff, a gated tool, and branches that are tools in which agents run."""

    models = openai_models
    package = "agents"
    parents = 1
    labels = ("run_id", "agent")

    def _config(self) -> Any:
        import agents

        agents.set_trace_processors([])  # runs are traced, and nobody is sent anything
        agents.set_tracing_disabled(False)
        inner: Any = agents.OpenAIProvider(openai_client=self.openai_client(), use_responses=True)
        if self.vluna is not None:
            from vluna_llm.integrations.openai_agents import VlunaModelProvider

            inner = VlunaModelProvider(self.vluna, inner)
        return agents.RunConfig(model_provider=inner)

    async def story(self, chapter: Chapter) -> str:
        import agents

        @agents.function_tool
        async def look_up() -> str:
            """Looks it up."""
            chapter.when_used()
            return "found"

        if self.vluna is not None:
            from vluna_llm.integrations.openai_agents import gated_tool

            look_up = gated_tool(feature_code=TOOL, vluna=self.vluna)(look_up)
        editor = agents.Agent(name="editor", model="gpt-4o-mini")
        writer = agents.Agent(name="writer", model="gpt-4o", tools=[look_up], handoffs=[editor])
        result = agents.Runner.run_streamed(writer, "hi", run_config=self._config())
        text = ""
        async with aclosing(result.stream_events()) as events:
            async for event in events:
                if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                    text += event.data.delta
                    if chapter.read():
                        raise Left
        return text

    async def branches(self, chapter: Chapter) -> str:
        import agents

        config = self._config()

        def branch(name: str, model: str) -> Any:
            agent = agents.Agent(name=name, model=model)

            @agents.function_tool(name_override=name, failure_error_function=None)
            async def ask() -> str:
                """Asks."""
                await chapter.turn_of(name)
                result = agents.Runner.run_streamed(agent, "hi", run_config=config)
                async for _ in result.stream_events():
                    pass
                return str(result.final_output)

            if self.vluna is None:
                return ask
            from vluna_llm.integrations.openai_agents import surface_refusals

            return surface_refusals(ask)

        parent = agents.Agent(
            name="parent", model="gpt-4o", tools=[branch("one", "gpt-4o-mini"), branch("two", "gpt-4.1")]
        )
        return str((await agents.Runner.run(parent, "hi", run_config=config)).final_output)


class LangGraph(Stage):
    """LangChain's agents in a graph of LangGraph, with parallel nodes."""

    models = openai_models
    package = "langchain_openai"
    labels = ("run_id", "node")

    def _model(self, name: str) -> Any:
        from langchain_openai import ChatOpenAI

        given: dict[str, Any] = {}
        if self.layered:
            client = self.openai_client()
            given = {"root_async_client": client, "async_client": client.chat.completions}
        model = ChatOpenAI(model=name, api_key="sk", base_url=self.provider.base_url, max_retries=0, **given)
        if self.vluna is None:
            return model
        from vluna_llm.integrations.langchain import wrap_model

        return wrap_model(model, self.vluna)

    async def story(self, chapter: Chapter) -> str:
        from langchain.agents import create_agent
        from langchain_core.tools import tool
        from langgraph.graph import END, START, MessagesState, StateGraph
        from langgraph.types import Command

        @tool
        async def look_up() -> str:
            """Looks it up."""
            chapter.when_used()
            return "found"

        @tool
        async def hand_over() -> Any:
            """Hands over to the editor."""
            return Command(goto="editor", graph=Command.PARENT)

        middleware: list[Any] = []
        if self.vluna is not None:
            from vluna_llm.integrations.langchain import VlunaMiddleware

            middleware = [VlunaMiddleware(self.vluna, tools={"look_up": TOOL})]
        graph = StateGraph(MessagesState)
        writer = create_agent(self._model("gpt-4o"), [look_up, hand_over], middleware=middleware)
        graph.add_node("writer", writer, destinations=("editor",))
        graph.add_node("editor", create_agent(self._model("gpt-4o-mini"), []))
        graph.add_edge(START, "writer")
        graph.add_edge("editor", END)
        text = ""
        pieces = graph.compile().astream({"messages": [("user", "hi")]}, stream_mode="messages", subgraphs=True)
        async with aclosing(pieces) as steps:
            async for _, (message, _) in steps:
                if message.type == "AIMessageChunk" and message.text:
                    text += message.text
                    if chapter.read():
                        raise Left
        return text

    async def branches(self, chapter: Chapter) -> str:
        from langgraph.graph import START, MessagesState, StateGraph

        graph = StateGraph(MessagesState)

        def branch(name: str, model: Any) -> None:
            async def ask(state: Any) -> Any:
                await chapter.turn_of(name)
                return {"messages": [await model.ainvoke("hi", stream=True)]}

            graph.add_node(name, ask)
            graph.add_edge(START, name)

        branch("one", self._model("gpt-4o-mini"))
        branch("two", self._model("gpt-4.1"))
        return "".join(message.text for message in (await graph.compile().ainvoke({"messages": []}))["messages"])


class PydanticAI(Stage):
    """Pydantic AI: two agents in turn, and branches that are tools in which agents run."""

    models = openai_models
    package = "pydantic_ai"
    parents = 1
    labels = ("run_id", "agent")

    def _agent(self, name: str, model: str, **options: Any) -> Any:
        import pydantic_ai
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        client = self.openai_client()
        if self.vluna is not None:
            from vluna_llm.integrations.pydantic_ai import VlunaCapability

            options["capabilities"] = [VlunaCapability(self.vluna, tools={"look_up": TOOL})]
        return pydantic_ai.Agent(
            OpenAIChatModel(model, provider=OpenAIProvider(openai_client=client)), name=name, **options
        )

    async def story(self, chapter: Chapter) -> str:
        from pydantic_ai import AgentRunResultEvent

        async def look_up() -> str:
            """Looks it up."""
            chapter.when_used()
            return "found"

        writer = self._agent("writer", "gpt-4o", tools=[look_up])
        editor = self._agent("editor", "gpt-4o-mini")
        handed = None
        async with writer.run_stream_events("hi") as events:
            async for event in events:
                if isinstance(event, AgentRunResultEvent):
                    handed = event.result
        assert handed is not None
        text = ""
        async with editor.run_stream("go on", message_history=handed.all_messages()) as stream:
            async for piece in stream.stream_text(delta=True, debounce_by=None):
                text += piece
                if chapter.read():
                    raise Left
        return text

    async def branches(self, chapter: Chapter) -> str:
        def branch(name: str, model: str) -> Any:
            agent = self._agent(name, model)

            async def ask() -> str:
                """Asks."""
                await chapter.turn_of(name)
                async with agent.run_stream("hi") as stream:
                    return str(await stream.get_output())

            ask.__name__ = name
            return ask

        parent = self._agent("parent", "gpt-4o", tools=[branch("one", "gpt-4o-mini"), branch("two", "gpt-4.1")])
        return str((await parent.run("hi")).output)


class Adk(Stage):
    """Google ADK: a transfer to a sub-agent, and a ParallelAgent."""

    models = gemini_models
    package = "google.adk"
    labels = ("run_id", "agent")
    writers = "google.gemini-2.5-pro"
    editors = "google.gemini-2.5-flash"
    others = "google.gemini-3-pro"

    def _model(self, name: str) -> Any:
        from google.adk.models import Gemini
        from google.genai import types

        options = {"api_key": "none", "http_options": types.HttpOptions(base_url=self.provider.host)}
        model = Gemini(model=name, client_kwargs=options)
        if self.vluna is None:
            return model
        from vluna_llm.integrations.google_adk import wrap_model

        return wrap_model(wrap_model(model, self.vluna) if self.layered else model, self.vluna)

    async def _run(self, agent: Any, chapter: Chapter) -> list[str]:
        from google.adk.agents.run_config import RunConfig, StreamingMode
        from google.adk.apps import App
        from google.adk.runners import Runner
        from google.adk.sessions import InMemorySessionService
        from google.genai import types

        plugins = []
        if self.vluna is not None:
            from vluna_llm.integrations.google_adk import VlunaPlugin

            plugins = [VlunaPlugin(self.vluna, tools={"look_up": TOOL})]
        sessions = InMemorySessionService()
        session = await sessions.create_session(app_name="tests", user_id="ann")
        runner = Runner(app=App(name="tests", root_agent=agent, plugins=plugins), session_service=sessions)
        pieces = []
        run = runner.run_async(
            user_id="ann",
            session_id=session.id,
            new_message=types.Content(role="user", parts=[types.Part(text="hi")]),
            run_config=RunConfig(streaming_mode=StreamingMode.SSE),
        )
        async with aclosing(run) as events:
            async for event in events:
                for part in event.content.parts if event.content and event.partial else ():
                    if part.text:
                        pieces.append(part.text)
                        if chapter.read():
                            raise Left
        return pieces

    async def story(self, chapter: Chapter) -> str:
        from google.adk.agents import LlmAgent

        async def look_up() -> str:
            """Looks it up."""
            chapter.when_used()
            return "found"

        editor = LlmAgent(name="editor", model=self._model("gemini-2.5-flash"))
        writer = LlmAgent(name="writer", model=self._model("gemini-2.5-pro"), tools=[look_up], sub_agents=[editor])
        return "".join(await self._run(writer, chapter))

    async def branches(self, chapter: Chapter) -> str:
        from google.adk.agents import LlmAgent, ParallelAgent

        def branch(name: str, model: str) -> Any:
            async def ready(callback_context: Any) -> None:
                await chapter.turn_of(name)

            return LlmAgent(name=name, model=self._model(model), before_agent_callback=ready)

        both = [branch("one", "gemini-2.5-flash"), branch("two", "gemini-3-pro")]
        pieces = await self._run(ParallelAgent(name="parent", sub_agents=both), chapter)
        return "".join(sorted(pieces))  # those of both come as they come


class Anthropic(Stage):
    """Anthropic's client: its tool runner, then a stream; and two streams in a task group."""

    models = anthropic_models
    package = "anthropic"
    writers = "anthropic.claude-sonnet-5"
    editors = "anthropic.claude-haiku-5"
    others = "anthropic.claude-opus-5"

    def _client(self) -> Any:
        import anthropic

        given: dict[str, Any] = {}
        if self.layered:
            from vluna_llm.integrations.httpx import AsyncMeteringTransport

            http = importlib.import_module(anthropic.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])
            below = AsyncMeteringTransport(http.AsyncHTTPTransport(), self.vluna)
            given["http_client"] = http.AsyncClient(transport=below)
        base_url = self.provider.anthropic_base
        client = anthropic.AsyncAnthropic(base_url=base_url, api_key="sk", max_retries=0, **given)
        self.closing.append(client)
        return client if self.vluna is None else self.vluna.wrap(client)

    def _asked(self, model: str, said: str = "hi") -> dict[str, Any]:
        return {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": said}]}

    async def story(self, chapter: Chapter) -> str:
        import anthropic

        client = self._client()

        async def look_up() -> str:
            """Looks it up."""
            chapter.when_used()
            return "found"

        sold = self.vluna.operation(feature_code=TOOL, estimate=1)(look_up) if self.vluna is not None else look_up
        tools = [anthropic.beta_async_tool(sold)]
        turns = client.beta.messages.tool_runner(**self._asked("claude-sonnet-5"), tools=tools, stream=True)
        said: list[Any] = []
        async for turn in turns:
            said = [(await turn.get_final_message()).content]
        text = ""
        async with client.messages.stream(**self._asked("claude-haiku-5", said[0][0].text)) as stream:
            async for piece in stream.text_stream:
                text += piece
                if chapter.read():
                    raise Left
        return text

    async def branches(self, chapter: Chapter) -> str:
        client = self._client()

        async def ask(name: str, model: str) -> str:
            await chapter.turn_of(name)
            async with client.messages.stream(**self._asked(model)) as stream:
                return str(await stream.get_final_text())

        both = [asyncio.ensure_future(ask("one", "claude-haiku-5")), asyncio.ensure_future(ask("two", "claude-opus-5"))]
        try:
            return "".join(await asyncio.gather(*both))
        finally:
            for one in both:
                one.cancel()


STAGES: dict[str, Any] = {
    "OpenAI Agents SDK": Agents,
    "LangChain, LangGraph": LangGraph,
    "Pydantic AI": PydanticAI,
    "Google ADK": Adk,
    "Anthropic": Anthropic,
}
