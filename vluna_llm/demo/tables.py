"""The demo's tables, for terminals of 80 columns and more and for logs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .books import Books, Entry, Tokens

WIDE = 120
"""Columns from which the kind of the call, dollars and hints have columns of their own."""

GROUPED = frozenset({"burst"})
"""Steps whose operations are shown together, by customer."""

_NARROW_HINT = 15
_STATE_STYLES = {
    "booked": "green",
    "rebooked": "green",
    "cancelled": "yellow",
    "refused": "red",
    "pending": "bold red",
    "quarantined": "bold red",
}
_SHORT = {
    "denied: insufficient_credit": "denied: credit",
    "left early": "left",
    "broke off": "cut",
    "completions": "complete",
}


def dollars(xusd: int) -> str:
    """An amount in US dollars: 1 XUSD is a millionth of one."""
    return f"${xusd / 1_000_000:.6f}"


def calls_table(books: Books, console: Console) -> Table:
    """Every operation in one line; those of a burst together, by customer."""
    wide = console.width >= WIDE
    table = _table("Operations, as the gate booked them")
    table.add_column("id", no_wrap=True, style="dim")
    table.add_column("customer", no_wrap=True)
    if wide:
        table.add_column("call", no_wrap=True)
    table.add_column("model", no_wrap=True, overflow="ellipsis", max_width=13, style="dim")
    table.add_column("est.", justify="right", no_wrap=True, style="dim")
    for name in ("input", "cached", "output", "XUSD"):
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("$", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    if wide:
        table.add_column("hints", no_wrap=True, style="cyan")
    for step, entries in groupby(books.entries, key=lambda entry: entry.call.step):
        for same in _rows(step, list(entries)):
            table.add_row(*_cells(same, wide=wide))
        table.add_section()
    total = [f"{count:,}" for count in _charged(books.entries)]
    money = [f"{books.charged_xusd:,}", *([dollars(books.charged_xusd)] if wide else [])]
    table.add_row("", "all", *([""] if wide else []), "", "", *total, *money, style="bold")
    table.caption = 'est.: tokens told to authorize; models without their "smollm2-"' + ("; * streamed" if wide else "")
    table.caption_justify = "left"
    return table


def _rows(step: str, entries: list[Entry]) -> Iterable[list[Entry]]:
    if step not in GROUPED:
        return [[entry] for entry in entries]
    entries.sort(key=lambda entry: entry.call.customer)
    return [list(same) for _, same in groupby(entries, key=lambda entry: entry.call.customer)]


def _cells(entries: list[Entry], *, wide: bool) -> list[Text | str]:
    call = entries[0].call
    models = list(dict.fromkeys(entry.call.model for entry in entries))
    model = models[0] if len(models) == 1 else f"{len(models)} models"
    tokens = _charged(entries)
    xusd = sum(entry.charged_xusd for entry in entries)
    hints = list(dict.fromkeys(hint for entry in entries for hint in entry.hints))
    cells: list[Text | str] = [entries[0].operation_id[:5] if len(entries) == 1 else f"× {len(entries)}"]
    cells.append(call.customer)
    if wide:
        kind = _SHORT.get(call.kind, call.kind) + ("*" if call.streamed else "")
        cells.append(kind if len(entries) == 1 else "mixed")
    cells.append(model.removeprefix("smollm2-"))
    cells.append(f"{sum(entry.estimate.input + entry.estimate.output for entry in entries):,}")
    cells += [f"{count:,}" for count in tokens] if tokens != Tokens() else ["-", "-", "-"]
    cells.append(f"{xusd:,}")
    state = _state(entries)
    if wide:
        return [*cells, dollars(xusd), state, "\n".join(hints)]
    short = [hint if len(hint) <= _NARROW_HINT else hint.rpartition(".")[2] for hint in hints]
    return [*cells, Text("\n").join([state, *(Text(hint, style="cyan") for hint in short)])]


def _state(entries: list[Entry]) -> Text:
    states = list(dict.fromkeys(entry.state for entry in entries))
    style = _STATE_STYLES.get(states[0], "") if len(states) == 1 else "bold red"
    first = entries[0]
    if first.call.outcome == "refused":
        why = first.call.detail or "refused"
        return Text(_SHORT.get(why, why), style=style)
    text = Text(", ".join(states), style=style)
    if len(entries) == 1 and first.estimated:
        text.append(", est.", style="magenta")
    elif len(entries) == 1 and first.by_ingest:
        text.append(", ingest", style="blue")
    elif len(entries) == 1 and first.call.outcome != "answered":
        text.append(f" {_SHORT[first.call.outcome]}", style="dim")
    return text


def books_table(books: Books, console: Console) -> Table:
    """The three books side by side, by customer, and whether they are equal."""
    wide = console.width >= 100
    table = _table("Three books, by customer: input / cached / output tokens")
    table.add_column("customer", no_wrap=True)
    table.add_column("calls", justify="right", no_wrap=True)
    for name in ("recordings", "vluna-llm", "gate"):
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("XUSD", justify="right", no_wrap=True)
    table.add_column("$", justify="right", no_wrap=True)
    table.add_column("equal", no_wrap=True)
    for account in books.accounts:
        money = [f"{account.charged_xusd:,}"] if wide else []
        table.add_row(
            account.customer,
            str(account.calls),
            *(_triple(tokens, wide=wide) for tokens in (account.recorded, account.settled, account.charged)),
            *money,
            dollars(account.charged_xusd),
            _mark(account.agrees),
        )
    table.add_section()
    for entry in books.estimates:
        money = [f"{entry.charged_xusd:,}"] if wide else []
        table.add_row(
            entry.call.customer,
            "1",
            Text("none", style="dim"),
            *(Text(f"≈ {_triple(tokens, wide=wide)}", style="magenta") for tokens in (entry.settled, entry.charged)),
            *money,
            dollars(entry.charged_xusd),
            _mark(entry.agrees),
        )
    if books.estimates:
        table.caption = "≈ estimated: the recorded server reports no usage on streams, so there are only two books."
        table.caption_justify = "left"
    return table


def checks_table(books: Books) -> Table:
    """What has to hold, and whether it does."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in books.checks:
        table.add_row(_mark(check.holds), check.what)
    return table


def _table(title: str) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_style="bold",
        title_justify="left",
        pad_edge=False,
        padding=0,
        show_edge=False,
    )


def _mark(holds: bool) -> Text:
    return Text("OK", style="bold green") if holds else Text("MISMATCH", style="bold red")


def _triple(tokens: Tokens, *, wide: bool) -> str:
    return (" / " if wide else "/").join(f"{count:,}" for count in tokens)


def _charged(entries: Iterable[Entry]) -> Tokens:
    total = Tokens()
    for entry in entries:
        total = total.plus(entry.charged)
    return total
