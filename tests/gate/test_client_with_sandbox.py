"""Both gate clients against the embedded gate: what was asked is what was booked."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest
from colours import COLOURS, Caller, Colour

from vluna_llm.errors import (
    GateAuthError,
    GateDenied,
    GateError,
    GateRateLimited,
    GateUnavailable,
    IdempotencyConflict,
    InvalidGateRequest,
)
from vluna_llm.gate import BatchCommit, GateCredentials
from vluna_llm.sandbox import Sandbox

FEATURE = "openai.gpt-4o"
METERS = {f"{FEATURE}.tokens.input": 1000, f"{FEATURE}.tokens.cached": 200, f"{FEATURE}.tokens.output": 500}


def credentials(gate: Sandbox) -> GateCredentials:
    return GateCredentials(gate.base_url, gate.realm_id, gate.key_id, gate.key_secret)


@pytest.fixture
def gate() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        sandbox.feature(FEATURE, meters=list(METERS))
        for code, price in zip(METERS, (3, 1, 12), strict=True):
            sandbox.price(code, price)
        sandbox.price(FEATURE, 5)
        sandbox.credit("c", 1_000_000)
        yield sandbox


@pytest.fixture(params=COLOURS)
def client(request: pytest.FixtureRequest, gate: Sandbox) -> Iterator[Caller]:
    colour: Colour = request.param
    with Caller(colour, credentials(gate)) as caller:
        yield caller


def test_the_loop_to_the_last_token(client: Caller, gate: Sandbox) -> None:
    """Authorize, commit: the amount in the result is what the gate charged, line by line."""
    lease = client.authorize(principal_id="c", feature_code=FEATURE, estimated_quantity=1700)
    result = client.commit(lease=lease, principal_id="c", quantity=1700, meters=METERS, labels={"operation_id": "op-1"})
    assert result.charged
    assert result.amount_xusd == 1000 * 3 + 200 * 1 + 500 * 12
    booked = gate.booked("c")
    assert booked.charged_xusd == result.amount_xusd
    assert booked.lines == METERS
    assert booked.entries[0].commit_id == result.commit_id
    assert booked.entries[0].labels["operation_id"] == "op-1"


def test_repeated_and_competing_commits(client: Caller, gate: Sandbox) -> None:
    """The same key replays; another key on the same lease is answered 200 and told apart as not charged."""
    lease = client.authorize(principal_id="c", feature_code=FEATURE)
    first = client.commit(lease=lease, principal_id="c", quantity=10, idempotency_key="k-1")
    again = client.commit(lease=lease, principal_id="c", quantity=10, idempotency_key="k-1")
    assert again.commit_id == first.commit_id
    assert again.charged
    other = client.commit(lease=lease, principal_id="c", quantity=10, idempotency_key="k-2")
    assert other.amount_xusd == first.amount_xusd
    assert other.quarantined
    assert other.not_charged_reasons == ("lease.closed_at_commit",)
    assert gate.booked("c").charged_xusd == first.amount_xusd
    with pytest.raises(IdempotencyConflict):
        client.commit(lease=lease, principal_id="c", quantity=11, idempotency_key="k-1")


def test_an_unpriced_meter_quarantines_the_commit_and_shows_in_an_ingest(client: Caller, gate: Sandbox) -> None:
    """The same split, twice: as a commit nothing is charged, as an ingest the priced part is."""
    gate.unprice(f"{FEATURE}.tokens.cached")
    listed = {meter.meter_code: meter.priced for meter in client.meters(principal_id="c", feature_code=FEATURE)}
    assert listed == {FEATURE: True, **{code: not code.endswith("cached") for code in METERS}}
    lease = client.authorize(principal_id="c", feature_code=FEATURE)
    commit = client.commit(lease=lease, principal_id="c", quantity=1700, meters=METERS)
    assert commit.quarantined
    assert gate.booked("c").charged_xusd == 0
    ingest = client.ingest(principal_id="c", feature_code=FEATURE, quantity=1700, meters=METERS)
    assert ingest.charged
    assert ingest.fully_charged is False
    assert [line.meter_code for line in ingest.unpriced_lines] == [f"{FEATURE}.tokens.cached"]
    assert gate.booked("c").charged_xusd == ingest.amount_xusd == 1000 * 3 + 500 * 12


def test_cancel(client: Caller, gate: Sandbox) -> None:
    """Cancelled once, then no more; a commit after it charges nothing."""
    lease = client.authorize(principal_id="c", feature_code=FEATURE)
    assert client.cancel(lease=lease, principal_id="c").cancelled
    assert not client.cancel(lease=lease, principal_id="c").cancelled
    assert client.commit(lease=lease, principal_id="c", quantity=1).quarantined
    assert gate.booked("c").charged_xusd == 0


def test_batch(client: Caller, gate: Sandbox) -> None:
    """A batch books, and its result says what it cannot know."""
    leases = [client.authorize(principal_id="c", feature_code=FEATURE) for _ in range(2)]
    items = [BatchCommit(lease, 10, f"item-{number}") for number, lease in enumerate(leases)]
    result = client.commit_batch(items=items, principal_id="c")
    assert result.trustworthy
    assert (result.committed_count, result.failed_count) == (2, 0)
    assert set(result.warnings) == {"leases_still_active", "hints_hidden"}
    assert gate.booked("c").charged_xusd == sum(item.commit.amount_xusd or 0 for item in result.items if item.commit)


def test_reading_back(client: Caller, gate: Sandbox) -> None:
    """Rating and allocations of a commit are found by lease and by commit id, charged ones told from others."""
    token = client.issue_token(principal_id="c")
    lease = client.authorize(principal_id="c", feature_code=FEATURE)
    result = client.commit(lease=lease, principal_id="c", quantity=10, labels={"operation_id": "op-7"})
    (rating,) = client.ratings(principal_id="c", lease_id=lease.lease_id)
    assert rating.rating_id == result.commit_id
    assert rating.labels == {"operation_id": "op-7"}
    assert not rating.quarantined
    window = {"rated_after": datetime.now(timezone.utc) - timedelta(hours=1), "rated_before": None}
    assert len(client.ratings(principal_id="c", billing_account_id=token.billing_account_id, **window)) == 1
    single = client.rating(principal_id="c", rating_id=result.commit_id)
    assert single is not None
    assert single.canonical_amount_xusd == result.amount_xusd
    allocated = client.allocations(principal_id="c", rating_id=result.commit_id)
    assert sum(part.allocated_xusd or 0 for part in allocated) == result.amount_xusd
    assert client.rating(principal_id="c", rating_id="00000000-0000-0000-0000-000000000000") is None


def test_wallet_limits_and_health(client: Caller, gate: Sandbox) -> None:
    """Credit, quota windows and liveness, as numbers."""
    gate.set_credit("c", 5000)
    gate.quota(1000, feature=FEATURE)
    lease = client.authorize(principal_id="c", feature_code=FEATURE)
    client.commit(lease=lease, principal_id="c", quantity=30)
    wallet = client.wallet_balance(principal_id="c")
    assert (wallet.spendable_xusd, wallet.debt_xusd) == (5000 - 150, 0)
    (limits,) = client.limits(principal_id="c", feature_code=FEATURE)
    assert limits.room == 970
    assert client.health().healthy


def test_refusals(client: Caller, gate: Sandbox) -> None:
    """Credit, quota, rate, entitlement, disabled user, feature: each as the error that says so."""
    gate.set_credit("poor", 0)
    with pytest.raises(GateDenied) as poor:
        client.authorize(principal_id="poor", feature_code=FEATURE)
    gate.feature("locked", entitlement=True)
    with pytest.raises(GateDenied) as locked:
        client.authorize(principal_id="c", feature_code="locked")
    gate.disable_user("off")
    with pytest.raises(GateDenied) as disabled:
        client.authorize(principal_id="off", feature_code=FEATURE)
    gate.feature("asleep", active=False)
    with pytest.raises(InvalidGateRequest):
        client.authorize(principal_id="c", feature_code="asleep")
    gate.rate(1, feature=FEATURE, window="day")
    client.authorize(principal_id="c", feature_code=FEATURE)
    with pytest.raises(GateRateLimited) as limited:
        client.authorize(principal_id="c", feature_code=FEATURE)
    assert [error.value.reason for error in (poor, locked, disabled)] == [
        "insufficient_credit",
        "entitlement",
        "disabled",
    ]
    assert limited.value.retry_after is not None
    assert 0 <= limited.value.retry_after <= 86400


def test_wrong_keys(gate: Sandbox) -> None:
    """Unknown key, wrong secret, unknown realm: the key's own error, naming the setting to check."""
    wrong = [
        (GateCredentials(gate.base_url, gate.realm_id, "pk-other", gate.key_secret), "VLUNA_SERVICE_KEY_ID"),
        (GateCredentials(gate.base_url, gate.realm_id, gate.key_id, bytes(32)), "VLUNA_SERVICE_KEY_SECRET"),
        (GateCredentials(gate.base_url, "elsewhere", gate.key_id, gate.key_secret), "VLUNA_REALM_ID"),
    ]
    for credential, setting in wrong:
        with Caller("sync", credential) as client, pytest.raises(GateAuthError, match=setting):
            client.authorize(principal_id="c", feature_code=FEATURE)


def test_the_gates_bad_habits(client: Caller, gate: Sandbox) -> None:
    """First-call 500 and a lost answer: retried under the same key, one lease, one charge."""
    gate.faults.add("error_before", "authorize")
    gate.faults.add("drop_after", "authorize")
    lease = client.authorize(principal_id="c", feature_code=FEATURE)
    assert [found.lease_id for found in gate.leases("c")] == [lease.lease_id]
    gate.faults.add("drop_after", "commits")
    with pytest.raises(GateUnavailable) as lost:
        client.commit(lease=lease, principal_id="c", quantity=10, idempotency_key="k-1")
    assert lost.value.retryable
    assert client.commit(lease=lease, principal_id="c", quantity=10, idempotency_key="k-1").charged
    assert len(gate.booked("c")) == 1
    gate.faults.add("garbage", "commits", body="<html>")
    lease = client.authorize(principal_id="c", feature_code=FEATURE)
    unreadable = client.commit(lease=lease, principal_id="c", quantity=10, idempotency_key="k-2")
    assert (unreadable.parsed, unreadable.charged) == (False, None)
    assert client.commit(lease=lease, principal_id="c", quantity=10, idempotency_key="k-2").charged
    assert len(gate.booked("c")) == 2


@pytest.mark.parametrize("colour", COLOURS)
def test_the_other_dialect(colour: Colour) -> None:
    """Our own lease id, no cancel, preflight, budgets by reference: detected from the first answer."""
    with Sandbox(dialect="lease") as gate, Caller(colour, credentials(gate)) as client:
        gate.credit("c", 1_000_000)
        gate.price(FEATURE, 5)  # preflight registers nothing by itself
        preflight = client.preflight(principal_id="c", feature_code=FEATURE, estimated_quantity=10)
        assert preflight.envelope.parsed
        assert preflight.feature_code == FEATURE
        lease = client.authorize(principal_id="c", feature_code=FEATURE, lease="own-1")
        assert (lease.dialect, lease.token, client.client.dialect) == ("lease", "own-1", "lease")
        result = client.commit(lease=lease, principal_id="c", quantity=10)
        assert result.charged
        assert gate.booked("c").charged_xusd == result.amount_xusd
        assert client.cancel(lease=lease, principal_id="c").lapsed
        gate.budget("c", 1_000_000, reference="team-7")
        budgeted = client.authorize(principal_id="c", feature_code=FEATURE, lease="own-2", budget_id="team-7")
        assert client.commit(lease=budgeted, principal_id="c", quantity=10).charged
        ingest = client.ingest(principal_id="c", feature_code=FEATURE, quantity=10, budget_id="team-7")
        assert ingest.fully_charged


def test_preflight_is_missing_in_the_older_dialect(client: Caller) -> None:
    """It is told as a request that this gate does not know."""
    with pytest.raises(InvalidGateRequest) as caught:
        client.preflight(principal_id="c", feature_code=FEATURE)
    assert isinstance(caught.value, GateError)
    assert "no such route" in str(caught.value)
