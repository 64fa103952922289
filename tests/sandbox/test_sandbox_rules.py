"""The rules that cost or save revenue, stated by hand: they hold on a machine without the captured exchanges."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from contract_lab import Lab, policy, rate, sign
from gate_caller import FEATURE, Caller

from vluna_llm.sandbox import STRICT, Sandbox
from vluna_llm.sandbox.fields import js_string, labels, number, parse_time

INPUT = f"{FEATURE}.tokens.input"


@pytest.fixture
def lab() -> Iterator[Lab]:
    found = Lab()
    found.catalogue()
    found.customer("c1", 1_000_000)
    yield found
    found.close()


def post(lab: Lab, path: str, body: Any, *, process: str = "main", who: str = "c1", key: str | None = None) -> Any:

    raw, target = json.dumps(body).encode(), "/mgt/v1" + path
    headers = lab.headers("POST", target, raw, principal=who, key=key)
    return lab.send(process, "POST", target, headers, raw)


def commit(lab: Lab, token: str, key: str | None = None, *, process: str = "main", **more: Any) -> Any:
    body = {"lease_token": token, "feature_code": FEATURE, "quantity_minor": 10, **more}
    return post(lab, "/gate/commits", body, process=process, key=key)


def charged(lab: Lab) -> int:
    return sum(rating.charged_xusd for rating in lab.store.ratings.rows.values())


@pytest.mark.parametrize(
    ("what", "hint", "expected"),
    [
        ("normal", None, 50),
        ("unpriced line", "pricing.not_configured", 0),
        ("unknown line", "feature.meter_not_allowed", 0),
        ("committed before", "lease.closed_at_commit", 0),
        ("canceled", "lease.closed_at_commit", 0),
        ("within grace", "lease.expired", 50),
        ("beyond grace", "lease.expired", 0),
    ],
)
def test_what_a_commit_charges(lab: Lab, what: str, hint: str | None, expected: int) -> None:
    """Gate contract 9.1: HTTP 200 in every row, and only the hint tells what was not charged."""
    lab.at(1_000_000_000_000)
    process = "short" if what in ("unknown line", "within grace", "beyond grace") else "main"
    lease = lab.authorize("c1", process=process)
    more: dict[str, Any] = {}
    if what == "unpriced line":
        more["meters"] = [{"meter_code": INPUT, "quantity_minor": 9}, {"meter_code": "new.one", "quantity_minor": 1}]
    if what == "unknown line":
        more["meters"] = [{"meter_code": INPUT, "quantity_minor": 9}, {"meter_code": "lab.free", "quantity_minor": 1}]
    if what == "committed before":
        lab.commit("c1", lease["lease_token"], 1)
    if what == "canceled":
        lab.cancel("c1", lease["lease_token"])
    lab.at(1_000_000_000_000 + {"within grace": 4000, "beyond grace": 6000}.get(what, 0))
    before = charged(lab)
    reply = commit(lab, lease["lease_token"], process=process, **more)
    assert reply.status == 200
    assert [entry["type"] for entry in reply.body.get("hints", [])] == ([hint] if hint else [])
    assert int(reply.body["data"]["amount_xusd"]) > 0
    assert charged(lab) - before == expected
    state = lab.store.leases.rows[("realm-lab", lease["lease_id"])].state
    assert state == "closed"


def test_quarantined_usage_moves_neither_quota_nor_credit(lab: Lab) -> None:
    """What is not charged leaves no trace in the counters."""
    lab.customer("c2", 1000, policies=(policy(100),))
    lease = lab.authorize("c2")
    lab.cancel("c2", lease["lease_token"])
    lab.commit("c2", lease["lease_token"], 10)
    assert not lab.store.counters.rows
    assert lab.world.purse(lab.user("c2").billing_user_id).spendable_xusd == 1000


def test_credit_is_drawn_before_debt_and_new_credit_does_not_pay_debt(lab: Lab) -> None:
    """100 of credit and a charge of 500: 100 from the wallet, 400 of debt; after a top-up authorize lets in."""
    lab.customer("c2", 100)
    lease = lab.authorize("c2")
    lab.commit("c2", lease["lease_token"], 100)
    (rating,) = lab.store.ratings.rows.values()
    assert [(part.grant_kind, part.amount_xusd) for part in rating.allocations] == [("cash", 100), ("fallback", 400)]
    assert post(lab, "/gate/authorize", {"feature_code": FEATURE}, who="c2").status == 402
    lab.customer("c2", 300)
    assert post(lab, "/gate/authorize", {"feature_code": FEATURE}, who="c2").status == 200
    balance = lab.call("GET", "/wallet/balance", principal="c2")
    assert balance["balances"]["xusd"] == "700"
    assert balance["outstanding_balances"]["xusd"] == "300"


def test_the_database_layer_compares_fields_and_the_cache_compares_text(lab: Lab) -> None:
    """Same key, members in another order: 409 from the process that answered, the old lease from another one."""
    first = post(lab, "/gate/authorize", {"feature_code": FEATURE, "estimated_quantity_minor": "5"}, key="k")
    turned = {"estimated_quantity_minor": "5", "feature_code": FEATURE}
    here = post(lab, "/gate/authorize", turned, key="k")
    there = post(lab, "/gate/authorize", turned, key="k", process="second")
    other = post(lab, "/gate/authorize", {"feature_code": FEATURE}, key="k", process="third")
    assert (here.status, here.body["message"]) == (409, "idempotency_conflict")
    assert there.body["data"] == first.body["data"]
    assert (other.status, other.body["message"]) == (409, "idempotency conflict")
    token = first.body["data"]["lease_token"]
    booked = commit(lab, token, "c")
    assert commit(lab, token, "c", process="second").body["data"] == booked.body["data"]
    assert commit(lab, token, "c", process="third", labels={"a": "b"}).status == 409
    assert charged(lab) == 50


def test_quota_and_rate_windows(lab: Lab) -> None:
    """A commit over quota is charged in full and told; the counter is clipped; rate hints come three calls ahead."""
    lab.customer("c2", 1_000_000, policies=(policy(100), rate(5)))
    seen = [post(lab, "/gate/authorize", {"feature_code": FEATURE}, who="c2") for _ in range(6)]
    assert [reply.status for reply in seen] == [200] * 5 + [429]
    assert ["hints" in reply.body for reply in seen] == [False, True, True, True, True, True]
    body = {"lease_token": seen[0].body["data"]["lease_token"], "feature_code": FEATURE, "quantity_minor": 150}
    over = post(lab, "/gate/commits", body, who="c2")
    assert over.body["hints"] == [{"type": "quota.remaining", "max_quantity_minor": 100}]
    assert charged(lab) == 750
    limits = lab.call("GET", "/gate/limits?expand=quotas,rates&feature_code=" + FEATURE, principal="c2")[0]
    assert [window["used_minor"] for window in (*limits["quotas"], *limits["rates"])] == ["100", "5"]


def test_two_lines_of_one_meter_start_from_the_same_rest(lab: Lab) -> None:
    """Floor, 600 + 600 units at 1000 a block: nothing is billed and only the last rest is kept, as on the real gate."""
    lease = lab.authorize("c1", "lab.block.floor")
    line = {"meter_code": "lab.block.floor", "quantity_minor": 600}
    lab.commit("c1", lease["lease_token"], 1200, "lab.block.floor", meters=[line, line])
    lease = lab.authorize("c1", "lab.block.floor")
    lab.commit("c1", lease["lease_token"], 400, "lab.block.floor")
    assert [rating.charged_xusd for rating in lab.store.ratings.rows.values()] == [0, 100]


def test_every_signed_part_is_checked(lab: Lab) -> None:
    """Whatever is changed after signing, the request is refused, and with the words of its own step."""
    target = "/mgt/v1/gate/limits?expand=quotas"
    good = lab.headers("GET", target, b"", principal="c1")
    assert lab.send("main", "GET", target, good).status == 200
    changes: list[tuple[dict[str, str], str]] = [
        ({"x-principal-id": "c2"}, "Signature mismatch"),
        ({"x-user-id": "u2"}, "Signature mismatch"),
        ({"idempotency-key": "other"}, "Signature mismatch"),
        ({"content-type": "application/json"}, "Signature mismatch"),
        ({"x-billing-user-id": "u"}, "Signature mismatch"),
        ({"content-digest": "sha-256=:AAAA:"}, "Content-Digest mismatch"),
        ({"content-digest": ""}, "Content-Digest header missing"),
        ({"authorization": good["authorization"].replace(",sig", ", sig")}, "Authorization header malformed"),
        ({"authorization": "Basic abc"}, "unsupported_authorization_scheme"),
        ({"x-realm-id": "realm-lab2"}, "Service API key not authorized for realm"),
        ({"x-realm-id": "realm-nope"}, "unknown_realm"),
        ({"x-realm-id": ""}, "missing_realm"),
    ]
    for change, message in changes:
        assert lab.send("main", "GET", target, {**good, **change}).body["message"] == message
    assert lab.send("main", "GET", target + ",rates", good).body["message"] == "Signature mismatch"
    key_id, _ = lab.keys["lab"]
    forged = sign(lab.keys["lab2"][1], "GET", target, "now", "n1", good)
    header = f"SVC-AUTH keyId={key_id},sig={forged},ts=now,nonce=n1,alg=HMAC-SHA256"
    assert lab.send("main", "GET", target, {**good, "authorization": header}).body["message"] == "Signature mismatch"


def test_a_failed_request_leaves_nothing_behind() -> None:
    """A commit that is refused after auto-registry created its feature takes the feature back."""
    with Sandbox() as gate:
        caller = Caller(gate)
        lease = caller.authorize()
        assert caller.commit(lease, feature="never.seen").json()["message"] == "feature mismatch for lease"
        listed = caller.send("GET", "/gate/limits").json()["data"]
        assert [entry["feature_code"] for entry in listed] == [FEATURE]


def test_prepaid_lets_customers_without_credit_use_what_is_free() -> None:
    """402 for anything priced; a feature without any price is open, with a hint."""
    with Sandbox(STRICT, first_call_fails=False) as gate:
        gate.feature("free.thing")
        gate.feature("paid.thing")
        gate.price("paid.thing", 1)
        caller = Caller(gate)
        free = caller.send("POST", "/gate/authorize", {"feature_code": "free.thing"})
        paid = caller.send("POST", "/gate/authorize", {"feature_code": "paid.thing"})
        assert free.json()["hints"] == [{"type": "funding.xusd_shortfall", "shortfall_xusd": 1}]
        assert (paid.status_code, paid.json()["message"]) == (402, "grant balance exhausted")
        gate.customer("c1", billing_mode="postpaid")
        assert caller.send("POST", "/gate/authorize", {"feature_code": "paid.thing"}).status_code == 200


def test_ratings_and_allocations_tell_charged_from_quarantined() -> None:
    """Reconciliation (gate contract 13): a quarantined commit has a rating and no allocation; paging loses a row."""
    with Sandbox() as gate:
        caller = Caller(gate)
        lease = caller.authorize()
        good = caller.commit(lease, 10, labels={"op": "1"}).json()["data"]["commit_id"]
        lost = caller.commit(lease, 7).json()["data"]["commit_id"]
        hidden = caller.send("GET", "/ops/ratings").json()["data"]
        assert hidden == []
        admin = {"x_realm_admin": "true"}
        lease_id = gate.leases("c1")[0].lease_id
        rows = caller.send("GET", f"/ops/ratings?source_ref=gate_lease:{lease_id}", **admin).json()["data"]
        assert {row["rating_id"]: row["metadata"]["application_status"] for row in rows} == {
            good: "applied",
            lost: "quarantined",
        }
        paid = caller.send("GET", f"/ops/allocations?rating_id={good}", **admin).json()["data"]
        assert [row["allocated_xusd"] for row in paid] == ["50"]
        assert caller.send("GET", f"/ops/allocations?rating_id={lost}", **admin).json()["data"] == []
        assert caller.send("GET", f"/ops/ratings/{good}", **admin).json()["data"]["metadata"]["labels"] == {"op": "1"}
        caller.ingest(1)
        first = caller.send("GET", "/ops/ratings?limit=1", **admin).json()
        rest = caller.send("GET", f"/ops/ratings?limit=1&cursor={first['meta']['next_cursor']}", **admin).json()
        assert first["meta"]["has_more"] is True
        assert [row["rating_id"] for row in rest["data"]] == [good]


def test_budgets_never_cap_a_commit() -> None:
    """A budget of 100 takes a charge of 500 in full, says so, and stops only the next authorize."""
    with Sandbox() as gate:
        caller = Caller(gate)
        budget = gate.budget("c1", 100)
        lease = caller.authorize(budget_id=budget)
        hints = caller.commit(lease, 100).json()["hints"]
        assert [(h["type"], h.get("shortfall_xusd"), h.get("threshold_xusd")) for h in hints] == [
            ("budget.shortfall", 400, None),
            ("budget.low_headroom", None, 1000),
        ]
        refused = caller.send("POST", "/gate/authorize", {"feature_code": FEATURE, "budget_id": budget})
        assert (refused.status_code, refused.json()["code"]) == (402, "BUDGET.EXHAUSTED")
        assert gate.booked("c1").charged_xusd == 500


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1e3", 1000),
        ("0x10", 16),
        (" 7 ", 7),
        ("", 0),
        ("10.9", 10),
        (2.5, 2),
        ("-0.5", -1),
        ("9007199254740993", 2**53),
        ("ten", None),
        (True, None),
        ([1], None),
        ("1_000", None),
        ("Infinity", None),
        ("1e999", None),
        ("+5", 5),
    ],
)
def test_numbers_are_read_like_javascript(value: Any, expected: int | None) -> None:
    """Quantities follow JavaScript's Number() and are floored."""
    assert number(value) == expected


def test_labels_and_dates_are_read_like_javascript() -> None:
    """Labels become strings, empty ones go; dates come in many spellings."""
    assert labels({"a": {"b": 1}, "c": [1, 2], "d": None, "e": True, "f": "", "n": 5}) == {
        "a": "[object Object]",
        "c": "1,2",
        "e": "true",
        "n": "5",
    }
    assert labels("abc") == {"0": "a", "1": "b", "2": "c"}
    assert js_string(None) == "null"
    assert parse_time("2026-01-02T03:04:05.678901+01:00") == 1_767_319_445_678
    assert parse_time("2026-01-02") == 1_767_312_000_000
    assert parse_time("Fri, 02 Jan 2026 00:00:00 GMT") == 1_767_312_000_000
    assert parse_time("yesterday") is None


def test_an_estimate_is_judged_by_the_cheapest_meter() -> None:
    """100 XUSD left, 1200 units, cached input at 1 XUSD: 200 all the same, with what is lacking as hints."""
    with Sandbox() as gate:
        gate.set_credit("c1", 100)
        caller = Caller(gate)
        body = {"feature_code": FEATURE, "estimated_quantity_minor": "1200"}
        answer = caller.send("POST", "/gate/authorize", body)
        assert answer.status_code == 200
        assert answer.json()["hints"] == [
            {"type": "funding.xusd_shortfall", "shortfall_xusd": 1100},
            {
                "type": "quota.remaining",
                "max_quantity_minor": 100,
                "message": "insufficient credits to cover estimated usage",
            },
        ]


def test_a_top_up_is_booked_once_per_key() -> None:
    """A 500 after the booking, a restart of the process, the same key again: one top-up, one consumption."""
    with Sandbox(defaults={"credit_xusd": 0}) as gate:
        caller = Caller(gate)
        for path, body, before, after in (
            ("adjustments", {"delta": "1000", "unit": "xusd", "kind": "credit"}, 500, 1000),
            ("consume", {"amount": "600", "unit": "xusd"}, 500, 400),
        ):
            gate.faults.add("error_after", path)
            assert caller.send("POST", f"/wallet/{path}", body, key="k").status_code == before
            gate.restart()
            assert caller.send("POST", f"/wallet/{path}", body, key="k").json()["data"]["balance"] == str(after)
        assert gate.spendable("c1") == 400
