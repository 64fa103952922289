"""The commands ``vluna-llm outbox ...``. Each imports what it needs when it runs."""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..outbox.orders import What
    from .selection import Entry, Filter, Snapshot

TIMEOUT = 30.0
_LIST = "list"


class StateName(str, Enum):
    """What an operation waits as; an Enum, since not every version of typer knows literals."""

    pending = "pending"
    held = "held"
    dead = "dead"
    quarantined = "quarantined"
    lost = "lost"


class FormatName(str, Enum):
    """How it is exported."""

    jsonl = "jsonl"
    csv = "csv"


class _ListsByDefault(TyperGroup):
    """``outbox`` and ``outbox DIRECTORY`` list; a directory with the name of a command is written ``./retry``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # newer versions of typer have a click of their own
        if not args or (args[0] not in self.commands and args[0] not in ("--help", "-h")):
            args = [_LIST, *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


app = typer.Typer(
    cls=_ListsByDefault,
    rich_markup_mode=None,
    help="""What is not settled yet: list it (without a command), retry, repair, export or drop it.

\b
pending      on its way, or tried again soon
held         kept and tried slowly: mend the key, realm or price first
dead         the gate refused it; nothing is tried
quarantined  the gate took it and charged nothing: add the price, then repair
lost         its process died in the middle of the call: usage unknown

\b
Exit codes, for cron:
  0  nothing waits for a person
  1  something does: held, dead, quarantined, lost, or pending for longer than --max-age
  2  the settings or the command line are wrong
  3  a journal or the shared outbox cannot be read, so nobody knows what waits there
""",
)


def _seconds(text: str) -> float:
    from .selection import seconds

    try:
        return seconds(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Directory = Annotated[
    Path | None,
    typer.Option("--directory", "-d", help="Where to look; default VLUNA_LLM_OUTBOX, else every journal of this user."),
]
Ids = Annotated[
    list[str] | None,
    typer.Argument(help="Operations, by id or by the beginning of it.", show_default=False, metavar="ID"),
]
States = Annotated[list[StateName] | None, typer.Option("--state", help="Only what waits as this; may be repeated.")]
Principal = Annotated[str | None, typer.Option("--principal", help="Only of this customer.")]
OlderThan = Annotated[
    float | None,
    typer.Option("--older-than", parser=_seconds, metavar="TIME", help="Only what is older, e.g. 15min, 1h, 2d."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Timeout = Annotated[
    float, typer.Option("--timeout", parser=_seconds, metavar="TIME", help="How long to wait for what comes of it.")
]


@app.command(_LIST)
def list_(
    directory: Annotated[
        Path | None,
        typer.Argument(
            help="Where to look; default VLUNA_LLM_OUTBOX, else every journal of this user.", show_default=False
        ),
    ] = None,
    at: Directory = None,
    state: States = None,
    principal: Principal = None,
    older_than: OlderThan = None,
    max_age: Annotated[
        float,
        typer.Option("--max-age", parser=_seconds, metavar="TIME", help="Pending for longer is for a person."),
    ] = "1h",  # type: ignore[assignment] # parsed like what is given
    limit: Annotated[int, typer.Option("--limit", min=0, help="Rows of the table at most; 0 for all.")] = 100,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only where the exit code is not 0.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what is not settled; the default. Changes nothing. The exit code speaks of what is listed."""
    from .app import console_for
    from .listing import exit_code, show_json, show_table

    snapshot, entries = _find(directory or at, None, _filter(state, principal, older_than))
    code = exit_code(snapshot, entries, max_age)
    if as_json:
        show_json(console_for(), snapshot, entries, max_age)
    elif code or not quiet:
        show_table(console_for(), snapshot, entries, max_age, limit=limit)
    raise typer.Exit(code)


@app.command()
def retry(
    ids: Ids = None,
    every: Annotated[bool, typer.Option("--all", help="All that is pending, held or dead.")] = False,
    directory: Directory = None,
    state: States = None,
    principal: Principal = None,
    older_than: OlderThan = None,
    timeout: Timeout = "30s",  # type: ignore[assignment] # parsed like what is given
    as_json: AsJson = False,
) -> None:
    """Deliver now what is pending, held or dead: the same bytes under the same key, so never charged twice.

    A running process does it for its own operations, within seconds. For those of processes that ended this command
    does it, where the VLUNA_SERVICE_* settings are there; it then delivers all that is left in that directory.
    """
    wanted = _filter(state, principal, older_than)
    _refuse_without_selection(ids, every, state, principal, older_than)
    takes = frozenset({"pending", "held", "dead"})
    _order("retry", directory, ids, wanted, timeout, as_json, only=takes)


@app.command()
def repair(
    ids: Ids = None,
    every: Annotated[bool, typer.Option("--all", help="All that is quarantined or dead, and held ingests.")] = False,
    feature: Annotated[str | None, typer.Option("--feature", help="Only of this feature code.")] = None,
    directory: Directory = None,
    state: States = None,
    principal: Principal = None,
    older_than: OlderThan = None,
    timeout: Timeout = "30s",  # type: ignore[assignment] # parsed like what is given
    as_json: AsJson = False,
) -> None:
    """Book by ingest what the gate did not charge, once you have added the price or mended the feature there.

    The key is derived from the first one's, so that a repair itself is charged once. Prices are asked for before; a
    commit that may have been charged is looked up in the gate's own books, and left as it is where they do not tell.
    """
    wanted = _filter(state, principal, older_than, feature)
    _refuse_without_selection(ids, every, state, principal, older_than, feature)
    _order("repair", directory, ids, wanted, timeout, as_json, only=frozenset({"held", "quarantined", "dead"}))


@app.command()
def drop(
    ids: Annotated[list[str], typer.Argument(help="Operations, by id or by the beginning of it.", metavar="ID")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where they are written first; default a new file beside the journals."),
    ] = None,
    directory: Directory = None,
    timeout: Timeout = "30s",  # type: ignore[assignment] # parsed like what is given
    as_json: AsJson = False,
) -> None:
    """Give up operations that you have settled by hand: nothing more is sent for them, ever.

    They are written to a file first.
    """
    from rich.console import Console

    from ..outbox.row import unbilled
    from .app import console_for
    from .export import drop_file, text_of, write_private
    from .listing import show_entries
    from .selection import Filter

    snapshot, entries = _find(directory, ids, Filter())
    aside: Console = console_for(sys.stderr) if as_json else console_for()
    show_entries(aside, entries)
    tokens = sum(unbilled(entry.row) or 0 for entry in entries)
    sent = sum(entry.row.state.settlement == "sent" for entry in entries)
    unknown = f"; {sent} of them may have been charged already: no answer was seen" if sent else ""
    aside.print(f"Gives up {len(entries)} operation(s) with {tokens:,} known tokens{unknown}.", highlight=False)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigurationError("Nothing was dropped: pass --yes where nobody can be asked.")
        typer.confirm("Drop them?", abort=True, err=as_json)
    path = output or drop_file(snapshot.directory)
    if path.exists():
        raise ConfigurationError(f"{path} is there already; nothing was dropped. Name another file.")
    write_private(path, text_of(entries, "csv" if path.suffix.lower() == ".csv" else "jsonl"))
    aside.print(f"Written to {path}.", highlight=False, soft_wrap=True)
    _give(entries, "drop", timeout, as_json)


@app.command()
def export(
    ids: Ids = None,
    form: Annotated[FormatName, typer.Option("--format", help="JSON lines, or CSV.")] = FormatName.jsonl,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file, for its owner alone; default standard output.")
    ] = None,
    directory: Directory = None,
    state: States = None,
    principal: Principal = None,
    older_than: OlderThan = None,
) -> None:
    """Write what is listed for an accountant: who, what, when, how much and why. No lease, key or request is in it.

    Exit code 3 where a journal could not be read: then it is not everything.
    """
    from .export import text_of, write_private
    from .listing import CANNOT_READ, NOTHING_WAITS

    snapshot, entries = _find(directory, ids, _filter(state, principal, older_than))
    text = text_of(entries, form.value)
    if output is None:
        sys.stdout.write(text)
    else:
        write_private(output, text)
        typer.echo(f"{len(entries)} operation(s) written to {output}.", err=True)
    for problem in snapshot.problems:
        typer.echo(f"cannot read {problem.where}: {problem.problem}", err=True)
    raise typer.Exit(CANNOT_READ if snapshot.problems else NOTHING_WAITS)


# -- what they share ---------------------------------------------------------------------------------------------------


def _filter(
    state: list[StateName] | None, principal: str | None, older_than: float | None, feature: str | None = None
) -> Filter:
    from .selection import Filter

    return Filter(frozenset(one.value for one in state or ()), principal, feature, older_than)


def _find(directory: Path | None, ids: list[str] | None, wanted: Filter) -> tuple[Snapshot, list[Entry]]:
    from .selection import chosen, look

    snapshot = look(directory, os.environ)
    return snapshot, chosen(snapshot, ids or (), wanted)


def _refuse_without_selection(ids: list[str] | None, every: bool, *filters: object) -> None:
    if not ids and not every and not any(filters):
        raise ConfigurationError("Say which: ids, --all, or a filter like --state or --principal.")
    if ids and every:
        raise ConfigurationError("Either ids or --all.")


def _order(
    what: What,
    directory: Path | None,
    ids: list[str] | None,
    wanted: Filter,
    timeout: float,
    as_json: bool,
    *,
    only: frozenset[str],
) -> None:
    snapshot, entries = _find(directory, ids, wanted)
    if not ids:
        entries = [entry for entry in entries if entry.state in only]
    for problem in snapshot.problems:
        typer.echo(f"cannot read {problem.where}: {problem.problem}", err=True)
    _give(entries, what, timeout, as_json, unreadable=bool(snapshot.problems))


def _give(entries: list[Entry], what: What, timeout: float, as_json: bool, *, unreadable: bool = False) -> None:
    from .app import console_for
    from .listing import CANNOT_READ
    from .ordering import give_orders, show_outcomes

    outcomes = give_orders(entries, what, os.environ, timeout)
    code = show_outcomes(console_for(), outcomes, as_json=as_json)
    raise typer.Exit(CANNOT_READ if unreadable else code)
