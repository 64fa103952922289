"""Balance, adjustments and consumption of credit (gate contract 7.3)."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from .fields import amounts, iso
from .problems import Refusal, conflict, invalid
from .records import Account, Booking, Grant, Purse, User
from .world import World

_INTEGER = re.compile(r"[+-]?\d+\Z")


def balance(world: World, account: Account, user: User) -> dict[str, Any]:
    """The data of wallet/balance. In dialect A the ``balances`` count a top-up twice, as the real server does."""
    purse = world.purse(user.billing_user_id)
    debt = -sum(min(grant.remaining_xusd, 0) for grant in purse.grants if grant.kind == "fallback")
    who = {"billing_account_id": account.account_id, "billing_user_id": user.billing_user_id}
    conversion = {"as_of": iso(world.now()), "usd_per_xusd": "0.000001"}
    grants = [
        _grant_view(world, grant)
        for grant in sorted(
            purse.grants, key=lambda grant: (grant.window_end is None, grant.window_end or 0, -grant.priority)
        )
    ]
    if world.options.dialect == "lease":
        return {
            **who,
            "as_of": iso(world.now()),
            "available_balance": amounts(purse.spendable_xusd),
            "outstanding_balance": amounts(debt),
            "conversion": conversion,
            "grants": grants,
        }
    shown = purse.ledger_xusd + purse.spendable_xusd
    return {
        **who,
        "balances": amounts(shown),
        "outstanding_balances": amounts(shown - debt),
        "conversion": conversion,
        "grants": grants,
    }


def adjust(world: World, account: Account, user: User, key: str, body: Any) -> dict[str, Any]:
    """Top up (or, with a negative delta or kind debit, take away), once per key. Answers the ledger balance."""
    body = body if isinstance(body, dict) else {}
    delta = _integer(body.get("delta"), "delta")
    if body.get("kind") == "debit":
        delta = -abs(delta)
    scope = (account.realm_id, user.billing_user_id, "adjust", key)
    known = _known(world, scope, str(delta))
    if known is not None:
        return known
    data = _ledger(account, user, world.top_up(user, delta))
    world.store.bookings.put(*scope, Booking(str(delta), "", data))
    return data


def consume(world: World, account: Account, user: User, key: str, body: Any) -> dict[str, Any]:
    """Take credit without a rating, once per key. Raises 402 where the ledger does not hold it."""
    body = body if isinstance(body, dict) else {}
    amount = _integer(body.get("amount"), "amount")
    if amount <= 0:
        raise invalid("amount must be greater than 0")
    scope = (account.realm_id, user.billing_user_id, "consume", key)
    known = _known(world, scope, str(amount))
    if known is not None:
        return {**known, "replay": True}
    purse = world.purse(user.billing_user_id)
    if amount > purse.ledger_xusd:
        raise Refusal(402, "SERVER.CONFIG", "insufficient balance")
    rest = amount
    grants = []
    for grant in purse.grants:
        part = min(rest, max(grant.remaining_xusd, 0)) if grant.kind == "cash" else 0
        rest -= part
        grants.append(replace(grant, posted_xusd=grant.posted_xusd + part) if part else grant)
    purse = Purse(purse.ledger_xusd - amount, tuple(grants))
    world.store.purses.put(user.billing_user_id, purse)
    data = {**_ledger(account, user, purse), "replay": False}
    world.store.bookings.put(*scope, Booking(str(amount), "", data))
    return data


def _known(world: World, scope: tuple[str, ...], fingerprint: str) -> dict[str, Any] | None:
    """What this key already did. Raises 409 where it did something else."""
    booking = world.store.bookings.get(*scope)
    if booking is not None and booking.fingerprint != fingerprint:
        raise conflict()
    return None if booking is None else booking.data


def _ledger(account: Account, user: User, purse: Purse) -> dict[str, Any]:
    return {
        "billing_account_id": account.account_id,
        "billing_user_id": user.billing_user_id,
        "unit": "xusd",
        "balance": str(purse.ledger_xusd),
    }


def _grant_view(world: World, grant: Grant) -> dict[str, Any]:
    out: dict[str, Any] = {
        "grant_id": grant.grant_id,
        "grant_program_code": grant.program,
        "name": grant.name,
        "origin": grant.kind,
        "on_ledger": False,
        "priority": grant.priority,
        "status": "active",
    }
    metadata: dict[str, Any] = {"system": "wallet-cash" if grant.kind == "cash" else grant.kind}
    if grant.window_start is not None and grant.window_end is not None:
        start, end = iso(grant.window_start), iso(grant.window_end)
        out |= {"window_start": start, "window_end": end}
        metadata |= {"period_end": end, "period_start": start}
    out |= {
        "issued": amounts(grant.amount_xusd),
        "remaining": amounts(grant.remaining_xusd),
    }
    if world.options.dialect == "lease":
        out |= {
            "available": amounts(max(grant.remaining_xusd, 0)),
            "consumed": amounts(grant.posted_xusd),
            "reserved": amounts(grant.pending_xusd),
            "outstanding_application_policy": "never",
        }
    out |= {"consumed_xusd": str(grant.posted_xusd), "metadata": metadata}
    return out


def _integer(value: Any, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _INTEGER.match(value.strip()):
        return int(value)
    raise invalid(f"{name} must be an integer string")
