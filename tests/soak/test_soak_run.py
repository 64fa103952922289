"""A short kill -9 soak with real processes; ``make soak`` runs the long one."""

from __future__ import annotations

import pytest
from soak_options import Options, tidy
from soak_report import evidence, summary
from soak_run import Soak

SHORT = Options(
    minutes=0.75,
    seed=20,
    workers=5,
    cold_starts=10,
    pauses_per_minute=10,
    gate_restarts_per_minute=2,
    drain_seconds=120,
)


@pytest.mark.slow
@pytest.mark.timeout(300)
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
