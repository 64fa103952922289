"""``vluna-llm demo --live``: the user's own provider key and gate. Says first what it will spend, and asks."""

from __future__ import annotations

import os
import sys

import openai
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..context import Scope, call_context
from ..errors import ConfigurationError, GateDenied, GateRateLimited, VlunaError
from ..settings import Settings
from ..vluna import Vluna
from .tables import dollars

PROMPT = "Say in one short sentence what a lighthouse is for."
MAX_INPUT = 40
"""Tokens: more than the prompt has with any tokenizer."""
MAX_OUTPUT = 64
"""Tokens: the limit that goes along with each call."""
CALLS = ("plain", "streamed")
_DEAR = 200
"""US dollars for a million tokens: more than any model costs that one would try this with."""
_SETTLE_SECONDS = 20.0


def run_live(console: Console, *, model: str, principal: str | None, ask: bool) -> int:
    """Make two small calls with the user's own settings and show what they cost; gives the exit code.

    Raises:
        ConfigurationError: a setting is missing or wrong; nothing was called.
    """
    settings = Settings()
    payer = _check(settings, principal)
    vluna = Vluna(settings)
    client = vluna.wrap(openai.OpenAI(max_retries=0))
    _announce(console, settings, str(client.base_url), model, payer)
    if ask and not _agreed(console):
        console.print("Nothing was called.")
        return 1
    with vluna:
        done = [_one(console, client, model, payer, kind) for kind in CALLS]
        settled = all(scope.wait(_SETTLE_SECONDS) for scope in done if scope is not None)
    _show(console, [scope for scope in done if scope is not None])
    if not settled:
        console.print("[yellow]Not all is settled yet; it is kept: vluna-llm outbox[/]")
    charged = all(receipt.charged for scope in done if scope for receipt in scope.receipts)
    return 0 if settled and charged and all(scope is not None for scope in done) else 1


def _check(settings: Settings, principal: str | None) -> str:
    """Everything that is needed, before anything is said or spent; gives the customer to bill."""
    settings.require_credentials()
    if settings.mode == "off":
        raise ConfigurationError("VLUNA_LLM_MODE is 'off', so nothing would be gated or billed; set it to 'enforce'.")
    if not os.environ.get("OPENAI_API_KEY"):
        raise ConfigurationError(
            "OPENAI_API_KEY is not set; --live needs your own key (without --live none is needed)."
        )
    payer = principal or settings.principal
    if not payer:
        raise ConfigurationError(
            "Nobody to bill: pass --principal with a customer of your gate, or set VLUNA_LLM_PRINCIPAL."
        )
    return payer


def _announce(console: Console, settings: Settings, provider: str, model: str, payer: str) -> None:
    most = len(CALLS) * (MAX_INPUT + MAX_OUTPUT)
    bound = most * _DEAR / 1_000_000
    console.print("[bold]vluna-llm demo --live[/]: this uses your own keys and costs money.")
    for name, text in (
        ("provider", f"{provider}, with your OPENAI_API_KEY"),
        ("model", model),
        ("calls", f"{len(CALLS)}: {' and '.join(CALLS)}; at most {MAX_OUTPUT} output tokens each, no retries"),
        ("at most", f"{most} tokens at your provider's price (under ${bound:.2f} even at ${_DEAR} a million)"),
        ("gate", f"{settings.base_url}, realm {settings.realm_id}"),
        ("billed to", f"{payer}, at your gate's prices; a gate creates a customer that it does not know"),
    ):
        console.print(f"  {name:<10}{escape(text)}", highlight=False, soft_wrap=True)


def _agreed(console: Console) -> bool:
    if not sys.stdin.isatty():
        raise ConfigurationError("There is no terminal to ask on: pass --yes if this may be spent.")
    return console.input("Go on? \\[y/N] ").strip().lower() in ("y", "yes")


def _one(console: Console, client: openai.OpenAI, model: str, payer: str, kind: str) -> Scope | None:
    """One call; None where it was refused or failed, which is told."""
    scope = None
    try:
        with call_context(principal_id=payer, labels={"demo": "live"}) as scope:
            if kind == "plain":
                answer = client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": PROMPT}], max_completion_tokens=MAX_OUTPUT
                )
                text = answer.choices[0].message.content or ""
            else:
                chunks = client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": PROMPT}],
                    max_completion_tokens=MAX_OUTPUT,
                    stream=True,
                )
                text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    except (GateDenied, GateRateLimited) as error:
        console.print(f"[red]refused[/] before the provider was called: {escape(str(error))}", highlight=False)
        return None
    except VlunaError as error:
        console.print(f"[red]not called[/]: {escape(str(error))}", highlight=False)
        return None
    except Exception as error:
        # The SDK's own errors, and those of the HTTP library below it when a stream breaks.
        console.print(f"[red]the provider failed[/]: {escape(f'{type(error).__name__}: {error}')}", highlight=False)
        return None
    console.print(f"  {kind:<10}[dim]{escape(text.strip())}[/]", highlight=False)
    return scope


def _show(console: Console, scopes: list[Scope]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("operation", "customer", "model"):
        table.add_column(name, overflow="fold")
    for name in ("input", "cached", "output", "XUSD", "$"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state")
    table.add_column("hints", style="cyan")
    for receipt in (receipt for scope in scopes for receipt in scope.receipts):
        xusd = receipt.charged_xusd or 0
        table.add_row(
            receipt.operation_id[:8],
            receipt.principal_id,
            receipt.model or "",
            *(f"{count:,}" for count in (receipt.input_tokens, receipt.cached_tokens, receipt.output_tokens)),
            f"{xusd:,}",
            dollars(xusd),
            receipt.state if receipt.usage_source != "estimated" else f"{receipt.state}, estimated",
            ", ".join(hint.type for hint in receipt.hints),
        )
    console.print(table)
