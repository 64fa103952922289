"""The figures as a table, a file and a picture."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .figures import Figure

RESULTS = Path(__file__).resolve().parent / "results"


def environment(quick: bool, started: tuple[float, float, float] | None) -> dict[str, Any]:
    """Where and how busy: what the figures depend on."""
    versions = {}
    for name in ("vluna-llm", "openai", "litellm", "httpx", "httpx2", "pydantic"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "load_average": {"before": started, "after": load_average()},
        "versions": versions,
    }


def load_average() -> tuple[float, float, float] | None:
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def show(figures: Sequence[Figure], where: dict[str, Any]) -> None:
    """Print the table: as wide as the terminal; in a log, where there is no width, wide enough."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    quick = " (quick: budgets of time are shown, not judged)" if where["quick"] else ""
    litellm = f", LiteLLM {version}" if (version := where["versions"].get("litellm")) else ""
    title = f"Performance budget, openai {where['versions'].get('openai')}{litellm}, Python {where['python']}{quick}"
    table = Table(title=title, title_justify="left")
    for name, justify in (("what", "left"), ("measured", "right"), ("upper 95 %", "right"), ("budget", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("")
    table.add_column("note", style="dim")
    group = None
    for figure in figures:
        if figure.group != group:
            group = figure.group
            table.add_section()
            table.add_row(f"[bold]{group}[/bold]")
        verdict = "" if figure.budget is None else "[red]OVER[/red]" if figure.over else "[green]ok[/green]"
        bound = "" if figure.bound is None else _number(figure.bound)
        budget = "" if figure.budget is None else f"{figure.budget:,g}"
        measured = f"{_number(figure.value)} {figure.unit}".rstrip()
        table.add_row(f"  {figure.name}", measured, bound, budget, verdict, figure.note)
    console.print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"


def write(figures: Sequence[Figure], where: dict[str, Any], directory: Path) -> list[Path]:
    """Write the JSON and, where matplotlib is installed, the picture; gives what was written."""
    directory.mkdir(parents=True, exist_ok=True)
    name = f"budget-openai-{where['versions'].get('openai', 'none')}{'-quick' if where['quick'] else ''}"
    data = directory / f"{name}.json"
    rows = [{**asdict(figure), "over": figure.over} for figure in figures]
    data.write_text(json.dumps({**where, "figures": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    written = [data]
    try:
        written.append(_plot(figures, where, directory / f"{name}.png"))
    except ModuleNotFoundError as error:
        sys.stderr.write(f"no plot: {error}; pip install 'vluna-llm[bench]'\n")
    return written


def _plot(figures: Sequence[Figure], where: dict[str, Any], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgeted = [figure for figure in figures if figure.budget]
    shares = [100 * figure.value / figure.budget for figure in budgeted if figure.budget]
    bounds = [100 * figure.judged / figure.budget for figure in budgeted if figure.budget]
    names = [f"{figure.group}: {figure.name}" for figure in budgeted]
    places = range(len(budgeted))
    fig, axes = pyplot.subplots(figsize=(11, 1.2 + 0.42 * len(budgeted)), layout="constrained")
    colours = ["#c0392b" if figure.over else "#2e7d6b" for figure in budgeted]
    axes.barh(places, shares, color=colours, height=0.55)
    for place, figure in zip(places, budgeted, strict=True):
        assert figure.budget is not None
        blocks = [100 * sample / figure.budget for sample in figure.samples]
        axes.plot(blocks, [place - 0.38] * len(blocks), "|", color="0.45", markersize=4, alpha=0.6)
    axes.plot(bounds, places, "D", color="black", markersize=4, label="upper 95 % bound")
    axes.plot([], [], "|", color="0.45", label="single blocks")
    axes.axvline(100, color="black", linewidth=1)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, *shares), max(130.0, *bounds) * 1.05)
    axes.set_xlabel("share of the budget, %")
    load = where["load_average"]["before"]
    busy = "" if load is None else f", load {load[0]:.1f} on {where['cpus']} CPUs"
    axes.set_title(f"openai {where['versions'].get('openai')}, Python {where['python']}{busy}", fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="lower right")
    fig.savefig(path, dpi=140)
    pyplot.close(fig)
    return path
