"""Named moments at which a process may die: between two durable writes, and between a write and what the gate sees.

Random kills miss windows of microseconds, so tests arm a handler that dies at one of these moments, each in turn. There
is no setting for it: nothing outside a test arms anything, and a moment that nobody waits for costs one comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

NAMES: Mapping[str, str] = {
    "admission.stored": "the row is in the journal; authorize was not sent",
    "admission.answered": "the gate answered authorize; nothing of its answer is in the journal",
    "admission.ungated": "the row says that the call runs without a lease; the provider was not called",
    "admission.denied": "the row says that the gate refused; the caller was not told",
    "operation.ended": "the row holds the usage, or that there is none; the settler was not told",
    "operation.parked": "the row waits for a background response",
    "delivery.leased": "the row of a job holds the lease that was asked for late; nothing is composed",
    "delivery.composed": "the settlement's bytes are known; they are not stored",
    "delivery.stored": "the settlement's bytes are stored; they were not sent",
    "delivery.answered": "the gate answered the settlement; nothing of its answer is in the journal",
    "delivery.kept": "the row holds the time of its next attempt",
    "delivery.repaired": "the row says that an ingest follows; it is not composed",
    "delivery.rest": "the row holds what an ingest booked as 0 and the bytes in which it goes out; nobody was told",
    "delivery.finished": "the row holds the receipt; nobody was told",
    "adoption.announced": "a dead process's journal says where its rows are moving to; none has moved",
    "adoption.copied": "rows are in both journals; the copies are nobody's yet",
    "adoption.deleted": "rows are only where they moved to, where they still count as copies",
    "adoption.cleared": "rows are only where they moved to, and may be delivered from there",
    "adoption.resolved": "what an adopter that died in the middle left behind is settled; nothing else has moved",
    "adoption.emptied": "a dead process's journal has no row left, and is still there",
    "adoption.removed": "a dead process's journal is gone; its lock's file is still there",
    "orders.carried_out": "rows are as an operator ordered; the orders are still there",
    "sharing.marked": "the rows say that they are being copied to the shared outbox; PostgreSQL does not have them",
    "sharing.offered": "PostgreSQL has the rows; they still say that they are being copied",
    "sharing.shared": "the rows say that PostgreSQL has them; nobody has claimed them",
    "sharing.settled": "the row holds the receipt of a delivery under a claim; nobody was told",
}
"""Each moment, and what is on disk then."""

_handler: Callable[[str], None] | None = None


class Crash(BaseException):
    """Stands for the death of the process in tests that simulate many processes in one. Nothing may catch it."""


def hit(name: str) -> None:
    """This moment is now."""
    if _handler is not None:
        _handler(name)


def arm(handler: Callable[[str], None] | None) -> None:
    """Call ``handler`` with the name of each moment; None disarms. For tests only."""
    global _handler
    _handler = handler
