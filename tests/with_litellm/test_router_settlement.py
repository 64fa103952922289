"""A logical call on a Router is one operation: through retries, to another model and out of the cache."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import litellm
import pytest
from books import FEATURE, MESSAGES, TOKENS, Books, eventually
from routers import NEW, Pair, call, chat, deployment, router, two_providers

from vluna_llm import Vluna, call_context
from vluna_llm.errors import ConfigurationError, GateDenied
from vluna_llm.sandbox import Sandbox

COLOURS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
MINI = "openai.gpt-4o-mini"


@pytest.fixture(scope="module")
def _pair() -> Iterator[Pair]:
    with two_providers() as pair:
        yield pair


@pytest.fixture
def pair(_pair: Pair) -> Pair:
    """Two providers."""
    return _pair.fresh()


def with_fallback(pair: Pair, **settings: Any) -> Any:
    """The group ``chat`` on the first provider, the group ``other`` (another model) on the second."""
    deployments = [deployment(pair.first), deployment(pair.second, "other", "openai/gpt-4o-mini")]
    return router(deployments, **{"fallbacks": [{"chat": ["other"]}], "num_retries": 0, **settings})


# -- retries -----------------------------------------------------------------------------------------------------------


@COLOURS
@STREAMS
def test_a_retry_stays_in_its_operation(stream: bool, is_async: bool, pair: Pair, metered: Vluna, books: Books) -> None:
    """500, then an answer: one lease, one charge."""
    pair.first.behaviour = "flaky"
    target = router([deployment(pair.first)], disable_cooldowns=True)
    books.run(metered, lambda: chat(target, is_async=is_async, stream=stream))
    books.once()
    assert pair.asked == (2, 0)


@COLOURS
@pytest.mark.parametrize(
    ("name", "arguments", "tokens"),
    [("embedding", {"input": ["hi"]}, 8), ("responses", {"input": "hi"}, TOKENS)],
    ids=["embedding", "responses"],
)
def test_so_does_a_retry_of_other_calls(
    name: str, arguments: dict[str, Any], tokens: int, is_async: bool, pair: Pair, metered: Vluna, books: Books
) -> None:
    """1.106's sync ``responses`` knows no retries, and 1.83's needs ``tenacity``: a failure gives the lease back."""
    pair.first.behaviour = "flaky"
    target = router([deployment(pair.first)], disable_cooldowns=True)
    if name == "responses" and not is_async and (NEW or find_spec("tenacity") is None):
        with pytest.raises(Exception, match=r"internal|tenacity"):
            books.run(metered, lambda: call(target, name, is_async=False, model="chat", **arguments))
        books.settled(metered)
        books.cancelled()
        return
    books.run(metered, lambda: call(target, name, is_async=is_async, model="chat", **arguments))
    books.once(tokens=tokens)


@COLOURS
@STREAMS
def test_what_fails_for_good_costs_nothing(
    stream: bool, is_async: bool, pair: Pair, metered: Vluna, books: Books
) -> None:
    """Three attempts, one lease, given back."""
    pair.first.behaviour = pair.second.behaviour = "down"
    target = router(pair.group(), disable_cooldowns=True)
    with pytest.raises(litellm.InternalServerError):
        books.run(metered, lambda: chat(target, is_async=is_async, stream=stream))
    books.settled(metered)
    books.cancelled()
    assert sum(pair.asked) == 3


# -- fallbacks ---------------------------------------------------------------------------------------------------------


@COLOURS
@STREAMS
def test_a_fallback_to_another_model_is_another_lease(
    stream: bool, is_async: bool, pair: Pair, metered: Vluna, books: Books
) -> None:
    """The first lease is given back, the model that answered is charged."""
    pair.first.behaviour = "down"
    target = with_fallback(pair)
    books.run(metered, lambda: chat(target, is_async=is_async, stream=stream))
    assert books.leases == [(FEATURE, "canceled"), (MINI, "closed")]
    assert books.charged == [(MINI, TOKENS)]
    assert pair.asked == (1, 1)


@COLOURS
@STREAMS
def test_a_fallback_to_the_same_model_keeps_the_lease(
    stream: bool, is_async: bool, pair: Pair, metered: Vluna, books: Books
) -> None:
    """Another group with the same model: one lease, one charge."""
    pair.first.behaviour = "down"
    deployments = [deployment(pair.first), deployment(pair.second, "other")]
    target = router(deployments, fallbacks=[{"chat": ["other"]}], num_retries=0)
    books.run(metered, lambda: chat(target, is_async=is_async, stream=stream))
    books.once()
    assert pair.asked == (1, 1)


@COLOURS
@STREAMS
def test_a_fallback_that_the_customer_may_not_use_is_refused(
    stream: bool, is_async: bool, pair: Pair, metered: Vluna, shared_gate: Sandbox, books: Books
) -> None:
    """The gate's word on the second model comes out as it is, not the provider's error of the first."""
    shared_gate.quota(0, feature=MINI, principal_id=books.customer)
    pair.first.behaviour = "down"
    target = with_fallback(pair, fallbacks=[{"chat": ["other", "third"]}])
    with pytest.raises(GateDenied) as caught:
        books.run(metered, lambda: chat(target, is_async=is_async, stream=stream))
    assert caught.value.reason == "quota"
    books.settled(metered)
    assert books.leases == [(FEATURE, "canceled")]
    assert books.charged == []
    assert pair.asked == (1, 0)


@COLOURS
def test_deployments_of_one_group_may_sell_different_things(
    is_async: bool, pair: Pair, metered: Vluna, shared_gate: Sandbox, customer: str
) -> None:
    """Each call is admitted and charged as what its deployment is: one lease, whichever was chosen."""
    deployments = [deployment(pair.first), deployment(pair.second, model="openai/gpt-4o-mini")]
    target = router(deployments)
    for number in range(24):
        books = Books(shared_gate, f"{customer}_{number}")
        before = pair.asked
        books.run(metered, lambda: chat(target, is_async=is_async))
        books.once(FEATURE if pair.asked[0] > before[0] else MINI)
        if all(pair.asked):
            break
    assert all(pair.asked)


@COLOURS
def test_a_retry_on_a_deployment_that_sells_something_else_is_another_lease(
    is_async: bool, pair: Pair, metered: Vluna, books: Books
) -> None:
    """The failed one's lease is given back; never two charges."""
    pair.first.behaviour = "down"
    deployments = [
        deployment(pair.first, weight=1000, order=1),
        deployment(pair.second, model="openai/gpt-4o-mini", order=2),
    ]
    target = router(deployments, num_retries=1)
    books.run(metered, lambda: chat(target, is_async=is_async))
    assert books.leases == [(FEATURE, "canceled"), (MINI, "closed")]
    assert books.charged == [(MINI, TOKENS)]


@COLOURS
def test_an_answer_that_the_router_throws_away_was_spent(
    is_async: bool, pair: Pair, metered: Vluna, books: Books
) -> None:
    """``content_policy_fallbacks``: the filtered answer has cost its tokens, and so has the one that replaces it."""
    pair.first.behaviour = "filtered"
    target = with_fallback(pair, content_policy_fallbacks=[{"chat": ["other"]}])
    books.run(metered, lambda: chat(target, is_async=is_async))
    assert books.leases == [(FEATURE, "closed"), (MINI, "closed")]
    assert books.charged == [(FEATURE, TOKENS), (MINI, TOKENS)]


# -- the cache ---------------------------------------------------------------------------------------------------------


@COLOURS
@STREAMS
def test_a_cached_answer_costs_nothing(
    stream: bool, is_async: bool, pair: Pair, metered: Vluna, shared_gate: Sandbox, customer: str
) -> None:
    """``cache_responses=True``: the second customer gets the first one's answer, and the lease is given back."""
    target = router([deployment(pair.first)], cache_responses=True)
    messages = [{"role": "user", "content": f"of {customer}"}]

    async def main(books: Books) -> None:
        answer = await target.acompletion(model="chat", messages=messages, stream=stream)
        if stream:
            assert [item async for item in answer]
        await asyncio.sleep(0.2)  # LiteLLM fills its cache in the background

    def once(books: Books) -> None:
        if is_async:
            asyncio.run(main(books))
        else:
            answer = target.completion(model="chat", messages=messages, stream=stream)
            assert not stream or list(answer)

    first, second = Books(shared_gate, customer), Books(shared_gate, f"{customer}_next")
    first.run(metered, lambda: once(first))
    first.once()
    if not is_async:
        assert eventually(lambda: bool(litellm.cache.cache.cache_dict))
    second.run(metered, lambda: once(second))
    assert pair.asked == (1, 0)
    assert second.charged == []
    assert {state for _, state in second.leases} <= {"canceled"}


# -- who pays ----------------------------------------------------------------------------------------------------------


@COLOURS
def test_the_customer_is_named_with_the_call(is_async: bool, pair: Pair, metered: Vluna, books: Books) -> None:
    """``metadata={"vluna": {...}}``: it wins, is not changed, and reaches no provider; other metadata stays."""
    pair.first.behaviour = "flaky"
    target = router([deployment(pair.first)], disable_cooldowns=True)
    metadata = {"vluna": {"principal_id": books.customer, "labels": {"seat": "7"}}, "mine": "kept"}
    with call_context(principal_id="somebody_else"):
        chat(target, is_async=is_async, metadata=metadata)
    assert metadata == {"vluna": {"principal_id": books.customer, "labels": {"seat": "7"}}, "mine": "kept"}
    books.settled(metered)
    books.once()
    (entry,) = books.gate.booked(books.customer).entries
    assert entry.labels["seat"] == "7"
    assert all("vluna" not in str(seen.body) for seen in pair.first.posts())


@COLOURS
def test_metadata_for_us_alone_leaves_the_routers_own(is_async: bool, pair: Pair, metered: Vluna, books: Books) -> None:
    """The Router writes its notes into metadata that it makes itself then."""
    target = router([deployment(pair.first)])
    vluna = {"principal_id": books.customer}
    chat(target, is_async=is_async, metadata={"vluna": vluna})
    call(target, "embedding", is_async=is_async, model="chat", input=["hi"], metadata={"vluna": vluna})
    call(target, "responses", is_async=is_async, model="chat", input="hi", metadata={"vluna": vluna})
    books.settled(metered)
    assert sorted(tokens for _, tokens in books.charged) == [8, TOKENS, TOKENS]
    assert all("vluna" not in str(seen.body) for seen in pair.first.posts())


@COLOURS
def test_unusable_metadata_is_refused(is_async: bool, pair: Pair, metered: Vluna) -> None:
    """Before the provider is asked, in plain words, and once."""
    target = with_fallback(pair)
    with pytest.raises(ConfigurationError, match="principal"):
        chat(target, is_async=is_async, metadata={"vluna": {"principal": "x"}})
    assert pair.asked == (0, 0)


def test_a_sync_method_on_a_loop_knows_who_pays(pair: Pair, metered: Vluna, books: Books) -> None:
    """LiteLLM works in another thread then, to which no context reaches by itself."""
    pair.first.behaviour = "flaky"
    target = router([deployment(pair.first)], disable_cooldowns=True)

    async def main() -> None:
        with call_context(principal_id=books.customer):
            target.completion(model="chat", messages=MESSAGES)

    asyncio.run(main())
    books.settled(metered)
    books.once()


# -- many calls --------------------------------------------------------------------------------------------------------


def test_many_calls_at_once_are_many_operations(pair: Pair, metered: Vluna, books: Books) -> None:
    """One Router, one loop, calls that retry and fall back at the same time."""
    pair.first.behaviour = "flaky"
    target = with_fallback(pair, num_retries=1, disable_cooldowns=True)

    async def main() -> None:
        await asyncio.gather(*(target.acompletion(model=name, messages=MESSAGES) for name in ("chat", "other") * 10))

    books.run(metered, lambda: asyncio.run(main()))
    assert sorted(books.charged) == [(FEATURE, TOKENS)] * 10 + [(MINI, TOKENS)] * 10
    assert {state for _, state in books.leases} == {"closed"}
    assert len(books.leases) == 20


def test_a_batch_is_an_operation_for_each_answer(pair: Pair, metered: Vluna, books: Books) -> None:
    """``abatch_completion`` hands errors back as results: a refused one among them is the gate's own."""
    target = with_fallback(pair)
    books.gate.quota(0, feature=MINI, principal_id=books.customer)
    found: list[Any] = []

    async def main() -> None:
        found.extend(await target.abatch_completion(models=["chat", "other"], messages=MESSAGES))

    books.run(metered, lambda: asyncio.run(main()))
    assert isinstance(found[0], litellm.ModelResponse)
    assert isinstance(found[1], GateDenied)
    books.once()


def test_the_fastest_of_a_batch_leaves_no_lease_behind(pair: Pair, metered: Vluna, books: Books) -> None:
    """``abatch_completion_fastest_response``: the slower one is cancelled, and so is its lease."""
    pair.first.behaviour = "silent"
    target = with_fallback(pair)

    async def main() -> None:
        answer = await target.abatch_completion_fastest_response(model="chat, other", messages=MESSAGES)
        assert isinstance(answer, litellm.ModelResponse)
        await asyncio.sleep(0.05)

    books.run(metered, lambda: asyncio.run(main()))
    assert sorted(books.leases) == [(FEATURE, "canceled"), (MINI, "closed")]
    assert books.charged == [(MINI, TOKENS)]


def test_the_fastest_of_a_batch_says_why_nobody_answered(
    pair: Pair, metered: Vluna, shared_gate: Sandbox, customer: str
) -> None:
    """LiteLLM says only that all have failed."""
    shared_gate.set_credit(customer, 0)
    target = with_fallback(pair)

    async def main() -> None:
        await target.abatch_completion_fastest_response(model="chat, other", messages=MESSAGES)

    with call_context(principal_id=customer), pytest.raises(GateDenied):
        asyncio.run(main())


def test_a_call_with_a_priority_is_one_operation(pair: Pair, metered: Vluna, books: Books) -> None:
    """The Router's queue calls its own public method again."""
    target = router([deployment(pair.first)])

    async def main() -> None:
        await target.acompletion(model="chat", messages=MESSAGES, priority=1)

    books.run(metered, lambda: asyncio.run(main()))
    books.once()


def test_a_call_that_is_cancelled_gives_its_lease_back(pair: Pair, metered: Vluna, books: Books) -> None:
    """The task is cancelled while it waits for the provider."""
    pair.first.behaviour = "silent"
    target = router([deployment(pair.first)])

    async def main() -> None:
        task = asyncio.create_task(target.acompletion(model="chat", messages=MESSAGES))
        assert await asyncio.to_thread(eventually, lambda: bool(pair.first.requests))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    books.run(metered, lambda: asyncio.run(main()))
    books.cancelled()


def test_another_call_of_the_router_inside_is_another_operation(
    pair: Pair, vluna: Vluna, make_callback: Callable[..., Any], books: Books
) -> None:
    """Some hook asks a cheap model what it thinks of the request, through the same Router."""
    from litellm.integrations.custom_logger import CustomLogger

    class Classifier(CustomLogger):  # type: ignore[misc]
        busy = False

        async def async_filter_deployments(
            self, model: str, healthy_deployments: Any, messages: Any, **more: Any
        ) -> Any:
            if model == "chat" and not self.busy:
                self.busy = True
                await target.acompletion(model="other", messages=messages)
            return healthy_deployments

    make_callback(vluna, Classifier())
    target = with_fallback(pair)
    books.run(vluna, lambda: chat(target, is_async=True))
    assert sorted(books.leases) == [(FEATURE, "closed"), (MINI, "closed")]
    assert sorted(books.charged) == [(FEATURE, TOKENS), (MINI, TOKENS)]


def test_a_wrapped_client_below_settles_once(pair: Pair, metered: Vluna, books: Books) -> None:
    """``client=`` of the call: the operation that the Router's call was admitted with is claimed."""
    import openai

    target = router([deployment(pair.first)])
    client = metered.wrap(openai.OpenAI(base_url=pair.first.base_url, api_key="sk", max_retries=0))
    books.run(metered, lambda: target.completion(model="chat", messages=MESSAGES, client=client))
    books.once()
    assert pair.asked == (1, 0)


def test_calls_at_once_inside_one_request_are_operations_of_their_own(pair: Pair, metered: Vluna, books: Books) -> None:
    """A request of the proxy for ``model="chat, other"`` is one call there, and two on its Router at the same time."""
    from vluna_llm.integrations._litellm_call import LogicalCall

    pair.first.behaviour = "flaky"
    target = with_fallback(pair, num_retries=1, disable_cooldowns=True)

    async def main() -> None:
        with LogicalCall(metered).running():
            names = ("chat", "other", "chat", "other")
            await asyncio.gather(*(target.acompletion(model=name, messages=MESSAGES) for name in names))

    books.run(metered, lambda: asyncio.run(main()))
    assert sorted(books.leases) == [(FEATURE, "closed")] * 2 + [(MINI, "closed")] * 2
    assert sorted(books.charged) == [(FEATURE, TOKENS)] * 2 + [(MINI, TOKENS)] * 2
