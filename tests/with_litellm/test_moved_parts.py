"""A LiteLLM that has one of its own names elsewhere: calls still go through, are still refused, and are still billed.

Only we do not find the name; LiteLLM works on as it does.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import litellm
import pytest
from books import FEATURE, MESSAGES, MODEL, Books
from moved import Without, hide
from provider import Provider
from proxy import LiteLLMProxy, key

from vluna_llm import Vluna, call_context
from vluna_llm.errors import GateDenied
from vluna_llm.integrations import _litellm_answer, _litellm_entry
from vluna_llm.integrations._litellm_parts import BUILDER, LOOKUP, ROUTER, STREAM, SUPPORTED, TOO_LONG
from vluna_llm.sandbox import Sandbox

CHAT: dict[str, Any] = {"model": f"openai/{MODEL}", "messages": MESSAGES, "api_key": "sk-test"}
PARTS = [STREAM, ROUTER, LOOKUP, SUPPORTED, BUILDER, TOO_LONG]
OPTIONS = ["num_retries", "model_fallbacks"]
PROXYS = ["litellm.proxy._types:ProxyException", "litellm.proxy._types:", _litellm_answer._FASTAPIS]


@pytest.fixture
def without(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    vluna: Vluna,
    make_callback: Any,
    caplog: pytest.LogCaptureFixture,
) -> Vluna:
    """LiteLLM with our callback, where one name is missing: it was made, and told what is not covered."""
    name: str = request.param
    with caplog.at_level(logging.WARNING, "vluna_llm"):
        if name in OPTIONS:
            monkeypatch.setattr(_litellm_entry, "litellm", Without(litellm, name))
        else:
            hide(monkeypatch, name)
        make_callback(vluna)
    assert name in OPTIONS or name.replace(":", ".") in caplog.text
    caplog.clear()
    return vluna


MISSING = pytest.mark.parametrize("without", [*PARTS, *OPTIONS], indirect=True)
SHAPES = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
COLOURS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def _ask(provider: Provider, *, is_async: bool, stream: bool, **more: Any) -> None:
    async def main() -> None:
        answer: Any = await litellm.acompletion(**CHAT, api_base=provider.base_url, stream=stream, **more)
        if stream:
            assert [chunk async for chunk in answer]

    if is_async:
        asyncio.run(main())
        return
    answer: Any = litellm.completion(**CHAT, api_base=provider.base_url, stream=stream, **more)
    if stream:
        assert list(answer)


@COLOURS
@SHAPES
@MISSING
def test_a_call_is_billed_all_the_same(
    without: Vluna, stream: bool, is_async: bool, provider: Provider, books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    """What the provider reported is charged once, and nothing of ours is told to be broken."""
    books.run(without, lambda: _ask(provider, is_async=is_async, stream=stream))
    books.once()
    assert "vluna.internal_error" not in caplog.text


@COLOURS
@SHAPES
@MISSING
def test_a_call_is_refused_all_the_same(
    without: Vluna, stream: bool, is_async: bool, provider: Provider, books: Books
) -> None:
    """The gate's own exception, before the provider is asked."""
    books.gate.set_credit(books.customer, 0)
    with call_context(principal_id=books.customer), pytest.raises(GateDenied):
        _ask(provider, is_async=is_async, stream=stream)
    assert provider.requests == []


@pytest.mark.parametrize("without", [BUILDER], indirect=True)
def test_a_stream_for_a_whole_answer_without_the_builder(without: Vluna, provider: Provider, books: Books) -> None:
    """``complete_response=True`` is left to LiteLLM, and the caller gets the whole answer."""
    answers: list[Any] = []

    def work() -> None:
        answers.append(litellm.completion(**CHAT, api_base=provider.base_url, stream=True, complete_response=True))

    books.run(without, work)
    assert answers[0].choices[0].message.content.startswith("word0")
    assert [feature for feature, _ in books.charged] == [FEATURE]


@pytest.mark.parametrize("without", [TOO_LONG], indirect=True)
def test_a_fallback_for_long_prompts_without_its_exception(without: Vluna, provider: Provider, books: Books) -> None:
    """``context_window_fallback_dict`` is left to LiteLLM, which finds it where it was."""
    dictionary = {CHAT["model"]: "openai/gpt-4.1"}
    books.run(without, lambda: _ask(provider, is_async=False, stream=False, context_window_fallback_dict=dictionary))
    books.once()


@pytest.mark.parametrize("without", [ROUTER], indirect=True)
def test_a_router_that_is_not_found(without: Vluna, provider: Provider, books: Books) -> None:
    """Its calls are billed by the functions that it calls."""
    params = {"model": CHAT["model"], "api_base": provider.base_url, "api_key": "sk-test"}
    router = litellm.Router(model_list=[{"model_name": "chat", "litellm_params": params}])
    books.run(without, lambda: asyncio.run(router.acompletion(model="chat", messages=MESSAGES)))
    books.once()


def test_entry_functions_that_are_gone_are_named(
    vluna: Vluna, make_callback: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What LiteLLM may have in the place of a function that is metered is not: that is told."""
    monkeypatch.setattr(_litellm_entry, "METERED", {**_litellm_entry.METERED, "think": "chat.completions"})
    make_callback(vluna)
    assert "this version of LiteLLM has no litellm.think" in caplog.text


@pytest.mark.parametrize("path", ["install", "hooks"])
def test_without_a_class_for_callbacks(path: str, shared_gate: Sandbox, provider: Provider, books: Books) -> None:
    """Without LiteLLM's ``CustomLogger`` none of its hooks is called, and the wrapped functions meter as ever."""
    code = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from moved import importer
from vluna_llm.integrations import _litellm_parts
_litellm_parts.importlib = importer(_litellm_parts.LOGGER)
import litellm
from vluna_llm import Vluna, call_context
from vluna_llm.integrations.litellm import VlunaCallback
litellm.callbacks = [VlunaCallback(install={path == "install"})]
with call_context(principal_id={books.customer!r}) as scope:
    for stream in (False, True):
        answer = litellm.completion(**{CHAT!r}, api_base={provider.base_url!r}, stream=stream)
        assert not stream or list(answer)
Vluna.default().close()
"""
    root = Path(__file__).parents[2]
    environment = {**_environment(), **shared_gate.env(), "VLUNA_LLM_OUTBOX": "memory"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, timeout=90, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "this version of LiteLLM has no litellm.integrations.custom_logger.CustomLogger" in done.stderr
    assert books.charged == [(FEATURE, 120)] * (2 if path == "install" else 0)


def _environment() -> dict[str, str]:
    import os

    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLUNA_")}
    root = str(Path(__file__).parents[2])
    return {**kept, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": root}


# -- the proxy ---------------------------------------------------------------------------------------------------------


def _denial() -> GateDenied:
    return GateDenied("no credit is left", status=402, code="INSUFFICIENT", reason="insufficient_credit")


@pytest.fixture
def _classes_made_anew() -> Any:
    for cached in (_litellm_answer._refused_class, _litellm_answer._tell_moved):
        cached.cache_clear()
    yield
    for cached in (_litellm_answer._refused_class, _litellm_answer._tell_moved):
        cached.cache_clear()


@pytest.mark.usefixtures("_classes_made_anew")
@pytest.mark.parametrize("hidden", PROXYS)
def test_a_refusal_of_the_proxy_keeps_its_status(
    hidden: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without LiteLLM's own exceptions it is the refusal itself, which has what LiteLLM reads; that is told once."""
    hide(monkeypatch, hidden)
    told: Any = [_litellm_answer.refused(_denial()) for _ in range(2)]
    for error in told:
        assert (error.status_code, error.message, error.type) == (402, "no credit is left", "insufficient_credit")
        assert error.provider_specific_fields["vluna"]["code"] == "INSUFFICIENT"
    assert caplog.text.count("has its ProxyException or HTTPException elsewhere") == 1


_MOVED = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from moved import importer
from vluna_llm.integrations import _litellm_parts
_litellm_parts.importlib = importer("litellm.proxy._types:ProxyException")
from vluna_llm.integrations.litellm import proxy_callback
"""


def test_a_proxy_without_its_exception(shared_gate: Sandbox, provider: Provider, books: Books, tmp_path: Path) -> None:
    """Over the wire: a denial is 402 and a call is billed, whole and streamed."""
    params = {"model": CHAT["model"], "api_base": provider.base_url, "api_key": "sk-test"}
    config = {"model_list": [{"model_name": "chat", "litellm_params": params}]}
    poor = f"{books.customer}.poor"
    shared_gate.set_credit(poor, 0)
    proxy = LiteLLMProxy(tmp_path, shared_gate.env(), config, modules={"vluna_callback": _MOVED}).start()

    def ask(customer: str, *, stream: bool) -> httpx.Response:
        known = key(metadata={"vluna": {"principal_id": customer}})
        body = {"model": "chat", "messages": MESSAGES, "stream": stream}
        headers = {"authorization": f"Bearer {known}"}
        return httpx.post(f"{proxy.base_url}/v1/chat/completions", json=body, headers=headers, timeout=60)

    try:
        for stream in (False, True):
            refused = ask(poor, stream=stream)
            assert refused.status_code == 402, refused.text
            assert ask(books.customer, stream=stream).status_code == 200
    finally:
        proxy.stop()
    assert books.charged == [(FEATURE, 120)] * 2
    assert shared_gate.booked(poor).entries == ()
    assert "has its ProxyException or HTTPException elsewhere" in proxy.log.read_text(errors="replace")
