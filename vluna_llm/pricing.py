"""Which meters have a price, and what they cost: a small cache over ``gate/meters?expand=pricing`` (design rule 6)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .errors import GateUnavailable
from .usage.features import MeterNames
from .usage.meters import MeterLine

TTL_SECONDS = 60.0
_MAX_FEATURES = 2_000


@dataclass(frozen=True, slots=True)
class Price:
    """XUSD per ``unit_quantity`` tokens."""

    unit_price_xusd: int
    unit_quantity: int = 1

    def of(self, quantity: int) -> int:
        """What so much costs, in XUSD, rounded down."""
        return quantity * self.unit_price_xusd // max(self.unit_quantity, 1)


Prices = Mapping[str, Price]
"""The prices of one feature by meter code; a meter that is not there has none."""


class PriceBook:
    """Prices by feature, kept for a minute. Contract prices are not shown by the gate and not known here.

    Args:
        fetch: asks the gate for the prices of a feature, as seen by (principal, user); raises `GateError`.
    """

    def __init__(self, fetch: Callable[[str, str, str], Prices], clock: Callable[[], float] = time.monotonic) -> None:
        self._fetch = fetch
        self._clock = clock
        self._guard = threading.Lock()
        self._known: dict[str, tuple[float, Prices]] = {}

    def prices(self, feature_code: str, principal_id: str, user_id: str) -> Prices:
        """The prices of a feature, asked for where they are not known or are older than a minute.

        Raises:
            GateError: the gate could not be asked; a price known from before is used instead where there is one.
        """
        with self._guard:
            found = self._known.get(feature_code)
        if found is not None and self._clock() - found[0] < TTL_SECONDS:
            return found[1]
        try:
            prices = self._fetch(feature_code, principal_id, user_id)
        except GateUnavailable:
            if found is None:
                raise
            return found[1]
        with self._guard:
            if len(self._known) >= _MAX_FEATURES:
                self._known.pop(next(iter(self._known)))
            self._known[feature_code] = (self._clock(), prices)
        return prices

    def forget(self, feature_code: str) -> None:
        """Ask again next time: a pricing hint said that something changed."""
        with self._guard:
            self._known.pop(feature_code, None)

    def knows(self, feature_code: str) -> bool:
        """Whether `guess` has prices to go by, maybe old ones."""
        return feature_code in self._known

    def guess(
        self,
        feature_code: str,
        names: MeterNames | None,
        input_tokens: int,
        output_tokens: int = 0,
        cached_tokens: int = 0,
    ) -> int:
        """What these tokens would cost in XUSD by the prices known now; 0 where none are. Never asks the gate.

        ``cached_tokens`` are a part of the input. Without ``names`` all of it is priced by the primary meter.
        """
        found = self._known.get(feature_code)
        if found is None:
            return 0
        prices = found[1]
        if names is None:
            split: tuple[tuple[tuple[str, ...], int], ...] = (((), input_tokens + output_tokens),)
        else:
            codes = names.codes(feature_code)
            cached = min(cached_tokens, input_tokens)
            split = (
                ((codes.input,), input_tokens - cached),
                ((codes.cached, codes.input), cached),
                ((codes.output,), output_tokens),
            )
        total = 0
        for chain, quantity in split:
            price = next((prices[code] for code in (*chain, feature_code) if code in prices), None)
            if price is not None:
                total += price.of(quantity)
        return total

    def guess_lines(self, feature_code: str, lines: Iterable[MeterLine]) -> int:
        """`guess` for lines on meters that the caller named: each by its own price, nothing for one without."""
        known = self._known.get(feature_code)
        prices = {} if known is None else known[1]
        return sum(prices[line.meter_code].of(line.quantity) for line in lines if line.meter_code in prices)
