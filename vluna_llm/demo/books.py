"""Three books of the same calls: what the recordings report, what vluna-llm settled, what the gate charged.

They are written by three parties that do not know each other: the recordings' servers counted when they were recorded,
vluna-llm read the answers on their way, the gate rated what it was told. They are joined by our request id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..outbox.row import Row
from ..sandbox.booked import BookedEntry
from ..sandbox.config import DefaultsConfig
from ..sandbox.replay import Served
from .player import Call


class Tokens(NamedTuple):
    """Tokens of one or more calls: all input, the cached part of it, all output."""

    input: int = 0
    cached: int = 0
    output: int = 0

    def plus(self, other: Tokens) -> Tokens:
        """The sum of both."""
        return Tokens(*(mine + others for mine, others in zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True)
class Entry:
    """One call in all three books. Money is XUSD; ``state`` is the receipt's, or ``refused`` where there was no call.

    ``recorded`` is None where the recording's server reported no usage: nobody can know better, and what the other two
    books hold is an estimate.
    """

    call: Call
    operation_id: str
    estimate: Tokens
    recorded: Tokens | None
    settled: Tokens
    charged: Tokens
    settled_xusd: int
    charged_xusd: int
    state: str
    served_whole: bool
    estimated: bool
    by_ingest: bool
    hints: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether the books hold the same tokens and money for it."""
        same = self.settled == self.charged and self.settled_xusd == self.charged_xusd
        return same and (self.recorded is None or self.recorded == self.settled)


@dataclass(frozen=True, slots=True)
class Account:
    """One customer in all three books: calls whose usage was reported, by the token."""

    customer: str
    calls: int
    recorded: Tokens
    settled: Tokens
    charged: Tokens
    settled_xusd: int
    charged_xusd: int
    price_list_xusd: int

    @property
    def agrees(self) -> bool:
        """Whether the three books are equal to the token, and the money is that of the price list."""
        return self.recorded == self.settled == self.charged and (
            self.settled_xusd == self.charged_xusd == self.price_list_xusd
        )


class Check(NamedTuple):
    """Something that has to hold at the end of the demo."""

    holds: bool
    what: str


@dataclass(frozen=True, slots=True)
class Books:
    """All entries, oldest first, and the prices (XUSD per token) that the gate was told."""

    entries: tuple[Entry, ...]
    prices: DefaultsConfig
    unclaimed: int
    outstanding: int

    @property
    def accounts(self) -> list[Account]:
        """The customers, over their calls with a reported usage."""
        reported = [entry for entry in self.entries if entry.recorded is not None]
        return [self._account(name, entries) for name, entries in _by_customer(reported)]

    @property
    def estimates(self) -> list[Entry]:
        """The calls whose recordings report no usage."""
        return [entry for entry in self.entries if entry.estimated]

    @property
    def refused(self) -> list[Entry]:
        """The calls that were refused before the provider was called."""
        return [entry for entry in self.entries if entry.call.outcome == "refused"]

    @property
    def charged_xusd(self) -> int:
        """What the gate charged altogether."""
        return sum(entry.charged_xusd for entry in self.entries)

    @property
    def checks(self) -> list[Check]:
        """What has to hold; the demo fails where one does not."""
        accounts, estimates, refused = self.accounts, self.estimates, self.refused
        given_up = [entry for entry in self.entries if entry.call.outcome in ("left early", "broke off")]
        # On a machine that is slow enough another call may be late at the gate as well: it is booked all the same.
        ungated = [entry for entry in self.entries if entry.by_ingest and entry.call.step == "ungated"]
        return [
            Check(
                all(account.agrees for account in accounts) and all(entry.agrees for entry in self.entries),
                f"recordings = vluna-llm = gate, to the token, for {sum(account.calls for account in accounts)} "
                f"calls of {len(accounts)} customers",
            ),
            Check(
                len(refused) == 2 and all(entry.call.upstream_requests == 0 for entry in refused),
                f"{len(refused)} refused calls never reached the provider",
            ),
            Check(
                len(given_up) == 2 and all(_was_given_up(entry) for entry in given_up),
                f"{len(given_up)} answers that were given up were cancelled and cost nothing",
            ),
            Check(
                len(estimates) == 2 and all(entry.agrees and entry.charged.output for entry in estimates),
                f"{len(estimates)} answers without usage are booked by estimate, and say so",
            ),
            Check(
                len(ungated) == 3 and all(entry.state == "booked" for entry in ungated),
                f"{len(ungated)} calls made while the gate was away are booked",
            ),
            Check(
                self.outstanding == 0 and self.unclaimed == 0,
                "nothing is left in the outbox, and the gate charged nothing else",
            ),
        ]

    @property
    def hold(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)

    def _account(self, customer: str, entries: list[Entry]) -> Account:
        recorded = _sum(entry.recorded or Tokens() for entry in entries)
        return Account(
            customer,
            len(entries),
            recorded,
            _sum(entry.settled for entry in entries),
            _sum(entry.charged for entry in entries),
            sum(entry.settled_xusd for entry in entries),
            sum(entry.charged_xusd for entry in entries),
            price_list(recorded, self.prices),
        )


def price_list(tokens: Tokens, prices: DefaultsConfig) -> int:
    """What these tokens cost by the gate's prices, worked out here and not by the gate. XUSD."""
    return (
        (tokens.input - tokens.cached) * (prices.input_xusd or 0)
        + tokens.cached * (prices.cached_xusd or 0)
        + tokens.output * (prices.output_xusd or 0)
    )


def keep_books(
    calls: Iterable[Call],
    *,
    served: Iterable[Served],
    journal: Iterable[Row],
    gate: Iterable[BookedEntry],
    hints: Callable[[str], tuple[str, ...]],
    prices: DefaultsConfig,
    outstanding: int,
) -> Books:
    """Join what the three parties wrote down. ``hints`` gives the types of an operation's hints by its id."""
    at_upstream = {one.request_id: one for one in served}
    in_journal = {row.request_id: row for row in journal}
    at_gate: dict[str, list[BookedEntry]] = {}
    for booked in gate:
        at_gate.setdefault(booked.labels.get("request_id", ""), []).append(booked)
    entries = tuple(
        _entry(
            call,
            None if call.served_id is None else at_upstream.get(call.served_id),
            in_journal.get(call.request_id),
            at_gate.pop(call.request_id, []),
            hints,
        )
        for call in calls
    )
    return Books(entries, prices, sum(map(len, at_gate.values())), outstanding)


def _entry(
    call: Call,
    served: Served | None,
    row: Row | None,
    booked: list[BookedEntry],
    hints: Callable[[str], tuple[str, ...]],
) -> Entry:
    receipt = call.receipt
    settled = Tokens()
    if receipt is not None and receipt.charged:
        settled = Tokens(receipt.input_tokens, receipt.cached_tokens, receipt.output_tokens)
    operation_id = row.operation_id if row is not None else ""
    return Entry(
        call=call,
        operation_id=operation_id,
        estimate=Tokens(row.estimated_input, 0, row.estimated_output) if row is not None else Tokens(),
        recorded=_recorded(call, served),
        settled=settled,
        charged=_sum(_charged(one) for one in booked if one.status == "applied"),
        settled_xusd=(receipt.charged_xusd or 0) if receipt is not None else 0,
        charged_xusd=sum(one.charged_xusd for one in booked),
        state="refused" if call.outcome == "refused" else receipt.state if receipt is not None else "pending",
        served_whole=served is not None and served.complete,
        estimated=any(one.labels.get("usage_source") == "estimated" for one in booked),
        by_ingest=any(one.kind == "ingest" for one in booked),
        hints=hints(operation_id),
    )


def _recorded(call: Call, served: Served | None) -> Tokens | None:
    """What the recording reports for this call: nothing where its usage never left the server."""
    if call.outcome != "answered" or served is None:
        return Tokens()
    if served.tokens is None:
        return None
    return Tokens(*served.tokens) if served.usage_sent else Tokens()


def _charged(booked: BookedEntry) -> Tokens:
    """The tokens that the gate charged, from the names of the meters alone."""
    by_kind = {"cached": 0, "output": 0, "input": 0}
    for meter, quantity in booked.lines.items():
        kind = meter.rpartition(".")[2]
        by_kind[kind if kind in by_kind else "input"] += quantity
    return Tokens(by_kind["input"] + by_kind["cached"], by_kind["cached"], by_kind["output"])


def _was_given_up(entry: Entry) -> bool:
    """Half an answer was served, and neither the lease nor anything else of it was charged."""
    return (
        entry.state == "cancelled"
        and entry.call.served_id is not None
        and not entry.served_whole
        and entry.charged_xusd == 0
        and entry.charged == Tokens()
    )


def _by_customer(entries: Iterable[Entry]) -> list[tuple[str, list[Entry]]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.call.customer, []).append(entry)
    return list(found.items())


def _sum(tokens: Iterable[Tokens]) -> Tokens:
    total = Tokens()
    for one in tokens:
        total = total.plus(one)
    return total


def as_json(books: Books, *, recorded_by: list[str], upstream_requests: int, seconds: float) -> dict[str, Any]:
    """The books as plain JSON values; money in XUSD, tokens as ``{input, cached, output}``."""
    return {
        "ok": books.hold,
        "recorded_by": recorded_by,
        "seconds": round(seconds, 2),
        "upstream_requests": upstream_requests,
        "charged_xusd": books.charged_xusd,
        "checks": [{"what": check.what, "holds": check.holds} for check in books.checks],
        "customers": [
            {
                "customer": account.customer,
                "calls": account.calls,
                "recordings": account.recorded._asdict(),
                "vluna_llm": {**account.settled._asdict(), "xusd": account.settled_xusd},
                "gate": {**account.charged._asdict(), "xusd": account.charged_xusd},
                "price_list_xusd": account.price_list_xusd,
                "equal": account.agrees,
            }
            for account in books.accounts
        ],
        "calls": [_call_as_json(entry) for entry in books.entries],
    }


def _call_as_json(entry: Entry) -> dict[str, Any]:
    call = entry.call
    return {
        "request_id": call.request_id,
        "operation_id": entry.operation_id,
        "step": call.step,
        "customer": call.customer,
        "kind": call.kind,
        "streamed": call.streamed,
        "model": call.model,
        "outcome": call.outcome,
        "detail": call.detail,
        "upstream_requests": call.upstream_requests,
        "estimate": entry.estimate._asdict(),
        "recording": None if entry.recorded is None else entry.recorded._asdict(),
        "vluna_llm": {**entry.settled._asdict(), "xusd": entry.settled_xusd},
        "gate": {**entry.charged._asdict(), "xusd": entry.charged_xusd},
        "state": entry.state,
        "estimated": entry.estimated,
        "by_ingest": entry.by_ingest,
        "hints": list(entry.hints),
        "equal": entry.agrees,
    }
