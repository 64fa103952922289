"""Streams of LiteLLM in both colours, and the ways in which a consumer reads one or leaves it."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import litellm
import pytest
from books import MESSAGES, MODEL, Books
from provider import Provider

from vluna_llm import Scope, Vluna, call_context

CHAT: dict[str, Any] = {"model": f"openai/{MODEL}", "messages": MESSAGES}
RESPONSES: dict[str, Any] = {"model": f"openai/{MODEL}", "input": "hi"}
TEXT: dict[str, Any] = {"model": f"text-completion-openai/{MODEL}", "prompt": "hi"}

Reading = Callable[["Reader"], Awaitable[Any]]


@dataclass(frozen=True)
class Api:
    """One API of LiteLLM whose answers are streamed."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def asked(self, provider: Provider, **more: Any) -> dict[str, Any]:
        """The arguments of a call to this upstream."""
        return {**self.arguments, "stream": True, "api_base": provider.base_url, "api_key": "sk-test", **more}


APIS = [
    pytest.param(Api("completion", CHAT), id="chat"),
    pytest.param(Api("responses", RESPONSES), id="responses"),
    pytest.param(Api("text_completion", TEXT), id="text"),
]


class Reader:
    """Reads a stream in the colour it was asked for: LiteLLM's objects know both."""

    def __init__(self, stream: Any, is_async: bool) -> None:
        self.stream = stream
        self.is_async = is_async
        self._iterator: Any = None

    async def next(self) -> Any:
        """The next item; raises `StopAsyncIteration` at the end."""
        if self.is_async:
            if self._iterator is None:
                self._iterator = self.stream.__aiter__()
            return await self._iterator.__anext__()
        if self._iterator is None:
            self._iterator = iter(self.stream)
        try:
            return next(self._iterator)
        except StopIteration:
            raise StopAsyncIteration from None

    def __aiter__(self) -> Reader:
        return self

    async def __anext__(self) -> Any:
        return await self.next()


async def whole(reader: Reader) -> list[Any]:
    """Read all of it."""
    return [item async for item in reader]


async def never(reader: Reader) -> None:
    """Do not read at all."""


async def two(reader: Reader) -> None:
    """Read two items and drop it."""
    for _ in range(2):
        await reader.next()


async def until_finish(reader: Reader) -> None:
    """Leave at the finish reason, as agents do."""
    async for chunk in reader:
        if chunk.choices[0].finish_reason is not None:
            return


def run(api: Api, reading: Reading, provider: Provider, *, is_async: bool, **more: Any) -> Any:
    """Ask for a stream and read it in this way, in a loop of its own; gives what the reading gave."""

    async def main() -> Any:
        arguments = api.asked(provider, **more)
        if is_async:
            stream = await getattr(litellm, f"a{api.name}")(**arguments)
        else:
            stream = getattr(litellm, api.name)(**arguments)
        reader = Reader(stream, is_async)
        del stream
        return await reading(reader)

    return asyncio.run(main())


def settled(vluna: Vluna, books: Books, work: Callable[[], Any], *, seconds: float = 30.0) -> Scope:
    """Run it for the customer; collect garbage until it is settled, since LiteLLM's threads hold on to streams."""
    with call_context(principal_id=books.customer) as scope:
        work()
    collected(scope, seconds)
    assert vluna.flush(10)
    return scope


def collected(scope: Scope, seconds: float = 30.0) -> None:
    """Collect garbage until nothing is pending."""
    deadline = time.monotonic() + seconds
    while not scope.wait(0.05):
        gc.collect()
        assert time.monotonic() < deadline, "an operation was never settled"


def settled_without_collecting(vluna: Vluna, books: Books, work: Callable[[], Any]) -> None:
    """Run it for the customer, who does not wait for the garbage collector."""
    gc.disable()
    try:
        books.run(vluna, work)
    finally:
        gc.enable()
