"""What LiteLLM does for itself on a Router: health checks, mirrored traffic, background work after a call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import litellm
import pytest
from books import FEATURE, MESSAGES, TOKENS, Books, eventually
from routers import Pair, chat, deployment, router, two_providers

from vluna_llm import Vluna, call_context
from vluna_llm.sandbox import Sandbox

COLOURS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@pytest.fixture(scope="module")
def _pair() -> Iterator[Pair]:
    with two_providers() as pair:
        yield pair


@pytest.fixture
def pair(_pair: Pair) -> Pair:
    """Two providers."""
    return _pair.fresh()


def checked(pair: Pair, **more: Any) -> dict[str, Any]:
    """The health of one deployment, as the proxy's health checks ask for it."""
    params = {**deployment(pair.first)["litellm_params"], "messages": MESSAGES, **more}
    mode = params.pop("mode", "chat")
    found: dict[str, Any] = asyncio.run(litellm.ahealth_check(model_params=params, mode=mode, input=["hi"]))
    return found


@pytest.mark.parametrize("mode", ["chat", "completion", "embedding", "responses"])
def test_a_health_check_is_nobodys_and_is_never_refused(
    mode: str, pair: Pair, metered: Vluna, shared_gate: Sandbox
) -> None:
    """The gate is not asked, nobody is billed, the deployment is found healthy, and the operator can see it."""
    pytest.importorskip("litellm.proxy.proxy_server", reason="health checks need litellm[proxy]")
    before = len(shared_gate.requests)
    assert "error" not in checked(pair, mode=mode)
    assert pair.asked == (1, 0)
    assert len(shared_gate.requests) == before
    assert metered.telemetry.counts["vluna.endpoint.unmetered"] == 1


def test_a_health_check_bills_not_even_the_only_customer(
    pair: Pair,
    make_vluna: Callable[..., Vluna],
    make_callback: Callable[..., Any],
    shared_gate: Sandbox,
    customer: str,
) -> None:
    """Also where one customer pays for the whole program, or a call context is around, or nothing unmetered may run."""
    pytest.importorskip("litellm.proxy.proxy_server", reason="health checks need litellm[proxy]")
    make_callback(make_vluna(principal=customer, on_unmetered="deny"))
    with call_context(principal_id=customer):
        assert "error" not in checked(pair)
    Books(shared_gate, customer).nothing()
    assert pair.asked == (1, 0)


def test_a_health_check_that_fails_says_what_the_provider_said(pair: Pair, metered: Vluna) -> None:
    """Nothing of ours stands between an operator and a broken deployment."""
    pytest.importorskip("litellm.proxy.proxy_server", reason="health checks need litellm[proxy]")
    pair.first.behaviour = "down"
    assert "internal" in checked(pair)["error"]


@COLOURS
def test_mirrored_traffic_is_not_the_customers(
    is_async: bool, pair: Pair, metered: Vluna, books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    """``silent_model``: the copy for the operator's experiment is told as unmetered; the call is charged once."""
    deployments = [
        deployment(pair.first, silent_model="quiet"),
        deployment(pair.second, "quiet", "openai/gpt-4o-mini"),
    ]
    target = router(deployments)

    async def main() -> None:
        await target.acompletion(model="chat", messages=MESSAGES)
        await asyncio.to_thread(eventually, lambda: pair.asked == (1, 1))
        await asyncio.sleep(0.05)

    def work() -> None:
        if is_async:
            asyncio.run(main())
        else:
            target.completion(model="chat", messages=MESSAGES)
            assert eventually(lambda: pair.asked == (1, 1))

    books.run(metered, work)
    assert pair.asked == (1, 1)
    books.once()
    assert "litellm.router.silent_model" in caplog.text


def test_a_client_cannot_call_its_traffic_mirrored(pair: Pair, metered: Vluna, books: Books) -> None:
    """LiteLLM marks mirrored calls in their metadata, which anybody may write: it is not believed."""
    target = router([deployment(pair.first)])
    for mark in ({"is_silent_experiment": True}, {"tags": ["litellm-internal-health-check"]}):
        books.run(metered, lambda mark=mark: chat(target, is_async=True, metadata=mark))  # type: ignore[misc]
    assert books.charged == [(FEATURE, TOKENS)] * 2


def test_background_work_of_a_call_is_work_of_its_own(
    pair: Pair, metered: Vluna, books: Books, shared_gate: Sandbox, customer: str
) -> None:
    """A task that was started inside a call and outlives it sees that call in its context, and does not add to it."""
    from litellm.integrations.custom_logger import CustomLogger

    tasks: list[Any] = []

    class Judge(CustomLogger):  # type: ignore[misc]
        async def async_pre_call_check(self, deployment: Any, parent_otel_span: Any) -> None:
            if not tasks:
                tasks.append(asyncio.create_task(self.later()))

        async def later(self) -> None:
            await asyncio.sleep(0.1)
            deployment = await target.async_get_available_deployment(
                model="other", request_kwargs={}, messages=MESSAGES
            )
            assert deployment
            await target.acompletion(model="other", messages=MESSAGES)

    litellm.callbacks.append(Judge())
    target = router([deployment(pair.first), deployment(pair.second, "other", "openai/gpt-4o-mini")])

    async def main() -> None:
        await target.acompletion(model="chat", messages=MESSAGES)
        await asyncio.gather(*tasks)

    books.run(metered, lambda: asyncio.run(main()))
    assert sorted(books.charged) == [(FEATURE, TOKENS), ("openai.gpt-4o-mini", TOKENS)]
    assert {state for _, state in books.leases} == {"closed"}
    assert len(books.leases) == 2
