"""What a partly charged ingest left is kept in the shared outbox and sent from there, once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.lifecycle import ModelCall
from vluna_llm.sandbox import Sandbox

pytest.importorskip("psycopg", reason="psycopg (the extra 'postgres') is not installed")


def until(true: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_what_an_ingest_left_waits_in_postgresql_and_is_sent_from_there_once(
    make_vluna: Callable[..., Vluna], gate: Sandbox, database: str, psql: Any
) -> None:
    output = "openai.gpt-4o-mini.tokens.output"
    for meter, price in (("openai.gpt-4o-mini", 5), ("openai.gpt-4o-mini.tokens.input", 3), (output, 12)):
        gate.price(meter, price)
    gate.faults.add("status", "authorize", times=None, status=503)
    vluna = make_vluna(outbox_shared=database, authorize_deadline=0.1)
    vluna._running().prices.prices("openai.gpt-4o-mini", "ann", "ann")
    gate.unprice(output)
    with call_context(principal_id="ann") as scope:
        operation = vluna.begin(ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []}))
    assert operation is not None
    operation.finish(Ending("complete", usage=TokenUsage(10, 5), finished=True))

    def kept() -> Any:
        there = psql.execute("SELECT to_regclass('vluna_llm_operations')").fetchone() != (None,)
        return there and psql.execute("SELECT settlement, held, used_up, rest FROM vluna_llm_operations").fetchone()

    until(lambda: kept() == ("pending", 1, 1, json.dumps({output: 5})), "what is left is written")
    until(lambda: psql.execute("SELECT attempts FROM vluna_llm_operations").fetchone()[0] >= 2, "it waits for a price")
    assert [entry.quantity for entry in gate.booked("ann").entries] == [15]
    until(lambda: len(vluna._running().settler._backlog) == 0, "nothing is left in memory")
    gate.price(output, 12)
    psql.execute("UPDATE vluna_llm_operations SET next_attempt_at = 0")
    psql.execute("UPDATE vluna_llm_lanes SET due_at = now()")
    assert scope.wait(10)
    assert [(entry.quantity, dict(entry.lines)) for entry in gate.booked("ann").entries][1:] == [(5, {output: 5})]
    assert scope.settled_xusd == gate.booked("ann").charged_xusd == 10 * 3 + 5 * 12
