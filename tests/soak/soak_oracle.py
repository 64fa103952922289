"""Compares the gate's books with what the provider sent and what the callers saw; knows nothing of our own journal.

Two witnesses outside our code say what ought to be charged: the provider's log of what it sent to the end, and the
callers' log of what they saw to the end. What they have in common with the books are the labels of each booking: the
caller's request id and the provider's response id.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soak_words import MODEL_FEATURE, PRICES, WORK_FEATURE, Kind, Tokens, records

PROMISES = (
    "acknowledged but uncharged",
    "doubled",
    "tokens off",
    "charged and never sent",
    "charged though refused",
    "called though refused",
    "charged though left before the end",
    "left and not estimated",
    "answer changed on its way",
    "lost though acknowledged",
    "lost beyond kills x concurrency",
    "left over",
    "surprises",
)
"""What must never happen, in the words of the summary."""


@dataclass(slots=True)
class Called:
    """One operation as its caller noted it."""

    request_id: str
    principal: str
    kind: Kind
    variant: str = "default"
    group: str | None = None
    quantity: int = 0
    seen: bool = False
    response_id: str | None = None
    usage: Tokens | None = None
    refused: str | None = None
    left: bool = False
    cancelled: bool = False
    failed: bool = False
    surprise: str | None = None

    @property
    def charge(self) -> str:
        """What may be charged once: a step of a job however often it is run, else the operation itself."""
        return self.group or self.request_id


@dataclass(frozen=True, slots=True)
class Sent:
    """One answer that the provider sent to its end; no usage where it reported none."""

    request_id: str
    response_id: str
    usage: Tokens | None


@dataclass(frozen=True, slots=True)
class Booking:
    """One entry of the gate's books."""

    kind: str
    commit_id: str
    principal: str
    feature: str
    quantity: int
    lines: Mapping[str, int]
    status: str
    charged: int
    labels: Mapping[str, str]
    reasons: tuple[str, ...] = ()
    key: str = ""


@dataclass(slots=True)
class Witnesses:
    """Everything that is compared."""

    calls: dict[str, Called] = field(default_factory=dict)
    sends: dict[str, Sent] = field(default_factory=dict)
    arrived: set[str] = field(default_factory=set)
    books: list[Booking] = field(default_factory=list)
    lost: list[Mapping[str, Any]] = field(default_factory=list)
    """Operations that the package itself lists as lost: for their number, and to see that none was acknowledged."""
    kills: int = 0
    concurrency: int = 1
    left_over: Mapping[str, int] = field(default_factory=dict)
    """What the package still keeps after the drain, by state."""


@dataclass(slots=True)
class Verdict:
    """The figures of the summary, and every broken promise with its evidence."""

    operations: int = 0
    acknowledged: int = 0
    refused: int = 0
    left: int = 0
    charged: int = 0
    charged_unacknowledged: int = 0
    unacknowledged: int = 0
    repaired: int = 0
    ingested: int = 0
    estimated: int = 0
    jobs: int = 0
    runs_of_steps: int = 0
    lost: int = 0
    broken: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in PROMISES})

    @property
    def holds(self) -> bool:
        return not any(self.broken.values())

    def accuse(self, promise: str, evidence: str) -> None:
        self.broken[promise].append(evidence)


def judge(seen: Witnesses) -> Verdict:
    """Hold the books against the two logs."""
    verdict = Verdict(operations=len(seen.calls))
    applied = [booking for booking in seen.books if booking.status == "applied"]
    charges: dict[str, list[Booking]] = defaultdict(list)
    for booking in applied:
        request_id = booking.labels.get("request_id", "")
        called = seen.calls.get(request_id)
        if called is None:
            verdict.accuse("charged and never sent", f"nobody called {request_id!r}: {_short(booking)}")
            continue
        charges[called.charge].append(booking)
        _check_booking(verdict, booking, called, seen)
    for charge, bookings in charges.items():
        if len(bookings) > 1:
            verdict.accuse("doubled", f"{charge}: " + "; ".join(_short(booking) for booking in bookings))
    _check_operation_ids(verdict, applied)
    _check_calls(verdict, seen, charges)
    _check_lost(verdict, seen)
    for state, count in seen.left_over.items():
        if count:
            verdict.accuse("left over", f"{count} operation(s) {state}")
    verdict.charged = len(applied)
    verdict.repaired = sum(booking.status == "quarantined" for booking in seen.books)
    verdict.ingested = sum(booking.kind == "ingest" for booking in applied)
    verdict.estimated = sum(booking.labels.get("usage_source") == "estimated" for booking in applied)
    return verdict


def _check_booking(verdict: Verdict, booking: Booking, called: Called, seen: Witnesses) -> None:
    """One charge: is it of something that happened, and for exactly what it used?"""
    what = f"{called.request_id} ({called.kind}, {called.variant}): {_short(booking)}"
    if booking.principal != called.principal:
        verdict.accuse("tokens off", f"another customer pays, {booking.principal} for {called.principal}: {what}")
    if booking.charged != sum(PRICES[meter] * count for meter, count in _priced(booking).items()):
        verdict.accuse("tokens off", f"the amount is not quantity x price: {what}")
    if called.kind == "work":
        if booking.feature != WORK_FEATURE or booking.quantity != called.quantity:
            verdict.accuse("tokens off", f"{called.quantity} were used: {what}")
        return
    if booking.feature != MODEL_FEATURE:
        verdict.accuse("tokens off", f"charged as another feature: {what}")
    source = booking.labels.get("usage_source")
    if called.variant == "estimate" and source == "estimated" and called.kind in ("early", "held"):
        return  # how much was generated before the caller left is the package's own estimate, and labelled so
    sent = seen.sends.get(booking.labels.get("response_id", ""))
    if sent is None or sent.request_id != called.request_id:
        verdict.accuse("charged and never sent", f"no such answer was sent to its end: {what}")
        return
    if sent.usage is None:
        if source != "estimated" or booking.quantity < 1:
            verdict.accuse("tokens off", f"the provider reported no usage, so this is no estimate: {what}")
        return
    exact = {meter: count for meter, count in booking.lines.items() if count}
    if source != "provider" or booking.quantity != sent.usage.total or exact != sent.usage.lines:
        verdict.accuse("tokens off", f"the provider sent {sent.usage}: {what}")


def _priced(booking: Booking) -> Mapping[str, int]:
    return booking.lines or {booking.feature: booking.quantity}


def _check_operation_ids(verdict: Verdict, applied: Iterable[Booking]) -> None:
    """Whatever a request is called: no operation of ours may be charged twice."""
    count = Counter(booking.labels.get("operation_id", "") for booking in applied)
    for operation_id, times in count.items():
        if not operation_id:
            verdict.accuse("charged and never sent", f"{times} charge(s) without an operation id")
        elif times > 1:
            verdict.accuse("doubled", f"operation {operation_id} is charged {times} times")


def _check_calls(verdict: Verdict, seen: Witnesses, charges: Mapping[str, Sequence[Booking]]) -> None:
    acknowledged: set[str] = set()
    groups = {called.group for called in seen.calls.values() if called.group}
    verdict.jobs = len(groups)
    verdict.runs_of_steps = sum(called.group is not None for called in seen.calls.values())
    for called in seen.calls.values():
        bookings = charges.get(called.charge, ())
        name = f"{called.request_id} ({called.kind}, {called.variant}, {called.principal})"
        if called.surprise is not None:
            verdict.accuse("surprises", f"{name}: {called.surprise}")
        if called.seen:
            verdict.acknowledged += 1
            acknowledged.add(called.charge)
            _check_acknowledged(verdict, called, bookings, seen, name)
            continue
        verdict.unacknowledged += 1
        own = [booking for booking in bookings if booking.labels.get("request_id") == called.request_id]
        if called.refused is not None:
            verdict.refused += 1
            if own:
                verdict.accuse("charged though refused", f"{name} was refused ({called.refused}): {_short(own[0])}")
            if called.request_id in seen.arrived and called.variant != "overlap":
                verdict.accuse(
                    "called though refused", f"{name} was refused ({called.refused}); the provider was asked"
                )
        if called.left or called.cancelled:
            verdict.left += 1
            _check_left(verdict, called, own, name)
    verdict.charged_unacknowledged = sum(len(found) for charge, found in charges.items() if charge not in acknowledged)


def _check_acknowledged(
    verdict: Verdict, called: Called, bookings: Sequence[Booking], seen: Witnesses, name: str
) -> None:
    if not bookings:
        verdict.accuse("acknowledged but uncharged", f"{name} saw {called.response_id} to its end")
    if called.kind == "work":
        return
    sent = seen.sends.get(called.response_id or "")
    if sent is None or sent.request_id != called.request_id:
        verdict.accuse("answer changed on its way", f"{name} saw {called.response_id}, which was not sent")
        return
    if called.usage is not None and called.usage != sent.usage:
        verdict.accuse("answer changed on its way", f"{name} saw {called.usage}, sent was {sent.usage}")
    if called.group is None and bookings and bookings[0].labels.get("response_id") != called.response_id:
        verdict.accuse("tokens off", f"{name} saw {called.response_id}, charged is {_short(bookings[0])}")


def _check_left(verdict: Verdict, called: Called, own: Sequence[Booking], name: str) -> None:
    """A stream whose end the provider never sent costs what ``on_abort`` says: nothing, or an estimate."""
    if called.kind != "held":
        return
    if called.variant != "estimate" and own:
        verdict.accuse("charged though left before the end", f"{name}: {_short(own[0])}")
    if called.variant == "estimate" and called.left and not own:
        verdict.accuse("left and not estimated", f"{name} was left while it was running")


def _check_lost(verdict: Verdict, seen: Witnesses) -> None:
    verdict.lost = len(seen.lost)
    most = seen.kills * seen.concurrency
    if verdict.lost > most:
        verdict.accuse("lost beyond kills x concurrency", f"{verdict.lost} are lost, at most {most} may be")
    for row in seen.lost:
        called = seen.calls.get(str(row.get("request_id")))
        if called is not None and called.seen:
            verdict.accuse("lost though acknowledged", f"{called.request_id} is acknowledged and listed as lost: {row}")


def _short(booking: Booking) -> str:
    ids = {name: booking.labels.get(name) for name in ("request_id", "response_id", "operation_id", "usage_source")}
    return (
        f"{booking.kind} {booking.commit_id} of {booking.principal}, quantity {booking.quantity}, "
        f"lines {dict(booking.lines)}, charged {booking.charged} XUSD, {ids}, key {booking.key}"
    )


# -- reading what was left behind ------------------------------------------------------------------------------------


def read_witnesses(folder: Path) -> Witnesses:
    """The logs and books of one run."""
    seen = Witnesses()
    for path in sorted(folder.glob("caller-*.jsonl")):
        for record in records(path):
            _note(seen, record)
    for record in records(folder / "provider.jsonl"):
        if record["e"] == "arrived":
            seen.arrived.add(record["r"])
        else:
            seen.sends[record["id"]] = Sent(record["r"], record["id"], _tokens(record["u"]))
    for line in (folder / "books.jsonl").read_text().splitlines():
        entry = json.loads(line)
        seen.books.append(Booking(**{**entry, "reasons": tuple(entry["reasons"])}))
    return seen


def _note(seen: Witnesses, record: Mapping[str, Any]) -> None:
    event, request_id = record["e"], record.get("r", "")
    if event == "began":
        seen.calls[request_id] = Called(
            request_id, record["p"], record["k"], record["v"], group=record["g"], quantity=record["q"]
        )
        return
    called = seen.calls.get(request_id)
    if called is None:
        return
    if event == "seen":
        called.seen, called.response_id, called.usage = True, record["id"], _tokens(record["u"])
    elif event == "refused":
        called.refused = record["w"]
    elif event == "surprise":
        called.surprise = record["t"]
    else:
        setattr(called, event, True)


def _tokens(counts: Sequence[int] | None) -> Tokens | None:
    return None if counts is None else Tokens(*counts)
