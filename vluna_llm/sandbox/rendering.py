"""The answers of commit and ingest in both dialects (gate contract 7.5 and 14)."""

from __future__ import annotations

import hashlib
from typing import Any

from .fields import iso
from .records import Budget, Line, Rating, Side
from .world import World


def receipt(world: World, rating: Rating, budget: Budget | None = None) -> dict[str, Any]:
    """The ``data`` of a commit or ingest answer."""
    data: dict[str, Any] = {"commit_id": rating.rating_id}
    if rating.budget_id is not None:
        data["budget_id"] = rating.budget_id
    if world.options.dialect == "lease":
        if budget is not None:
            data["budget_consumed_delta_xusd"] = str(rating.charged_xusd)
            data["budget_remaining_xusd"] = str(budget.remaining_xusd)
        # Dialect B declares the amount as the amount debited, so a quarantined commit shows 0 there.
        data["amount_xusd"] = str(rating.amount_xusd if rating.applied else 0)
        data["cost_xusd"] = str(rating.cost_xusd)
        data["lines"] = [_line_b(rating.feature, line) for line in rating.lines]
        return data
    data["amount_xusd"] = str(rating.amount_xusd)
    data["cost_xusd"] = str(rating.cost_xusd)
    data["lines"] = [line_a(rating.feature, line, with_id=True) for line in rating.lines]
    return data


def line_a(feature: str, line: Line, *, with_id: bool) -> dict[str, Any]:
    """One line as dialect A shows it, in answers (with its id) and in ops/rated-records (without)."""
    out: dict[str, Any] = {"line_id": line.line_id} if with_id else {}
    out |= {
        "meter_code": line.meter,
        "quantity_minor": str(line.quantity),
        "unit_price_xusd": str(line.price.unit_xusd),
        "amount_xusd": str(line.price.amount_xusd),
        "pricing_snapshot": snapshot_a(feature, line, line.price),
        "pricing_fingerprint": line.price.fingerprint,
        "cost_xusd": str(line.cost.amount_xusd),
        "unit_cost_xusd": str(line.cost.unit_xusd),
        "cost_unit_quantity_minor": str(line.cost.unit_quantity),
        "cost_rounding": line.cost.rounding,
        "cost_snapshot": snapshot_a(feature, line, line.cost),
        "cost_fingerprint": line.cost.fingerprint,
    }
    return out


def snapshot_a(feature: str, line: Line, side: Side) -> dict[str, Any]:
    """What a line was priced by."""
    return {
        "computed_at": iso(line.computed_at),
        "unit": line.unit,
        "fingerprint": side.fingerprint,
        "unit_price_xusd": str(side.unit_xusd),
        "unit_quantity_minor": str(side.unit_quantity),
        "rounding": side.rounding,
        "effective_at": iso(side.effective_at),
        "provenance": {
            "source": "live" if line.priced else "missing",
            "inputs": {"feature_code": feature, "meter_code": line.meter},
        },
    }


def _line_b(feature: str, line: Line) -> dict[str, Any]:
    head = {"line_id": line.line_id, "meter_code": line.meter, "quantity_minor": str(line.quantity)}
    if not line.priced:
        return {
            "rating_status": "missing_price",
            **head,
            "amount_xusd": "0",
            "pricing_snapshot": _missing_b(feature, line, line.price, "revenue"),
            "pricing_fingerprint": line.price.fingerprint,
            "cost_xusd": "0",
            "cost_snapshot": _missing_b(feature, line, line.cost, "cost"),
            "cost_fingerprint": line.cost.fingerprint,
        }
    return {
        "rating_status": "priced",
        **head,
        "unit_price_xusd": str(line.price.unit_xusd),
        "unit_quantity_minor": str(line.price.unit_quantity),
        "rate_identity": _rate_identity(line.price, "revenue"),
        "amount_xusd": str(line.price.amount_xusd),
        "pricing_snapshot": _snapshot_b(feature, line, line.price, "revenue"),
        "pricing_fingerprint": line.price.fingerprint,
        "cost_xusd": str(line.cost.amount_xusd),
        "unit_cost_xusd": str(line.cost.unit_xusd),
        "cost_unit_quantity_minor": str(line.cost.unit_quantity),
        "cost_rate_identity": _rate_identity(line.cost, "cost"),
        "cost_snapshot": _snapshot_b(feature, line, line.cost, "cost"),
        "cost_fingerprint": line.cost.fingerprint,
    }


def _snapshot_b(feature: str, line: Line, side: Side, kind: str) -> dict[str, Any]:
    return {
        "schema": "gate/rational-pricing-snapshot:v1",
        "algorithm": "integer_rational_floor_v1",
        "pricing_kind": kind,
        "computed_at": iso(line.computed_at),
        "unit": line.unit,
        "fingerprint": side.fingerprint,
        "rate_identity": _rate_identity(side, kind),
        "unit_price_xusd": str(side.unit_xusd),
        "unit_quantity_minor": str(side.unit_quantity),
        "quantity_minor": str(line.quantity),
        "previous_remainder_numer": str(side.carry_before),
        "amount_xusd": str(side.amount_xusd),
        "next_remainder_numer": str(side.carry_after),
        "effective_at": iso(side.effective_at),
        "provenance": {"source": "live", "inputs": {"feature_code": feature, "meter_code": line.meter}},
    }


def _missing_b(feature: str, line: Line, side: Side, kind: str) -> dict[str, Any]:
    return {
        "schema": "gate/missing-pricing-snapshot:v1",
        "algorithm": "not_rated_missing_price_v1",
        "pricing_kind": kind,
        "computed_at": iso(line.computed_at),
        "unit": line.unit,
        "fingerprint": side.fingerprint,
        "feature_code": feature,
        "meter_code": line.meter,
        "quantity_minor": str(line.quantity),
        "provenance": {"source": "missing"},
    }


def _rate_identity(side: Side, kind: str) -> str:
    return hashlib.sha256(f"{kind}:{side.revision}:{side.unit_xusd}:{side.unit_quantity}".encode()).hexdigest()
