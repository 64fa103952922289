"""How usage is split by price: what the lines add up to, and where a part without a price goes."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vluna_llm.usage.features import MeterNames
from vluna_llm.usage.meters import MeterLine, compose_lines
from vluna_llm.usage.types import TokenUsage

F = "openai.gpt-4o-mini"
IN, CACHED, OUT = f"{F}.tokens.input", f"{F}.tokens.cached", f"{F}.tokens.output"
NAMES = MeterNames()
USAGE = TokenUsage(input_tokens=100, cached_tokens=60, output_tokens=30)

counts = st.integers(0, 10**9)
usages = st.builds(TokenUsage, input_tokens=counts, cached_tokens=counts, output_tokens=counts)
modes: st.SearchStrategy[Literal["auto", "always", "never"]] = st.sampled_from(("auto", "always", "never"))
prices = st.none() | st.frozensets(st.sampled_from([F, IN, CACHED, OUT, "other.meter"]))
namings = st.sampled_from([NAMES, MeterNames(cached=".tokens.input"), MeterNames("m.all", "m.all", "m.all")])


def auto(priced: set[str] | None, usage: TokenUsage = USAGE) -> dict[str, int]:
    lines = compose_lines(usage, F, mode="auto", names=NAMES, priced=None if priced is None else frozenset(priced))
    return {line.meter_code: line.quantity for line in lines}


@given(usages, modes, namings, prices)
def test_lines_are_sorted_single_positive_and_the_whole(
    usage: TokenUsage,
    mode: Literal["auto", "always", "never"],
    names: MeterNames,
    priced: frozenset[str] | None,
) -> None:
    """Whatever is priced: sorted by meter, each once, none zero, and the lines are the total or there are none."""
    lines = compose_lines(usage, F, mode=mode, names=names, priced=priced)
    codes = [line.meter_code for line in lines]
    assert codes == sorted(set(codes))
    assert all(line.quantity > 0 for line in lines)
    if lines:
        assert sum(line.quantity for line in lines) == usage.total_tokens


@given(usages, st.frozensets(st.sampled_from([F, IN, CACHED, OUT])))
def test_auto_sends_only_priced_meters_or_the_whole_split(usage: TokenUsage, priced: frozenset[str]) -> None:
    """A mixture of priced and unpriced lines is sent only where no arrangement is priced at all."""
    codes = {line.meter_code for line in compose_lines(usage, F, mode="auto", names=NAMES, priced=priced)}
    if not codes <= priced:
        assert codes == {line.meter_code for line in compose_lines(usage, F, mode="always", names=NAMES, priced=None)}
        assert F not in priced  # the primary takes anything, so it cannot have been there


@pytest.mark.parametrize(
    ("priced", "lines"),
    [
        ({IN, CACHED, OUT}, {IN: 40, CACHED: 60, OUT: 30}),
        ({F, IN, CACHED, OUT}, {IN: 40, CACHED: 60, OUT: 30}),
        ({IN, OUT}, {IN: 100, OUT: 30}),
        ({F, OUT}, {F: 100, OUT: 30}),
        ({F, IN}, {F: 30, IN: 100}),
        ({F, CACHED}, {F: 70, CACHED: 60}),
        ({F}, {}),
        (set(), {IN: 40, CACHED: 60, OUT: 30}),
        ({IN}, {IN: 40, CACHED: 60, OUT: 30}),
        ({CACHED, OUT}, {IN: 40, CACHED: 60, OUT: 30}),
        (None, {IN: 40, CACHED: 60, OUT: 30}),
    ],
)
def test_where_each_part_goes(priced: set[str] | None, lines: dict[str, int]) -> None:
    """Priced meters get their own part; a part without a price goes to the nearest priced meter above it."""
    assert auto(priced) == lines


def test_a_category_that_is_not_there_does_not_force_the_split() -> None:
    """Embeddings use no output: that the output meter has no price does not matter."""
    assert auto({IN}, TokenUsage(input_tokens=12)) == {IN: 12}


def test_modes() -> None:
    """``never`` sends no lines, ``always`` the whole split whatever is priced; nothing used means no lines."""
    assert compose_lines(USAGE, F, mode="never", names=NAMES, priced=frozenset({IN})) == ()
    assert compose_lines(USAGE, F, mode="always", names=NAMES, priced=frozenset({F})) == (
        MeterLine(CACHED, 60),
        MeterLine(IN, 40),
        MeterLine(OUT, 30),
    )
    assert compose_lines(TokenUsage(), F, mode="always", names=NAMES, priced=None) == ()


def test_two_categories_on_one_meter_are_one_line() -> None:
    """Names that share a meter give it once, with both parts: the gate prices two lines of one meter wrongly."""
    names = MeterNames(input=".tokens.input", cached=".tokens.input", output=".tokens.output")
    assert compose_lines(USAGE, F, mode="always", names=names, priced=None) == (MeterLine(IN, 100), MeterLine(OUT, 30))


def test_cached_beyond_the_input_is_not_billed_beyond_it() -> None:
    """A caller's own usage with more cached than input still adds up to its total."""
    usage = TokenUsage(input_tokens=5, cached_tokens=9, output_tokens=1)
    assert compose_lines(usage, F, mode="always", names=NAMES, priced=None) == (MeterLine(CACHED, 5), MeterLine(OUT, 1))
