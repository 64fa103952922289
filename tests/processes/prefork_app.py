"""The application that the servers of `test_prefork_servers` run: one model call for each request, for its customer."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs

import openai

from vluna_llm import Vluna, call_context

PROVIDER = os.environ["PROVIDER"]
MESSAGES: Any = [{"role": "user", "content": "Hello"}]
OPTIONS = {"base_url": PROVIDER, "api_key": "sk-test", "max_retries": 0}

vluna = Vluna()
client = vluna.wrap(openai.OpenAI(**OPTIONS))
aclient = vluna.wrap(openai.AsyncOpenAI(**OPTIONS))

if os.environ.get("WARM"):
    # Before the fork: the parent has a runtime with threads and an open connection to the gate. The SDK's client is not
    # the workers' one: they would share its open connection to the provider, metered or not.
    warm = vluna.wrap(openai.OpenAI(**OPTIONS))
    with call_context(principal_id="parent", labels={"n": "warm"}):
        warm.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES, extra_headers={"x-n": "warm"})


def asked(query: str) -> tuple[str, Any, dict[str, str]]:
    """The number of the request, the context that bills it, and the header by which the provider knows it."""
    n = parse_qs(query)["n"][0]
    return n, call_context(principal_id=f"customer_{int(n) % 7}", labels={"n": n}), {"x-n": n}


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """The WSGI application: every other answer is streamed."""
    n, context, headers = asked(environ["QUERY_STRING"])
    with context:
        if int(n) % 2:
            client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES, extra_headers=headers)
        else:
            stream = client.chat.completions.create(
                model="gpt-4o-mini", messages=MESSAGES, stream=True, extra_headers=headers
            )
            for _ in stream:
                pass
    start_response("200 OK", [("content-type", "text/plain")])
    return [str(os.getpid()).encode()]


@asynccontextmanager
async def lifespan(_: Any) -> Any:
    """Closes the instance when the server shuts down, where the test asks for it."""
    yield
    if os.environ.get("CLOSES"):
        await vluna.aclose()


async def _answer(request: Any) -> Any:
    from starlette.responses import PlainTextResponse

    n, context, headers = asked(request.url.query)
    async with context:
        stream = await aclient.chat.completions.create(
            model="gpt-4o-mini", messages=MESSAGES, stream=bool(int(n) % 2), extra_headers=headers
        )
        if int(n) % 2:
            async for _ in stream:
                pass
    return PlainTextResponse(str(os.getpid()))


def asgi() -> Callable[..., Awaitable[None]]:
    """Makes the ASGI application."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    return Starlette(routes=[Route("/", _answer)], lifespan=lifespan)
