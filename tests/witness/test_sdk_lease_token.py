"""vlunaai 0.1.4, the SDK of the ``lease_token`` dialect, against the embedded gate: it parses every answer of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from witness_sdk import context, run, sdk_version

from vluna_llm.sandbox import Sandbox

pytestmark = pytest.mark.skipif(
    sdk_version() is None or sdk_version() >= (0, 1, 5),  # type: ignore[operator]
    reason="needs an environment with vlunaai==0.1.4, the official SDK of the lease_token dialect",
)

FEATURE = "openai.gpt-4o"
LINES = [
    {"meter_code": f"{FEATURE}.tokens.input", "quantity_minor": "100"},
    {"meter_code": f"{FEATURE}.tokens.output", "quantity_minor": "20"},
]
PRICED = 100 * 3 + 20 * 12


@pytest.fixture
def gate() -> Iterator[Sandbox]:
    with Sandbox(dialect="lease_token") as running:
        yield running


def test_a_lease_is_authorized_and_committed_once(gate: Sandbox) -> None:
    """Authorize, commit and the same commit again: parsed, priced, booked once."""

    async def work(client: Any) -> Any:
        lease = await client.gate_authorize(
            body={"feature_code": FEATURE, "estimated_quantity_minor": "120"}, context=context("c1")
        )
        body = {
            "lease_token": lease.data.lease_token,
            "feature_code": FEATURE,
            "quantity_minor": "120",
            "meters": LINES,
            "labels": {"operation": "op-1"},
        }
        first = await client.gate_commit(body=body, context=context("c1", idempotency_key="k-1"))
        again = await client.gate_commit(body=body, context=context("c1", idempotency_key="k-1"))
        return lease, first, again

    lease, first, again = run(gate, work)
    assert lease.data.feature_code == FEATURE
    assert lease.data.window_end > lease.data.window_start
    assert first.data.amount_xusd == again.data.amount_xusd == str(PRICED)
    assert first.data.commit_id == again.data.commit_id
    assert [line.meter_code for line in first.data.lines] == [line["meter_code"] for line in LINES]
    booked = gate.booked("c1")
    assert booked.charged_xusd == PRICED
    assert [(entry.commit_id, entry.labels) for entry in booked.entries] == [
        (first.data.commit_id, {"operation": "op-1"})
    ]


def test_a_canceled_lease_is_not_charged(gate: Sandbox) -> None:
    """Cancel is parsed; a commit after it shows an amount, carries the hint, and charges nothing."""

    async def work(client: Any) -> Any:
        lease = await client.gate_authorize(body={"feature_code": FEATURE}, context=context("c2"))
        token = lease.data.lease_token
        canceled = await client.gate_cancel(body={"lease_token": token}, context=context("c2"))
        late = await client.gate_commit(
            body={"lease_token": token, "feature_code": FEATURE, "quantity_minor": "10"}, context=context("c2")
        )
        return canceled, late

    canceled, late = run(gate, work)
    assert canceled.data.cancelled is True
    assert late.data.amount_xusd == "50"
    assert [hint.type.value for hint in late.hints] == ["lease.closed_at_commit"]
    assert gate.booked("c2").charged_xusd == 0
    assert len(gate.booked("c2").quarantined) == 1


def test_ingest_batch_limits_meters_balance_and_token(gate: Sandbox) -> None:
    """Everything else that the SDK has of the gate is parsed and agrees with the books."""
    gate.quota(1000, feature=FEATURE)

    async def work(client: Any) -> Any:
        ctx = context("c3")
        ingested = await client.gate_ingest(body={"feature_code": FEATURE, "meters": LINES}, context=ctx)
        leases = [
            (await client.gate_authorize(body={"feature_code": FEATURE}, context=ctx)).data.lease_token
            for _ in range(2)
        ]
        items = [
            {"idempotency_key": f"i-{n}", "lease_token": token, "feature_code": FEATURE, "quantity_minor": "5"}
            for n, token in enumerate(leases)
        ]
        batch = await client.gate_commit_batch(body={"items": items}, context=ctx)
        limits = await client.gate_list_feature_limits(
            query={"feature_code": FEATURE, "expand": "quotas,rates"}, context=ctx
        )
        meters = await client.gate_list_meter_limits(
            query={"feature_code": FEATURE, "expand": "pricing,coverage,limits"}, context=ctx
        )
        balance = await client.get_credit_balance(context=ctx)
        token = await client.issue_platform_token(body={"principal_id": "c3", "user_id": "c3"})
        return ingested, batch, limits, meters, balance, token

    ingested, batch, limits, meters, balance, token = run(gate, work)
    assert ingested.data.amount_xusd == str(PRICED)
    assert [item.status.value for item in batch.data.items] == ["committed", "committed"]
    assert batch.data.committed_count == 2
    assert gate.booked("c3").charged_xusd == PRICED + 2 * 25
    quota = limits.data[0].quotas[0]
    assert (quota.limit_minor, quota.used_minor) == ("1000", "10")
    prices = {meter.meter_code: meter.pricing.unit_price_xusd for meter in meters.data}
    assert prices[f"{FEATURE}.tokens.output"] == "12"
    spendable = gate.spendable("c3")
    assert all(meter.coverage.balance_xusd == str(spendable) for meter in meters.data)
    assert sum(int(grant.remaining.xusd) for grant in balance.data.grants) == spendable
    assert token.data.access_token.count(".") == 2
    assert token.data.billing_account_id == balance.data.billing_account_id


def test_an_end_user_token_opens_the_gate_for_its_own_customer(gate: Sandbox) -> None:
    """The token of token/issue is taken as bearer, bound to its own principal whatever the headers say."""
    import httpx

    async def work(client: Any) -> Any:
        return await client.issue_platform_token(body={"principal_id": "c4", "user_id": "c4"})

    token = run(gate, work).data.access_token
    answer = httpx.post(
        f"{gate.base_url}/gate/authorize",
        json={"feature_code": FEATURE},
        headers={
            "Authorization": f"Bearer {token}",
            "X-Realm-Id": gate.realm_id,
            "X-Principal-Id": "somebody-else",
            "Idempotency-Key": "bearer-1",
        },
    )
    assert answer.status_code == 200
    assert [lease.lease_id for lease in gate.leases("c4")] == [answer.json()["data"]["lease_id"]]


def test_a_refusal_is_the_sdks_own_error(gate: Sandbox) -> None:
    """Out of credit: the SDK raises its error with our status, code and message."""
    from vlunaai import VlunaAIError

    gate.set_credit("broke", 0)

    async def work(client: Any) -> None:
        await client.gate_authorize(body={"feature_code": FEATURE}, context=context("broke"))

    with pytest.raises(VlunaAIError) as caught:
        run(gate, work)
    assert caught.value.status == 402
    assert caught.value.details["body"]["code"] == "SERVER.CONFIG"
