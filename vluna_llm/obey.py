"""Carries out what an operator ordered (`vluna_llm.outbox.orders`), in the process that owns the operations."""

from __future__ import annotations

from .failpoints import hit
from .ledger import Ledger
from .outbox import Row
from .outbox.orders import ordered, what_of, why_not
from .outbox.schema import Order
from .reporting import attributes_of, span_of
from .settlement import receipt_of
from .settler import Settler
from .telemetry import Telemetry

_AT_ONCE = 500


def carry_out(ledger: Ledger, settler: Settler, telemetry: Telemetry) -> int:
    """Carry out the orders that wait in this process's journal; gives how many there were.

    An order is forgotten once its row is written. Dying in between, it is carried out again, which does no harm: what
    was sent meanwhile has its own key and bytes, and what is settled is not ordered about.

    Raises:
        LedgerClosed: the journal was given up; the next runtime carries them out.
    """
    orders = ledger.journal.orders()
    for first in range(0, len(orders), _AT_ONCE):
        batch = orders[first : first + _AT_ONCE]
        done = [order.id for order in batch if _carried_out(order, ledger, settler, telemetry)]
        hit("orders.carried_out")
        ledger.journal.forget_orders(*done)
    return len(orders)


def _carried_out(order: Order, ledger: Ledger, settler: Settler, telemetry: Telemetry) -> bool:
    """Whether the order is done with; False where its row is still being taken over from a dead process."""
    what = what_of(order)
    row = ledger.get(order.operation_id)
    if what is None or row is None:
        return True  # of another version, or settled and pruned since
    if row.arrived_from is not None:
        return False
    refusal = why_not(row, what)
    changed = ledger.apply(row.operation_id, lambda now: ordered(now, what))
    assert changed is not None
    telemetry.emit(
        "vluna.settlement.ordered",
        "info" if refusal else "warn",
        {**attributes_of(row), "vluna.order": what},
        span=span_of(row),
        message=f"an operator's order, {what}: {refusal or _what_happens(changed)}",
    )
    if changed.state.settlement in ("pending", "sent"):
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
