"""A refusal on a Router: the caller gets the gate's own error, and nobody else notices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import litellm
import pytest
from books import MESSAGES, MODEL, Books
from litellm.integrations.custom_logger import CustomLogger
from routers import CORE, Pair, chat, deployment, healthy, router, two_providers

from vluna_llm import Vluna, call_context
from vluna_llm.errors import GateDenied, GateRateLimited, GateUnavailable, MissingPrincipal, VlunaError
from vluna_llm.integrations._litellm_router_core import SEAMS
from vluna_llm.sandbox import Sandbox

STRATEGIES = ["simple-shuffle", "least-busy", "usage-based-routing-v2", "latency-based-routing"]
COLOURS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@pytest.fixture(scope="module")
def _pair() -> Iterator[Pair]:
    with two_providers() as pair:
        yield pair


@pytest.fixture
def pair(_pair: Pair) -> Pair:
    """Two providers."""
    return _pair.fresh()


def eager(pair: Pair, **settings: Any) -> Any:
    """A Router that would try everything: retries, every kind of fallback, a cooldown at the first failure."""
    deployments = [*pair.group(), *pair.group("other", "openai/gpt-4o-mini"), *pair.group("last", "openai/o4-mini")]
    fallbacks: dict[str, Any] = {
        "fallbacks": [{"chat": ["other"]}],
        "default_fallbacks": ["last"],
        "context_window_fallbacks": [{"chat": ["other"]}],
        "content_policy_fallbacks": [{"chat": ["other"]}],
    }
    return router(deployments, **{**fallbacks, **settings})


def refused(target: Any, kind: type[VlunaError], **call: Any) -> Any:
    """Call it and give the refusal, which must be the caller's."""
    with pytest.raises(kind) as caught:
        chat(target, **call)
    assert type(caught.value) is kind
    return caught.value


def asked_of(gate: Sandbox, customer: str) -> int:
    """How often the gate was asked for this customer."""
    return sum(1 for seen in gate.requests if seen.principal_id == customer and seen.path.endswith("/authorize"))


def serves_everybody(target: Any, pair: Pair, *, is_async: bool, both: bool, customer: str) -> None:
    """The next customer is served at once, by each deployment."""
    assert healthy(target) == 2
    pair.fresh()
    with call_context(principal_id=f"{customer}_next"):
        for _ in range(24):
            chat(target, is_async=is_async)
            if all(pair.asked):
                break
    assert sum(pair.asked) >= 1
    assert not both or all(pair.asked), pair.asked


@COLOURS
@pytest.mark.parametrize(
    ("strategy", "stream"), [(strategy, False) for strategy in STRATEGIES] + [("simple-shuffle", True)]
)
def test_a_hundred_denials_cool_nothing_down(
    strategy: str, stream: bool, is_async: bool, pair: Pair, metered: Vluna, shared_gate: Sandbox, customer: str
) -> None:
    """A customer without credit asks a hundred times: the gate is asked once each, no provider ever."""
    shared_gate.set_credit(customer, 0)
    target = eager(pair, routing_strategy=strategy)
    with call_context(principal_id=customer) as scope:
        for _ in range(100):
            error = refused(target, GateDenied, is_async=is_async, stream=stream)
    assert (error.reason, error.status, error.gate_status, error.status_code) == ("insufficient_credit", 402, 402, 400)
    assert scope.last_denial is error
    assert asked_of(shared_gate, customer) == 100
    assert pair.asked == (0, 0)
    both = strategy in ("simple-shuffle", "usage-based-routing-v2")
    serves_everybody(target, pair, is_async=is_async, both=both, customer=customer)


@COLOURS
@STREAMS
@pytest.mark.parametrize("routed", [False, True], ids=["function", "router"])
def test_a_client_below_that_is_bound_to_somebody_else_is_refused(
    routed: bool,
    stream: bool,
    is_async: bool,
    pair: Pair,
    metered: Vluna,
    shared_gate: Sandbox,
    books: Books,
) -> None:
    """Not by LiteLLM's own call, but by the client inside: it is the same refusal, and nobody tries again."""
    import openai

    poor = f"{books.customer}_poor"
    shared_gate.set_credit(poor, 0)
    kind = openai.AsyncOpenAI if is_async else openai.OpenAI
    bare = kind(base_url=pair.first.base_url, api_key="sk", max_retries=0)
    target = eager(pair) if routed else litellm
    with call_context(principal_id=books.customer):
        error = refused(
            target,
            GateDenied,
            is_async=is_async,
            stream=stream,
            group="chat" if routed else f"openai/{MODEL}",
            client=metered.bind(bare, principal_id=poor),
        )
    books.settled(metered)
    assert (error.reason, error.gate_status, error.status_code) == ("insufficient_credit", 402, 400)
    assert asked_of(shared_gate, poor) == 1
    books.cancelled()
    assert pair.asked == (0, 0)
    if routed:
        serves_everybody(target, pair, is_async=is_async, both=True, customer=books.customer)


@COLOURS
@STREAMS
def test_rate_limits_of_the_gate_cool_nothing_down(
    stream: bool, is_async: bool, pair: Pair, metered: Vluna, shared_gate: Sandbox, customer: str
) -> None:
    """A 429 of the gate is no 429 of a deployment, and its ``retry_after`` arrives."""
    shared_gate.rate(1, principal_id=customer)
    target = eager(pair)
    with call_context(principal_id=customer):
        chat(target, is_async=is_async)
        pair.fresh()
        for _ in range(30):
            error = refused(target, GateRateLimited, is_async=is_async, stream=stream)
    assert error.retry_after is not None
    assert 0 < error.retry_after <= 61
    assert asked_of(shared_gate, customer) == 31
    assert pair.asked == (0, 0)
    serves_everybody(target, pair, is_async=is_async, both=True, customer=customer)


@COLOURS
@STREAMS
def test_a_gate_that_is_away_cools_nothing_down(
    stream: bool,
    is_async: bool,
    pair: Pair,
    make_vluna: Callable[..., Vluna],
    make_callback: Callable[..., Any],
    customer: str,
) -> None:
    """With ``on_gate_unavailable="deny"``: once it is back, or not asked any more, everything is as before."""
    target = eager(pair)
    with Sandbox() as other:
        away = Vluna(
            base_url=other.base_url,
            realm_id=other.realm_id,
            key_id=other.key_id,
            key_secret=other.key_secret,
            outbox="memory",
            on_gate_unavailable="deny",
            authorize_deadline=0.2,
        )
    make_callback(away)
    try:
        with call_context(principal_id=customer):
            for _ in range(20):
                refused(target, GateUnavailable, is_async=is_async, stream=stream)
    finally:
        away.close(timeout=0.1)
    assert pair.asked == (0, 0)
    make_callback(make_vluna())
    serves_everybody(target, pair, is_async=is_async, both=True, customer=customer)


@COLOURS
@STREAMS
def test_a_call_of_nobody_cools_nothing_down(
    stream: bool, is_async: bool, pair: Pair, metered: Vluna, shared_gate: Sandbox, customer: str
) -> None:
    """Without a principal neither the gate nor a provider is asked."""
    target = eager(pair)
    before = len(shared_gate.requests)
    for _ in range(30):
        refused(target, MissingPrincipal, is_async=is_async, stream=stream)
    assert len(shared_gate.requests) == before
    assert pair.asked == (0, 0)
    serves_everybody(target, pair, is_async=is_async, both=True, customer=customer)


@COLOURS
def test_denials_use_up_no_requests_per_minute(
    is_async: bool, pair: Pair, metered: Vluna, shared_gate: Sandbox, customer: str
) -> None:
    """A deployment's own limit is counted before each call by some strategies: a denied call is none."""
    shared_gate.set_credit(customer, 0)
    target = router(pair.group(rpm=5), routing_strategy="usage-based-routing-v2")
    with call_context(principal_id=customer):
        for _ in range(30):
            refused(target, GateDenied, is_async=is_async)
    with call_context(principal_id=f"{customer}_next"):
        for _ in range(6):
            chat(target, is_async=is_async)


@COLOURS
@pytest.mark.parametrize(
    "settings",
    [
        {"retry_policy": litellm.RetryPolicy(BadRequestErrorRetries=3, RateLimitErrorRetries=3)},
        {"allowed_fails": 1},
        {"allowed_fails_policy": {"BadRequestErrorAllowedFails": 0, "RateLimitErrorAllowedFails": 0}},
        {"fallbacks": [{"*": ["other"]}]},
        {"enable_pre_call_checks": True},
        {"disable_cooldowns": True},
    ],
    ids=["retry_policy", "allowed_fails", "allowed_fails_policy", "generic_fallback", "pre_call_checks", "no_cooldown"],
)
def test_no_setting_of_the_router_tries_a_denied_call_again(
    settings: dict[str, Any], is_async: bool, pair: Pair, metered: Vluna, shared_gate: Sandbox, customer: str
) -> None:
    """One question to the gate, the same refusal, no provider."""
    shared_gate.set_credit(customer, 0)
    target = eager(pair, **settings)
    with call_context(principal_id=customer):
        for _ in range(3):
            refused(target, GateDenied, is_async=is_async)
    assert asked_of(shared_gate, customer) == 3
    assert pair.asked == (0, 0)
    assert healthy(target) == 2


@pytest.mark.parametrize(
    "fallbacks",
    [["other"], [{"model": "other"}], [{"model": f"openai/{MODEL}", "api_key": "sk", "messages": MESSAGES}]],
    ids=["names", "objects", "other_arguments"],
)
@COLOURS
def test_fallbacks_that_come_with_the_call_are_not_tried(
    fallbacks: list[Any], is_async: bool, pair: Pair, metered: Vluna, shared_gate: Sandbox, customer: str
) -> None:
    """``router.completion(..., fallbacks=[...], num_retries=3)``."""
    shared_gate.set_credit(customer, 0)
    target = eager(pair)
    with call_context(principal_id=customer):
        refused(target, GateDenied, is_async=is_async, fallbacks=fallbacks, num_retries=3)
    assert asked_of(shared_gate, customer) == 1
    assert pair.asked == (0, 0)


METHODS: list[Any] = [
    pytest.param("completion", {"messages": MESSAGES}, id="completion"),
    pytest.param("acompletion", {"messages": MESSAGES}, id="acompletion"),
    pytest.param("acompletion", {"messages": MESSAGES, "priority": 1}, id="acompletion-priority"),
    pytest.param("text_completion", {"prompt": "hi"}, id="text_completion"),
    pytest.param("atext_completion", {"prompt": "hi"}, id="atext_completion"),
    pytest.param("embedding", {"input": ["hi"]}, id="embedding"),
    pytest.param("aembedding", {"input": ["hi"]}, id="aembedding"),
    pytest.param("responses", {"input": "hi"}, id="responses"),
    pytest.param("aresponses", {"input": "hi"}, id="aresponses"),
    pytest.param("aanthropic_messages", {"messages": MESSAGES, "max_tokens": 9}, id="aanthropic_messages"),
    pytest.param("image_generation", {"prompt": "a cat"}, id="image_generation"),
    pytest.param("aimage_generation", {"prompt": "a cat"}, id="aimage_generation"),
]


def invoke(target: Any, name: str, **arguments: Any) -> Any:
    """Call the Router's method and wait for its answer."""
    method = getattr(target, name)
    if not name.startswith("a"):
        return method(**arguments)

    async def main() -> Any:
        return await method(**arguments)

    return asyncio.run(main())


@pytest.mark.parametrize("born", ["before", "after"])
@pytest.mark.parametrize(("name", "arguments"), METHODS)
def test_every_method_refuses_and_goes_on(
    name: str,
    arguments: dict[str, Any],
    born: str,
    pair: Pair,
    vluna: Vluna,
    make_callback: Callable[..., Any],
    shared_gate: Sandbox,
    customer: str,
) -> None:
    """Also of a Router that was made before we came, whose generated methods hold LiteLLM's bare functions."""
    settings: dict[str, Any] = {"fallbacks": [{"gpt-4o": ["other"]}]}
    deployments = [*pair.group("gpt-4o"), *pair.group("other", "openai/gpt-4o-mini")]
    target = router(deployments, **settings) if born == "before" else None
    make_callback(vluna)
    target = target or router(deployments, **settings)
    shared_gate.set_credit(customer, 0)
    with call_context(principal_id=customer), pytest.raises(GateDenied):
        invoke(target, name, model="gpt-4o", **arguments)
    assert asked_of(shared_gate, customer) == 1
    assert pair.asked == (0, 0)
    assert healthy(target, "gpt-4o") == 2
    served = Books(shared_gate, f"{customer}_next")
    if name == "text_completion":  # LiteLLM hands the group's name on as the model, and the key of none
        arguments = {**arguments, "api_base": pair.first.base_url, "api_key": "sk"}
    served.run(vluna, lambda: invoke(target, name, model="gpt-4o", **arguments))
    assert [state for _, state in served.leases] == ["closed"], served.leases
    assert len(served.charged) == 1
    assert sum(pair.asked) == 1


def test_a_method_taken_from_a_router_before_we_came_refuses(
    pair: Pair, vluna: Vluna, make_callback: Callable[..., Any], shared_gate: Sandbox, customer: str
) -> None:
    """``ask = router.acompletion`` in a module that is imported first."""
    target = eager(pair)
    ask, aask = target.completion, target.acompletion
    make_callback(vluna)
    shared_gate.set_credit(customer, 0)

    async def main() -> None:
        await aask(model="chat", messages=MESSAGES)

    with call_context(principal_id=customer):
        with pytest.raises(GateDenied):
            ask(model="chat", messages=MESSAGES)
        with pytest.raises(GateDenied):
            asyncio.run(main())
    assert asked_of(shared_gate, customer) == 2
    assert pair.asked == (0, 0)
    served = Books(shared_gate, f"{customer}_next")
    served.run(vluna, lambda: ask(model="chat", messages=MESSAGES))
    served.once()


def test_a_refusal_is_no_failure_of_the_program_and_alerts_nobody(
    pair: Pair, metered: Vluna, shared_gate: Sandbox, customer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither LiteLLM's failure counters nor its alerts see a customer without credit."""
    alerts: list[Any] = []

    async def alert(**details: Any) -> None:
        alerts.append(details)

    class Failures(CustomLogger):  # type: ignore[misc]
        """By these the line of 1.110 alerts."""

        async def async_log_failure_event(self, *details: Any) -> None:
            alerts.append(details)

        async def log_failure_fallback_event(self, *details: Any) -> None:
            alerts.append(details)

    if CORE:
        litellm.callbacks.append(Failures())
    else:
        monkeypatch.setattr(litellm.router, "send_llm_exception_alert", alert)
    shared_gate.set_credit(customer, 0)
    target = eager(pair)

    async def main() -> None:
        for _ in range(3):
            with pytest.raises(GateDenied):
                await target.acompletion(model="chat", messages=MESSAGES)
        await asyncio.sleep(0.05)

    with call_context(principal_id=customer):
        asyncio.run(main())
    assert alerts == []
    assert dict(target.fail_calls) == {}


def test_an_error_of_the_provider_is_as_before(pair: Pair, metered: Vluna, customer: str) -> None:
    """A provider that is down is retried, fallen back from and reported in LiteLLM's own words."""
    pair.first.behaviour = pair.second.behaviour = "down"
    target = router(pair.group(), disable_cooldowns=True)
    with call_context(principal_id=customer), pytest.raises(litellm.InternalServerError):
        chat(target, is_async=True)
    assert sum(pair.asked) == 3


def test_observe_mode_refuses_nothing(pair: Pair, metered: Vluna, shared_gate: Sandbox, customer: str) -> None:
    """The roll-out in the shadow: denied calls run, and so do calls of nobody."""
    metered.mode = "observe"
    shared_gate.set_credit(customer, 0)
    target = eager(pair)
    with call_context(principal_id=customer):
        chat(target, is_async=False)
        chat(target, is_async=True)
    chat(target, is_async=True)
    assert sum(pair.asked) == 3


def test_off_asks_nothing(pair: Pair, metered: Vluna, shared_gate: Sandbox, books: Books) -> None:
    """The kill switch."""
    metered.mode = "off"
    target = eager(pair)
    with call_context(principal_id=books.customer):
        chat(target, is_async=False)
        chat(target, is_async=True, stream=True)
    books.nothing()


def test_without_wrappers_a_denial_cools_nothing_down_either(
    pair: Pair, vluna: Vluna, make_callback: Callable[..., Any], shared_gate: Sandbox, customer: str
) -> None:
    """``install=False``: LiteLLM's own hook refuses asynchronous calls, for each model group that LiteLLM tries."""
    make_callback(vluna, install=False)
    shared_gate.set_credit(customer, 0)
    target = eager(pair, num_retries=2)

    async def main() -> None:
        for _ in range(20):
            with pytest.raises(GateDenied):
                await target.acompletion(model="chat", messages=MESSAGES)
        await asyncio.sleep(0.1)

    with call_context(principal_id=customer):
        asyncio.run(main())
    assert pair.asked == (0, 0)
    serves_everybody(target, pair, is_async=True, both=True, customer=customer)


def test_uninstalled_it_is_litellms_own(vluna: Vluna, pair: Pair, make_callback: Callable[..., Any]) -> None:
    """Every patched method is back, and a Router that was made in between works on."""
    from vluna_llm.integrations import litellm as integration

    # From 1.110 on the class that is made is a facade before others that work.
    owners = {seam.owner: seam.found() for seam in SEAMS} if CORE else {"Router": litellm.Router}

    def functions() -> dict[tuple[str, str], Any]:
        found = ((where, name, value) for where, owner in owners.items() for name, value in vars(owner).items())
        return {(where, name): value for where, name, value in found if callable(value)}

    before = functions()
    health = litellm.ahealth_check
    make_callback(vluna)
    patched = functions()
    for where in owners:
        assert any(patched[key] is not value for key, value in before.items() if key[0] == where), where
    assert litellm.ahealth_check is not health
    target = router([deployment(pair.first)])
    integration.uninstall()
    assert functions() == before
    assert litellm.ahealth_check is health
    chat(target, is_async=False)
    assert asyncio.run(_respond(target)) is not None


async def _respond(target: Any) -> Any:
    return await target.aresponses(model="chat", input="hi")
