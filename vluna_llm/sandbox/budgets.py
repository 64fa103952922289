"""Budgets, as far as the gate's endpoints need them (gate contract, sections 6 and 7)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import fields
from .problems import invalid, missing
from .records import Account, Budget
from .world import World, new_id


def create(world: World, account: Account, name: str, limit_xusd: int, reference: str | None = None) -> Budget:
    """A new, active budget of a customer."""
    budget = Budget(new_id(), account.account_id, name, limit_xusd, world.now(), reference=reference)
    world.store.budgets.put(budget.budget_id, budget)
    return budget


def create_from_request(world: World, account: Account, body: Any) -> dict[str, Any]:
    """POST /budgets: the data of the answer."""
    body = body if isinstance(body, dict) else {}
    name = body.get("name")
    if not isinstance(name, str) or not name.strip():
        raise invalid("name is required")
    limit = fields.quantity(body.get("limit_xusd"), "limit_xusd", positive=False)
    reference = body.get("external_ref")
    return view(create(world, account, name.strip(), limit, reference if isinstance(reference, str) else None))


def view(budget: Budget) -> dict[str, Any]:
    """A budget as the management routes show it."""
    return {
        "budget_id": budget.budget_id,
        "billing_account_id": budget.account_id,
        "name": budget.name,
        "status": budget.status,
        "scope_kind": "global",
        "limit_xusd": str(budget.limit_xusd),
        "consumed_xusd": str(budget.consumed_xusd),
        "window_start": None,
        "window_end": None,
        "metadata": {},
        "created_at": fields.iso(budget.created_at),
        "updated_at": fields.iso(budget.created_at),
        "remaining_xusd": str(budget.remaining_xusd),
    }


def resolve(world: World, account: Account, named: Any) -> Budget:
    """The active budget that a request names: a uuid (dialect A), or the caller's own reference (B). Raises 422."""
    if world.options.dialect == "lease":
        if not isinstance(named, str) or not named.strip():
            raise invalid("budget must be a non-empty string")
        budget = next(
            (
                budget
                for budget in world.store.budgets.rows.values()
                if budget.account_id == account.account_id and named in (budget.reference, budget.budget_id)
            ),
            None,
        )
    else:
        if not isinstance(named, str) or not fields.is_uuid(named):
            raise invalid("budget_id must be a uuid string")
        budget = world.store.budgets.get(named.lower())
    if budget is None or budget.account_id != account.account_id or budget.status != "active":
        raise missing("budget not found or inactive")
    return budget


def spend(
    world: World, budget: Budget, amount_xusd: int
) -> tuple[Budget, str, list[dict[str, Any]], list[dict[str, Any]]]:
    """Book a charge on a budget: in full, whatever is left.

    Returns the budget after it, the reason code for the rating, the hints for an overdraft and those for low
    headroom: at most max(1000, 2 x amount) left.
    """
    after = replace(budget, consumed_xusd=budget.consumed_xusd + amount_xusd)
    world.store.budgets.put(after.budget_id, after)
    over = amount_xusd - max(budget.remaining_xusd, 0)
    short = [{"type": "budget.shortfall", "budget_id": budget.budget_id, "shortfall_xusd": over}] if over > 0 else []
    threshold = max(1000, 2 * amount_xusd)
    headroom = max(after.remaining_xusd, 0)
    low = (
        [{"type": "budget.low_headroom", "headroom_xusd": headroom, "threshold_xusd": threshold}]
        if headroom <= threshold
        else []
    )
    return after, "budget_limit_exceeded" if over > 0 else "budget_consumed", short, low
