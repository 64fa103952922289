"""Every answer that was captured from a real gate, read by the parser of its endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vluna_llm.errors import (
    GateAuthError,
    GateDenied,
    GateError,
    GateRateLimited,
    GateUnavailable,
    IdempotencyConflict,
    InvalidGateRequest,
)
from vluna_llm.gate import answers
from vluna_llm.gate.failures import is_missing_route
from vluna_llm.gate.models import BatchResult, CancelResult, CommitResult, IngestResult
from vluna_llm.gate.readings import Listing, Rating, Reading
from vluna_llm.gate.wire import Answer
from vluna_llm.types import Lease

EXCHANGES = Path(__file__).resolve().parents[3] / "shared" / "contract" / "exchanges"
pytestmark = pytest.mark.skipif(
    not EXCHANGES.is_dir(), reason="../shared (the gate's contract) is not beside this checkout"
)

PARSERS: dict[str, Callable[..., Any]] = {
    "/health": answers.parse_health,
    "/mgt/v1/gate/authorize": answers.parse_lease,
    "/mgt/v1/gate/commits": answers.parse_commit,
    "/mgt/v1/gate/commits/batch": answers.parse_commit_batch,
    "/mgt/v1/gate/cancel": answers.parse_cancel,
    "/mgt/v1/gate/ingest": answers.parse_ingest,
    "/mgt/v1/gate/preflight": answers.parse_preflight,
    "/mgt/v1/gate/limits": answers.parse_limits,
    "/mgt/v1/gate/meters": answers.parse_meters,
    "/mgt/v1/wallet/balance": answers.parse_wallet_balance,
    "/mgt/v1/token/issue": answers.parse_issued_token,
    "/mgt/v1/ops/ratings": answers.parse_ratings,
    "/mgt/v1/ops/allocations": answers.parse_allocations,
}
CAPTURED_AT = 1795231063.0  # 2026-11-21T03:17:43Z, when the rate limit was captured


def _parser(path: str) -> Callable[..., Any] | None:
    bare = path.split("?")[0].rstrip("/")
    if bare.startswith("/mgt/v1/ops/ratings/"):
        return answers.parse_rating
    return PARSERS.get(bare)


def _cases() -> list[Any]:
    cases = []
    for file in sorted(EXCHANGES.glob("*.json")) if EXCHANGES.is_dir() else []:
        case = json.loads(file.read_text())
        if isinstance(case["response"]["status"], int) and _parser(case["request"]["path"]):
            cases.append(pytest.param(case, id=file.stem))
    return cases


def _answer(case: dict[str, Any]) -> Answer:
    response = case["response"]
    return Answer(response["status"], response["headers"], json.dumps(response["body"]).encode(), "r-1")


def _expected_error(status: int, code: str | None, message: str) -> type[GateError]:
    if status == 402 or (code or "").startswith("ENTITLEMENT.") or code == "AUTH.BILLING_USER_DISABLED":
        return GateDenied
    if status in (401, 403) or code == "AUTH.UNKNOWN_REALM":
        return GateAuthError
    return {409: IdempotencyConflict, 429: GateRateLimited, 500: GateUnavailable}.get(status, InvalidGateRequest)


CASES = _cases()


def test_the_captures_are_all_there() -> None:
    """The table below is not empty by mistake."""
    assert len(CASES) >= 380


@pytest.mark.parametrize("case", CASES)
def test_captured_answer(case: dict[str, Any]) -> None:
    """A success gives its typed result, a failure the error of design rule 8 with everything that the gate said."""
    answer = _answer(case)
    body = case["response"]["body"]
    parse = _parser(case["request"]["path"])
    assert parse is not None
    if 200 <= answer.status < 300:
        _check_success(parse(answer, now=CAPTURED_AT), case)
        return
    if answer.status == 404 and parse is answers.parse_rating:
        assert parse(answer, now=CAPTURED_AT) is None
        return
    with pytest.raises(GateError) as caught:
        parse(answer, now=CAPTURED_AT)
    error = caught.value
    expected = _expected_error(answer.status, body.get("code"), body["message"])
    if body["message"].startswith("Cannot GET /mgt/v1/gate/authorize"):
        expected = GateUnavailable  # every gate has this route: the address is wrong, not the request
    assert type(error) is expected
    assert (error.status, error.code, error.message) == (answer.status, body.get("code"), body["message"])
    assert [hint.as_dict() for hint in error.hints] == body.get("hints", [])
    assert error.request_id == "r-1"
    assert error.advice
    assert error.raw == body
    assert error.retryable is (answer.status == 500 and body.get("code") != "SERVER.CONFIG")


def _check_success(result: object, case: dict[str, Any]) -> None:
    body = case["response"]["body"]
    hints = body.get("hints", [])
    if isinstance(result, Lease):
        assert result.dialect == "lease_token"
        assert result.token == body["data"]["lease_token"]
        assert result.lease_id == body["data"]["lease_id"]
        assert result.window_end is not None
        assert [hint.as_dict() for hint in result.hints] == hints
    elif isinstance(result, CommitResult):
        _check_booking(result, case)
    elif isinstance(result, BatchResult):
        _check_batch(result, case)
    elif isinstance(result, CancelResult):
        assert result.parsed
        assert result.cancelled is body["data"]["cancelled"]
        assert not result.lapsed
        assert result.trace_id == body["data"]["trace_id"]
    elif isinstance(result, Listing):
        assert result.parsed
        assert len(result) == len(body["data"])
        for item, sent in zip(result, body["data"], strict=True):
            _check_reading(item, sent)
    else:
        assert isinstance(result, Reading)
        assert result.envelope.parsed
        assert result.envelope.raw == body
        _check_reading(result, body["data"])


def _check_booking(result: CommitResult, case: dict[str, Any]) -> None:
    data = case["response"]["body"]["data"]
    assert result.parsed
    assert result.commit_id == data["commit_id"]
    assert str(result.amount_xusd) == data["amount_xusd"]
    assert str(result.cost_xusd) == data["cost_xusd"]
    assert [str(line.quantity) for line in result.lines] == [line["quantity_minor"] for line in data["lines"]]
    assert sum(line.amount_xusd or 0 for line in result.lines) == result.amount_xusd
    booked = case["booked"].get("ratings")
    if not isinstance(booked, list):
        return
    mine = [row for row in booked if row.get("canonical_amount_xusd") == result.amount_xusd]
    if len(booked) == 1 and mine:
        row = mine[0]
        assert result.quarantined is (row["application_status"] == "quarantined")
        charged = result.amount_xusd if result.charged else 0
        assert charged == row["charged_xusd"]
        if isinstance(result, IngestResult):
            assert bool(result.unpriced_lines) is ("pricing_not_configured" in row["reason_codes"])
        else:
            assert bool(result.not_charged_reasons) is bool(result.quarantined)


def _check_batch(result: BatchResult, case: dict[str, Any]) -> None:
    data = case["response"]["body"]["data"]
    assert result.parsed
    # One capture is abbreviated by a text in its list, which is also what an unknown kind of item looks like.
    sent = [item if isinstance(item, dict) else {} for item in data["items"]]
    assert [item.status for item in result.items] == [item.get("status", "") for item in sent]
    assert result.committed_count == data["committed_count"]
    assert result.failed_count == data["failed_count"]
    poisoned = any(item.get("error", {}).get("type") == "SERVER.ERROR" for item in sent)
    assert result.trustworthy is not poisoned


def _check_reading(reading: Reading, sent: dict[str, Any]) -> None:
    """Nothing that was sent is lost, and every count and amount came out as the integer that it is."""
    known = reading.model_dump()
    for name, value in sent.items():
        assert name in known, name
        if isinstance(value, str) and (name.endswith(("_xusd", "_minor"))):
            assert known[name] == int(value), name
        elif isinstance(value, list):
            assert len(known[name]) == len(value), name
        elif name.endswith(("_at", "_start", "_end")) and isinstance(value, str) and known[name] is not value:
            assert known[name] is not None, name
    if isinstance(reading, Rating):
        assert reading.application_status in ("applied", "quarantined")


def test_quarantine_is_told_for_every_charged_and_uncharged_commit() -> None:
    """Over all captured single commits: what we call charged is what the gate's database shows as charged."""
    judged = {True: 0, False: 0}
    for param in CASES:
        case: dict[str, Any] = param.values[0]
        if not case["request"]["path"].startswith("/mgt/v1/gate/commits") or case["response"]["status"] != 200:
            continue
        if case["request"]["path"].endswith("batch") or not isinstance(case["booked"].get("ratings"), list):
            continue
        if len(case["booked"]["ratings"]) != 1:
            continue
        result = answers.parse_commit(_answer(case), now=CAPTURED_AT)
        assert (result.amount_xusd if result.charged else 0) == case["booked"]["total_charged_xusd"], case["case"]
        judged[result.quarantined] += 1
    assert judged[True] >= 10
    assert judged[False] >= 30


def test_retry_after_comes_from_the_hint() -> None:
    """The captured 429: ``until`` minus the wall clock, never the gate's own older ``seconds``."""
    case = json.loads((EXCHANGES / "rate-06-call-6-of-5.json").read_text())
    with pytest.raises(GateRateLimited) as caught:
        answers.parse_lease(_answer(case), now=CAPTURED_AT)
    assert caught.value.retry_after == pytest.approx(17.0)
    with pytest.raises(GateRateLimited) as late:
        answers.parse_lease(_answer(case), now=CAPTURED_AT + 3600)
    assert late.value.retry_after == 0.0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("authorize-34-no-credit", "insufficient_credit"),
        ("budget-05-authorize-exhausted", "budget"),
        ("authorize-31-entitlement-required", "entitlement"),
        ("principal-04-disabled-user", "disabled"),
        ("devmode-01-402", "insufficient_credit"),
    ],
)
def test_reason_of_a_denial(name: str, reason: str) -> None:
    """The 402 that share one code are told apart by their message."""
    case = json.loads((EXCHANGES / f"{name}.json").read_text())
    with pytest.raises(GateDenied) as caught:
        answers.parse_lease(_answer(case), now=CAPTURED_AT)
    assert caught.value.reason == reason


def test_reason_of_a_used_up_quota() -> None:
    """All captured quota refusals say quota."""
    seen = 0
    for param in CASES:
        case: dict[str, Any] = param.values[0]
        if case["response"]["body"].get("message") == "quota limit exhausted":
            with pytest.raises(GateDenied) as caught:
                answers.parse_lease(_answer(case), now=CAPTURED_AT)
            assert caught.value.reason == "quota"
            seen += 1
    assert seen == 3


def test_missing_route_of_the_older_dialect() -> None:
    """Preflight answered 404 is how the dialect without it shows; a cancel answered so means lapsed."""
    case = json.loads((EXCHANGES / "dialect-00-preflight-absent.json").read_text())
    with pytest.raises(InvalidGateRequest) as caught:
        answers.parse_preflight(_answer(case), now=CAPTURED_AT)
    assert is_missing_route(caught.value)
    assert answers.parse_cancel(_answer(case), now=CAPTURED_AT).lapsed
