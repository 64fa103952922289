"""The endpoints of the gate: which handler serves which route, in either dialect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import budgets, commits, ingest, leases, ops, tokens, views, wallet
from .auth import Caller
from .world import World

BASE = "/mgt/v1"

Query = list[tuple[str, str]]


@dataclass(slots=True)
class Outcome:
    """What a handler has to say: data, and the members that go beside it."""

    data: Any
    hints: list[dict[str, Any]] | None = None
    meta: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One authenticated request, as handlers see it."""

    caller: Caller
    key: str
    body: Any
    query: Query
    path: str


Handler = Callable[[World, Call], Outcome]


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """One endpoint. ``runtime`` routes act for a customer and need principal and user."""

    name: str
    handler: Handler
    runtime: bool = True
    status: int = 200
    dry: bool = False


def routes_of(world: World) -> dict[tuple[str, str], RouteSpec]:
    """Every endpoint by method and path; ``ops/ratings/{id}`` stands for any id."""
    get = {
        "/wallet/balance": RouteSpec("balance", lambda w, c: Outcome(wallet.balance(w, *c.caller.pair()))),
        "/gate/limits": RouteSpec("limits", lambda w, c: Outcome(views.limits(w, *c.caller.pair(), c.query))),
        "/gate/meters": RouteSpec("meters", lambda w, c: Outcome(views.meters(w, *c.caller.pair(), c.query))),
        "/ops/ratings": RouteSpec("ratings", lambda w, c: _listed(ops.ratings(w, c.caller, c.query)), False),
        "/ops/ratings/{id}": RouteSpec(
            "ratings", lambda w, c: Outcome(ops.rating_by_id(w, c.caller, c.path, c.query)), False
        ),
        "/ops/rated-records": RouteSpec(
            "rated-records", lambda w, c: _listed(ops.rated_records(w, c.caller, c.query)), False
        ),
        "/ops/allocations": RouteSpec(
            "allocations", lambda w, c: _listed(ops.allocations(w, c.caller, c.query)), False
        ),
    }
    post = {
        "/token/issue": RouteSpec("token", _token, False),
        "/wallet/adjustments": RouteSpec(
            "adjustments", lambda w, c: Outcome(wallet.adjust(w, *c.caller.pair(), c.key, c.body)), status=201
        ),
        "/wallet/consume": RouteSpec(
            "consume", lambda w, c: Outcome(wallet.consume(w, *c.caller.pair(), c.key, c.body)), status=201
        ),
        "/budgets": RouteSpec(
            "budgets", lambda w, c: Outcome(budgets.create_from_request(w, c.caller.pair()[0], c.body)), status=201
        ),
        "/gate/authorize": RouteSpec(
            "authorize", lambda w, c: Outcome(*leases.authorize(w, *c.caller.pair(), c.key, c.body))
        ),
        "/gate/commits": RouteSpec(
            "commits", lambda w, c: Outcome(*commits.commit(w, *c.caller.pair(), c.key, c.body))
        ),
        "/gate/commits/batch": RouteSpec(
            "batch", lambda w, c: Outcome(commits.commit_batch(w, *c.caller.pair(), c.body))
        ),
        "/gate/ingest": RouteSpec("ingest", lambda w, c: Outcome(*ingest.ingest(w, *c.caller.pair(), c.key, c.body))),
    }
    if world.options.dialect == "lease":
        post["/gate/preflight"] = RouteSpec(
            "preflight", lambda w, c: Outcome(*leases.preflight(w, *c.caller.pair(), c.body)), dry=True
        )
    else:
        post["/gate/cancel"] = RouteSpec("cancel", lambda w, c: Outcome(leases.cancel(w, *c.caller.pair(), c.body)))
    health = RouteSpec("health", lambda w, c: Outcome({"service": "vluna", "status": "healthy"}), False)
    return {
        ("GET", "/health"): health,
        **{("GET", BASE + path): spec for path, spec in get.items()},
        **{("POST", BASE + path): spec for path, spec in post.items()},
    }


def _listed(page: ops.Page) -> Outcome:
    return Outcome(page[0], meta=page[1])


def _token(world: World, call: Call) -> Outcome:
    body = call.body if isinstance(call.body, dict) else {}
    return Outcome(tokens.issue_token(world, call.caller.realm_id, call.caller.key_id, body))
