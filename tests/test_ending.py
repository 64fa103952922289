"""How an answer ended decides the bill (design rules 3 to 5)."""

from __future__ import annotations

from typing import Any

import pytest

from vluna_llm.ending import Ending, Verdict, judge
from vluna_llm.usage import TokenUsage

USAGE = TokenUsage(input_tokens=10, output_tokens=5)


def verdict(on_abort: Any = "cancel", **ending: Any) -> Verdict:
    return judge(Ending(**ending), estimated_input=100, estimated_output=50, on_abort=on_abort)


@pytest.mark.parametrize("how", ["complete", "closed", "error", "abandoned"])
def test_reported_usage_is_committed_whatever_else_happened(how: str) -> None:
    result = verdict(how=how, usage=USAGE, failed=True)
    assert (result.work, result.usage, result.source) == ("completed", USAGE, "provider")


@pytest.mark.parametrize(
    "seen", [{"how": "closed", "finish_reason_seen": True}, {"how": "complete"}, {"how": "closed", "finished": True}]
)
def test_a_finished_answer_without_usage_is_estimated(seen: dict[str, Any]) -> None:
    result = verdict(**seen)
    assert (result.work, result.source) == ("completed", "estimated")
    assert result.usage == TokenUsage(input_tokens=100, output_tokens=50)


def test_an_estimate_takes_what_was_generated_over_what_was_expected() -> None:
    assert verdict(how="complete", output_tokens=7).usage == TokenUsage(input_tokens=100, output_tokens=7)


def test_an_error_event_without_usage_is_a_failure() -> None:
    assert verdict(how="complete", failed=True, output_tokens=3) == Verdict("failed", forgone_tokens=3)
    assert verdict(how="complete", failed=True, finished=True).work == "failed"


def test_a_broken_answer_is_cancelled_and_its_tokens_are_counted() -> None:
    assert verdict(how="error", output_tokens=9) == Verdict("failed", forgone_tokens=9)


@pytest.mark.parametrize("how", ["closed", "abandoned"])
def test_an_abort_follows_the_setting(how: str) -> None:
    assert verdict(how=how, output_tokens=4) == Verdict("aborted", forgone_tokens=4)
    billed = verdict("estimate", how=how, output_tokens=4)
    assert (billed.usage, billed.source) == (TokenUsage(input_tokens=100, output_tokens=4), "estimated")
    assert verdict("drain", how=how).work == "aborted"
