"""Quotas and rate limits: which policies apply, their windows and counters (gate contract, sections 6 and 7.4)."""

from __future__ import annotations

from typing import Any

from .fields import MAX_SAFE, iso
from .problems import Refusal, missing
from .records import Account, Policy, User, Window
from .world import World


def policies_of(world: World, account: Account) -> tuple[Policy, ...]:
    """The policies of an account: what was added for it, then its plan's own, else the realm's."""
    if account.policies is not None:
        return account.extra_policies + account.policies
    realm = world.store.realms.get(account.realm_id)
    return account.extra_policies + (() if realm is None else realm.policies)


def policies_for(world: World, account: Account, feature: str) -> list[Policy]:
    """What applies to one feature, feature-specific policies before the wildcard."""
    every = policies_of(world, account)
    return [p for p in every if p.feature == feature] + [p for p in every if p.feature is None]


def window_of(policy: Policy, at_ms: int) -> Window:
    """The window around a moment, aligned to the epoch."""
    length = policy.window_seconds * 1000
    start = at_ms // length * length
    return Window(policy.scope, start, start + length, policy.limit)


def used(world: World, account: Account, user: User, kind: str, feature: str, window: Window) -> int:
    """What a window has counted."""
    return world.store.counters.get(*_key(account, user, kind, feature, window)) or 0


def room(world: World, account: Account, user: User, feature: str, windows: tuple[Window, ...]) -> int | None:
    """The units left in the tightest limited window; None without a limit."""
    rooms = [
        max(window.limit - used(world, account, user, "quota", feature, window), 0)
        for window in windows
        if window.limit >= 0
    ]
    return min(rooms) if rooms else None


def admit(
    world: World, account: Account, user: User, feature: str
) -> tuple[tuple[Window, ...], int, dict[str, Any] | None]:
    """Steps 7 to 9 of authorize: the quota windows, the room left, and a hint when a rate limit is near.

    Counts the authorization against every rate limit. Raises 402, 422, 429 or 500 in the words of the real server.
    """
    found = policies_for(world, account, feature)
    if not found:
        raise missing("no active policy for feature")
    now = world.now()
    windows = tuple(dict.fromkeys(window_of(policy, now) for policy in found if policy.kind == "quota"))
    if not windows:
        raise Refusal(500, "SERVER.CONFIG", "no quota policy window configured for feature")
    left = room(world, account, user, feature, windows)
    if left == 0:
        raise Refusal(402, "SERVER.CONFIG", "quota limit exhausted")
    hint: dict[str, Any] | None = None
    rates = (window_of(policy, now) for policy in found if policy.kind == "rate" and policy.limit >= 0)
    for window in sorted(dict.fromkeys(rates), key=lambda window: window.limit):
        count = used(world, account, user, "rate", feature, window) + 1
        if count > window.limit:
            raise Refusal(429, "LIMIT.RATE_EXCEEDED", "rate limit exceeded", hints=[_rate_hint(window, 0, now)])
        world.store.counters.put(*_key(account, user, "rate", feature, window), count)
        if hint is None and count + 3 >= window.limit:
            hint = _rate_hint(window, window.limit - count, now)
    return windows, MAX_SAFE if left is None else left, hint


def consume(
    world: World, account: Account, user: User, feature: str, windows: tuple[Window, ...], quantity: int
) -> None:
    """Count a commit on the windows of its lease, clipped at each limit."""
    for window in windows:
        count = used(world, account, user, "quota", feature, window)
        step = quantity if window.limit < 0 else min(quantity, max(window.limit - count, 0))
        if step:
            world.store.counters.put(*_key(account, user, "quota", feature, window), count + step)


def view(world: World, account: Account, user: User, feature: str, kind: str, at_ms: int) -> list[dict[str, str]]:
    """The windows of one feature as gate/limits shows them."""
    out = []
    for policy in policies_for(world, account, feature):
        if policy.kind == kind:
            window = window_of(policy, at_ms)
            out.append(
                {
                    "subject_scope": window.scope,
                    "window_start": iso(window.start),
                    "window_end": iso(window.end),
                    "limit_minor": str(window.limit),
                    "used_minor": str(used(world, account, user, kind, feature, window)),
                }
            )
    return out


def unit_of(world: World, account: Account, feature: str) -> str:
    """The unit that views show: that of the first policy."""
    found = policies_for(world, account, feature)
    return found[0].unit if found else "unit"


def _key(account: Account, user: User, kind: str, feature: str, window: Window) -> tuple[str, ...]:
    subject = account.account_id if window.scope == "account" else user.billing_user_id
    return (subject, kind, feature, window.scope, str(window.start), str(window.end), str(window.limit))


def _rate_hint(window: Window, remaining: int, now: int) -> dict[str, Any]:
    seconds = -((now - window.end) // 1000)
    return {"type": "rate.limit", "seconds": seconds, "remaining": remaining, "until": iso(window.end)}
