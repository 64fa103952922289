"""``python -m benchmarks``: measure the performance budget.

Prints a table, writes JSON and a plot to ``benchmarks/results``. Exit code 1 where a budget is exceeded; a quick run
judges only what does not depend on the machine's speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import report
from .figures import Figure, Profile


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run it in a fresh process: no section sees the memory, threads or garbage of another."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _sections() -> dict[str, Callable[[Profile], list[Figure]]]:
    from . import backlog, crowd, first_token, local, memory, parts, streaming, through_litellm

    return {
        "streaming": lambda profile: [
            *apart(streaming.streaming, profile, "sync"),
            *apart(streaming.streaming, profile, "async"),
            *apart(streaming.round_trips, profile),
        ],
        "local": lambda profile: apart(local.local_work, profile),
        "first-token": lambda profile: [
            *apart(first_token.first_token, profile, "sync"),
            *apart(first_token.first_token, profile, "async"),
        ],
        "memory": lambda profile: apart(memory.memory, profile),
        "crowd": lambda profile: crowd.crowd_figures(
            profile, apart(crowd.crowd_side, profile, "bare"), apart(crowd.crowd_side, profile, "metered")
        ),
        "loop": lambda profile: apart(crowd.loop_lag, profile),
        "backlog": lambda profile: [
            *apart(backlog.backlog, profile, backlog.CUSTOMERS),
            *apart(backlog.backlog, profile, 1),
        ],
        "estimate": lambda profile: apart(parts.estimate, profile),
        "reader": lambda profile: apart(parts.reader, profile),
        "litellm": lambda profile: [
            *apart(through_litellm.calls, profile),
            *apart(through_litellm.chunks, profile, "sync"),
            *apart(through_litellm.chunks, profile, "async"),
        ],
    }


def main() -> int:
    sections = _sections()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"only these: {', '.join(sections)}")
    parser.add_argument("--quick", action="store_true", help="a smoke run of some 20 seconds")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="where the files go")
    chosen = parser.parse_args()
    if unknown := set(chosen.sections) - set(sections):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    if not (is_there := importlib.util.find_spec("litellm") is not None):
        if "litellm" in chosen.sections:
            parser.error("LiteLLM is not installed: pip install 'vluna-llm[litellm]' 'vluna-llm[bench]'")
        if not chosen.sections:
            sys.stderr.write("litellm: left out, it is not installed; pip install 'vluna-llm[litellm]'\n")
    profile, before, figures = Profile(chosen.quick), report.load_average(), []
    for name, measure in sections.items():
        if name in chosen.sections or (not chosen.sections and (is_there or name != "litellm")):
            started = time.perf_counter()
            figures += measure(profile)
            sys.stderr.write(f"{name}: {time.perf_counter() - started:.0f} s\n")
    where = report.environment(chosen.quick, before)
    report.show(figures, where)
    for path in report.write(figures, where, chosen.results):
        sys.stdout.write(f"{path}\n")
    return int(any(figure.over and (figure.exact or not chosen.quick) for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
