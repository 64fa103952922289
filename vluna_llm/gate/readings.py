"""What can be read from the gate: limits, meters, wallet, tokens, ratings, allocations, health.

Forward compatible: a member that has another type than expected reads as None, unknown members are kept, and nothing in
an answer makes reading raise. Money is in XUSD, quantities in the meter's unit, both integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from ..types import Hint
from .failures import instant


def integer(value: object) -> int | None:
    """An integer as the gate writes one: a JSON number or a string of digits; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return None
    return None


def _string(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _object(value: object) -> Mapping[str, Any]:
    return {str(name): member for name, member in value.items()} if isinstance(value, Mapping) else {}


def _strings(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _objects(value: object) -> list[Any]:
    return [item for item in value if isinstance(item, (Mapping, BaseModel))] if isinstance(value, list) else []


def _object_or_none(value: object) -> object:
    return value if isinstance(value, (Mapping, BaseModel)) else None


Int = Annotated["int | None", BeforeValidator(integer)]
Text = Annotated["str | None", BeforeValidator(_string)]
Flag = Annotated["bool | None", BeforeValidator(_flag)]
Time = Annotated["datetime | None", BeforeValidator(instant)]
Texts = Annotated["tuple[str, ...]", BeforeValidator(_strings)]
Object = Annotated["Mapping[str, Any]", BeforeValidator(_object)]


@dataclass(frozen=True, slots=True)
class Envelope:
    """What came around the data of an answer. ``raw`` is the whole answer, decoded where it was JSON."""

    status: int = 200
    parsed: bool = True
    hints: tuple[Hint, ...] = ()
    trace_id: str | None = None
    request_id: str | None = None
    raw: Any = field(default=None, repr=False)


class Reading(BaseModel):
    """Base of everything read: frozen, unknown members kept (``model_extra``).

    ``envelope`` has hints, trace id, request id and the raw answer where the value is an answer by itself;
    ``envelope.parsed`` is False where a 2xx answer could not be understood, and then every field is None.
    """

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    _envelope: Envelope = PrivateAttr(default_factory=Envelope)

    @property
    def envelope(self) -> Envelope:
        """What came around this value."""
        return self._envelope


class Window(Reading):
    """One quota or rate window. ``limit_minor`` -1 means unlimited."""

    subject_scope: Text = None
    window_start: Time = None
    window_end: Time = None
    limit_minor: Int = None
    used_minor: Int = None

    @property
    def room(self) -> int | None:
        """What is left in this window; None where unlimited or not told."""
        if self.limit_minor is None or self.used_minor is None or self.limit_minor < 0:
            return None
        return max(0, self.limit_minor - self.used_minor)


class FeatureLimits(Reading):
    """Quotas (units) and rates (authorizations) of one feature."""

    feature_code: Text = None
    feature_family_code: Text = None
    unit: Text = None
    quotas: Annotated[tuple[Window, ...], BeforeValidator(_objects)] = ()
    rates: Annotated[tuple[Window, ...], BeforeValidator(_objects)] = ()
    meters: Texts = ()

    @property
    def room(self) -> int | None:
        """The smallest room left over all quota windows; None where nothing limits."""
        return min((window.room for window in self.quotas if window.room is not None), default=None)


class Pricing(Reading):
    """Price of one meter: ``unit_price_xusd`` XUSD for each ``unit_quantity_minor`` units."""

    unit_price_xusd: Int = None
    unit_quantity_minor: Int = None
    rounding: Text = None
    effective_at: Time = None
    fingerprint: Text = None
    unit: Text = None


class Coverage(Reading):
    """What the balance would pay for, one meter at a time; advice only. A free meter reports 0 (contract 7.10)."""

    basis: Text = None
    balance_xusd: Int = None
    max_quantity_minor_estimated: Int = None
    optimistic_quantity_minor: Int = None
    advisory: Flag = None
    as_of: Time = None
    budget_id: Text = None
    notes: Text = None


class Meter(Reading):
    """One meter. ``pricing`` is None where the meter has no price (or pricing was not asked for)."""

    meter_code: Text = None
    unit: Text = None
    features: Texts = ()
    feature_family_codes: Texts = ()
    quotas: Annotated[tuple[Window, ...], BeforeValidator(_objects)] = ()
    rates: Annotated[tuple[Window, ...], BeforeValidator(_objects)] = ()
    pricing: Annotated[Pricing | None, BeforeValidator(_object_or_none)] = None
    coverage: Annotated[Coverage | None, BeforeValidator(_object_or_none)] = None

    @property
    def priced(self) -> bool:
        """Whether the gate told a price for this meter, 0 included."""
        return self.pricing is not None


class Money(Reading):
    """An amount in XUSD; ``usd`` is the gate's own decimal text of it."""

    xusd: Int = None
    usd: Text = None


class Grant(Reading):
    """One grant of credit; a negative ``remaining`` of origin ``fallback`` is debt."""

    grant_id: Text = None
    grant_program_code: Text = None
    name: Text = None
    origin: Text = None
    status: Text = None
    priority: Int = None
    window_start: Time = None
    window_end: Time = None
    issued: Annotated[Money | None, BeforeValidator(_object_or_none)] = None
    remaining: Annotated[Money | None, BeforeValidator(_object_or_none)] = None


class WalletBalance(Reading):
    """Credit of one (principal, user).

    ``balances`` is **not** what can be spent: the gate counts a top-up twice there (contract 7.3). Use
    ``spendable_xusd`` and ``debt_xusd``.
    """

    billing_account_id: Text = None
    billing_user_id: Text = None
    balances: Annotated[Money | None, BeforeValidator(_object_or_none)] = None
    outstanding_balances: Annotated[Money | None, BeforeValidator(_object_or_none)] = None
    grants: Annotated[tuple[Grant, ...], BeforeValidator(_objects)] = ()

    @property
    def spendable_xusd(self) -> int:
        """XUSD left in the grants, debt not subtracted."""
        return sum(max(0, amount) for amount in self._remaining())

    @property
    def debt_xusd(self) -> int:
        """XUSD spent beyond the credit, as a positive number."""
        return -sum(min(0, amount) for amount in self._remaining())

    def _remaining(self) -> Iterator[int]:
        for grant in self.grants:
            if grant.remaining is not None and grant.remaining.xusd is not None:
                yield grant.remaining.xusd


class IssuedToken(Reading):
    """An end-user token with the two billing ids; the token is in no repr."""

    access_token: Annotated[str | None, BeforeValidator(_string)] = Field(default=None, repr=False)
    token_type: Text = None
    expires_in: Int = None
    expires_at: Time = None
    billing_account_id: Text = None
    billing_user_id: Text = None

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        # Members that are not known here might be secrets as well.
        return ((name, value) for name, value in super().__repr_args__() if name in type(self).model_fields)


class RatedRecord(Reading):
    """One line of a rating."""

    meter_code: Text = None
    quantity_minor: Int = None
    amount_xusd: Int = None
    rating_status: Text = None
    pricing_snapshot: Object = Field(default_factory=dict)

    @property
    def unpriced(self) -> bool:
        """Whether the meter had no price: the line was booked as 0."""
        provenance = _object(self.pricing_snapshot.get("provenance"))
        return provenance.get("source") == "missing" or self.rating_status == "missing_price"


class Rating(Reading):
    """One recorded commit or ingest. Whether it was charged is told by ``allocations``, or by ``quarantined``."""

    rating_id: Text = None
    rating_kind: Text = None
    source_ref: Text = None
    billing_account_id: Text = None
    billing_user_id: Text = None
    budget_id: Text = None
    feature_code: Text = None
    direction: Text = None
    canonical_quantity_minor: Int = None
    canonical_amount_xusd: Int = None
    canonical_cost_xusd: Int = None
    rated_at: Time = None
    metadata: Object = Field(default_factory=dict)
    rated_records: Annotated[tuple[RatedRecord, ...], BeforeValidator(_objects)] = ()

    @property
    def application_status(self) -> str | None:
        """``applied`` or ``quarantined``."""
        return _string(self.metadata.get("application_status"))

    @property
    def quarantined(self) -> bool:
        """Whether this was recorded and charged nothing."""
        return self.application_status == "quarantined"

    @property
    def reason_codes(self) -> tuple[str, ...]:
        """Why, in the gate's words."""
        return _strings(self.metadata.get("reason_codes"))

    @property
    def labels(self) -> Mapping[str, Any]:
        """The labels that were sent with the commit or ingest."""
        return _object(self.metadata.get("labels"))


class Allocation(Reading):
    """One part of a charge: how many XUSD of which grant."""

    allocation_id: Text = None
    rating_id: Text = None
    billing_account_id: Text = None
    billing_user_id: Text = None
    grant_id: Text = None
    feature_code: Text = None
    funding_kind: Text = None
    direction: Text = None
    allocated_xusd: Int = None
    amount_xusd: Int = None
    cost_xusd: Int = None
    applied_quantity_minor: Int = None
    applied_amount_xusd: Int = None
    applied_cost_xusd: Int = None
    entry_amount_xusd: Int = None
    application_status: Text = None
    settlement_state: Text = None
    rated_at: Time = None


class Preflight(Reading):
    """Authorize would succeed now. Only the ``lease`` dialect answers this."""

    feature_code: Text = None
    feature_family_code: Text = None
    budget_id: Text = None
    as_of: Time = None
    window_start: Time = None
    window_end: Time = None


class Health(Reading):
    """The gate's process is up; it does not look at its database."""

    service: Text = None
    status: Text = None

    @property
    def healthy(self) -> bool:
        """Whether the gate calls itself healthy."""
        return self.status == "healthy"


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Listing(Generic[T]):
    """A list read from the gate; iterates over its ``items``."""

    items: tuple[T, ...]
    status: int
    parsed: bool = True
    next_cursor: str | None = None
    has_more: bool = False
    hints: tuple[Hint, ...] = ()
    trace_id: str | None = None
    request_id: str | None = None
    raw: Any = field(default=None, repr=False, compare=False)

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)
