"""The routes of the proxy as its clients use them: the OpenAI client where it has one, bare HTTP elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

SECONDS = 30.0


@dataclass
class Outcome:
    """What the client got: its status, headers, and the error as it is reachable for a program."""

    status: int
    headers: dict[str, str]
    error: dict[str, Any] = field(default_factory=dict)
    pieces: int = 1

    @property
    def vluna(self) -> dict[str, Any]:
        """Our part of the error: the same on every route, in both lines."""
        found: dict[str, Any] = self.error["provider_specific_fields"]["vluna"]
        return found


@dataclass(frozen=True)
class Route:
    """One route, streaming or not.

    Attributes:
        name: as the table has it.
        url: its path.
        model: the model group that is asked for; ``<model>-down`` is one that always fails and falls back.
        feature: what is sold there, and what the fallback sells.
        tokens: what the upstream reports.
        body: the request, given model and prompt.
        ask: the OpenAI client's method, where it has one.
        retried: whether LiteLLM tries again (it begins to read the stream of a text completion too late for that).
    """

    name: str
    url: str
    model: str
    feature: str
    other: str
    tokens: int
    body: Callable[[str, str], dict[str, Any]]
    ask: Callable[[openai.OpenAI], Any] | None = None
    stream: bool = False
    retried: bool = True

    def request(self, model: str, prompt: str) -> dict[str, Any]:
        """The whole body."""
        return {"model": model, **self.body(model, prompt), **({"stream": True} if self.stream else {})}


def _messages(model: str, prompt: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}]}


def _claude(model: str, prompt: str) -> dict[str, Any]:
    return {"max_tokens": 50, **_messages(model, prompt)}


def _input(model: str, prompt: str) -> dict[str, Any]:
    return {"input": prompt}


def _prompt(model: str, prompt: str) -> dict[str, Any]:
    return {"prompt": prompt}


GPT, MINI = "openai.gpt-4o", "openai.gpt-4o-mini"
CLAUDE, HAIKU = "anthropic.claude-sonnet-4-5", "anthropic.claude-haiku-4-5"
EMB, EMB_LARGE = "openai.text-embedding-3-small", "openai.text-embedding-3-large"
INST, INST_OLD = "openai.gpt-3.5-turbo-instruct", "openai.davinci-002"
IMG, IMG_MINI = "openai.gpt-image-1", "openai.gpt-image-1-mini"


def _chat(client: openai.OpenAI) -> Any:
    return client.chat.completions


def _responses(client: openai.OpenAI) -> Any:
    return client.responses


def _embeddings(client: openai.OpenAI) -> Any:
    return client.embeddings


def _completions(client: openai.OpenAI) -> Any:
    return client.completions


ROUTES = (
    Route("chat", "/v1/chat/completions", "gpt", GPT, MINI, 120, _messages, _chat),
    Route("chat, stream", "/v1/chat/completions", "gpt", GPT, MINI, 120, _messages, _chat, stream=True),
    Route("responses", "/v1/responses", "gpt", GPT, MINI, 120, _input, _responses),
    Route("responses, stream", "/v1/responses", "gpt", GPT, MINI, 120, _input, _responses, stream=True),
    Route("embeddings", "/v1/embeddings", "emb", EMB, EMB_LARGE, 8, _input, _embeddings),
    Route("completions", "/v1/completions", "inst", INST, INST_OLD, 120, _prompt, _completions),
    Route(
        "completions, stream",
        "/v1/completions",
        "inst",
        INST,
        INST_OLD,
        120,
        _prompt,
        _completions,
        stream=True,
        retried=False,
    ),
    Route("messages", "/v1/messages", "claude", CLAUDE, HAIKU, 120, _claude),
    Route("messages, stream", "/v1/messages", "claude", CLAUDE, HAIKU, 120, _claude, stream=True),
    Route("messages on an OpenAI model", "/v1/messages", "gpt", GPT, MINI, 120, _claude),
    Route("messages on an OpenAI model, stream", "/v1/messages", "gpt", GPT, MINI, 120, _claude, stream=True),
    Route("images", "/v1/images/generations", "img", IMG, IMG_MINI, 1050, _prompt),
)


def send(base_url: str, key: str, route: Route, model: str, prompt: str, **more: Any) -> Outcome:
    """One request, read to its end."""
    if route.ask is None or more:
        return _bare(base_url, key, route, {**route.request(model, prompt), **more})
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=0, timeout=SECONDS) as client:
        try:
            raw = route.ask(client).with_raw_response.create(**route.request(model, prompt))
            answer = raw.parse()
            pieces = len(list(answer)) if route.stream else 1
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            return Outcome(error.status_code, dict(error.response.headers), body)
        except openai.APIError as error:  # inside a stream that had begun
            return Outcome(200, {}, error.body if isinstance(error.body, dict) else {"message": str(error)})
        return Outcome(200, dict(raw.headers), pieces=pieces)


def _bare(base_url: str, key: str, route: Route, body: dict[str, Any], **headers: str) -> Outcome:
    with _client(base_url, key) as client:
        answer = client.post(route.url, json=body, headers=headers)
        if answer.status_code != 200:
            return Outcome(answer.status_code, dict(answer.headers), answer.json()["error"])
        pieces = answer.text.count("data:") if route.stream else 1
        error = _error_in(answer.text) if route.stream else {}
        return Outcome(200, dict(answer.headers), error, pieces)


def _error_in(text: str) -> dict[str, Any]:
    for line in text.splitlines():
        if line.startswith("data: {") and '"error"' in line:
            found = json.loads(line.removeprefix("data: ")).get("error")
            if isinstance(found, dict):
                return found
    return {}


def leave(base_url: str, key: str, route: Route, model: str, prompt: str) -> Outcome:
    """A client that reads the beginning of a stream and goes away; or one that does not wait for the answer."""
    with _client(base_url, key) as client:
        if not route.stream:
            try:
                answer = client.post(route.url, json=route.request(model, prompt), timeout=0.25)
            except httpx.ReadTimeout:
                return Outcome(0, {})
            raise AssertionError(f"the answer came before the client left: {answer.status_code}")
        with client.stream("POST", route.url, json=route.request(model, prompt)) as answer:
            next(answer.iter_raw())
            return Outcome(answer.status_code, dict(answer.headers))


@contextmanager
def _client(base_url: str, key: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {key}", "anthropic-version": "2023-06-01"}
    with httpx.Client(base_url=base_url, headers=headers, timeout=SECONDS) as client:
        yield client
