"""A short kill -9 soak with real processes; ``make soak`` runs the long one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from soak_options import Options, tidy
from soak_report import evidence, summary
from soak_run import Soak

SHORT = Options(
    minutes=0.75, seed=20, cold_starts=10, pauses_per_minute=10, gate_restarts_per_minute=2, drain_seconds=150
)
BROKEN = Options(minutes=0.12, seed=21, workers=3, cold_starts=0, drain_seconds=10, sabotage="one_attempt")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_no_charge_is_lost_or_doubled_by_processes_that_are_killed(capsys: pytest.CaptureFixture[str]) -> None:
    result = Soak(SHORT).run()
    with capsys.disabled():
        print(f"\n{summary(result)}")
    assert result.holds, evidence(result).read_text()[:20_000]
    assert result.kills >= 40
    assert result.cold_starts >= 8
    assert result.verdict.acknowledged >= 300
    assert result.verdict.jobs >= 20
    assert {"answer lost", "delivered twice", "gate error_after", "outage"} <= set(result.faults)
    tidy(result)


def test_the_soak_goes_red_where_deliveries_are_given_up(tmp_path: Path) -> None:
    """The whole chain can fail, not only the oracle: with the package broken on purpose, charges are missed."""
    result = Soak(replace(BROKEN, keep=tmp_path)).run()
    assert not result.holds
    assert result.verdict.broken["acknowledged but uncharged"]
    assert "acknowledged but uncharged" in evidence(result).read_text()
