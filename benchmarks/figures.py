"""A measured figure, its bound and its budget."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_Z95 = statistics.NormalDist().inv_cdf(0.95)


@dataclass(frozen=True)
class Profile:
    """How much is measured. ``scale`` shrinks everything that is not a number of blocks."""

    quick: bool

    @property
    def blocks(self) -> int:
        return 3 if self.quick else 40

    def some(self, many: int) -> int:
        return max(2, many // 20) if self.quick else many


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        group: what it belongs to.
        name: what was measured.
        unit: of ``value``, ``bound`` and ``budget``.
        value: the mean of the blocks, or the one value.
        bound: the upper 95 % bound of the mean; None where the value is no mean.
        budget: what it may be at most; None where it only informs.
        samples: the value of each block.
        exact: it does not depend on the machine's speed, so that a quick run judges it too.
        note: how to read it.
    """

    group: str
    name: str
    unit: str
    value: float
    bound: float | None = None
    budget: float | None = None
    samples: tuple[float, ...] = ()
    exact: bool = False
    note: str = ""

    @property
    def judged(self) -> float:
        """What is held against the budget."""
        return self.value if self.bound is None else self.bound

    @property
    def over(self) -> bool:
        return self.budget is not None and not self.judged <= self.budget


def mean_of(
    group: str, name: str, unit: str, samples: Sequence[float], *, budget: float | None = None, note: str = ""
) -> Figure:
    """The mean over blocks, with its bound."""
    bound = upper_bound(samples)
    return Figure(group, name, unit, statistics.fmean(samples), bound, budget, tuple(samples), note=note)


def upper_bound(samples: Sequence[float]) -> float:
    """The one-sided upper 95 % bound of the mean, by Student's t (its quantile by Fisher's series, good from n = 3)."""
    count = len(samples)
    if count < 2:
        return math.inf
    nu, z = count - 1, _Z95
    t = z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
    return statistics.fmean(samples) + t * statistics.stdev(samples) / math.sqrt(count)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values are."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]
