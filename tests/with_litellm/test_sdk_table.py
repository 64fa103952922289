"""The SDK paths of LiteLLM: function × stream or not × what becomes of the call, each cell against the gate's books."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import litellm
import openai
import pytest
from books import FEATURE, MESSAGES, MODEL, TABLES, Books
from provider import Provider

from vluna_llm import Vluna
from vluna_llm.errors import GateDenied

CALLS: dict[str, dict[str, Any]] = {
    "completion": {"model": f"openai/{MODEL}", "messages": MESSAGES},
    "responses": {"model": f"openai/{MODEL}", "input": "hi"},
    "text_completion": {"model": f"text-completion-openai/{MODEL}", "prompt": "hi"},
}
OLD = "litellm.chat_completions.dispatch" not in sys.modules
"""LiteLLM's older line (1.83): it does not cache streams of the Responses API."""
CASES = ("success", "failure", "denial", "close", "drop", "cancel", "early stop", "cut", "cache hit")
_TABLE: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Path:
    """One of LiteLLM's functions, and how it is called."""

    name: str
    stream: bool
    is_async: bool

    def __str__(self) -> str:
        return f"{'a' if self.is_async else ''}{self.name}{', stream' if self.stream else ''}"


PATHS = [Path(name, stream, is_async) for name in CALLS for is_async in (False, True) for stream in (False, True)]


def lines() -> Iterator[str]:
    """The table, for the output of the tests."""
    yield f"{'LiteLLM SDK':28}" + "".join(f"{case:>12}" for case in CASES)
    for path in PATHS:
        yield f"{path!s:28}" + "".join(f"{_TABLE.get((str(path), case), '-'):>12}" for case in CASES)


TABLES.append(lines)


def applies(path: Path, case: str) -> bool:
    """Whether there is such a thing: a whole answer cannot be left half-way, and a thread's call not be cancelled."""
    if case in ("close", "drop", "early stop", "cut"):
        if path.name == "text_completion" and case != "close":
            return False  # the upstream has no way to misbehave there
        return path.stream
    if case == "cache hit" and path.name == "responses" and path.stream and OLD:
        return False
    return case != "cancel" or (path.is_async and path.name != "text_completion")


@pytest.mark.parametrize(
    ("path", "case"), [pytest.param(p, c, id=f"{p}-{c}") for p in PATHS for c in CASES if applies(p, c)]
)
def test_cell(path: Path, case: str, metered: Vluna, provider: Provider, books: Books) -> None:
    """What the gate has on its books afterwards."""
    provider.behaviour = {"failure": "bad", "close": "hang", "drop": "hang", "cancel": "hang", "cut": "cut"}.get(
        case, "hang_after_finish" if case == "early stop" and path.name == "completion" else "ok"
    )
    if case == "cancel" and not path.stream:
        provider.behaviour = "silent"
    if path.name == "text_completion" and case == "close":
        provider.behaviour = "ok"
    if case == "denial":
        books.gate.set_credit(books.customer, 0)
    if case == "cache hit":
        litellm.cache = litellm.Cache(type="local")
        books.run(metered, lambda: run(path, "success", provider))
    work: Callable[[], Any] = lambda: run(path, case, provider)  # noqa: E731
    books.run(metered, work, collect=case in ("drop", "close", "early stop", "cut"))
    expected(path, case, books)
    _TABLE[str(path), case] = {
        "success": "charged",
        "denial": "refused",
        "early stop": "charged" if path.name != "completion" else "estimated",
        "cache hit": "free",
    }.get(case, "cancelled")
    assert len(provider.posts()) == (0 if case == "denial" else 1)


def expected(path: Path, case: str, books: Books) -> None:
    if case == "success":
        books.once()
    elif case == "denial":
        books.nothing()
    elif case == "cache hit":
        assert books.leases == [(FEATURE, "closed"), (FEATURE, "canceled")]
        assert books.charged == [(FEATURE, 120)]
    elif case == "early stop":
        books.estimated_once() if path.name == "completion" else books.once()
    else:
        books.cancelled()


def run(path: Path, case: str, provider: Provider) -> None:
    given = {**CALLS[path.name], "api_base": provider.base_url, "api_key": "sk", "max_retries": 0}
    if path.stream:
        given["stream"] = True
    if path.is_async:
        asyncio.run(_arun(path, case, given))
    elif case in ("failure", "denial"):
        with _raises(path, case):
            answer = getattr(litellm, path.name)(**given)
            list(answer)  # some of LiteLLM's streams ask the provider when they are read
    elif not path.stream:
        getattr(litellm, path.name)(**given)
    else:
        _read(case, getattr(litellm, path.name)(**given))


def _raises(path: Path, case: str) -> Any:
    """The gate's refusal, or LiteLLM's error (its text completions give the one of the OpenAI SDK)."""
    if case == "denial":
        return pytest.raises(GateDenied)
    return pytest.raises((litellm.BadRequestError, openai.BadRequestError))


def _read(case: str, stream: Any) -> None:
    if case in ("success", "cache hit"):
        assert list(stream)
    elif case == "cut":
        with contextlib.suppress(Exception):
            list(stream)
    elif case == "early stop":
        for item in stream:
            if _finished(item):
                break
        _close(stream)
    else:
        next(iter(stream))
        if case == "close":
            _close(stream)


def _close(stream: Any) -> None:
    """LiteLLM's own streams of this kind may have no way to be closed: then they are dropped."""
    close = getattr(stream, "close", None)
    if close is not None:
        close()


async def _arun(path: Path, case: str, given: dict[str, Any]) -> None:
    function = getattr(litellm, f"a{path.name}")
    if case in ("failure", "denial"):
        with _raises(path, case):
            answer = await function(**given)
            [item async for item in answer]
    elif case == "cancel":
        task = asyncio.create_task(_all(function, given, path.stream))
        await asyncio.sleep(0.4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif not path.stream:
        await function(**given)
    else:
        await _aread(case, await function(**given))
    if litellm.cache is not None:
        await asyncio.sleep(0.2)  # LiteLLM fills its cache in a task of its own


async def _all(function: Any, given: dict[str, Any], stream: bool) -> None:
    answer = await function(**given)
    if stream:
        async for _ in answer:
            pass


async def _aread(case: str, stream: Any) -> None:
    if case in ("success", "cache hit"):
        assert [item async for item in stream]
        return
    if case == "cut":
        with contextlib.suppress(Exception):  # 1.83 ends such a stream as if it were whole
            async for _ in stream:
                pass
        return
    async for item in stream:
        if case != "early stop" or _finished(item):
            break
    close = getattr(stream, "aclose", None)
    if case != "drop" and close is not None:
        await close()


def _finished(item: Any) -> bool:
    choices = getattr(item, "choices", None)
    if choices:
        return choices[0].finish_reason is not None
    return str(getattr(item, "type", "")).endswith("response.completed")
