"""The gate's own books about one customer, as the LiteLLM tests look at them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vluna_llm import Scope, Vluna, call_context
from vluna_llm.sandbox import Sandbox

MODEL = "gpt-4o"
FEATURE = f"openai.{MODEL}"
TOKENS = 120
"""What the upstream reports for a chat, a completion and a response."""
MESSAGES: list[dict[str, str]] = [{"role": "user", "content": "hi"}]

TABLES: list[Callable[[], Iterable[str]]] = []
"""What modules want to have printed when all tests are done, line by line."""


@dataclass
class Books:
    """What was charged to one customer, and which leases it had."""

    gate: Sandbox
    customer: str

    def run(self, vluna: Vluna, work: Callable[[], Any], *, collect: bool = False, **context: Any) -> Scope:
        """Run something for this customer and wait until it is settled; ``collect``: what it leaves is collected."""
        with call_context(principal_id=self.customer, **context) as scope:
            work()
        if collect:
            eventually(lambda: gc.collect() >= 0 and scope.pending == 0, 10)
        assert scope.wait(10), "an operation was never settled"
        return self.settled(vluna, scope)

    def settled(self, vluna: Vluna, scope: Scope | None = None) -> Any:
        """Wait until nothing is owed any more."""
        assert vluna.flush(10)
        return scope

    @property
    def charged(self) -> list[tuple[str, int]]:
        """Feature and tokens of everything that was charged, oldest first."""
        return [(entry.feature, entry.quantity) for entry in self.gate.booked(self.customer).applied]

    @property
    def leases(self) -> list[tuple[str, str]]:
        """Feature and state of every lease, oldest first."""
        return [(lease.feature, lease.state) for lease in self.gate.leases(self.customer)]

    def once(self, feature: str = FEATURE, tokens: int = TOKENS, *, source: str = "provider") -> None:
        """One lease was taken, and it was charged once."""
        assert self.leases == [(feature, "closed")], self.leases
        assert self.charged == [(feature, tokens)], self.charged
        (entry,) = self.gate.booked(self.customer).entries
        assert entry.labels["usage_source"] == source

    def estimated_once(self, feature: str = FEATURE) -> None:
        """One lease was taken, and an estimate was charged, labelled."""
        assert len(self.charged) == 1, self.charged
        self.once(feature, self.charged[0][1], source="estimated")

    def cancelled(self, feature: str = FEATURE) -> None:
        """One lease was taken and given back: nothing was charged."""
        assert self.leases == [(feature, "canceled")], self.leases
        assert self.gate.booked(self.customer).entries == ()

    def nothing(self) -> None:
        """The gate was asked for no lease, and charged nothing."""
        assert self.leases == []
        assert self.gate.booked(self.customer).entries == ()


def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
