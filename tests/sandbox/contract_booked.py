"""The books of the laboratory in the form of the exchanges' ``booked`` member."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from contract_lab import REALM, Lab
from contract_match import TOKEN

from vluna_llm.sandbox.records import Rating


def rating_view(rating: Rating) -> dict[str, Any]:
    return {
        "kind": rating.kind,
        "quantity_minor": rating.quantity,
        "canonical_amount_xusd": rating.amount_xusd,
        "canonical_cost_xusd": rating.cost_xusd,
        "application_status": "applied" if rating.applied else "quarantined",
        "reason_codes": list(rating.reason_codes),
        "charged_xusd": rating.charged_xusd,
        "records": [
            {"meter": line.meter, "q": line.quantity, "amount_xusd": line.price.amount_xusd} for line in rating.lines
        ],
        "allocations": [
            {
                "funding_kind": "grant",
                "grant_kind": part.grant_kind,
                "allocated_xusd": part.amount_xusd,
                "applied_amount_xusd": part.amount_xusd,
                "settlement_state": "settled" if part.settled else "pending",
            }
            for part in rating.allocations
        ],
    }


def ratings_of_lease(lab: Lab, lease_id: str) -> list[Rating]:
    return [rating for rating in lab.store.ratings.rows.values() if rating.lease_id == lease_id]


def lease_view(lab: Lab, lease_id: str) -> dict[str, Any]:
    lease = lab.store.leases.get(REALM, lease_id)
    ratings = ratings_of_lease(lab, lease_id)
    return {
        "lease_state": None if lease is None else lease.state,
        "ratings": [rating_view(rating) for rating in ratings],
        "total_charged_xusd": sum(rating.charged_xusd for rating in ratings),
    }


def leases_of_key(lab: Lab, principal: str, user: str, key: str) -> list[dict[str, Any]]:
    account = lab.store.accounts.get(REALM, principal)
    record = None if account is None else lab.store.users.get(account.account_id, user)
    lease_id = None if record is None else lab.store.lease_keys.get(record.billing_user_id, key)
    if lease_id is None:
        return []
    lease = lab.store.leases.rows[(REALM, lease_id)]
    ttl = (lease.expires_at - lease.created_at) // 1000
    return [{"lease_id": lease_id, "state": lease.state, "cap_minor": lease.cap, "ttl_s": ttl}]


def counters(lab: Lab, principal: str, kind: str, feature: str = "openai.gpt-4o") -> list[dict[str, Any]]:
    """Counters of one customer, unlimited windows first, as the captures list them."""
    account = lab.account(principal)
    subjects = {account.account_id} | {
        user.billing_user_id for (owner, _), user in lab.store.users.rows.items() if owner == account.account_id
    }
    rows = []
    for (subject, what, code, scope, start, end, limit), used in lab.store.counters.rows.items():
        if subject in subjects and what == kind and code == feature:
            rows.append(
                {
                    "feature_code": code,
                    "subject_scope": scope,
                    "window_start": _moment(start),
                    "window_end": _moment(end),
                    "limit_minor": int(limit),
                    "used_minor": used,
                }
            )
    return sorted(rows, key=lambda row: row["limit_minor"])


def booked(lab: Lab, captured: dict[str, Any], request: dict[str, Any], answer: Any) -> dict[str, Any]:
    """Our books, in the members that the captured ones have. ``request`` has our ids in it."""
    headers, body = request["headers"], request["body"]
    principal, user = headers.get("x-principal-id", ""), headers.get("x-user-id", "")
    key = headers.get("idempotency-key", "")
    data = answer.get("data") if isinstance(answer, dict) else None
    tokens = TOKEN.findall(str(body))
    commit_id = data.get("commit_id") if isinstance(data, dict) else None
    out: dict[str, Any] = {}
    if "lease_created" in captured:
        out["lease_created"] = bool(leases_of_key(lab, principal, user, key))
    if "ratings" in captured and "lease_state" not in captured:
        found = [lab.store.ratings.rows[(commit_id,)]]
        out["ratings"] = [rating_view(rating) for rating in found]
        out["total_charged_xusd"] = sum(rating.charged_xusd for rating in found)
        if "rated_at" in captured:
            out["rated_at"] = [
                {
                    "rated_at": _moment(str(rating.rated_at)),
                    "src": "client" if rating.client_dated else "server_default",
                }
                for rating in found
            ]
    elif "lease_state" in captured:
        out |= lease_view(lab, tokens[0][0])
    if "leases" in captured:
        if isinstance(body, dict) and "items" in body:
            wanted = [row["lease_id"] for row in captured["leases"]]
            out["leases"] = [{"lease_id": lease_id, **lease_view(lab, lease_id)} for lease_id in wanted]
        else:
            out["leases"] = leases_of_key(lab, principal, user, key)
    if "quota_counters" in captured:
        out["quota_counters"] = counters(lab, principal, "quota")
    if "rate_counter" in captured:
        out["rate_counter"] = counters(lab, principal, "rate")
    if "rating_ids_newest_first" in captured:
        account_id = lab.account(principal).account_id
        own = [rating for rating in lab.store.ratings.rows.values() if rating.account_id == account_id]
        out["rating_ids_newest_first"] = [rating.rating_id for rating in reversed(own)]
    if "ledger_entries" in captured:
        purse = lab.world.purse(lab.user(principal, user).billing_user_id)
        out["ledger_entries"] = purse.ledger_xusd // 1000
    if "note" in captured:
        out["note"] = captured["note"]
    return out


def _moment(ms: str) -> str:
    moment = datetime.fromtimestamp(int(ms) / 1000, tz=timezone.utc)
    return moment.isoformat(timespec="milliseconds")
