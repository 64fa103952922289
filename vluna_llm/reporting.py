"""How an operation is named in telemetry, and what is told when it is settled."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from .outbox import Row
from .telemetry import SpanRef, Telemetry
from .types import Receipt


def span_of(row: Row) -> SpanRef | None:
    """The span in which the model call ran."""
    return SpanRef(row.trace_id, row.span_id, row.trace_flags or 0) if row.trace_id and row.span_id else None


def attributes_of(row: Row) -> Mapping[str, Any]:
    """The telemetry attributes that identify an operation."""
    return {
        "vluna.operation.id": row.operation_id,
        "vluna.principal.id": row.principal_id,
        "vluna.feature.code": row.feature_code,
        "vluna.lease.id": row.lease_id,
        "vluna.request.id": row.request_id,
        "gen_ai.request.model": row.model,
        "gen_ai.response.id": row.response_id,
    }


def tell_end(telemetry: Telemetry, row: Row, receipt: Receipt) -> None:
    """Tell how a settlement ended: quietly where it was charged, loudly where it was not and should have been."""
    delay = time.time() - row.ended_at if receipt.charged and row.ended_at is not None else None
    telemetry.gauges.delivered(receipt.state, row.state.route, delay)
    attributes = {
        **attributes_of(row),
        "vluna.commit.id": receipt.commit_id,
        "vluna.amount_xusd": receipt.amount_xusd,
        "vluna.usage.source": receipt.usage_source,
        "gen_ai.usage.input_tokens": receipt.input_tokens,
        "gen_ai.usage.output_tokens": receipt.output_tokens,
    }
    if receipt.charged:
        telemetry.emit(
            "vluna.settlement.booked",
            "warn" if receipt.detail else "debug",
            attributes,
            span=span_of(row),
            message=receipt.detail,
        )
    elif receipt.state in ("quarantined", "refused"):
        telemetry.emit(
            f"vluna.settlement.{receipt.state}",
            "error",
            attributes,
            span=span_of(row),
            message=f"NOT CHARGED{' IN FULL' if receipt.charged_xusd else ''}: {receipt.detail}",
        )


def tell_rest(telemetry: Telemetry, row: Row, tokens: int, detail: str | None) -> None:
    """Tell that an ingest booked lines as 0, which go out again by themselves once their meters have a price."""
    telemetry.emit(
        "vluna.settlement.unpriced",
        "error",
        {
            **attributes_of(row),
            "vluna.unbilled.tokens": tokens,
            "vluna.charged_xusd": sum(part.charged_xusd for part in row.state.parts),
        },
        span=span_of(row),
        message=f"NOT CHARGED{' IN FULL' if row.state.parts else ''}: {detail}. Add the price at the gate; they alone "
        "are sent again by themselves",
    )


def receipt_json(receipt: Receipt) -> str:
    """What the journal keeps of a receipt."""
    kept: dict[str, Any] = {
        "state": receipt.state,
        "amount_xusd": receipt.amount_xusd,
        "charged_xusd": receipt.charged_xusd,
        "commit_id": receipt.commit_id,
        "hints": [hint.as_dict() for hint in receipt.hints],
        "detail": receipt.detail,
    }
    return json.dumps({name: value for name, value in kept.items() if value not in (None, [])}, default=str)
