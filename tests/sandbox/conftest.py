"""Tells how the contract replay went, in the summary of every run that contains it."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    agreed, different, failed = [], [], []
    for kind in ("passed", "failed"):
        for report in terminalreporter.stats.get(kind, []):
            if "test_answers_like_the_real_gate" not in report.nodeid or report.when != "call":
                continue
            name = report.nodeid.partition("[")[2].rstrip("]")
            told = dict(report.user_properties).get("contract")
            (failed if kind == "failed" else different if told == "different" else agreed).append(name)
    total = len(agreed) + len(different) + len(failed)
    if total:
        names = ", ".join(sorted(different)) or "none"
        terminalreporter.write_line(
            f"contract replay: {total - len(failed)} of {total} as expected, {len(agreed)} identical, "
            f"{len(different)} deliberate differences: {names}"
        )
        for name in failed:
            terminalreporter.write_line(f"contract replay: NOT as the real gate: {name}")
