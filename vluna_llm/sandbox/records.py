"""What the gate remembers: frozen records, one class per table.

A change puts a new record in the place of the old one, so that a transaction is undone by putting the old ones back.
Times are milliseconds since the epoch, money is XUSD.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .money import ResidualMode, Rounding

BillingMode = Literal["prepaid", "postpaid", "hybrid"]
Scope = Literal["user", "account"]
LeaseState = Literal["active", "closed", "canceled"]


@dataclass(frozen=True, slots=True)
class Policy:
    """A quota (units per window) or a rate (authorizations per window); ``feature`` None is the wildcard."""

    kind: Literal["quota", "rate"]
    limit: int
    window_seconds: int = 86_400
    feature: str | None = None
    scope: Scope = "user"
    unit: str = "unit"


UNLIMITED = Policy("quota", -1)


@dataclass(frozen=True, slots=True)
class Realm:
    """A tenant. ``policies`` apply to every account that has none of its own."""

    realm_id: str
    status: Literal["active", "suspended", "deleted"] = "active"
    policies: tuple[Policy, ...] = (UNLIMITED,)


@dataclass(frozen=True, slots=True)
class ServiceKey:
    """A signing key; ``allowed_accounts`` empty means every account of the realm."""

    key_id: str
    secret: str = field(repr=False)
    realm_id: str = ""
    status: Literal["active", "disabled"] = "active"
    expires_at: int | None = None
    allowed_accounts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Feature:
    """What can be authorized. Its primary meter has the code of the feature."""

    code: str
    family: str
    meters: tuple[str, ...]
    active: bool = True
    entitlement: bool = False


@dataclass(frozen=True, slots=True)
class Meter:
    """What is counted. Outcome meters cannot be billed through the gate."""

    code: str
    kind: Literal["activity", "outcome"] = "activity"
    residual: ResidualMode = "none"


@dataclass(frozen=True, slots=True)
class Price:
    """Price and provider cost of a meter, each per so many units. ``revision`` is new whenever it is saved."""

    meter: str
    unit_price_xusd: int
    unit_quantity: int
    rounding: Rounding
    unit_cost_xusd: int
    cost_unit_quantity: int
    cost_rounding: Rounding
    effective_at: int
    revision: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class ContractTerm:
    """A price of one account's own; None as price is a term that cannot be read."""

    meter: str
    unit_price_xusd: int | None


@dataclass(frozen=True, slots=True)
class Account:
    """A customer (principal) of a realm.

    ``policies`` of its own (a plan's) replace the realm's; ``extra_policies`` come on top of either.
    """

    realm_id: str
    principal_id: str
    account_id: str
    created_at: int
    billing_mode: BillingMode = "prepaid"
    granted: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()
    policies: tuple[Policy, ...] | None = None
    extra_policies: tuple[Policy, ...] = ()
    contract_id: str | None = None
    terms: tuple[ContractTerm, ...] = ()


@dataclass(frozen=True, slots=True)
class User:
    """A user within a customer: the pair owns credit, user quotas and rates."""

    account_id: str
    user_id: str
    billing_user_id: str
    created_at: int
    active: bool = True


@dataclass(frozen=True, slots=True)
class Grant:
    """Credit. The ``fallback`` kind is the debt of a calendar month: issued 0, drawn without limit."""

    grant_id: str
    kind: Literal["cash", "fallback", "promo"]
    program: str
    name: str
    amount_xusd: int
    posted_xusd: int = 0
    pending_xusd: int = 0
    priority: int = 0
    window_start: int | None = None
    window_end: int | None = None

    @property
    def remaining_xusd(self) -> int:
        """What is left; negative for debt."""
        return self.amount_xusd - self.posted_xusd - self.pending_xusd


@dataclass(frozen=True, slots=True)
class Purse:
    """All money of one billing user: the ledger of top-ups beside the grants that are spent."""

    ledger_xusd: int = 0
    grants: tuple[Grant, ...] = ()

    @property
    def spendable_xusd(self) -> int:
        """What authorize looks at: the positive rests of all grants but the fallback."""
        return sum(max(grant.remaining_xusd, 0) for grant in self.grants if grant.kind != "fallback")


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit that leases may be bound to; ``reference`` is the caller's own name of it (dialect B)."""

    budget_id: str
    account_id: str
    name: str
    limit_xusd: int
    created_at: int
    consumed_xusd: int = 0
    status: Literal["active", "closed"] = "active"
    reference: str | None = None

    @property
    def remaining_xusd(self) -> int:
        """What is left; negative when overdrawn."""
        return self.limit_xusd - self.consumed_xusd


@dataclass(frozen=True, slots=True)
class Window:
    """One quota window that a lease was authorized in."""

    scope: Scope
    start: int
    end: int
    limit: int


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to one charged single commit."""

    lease_id: str
    token: str
    realm_id: str
    account_id: str
    billing_user_id: str
    feature: str
    family: str
    cap: int
    created_at: int
    expires_at: int
    fingerprint: str
    windows: tuple[Window, ...]
    state: LeaseState = "active"
    budget_id: str | None = None
    hints: tuple[dict[str, Any], ...] = ()
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a rated line: price or cost."""

    unit_xusd: int
    unit_quantity: int
    rounding: Rounding
    amount_xusd: int
    effective_at: int
    fingerprint: str
    carry_before: int = 0
    carry_after: int = 0
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """One rated line; ``priced`` False is the real server's ``source: missing``."""

    line_id: str
    meter: str
    quantity: int
    priced: bool
    price: Side
    cost: Side
    computed_at: int
    unit: str = "unit"


@dataclass(frozen=True, slots=True)
class Allocation:
    """A part of a charge and the grant that it came from."""

    allocation_id: str
    grant_id: str
    grant_kind: str
    amount_xusd: int
    settled: bool


@dataclass(frozen=True, slots=True)
class Rating:
    """One commit or ingest as it was rated. Quarantined ones have no allocation: nothing was charged."""

    rating_id: str
    realm_id: str
    account_id: str
    billing_user_id: str
    principal_id: str
    user_id: str
    kind: Literal["gate", "ingest"]
    feature: str
    quantity: int
    amount_xusd: int
    cost_xusd: int
    applied: bool
    reason_codes: tuple[str, ...]
    lines: tuple[Line, ...]
    allocations: tuple[Allocation, ...]
    labels: dict[str, str]
    rated_at: int
    created_at: int
    idempotency_key: str
    idempotency_id: str
    pricing_fingerprint: str
    cost_fingerprint: str
    lease_id: str | None = None
    budget_id: str | None = None
    late: bool = False
    client_dated: bool = False

    @property
    def charged_xusd(self) -> int:
        """What was really charged."""
        return sum(part.amount_xusd for part in self.allocations)


@dataclass(frozen=True, slots=True)
class Booking:
    """What a completed commit or ingest answered, for replays of its key."""

    fingerprint: str
    rating_id: str
    data: dict[str, Any]
    hints: tuple[dict[str, Any], ...] = ()
