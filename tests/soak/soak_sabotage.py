"""Ways in which the package could break its promises, done to it on purpose: the soak has to go red for each.

``python tests/soak --sabotage NAME`` breaks the package in every process of the run, and nothing on disk.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

from vluna_llm import delivery, settlement
from vluna_llm.operation import OperationState
from vluna_llm.outbox import Journal
from vluna_llm.outbox.adoption import Adopter
from vluna_llm.outbox.lock import FileLock
from vluna_llm.settlement import Verdict
from vluna_llm.usage.types import TokenUsage


def no_adoption() -> None:
    """What a killed process owed stays in its file for ever."""
    _replace(Adopter, "adopting", lambda self, *args, **more: iter(()))


def usage_in_memory_only() -> None:
    """The usage is not written before the caller sees the end of its answer, only when it is delivered."""
    update = Journal.update

    def late(self: Journal, old: Any, new: Any) -> None:
        if new.state.settlement != "pending" or old.state.settlement != "none":
            update(self, old, new)

    _replace(Journal, "update", late)


def new_key_on_retry() -> None:
    """Every attempt is sent under a key of its own."""
    count = itertools.count()
    key = settlement.settle_key
    _replace(delivery, "settle_key", lambda row: f"{key(row)}:{row.attempts}:{next(count)}")


def every_200_is_booked() -> None:
    """HTTP 200 is taken for a charge, whatever the hints say."""
    _replace(delivery, "judge_commit", lambda result, row: Verdict("done", "booked"))


def one_attempt() -> None:
    """A delivery that fails is given up."""
    _replace(delivery, "judge_error", lambda error, row: Verdict("done", "lapsed", str(error)))


def cached_as_input() -> None:
    """Cached input is sold at the price of input."""
    compose = settlement.compose_lines

    def wrong(usage: Any, code: str, **more: Any) -> Any:
        return compose(replace(usage, cached_tokens=0), code, **more)

    _replace(settlement, "compose_lines", wrong)


def living_journals_are_adopted() -> None:
    """Nobody looks whether the owner of a journal lives."""
    _replace(FileLock, "acquire", lambda self: True)


def aborted_work_is_charged() -> None:
    """What was left before its end is charged by a guess."""
    _replace(OperationState, "aborted", lambda self: self.completed(TokenUsage(100, 10), "estimated"))


SABOTAGES: dict[str, Callable[[], None]] = {
    sabotage.__name__: sabotage
    for sabotage in (
        no_adoption,
        usage_in_memory_only,
        new_key_on_retry,
        every_200_is_booked,
        one_attempt,
        cached_as_input,
        living_journals_are_adopted,
        aborted_work_is_charged,
    )
}
"""By name."""


@functools.cache
def commit_sabotage(name: str) -> None:
    """Break the package in this process, once; its forks inherit it."""
    SABOTAGES[name]()


def _replace(owner: Any, name: str, value: Any) -> None:
    assert hasattr(owner, name), f"{owner} has no {name} any more: this sabotage breaks nothing"
    mock.patch.object(owner, name, value).start()
