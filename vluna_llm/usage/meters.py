"""The split of one call's usage by price (design rule 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .features import DEFAULT_NAMES, MeterNames
from .types import TokenUsage

MetersMode = Literal["auto", "always", "never"]


@dataclass(frozen=True, slots=True)
class MeterLine:
    """One line of ``meters[]``: so many tokens on this meter. ``quantity`` is never 0."""

    meter_code: str
    quantity: int


def compose_lines(
    usage: TokenUsage,
    feature_code: str,
    *,
    mode: MetersMode = "auto",
    names: MeterNames = DEFAULT_NAMES,
    priced: frozenset[str] | None = None,
) -> tuple[MeterLine, ...]:
    """The ``meters[]`` of a commit or ingest; beside it ``quantity_minor`` is always ``usage.total_tokens``.

    Lines are sorted by meter, each meter stands once, none is zero, and together they are the total: input that was not
    cached, cached input, output (gate contract: unsorted lines deadlock the gate, a zero line is refused, one unknown
    or unpriced meter leaves the whole commit uncharged). An empty answer means: send no lines, the gate prices the
    total by the primary meter, whose code is the feature code.

    Args:
        usage: what the call used, in tokens.
        feature_code: the lease's feature.
        mode: ``always`` the whole split, ``never`` none, ``auto`` by what is priced:

            * each category goes to its own meter where that is priced, else to the nearest priced one above it:
              cached, input, primary; output, primary;
            * no lines where all of it ends on the primary meter;
            * the whole split where nothing is priced, or where some category has no priced meter above it: nothing is
              charged then either way, and the operator's hint names what to price instead of a part going unbilled.
        names: how the feature's meters are called.
        priced: the meters that have a price. None where that could not be found out: taken as nothing priced, so the
            whole split. With no lines a feature that prices both its primary meter and its split would be charged by
            the wrong price for good; a split that is not priced is not charged, said loudly, and booked by ingest
            once the prices are known.
    """
    cached = min(usage.cached_tokens, usage.input_tokens)
    codes = names.codes(feature_code)
    split = (
        (usage.input_tokens - cached, (codes.input, feature_code)),
        (cached, (codes.cached, codes.input, feature_code)),
        (usage.output_tokens, (codes.output, feature_code)),
    )
    if mode == "never":
        return ()
    if mode == "auto" and priced:
        placed: dict[str, int] = {}
        for quantity, chain in split:
            if quantity:
                code = next((code for code in chain if code in priced), None)
                if code is None:
                    break
                placed[code] = placed.get(code, 0) + quantity
        else:
            return () if set(placed) <= {feature_code} else _lines(placed)
    whole: dict[str, int] = {}
    for quantity, chain in split:
        whole[chain[0]] = whole.get(chain[0], 0) + quantity
    return _lines(whole)


def _lines(quantities: dict[str, int]) -> tuple[MeterLine, ...]:
    return tuple(MeterLine(code, quantity) for code, quantity in sorted(quantities.items()) if quantity)
