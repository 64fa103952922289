"""``python tests/soak --minutes 10``: kill workers at random for a while, and see that no charge is lost or doubled."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from soak_options import Options, tidy
from soak_report import evidence, summary
from soak_run import Soak
from soak_sabotage import SABOTAGES


def soak(
    minutes: Annotated[float, typer.Option(help="How long workers are killed.", min=0.05)] = 10.0,
    seed: Annotated[int, typer.Option(help="Of every random choice; the scheduling stays the machine's.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes at a time.", min=1)] = 6,
    concurrency: Annotated[int, typer.Option(help="Calls at a time in each of them.", min=1)] = 4,
    kills_per_minute: Annotated[float, typer.Option(help="SIGKILLs, at exponential intervals.", min=0)] = 300.0,
    cold_starts: Annotated[int, typer.Option(help="Workers that start as fresh interpreters.", min=0)] = 100,
    fault_rate: Annotated[float, typer.Option(help="Share of gate requests with an accident.", min=0, max=1)] = 0.12,
    think: Annotated[float, typer.Option(help="Mean seconds between two calls of one caller.", min=0.001)] = 0.05,
    drain_seconds: Annotated[float, typer.Option(help="Patience with the delivery of what is left.", min=1)] = 420.0,
    dialect: Annotated[str, typer.Option(help="Of the gate: lease_token or lease.")] = "lease_token",
    sabotage: Annotated[str, typer.Option(help=f"Break the package on purpose: {', '.join(SABOTAGES)}.")] = "",
    keep: Annotated[Optional[Path], typer.Option(help="A folder for logs, books and evidence.")] = None,  # noqa: UP045
) -> None:
    """Kill workers at random, behind a faulty road to a gate with bad habits; then compare its books with the logs."""
    console = Console(stderr=True)
    if sabotage and sabotage not in SABOTAGES:
        raise typer.BadParameter(f"no such sabotage: {sabotage}")
    if keep is not None and keep.is_dir() and any(keep.iterdir()):
        raise typer.BadParameter(f"{keep} is not empty: logs of another run would be judged, too")
    console.print(f"seed {seed}" + (f", with {sabotage} on purpose" if sabotage else ""))
    options = Options(
        minutes=minutes,
        seed=seed,
        workers=workers,
        concurrency=concurrency,
        kills_per_minute=kills_per_minute,
        cold_starts=cold_starts,
        fault_rate=fault_rate,
        think=think,
        drain_seconds=drain_seconds,
        dialect=dialect,
        sabotage=sabotage,
        keep=keep,
    )
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("starting", total=1.0, figures="")

        def show(run: Soak, share: float) -> None:
            figures = f"{run.kills:,} kills, {run.cold_starts} cold starts, {sum(run.faults().values()):,} faults"
            bar.update(task, completed=min(share, 1.0), description=run.phase, figures=figures)

        result = Soak(options, show).run()
    if not result.holds:
        path = evidence(result)
        console.print(f"Broken; the evidence is in {path}")
    print(summary(result))
    tidy(result)
    sys.exit(0 if result.holds else 1)


if __name__ == "__main__":
    typer.run(soak)
