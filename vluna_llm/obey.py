"""Carries out what an operator ordered (`vluna_llm.outbox.orders`), in the process that owns the operations."""

from __future__ import annotations

from collections import Counter

from .errors import OutboxUnavailable
from .failpoints import hit
from .ledger import Ledger
from .outbox import Row
from .outbox.orders import ordered, what_of, why_not
from .outbox.schema import Order
from .reporting import attributes_of, span_of
from .settlement import receipt_of, with_bytes_of_rest
from .settler import Settler
from .telemetry import Telemetry, log

AT_ONCE = 2_000
_TOGETHER = 200


def carry_out(ledger: Ledger, settler: Settler, telemetry: Telemetry, at_most: int = AT_ONCE) -> int:
    """Carry out orders that wait in this process's journal; gives how many, at most about ``at_most``.

    An order is forgotten once its row is written. Dying in between, it is carried out again, which does no harm: what
    was sent meanwhile has its own key and bytes, and what is settled is not ordered about.

    Raises:
        LedgerClosed: the journal was given up; the next runtime carries them out.
    """
    orders = ledger.journal.orders()
    counts: Counter[str] = Counter()
    for first in range(0, len(orders), _TOGETHER):
        batch = orders[first : first + _TOGETHER]
        done = [order for order in batch if _carried_out(order, ledger, settler, telemetry)]
        hit("orders.carried_out")
        ledger.journal.forget_orders(*(order.id for order in done))
        counts.update(order.what for order in done)
        if sum(counts.values()) >= at_most:
            break
    if counts:
        log.warning("An operator's orders: %s.", ", ".join(f"{what} {number}" for what, number in counts.items()))
    return sum(counts.values())


def _carried_out(order: Order, ledger: Ledger, settler: Settler, telemetry: Telemetry) -> bool:
    """Whether the order is done with; False where that cannot be told yet: it is looked at again in a moment."""
    what = what_of(order)
    row = ledger.get(order.operation_id)
    if what is None or row is None:
        return True  # of another version, or settled and pruned since
    if row.arrived_from is not None:
        return False  # still being taken over from a dead process
    if what == "drop" and settler.delivering(row.operation_id):
        return False  # it may be charged at this moment: nobody is told that it was dropped
    if row.stage is None:
        found = ledger.apply(row.operation_id, lambda now: with_bytes_of_rest(ordered(now, what)))
        if found is None:
            return True  # gone meanwhile
        seen, changed = row, found
    else:
        try:
            there = settler.reopen(row.operation_id, lambda now: with_bytes_of_rest(ordered(now, what)))
        except OutboxUnavailable:
            return False  # PostgreSQL is away, or a host delivers the lane at this moment: tried again in a moment
        if there is None:
            return False  # on its way to PostgreSQL
        seen, changed = there
    refusal = why_not(seen, what)
    telemetry.emit(
        "vluna.settlement.ordered",
        "info",
        {**attributes_of(row), "vluna.order": what},
        span=span_of(row),
        message=f"an operator's order, {what}: {refusal or _what_happens(changed)}",
    )
    if changed.state.settlement in ("pending", "sent"):
        if row.stage is None:
            settler.enqueue(changed)
    elif what == "drop" and not refusal:
        telemetry.gauges.delivered("lapsed", changed.state.route)
        ledger.settled(changed, receipt_of(changed, "lapsed", None, changed.last_error))
    return True


def _what_happens(row: Row) -> str:
    if row.state.is_settled:
        return "nothing more is sent for it"
    if row.state.look_first:
        return "the gate's own books are looked at, then it is booked by ingest"
    return f"its {row.state.route} goes out now"
