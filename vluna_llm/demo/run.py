"""Runs the demo: the steps, one line each, then the tables. Exit code 1 where something does not hold."""

from __future__ import annotations

import json
import time

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from .books import Books, as_json, keep_books
from .player import Player
from .scenario import STEPS, Step
from .stage import Stage
from .tables import books_table, calls_table, checks_table, dollars
from .witness import Witness

_FLUSH_SECONDS = 15.0


def run_demo(console: Console, *, as_data: bool = False) -> int:
    """Play everything and show it; with ``as_data`` print the books as JSON and nothing else.

    Gives the exit code: 0, or 1 where the books differ or another check does not hold.
    """
    began = time.monotonic()
    show = Console(quiet=True) if as_data else console

    def tell(line: str) -> None:
        text = Text.assemble("      ", ("log ", "yellow"), (line, "dim"))
        show.print(text, no_wrap=True, overflow="ellipsis", highlight=False)

    with Stage() as stage, Witness(tell) as witness:
        sources = _recorded_by(stage)
        _introduce(show, stage, sources)
        player = Player(stage)
        for number, step in enumerate(STEPS, start=1):
            _play(show, stage, player, step, number, witness)
        stage.vluna.flush(_FLUSH_SECONDS)
        books = _books(stage, player, witness)
        requests = len(stage.upstream.served)
        stage.vluna.close()
    seconds = time.monotonic() - began
    if as_data:
        data = as_json(books, recorded_by=sources, upstream_requests=requests, seconds=seconds)
        console.file.write(json.dumps(data, indent=2) + "\n")
    else:
        _conclude(console, books, requests, seconds)
    return 0 if books.hold else 1


def _introduce(console: Console, stage: Stage, sources: list[str]) -> None:
    console.print("[bold]vluna-llm demo[/]  [dim]no account, no key, nothing leaves this machine[/]")
    console.print(f"  gate      {stage.gate.base_url}  [dim]the embedded gate of vluna-llm[/]", highlight=False)
    console.print(f"  provider  {stage.upstream.base_url}     [dim]replays recorded answers[/]", highlight=False)
    console.print("  [dim]recorded answers, made with the model SmolLM2-135M-Instruct by:[/]")
    for source in sources:
        console.print(f"            [dim]{escape(source)}[/]", highlight=False)
    console.print()


def _recorded_by(stage: Stage) -> list[str]:
    """The servers that made the recordings, with version and day."""
    seen = {
        (one.server.removesuffix("-tools").removesuffix("-embeddings"), one.server_version, one.recorded)
        for one in stage.recordings.values()
    }
    return [f"{server} {version} on {day}" for server, version, day in sorted(seen)]


def _play(console: Console, stage: Stage, player: Player, step: Step, number: int, witness: Witness) -> None:
    console.print(f"[bold]{number:>3}[/] {step.title}", highlight=False)
    player.step = step.name
    if step.ticks:
        with Progress(
            TextColumn("     "),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as progress:
            task = progress.add_task("", total=step.ticks)
            said = step.play(stage, player, lambda: progress.advance(task))
    else:
        said = step.play(stage, player, lambda: None)
    witness.next_step()
    console.print(Padding(Text(said, style="dim"), (0, 0, 0, 6), expand=False))


def _books(stage: Stage, player: Player, witness: Witness) -> Books:
    hints = witness.hints()
    for call in player.calls:
        if call.receipt is not None and call.receipt.hints:
            kinds = hints.setdefault(call.receipt.operation_id, [])
            kinds += [hint.type for hint in call.receipt.hints if hint.type not in kinds]
    journal = stage.journal()
    return keep_books(
        player.calls,
        served=stage.upstream.served,
        journal=journal,
        gate=stage.gate.booked().entries,
        hints=lambda operation_id: tuple(hints.get(operation_id, ())),
        prices=stage.gate.config.defaults,
        outstanding=sum(
            row.state.settlement in ("none", "pending", "sent", "quarantined", "refused", "lost")
            and row.state.admission != "denied"
            for row in journal
        ),
    )


def _conclude(console: Console, books: Books, requests: int, seconds: float) -> None:
    console.print()
    console.print(calls_table(books, console))
    console.print()
    console.print(books_table(books, console))
    prices = books.prices
    console.print(
        f"[dim]Prices of the embedded gate, XUSD per token: input {prices.input_xusd}, cached {prices.cached_xusd}, "
        f"output {prices.output_xusd}; 1 XUSD = $0.000001.[/]",
        highlight=False,
    )
    console.print()
    console.print(checks_table(books))
    console.print()
    verdict = "[bold green]All three books are equal.[/]" if books.hold else "[bold red]Something does not hold.[/]"
    console.print(
        f"{verdict} {len(books.entries)} calls, {requests} of them reached the provider, "
        f"{books.charged_xusd:,} XUSD ({dollars(books.charged_xusd)}) charged, {seconds:.1f} s.",
        highlight=False,
    )
