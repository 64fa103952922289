"""The captured storms: the same load on the embedded gate, and what its books must hold afterwards."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from contract_booked import counters, ratings_of_lease
from contract_lab import Lab, Reply, policy, rate

G4 = "openai.gpt-4o"
LINES = [
    {"meter_code": f"{G4}.tokens.input", "quantity_minor": 4},
    {"meter_code": f"{G4}.tokens.cached_input", "quantity_minor": 4},
]
PRINTED = "{status} {code}"

Load = Callable[[Lab, dict[str, Any]], list[str]]
CONCURRENT: dict[str, Load] = {}


def case(name: str) -> Callable[[Load], Load]:
    def register(function: Load) -> Load:
        CONCURRENT[name] = function
        return function

    return register


def storm(
    lab: Lab, path: str, asks: Sequence[tuple[str, str, str, Any]], processes: Sequence[str] = ("main",)
) -> list[Reply]:
    """Many POSTs at once: (principal, user, key, body) each, spread over the processes."""

    async def run() -> list[Reply]:
        calls = []
        for index, (principal, user, key, body) in enumerate(asks):
            raw, target = json.dumps(body).encode(), "/mgt/v1" + path
            headers = lab.headers("POST", target, raw, principal=principal, user=user, key=key)
            calls.append(lab.asend(processes[index % len(processes)], "POST", target, headers, raw))
        return list(await asyncio.gather(*calls))

    return lab.loop.run_until_complete(run())


def answers(replies: Sequence[Reply]) -> dict[str, int]:
    """Counted as the captures count them: status, code, and the message of an error."""
    return dict(
        Counter(f"{r.status} {r.body['code']}" + (f" {r.body['message']}" if not r.body["ok"] else "") for r in replies)
    )


def check(found: dict[str, Any], captured: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {found[name]}, captured {captured.get(name)}" for name in found if found[name] != captured.get(name)
    ]


def lease_tokens(lab: Lab, principal: str, count: int, user: str = "u1", feature: str = G4) -> list[str]:
    return [lab.authorize(principal, feature, user=user)["lease_token"] for _ in range(count)]


def commit_body(token: str, quantity: int, feature: str = G4, lines: Any = None) -> dict[str, Any]:
    body = {"lease_token": token, "feature_code": feature, "quantity_minor": quantity}
    return body if lines is None else {**body, "meters": lines}


def charged(lab: Lab, principal: str) -> int:
    return sum(r.charged_xusd for r in lab.store.ratings.rows.values() if r.principal_id == principal)


def _one_key(processes: Sequence[str], count: int) -> Load:
    def load(lab: Lab, captured: dict[str, Any]) -> list[str]:
        lease = lab.authorize("cust_rich")
        ask = ("cust_rich", "u1", f"one-{count}", commit_body(lease["lease_token"], 100))
        replies = storm(lab, "/gate/commits", [ask] * count, processes)
        ratings = ratings_of_lease(lab, lease["lease_id"])
        ids = {r.body["data"]["commit_id"] for r in replies}
        body = captured["response"]["body"]
        return check({"answers": answers(replies), "distinct_commit_ids": len(ids)}, body) + check(
            {"ratings": len(ratings), "charged": sum(r.charged_xusd for r in ratings)}, captured["booked"]
        )

    return load


CONCURRENT["concurrency-00-commits-one-key"] = _one_key(("main",), 50)
CONCURRENT["concurrency-01-commits-one-key-three-processes"] = _one_key(("main", "second", "sync"), 51)


@case("concurrency-02-commits-one-lease-many-keys")
def many_keys(lab: Lab, captured: dict[str, Any]) -> list[str]:
    lease = lab.authorize("cust_rich")
    asks = [("cust_rich", "u1", f"mk-{i}", commit_body(lease["lease_token"], 100)) for i in range(50)]
    replies = storm(lab, "/gate/commits", asks)
    ratings = ratings_of_lease(lab, lease["lease_id"])
    hinted = sum("hints" in r.body for r in replies)
    found = {
        "ratings": len(ratings),
        "charged": sum(r.charged_xusd for r in ratings),
        "applied": sum(r.applied for r in ratings),
    }
    return check({"answers": answers(replies), "with_closed_hint": hinted}, captured["response"]["body"]) + check(
        found, captured["booked"]
    )


@case("concurrency-03-authorizes-one-key")
def authorizes_one_key(lab: Lab, captured: dict[str, Any]) -> list[str]:
    replies = storm(lab, "/gate/authorize", [("cust_rich", "u1", "ak", {"feature_code": G4})] * 50)
    leases = {r.body["data"]["lease_id"] for r in replies if r.body["ok"]}
    assert len(leases) == captured["response"]["body"]["distinct_leases"]
    return check({"answers": answers(replies)}, captured["response"]["body"])


@case("concurrency-04-authorize-storm")
def authorize_storm(lab: Lab, captured: dict[str, Any]) -> list[str]:
    replies = storm(lab, "/gate/authorize", [("cust_rich", "u1", f"as-{i}", {"feature_code": G4}) for i in range(300)])
    leases = {r.body["data"]["lease_id"] for r in replies}
    return check({"answers": answers(replies), "distinct_leases": len(leases)}, captured["response"]["body"])


@case("concurrency-05-commits-many-leases")
def many_leases(lab: Lab, captured: dict[str, Any]) -> list[str]:
    lab.customer("cust_many", 50_000_000)
    tokens = lease_tokens(lab, "cust_many", 50)
    asks = [("cust_many", "u1", f"ml-{i}", commit_body(token, 100)) for i, token in enumerate(tokens)]
    replies = storm(lab, "/gate/commits", asks)
    kinds = Counter(
        p.grant_kind for r in lab.store.ratings.rows.values() if r.principal_id == "cust_many" for p in r.allocations
    )
    found = {"charged": charged(lab, "cust_many"), "allocations_by_grant_kind": dict(kinds)}
    return check({"answers": answers(replies)}, captured["response"]["body"]) + check(found, captured["booked"])


@case("concurrency-06-batches-opposite-order")
def batches(lab: Lab, captured: dict[str, Any]) -> list[str]:
    told = unbooked = 0
    for round_ in range(10):
        tokens = lease_tokens(lab, "cust_rich", 2)
        asks = []
        for index in range(8):
            order = tokens if index % 2 else tokens[::-1]
            items = [
                {**commit_body(token, 1), "idempotency_key": f"bo-{round_}-{index}-{token[-4:]}"} for token in order
            ]
            asks.append(("cust_rich", "u1", f"bo-{round_}-{index}", {"items": items}))
        for reply in storm(lab, "/gate/commits/batch", asks):
            for item in reply.body["data"]["items"]:
                told += item["status"] == "committed"
                unbooked += (
                    item["status"] == "committed" and (item["commit"]["commit_id"],) not in lab.store.ratings.rows
                )
    assert told == 160
    return check({"told_committed_but_not_booked": unbooked}, captured["booked"])


@case("concurrency-07-new-principal-storm")
def new_principal(lab: Lab, captured: dict[str, Any]) -> list[str]:
    replies = storm(lab, "/gate/authorize", [("cust_nps", "u1", f"np-{i}", {"feature_code": G4}) for i in range(20)])
    account = lab.account("cust_nps")
    assert [owner for owner, _ in lab.store.users.rows].count(account.account_id) == captured["booked"]["users"]
    return check({"answers": answers(replies)}, captured["response"]["body"])


@case("concurrency-08-auto-registry-storm")
def registry(lab: Lab, captured: dict[str, Any]) -> list[str]:
    body = {"feature_code": "openai.storm"}
    replies = storm(lab, "/gate/authorize", [("cust_rich", "u1", f"rs-{i}", body) for i in range(20)])
    assert answers(replies) == {"200 OK": 20}
    return check({"answers": answers(replies)}, captured["response"]["body"])


@case("concurrency-09-rate-limit-exact")
def rate_limit(lab: Lab, captured: dict[str, Any]) -> list[str]:
    lab.customer("cust_rl", 1000, policies=(rate(5, G4), policy(-1)))
    replies = storm(lab, "/gate/authorize", [("cust_rl", "u1", f"rl-{i}", {"feature_code": G4}) for i in range(40)])
    return check({"answers": answers(replies)}, captured["response"]["body"])


@case("concurrency-10-quota-overshoot")
def overshoot(lab: Lab, captured: dict[str, Any]) -> list[str]:
    lab.customer("cust_os", 50_000_000, policies=(policy(1000, G4), policy(-1)))
    tokens = lease_tokens(lab, "cust_os", 20)
    asks = [("cust_os", "u1", f"os-{i}", commit_body(token, 900)) for i, token in enumerate(tokens)]
    replies = storm(lab, "/gate/commits", asks)
    rows = [r for r in lab.store.ratings.rows.values() if r.principal_id == "cust_os"]
    assert answers(replies) == captured["response"]["body"]["answers"]
    assert sum(r.applied for r in rows) == captured["booked"]["charged_commits"]
    assert [row["used_minor"] for row in counters(lab, "cust_os", "quota")] == [18000, 1000]
    return check({"hints": sum("hints" in r.body for r in replies)}, captured["response"]["body"])


@case("concurrency-11-low-credit-fan-out")
def fan_out(lab: Lab, captured: dict[str, Any]) -> list[str]:
    lab.customer("cust_fo", 10)
    replies = storm(lab, "/gate/authorize", [("cust_fo", "u1", f"fo-{i}", {"feature_code": G4}) for i in range(30)])
    return check({"answers": answers(replies)}, captured["response"]["body"])


@case("concurrency-12-floor-remainder")
def floor_remainder(lab: Lab, captured: dict[str, Any]) -> list[str]:
    lab.customer("cust_fr", 50_000_000)
    tokens = lease_tokens(lab, "cust_fr", 50, feature="lab.block.floor")
    asks = [("cust_fr", "u1", f"fr-{i}", commit_body(t, 100, "lab.block.floor")) for i, t in enumerate(tokens)]
    replies = storm(lab, "/gate/commits", asks)
    user = lab.user("cust_fr").billing_user_id
    rest = [{"remainder_numer": value} for key, value in lab.store.carries.rows.items() if key[0] == user]
    return check({"answers": answers(replies)}, captured["response"]["body"]) + check(
        {"charged": charged(lab, "cust_fr"), "remainder": rest}, captured["booked"]
    )


def _with_lines(principal: str, count: int, mixed: bool, expected: int, told: str = "answers") -> Load:
    """Commits of 16 XUSD each; the books must hold every one of them once."""

    def load(lab: Lab, captured: dict[str, Any]) -> list[str]:
        lab.customer(principal, 50_000_000)
        tokens = lease_tokens(lab, principal, count)
        asks = [
            (principal, "u1", f"{principal}-{i}", commit_body(t, 8, lines=LINES[::-1] if mixed and i % 2 else LINES))
            for i, t in enumerate(tokens)
        ]
        replies = storm(lab, "/gate/commits", asks)
        assert answers(replies) == {"200 OK": count}
        assert charged(lab, principal) == expected
        if told == "attempts_needed":
            return check({told: {"1": count}}, captured["response"]["body"])
        return check({told: answers(replies)}, captured["response"]["body"]) + check(
            {"charged": charged(lab, principal)}, captured["booked"]
        )

    return load


CONCURRENT["concurrency-13-meter-order-deadlock"] = _with_lines("cust_md", 60, True, 960)
CONCURRENT["concurrency-15-same-meter-order-warm"] = _with_lines("cust_sm", 60, False, 960)
CONCURRENT["concurrency-16-first-commits-sorted-with-retry"] = _with_lines("cust_fs", 40, False, 640, "attempts_needed")
CONCURRENT["concurrency-17-first-commits-mixed-order-with-retry"] = _with_lines(
    "cust_fm", 40, True, 640, "attempts_needed"
)


@case("concurrency-14-first-commits-in-parallel")
def first_commits(lab: Lab, captured: dict[str, Any]) -> list[str]:
    found = []
    for number in range(6):
        name = f"cust_fc{number}"
        lab.customer(name, 50_000_000)
        tokens = lease_tokens(lab, name, 20, feature="lab.block.floor")
        asks = [(name, "u1", f"{name}-{i}", commit_body(t, 100, "lab.block.floor")) for i, t in enumerate(tokens)]
        storm(lab, "/gate/commits", asks, ("main", "second", "sync"))
        found.append(charged(lab, name))
    assert found == [captured["booked"]["expected_each"]] * 6
    return check({"charged": found}, captured["booked"])


@case("concurrency-18-ten-users-one-account")
def ten_users(lab: Lab, captured: dict[str, Any]) -> list[str]:
    asks = []
    for number in range(10):
        lab.customer("cust_tu", 50_000_000, user=f"u{number}")
        for i, token in enumerate(lease_tokens(lab, "cust_tu", 5, user=f"u{number}")):
            asks.append(("cust_tu", f"u{number}", f"tu-{number}-{i}", commit_body(token, 8, lines=LINES)))
    replies = storm(lab, "/gate/commits", asks)
    assert charged(lab, "cust_tu") == 50 * 16
    return check({"answers": answers(replies)}, captured["response"]["body"])


@case("concurrency-19-twenty-customers")
def twenty(lab: Lab, captured: dict[str, Any]) -> list[str]:
    asks = []
    for number in range(20):
        lab.customer(f"cust_tw{number}", 1000)
        token = lab.authorize(f"cust_tw{number}")["lease_token"]
        asks.append((f"cust_tw{number}", "u1", f"tw-{number}", commit_body(token, 8, lines=LINES)))
    return check({"answers": answers(storm(lab, "/gate/commits", asks))}, captured["response"]["body"])


def _ingest_asks() -> list[tuple[str, str, str, Any]]:
    body = {"feature_code": G4, "quantity_minor": 8, "meters": LINES}
    return [("cust_fi", "u1", f"fi-{i}", body) for i in range(40)]


@case("concurrency-20-first-ingests")
def first_ingests(lab: Lab, captured: dict[str, Any]) -> list[str]:
    lab.customer("cust_fi", 50_000_000)
    replies = storm(lab, "/gate/ingest", _ingest_asks())
    assert charged(lab, "cust_fi") == captured["booked"]["expected"]
    return check({"answers": answers(replies)}, captured["response"]["body"])


@case("concurrency-21-same-ingest-keys-again")
def ingests_again(lab: Lab, captured: dict[str, Any]) -> list[str]:
    replies = storm(lab, "/gate/ingest", _ingest_asks(), ("second",))
    return check({"answers": answers(replies)}, captured["response"]["body"]) + check(
        {"charged": charged(lab, "cust_fi")}, captured["booked"]
    )


@case("concurrency-22-ingests-one-key")
def ingests_one_key(lab: Lab, captured: dict[str, Any]) -> list[str]:
    body = {"feature_code": G4, "quantity_minor": 8, "meters": LINES}
    replies = storm(lab, "/gate/ingest", [("cust_fi", "u1", "fi-one", body)] * 40)
    ids = {r.body["data"]["commit_id"] for r in replies}
    found = {"answers": answers(replies), "distinct_commit_ids": len(ids)}
    return check(found, captured["response"]["body"]) + check({"charged": charged(lab, "cust_fi")}, captured["booked"])
