"""The frameworks around and inside each other: one model of an application's own for each, over any source of texts.

What such a model tells its framework of its usage is wrong on purpose (`nested_stage.OWN_TOKENS`), so that the books
show who has settled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import agents
import litellm
import pydantic_ai
from agents.extensions.models.litellm_model import LitellmModel
from agents.testing import assistant_message
from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_litellm import ChatLiteLLM
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from litellm.types.utils import GenericStreamingChunk
from nested_stage import HI, OWN_TOKENS, Source, Stage, Texts, all_of, chat_texts, http_library, paid, piped
from openai.types.responses import Response, ResponseCompletedEvent, ResponseTextDeltaEvent, ResponseUsage
from pydantic_ai.messages import ModelResponse, TextPart
from pydantic_ai.models import StreamedResponse
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.providers.litellm import LiteLLMProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import RequestUsage

from vluna_llm.context import make_context
from vluna_llm.integrations.httpx import AsyncMeteringTransport
from vluna_llm.integrations.langchain import wrap_model
from vluna_llm.integrations.openai_agents import VlunaModel, VlunaModelProvider, VlunaRunHooks, surface_refusals
from vluna_llm.integrations.pydantic_ai import VlunaCapability
from vluna_llm.integrations.pydantic_ai import VlunaModel as PydanticVlunaModel

READ, WRITTEN = OWN_TOKENS - 3, 3
Open = Callable[[bool], Texts]
"""The call inside, plain or streamed."""


# -- OpenAI Agents SDK -------------------------------------------------------------------------------------------------


class AgentsOver(agents.Model):
    def __init__(self, inner: Open) -> None:
        self.inner = inner
        self.model = "own/model"

    async def get_response(self, *args: Any, **kwargs: Any) -> Any:
        text = await all_of(self.inner(False))
        usage = agents.Usage(requests=1, input_tokens=READ, output_tokens=WRITTEN, total_tokens=OWN_TOKENS)
        return agents.ModelResponse(output=[assistant_message(text)], usage=usage, response_id=None)

    async def stream_response(self, *args: Any, **kwargs: Any) -> Any:
        said = ""
        place: dict[str, Any] = {"item_id": "m", "output_index": 0, "content_index": 0, "logprobs": []}
        async with aclosing(self.inner(True)) as texts:  # type: ignore[type-var]
            async for text in texts:
                said += text
                yield ResponseTextDeltaEvent(
                    type="response.output_text.delta", delta=text, sequence_number=len(said), **place
                )
        details = {"input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}}
        usage = ResponseUsage.model_validate(
            {
                "input_tokens": READ,
                "output_tokens": WRITTEN,
                "total_tokens": OWN_TOKENS,
                **details,
                "output_tokens_details": {"reasoning_tokens": 0},
            }
        )
        response = Response(
            id="resp_own",
            created_at=1,
            model="own",
            object="response",
            output=[assistant_message(said)],
            parallel_tool_calls=False,
            tool_choice="auto",
            tools=[],
            usage=usage,
        )
        yield ResponseCompletedEvent(type="response.completed", response=response, sequence_number=len(said) + 1)


async def agents_run(model: Any, stream: bool, *, tools: Any = (), config: Any = None, **options: Any) -> Texts:
    """A run of an agent with this model."""
    agent = agents.Agent(name="helper", model=model, tools=list(tools))
    config = config or agents.RunConfig(tracing_disabled=True)
    if not stream:
        yield (await agents.Runner.run(agent, "hi", run_config=config, **options)).final_output
        return
    result = agents.Runner.run_streamed(agent, "hi", run_config=config, **options)
    try:
        async for event in result.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                yield event.data.delta
    finally:
        result.cancel()


def agents_model(stage: Stage, inner: Open, stream: bool, payer: str | None) -> Texts:
    """`VlunaModel`; the surrounding context pays."""
    return agents_run(VlunaModel(AgentsOver(inner), stage.vluna), stream)


class _Models(agents.ModelProvider):
    def __init__(self, inner: Open) -> None:
        self.inner = inner

    def get_model(self, model_name: str | None) -> Any:
        return AgentsOver(self.inner)


def agents_provider(stage: Stage, inner: Open, stream: bool, payer: str | None) -> Texts:
    """`VlunaModelProvider`; with a payer by the run's own context."""
    options: dict[str, Any] = {}
    identity = None
    if payer is not None:
        identity = lambda me: {"principal_id": me}  # noqa: E731
        options = {"context": payer, "hooks": VlunaRunHooks()}
    provider = VlunaModelProvider(stage.vluna, _Models(inner), identity=identity)
    config = agents.RunConfig(model_provider=provider, tracing_disabled=True)
    return agents_run("any", stream, config=config, **options)


def agents_chat(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """The SDK's own model, metered by its client."""
    client = stage.client() if payer is None else stage.metered(stage.client(), payer)
    return agents_run(VlunaModel(agents.OpenAIChatCompletionsModel("gpt-4o", client), stage.vluna), stream)


def agents_installed(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """A model by its name, after ``install()``; it bills whoever pays for the surrounding work."""
    return agents_run("gpt-4o", stream)


def litellm_model(stage: Stage) -> Any:
    """The Agents SDK's model over LiteLLM."""
    return LitellmModel("openai/gpt-4o", base_url=stage.upstream.base_url, api_key="sk")


def agents_litellm(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """LiteLLM below the Agents SDK, with `VlunaCallback` below `VlunaModel`."""
    return agents_run(VlunaModel(litellm_model(stage), stage.vluna), stream)


def agents_litellm_bare(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """LiteLLM below the Agents SDK, with `VlunaCallback` alone."""
    return agents_run(litellm_model(stage), stream)


# -- LangChain ---------------------------------------------------------------------------------------------------------

_USAGE: Any = {"input_tokens": READ, "output_tokens": WRITTEN, "total_tokens": OWN_TOKENS}


class LangChainOver(BaseChatModel):
    inner: Any

    @property
    def _llm_type(self) -> str:
        return "own"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
        raise NotImplementedError

    async def _agenerate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
        message = AIMessage(content=await all_of(self.inner(False)), usage_metadata=_USAGE)
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _astream(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
        async with aclosing(self.inner(True)) as texts:
            async for text in texts:
                yield ChatGenerationChunk(message=AIMessageChunk(content=text))
        last = AIMessageChunk(content="", usage_metadata=_USAGE, chunk_position="last")
        yield ChatGenerationChunk(message=last)


async def langchain_call(model: Any, stream: bool) -> Texts:
    """One call of a chat model."""
    if not stream:
        yield (await model.ainvoke("hi")).content
        return
    async with aclosing(model.astream("hi")) as chunks:
        async for chunk in chunks:
            if chunk.content:
                yield chunk.content


def bound(payer: str | None) -> dict[str, Any]:
    """As `wrap_model` takes it."""
    return {} if payer is None else {"principal_id": payer}


def langchain_model(stage: Stage, inner: Open, stream: bool, payer: str | None) -> Texts:
    """`wrap_model` of LangChain."""
    return langchain_call(wrap_model(LangChainOver(inner=inner), stage.vluna, **bound(payer)), stream)


def langchain_openai(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """``wrap_model(ChatOpenAI(...))``."""
    return langchain_call(wrap_model(_langchain_bare(stage), stage.vluna, **bound(payer)), stream)


def langchain_transport(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """A bare ``ChatOpenAI`` over `AsyncMeteringTransport`."""
    http = stage.http_client(payer)
    made = ChatOpenAI(
        model="gpt-4o", api_key="sk", base_url=stage.upstream.base_url, max_retries=0, http_async_client=http
    )
    return langchain_call(made, stream)


def langchain_both(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """``wrap_model(ChatOpenAI(...))`` over `AsyncMeteringTransport`."""
    made = ChatOpenAI(
        model="gpt-4o",
        api_key="sk",
        base_url=stage.upstream.base_url,
        max_retries=0,
        http_async_client=stage.http_client(),
    )
    return langchain_call(wrap_model(made, stage.vluna, **bound(payer)), stream)


def _chat_litellm(stage: Stage) -> Any:
    return ChatLiteLLM(model="openai/gpt-4o", api_base=stage.upstream.base_url, api_key="sk", max_retries=0)


def langchain_litellm(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """LiteLLM below LangChain, with `VlunaCallback` below `wrap_model`."""
    return langchain_call(wrap_model(_chat_litellm(stage), stage.vluna, **bound(payer)), stream)


def langchain_litellm_bare(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """LiteLLM below LangChain, with `VlunaCallback` alone."""
    return langchain_call(_chat_litellm(stage), stream)


# -- Pydantic AI -------------------------------------------------------------------------------------------------------


class PydanticOver(pydantic_ai.models.Model):
    def __init__(self, inner: Open) -> None:
        super().__init__()
        self.inner = inner

    @property
    def model_name(self) -> str:
        return "model"

    @property
    def system(self) -> str:
        return "own"

    async def request(self, messages: Any, model_settings: Any, model_request_parameters: Any) -> Any:
        text = await all_of(self.inner(False))
        usage = RequestUsage(input_tokens=READ, output_tokens=WRITTEN)
        return ModelResponse(parts=[TextPart(text)], usage=usage, model_name="model", finish_reason="stop")

    def request_stream(
        self, messages: Any, model_settings: Any, model_request_parameters: Any, run_context: Any = None
    ) -> Any:
        return _opened(self.inner, model_request_parameters)


class _opened:
    """The stream is opened before it is read, as those of the framework's own models are."""

    def __init__(self, inner: Open, parameters: Any) -> None:
        self.texts = inner(True)
        self.parameters = parameters

    async def __aenter__(self) -> Any:
        return _Streamed(self.parameters, texts=self.texts, first=await anext(self.texts))

    async def __aexit__(self, *failure: object) -> None:
        await self.texts.aclose()  # type: ignore[attr-defined]


@dataclass
class _Streamed(StreamedResponse):
    texts: Any = None
    first: str = ""
    timestamp: Any = datetime(2026, 1, 1, tzinfo=timezone.utc)
    model_name: str = "model"
    provider_name: str | None = "own"
    provider_url: str | None = None

    async def _get_event_iterator(self) -> Any:
        for event in self._parts_manager.handle_text_delta(vendor_part_id=0, content=self.first):
            yield event
        async for text in self.texts:
            for event in self._parts_manager.handle_text_delta(vendor_part_id=0, content=text):
                yield event
        self.finish_reason = "stop"
        self._usage = RequestUsage(input_tokens=READ, output_tokens=WRITTEN)


def pydantic_run(agent: Any, stream: bool) -> Texts:
    """A run of an agent."""
    return piped(lambda: _pydantic_texts(agent, True)) if stream else _pydantic_texts(agent, False)


async def _pydantic_texts(agent: Any, stream: bool) -> Texts:
    if not stream:
        yield (await agent.run("hi")).output
        return
    async with agent.run_stream("hi") as result:
        async for text in result.stream_text(delta=True, debounce_by=None):
            yield text


def pydantic_model(stage: Stage, inner: Open, stream: bool, payer: str | None) -> Texts:
    """`VlunaModel` of Pydantic AI."""
    payer_of = None if payer is None else make_context(principal_id=payer)
    model = PydanticVlunaModel(PydanticOver(inner), stage.vluna, bound=payer_of)
    return pydantic_run(pydantic_ai.Agent(model, name="helper"), stream)


def _capability(stage: Stage, payer: str | None) -> Any:
    return VlunaCapability(stage.vluna, identity=None if payer is None else lambda ctx: {"principal_id": payer})


def pydantic_capability(stage: Stage, inner: Open, stream: bool, payer: str | None) -> Texts:
    """`VlunaCapability`."""
    agent = pydantic_ai.Agent(PydanticOver(inner), name="helper", capabilities=[_capability(stage, payer)])
    return pydantic_run(agent, stream)


def pydantic_openai(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """An agent with `VlunaCapability` and the framework's own model."""
    model = OpenAIChatModel("gpt-4o", provider=OpenAIProvider(openai_client=stage.client()))
    return pydantic_run(pydantic_ai.Agent(model, capabilities=[_capability(stage, payer)]), stream)


def pydantic_litellm(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """An agent with `VlunaCapability`, whose LiteLLM provider is a client over `AsyncMeteringTransport`."""
    provider = LiteLLMProvider(openai_client=stage.client(http_client=stage.http_client(payer)))
    model = OpenAIChatModel("gpt-4o", provider=provider)
    return pydantic_run(pydantic_ai.Agent(model, capabilities=[_capability(stage, None)]), stream)


def pydantic_wrapped(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """An agent with `VlunaCapability` around a wrapped client of the LiteLLM provider."""
    provider = LiteLLMProvider(openai_client=stage.metered(stage.client(), payer))
    model = WrapperModel(OpenAIChatModel("gpt-4o", provider=provider))
    return pydantic_run(pydantic_ai.Agent(model, capabilities=[_capability(stage, None)]), stream)


# -- LiteLLM -----------------------------------------------------------------------------------------------------------


class LiteOver(litellm.CustomLLM):
    """A provider of an application's own, known to LiteLLM as ``own/``."""

    inner: Open

    async def acompletion(self, *args: Any, **kwargs: Any) -> Any:
        answer = litellm.ModelResponse(model="own/model", choices=[{"message": {"role": "assistant"}}])
        answer.choices[0].message.content = await all_of(self.inner(False))  # type: ignore[union-attr]
        usage = {"prompt_tokens": READ, "completion_tokens": WRITTEN, "total_tokens": OWN_TOKENS}
        answer.usage = litellm.Usage(**usage)  # type: ignore[attr-defined]
        return answer

    async def astreaming(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        async with aclosing(self.inner(True)) as texts:  # type: ignore[type-var]
            async for text in texts:
                yield _generic(text)
        usage = {"prompt_tokens": READ, "completion_tokens": WRITTEN, "total_tokens": OWN_TOKENS}
        yield _generic("", "stop", usage)


def _generic(text: str, finish: str = "", usage: Any = None) -> Any:
    return GenericStreamingChunk(
        text=text, is_finished=bool(finish), finish_reason=finish, usage=usage, index=0, tool_use=None
    )


def lite_custom(stage: Stage, inner: Open, stream: bool, payer: str | None) -> Texts:
    """``litellm.acompletion`` with `VlunaCallback`, over a provider of the application's own."""
    handler = LiteOver()
    handler.inner = inner
    litellm.custom_provider_map = [{"provider": "own", "custom_handler": handler}]
    litellm.utils.custom_llm_setup()
    asked: Any = {"model": "own/model", "messages": HI, "stream": stream, "max_retries": 0, **paid(payer)}
    return chat_texts(lambda: litellm.acompletion(**asked), stream)


# -- bare HTTP, and work that is no model call -------------------------------------------------------------------------


async def http_transport(stage: Stage, inner: Open, stream: bool, payer: str | None) -> Texts:
    """`AsyncMeteringTransport` over a transport that answers in the process, as one to an application's own gateway."""
    http = http_library()

    class Body(http.AsyncByteStream):  # type: ignore[name-defined,misc]
        def __init__(self, first: str, texts: Texts) -> None:
            self.first = first
            self.texts = texts

        async def __aiter__(self) -> Any:
            yield _said(self.first)
            async for text in self.texts:
                yield _said(text)
            usage = {"prompt_tokens": READ, "completion_tokens": WRITTEN, "total_tokens": OWN_TOKENS}
            yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            yield _event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"

        async def aclose(self) -> None:
            await self.texts.aclose()  # type: ignore[attr-defined]

    class Inside(http.AsyncBaseTransport):  # type: ignore[name-defined,misc]
        async def handle_async_request(self, request: Any) -> Any:
            if stream:
                texts = inner(True)
                body = Body(await anext(texts), texts)
                return http.Response(200, headers={"content-type": "text/event-stream"}, stream=body)
            usage = {"prompt_tokens": READ, "completion_tokens": WRITTEN, "total_tokens": OWN_TOKENS}
            message = {"role": "assistant", "content": await all_of(inner(False))}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            return http.Response(200, json={**_HEAD, "choices": choices, "usage": usage})

    who = {} if payer is None else {"principal_id": payer}
    body = {"model": "own", "messages": HI, "stream": stream}
    async with (
        http.AsyncClient(transport=AsyncMeteringTransport(Inside(), stage.vluna, **who)) as client,
        client.stream("POST", "https://own.example/v1/chat/completions", json=body) as response,
    ):
        if (refused := response.extensions.get("vluna_error")) is not None:
            raise refused
        response.raise_for_status()
        if not stream:
            yield json.loads(await response.aread())["choices"][0]["message"]["content"]
            return
        async for line in response.aiter_lines():
            for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
                if text := choice["delta"].get("content"):
                    yield text


_HEAD = {"id": "chatcmpl-9", "object": "chat.completion", "created": 1, "model": "own"}


def _said(text: str) -> bytes:
    return _event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})


def _event(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps({**_HEAD, 'object': 'chat.completion.chunk', **event})}\n\n".encode()


def sold_work(stage: Stage, inner: Open, stream: bool, payer: str | None) -> Texts:
    """``@vluna.operation(...)``: charged for itself, beside what is inside."""

    @stage.vluna.operation(feature_code="tools.write", estimate=1)
    async def work() -> Texts:
        async with aclosing(inner(stream)) as texts:  # type: ignore[type-var]
            async for text in texts:
                yield text

    return work()


# -- work inside a run -------------------------------------------------------------------------------------------------


def agents_tool(stage: Stage, inner: Open, payer: str | None) -> Texts:
    """A run of the Agents SDK whose function tool makes the call inside; a refusal there ends the run."""

    @surface_refusals
    @agents.function_tool(failure_error_function=None)
    async def inquire() -> str:
        """Asks somebody else."""
        return await all_of(inner(False))

    client = stage.metered(stage.client(), payer)
    model = VlunaModel(agents.OpenAIChatCompletionsModel("gpt-4o", client), stage.vluna)
    return agents_run(model, False, tools=[inquire])


def pydantic_tool(stage: Stage, inner: Open, payer: str | None) -> Texts:
    """A run of Pydantic AI whose tool makes the call inside."""
    model = OpenAIChatModel("gpt-4o", provider=OpenAIProvider(openai_client=stage.client()))
    agent = pydantic_ai.Agent(model, capabilities=[_capability(stage, payer)])

    @agent.tool_plain
    async def inquire() -> str:
        """Asks somebody else."""
        return await all_of(inner(False))

    return pydantic_run(agent, False)


def _langchain_bare(stage: Stage) -> Any:
    return ChatOpenAI(model="gpt-4o", api_key="sk", base_url=stage.upstream.base_url, max_retries=0)


async def langchain_tool(stage: Stage, inner: Open, payer: str | None) -> Texts:
    """An agent of LangChain, whose tool makes the call inside."""

    async def inquire() -> str:
        """Asks somebody else."""
        return await all_of(inner(False))

    agent = create_agent(wrap_model(_langchain_bare(stage), stage.vluna, **bound(payer)), [inquire])
    yield (await agent.ainvoke({"messages": [("user", "hi")]}))["messages"][-1].content


async def langgraph_nodes(stage: Stage, inner: Open, payer: str | None) -> Texts:
    """A graph of three nodes: a model, the call inside, the model."""
    model = wrap_model(_langchain_bare(stage), stage.vluna, **bound(payer))

    async def think(state: Any) -> Any:
        return {"said": (await model.ainvoke("hi")).content}

    async def inquire(state: Any) -> Any:
        return {"said": await all_of(inner(False))}

    graph: Any = StateGraph(dict)
    for name, node in (("first", think), ("second", inquire), ("third", think)):
        graph.add_node(name, node)
    for edge in ((START, "first"), ("first", "second"), ("second", "third"), ("third", END)):
        graph.add_edge(*edge)
    yield (await graph.compile().ainvoke({"said": ""}))["said"]


RUNS: dict[str, Callable[[Stage, Open, str | None], Texts]] = {
    "agents tool": agents_tool,
    "pydantic_ai tool": pydantic_tool,
    "langchain tool": langchain_tool,
    "langgraph node": langgraph_nodes,
}


OUTERS: dict[str, Callable[[Stage, Open, bool, str | None], Texts]] = {
    "agents.VlunaModel": agents_model,
    "agents.VlunaModelProvider": agents_provider,
    "langchain.wrap_model": langchain_model,
    "pydantic_ai.VlunaModel": pydantic_model,
    "pydantic_ai.VlunaCapability": pydantic_capability,
    "litellm.VlunaCallback": lite_custom,
    "httpx.MeteringTransport": http_transport,
}


def over(outer: Callable[[Stage, Open, bool, str | None], Texts], inner: Source) -> Source:
    """The stack of the two; a payer is the inner one's."""
    return lambda stage, stream, payer: outer(stage, lambda streams: inner(stage, streams, payer), stream, None)
