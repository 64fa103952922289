"""The state that each captured exchange starts from: what its ``setup`` sentence says, as code.

A function per case or family of cases; ``before(run)`` runs them in the order of the table. Most cases need nothing
but their customers (``CUSTOMERS``) and a fresh lease for every lease token that their request holds.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from contract_lab import REALM, REALM_2, policy, rate
from contract_match import TOKEN

from vluna_llm.sandbox import budgets, catalogue
from vluna_llm.sandbox.app import ConnectionDropped
from vluna_llm.sandbox.records import UNLIMITED, ContractTerm

if TYPE_CHECKING:
    from test_contract_replay import Run

G4 = "openai.gpt-4o"
AMPLE = 50_000_000
QUOTA = (policy(1000, G4), policy(-1))
RATED = (rate(5, G4), policy(-1))

CUSTOMERS: dict[str, dict[str, Any]] = {
    "cust_zero": {},
    "cust_zero2": {},
    "cust rich": {},
    "cust_lab": {},
    "cust_topup": {},
    "cust_poor": {"credit": 100},
    "cust_post": {"billing_mode": "postpaid"},
    "cust_hyb": {"billing_mode": "hybrid"},
    "cust_pp_": {"billing_mode": "postpaid"},
    "cust_budp_": {"billing_mode": "postpaid"},
    "cust_deny": {"credit": AMPLE, "denied": ("lab.denied",)},
    "cust_prem": {"credit": AMPLE, "granted": ("lab.premium",)},
    "cust_win_": {"credit": AMPLE, "policies": (policy(1000, G4, 10), policy(-1))},
    "cust_quota": {"credit": AMPLE, "policies": QUOTA},
    "cust_bb_": {"credit": AMPLE, "policies": QUOTA},
    "cust_short_": {"credit": AMPLE, "policies": (policy(1000, G4, 10), policy(-1))},
    "cust_acct_": {"credit": AMPLE, "policies": (policy(1000, G4, scope="account"), UNLIMITED)},
    "cust_empty_": {"credit": AMPLE, "policies": ()},
    "cust_ronly_": {"credit": AMPLE, "policies": (rate(5, G4),)},
    "cust_rate_": {"credit": AMPLE, "policies": RATED},
    "cust_read_": {"credit": 1000, "policies": QUOTA},
    "cust_ops_": {"credit": 1000},
    "cust_sync_": {"credit": 1000},
    "cust_m_": {"credit": 100},
    "cust_ra_": {"credit": 500},
    "cust_ctr_": {"credit": 1_000_000},
}
NEVER_SEEN = ("cust_new_", "cust_tok_")

Setup = Callable[["Run"], None]
TABLE: list[tuple[str, Setup]] = []


def setup(*names: str) -> Callable[[Setup], Setup]:
    """Register a setup for the cases whose names start so."""

    def register(function: Setup) -> Setup:
        TABLE.extend((name, function) for name in names)
        return function

    return register


def before(run: Run) -> None:
    for name, function in TABLE:
        if run.case.startswith(name):
            function(run)


def process_of(case: str) -> str:
    """Which of the captured server's processes took the request."""
    if case.startswith("devmode"):
        return "dev"
    if case == "settlement-01-ledger-sync":
        return "sync"
    if case.startswith(("commit-late-03", "commit-late-04", "authorize-idem-19")):
        return "short"
    if "registry-off" in case or case == "batch-13-unknown-meter-item":
        return "short"
    if case.startswith(("authorize-idem-05", "authorize-idem-06", "commit-idem-04", "ingest-14")):
        return "third"
    if case == "rate-07-replay-is-not-counted":
        return "second"
    if "same-process" not in case and "other-process" in case:
        return "second"
    return "main"


# -- tokens and leases -------------------------------------------------------------------------------------------------


@setup("commit-32", "cancel-04")
def wrong_suffix(run: Run) -> None:
    token = run.token()
    lease = run.lab.authorize("cust_rich")
    captured = TOKEN.fullmatch(token)
    assert captured is not None
    ours = f"lease.{lease['lease_id']}.{captured[2]}"
    run.ids.learn(token, ours)
    run.ids.learn(captured[1], lease["lease_id"])


@setup("commit-33", "cancel-10", "batch-16")
def foreign_lease(run: Run) -> None:
    run.bind(run.token(), run.lab.authorize("cust_rich2"))


@setup("commit-34", "cancel-11")
def lease_of_u1(run: Run) -> None:
    run.bind(run.token(), run.lab.authorize("cust_rich"))


@setup("commit-37")
def small_estimate(run: Run) -> None:
    run.bind(run.token(), run.lab.authorize("cust_rich", estimated_quantity_minor="10"))


@setup("commit-late-00", "batch-12", "batch-22", "repair-00", "pricing-block-floor-quarantined-0")
def canceled_lease(run: Run) -> None:
    data = run.fresh_lease(run.token())
    run.lab.cancel(run.principal, data["lease_token"])


@setup("cancel-03")
def committed_lease(run: Run) -> None:
    data = run.fresh_lease(run.token())
    run.lab.commit(run.principal, data["lease_token"], 10)


@setup("commit-late-03", "commit-late-04", "commit-late-05", "cancel-05")
def expired_lease(run: Run) -> None:
    """Authorized so long ago, on the process with 2 s, that it expired when the capture says so."""
    hints = run.answer_body.get("hints")
    expires = run.moment(hints[0]["expires_at"]) if hints else run.at_ms - 1000
    run.lab.at(expires - 2000)
    run.fresh_lease(run.token(), process="short")
    run.lab.at(run.at_ms)


@setup("commit-00")
def quota_counter_before(run: Run) -> None:
    spend(run, 5)


@setup("commit-23")
def without_borrowed_meters(run: Run) -> None:
    meters = run.lab.store.features.rows[(REALM, G4)].meters
    run.lab.change_feature(G4, meters=tuple(code for code in meters if code.startswith(G4 + ".") or code == G4))


def spend(run: Run, quantity: int) -> None:
    lease = run.lab.authorize("cust_rich")
    run.lab.commit("cust_rich", lease["lease_token"], quantity)


# -- authentication ----------------------------------------------------------------------------------------------------


@setup("auth-54")
def expired_key(run: Run) -> None:
    run.lab.add_key("expired", REALM, expires_at=run.lab.clock.now_ms() - 1)
    run.key_name = "expired"


@setup("auth-55")
def second_key(run: Run) -> None:
    run.lab.add_key("fresh", REALM)
    run.key_name = "fresh"


@setup("auth-56", "auth-58")
def disabled_key(run: Run) -> None:
    key_id = run.lab.keys["fresh"][0]
    with run.lab.store.transaction():
        key = run.lab.store.keys.rows[(key_id,)]
        run.lab.store.keys.put(key_id, replace(key, status="disabled"))
    run.key_name = "fresh"


@setup("auth-07", "auth-57")
def unknown_key(run: Run) -> None:
    run.key_name = "unknown"


@setup("auth-08")
def wrong_secret(run: Run) -> None:
    run.lab.keys["wrong"] = (run.lab.keys["lab"][0], run.lab.keys["lab2"][1])
    run.key_name = "wrong"


@setup("auth-09")
def key_of_other_realm(run: Run) -> None:
    run.key_name = "lab2"


@setup("auth-60")
def bound_key(run: Run) -> None:
    run.lab.add_key("bound", REALM, allowed_accounts=("00000000-0000-4000-8000-000000000000",))
    run.key_name = "bound"


@setup("auth-17")
def signed_other_content_type(run: Run) -> None:
    run.signed_headers["content-type"] = "application/json; charset=utf-8"


@setup("auth-22")
def signed_other_principal(run: Run) -> None:
    run.signed_headers["x-principal-id"] = "cust_rich"


@setup("auth-23")
def signed_without_user(run: Run) -> None:
    del run.signed_headers["x-user-id"]


@setup("auth-24")
def signed_other_key(run: Run) -> None:
    run.signed_headers["idempotency-key"] = "the-key-that-was-signed"


@setup("auth-25")
def signed_without_query(run: Run) -> None:
    run.signed_path = run.signed_path.partition("?")[0]


@setup("auth-43")
def signed_in_old_order(run: Run) -> None:
    run.old_canonical = True


@setup("auth-50")
def signed_as_text(run: Run) -> None:
    run.signed_headers["x-principal-id"] = run.signed_headers["x-principal-id"].encode("latin-1").decode("utf-8")


@setup("auth-59")
def big_body(run: Run) -> None:
    run.raw_body = json.dumps({"feature_code": G4, "labels": {"x": "x" * 1_100_000}}).encode()


# -- catalogue, money, plans -------------------------------------------------------------------------------------------


@setup("authorize-45")
def free_with_cost(run: Run) -> None:
    run.lab.feature("lab.freecost", "llm.standard", {"": (0, 4)})


@setup("limits-00", "meters-00")
def known_from_before(run: Run) -> None:
    for code, family in (("openai.brand-new-1", "llm.new"), ("openai.brand-new-3", "auto.registry")):
        run.lab.feature(code, family, {"": None})
    lines = [
        {"meter_code": f"{G4}.tokens.input", "quantity_minor": 20},
        {"meter_code": f"{G4}.tokens.output", "quantity_minor": 10},
    ]
    lease = run.lab.authorize(run.principal)
    run.lab.commit(run.principal, lease["lease_token"], 30, meters=lines)


@setup("meters-07")
def budget_of_500(run: Run) -> None:
    run.ids.learn("5057b41d-3310-4b6a-afab-99ae04d4f474", new_budget(run, 500))


def new_budget(run: Run, limit: int, consumed: int = 0) -> str:
    with run.lab.store.transaction():
        budget = budgets.create(run.lab.world, run.lab.account(run.principal), "b", limit)
        run.lab.store.budgets.put(budget.budget_id, replace(budget, consumed_xusd=consumed))
    return budget.budget_id


def close_budget(run: Run, budget_id: str) -> None:
    with run.lab.store.transaction():
        run.lab.store.budgets.put(budget_id, replace(run.lab.store.budgets.rows[(budget_id,)], status="closed"))


@setup("budget-10")
def closed_budget(run: Run) -> None:
    close_budget(run, run.ids.ours[run.body["budget_id"]])


@setup("budget-11", "batch-21")
def budget_closed_after_authorize(run: Run) -> None:
    budget_id = new_budget(run, 10_000)
    run.bind(run.token(), run.lab.authorize(run.principal, budget_id=budget_id))
    close_budget(run, budget_id)


@setup("budget-12")
def overdrawn_budget(run: Run) -> None:
    run.ids.learn(run.body["budget_id"], new_budget(run, 100, 550))


@setup("commit-money-00")
def two_open_leases(run: Run) -> None:
    run.fresh_lease(run.token())
    run.bind(run.token_of("commit-money-02-on-open-lease-with-zero-credit"), run.lab.authorize(run.principal))


@setup("commit-money-04")
def topped_up(run: Run) -> None:
    run.lab.customer(run.principal, 300)


@setup("commit-price-00")
def price_raised(run: Run) -> None:
    run.fresh_lease(run.token())
    with run.lab.store.transaction():
        catalogue.save_price(run.lab.world, REALM, f"{G4}-mini", 3, unit_cost_xusd=1)


@setup("commit-state-00")
def deactivated(run: Run) -> None:
    run.fresh_lease(run.token())
    run.lab.change_feature("lab.block.ceil", active=False)


@setup("commit-state-01")
def revoked(run: Run) -> None:
    run.fresh_lease(run.token())
    with run.lab.store.transaction():
        run.lab.store.accounts.put(REALM, run.principal, replace(run.lab.account(run.principal), granted=()))


@setup("principal-04")
def lease_then_disabled(run: Run) -> None:
    later = run.token_of("principal-05-commit-of-disabled-user")
    run.bind(later, run.lab.authorize(run.principal))
    with run.lab.store.transaction():
        user = run.lab.user(run.principal)
        run.lab.store.users.put(user.account_id, user.user_id, replace(user, active=False))


@setup("pricing-contract-00")
def contract(run: Run) -> None:
    terms = (
        ContractTerm(f"{G4}.tokens.input", 2),
        ContractTerm(f"{G4}.tokens.output", None),
        ContractTerm("lab.unpriced", 7),
    )
    account = replace(run.lab.account(run.principal), contract_id="c0a80101-0000-4000-8000-00000000c0de", terms=terms)
    with run.lab.store.transaction():
        run.lab.store.accounts.put(REALM, run.principal, account)


@setup("quota-05")
def open_leases(run: Run) -> None:
    run.fresh_lease(run.token())
    later = run.token_of("quota-06-commit-on-open-lease-after-exhaustion")
    run.bind(later, run.lab.authorize(run.principal))


@setup("quota-10")
def used_up_by_other_user(run: Run) -> None:
    run.lab.customer(run.principal, AMPLE, user="u2")
    lease = run.lab.authorize(run.principal)
    run.lab.commit(run.principal, lease["lease_token"], 1000)


@setup("quota-11")
def authorized_one_window_earlier(run: Run) -> None:
    run.lab.at(run.at_ms - 11_000)
    run.fresh_lease(run.token())
    run.lab.at(run.at_ms)


@setup("rate-07")
def counted_once(run: Run) -> None:
    for _ in range(2):
        run.lab.authorize(run.principal, key=run.headers["idempotency-key"])


@setup("settlement-01")
def authorized_before(run: Run) -> None:
    run.fresh_lease(run.token())


# -- idempotency -------------------------------------------------------------------------------------------------------


@setup("authorize-idem-07")
def realm_2_customer(run: Run) -> None:
    run.lab.customer("cust_r2", AMPLE, realm=REALM_2)


@setup("authorize-idem-12")
def realm_2_key(run: Run) -> None:
    run.key_name = "lab2"


@setup("authorize-idem-14")
def topped_up_after_402(run: Run) -> None:
    run.lab.customer("cust_zero2", AMPLE)


@setup("authorize-idem-16")
def committed_meanwhile(run: Run) -> None:
    captured = run.answer_of("authorize-idem-15-before-commit")["data"]["lease_token"]
    run.lab.commit("cust_rich", run.ids.ours[captured], 5)


@setup("authorize-idem-22")
def credit_gone(run: Run) -> None:
    lease = run.lab.authorize(run.principal, key=run.headers["idempotency-key"])
    run.lab.commit(run.principal, lease["lease_token"], 100)


@setup("commit-idem-05")
def key_used_on_another_lease(run: Run) -> None:
    lease = run.lab.authorize("cust_rich")
    run.lab.commit("cust_rich", lease["lease_token"], 100, key=run.headers["idempotency-key"])


@setup("commit-idem-09")
def key_of_the_authorize(run: Run) -> None:
    run.bind(run.token(), run.lab.authorize("cust_rich", key=run.headers["idempotency-key"]))


@setup("commit-idem-10")
def dropped_before(run: Run) -> None:
    run.fresh_lease(run.token())
    run.lab.apps["main"].faults.add("drop_after", "commits")
    try:
        run.send()
    except ConnectionDropped:
        return
    raise AssertionError("the connection was not dropped")


@setup("token-07")
def issued_before(run: Run) -> None:
    run.send()


# -- reading back ------------------------------------------------------------------------------------------------------


@setup("bearer-00", "bearer-01", "wallet-04")
def bearer_of_rich(run: Run) -> None:
    run.bearer = run.lab.token("cust_rich")


@setup("bearer-02")
def bearer_of_topup(run: Run) -> None:
    user = run.lab.customer("cust_topup", 1000)
    run.lab.call("POST", "/wallet/consume", {"amount": "600", "unit": "xusd"}, principal="cust_topup")
    assert user.active
    run.bearer = run.lab.token("cust_topup")


@setup("ops-00-ratings-plain")
def two_ratings(run: Run) -> None:
    lines = [
        {"meter_code": f"{G4}.tokens.input", "quantity_minor": 20},
        {"meter_code": f"{G4}.tokens.output", "quantity_minor": 10},
    ]
    now = run.at_ms
    run.lab.at(now - 3000)
    body = {"feature_code": G4, "quantity_minor": 10, "occurred_at": "2030-01-01T00:00:00Z"}
    run.lab.customer("cust_ing", AMPLE)
    run.lab.call("POST", "/gate/ingest", body, principal="cust_ing")
    lease = run.lab.authorize(run.principal)
    run.lab.at(now - 2000)
    run.lab.commit(run.principal, lease["lease_token"], 30, meters=lines, labels={"request_id": "abc"})
    run.lab.at(now - 1000)
    run.lab.commit(run.principal, lease["lease_token"], 7)
    run.lab.at(now)
    learn_account(run, "ops-03-ratings-realm-admin-account")
    rows = run.answer_of("ops-03-ratings-realm-admin-account")["data"]
    ours = list(reversed([r for r in run.lab.store.ratings.rows.values() if r.principal_id == run.principal]))
    for row, rating in zip(rows, ours, strict=True):
        run.ids.learn(row["rating_id"], rating.rating_id)
        run.ids.learn(row["metadata"]["lease_id"], str(rating.lease_id))


def learn_account(run: Run, case: str) -> None:
    row = run.answer_of(case)["data"][0]
    run.ids.learn(row["billing_account_id"], run.lab.account(run.principal).account_id)
    run.ids.learn(row["billing_user_id"], run.lab.user(run.principal).billing_user_id)


@setup("ops-18", "ops-19")
def bearer_of_ops(run: Run) -> None:
    run.bearer = run.lab.token(next(name for _, name in run.lab.store.accounts.rows if name.startswith("cust_ops_")))


@setup("ops-14", "ops-23")
def cursor_with_our_id(run: Run) -> None:
    if run.case.startswith("ops-23"):
        for quantity in range(1, 8):
            run.lab.at(run.at_ms - 10_000 + quantity)
            lease = run.lab.authorize(run.principal)
            run.lab.commit(run.principal, lease["lease_token"], quantity)
        run.lab.at(run.at_ms)
        learn_account(run, run.case)
        account_id = run.lab.account(run.principal).account_id
        own = [r for r in run.lab.store.ratings.rows.values() if r.account_id == account_id]
        for captured, rating in zip(run.captured_booked["rating_ids_newest_first"], reversed(own), strict=True):
            run.ids.learn(captured, rating.rating_id)
        ours = {rating.rating_id: str(rating.lease_id) for rating in own}
        for row in run.answer_body["data"]:
            run.ids.learn(row["metadata"]["lease_id"], ours[run.ids.ours[row["rating_id"]]])
    head, _, cursor = run.path.partition("cursor=")
    named = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4)))
    named["id"] = run.ids.ours[named["id"]]
    run.path = head + "cursor=" + base64.urlsafe_b64encode(json.dumps(named).encode()).rstrip(b"=").decode()
    run.signed_path = run.path


@setup("ops-01-ratings-billing-user-header")
def accounts_known(run: Run) -> None:
    learn_account(run, "ops-03-ratings-realm-admin-account")


@setup("wallet-00", "auth-37")
def account_of_rich(run: Run) -> None:
    run.ids.learn("6692bf00-b2d4-4860-a6c1-4dbd2a7836c2", run.lab.account("cust_rich").account_id)
