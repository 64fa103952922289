"""What the consumer of a stream sees is what it would see without us: types, chunks, errors, cache."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import litellm
import pytest
from books import Books
from provider import Provider
from routers import CORE
from streaming import APIS, CHAT, Api, Reader, run, settled, whole

from vluna_llm import Vluna
from vluna_llm.integrations import _litellm_ends, _litellm_stream
from vluna_llm.integrations._openai_usage_option import Refusers

COLOURS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
CHAT_API = Api("completion", CHAT)
VARIES = {"id", "created", "created_at", "response"}


def plain(item: Any) -> Any:
    """An item without what differs from call to call, with its class."""
    found = item.model_dump() if hasattr(item, "model_dump") else item
    return type(item), {name: value for name, value in found.items() if name not in VARIES}


@COLOURS
@pytest.mark.parametrize("asked", [None, {"include_usage": True}, {"include_usage": False}], ids=["not", "yes", "no"])
@pytest.mark.parametrize("api", APIS)
def test_the_chunks_are_those_of_bare_litellm(
    api: Api,
    asked: dict[str, Any] | None,
    is_async: bool,
    vluna: Vluna,
    make_callback: Any,
    provider: Provider,
    books: Books,
) -> None:
    """One by one, whether the caller asks for usage or not; the arguments of the caller are left alone."""
    if api.name == "responses" and asked is not None:
        pytest.skip("the Responses API has no such option")
    more: dict[str, Any] = {} if asked is None else {"stream_options": asked}
    before = copy.deepcopy(more)
    bare = [plain(item) for item in run(api, whole, provider, is_async=is_async, **more)]
    make_callback(vluna)
    got: list[Any] = []
    settled(vluna, books, lambda: got.extend(run(api, whole, provider, is_async=is_async, **more)))
    assert [plain(item) for item in got] == bare
    if api.name == "completion" and not (CORE and (asked or {}).get("include_usage")):
        assert all(chunk.choices for chunk in got)  # 1.110 gives who asks a last chunk of usage alone, as OpenAI does
    assert more == before
    books.once()


@COLOURS
@pytest.mark.parametrize("api", APIS)
def test_the_stream_is_of_the_class_of_bare_litellm(
    api: Api, is_async: bool, vluna: Vluna, make_callback: Any, provider: Provider, books: Books
) -> None:
    """By `isinstance`, by name, and with all its attributes."""

    async def look(reader: Reader) -> Any:
        found = type(reader.stream), set(vars(reader.stream))
        await whole(reader)
        return found

    kind, members = run(api, look, provider, is_async=is_async)
    make_callback(vluna)
    got: list[Any] = []
    settled(vluna, books, lambda: got.append(run(api, look, provider, is_async=is_async)))
    ours, now = got[0]
    assert issubclass(ours, kind)
    assert (ours.__name__, ours.__qualname__, ours.__module__) == (kind.__name__, kind.__qualname__, kind.__module__)
    assert members <= now


@COLOURS
@pytest.mark.parametrize("behaviour", ["cut", "error_event"])
@pytest.mark.parametrize("api", APIS)
def test_errors_in_the_middle_are_those_of_bare_litellm(
    api: Api, behaviour: str, is_async: bool, vluna: Vluna, make_callback: Any, provider: Provider, books: Books
) -> None:
    """The same class, status and text after the same number of chunks; or none, where LiteLLM swallows it."""
    provider.behaviour = behaviour

    async def look(reader: Reader) -> tuple[int, Any, Any, str]:
        count = 0
        try:
            async for _ in reader:
                count += 1
        except Exception as error:
            return count, type(error), getattr(error, "status_code", None), str(error)
        return count, None, None, ""

    bare = run(api, look, provider, is_async=is_async)
    make_callback(vluna)
    got: list[Any] = []
    settled(vluna, books, lambda: got.append(run(api, look, provider, is_async=is_async)))
    assert got == [bare]


@COLOURS
@pytest.mark.parametrize("behaviour", ["refuses_option", "refuses_everything_new"])
@pytest.mark.parametrize("api", [APIS[0], APIS[2]])
def test_an_upstream_that_refuses_the_option_is_asked_once(
    api: Api,
    behaviour: str,
    is_async: bool,
    metered: Vluna,
    provider: Provider,
    books: Books,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The call goes through without it and is estimated; the next one does not try."""
    known = Refusers()
    for module in ("_litellm_ask", "_litellm_items"):
        monkeypatch.setattr(f"vluna_llm.integrations.{module}.REFUSERS", known)
    provider.behaviour = behaviour
    settled(metered, books, lambda: run(api, whole, provider, is_async=is_async))
    assert ["stream_options" in seen.body for seen in provider.posts()] == [True, False]
    books.estimated_once()
    settled(metered, books, lambda: run(api, whole, provider, is_async=is_async))
    assert ["stream_options" in seen.body for seen in provider.posts()] == [True, False, False]
    assert len(books.charged) == 2


@COLOURS
def test_a_cache_filled_before_is_found(
    is_async: bool, vluna: Vluna, make_callback: Any, provider: Provider, books: Books
) -> None:
    """That we ask for usage is no part of LiteLLM's cache keys; the played back stream costs nothing."""
    litellm.cache = litellm.Cache()

    async def patient(reader: Reader) -> list[Any]:
        items = await whole(reader)
        await asyncio.sleep(0.5)  # LiteLLM fills its cache in the background
        return items

    bare = run(CHAT_API, patient, provider, is_async=is_async, caching=True)
    make_callback(vluna)
    got: list[Any] = []
    settled(vluna, books, lambda: got.extend(run(CHAT_API, patient, provider, is_async=is_async, caching=True)))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in got)
    assert text == "".join(chunk.choices[0].delta.content or "" for chunk in bare)
    assert len(provider.posts()) == 1
    books.cancelled()


@COLOURS
@pytest.mark.parametrize("api", APIS)
def test_an_error_of_ours_is_not_the_consumers(
    api: Api,
    is_async: bool,
    metered: Vluna,
    provider: Provider,
    books: Books,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever breaks in our code: the stream is read as ever, and the error is told."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("ours")

    monkeypatch.setattr(_litellm_stream, "open_response", broken)
    got: list[Any] = []
    settled(metered, books, lambda: got.extend(run(api, whole, provider, is_async=is_async)))
    assert len(got) > 3
    assert "internal" in caplog.text
    assert books.charged == []


@COLOURS
def test_an_error_of_ours_at_the_end_is_not_the_consumers(
    is_async: bool, metered: Vluna, provider: Provider, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of LiteLLM's stream is what the consumer sees, whatever closing the response brings."""
    monkeypatch.setattr(_litellm_ends, "_close", lambda stream: None)

    async def nothing(stream: Any) -> None:
        return None

    monkeypatch.setattr(_litellm_ends, "_aclose", nothing)
    got: list[Any] = []
    settled(metered, books, lambda: got.extend(run(CHAT_API, whole, provider, is_async=is_async)))
    assert len(got) > 3
    books.once()
