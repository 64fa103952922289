"""What is asked of the gate, as bytes: the same input gives the same bytes, in the dialect of the lease."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vluna_llm.errors import ConfigurationError
from vluna_llm.gate import BatchCommit, GateRequest, MeterLine, queries
from vluna_llm.gate import requests as ask
from vluna_llm.types import Lease

A = Lease("lease.x.y", "openai.gpt-4o", dialect="lease_token")
B = Lease("own-1", "openai.gpt-4o", dialect="lease")
UUID = "22ec93e4-fe4d-48cc-a6e8-83f864429901"


def test_commit_in_either_dialect() -> None:
    """The lease goes back under the name under which it came, and never under both."""
    a = ask.commit_request(lease=A, principal_id="c", quantity=3, meters={"m": 3}, idempotency_key="k")
    assert a.body == (
        b'{"lease_token":"lease.x.y","feature_code":"openai.gpt-4o","quantity_minor":"3",'
        b'"meters":[{"meter_code":"m","quantity_minor":"3"}]}'
    )
    b = ask.commit_request(lease=B, principal_id="c", quantity=3, idempotency_key="k")
    assert b.body == b'{"lease":"own-1","feature_code":"openai.gpt-4o","quantity_minor":"3"}'
    assert (a.path, a.idempotency_key, a.principal_id, a.user_id) == ("/gate/commits", "k", "c", "c")


def test_lines_are_sorted_merged_and_never_zero() -> None:
    """One order for ever, each meter once, no line that the gate would refuse the whole commit for."""
    lines = [MeterLine("b", 1), MeterLine("a", 5), MeterLine("zero", 0), MeterLine("b", 2)]
    body = json.loads(ask.commit_request(lease=A, principal_id="c", quantity=8, meters=lines).body)
    assert body["meters"] == [{"meter_code": "a", "quantity_minor": "5"}, {"meter_code": "b", "quantity_minor": "3"}]
    assert "meters" not in json.loads(ask.commit_request(lease=A, principal_id="c", quantity=8, meters={"z": 0}).body)


def test_an_expected_price_goes_only_where_it_is_known() -> None:
    """`client_unit_price_xusd` exists in one dialect."""
    lines = [MeterLine("m", 1, unit="token", client_unit_price_xusd=3, client_pricing_etag="e")]
    a = json.loads(ask.commit_request(lease=A, principal_id="c", quantity=1, meters=lines).body)["meters"][0]
    b = json.loads(ask.commit_request(lease=B, principal_id="c", quantity=1, meters=lines).body)["meters"][0]
    assert a == {
        "meter_code": "m",
        "quantity_minor": "1",
        "unit": "token",
        "client_unit_price_xusd": "3",
        "client_pricing_etag": "e",
    }
    assert "client_unit_price_xusd" not in b


@given(
    st.dictionaries(st.text("abc.", min_size=1, max_size=4).filter(str.strip), st.integers(0, 10**12), max_size=6),
    st.dictionaries(st.text(min_size=1, max_size=4), st.text(max_size=6), max_size=5),
    st.randoms(use_true_random=False),
)
def test_same_input_same_bytes(meters: dict[str, int], labels: dict[str, str], random: object) -> None:
    """Neither the order of meters nor that of labels changes a byte; what is said is what was given."""

    def shuffled(mapping: dict[str, object]) -> dict[str, object]:
        items = list(mapping.items())
        random.shuffle(items)  # type: ignore[attr-defined]
        return dict(items)

    def body(meters: object, labels: object) -> bytes:
        return ask.commit_request(
            lease=A,
            principal_id="c",
            quantity=1,
            meters=meters,  # type: ignore[arg-type]
            labels=labels,  # type: ignore[arg-type]
        ).body

    first = body(meters, labels)
    assert first == body(shuffled(dict(meters)), shuffled(dict(labels)))
    decoded = json.loads(first)
    assert {line["meter_code"]: int(line["quantity_minor"]) for line in decoded.get("meters", [])} == {
        code: quantity for code, quantity in meters.items() if quantity
    }
    assert decoded.get("labels", {}) == {name: value for name, value in labels.items() if value}


def test_generated_keys_are_unique_and_given_ones_kept() -> None:
    """The gate's cache does not look at who is calling, so keys never repeat by themselves."""
    keys = {ask.commit_request(lease=A, principal_id="c", quantity=1).idempotency_key for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("vluna-llm:") and key.endswith(":commit") for key in keys)


def test_authorize_bytes_do_not_depend_on_what_was_learned() -> None:
    """A repeated key meets the same body, whether or not the dialect was known when it was composed."""

    def body(dialect: object, budget: str) -> bytes:
        return ask.authorize_request(
            principal_id="c",
            feature_code="f",
            budget_id=budget,
            lease="own",
            dialect=dialect,  # type: ignore[arg-type]
        ).body

    assert body(None, UUID) == body("lease_token", UUID) == body("lease", UUID)
    assert json.loads(body(None, UUID))["budget_id"] == json.loads(body(None, UUID))["budget"] == UUID
    assert body(None, "ref-1") == body("lease", "ref-1")


def test_a_budget_is_never_lost_silently() -> None:
    """A reference that is no uuid is refused here where the dialect is known, and by the gate where it is not."""
    with pytest.raises(ConfigurationError, match="uuid"):
        ask.authorize_request(principal_id="c", feature_code="f", budget_id="ref-1", dialect="lease_token")
    unknown = json.loads(ask.authorize_request(principal_id="c", feature_code="f", budget_id="ref-1").body)
    assert unknown["budget_id"] == "ref-1"
    happened = ask.ingest_request(
        principal_id="c", feature_code="f", quantity=1, budget_id="ref-1", dialect="lease_token"
    )
    assert "budget_id" not in json.loads(happened.body)
    assert json.loads(happened.body)["budget"] == "ref-1"


def test_ingest_tells_when_it_happened() -> None:
    """Times go out in UTC with milliseconds; one without a zone is refused, for it would be booked wrongly."""
    moment = datetime(2026, 11, 21, 4, 5, 6, 789000, tzinfo=timezone(timedelta(hours=2)))
    request = ask.ingest_request(principal_id="c", feature_code="f", quantity=3, occurred_at=moment)
    assert json.loads(request.body)["occurred_at"] == "2026-11-21T02:05:06.789Z"
    with pytest.raises(ConfigurationError, match="time zone"):
        ask.ingest_request(principal_id="c", feature_code="f", quantity=3, occurred_at=datetime(2026, 1, 1))


def test_cancel_exists_in_one_dialect() -> None:
    """Composing a cancel of a lease that cannot be cancelled is refused; the client sends nothing instead."""
    assert ask.cancel_request(lease=A, principal_id="c").body == b'{"lease_token":"lease.x.y"}'
    with pytest.raises(ConfigurationError, match="lapses"):
        ask.cancel_request(lease=B, principal_id="c")


def test_stored_request_is_the_composed_one() -> None:
    """Composed, stored and brought back: the very same request."""
    composed = ask.commit_request(lease=A, principal_id="c", user_id="u", quantity=1, idempotency_key="k")
    stored = GateRequest.stored("commit", composed.body, idempotency_key="k", principal_id="c", user_id="u")
    assert stored == composed
    with pytest.raises(ConfigurationError):
        GateRequest.stored("limits", b"", idempotency_key="k", principal_id="c")


def test_batch_items_carry_their_own_keys() -> None:
    """Each item has the body of a single commit and a key of its own, in the dialect of its lease."""
    items = [BatchCommit(A, 1, "k-1"), BatchCommit(B, 2, "k-2", meters={"m": 2})]
    body = json.loads(ask.commit_batch_request(items=items, principal_id="c").body)
    assert [item["idempotency_key"] for item in body["items"]] == ["k-1", "k-2"]
    assert "lease_token" in body["items"][0]
    assert body["items"][1]["lease"] == "own-1"


def test_empty_filters_are_left_out() -> None:
    """A query says only what was asked."""
    assert queries.limits_request(principal_id="c", expand=()).path == "/gate/limits"
    assert queries.wallet_balance_request(principal_id="c").path == "/wallet/balance"
    assert (
        queries.rating_request(principal_id="c", rating_id="a/b?c").path
        == "/ops/ratings/a%2Fb%3Fc?expand=rated_records"
    )
    assert queries.rating_request(principal_id="c", rating_id=UUID).admin
