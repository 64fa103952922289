"""``vluna-llm demo --live``: what it says, what it asks, what it spends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("uvicorn", reason="these tests need the extra sandbox")

from vluna_llm.sandbox import Sandbox

Cli = Callable[..., Any]


def _live(gate: Sandbox, upstream: Any) -> dict[str, str]:
    return {**gate.env(), "OPENAI_API_KEY": "sk-mine", "OPENAI_BASE_URL": upstream.base_url}


@pytest.fixture
def upstream() -> Iterator[Any]:
    """Stands for the user's provider."""
    pytest.importorskip("openai", reason="the demo needs the extra openai")
    from vluna_llm.sandbox.replay import ReplayUpstream

    with ReplayUpstream() as running:
        yield running


LIVE = ("demo", "--live", "--model", "smollm2-135m-instruct")


def test_live_says_what_it_will_spend_and_does_nothing_unasked(cli: Cli, gate: Sandbox, upstream: Any) -> None:
    """Without a terminal and without --yes it stops after saying model, calls and upper bound."""
    ran = cli(*LIVE, "--principal", "me", **_live(gate, upstream))
    assert ran.code == 2
    assert "smollm2-135m-instruct" in ran.out
    assert "208 tokens" in ran.out
    assert "pass --yes" in ran.err
    assert upstream.served == ()
    assert gate.requests == []


def test_live_calls_and_shows_what_was_billed(cli: Cli, gate: Sandbox, upstream: Any) -> None:
    """With --yes two calls are made with the user's own settings, and both are charged to the customer."""
    ran = cli(*LIVE, "--principal", "me", "--yes", **_live(gate, upstream))
    assert ran.code == 0
    assert len(upstream.served) == 2
    assert len(gate.booked("me").applied) == 2
    assert f"{gate.booked('me').entries[0].charged_xusd:,}" in ran.out
    assert "sk-mine" not in ran.out + ran.err


def test_live_tells_a_refusal(cli: Cli, gate: Sandbox, upstream: Any) -> None:
    """A customer without credit: said, exit code 1, and the provider was not called."""
    gate.set_credit("me", 0)
    ran = cli(*LIVE, "--principal", "me", "--yes", **_live(gate, upstream))
    assert ran.code == 1
    assert "before the provider was called" in ran.out
    assert upstream.served == ()


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("OPENAI_API_KEY", "OPENAI_API_KEY is not set"),
        ("VLUNA_REALM_ID", "half configured: set VLUNA_REALM_ID"),
        ("principal", "pass --principal"),
    ],
)
def test_live_names_what_is_missing(cli: Cli, gate: Sandbox, upstream: Any, missing: str, said: str) -> None:
    """Before anything is announced or called: one sentence with what is missing."""
    env = _live(gate, upstream)
    env.pop(missing, None)
    payer = () if missing == "principal" else ("--principal", "me")
    ran = cli(*LIVE, "--yes", *payer, **env)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert upstream.served == ()


def test_live_refuses_while_billing_is_off(cli: Cli, gate: Sandbox, upstream: Any) -> None:
    """With the mode off nothing would be billed, so nothing is spent either."""
    ran = cli(*LIVE, "--yes", "--principal", "me", **_live(gate, upstream), VLUNA_LLM_MODE="off")
    assert ran.code == 2
    assert "VLUNA_LLM_MODE is 'off'" in ran.err
    assert upstream.served == ()
