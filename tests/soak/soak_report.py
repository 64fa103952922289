"""What a soak came to: one line for people, and a file of evidence where a promise was broken."""

from __future__ import annotations

from pathlib import Path

from soak_options import Result


def summary(result: Result) -> str:
    """The one line."""
    verdict = result.verdict
    minutes = result.options.minutes
    faults = ", ".join(f"{kind} {count:,}" for kind, count in sorted(result.faults.items(), key=lambda kind: -kind[1]))
    most = result.kills * result.options.concurrency
    broken = {name: len(found) for name, found in verdict.broken.items()}
    always = ("acknowledged but uncharged", "doubled", "tokens off", "charged and never sent")
    promises = [f"{name} {broken.pop(name):,}" for name in always]
    promises += [f"{name} {count:,}" for name, count in broken.items() if count]
    drained = "not drained" if result.drained_in is None else f"drained in {result.drained_in:.1f} s"
    if result.drained_in is not None and result.drained_in > 20 and result.drained_last:
        drained += f" (at last: {result.drained_last[0][:120]})"
    return "; ".join(
        (
            f"soak {'OK' if result.holds else 'BROKEN'}, seed {result.options.seed}, {minutes:g} min: "
            f"{verdict.operations:,} operations ({verdict.operations / (minutes * 60):.0f}/s)",
            f"{result.kills:,} kills, {result.cold_starts} cold starts, {result.ends} ends, {result.pauses} pauses, "
            f"{result.gate_restarts} restarts of the gate",
            f"{sum(result.faults.values()):,} faults ({faults})",
            f"{verdict.acknowledged:,} acknowledged",
            *promises,
            f"lost {verdict.lost:,} of at most {most:,}",
            f"{verdict.charged_unacknowledged:,} of {verdict.unacknowledged:,} unacknowledged charged",
            f"{verdict.refused:,} refused, {verdict.left:,} left early",
            f"{verdict.charged:,} charges: {verdict.ingested:,} by ingest, {verdict.repaired:,} after a quarantine, "
            f"{verdict.estimated:,} estimated",
            f"{verdict.jobs:,} job steps in {verdict.runs_of_steps:,} runs",
            drained,
            *([f"trouble: {len(result.trouble)}"] if result.trouble else []),
        )
    )


def evidence(result: Result) -> Path:
    """Write every broken promise with what shows it, beside the logs of the run."""
    path = result.folder / "evidence.txt"
    lines = [summary(result), "", *result.trouble]
    for promise, found in result.verdict.broken.items():
        if found:
            lines += ["", f"== {promise}: {len(found)}", *found[:500]]
    lines += ["", f"states in the journals after the drain: {result.states}"]
    path.write_text("\n".join(lines) + "\n")
    return path
