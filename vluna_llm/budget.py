"""What one task may cost: limits of a call context, judged before the gate is asked."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import BudgetExceeded, ConfigurationError, LimitName


@dataclass(frozen=True, slots=True)
class Amount:
    """An amount in both of the units in which a task is limited: XUSD, and tokens (or a feature's own unit)."""

    xusd: int = 0
    tokens: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.xusd + other.xusd, self.tokens + other.tokens)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.xusd - other.xusd, self.tokens - other.tokens)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a task may cost at most; None where it is not limited.

    Raises:
        ConfigurationError: a limit is no integer, or negative.
    """

    max_amount_xusd: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_amount_xusd", "max_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigurationError(f"{name} must be an integer of at least 0, not {value!r}.")

    def judge(self, spent: Amount, in_flight: Amount, asked: Amount) -> BudgetExceeded | None:
        """The refusal of one more call; None where there is room for it.

        What is in flight counts by its estimate. A call whose cost nobody can estimate (``asked`` is 0) is refused
        where nothing is left.
        """
        limits: tuple[tuple[LimitName, int | None, int, int, int], ...] = (
            ("max_amount_xusd", self.max_amount_xusd, spent.xusd, in_flight.xusd, asked.xusd),
            ("max_tokens", self.max_tokens, spent.tokens, in_flight.tokens, asked.tokens),
        )
        for name, limit, gone, under_way, wanted in limits:
            if limit is not None and gone + under_way + max(wanted, 1) > limit:
                return BudgetExceeded(limit=name, maximum=limit, spent=gone, in_flight=under_way, asked=wanted)
        return None
