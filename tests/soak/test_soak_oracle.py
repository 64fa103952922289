"""The oracle of the soak: it must see every broken promise, and nothing where all are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from soak_oracle import Booking, Called, Sent, Witnesses, judge, read_witnesses
from soak_words import MODEL_FEATURE, PRICES, WORK_FEATURE, Log, Tokens

USED = Tokens(input=100, cached=30, output=7)


def booking(request_id: str = "a", response_id: str | None = "chat-a", **changes: Any) -> Booking:
    """A charge of ``USED``."""
    labels = {"request_id": request_id, "operation_id": f"op-{request_id}", "usage_source": "provider"}
    if response_id:
        labels["response_id"] = response_id
    charged = sum(PRICES[meter] * count for meter, count in USED.lines.items())
    made = Booking("commit", "c-1", "ann", MODEL_FEATURE, USED.total, USED.lines, "applied", charged, labels)
    return replace(made, **changes)


def world(*books: Booking, **call: Any) -> Witnesses:
    """One call whose answer was sent and seen to its end, and these books."""
    seen = Witnesses(kills=1, concurrency=2, arrived={"a"})
    called: dict[str, Any] = {"kind": "answer", "seen": True, "response_id": "chat-a", "usage": USED, **call}
    seen.calls["a"] = Called("a", "ann", **called)
    seen.sends["chat-a"] = Sent("a", "chat-a", USED)
    seen.books = list(books)
    return seen


def broken(seen: Witnesses) -> set[str]:
    """The promises that the oracle finds broken."""
    return {promise for promise, found in judge(seen).broken.items() if found}


def test_a_call_that_was_seen_and_charged_once_is_in_order() -> None:
    verdict = judge(world(booking()))
    assert verdict.holds
    assert (verdict.operations, verdict.acknowledged, verdict.charged, verdict.unacknowledged) == (1, 1, 1, 0)


def test_a_missing_charge_is_seen() -> None:
    assert broken(world()) == {"acknowledged but uncharged"}


def test_a_quarantined_commit_is_no_charge() -> None:
    assert broken(world(booking(status="quarantined", charged=0))) == {"acknowledged but uncharged"}


def test_a_double_charge_is_seen_whatever_operation_it_is_of() -> None:
    other = booking(commit_id="c-2", labels={**booking().labels, "operation_id": "op-b"})
    assert broken(world(booking(), other)) == {"doubled"}


def test_one_operation_that_is_charged_twice_is_seen_though_it_names_two_requests() -> None:
    seen = world(booking(), booking("b", "chat-b", labels={**booking("b", "chat-b").labels, "operation_id": "op-a"}))
    seen.calls["b"] = Called("b", "ann", "answer")
    seen.sends["chat-b"] = Sent("b", "chat-b", USED)
    assert broken(seen) == {"doubled"}


@pytest.mark.parametrize(
    "changes",
    [
        {"quantity": USED.total + 1},
        {"lines": {**USED.lines, f"{MODEL_FEATURE}.tokens.output": 8}},
        {"lines": {}, "charged": USED.total * PRICES[MODEL_FEATURE]},
        {"charged": 1},
        {"principal": "bob"},
        {"feature": WORK_FEATURE},
        {"labels": {**booking().labels, "usage_source": "estimated"}},
    ],
)
def test_a_charge_that_is_not_exactly_what_was_sent_is_seen(changes: dict[str, Any]) -> None:
    assert broken(world(booking(**changes))) == {"tokens off"}


@pytest.mark.parametrize("response_id", [None, "chat-x"])
def test_a_charge_that_nobody_sent_is_seen(response_id: str | None) -> None:
    assert "charged and never sent" in broken(world(booking(response_id=response_id)))


def test_a_charge_that_nobody_called_for_is_seen() -> None:
    assert broken(world(booking(), booking("z", "chat-z"))) == {"charged and never sent"}


def test_a_charge_for_the_answer_of_another_call_is_seen() -> None:
    seen = world(booking(response_id="chat-b"))
    seen.sends["chat-b"] = Sent("b", "chat-b", USED)
    assert "charged and never sent" in broken(seen)


def test_a_call_that_was_not_seen_to_its_end_may_be_charged_or_not_but_once_and_exactly() -> None:
    unseen = {"seen": False, "response_id": None, "usage": None}
    assert judge(world(**unseen)).holds
    verdict = judge(world(booking(), **unseen))
    assert (verdict.holds, verdict.charged_unacknowledged) == (True, 1)
    assert broken(world(booking(quantity=1), **unseen)) == {"tokens off"}
    twice = booking(commit_id="c-2", labels={**booking().labels, "operation_id": "op-b"})
    assert broken(world(booking(), twice, **unseen)) == {"doubled"}


def test_a_job_is_charged_once_over_all_its_runs_by_any_of_them() -> None:
    seen = world(booking(), group="job/0/0")
    seen.calls["b"] = Called("b", "ann", "answer", group="job/0/0", seen=True, response_id="chat-b", usage=USED)
    seen.sends["chat-b"] = Sent("b", "chat-b", USED)
    assert judge(seen).holds
    seen.books.append(booking("b", "chat-b"))
    assert broken(seen) == {"doubled"}
    seen.books.clear()
    assert len(judge(seen).broken["acknowledged but uncharged"]) == 2


def test_a_refused_call_is_neither_made_nor_charged() -> None:
    refused = {"seen": False, "refused": "GateDenied"}
    assert broken(world(**refused)) == {"called though refused"}
    assert broken(world(booking(), **refused)) == {"called though refused", "charged though refused"}
    assert judge(world(variant="overlap", **refused)).holds  # it was started while the gate was asked


def test_a_stream_that_was_left_before_its_end_costs_what_on_abort_says() -> None:
    left: dict[str, Any] = {"kind": "held", "seen": False, "left": True}
    guess = booking(response_id="chat-h", labels={**booking().labels, "usage_source": "estimated"})
    seen = world(guess, **left)
    seen.sends.clear()
    assert broken(seen) == {"charged though left before the end", "charged and never sent"}
    estimating = world(guess, variant="estimate", **left)
    estimating.sends.clear()
    assert judge(estimating).holds
    assert broken(world(variant="estimate", **left)) == {"left and not estimated"}


def test_an_answer_without_usage_is_charged_by_an_estimate_and_by_nothing_else() -> None:
    seen = world(booking(), kind="silent", usage=None)
    seen.sends["chat-a"] = Sent("a", "chat-a", None)
    assert broken(seen) == {"tokens off"}
    seen.books = [booking(labels={**booking().labels, "usage_source": "estimated"})]
    assert judge(seen).holds


def test_work_is_charged_by_what_its_caller_recorded() -> None:
    charge = booking(response_id=None, feature=WORK_FEATURE, quantity=3, lines={}, charged=3 * PRICES[WORK_FEATURE])
    work: dict[str, Any] = {"kind": "work", "response_id": None, "usage": None}
    assert judge(world(charge, quantity=3, **work)).holds
    assert broken(world(charge, quantity=4, **work)) == {"tokens off"}
    assert broken(world(quantity=4, **work)) == {"acknowledged but uncharged"}


def test_an_answer_that_changed_on_its_way_is_seen() -> None:
    assert broken(world(booking(), usage=Tokens(1, 0, 1))) == {"answer changed on its way"}
    assert "answer changed on its way" in broken(world(booking(), response_id="chat-other"))


def test_lost_operations_are_bounded_by_the_kills_and_never_acknowledged() -> None:
    seen = world(booking())
    seen.lost = [{"request_id": f"x{n}"} for n in range(2)]
    assert judge(seen).holds
    seen.lost.append({"request_id": "x9"})
    assert broken(seen) == {"lost beyond kills x concurrency"}
    seen.lost = [{"request_id": "a"}]
    assert broken(seen) == {"lost though acknowledged"}


def test_what_is_left_over_and_what_a_bare_client_would_not_have_met_is_seen() -> None:
    seen = world(booking())
    seen.left_over = {"pending": 2}
    assert broken(seen) == {"left over"}
    assert broken(world(booking(), surprise="Traceback")) == {"surprises"}


def test_what_the_processes_wrote_is_read_back_and_a_torn_record_spoils_nothing(tmp_path: Path) -> None:
    caller, provider = Log(tmp_path / "caller-0.jsonl"), Log(tmp_path / "provider.jsonl")
    caller.write({"e": "alive", "pid": 1, "gen": 1})
    for name in ("a", "b"):
        caller.write({"e": "began", "r": name, "p": "ann", "k": "answer", "v": "default", "g": None, "q": 0})
    with open(tmp_path / "caller-0.jsonl", "ab") as file:
        file.write(b'\n{"e":"seen","r":"b","id":"cha')
    caller.write({"e": "seen", "r": "a", "id": "chat-a", "u": [100, 30, 7]}, sync=True)
    caller.write({"e": "refused", "r": "b", "w": "GateDenied"})
    provider.write({"e": "arrived", "r": "a"})
    provider.write({"e": "sent", "r": "a", "id": "chat-a", "u": [100, 30, 7]}, sync=True)
    entry = {"kind": "commit", "commit_id": "c-1", "principal": "ann", "feature": MODEL_FEATURE, "quantity": 107}
    entry |= {
        "lines": {},
        "status": "applied",
        "reasons": ["x"],
        "charged": 1,
        "labels": {"request_id": "a"},
        "key": "k",
    }
    (tmp_path / "books.jsonl").write_text(json.dumps(entry) + "\n")
    seen = read_witnesses(tmp_path)
    assert seen.calls["a"] == Called("a", "ann", "answer", seen=True, response_id="chat-a", usage=USED)
    assert (seen.calls["b"].seen, seen.calls["b"].refused) == (False, "GateDenied")
    assert (seen.arrived, seen.sends["chat-a"]) == ({"a"}, Sent("a", "chat-a", USED))
    assert [(booked.reasons, booked.quantity) for booked in seen.books] == [(("x",), 107)]
