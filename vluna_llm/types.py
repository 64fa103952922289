"""Values that the gate hands out: hints, leases and receipts.

Nothing here does I/O. Money is in XUSD (1 XUSD = 0.000001 USD), always an integer in Python and an integer string
on the wire; quantities are tokens unless a feature says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Dialect = Literal["lease_token", "lease"]
"""Which lease member the gate speaks: ``lease_token`` (it can cancel) or ``lease`` (it cannot; leases lapse)."""

HINTS_NOT_CHARGED: frozenset[str] = frozenset(
    {"lease.closed_at_commit", "feature.meter_not_allowed", "pricing.not_configured", "policy.window_not_found"}
)
"""Hint types that mean, on the answer of a commit, that nothing was charged (gate contract, section 9.2)."""


@dataclass(frozen=True, slots=True)
class Hint:
    """One machine-readable signal of the gate; ``fields`` holds every member of the hint but its type.

    Unknown types and unknown fields are kept as they came.
    """

    type: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: object) -> Hint | None:
        """Read one hint from decoded JSON; None where it is not an object with a type."""
        if not isinstance(value, Mapping):
            return None
        kind = value.get("type")
        if not isinstance(kind, str) or not kind:
            return None
        return cls(kind, {str(k): v for k, v in value.items() if k != "type"})

    @classmethod
    def parse_all(cls, value: object) -> tuple[Hint, ...]:
        """Read the ``hints`` member of an envelope; anything that is not a list of hints gives none."""
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            return ()
        return tuple(hint for hint in map(cls.parse, value) if hint is not None)

    @property
    def means_not_charged(self) -> bool:
        """Whether a commit that carries this hint was quarantined: shown with its amount, charged nothing.

        Rule: gate contract 9.2. ``lease.expired`` only counts when the grace was exceeded.
        """
        if self.type == "lease.expired":
            return self.fields.get("exceeded_grace") is True
        return self.type in HINTS_NOT_CHARGED

    def as_dict(self) -> dict[str, Any]:
        """The hint as the gate sent it."""
        return {"type": self.type, **self.fields}


@dataclass(frozen=True, slots=True)
class Lease:
    """What authorize returned: the right to one commit of one feature.

    ``token`` is what commit and cancel send back, in the dialect in which it came. ``window_start`` and
    ``window_end`` are the quota window, not the life of the lease, which the gate does not tell.
    """

    token: str = field(repr=False)
    feature_code: str
    dialect: Dialect = "lease_token"
    lease_id: str | None = None
    feature_family_code: str | None = None
    budget_id: str | None = None
    window_start: datetime | None = None
    window_end: datetime | None = None
    hints: tuple[Hint, ...] = ()


UsageSource = Literal["provider", "estimated", "caller"]
"""Who counted: the provider, our own estimate, or the caller through ``op.record``."""

ReceiptState = Literal["booked", "quarantined", "rebooked", "cancelled", "refused", "lapsed", "lost", "held"]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the gate said about one settled operation, and whether it charged.

    ``amount_xusd`` is the amount shown; ``charged_xusd`` what was really charged: the same when ``state`` is
    ``booked`` or ``rebooked``, and None where it is not known. Otherwise it is 0, or what was charged of a settlement
    whose other lines had no price (``detail`` names the bookings). ``meters`` is what was recorded on meters that the
    caller named, ``quantity`` the total that counts against quotas.
    """

    operation_id: str
    state: ReceiptState
    feature_code: str
    principal_id: str
    amount_xusd: int | None = None
    charged_xusd: int | None = None
    commit_id: str | None = None
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    quantity: int = 0
    meters: Mapping[str, int] = field(default_factory=dict, hash=False)
    usage_source: UsageSource | None = None
    model: str | None = None
    response_id: str | None = None
    hints: tuple[Hint, ...] = ()
    detail: str | None = None

    @property
    def charged(self) -> bool:
        """Whether the gate charged this operation."""
        return self.state in ("booked", "rebooked")
