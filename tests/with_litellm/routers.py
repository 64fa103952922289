"""Two deployments on two providers of ours, and one way to call a Router in both colours."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from books import MESSAGES, MODEL
from provider import Provider, _data
from upstream import Upstream, _UpstreamHandler

CORE = hasattr(litellm.router, "_core_class")
"""The line of 1.110: the Router that is made is a facade before the one that works."""

NEW = CORE or hasattr(litellm.Router, "_aresponses_streaming_iterator")
"""The line of 1.106, and later: it continues broken streams of every API by a fallback."""

SETTINGS: dict[str, Any] = {"num_retries": 2, "retry_after": 0, "allowed_fails": 0, "cooldown_time": 60}
"""What makes a Router quick to retry, to fall back and to cool down."""


class Early(Upstream):
    """An upstream that can also send an error and then nothing: at once, always (``error_first``) or the first time
    (``error_once``), or after three words of a chat (``error_last``)."""

    def __init__(self) -> None:
        super().__init__()
        self._server.RequestHandlerClass = type("Handler", (_EarlyHandler,), {"owner": self})


class _EarlyHandler(_UpstreamHandler):
    def _early(self) -> bool:
        how = self.owner.behaviour
        return how == "error_first" or (how == "error_once" and not self._flaked())

    def _chat_events(self, body: dict[str, Any], model: str) -> Iterator[str]:
        error = _data({"error": {"message": "overloaded", "type": "server_error", "code": None}})
        if self._early():
            yield error
            return
        for number, event in enumerate(super()._chat_events(body, model)):
            yield event
            if self.owner.behaviour == "error_last" and number == 3:
                yield error
                return

    def _response_events(self, body: dict[str, Any], response_id: str) -> Iterator[str]:
        early = self._early()
        for event in super()._response_events(body, response_id):
            yield event
            if early:
                error = {"message": "overloaded", "type": "server_error", "code": "server_error"}
                yield "event: error\n" + _data({"type": "error", "sequence_number": 2, "error": error})
                return

    def _message_events(self, body: dict[str, Any]) -> Iterator[str]:
        early = self._early()
        for event in super()._message_events(body):
            yield event
            if early:
                error = {"type": "overloaded_error", "message": "Overloaded"}
                yield "event: error\n" + _data({"type": "error", "error": error})
                return


class Pair:
    """Two providers."""

    def __init__(self, first: Upstream, second: Upstream) -> None:
        self.first = first
        self.second = second

    def fresh(self) -> Pair:
        """Well-behaved, with nothing asked of them yet."""
        for provider in (self.first, self.second):
            provider.behaviour = "ok"
            provider.pause = 0.02
            provider.requests.clear()
            provider.flaked.clear()
            provider.responses.clear()
            provider.released.set()
            provider.released.clear()
        return self

    @property
    def asked(self) -> tuple[int, int]:
        """How often each of them was asked."""
        return len(self.first.posts()), len(self.second.posts())

    def group(self, name: str = "chat", model: str = f"openai/{MODEL}", **params: Any) -> list[dict[str, Any]]:
        """A group of two deployments that sell the same."""
        return [deployment(self.first, name, model, **params), deployment(self.second, name, model, **params)]


def deployment(provider: Provider, name: str = "chat", model: str = f"openai/{MODEL}", **params: Any) -> dict[str, Any]:
    """An entry of a ``model_list``."""
    given = {"model": model, "api_key": "sk-test", "api_base": provider.base_url, "max_retries": 0, **params}
    return {"model_name": name, "litellm_params": given}


@contextmanager
def two_providers() -> Iterator[Pair]:
    """For a fixture of a module."""
    with Early() as first, Early() as second:
        yield Pair(first, second)


def claude(provider: Upstream, name: str = "chat", model: str = "claude-sonnet-5", **params: Any) -> dict[str, Any]:
    """An entry of a ``model_list`` that speaks Anthropic's Messages."""
    given = {"model": f"anthropic/{model}", "api_key": "sk-test", "api_base": provider.anthropic_base, **params}
    return {"model_name": name, "litellm_params": given}


def router(deployments: list[dict[str, Any]], **settings: Any) -> Any:
    """A Router over them."""
    return litellm.Router(model_list=deployments, **{**SETTINGS, **settings})


def run(work: Callable[[], Any]) -> Any:
    """The result, awaited in a loop of its own where it has to be."""

    async def main() -> Any:
        return await work()

    return asyncio.run(main())


def call(target: Any, name: str, *, is_async: bool, stream: bool = False, **arguments: Any) -> Any:
    """Call the Router's method of this name (an ``a`` before it where async) and read the answer to its end."""
    if stream:
        arguments["stream"] = True
    if not is_async:
        answer = getattr(target, name)(**arguments)
        return list(answer) if stream else answer

    async def main() -> Any:
        answer = await getattr(target, f"a{name}")(**arguments)
        return [item async for item in answer] if stream else answer

    return asyncio.run(main())


def chat(target: Any, *, is_async: bool, stream: bool = False, group: str = "chat", **more: Any) -> Any:
    """A chat with this group."""
    return call(target, "completion", is_async=is_async, stream=stream, model=group, messages=MESSAGES, **more)


def healthy(target: Any, group: str = "chat") -> int:
    """How many deployments of the group the Router would choose from now."""
    if CORE:
        return len(asyncio.run(target.select(group, kind="healthy")))
    found, _ = target._get_healthy_deployments(model=group, parent_otel_span=None)
    return len(found)
