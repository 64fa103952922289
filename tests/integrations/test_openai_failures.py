"""Failures before the answer give the lease back; failures after it change no bill (design rules 1 and 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pydantic
import pytest
from conftest import Bill, Colour, ask, each, entered
from provider import Provider

from vluna_llm import Vluna

CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**CHAT, "stream": True}


class Answer(pydantic.BaseModel):
    """What `parse` is asked for."""

    answer: int


async def chat(client: Any) -> None:
    await ask(client.chat.completions.create(**CHAT))


async def stream(client: Any) -> None:
    async for _ in each(await ask(client.chat.completions.create(**STREAM))):
        pass


async def response(client: Any) -> None:
    await ask(client.responses.create(model="gpt-4o", input="hi"))


async def parse(client: Any) -> None:
    await ask(client.chat.completions.parse(**CHAT, response_format=Answer))


PROGRAMS = [chat, stream, response]
programs = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)


def outcome(colour: Colour, program: Any, client: Any) -> Any:
    """What the program raised, in the terms that a product can see."""
    try:
        colour.run(program, client)
    except Exception as error:
        context = type(error.__context__).__name__
        return type(error), str(error), type(error.__cause__).__name__, context
    return None


def both(colour: Colour, vluna: Vluna, billed: Callable[..., Bill], program: Any, **options: Any) -> Bill:
    """Run it bare and wrapped: the same is raised."""
    expected = outcome(colour, program, colour.bare(**options))
    colour.provider.flaked.clear()
    seen: list[Any] = []
    bill = billed(vluna, lambda: seen.append(outcome(colour, program, vluna.wrap(colour.bare(**options)))))
    assert seen == [expected]
    return bill


@programs
def test_a_retry_belongs_to_the_same_call(
    program: Any, colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """500 and then 200: two requests, one lease, one commit."""
    provider.behaviour = "flaky"
    bill = both(colour, vluna, billed, program, max_retries=2)
    assert len(provider.requests) == 4
    bill.booked_once()


@programs
@pytest.mark.parametrize(("behaviour", "attempts"), [("down", 2), ("bad", 1)])
def test_a_refused_call_is_given_back(
    behaviour: str, attempts: int, program: Any, colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """The provider's error reaches the product as it is; nothing is charged."""
    provider.behaviour = behaviour
    bill = both(colour, vluna, billed, program, max_retries=1)
    assert len(provider.requests) == 2 * attempts
    bill.cancelled_once()


@programs
def test_a_timeout_before_the_answer_is_given_back(
    program: Any, colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """No first byte."""
    provider.behaviour = "silent"
    both(colour, vluna, billed, program, timeout=0.3).cancelled_once()


def test_no_connection_is_given_back(colour: Colour, vluna: Vluna, billed: Any) -> None:
    """Nobody listens."""
    both(colour, vluna, billed, chat, base_url="http://127.0.0.1:9/v1").cancelled_once()


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        ("length", openai.LengthFinishReasonError),
        ("filtered", openai.ContentFilterFinishReasonError),
        ("invalid", pydantic.ValidationError),
    ],
)
def test_a_failure_after_the_answer_is_booked(
    behaviour: str, kind: type[Exception], colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """The SDK raises out of a paid answer; its usage was read before."""
    provider.behaviour = behaviour
    bill = both(colour, vluna, billed, parse)
    bill.booked_once()
    assert outcome(colour, parse, colour.bare())[0] is kind


def test_a_broken_parser_of_the_product_is_booked(colour: Colour, vluna: Vluna, billed: Any) -> None:
    """Code of the product that runs inside the SDK's answer handling fails."""

    async def program(client: Any) -> None:
        def parser(answer: Any) -> Any:
            raise RuntimeError("the product's own parser")

        options = {"post_parser": parser}
        await ask(client.post("/chat/completions", body=dict(CHAT), cast_to=object, options=options))

    both(colour, vluna, billed, program).booked_once()


@pytest.mark.parametrize("behaviour", ["html", "broken", "error200"])
@pytest.mark.parametrize("program", [chat, parse, response], ids=lambda program: program.__name__)
def test_a_2xx_that_is_no_answer_is_given_back(
    behaviour: str, program: Any, colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """A proxy's page, half a JSON object, an error under status 200: nobody knows of any work."""
    provider.behaviour = behaviour
    both(colour, vluna, billed, program).cancelled_once()


async def lines(client: Any) -> None:
    async with entered(client.chat.completions.with_streaming_response.create(**CHAT)) as answer:
        async for _ in each(answer.iter_lines()):
            pass


@pytest.mark.parametrize("program", [stream, lines], ids=lambda program: program.__name__)
def test_a_page_in_the_place_of_a_stream_is_given_back(
    program: Any, colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """Something on the way has answered, and no model."""
    provider.behaviour = "html"
    both(colour, vluna, billed, program).cancelled_once()


def test_a_whole_answer_without_usage_is_estimated(
    colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """No usage is not no work (design rule 5)."""
    provider.behaviour = "no_usage"
    both(colour, vluna, billed, chat).booked_an_estimate()


# -- stream_options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", ["refuses_option", "refuses_everything_new"])
def test_an_upstream_without_the_option_is_asked_again_without_it(
    behaviour: str, colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """The call goes through inside the same operation, and this upstream is not asked again."""
    provider.behaviour = behaviour
    base_url = provider.host + f"/{behaviour}-{colour.is_async}/v1"  # upstreams are remembered by their base URL

    async def twice(client: Any) -> None:
        await stream(client)
        await stream(client)

    bill = billed(vluna, lambda: colour.run(twice, vluna.wrap(colour.bare(base_url=base_url))))
    assert ["stream_options" in seen.body for seen in provider.requests] == [True, False, False]
    assert [receipt.usage_source for receipt in bill.receipts] == ["estimated", "estimated"]


def test_a_refusal_of_something_else_is_the_products_to_see(
    colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """A caller who passed options that the upstream refuses gets that refusal, and nothing is remembered."""
    provider.behaviour = "refuses_option"
    base_url = provider.host + f"/own-{colour.is_async}/v1"

    async def program(client: Any) -> None:
        await ask(client.chat.completions.create(**STREAM, stream_options={"include_obfuscation": False}))

    bill = both(colour, vluna, billed, program, base_url=base_url)
    bill.cancelled_once()
    provider.behaviour = "ok"
    provider.requests.clear()
    billed(vluna, lambda: colour.run(stream, vluna.wrap(colour.bare(base_url=base_url))))
    assert "stream_options" in provider.requests[0].body


def test_any_other_400_is_not_tried_again(colour: Colour, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """A bad request stays one request."""
    provider.behaviour = "bad"
    both(colour, vluna, billed, stream)
    assert len(provider.requests) == 2


# -- our own faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "vluna_llm.integrations._openai_call.classify",
        "vluna_llm.integrations._openai_call.ask",
        "vluna_llm.integrations._openai_call.read_body",
        "vluna_llm.integrations._sdk_call.tap",
        "vluna_llm.tap.StreamReader.pass_through",
        "vluna_llm.tap.StreamReader.flush",
        "vluna_llm.tap.StreamReader.end",
        "vluna_llm._tap_watch.Watch.ending",
        "vluna_llm.lifecycle.Operation.finish",
        "vluna_llm.lifecycle.Operation.wait",
        "vluna_llm.lifecycle.Operation.wait_async",
    ],
)
@programs
def test_a_fault_of_ours_does_not_reach_the_product(
    place: str,
    program: Any,
    colour: Colour,
    make_vluna: Any,
    customer: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever of ours raises, the product's call goes on as if we were not there (promise 1)."""
    vluna = make_vluna(settle="inline")
    monkeypatch.setattr("vluna_llm.tap.INLINE_SECONDS", 0.1)
    monkeypatch.setattr("vluna_llm.integrations._sdk_metered.INLINE_SECONDS", 0.1)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(place, broken)
    assert outcome(colour, program, vluna.bind(colour.bare(), principal_id=customer)) is None
    assert "a fault of ours" not in caplog.text or "internal" in caplog.text
