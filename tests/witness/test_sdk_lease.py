"""The newest vlunaai, the SDK of the ``lease`` dialect, against the embedded gate: it parses every answer of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from witness_sdk import context, run, sdk_version

from vluna_llm.sandbox import Sandbox

pytestmark = pytest.mark.skipif(
    sdk_version() is None or sdk_version() < (0, 1, 9),  # type: ignore[operator]
    reason="needs an environment with the newest vlunaai, the official SDK of the lease dialect",
)

FEATURE = "openai.gpt-4o"
LINES = [
    {"meter_code": f"{FEATURE}.tokens.input", "quantity_minor": "100"},
    {"meter_code": f"{FEATURE}.tokens.output", "quantity_minor": "20"},
]
PRICED = 100 * 3 + 20 * 12


@pytest.fixture
def gate() -> Iterator[Sandbox]:
    with Sandbox(dialect="lease") as running:
        yield running


def test_a_lease_of_our_own_is_authorized_and_committed_once(gate: Sandbox) -> None:
    """The caller's own lease id comes back from authorize; the commit on it is parsed, priced and booked once."""

    async def work(client: Any) -> Any:
        lease = await client.gate_authorize(
            body={"feature_code": FEATURE, "lease": "op-7", "estimated_quantity_minor": "120"}, context=context("c1")
        )
        body = {"lease": "op-7", "feature_code": FEATURE, "quantity_minor": "120", "meters": LINES}
        first = await client.gate_commit(body=body, context=context("c1", idempotency_key="k-1"))
        again = await client.gate_commit(body=body, context=context("c1", idempotency_key="k-1"))
        return lease, first, again

    lease, first, again = run(gate, work)
    assert lease.data.lease == "op-7"
    assert len(lease.trace_id) == 32
    assert first.data.amount_xusd == str(PRICED)
    assert first.data.commit_id == again.data.commit_id
    assert [line.root.rating_status for line in first.data.lines] == ["priced", "priced"]
    assert gate.booked("c1").charged_xusd == PRICED


def test_a_lease_is_given_where_none_is_sent(gate: Sandbox) -> None:
    """Without an id of the caller's the gate makes one up, and the commit takes it."""

    async def work(client: Any) -> Any:
        lease = await client.gate_authorize(body={"feature_code": FEATURE}, context=context("c1"))
        return await client.gate_commit(
            body={"lease": lease.data.lease, "feature_code": FEATURE, "quantity_minor": "10"}, context=context("c1")
        )

    assert run(gate, work).data.amount_xusd == "50"
    assert gate.booked("c1").charged_xusd == 50


def test_preflight_decides_and_leaves_nothing_behind(gate: Sandbox) -> None:
    """Preflight answers like authorize, typed in both outcomes, and neither creates a lease nor counts a rate."""
    gate.feature(FEATURE)
    gate.rate(2, feature=FEATURE)
    gate.set_credit("broke", 0)

    async def work(client: Any) -> Any:
        good = [await client.gate_preflight(body={"feature_code": FEATURE}, context=context("c1")) for _ in range(5)]
        return good[-1]

    async def refused(client: Any) -> Any:
        return await client.gate_preflight(body={"feature_code": FEATURE}, context=context("broke"))

    async def unknown(client: Any) -> Any:
        return await client.gate_preflight(body={"feature_code": "never.seen"}, context=context("c1"))

    good = run(gate, work)
    assert good.ok is True
    assert good.data.feature_code == FEATURE
    assert gate.leases() == []
    from vlunaai import GatePreflightError

    denied = run(gate, refused, error_mode="result")
    assert isinstance(denied, GatePreflightError)
    assert (denied.status, denied.code) == (402, "SERVER.CONFIG")
    assert denied.trace_id
    assert denied.meta is not None
    assert denied.meta.as_of is not None
    assert denied.meta.feature_code == FEATURE
    nowhere = run(gate, unknown, error_mode="result")
    assert (nowhere.status, nowhere.code) == (422, "RESOURCE.NOT_FOUND")


def test_ingest_batch_limits_meters_balance_and_token(gate: Sandbox) -> None:
    """Everything else that the SDK has of the gate is parsed and agrees with the books."""
    gate.quota(1000, feature=FEATURE)
    gate.price("free.thing", 0)
    gate.budget("c3", 1_000_000, reference="team-a")

    async def work(client: Any) -> Any:
        ctx = context("c3")
        ingested = await client.gate_ingest(
            body={"feature_code": FEATURE, "meters": LINES, "budget": "team-a"}, context=ctx
        )
        for name in ("l-0", "l-1"):
            await client.gate_authorize(body={"feature_code": FEATURE, "lease": name}, context=ctx)
        items = [
            {"idempotency_key": f"i-{n}", "lease": f"l-{n}", "feature_code": FEATURE, "quantity_minor": "5"}
            for n in range(2)
        ]
        batch = await client.gate_commit_batch(body={"items": items}, context=ctx)
        again = await client.gate_commit_batch(body={"items": items}, context=ctx)
        limits = await client.gate_list_feature_limits(
            query={"feature_code": FEATURE, "expand": "quotas,rates"}, context=ctx
        )
        meters = await client.gate_list_meter_limits(query={"expand": "pricing,coverage,limits"}, context=ctx)
        balance = await client.get_credit_balance(context=ctx)
        token = await client.issue_platform_token(body={"principal_id": "c3", "user_id": "c3"})
        return ingested, batch, again, limits, meters, balance, token

    ingested, batch, again, limits, meters, balance, token = run(gate, work)
    assert ingested.data.amount_xusd == str(PRICED)
    assert ingested.data.budget_consumed_delta_xusd == str(PRICED)
    assert ingested.data.budget_remaining_xusd == str(1_000_000 - PRICED)
    assert [item.status.value for item in batch.data.items] == ["committed", "committed"]
    assert [item.status.value for item in again.data.items] == ["duplicate", "duplicate"]
    assert gate.booked("c3").charged_xusd == PRICED + 2 * 25
    assert limits.data[0].quotas[0].used_minor == "10"
    by_code = {meter.meter_code: meter for meter in meters.data}
    assert by_code[f"{FEATURE}.tokens.output"].pricing.unit_price_base_xusd == "12"
    assert by_code["free.thing"].coverage.max_quantity_minor_estimated is None
    assert balance.data.available_balance.xusd == str(gate.spendable("c3"))
    assert balance.data.outstanding_balance.xusd == "0"
    assert token.data.billing_account_id == balance.data.billing_account_id


def test_an_unpriced_line_is_parsed_and_not_charged(gate: Sandbox) -> None:
    """A line without a price comes as ``missing_price``; the commit is quarantined and the hint says so."""
    gate.unprice(f"{FEATURE}.tokens.output")

    async def work(client: Any) -> Any:
        await client.gate_authorize(body={"feature_code": FEATURE, "lease": "op-8"}, context=context("c5"))
        body = {"lease": "op-8", "feature_code": FEATURE, "quantity_minor": "120", "meters": LINES}
        return await client.gate_commit(body=body, context=context("c5"))

    answer = run(gate, work)
    assert [line.root.rating_status for line in answer.data.lines] == ["priced", "missing_price"]
    assert [hint.type.value for hint in answer.hints] == ["pricing.not_configured"]
    assert gate.booked("c5").charged_xusd == 0


def test_fractions_of_an_xusd_are_carried(gate: Sandbox) -> None:
    """Prices are proportional: 100 XUSD per 1000 units bill 40 + 70 + 151 for 400, 705, 1510 units, none lost."""
    gate.price("tools.search", 100, 1000)

    async def work(client: Any) -> Any:
        amounts = []
        for number, quantity in enumerate((400, 705, 1510)):
            name = f"f-{number}"
            await client.gate_authorize(body={"feature_code": "tools.search", "lease": name}, context=context("c6"))
            body = {"lease": name, "feature_code": "tools.search", "quantity_minor": str(quantity)}
            amounts.append((await client.gate_commit(body=body, context=context("c6"))).data.amount_xusd)
        return amounts

    assert run(gate, work) == ["40", "70", "151"]
    assert gate.booked("c6").charged_xusd == (400 + 705 + 1510) * 100 // 1000
