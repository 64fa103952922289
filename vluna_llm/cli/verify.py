"""``vluna-llm verify``: each setting of the environment, and the gate that it names, with what to fix.

No secret is shown, no customer is created: the signature is checked by a signed read that names no customer, which a
gate refuses only after it has accepted key and signature (gate contract 3.4).
"""

from __future__ import annotations

import difflib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import ConfigurationError, GateAuthError, GateError, GateUnavailable
from ..gate import answers
from ..gate.client import GateClient
from ..gate.credentials import SECRET_BYTES, GateCredentials
from ..gate.failures import is_missing_route
from ..gate.requests import POST_PATHS, GateRequest, new_key
from ..gate.wire import Answer
from ..outbox.reading import journals_below, read_journal
from ..outbox.waiting import waiting_as
from ..settings import Settings
from ..usage.features import FeatureMap

Status = Literal["ok", "warn", "fail", "skip"]

TIMEOUT = 5.0
"""Seconds for each question to the gate."""

CLOCK_TOLERANCE = 30.0
"""Seconds by which this clock and the gate's may differ before it is worth a warning."""

_URL, _REALM, _KEY, _SECRET = (
    "VLUNA_SERVICE_BASE_URL",
    "VLUNA_REALM_ID",
    "VLUNA_SERVICE_KEY_ID",
    "VLUNA_SERVICE_KEY_SECRET",
)
_MISSING = {
    _URL: "Set it to the address of your gate, e.g. https://gate.example.com/mgt/v1.",
    _REALM: "Set it to the id of your realm.",
    _KEY: "Set it to the id of your service key, e.g. pk-...",
    _SECRET: "Set it to the base64 secret that was shown when the service key was made.",
}
_WRONG_PATH = f"Correct {_URL}: it is the gate's address, path included (usually ending in /mgt/v1)."
_STYLES: Mapping[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``found`` never holds a secret; ``fix`` says what to do, where there is a need."""

    name: str
    status: Status
    found: str
    fix: str | None = None


def failed(found: list[Finding]) -> bool:
    """Whether something would keep calls from being billed."""
    return any(finding.status == "fail" for finding in found)


def findings(environ: Mapping[str, str], *, principal: str | None = None) -> Iterator[Finding]:
    """Look at the settings, then ask the gate. ``environ`` must be the environment that `Settings` reads.

    Args:
        environ: where the settings are.
        principal: a customer whose limits are read as well; the gate creates it where it does not know it.
    """
    credentials = list(_credentials(environ))
    yield from credentials
    settings, others = _settings(environ)
    yield from others
    if failed(credentials):
        yield Finding("gate", "skip", "not asked: the settings above come first")
        return
    allow = settings is not None and settings.allow_plaintext
    key = GateCredentials(environ[_URL], environ[_REALM], environ[_KEY], environ[_SECRET], allow_plaintext=allow)
    with GateClient(key, timeout=TIMEOUT) as client:
        yield from _gate(client, principal)


# -- settings ----------------------------------------------------------------------------------------------------------


def _credentials(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Each of the four by itself: checked beside values for the others that are known to be good."""
    url, spare = "https://gate.example.com/mgt/v1", b"\0" * SECRET_BYTES
    plaintext = environ.get("VLUNA_LLM_ALLOW_PLAINTEXT", "").lower() in ("1", "true", "yes", "on", "t", "y")
    checks: Mapping[str, Callable[[str], object]] = {
        _URL: lambda value: GateCredentials(value, "r", "k", spare, allow_plaintext=plaintext),
        _REALM: lambda value: GateCredentials(url, value, "k", spare),
        _KEY: lambda value: GateCredentials(url, "r", value, spare),
        _SECRET: lambda value: GateCredentials(url, "r", "k", value),
    }
    for name, check in checks.items():
        value = environ.get(name, "")
        if not value.strip():
            yield Finding(name, "fail", "not set", _MISSING[name])
            continue
        try:
            check(value)
        except ConfigurationError as error:
            text = str(error)
            what, _, fix = text.removeprefix(f"{name} ").partition("; ")
            yield Finding(name, "fail", what, fix[:1].upper() + fix[1:] or None)
        else:
            yield Finding(name, "ok", f"set, {SECRET_BYTES} bytes" if name == _SECRET else value)


def _settings(environ: Mapping[str, str]) -> tuple[Settings | None, list[Finding]]:
    found = list(_misspelt(environ))
    try:
        settings = Settings()
    except ConfigurationError as error:
        # One sentence may name several settings; none of them is lost.
        names = re.findall(r"VLUNA_LLM_[A-Z_]+", str(error))
        found.append(Finding(names[0] if names else "VLUNA_LLM_*", "fail", str(error), "Correct or unset it."))
        return None, found
    if settings.mode == "off":
        found.append(Finding("VLUNA_LLM_MODE", "warn", "off: no call is gated or billed", "Set it to enforce."))
    else:
        tail = "calls are refused where the gate refuses" if settings.mode == "enforce" else "nothing is ever refused"
        found.append(Finding("VLUNA_LLM_MODE", "ok", f"{settings.mode}: {tail}"))
    if settings.features is not None:
        found.append(_features(settings))
    if settings.outbox or not settings.missing_credentials():
        found.append(_outbox(settings))
    return settings, found


def _misspelt(environ: Mapping[str, str]) -> Iterator[Finding]:
    known = {f"VLUNA_LLM_{name.upper()}" for name in Settings.model_fields}
    known |= {_URL, _REALM, _KEY, _SECRET}
    for name in sorted(environ):
        if name.startswith(("VLUNA_LLM_", "VLUNA_SERVICE_", "VLUNA_REALM")) and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            fix = f"Did you mean {close[0]}?" if close else "Unset it."
            yield Finding(name, "warn", "is no setting, so nothing reads it", fix)


def _features(settings: Settings) -> Finding:
    try:
        FeatureMap.from_dict(settings.load_features())
    except ConfigurationError as error:
        return Finding("VLUNA_LLM_FEATURES", "fail", str(error), "Correct the file.")
    return Finding("VLUNA_LLM_FEATURES", "ok", str(settings.features))


def _outbox(settings: Settings) -> Finding:
    name, directory = "VLUNA_LLM_OUTBOX", settings.outbox_directory()
    if directory is None:
        return Finding(name, "warn", "memory: a crash loses what is not delivered", "Set it to a directory.")
    existing = next((place for place in (directory, *directory.parents) if place.exists()), Path("/"))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(name, "fail", f"{existing} cannot be written", "Set it to a directory that can be written.")
    rows = [row for path in journals_below(directory) for row in read_journal(path).rows]
    waiting = sum(waiting_as(row) is not None for row in rows)
    if waiting:
        return Finding(name, "warn", f"{directory}: {waiting} not settled", "Look at: vluna-llm outbox")
    return Finding(name, "ok", str(directory))


# -- the gate ----------------------------------------------------------------------------------------------------------


def _gate(client: GateClient, principal: str | None) -> Iterator[Finding]:
    health = _health(client)
    yield health
    if health.status == "fail":
        yield Finding("signature", "skip", "not asked: there is no gate to ask")
        return
    probe = GateRequest("limits", "GET", "/gate/limits")
    try:
        answer = client.send(probe)
        signature = _signature(answer, client)
    except GateError as error:
        signature, answer = _failure("signature", error), None
    yield signature
    if answer is not None:
        yield _clock(answer, time.time())
    if signature.status != "ok":
        yield Finding("dialect", "skip", "not asked: the signature comes first")
        return
    yield _dialect(client)
    if principal is not None:
        yield _limits(client, principal)


def _health(client: GateClient) -> Finding:
    try:
        health = client.health()
    except GateUnavailable as error:
        if error.status is None:
            what = error.message.removeprefix("no answer from the gate: ")
            url = client.credentials.base_url
            fix = f"Start the gate, or correct {_URL}."
            return Finding("health", "fail", f"nothing answers at {url} ({what})", fix)
        return _unhealthy(error)
    except GateError as error:
        return _unhealthy(error)
    if not health.healthy:
        return Finding("health", "warn", f"the gate says {health.status or 'nothing'}", "Look at the gate's own log.")
    return Finding("health", "ok", health.status or "")


def _unhealthy(error: GateError) -> Finding:
    # A proxy may let the API through and not /health, so this alone decides nothing.
    where = f"/health answers {error.status}, not as a gate does"
    return Finding("health", "warn", where, f"Let the proxy pass /health, or correct {_URL}.")


def _signature(answer: Answer, client: GateClient) -> Finding:
    try:
        answers.parse_limits(answer, now=client.clock())
    except GateAuthError as error:
        if error.code == "AUTH.MISSING_RUNTIME_BINDINGS":
            return Finding("signature", "ok", "key and signature are accepted")
        return _failure("signature", error)
    except GateError as error:
        if is_missing_route(error):
            return Finding("signature", "fail", f"{error.status}: {error.message}", _WRONG_PATH)
        return _failure("signature", error)
    if not _is_list(answer.body):
        what = f"what answers at {client.credentials.base_url} is not a gate"
        return Finding("signature", "fail", what, _WRONG_PATH)
    return Finding("signature", "ok", "key and signature are accepted")


def _is_list(body: bytes) -> bool:
    try:
        envelope = json.loads(body)
    except ValueError:
        return False
    return isinstance(envelope, dict) and isinstance(envelope.get("data"), (list, dict))


def _failure(name: str, error: GateError) -> Finding:
    head = " ".join(str(part) for part in (error.status, error.code) if part is not None)
    return Finding(name, "fail", f"{head + ': ' if head else ''}{error.message}", error.advice)


def _clock(answer: Answer, now: float) -> Finding:
    header = answer.headers.get("date", "")
    try:
        theirs = parsedate_to_datetime(header).timestamp()
    except (TypeError, ValueError):
        return Finding("clock", "skip", "the gate does not tell its time")
    off = now - theirs
    if abs(off) > CLOCK_TOLERANCE:
        side = "ahead of" if off > 0 else "behind"
        fix = "Set this machine's clock: late bookings carry its time, and waits are counted from the gate's."
        return Finding("clock", "warn", f"{abs(off):.0f} s {side} the gate's", fix)
    return Finding("clock", "ok", "agrees with the gate's")


def _dialect(client: GateClient) -> Finding:
    """By the route that only one of them has; the question names no customer (gate contract 14)."""
    ask = GateRequest("preflight", "POST", POST_PATHS["preflight"], b"{}", new_key("verify"))
    try:
        answers.parse_preflight(client.send(ask), now=client.clock())
    except GateError as error:
        if is_missing_route(error):
            return Finding("dialect", "ok", "lease_token: cancel, no preflight")
        if error.status is None or error.status >= 500:
            return Finding("dialect", "skip", f"could not be found out ({error.message})")
    return Finding("dialect", "ok", "lease: preflight, no cancel; leases lapse")


def _limits(client: GateClient, principal: str) -> Finding:
    name = f"limits of {principal}"
    # The first request of a customer that the realm has never seen answers 500 (gate contract 4).
    for attempt in (1, 2):
        try:
            limits = client.limits(principal_id=principal)
        except GateUnavailable as error:
            if attempt == 2 or not error.retryable:
                return _failure(name, error)
        except GateError as error:
            return _failure(name, error)
        else:
            return Finding(name, "ok", f"{len(limits.items)} feature(s)")
    raise AssertionError("unreachable")


# -- showing -----------------------------------------------------------------------------------------------------------


def show_findings(console: Console, found: list[Finding], *, as_json: bool) -> None:
    """Print a table, or JSON."""
    if as_json:
        data = {"ok": not failed(found), "findings": [asdict(finding) for finding in found]}
        console.file.write(json.dumps(data, indent=2) + "\n")
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold", ratio=1)
    for finding in found:
        text = Text(finding.found)
        if finding.fix:
            text.append(f"\n{finding.fix}", style="cyan")
        table.add_row(Text(finding.status, style=_STYLES[finding.status]), finding.name, text)
    console.print(table)
    wrong = sum(finding.status == "fail" for finding in found)
    if wrong:
        console.print(f"[bold red]{wrong} to fix before calls can be billed.[/]", highlight=False)
    else:
        console.print("[bold green]Ready:[/] calls can be gated and billed.", highlight=False)
