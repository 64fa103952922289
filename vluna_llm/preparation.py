"""What an operation is before it is admitted: its row, and the keys by which the gate will know it. Asks nobody.

Keys of a job (design rule 17)
------------------------------
Every run of a job, on whatever host, arrives at the same keys for the same piece of work: they are made of realm,
principal, user, the job's own key, the feature, the request, and how often that request was made in this run before.
So all runs share one lease, and a lease carries one charge: that is what makes a job's work be charged once. A commit
that comes second meets 409 or a closed lease, and the gate's own books tell which it was (`vluna_llm.books`).

The number of the attempt is *not* part of the keys. A host can count only its own attempts, and a gate does not tell a
run that its key was used before: a replayed authorize returns the old lease without a hint (gate contract 5). Suppose
that host A's first attempt is cancelled, that host B runs the job as *its* first attempt, finds that lease cancelled
and books by ingest, and that the queue then hands the job to A again, or to a new host: as attempt two on A it would
get a lease of its own, which nothing connects with B's booking, and be charged a second time. Under shared keys A
meets B's booking instead: one ingest key, one charge.

Its price: an ingest moves no quota counter (gate contract 9.4), so the work of a job whose first run was cancelled
does not count against quotas. It is charged in money all the same.

For the same reason a run without a lease asks for the job's lease before it is settled, and waits for it where the gate
denies it (`vluna_llm.delivery`): a booking by ingest beside a lease would not be seen by the run that gets the lease.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from types import MappingProxyType

from .admission import Prepared
from .context import CallContext
from .identity import MAX_LABELS, plain_text
from .lifecycle import ModelCall
from .outbox import Row
from .settings import Settings
from .telemetry import SpanRef
from .usage.estimate import Estimate

MOST = 2**53 - 1
"""The largest number that the gate can count with (gate contract 9.1)."""


def prepare(
    settings: Settings,
    context: CallContext,
    feature_code: str,
    family: str | None,
    estimate: Estimate | None,
    *,
    quantity: int = 0,
    model: str | None = None,
    fingerprint: str = "",
    background: str | None = None,
) -> Prepared:
    """The row of a call that is about to be admitted, under keys that are unique for its piece of work.

    Args:
        settings: which gate and realm it belongs to.
        context: who pays; with a principal.
        feature_code: what is sold.
        family: its family.
        estimate: tokens; None for work that is priced as a whole.
        quantity: the estimate of such work, in the feature's unit.
        model: the model that is asked for.
        fingerprint: tells one request of a job from another (design rule 17).
        background: the response id of work in the background, which makes its keys the same on every host (rule 4).
    """
    assert context.principal_id is not None
    base_url, realm_id = settings.base_url or "", settings.realm_id or ""
    principal, user = context.principal_id, context.user_id or context.principal_id
    operation_id = str(uuid.uuid4())
    base = f"vluna-llm:{operation_id}"
    if background is not None:
        digest = _digest(realm_id, background)
        operation_id = base = f"vluna-llm:background:{digest}"
    elif context.idempotency_key is not None:
        work = (realm_id, principal, user, context.idempotency_key, feature_code, fingerprint)
        nth = context.job.occurrence(_digest(*work)) if context.job is not None else 0
        base = "vluna-llm:job:" + _digest(*work, str(nth))
    span = SpanRef.current()
    input_tokens, output_tokens = (estimate.input_tokens, estimate.output_tokens) if estimate else (quantity, 0)
    labels = dict(context.labels)
    if context.end_user:
        labels["end_user"] = context.end_user
    if context.parent_operation_id:
        labels["parent_operation_id"] = context.parent_operation_id
    for name, text in context.told.items():
        if len(labels) < MAX_LABELS:
            labels.setdefault(name, text)
    row = Row(
        operation_id=operation_id,
        base_url=base_url,
        realm_id=realm_id,
        pid=os.getpid(),
        principal_id=principal,
        user_id=user,
        feature_code=feature_code,
        created_at=time.time(),
        authorize_key=f"{base}:auth" if background is None else "",
        settle_key=base,
        feature_family_code=family,
        budget_id=context.budget_id,
        labels=labels or None,
        model=plain_text(model),
        estimated_input=min(input_tokens, MOST),
        estimated_output=min(output_tokens, MOST),
        request_id=context.request_id,
        trace_id=span.trace_id if span else None,
        span_id=span.span_id if span else None,
        trace_flags=span.flags if span else None,
        derived=context.idempotency_key is not None or background is not None,
        unsplit=estimate is None,
    )
    return Prepared(row, context, estimate)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x00".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:40]


def context_of(row: Row) -> CallContext:
    """The context in which an operation was started, as far as its row keeps it."""
    return CallContext(
        principal_id=row.principal_id,
        user_id=row.user_id,
        feature_code=row.feature_code,
        feature_family_code=row.feature_family_code,
        budget_id=row.budget_id,
        labels=MappingProxyType(dict(row.labels or {})),
        request_id=row.request_id,
    )


def fingerprint_of(call: ModelCall) -> str:
    """A digest of a request: the same request has the same one in every process."""
    try:
        body = json.dumps(call.body, sort_keys=True, default=_by_type)
    except TypeError:  # names of several types have no order
        body = json.dumps(call.body, skipkeys=True, default=_by_type)
    return _digest(call.kind, call.model, body)


def _by_type(value: object) -> str:
    return type(value).__name__
