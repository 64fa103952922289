"""The demo, run as a user runs it, in an environment full of settings that it must not touch."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("typer", reason="the demo needs the extra demo")
pytest.importorskip("openai", reason="the demo needs the extra demo")
pytest.importorskip("uvicorn", reason="the demo needs the extra demo")

from rich.console import Console

from vluna_llm.demo import run
from vluna_llm.demo.books import Books, Tokens, keep_books, price_list
from vluna_llm.demo.player import Player
from vluna_llm.demo.stage import NOT_A_KEY, Stage

SECONDS = 20
"""What the demo may take, seconds."""

POISON = {
    "VLUNA_SERVICE_BASE_URL": "not a url",
    "VLUNA_REALM_ID": "",
    "VLUNA_SERVICE_KEY_ID": "a,b",
    "VLUNA_SERVICE_KEY_SECRET": "not base64!",
    "VLUNA_LLM_MODE": "of course",
    "VLUNA_LLM_SETTLE": "never",
    "VLUNA_LLM_AUTHORIZE_DEADLINE": "soon",
    "VLUNA_LLM_FEATURES": "/nowhere/features.toml",
    "VLUNA_LLM_PRINCIPAL": " blank ",
    "OPENAI_API_KEY": "sk-the-users-own",
    "OPENAI_BASE_URL": "http://127.0.0.1:9/v1",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "http://127.0.0.1:9",
}


class Ran(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float
    home: Path


def _environment(home: Path) -> dict[str, str]:
    """A fresh home, an outbox of the user's in it, and broken settings."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "VIRTUAL_ENV")}
    outbox = home / "outbox-of-the-user"
    return {
        **kept,
        **POISON,
        "HOME": str(home),
        "XDG_STATE_HOME": str(home / "state"),
        "TMPDIR": str(home / "tmp"),
        "VLUNA_LLM_OUTBOX": str(outbox),
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """The demo as JSON and as text of 80 columns, side by side."""
    started = {}
    for name, arguments, extra in (("json", ["--json"], {}), ("text", [], {"COLUMNS": "80"})):
        home = tmp_path_factory.mktemp(name)
        (home / "tmp").mkdir()
        process = subprocess.Popen(
            [sys.executable, "-m", "vluna_llm", "demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**_environment(home), **extra},
        )
        started[name] = (process, home, time.monotonic())
    results = {}
    for name, (process, home, began) in started.items():
        out, err = process.communicate(timeout=90)
        results[name] = Ran(process.returncode, out, err, time.monotonic() - began, home)
    return results


@pytest.fixture(scope="module")
def books(ran: dict[str, Ran]) -> dict[str, Any]:
    """The books of the run."""
    parsed: dict[str, Any] = json.loads(ran["json"].out)
    return parsed


def _step(books: dict[str, Any], step: str) -> list[dict[str, Any]]:
    found = [call for call in books["calls"] if call["step"] == step]
    assert found
    return found


def test_it_succeeds_in_an_environment_full_of_broken_settings(ran: dict[str, Ran]) -> None:
    """Exit code 0, nothing on standard error, within its time (two runs share the machine here)."""
    for one in ran.values():
        assert (one.code, one.err) == (0, "")
    assert json.loads(ran["json"].out)["seconds"] <= SECONDS


def test_it_leaves_nothing_behind(ran: dict[str, Ran]) -> None:
    """Neither the user's outbox nor the user's state is touched, and the temporary directory is gone."""
    for one in ran.values():
        assert sorted(str(path.relative_to(one.home)) for path in one.home.rglob("*")) == ["tmp"]


def test_the_users_key_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of the demo has a key of its own and goes to loopback, whatever the environment says."""
    for name, value in POISON.items():
        monkeypatch.setenv(name, value)
    with Stage() as stage:
        assert stage.client.api_key == NOT_A_KEY
        assert str(stage.client.base_url).startswith("http://127.0.0.1:")
        assert stage.vluna.settings.mode == "enforce"
        assert (stage.vluna.settings.base_url, stage.vluna.settings.principal) == (stage.gate.base_url, None)


def test_three_books_are_equal_to_the_token(books: dict[str, Any]) -> None:
    """For each customer: what the recordings report, what vluna-llm settled and what the gate charged."""
    assert books["ok"] is True
    assert len(books["customers"]) >= 9
    for account in books["customers"]:
        counts = [
            {kind: account[book][kind] for kind in Tokens._fields} for book in ("recordings", "vluna_llm", "gate")
        ]
        assert counts[0] == counts[1] == counts[2], account["customer"]
        assert account["vluna_llm"]["xusd"] == account["gate"]["xusd"] == account["price_list_xusd"]
        assert account["equal"] is True
    assert sum(account["gate"]["cached"] for account in books["customers"]) > 500
    assert books["charged_xusd"] == sum(call["gate"]["xusd"] for call in books["calls"])


def test_every_single_call_agrees(books: dict[str, Any]) -> None:
    """Sums could hide two mistakes that cancel out: each call agrees by itself, and nearly all were answered."""
    for call in books["calls"]:
        counts = [{kind: call[book][kind] for kind in Tokens._fields} for book in ("vluna_llm", "gate")]
        assert counts[0] == counts[1], call
        if call["recording"] is not None:
            assert call["recording"] == counts[0], call
    outcomes = Counter(call["outcome"] for call in books["calls"])
    assert outcomes == {"answered": len(books["calls"]) - 4, "refused": 2, "left early": 1, "broke off": 1}


def test_it_shows_the_endpoints_that_it_promises(books: dict[str, Any]) -> None:
    """Chat and Responses both ways, embeddings, completions; cached prompt tokens; an async burst of 50."""
    kinds = {(call["kind"], call["streamed"]) for call in books["calls"]}
    assert {("chat", False), ("chat", True), ("responses", False), ("responses", True), ("embeddings", False)} <= kinds
    assert all(call["gate"]["cached"] for call in _step(books, "cached"))
    burst = _step(books, "burst")
    assert len(burst) == 50
    assert len({call["customer"] for call in burst}) == 5
    assert all(call["state"] == "booked" for call in burst)


@pytest.mark.parametrize(("step", "why"), [("denied", "denied: insufficient_credit"), ("rate", "rate limited")])
def test_a_refused_call_never_reaches_the_provider(books: dict[str, Any], step: str, why: str) -> None:
    """The upstream counted no request while the call was refused, and nothing was charged for it."""
    call = _step(books, step)[-1]
    assert (call["outcome"], call["detail"], call["upstream_requests"], call["gate"]["xusd"]) == ("refused", why, 0, 0)


def test_the_provider_saw_every_call_but_the_refused_ones_once(books: dict[str, Any]) -> None:
    """No request of the SDK was repeated or made up."""
    refused = sum(call["outcome"] == "refused" for call in books["calls"])
    assert books["upstream_requests"] == len(books["calls"]) - refused


@pytest.mark.parametrize(("step", "outcome"), [("left", "left early"), ("broken", "broke off")])
def test_half_an_answer_is_cancelled_and_costs_nothing(books: dict[str, Any], step: str, outcome: str) -> None:
    """A caller who leaves and a provider that breaks off: cancelled, nothing charged."""
    (call,) = _step(books, step)
    assert (call["outcome"], call["state"], call["gate"]["xusd"]) == (outcome, "cancelled", 0)
    assert call["upstream_requests"] == 1


def test_an_answer_without_usage_is_estimated_and_says_so(books: dict[str, Any]) -> None:
    """The recordings report nothing; what is booked is labelled, and is in no customer's three-way sum."""
    for call in _step(books, "estimate"):
        assert call["recording"] is None
        assert call["estimated"] is True
        assert call["gate"]["output"] > 0
    estimated = {call["request_id"] for call in books["calls"] if call["estimated"]}
    assert estimated == {call["request_id"] for call in _step(books, "estimate")}
    assert "museum" not in {account["customer"] for account in books["customers"]}


def test_calls_made_while_the_gate_was_away_are_booked_by_ingest(books: dict[str, Any]) -> None:
    """Three calls without a lease are booked when the gate is back; the one after that has a lease again."""
    calls = _step(books, "ungated")
    assert [call["by_ingest"] for call in calls] == [True, True, True, False]
    assert {call["state"] for call in calls} == {"booked"}


def test_hints_reach_the_table(books: dict[str, Any]) -> None:
    """What the gate hinted is shown with the operation that it belongs to."""
    assert "funding.xusd_shortfall" in _step(books, "hint")[0]["hints"]
    assert "rate.limit" in _step(books, "rate")[0]["hints"]
    assert _step(books, "plain")[0]["hints"] == []


def test_all_checks_are_listed_and_hold(books: dict[str, Any]) -> None:
    """What the demo claims at its end."""
    assert len(books["checks"]) == 6
    assert all(check["holds"] for check in books["checks"])


def test_the_text_fits_eighty_columns_and_is_labelled(ran: dict[str, Ran]) -> None:
    """No line is longer than the terminal; it says that answers are recorded, and by which servers."""
    text = ran["text"].out
    assert max(map(len, text.splitlines())) <= 80
    assert "recorded answers" in text
    for server in ("llama-server", "llama-cpp-python", "litellm"):
        assert server in text
    assert "…" not in text.partition("Operations, as the gate booked them")[2]
    assert text.count("MISMATCH") == 0
    assert "All three books are equal." in text


def test_loud_log_lines_of_the_library_are_shown_once_each(ran: dict[str, Ran]) -> None:
    """What the library warns about appears in the step where it happens, not once per call."""
    lines = [line for line in ran["text"].out.splitlines() if line.startswith("      log ")]
    kinds = Counter(line.split()[1] for line in lines if "more of these" not in line)
    assert set(kinds) >= {"vluna.operation.ungated:", "vluna.usage.estimated:", "vluna.hint:"}
    assert max(kinds.values()) == 1


# -- the checks can fail -----------------------------------------------------------------------------------------------


def _small_books(*, xusd: int | None = None, forget: bool = False, misreport: int = 0) -> Books:
    """Two calls, with a gate that prices otherwise, an answer that the gate forgot, or a recording that says more."""
    with Stage() as stage:
        player = Player(stage)
        player.play("acme", "llama-server/chat_plain#0")
        stage.vluna.flush(5)
        if xusd is not None:
            stage.gate.price("openai.smollm2-135m-instruct.tokens.output", xusd)
        player.play("acme", "llama-server/chat_stream#1")
        stage.vluna.flush(5)
        served = [
            dataclasses.replace(one, tokens=one.tokens and one.tokens._replace(output=one.tokens.output + misreport))
            for one in stage.upstream.served
        ]
        return keep_books(
            player.calls,
            served=served,
            journal=stage.journal(),
            gate=stage.gate.booked().entries[forget:],
            hints=lambda _: (),
            prices=stage.gate.config.defaults,
            outstanding=0,
        )


def test_books_that_agree_say_so() -> None:
    """The same two calls without anything wrong."""
    books = _small_books()
    assert [account.agrees for account in books.accounts] == [True]
    assert books.checks[0].holds
    assert books.accounts[0].price_list_xusd == price_list(books.accounts[0].charged, books.prices) > 0


@pytest.mark.parametrize("wrong", [{"xusd": 13}, {"forget": True}, {"misreport": 1}])
def test_one_token_or_one_xusd_too_many_is_found(wrong: dict[str, Any]) -> None:
    """A gate with another price, a gate that forgot a call and a recording that reports more are all a mismatch."""
    books = _small_books(**wrong)
    assert [account.agrees for account in books.accounts] == [False]
    assert not books.checks[0].holds
    assert not books.hold


def test_a_demo_that_does_not_hold_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, and it is said, where what was to be shown did not happen."""
    monkeypatch.setattr(run, "STEPS", run.STEPS[3:4])
    assert run.run_demo(Console(width=100)) == 1
    out = capsys.readouterr().out
    assert "Something does not hold." in out
    assert "MISMATCH" in out
