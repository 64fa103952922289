"""The commands. Each imports what it needs when it runs, so that ``--help`` is quick and asks for no other extra."""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .. import __version__
from ..errors import VlunaError
from .outbox import app as outbox_commands

if TYPE_CHECKING:
    from ..sandbox import Sandbox

SANDBOX_PORT = 8765
_LOG_COLUMNS = 120

app = typer.Typer(
    help="Billing for model calls with Vluna: authorize, meter, settle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class DialectName(str, Enum):
    """What the embedded gate can speak; an Enum, since not every version of typer knows literals."""

    lease_token = "lease_token"  # noqa: S105 - the name of a dialect
    lease = "lease"


def run() -> None:
    """Run a command. A mistake in the configuration is one sentence on standard error and exit code 2."""
    try:
        app(prog_name="vluna-llm")
    except VlunaError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None


def console_for(file: Any = None) -> Console:
    """A console that is as wide as the terminal; in a log, where there is no width, wide enough for the tables."""
    stream = file or sys.stdout
    if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
        stream.reconfigure(errors="replace")  # a log in ASCII must not end the demo
    width = None if stream.isatty() or os.environ.get("COLUMNS") else _LOG_COLUMNS
    return Console(file=stream, width=width)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vluna-llm {__version__}")
        raise typer.Exit


@app.callback()
def _vluna_llm(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print the books as JSON and nothing else.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Use your own OPENAI_API_KEY and VLUNA_* settings: this costs money.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --live: do not ask.")] = False,
    model: Annotated[str, typer.Option(help="With --live: the model to call.")] = "gpt-4o-mini",
    principal: Annotated[
        str | None, typer.Option(help="With --live: the customer to bill; default VLUNA_LLM_PRINCIPAL.")
    ] = None,
) -> None:
    """Show the whole loop on recorded answers: no account, no key, no network.

    Exit code 1 where the recordings, vluna-llm and the gate do not agree to the token.
    """
    if live and as_json:
        raise typer.BadParameter("--json shows the books of recorded answers; it does not go with --live.")
    with _extra("demo"):
        if live:
            from ..demo.live import run_live

            code = run_live(console_for(), model=model, principal=principal, ask=not yes)
        else:
            from ..demo.run import run_demo

            code = run_demo(console_for(), as_data=as_json)
    raise typer.Exit(code)


@app.command()
def sandbox(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 for a free one.", min=0, max=65535)] = SANDBOX_PORT,
    config: Annotated[Path | None, typer.Option(help="TOML file with prices, limits, credit, faults.")] = None,
    state: Annotated[Path | None, typer.Option(help="SQLite file that keeps the books; default: memory.")] = None,
    dialect: Annotated[DialectName | None, typer.Option(help="What the gate speaks; default lease_token.")] = None,
) -> None:
    """Serve the embedded gate on this machine, for development. Stop it with Ctrl-C."""
    with _extra("sandbox"):
        from ..sandbox.config import make_config
        from ..sandbox.server import serve

        overrides = {
            "state": None if state is None else str(state),
            "dialect": None if dialect is None else dialect.value,
        }
        chosen = make_config(config, **{name: value for name, value in overrides.items() if value is not None})

        def tell(gate: Sandbox) -> None:
            for name, value in gate.env().items():
                typer.echo(f"export {name}={shlex.quote(value)}")
            kept = "in memory" if chosen.state == "memory" else f"in {chosen.state}"
            typer.echo(f"# Embedded gate, dialect {chosen.dialect}, books {kept}. Ctrl-C stops it.")
            sys.stdout.flush()

        serve(chosen, port=port, ready=tell)


@app.command()
def verify(
    principal: Annotated[
        str | None, typer.Option(help="Also read this customer's limits; a gate creates customers that it first sees.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check the settings of this environment against the gate. No customer is created, no secret is shown.

    Exit code 1 where something would keep calls from being billed.
    """
    from .verify import failed, findings, show_findings

    found = list(findings(os.environ, principal=principal))
    show_findings(console_for(), found, as_json=as_json)
    raise typer.Exit(1 if failed(found) else 0)


app.add_typer(outbox_commands, name="outbox")


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Name the extra where a package of it is not there."""
    try:
        yield
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("vluna_llm"):
            raise
        sys.stderr.write(f"This command needs its extra: pip install 'vluna-llm[{name}]' ({error}).\n")
        raise typer.Exit(2) from None
