"""The facade against a real embedded gate: who is billed, what is refused, and what the scope says."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.errors import (
    ConfigurationError,
    GateDenied,
    GateRateLimited,
    GateUnavailable,
    InvalidGateRequest,
    MissingPrincipal,
)
from vluna_llm.lifecycle import ModelCall
from vluna_llm.sandbox import Sandbox

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": [{"role": "user", "content": "hi"}]})
USED = Ending("complete", usage=TokenUsage(100, 20, cached_tokens=40), finished=True, response_id="resp_1")


def test_a_completed_call_is_charged_once_with_its_split_and_its_references(vluna: Vluna, gate: Sandbox) -> None:
    with call_context(principal_id="ann", end_user="u-7", labels={"team": "blue"}, request_id="req-9") as scope:
        operation = vluna.begin(CALL)
        assert operation is not None
        assert scope.pending == 1
        operation.finish(USED)
        operation.finish(USED)
        operation.fail(ValueError())
    assert scope.wait(5)
    (entry,) = gate.booked("ann").entries
    feature = "openai.gpt-4o-mini"
    assert entry.lines == {
        f"{feature}.tokens.input": 60,
        f"{feature}.tokens.cached": 40,
        f"{feature}.tokens.output": 20,
    }
    assert entry.quantity == 120
    assert entry.user_id == "ann"
    assert {"team": "blue", "end_user": "u-7", "request_id": "req-9", "response_id": "resp_1"}.items() <= (
        entry.labels.items()
    )
    assert entry.labels["operation_id"] == operation.operation_id
    (receipt,) = scope.receipts
    assert receipt.charged
    assert receipt.charged_xusd == entry.charged_xusd == scope.settled_xusd > 0
    assert (scope.usage.input_tokens, scope.usage.output_tokens, scope.usage.cached_tokens) == (100, 20, 40)
    assert scope.estimated_xusd == 0


def test_a_failed_call_is_cancelled_and_charges_nothing(vluna: Vluna, gate: Sandbox) -> None:
    with call_context(principal_id="ann") as scope:
        operation = vluna.begin(CALL)
        assert operation is not None
        operation.fail(TimeoutError())
        assert scope.wait(5)
    assert gate.booked("ann").charged_xusd == 0
    assert [lease.state for lease in gate.leases("ann")] == ["canceled"]
    assert scope.receipts[0].state == "cancelled"


def test_an_outer_scope_adds_up_inner_ones(vluna: Vluna) -> None:
    with call_context(principal_id="ann") as outer:
        for _ in range(2):
            with call_context(feature_code="chat.basic") as inner:
                operation = vluna.begin(CALL)
                assert operation is not None
                operation.finish(USED)
                assert inner.wait(5)
                assert inner.receipts[0].feature_code == "chat.basic"
        assert outer.wait(5)
        assert outer.usage.total_tokens == 240
        assert len(outer.receipts) == 2


def test_a_call_for_nobody_is_refused_before_anything_is_asked(vluna: Vluna, gate: Sandbox) -> None:
    with pytest.raises(MissingPrincipal, match="call_context"):
        vluna.begin(CALL)
    assert gate.requests == []


def test_the_principal_of_the_settings_serves_single_customer_programs(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    vluna = make_vluna(principal="solo", user="me")
    operation = vluna.begin(CALL)
    assert operation is not None
    operation.finish(USED)
    assert vluna.flush(5)
    assert gate.booked("solo").entries[0].user_id == "me"


def test_no_credit_is_a_denial_with_its_reason(vluna: Vluna, gate: Sandbox) -> None:
    gate.set_credit("poor", 0)
    with call_context(principal_id="poor") as scope, pytest.raises(GateDenied) as denied:
        vluna.begin(CALL)
    assert denied.value.reason == "insufficient_credit"
    assert scope.pending == 0
    assert vluna.flush(1)
    assert gate.booked("poor").entries == ()


def test_observe_never_refuses_and_books_what_the_gate_would_have_refused(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    vluna = make_vluna(mode="observe")
    gate.set_credit("poor", 0)
    with call_context(principal_id="poor"):
        operation = vluna.begin(CALL)
    assert operation is not None
    operation.finish(USED)
    assert vluna.flush(5)
    assert [entry.kind for entry in gate.booked("poor").entries] == ["ingest"]
    assert vluna.begin(CALL) is None, "a call for nobody goes on unmetered"


def test_off_asks_nobody_and_can_be_switched_at_run_time(vluna: Vluna, gate: Sandbox) -> None:
    vluna.mode = "off"
    with call_context(principal_id="ann"):
        assert vluna.begin(CALL) is None
        assert gate.requests == []
        vluna.mode = "enforce"
        operation = vluna.begin(CALL)
        assert operation is not None
        operation.fail()


def test_a_full_rate_window_tells_when_to_come_back(vluna: Vluna, gate: Sandbox) -> None:
    gate.faults.add("rate_limited", "authorize", seconds=7)
    with call_context(principal_id="ann"), pytest.raises(GateRateLimited) as limited:
        vluna.begin(CALL)
    assert limited.value.retry_after is not None
    assert 4 < limited.value.retry_after <= 8


def test_a_feature_that_could_never_be_booked_is_refused_before_the_provider(vluna: Vluna, gate: Sandbox) -> None:
    gate.feature("retired.thing", active=False)
    with call_context(principal_id="ann", feature_code="retired.thing"), pytest.raises(InvalidGateRequest):
        vluna.begin(CALL)


def test_the_gate_away_lets_the_call_run_and_books_it_when_the_gate_is_back(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    vluna = make_vluna(authorize_deadline=0.3)
    gate.stop()
    with call_context(principal_id="ann") as scope:
        operation = vluna.begin(CALL)
    assert operation is not None
    assert operation.lease is None
    operation.finish(USED)
    assert not vluna.flush(0.2)
    gate.start()
    assert scope.wait(15)
    (entry,) = gate.booked("ann").entries
    assert (entry.kind, entry.quantity) == ("ingest", 120)
    assert vluna.telemetry.counts["vluna.operation.ungated"] == 1


def test_deny_while_the_gate_is_away(make_vluna: Callable[..., Vluna], gate: Sandbox) -> None:
    vluna = make_vluna(authorize_deadline=0.3, on_gate_unavailable="deny")
    gate.stop()
    with call_context(principal_id="ann"), pytest.raises(GateUnavailable, match="VLUNA_SERVICE_BASE_URL"):
        vluna.begin(CALL)
    gate.start()


def test_a_customer_who_was_just_denied_stays_denied_while_the_gate_is_away(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    vluna = make_vluna(authorize_deadline=0.3)
    gate.set_credit("poor", 0)
    with call_context(principal_id="poor"):
        with pytest.raises(GateDenied):
            vluna.begin(CALL)
        gate.stop()
        with pytest.raises(GateDenied):
            vluna.begin(CALL)
    gate.start()


def test_a_dead_gate_stops_costing_its_time_out_on_every_call(make_vluna: Callable[..., Vluna], gate: Sandbox) -> None:
    import time

    vluna = make_vluna(authorize_deadline=0.2)
    gate.faults.add("hang", "authorize", times=None)
    with call_context(principal_id="ann"):
        for _ in range(5):
            operation = vluna.begin(CALL)
            assert operation is not None
            operation.fail()
        started = time.perf_counter()
        operation = vluna.begin(CALL)
        assert time.perf_counter() - started < 0.1
        assert operation is not None
        operation.fail()
    gate.faults.clear()


def test_a_lease_that_turns_up_after_the_call_went_ungated_is_not_used(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    vluna = make_vluna(authorize_deadline=0.2)
    gate.faults.add("drop_after", "authorize", times=None)
    with call_context(principal_id="ann"):
        operation = vluna.begin(CALL)
    assert operation is not None
    gate.faults.clear()
    operation.finish(USED)
    assert vluna.flush(5)
    assert len(gate.leases("ann")) == 1
    assert [entry.kind for entry in gate.booked("ann").entries] == ["ingest"]


def test_zero_usage_is_cancelled_and_never_committed(vluna: Vluna, gate: Sandbox) -> None:
    with call_context(principal_id="ann"):
        operation = vluna.begin(CALL)
    assert operation is not None
    operation.finish(Ending("complete", usage=TokenUsage(), finished=True))
    assert vluna.flush(5)
    assert gate.booked("ann").entries == ()
    assert [lease.state for lease in gate.leases("ann")] == ["canceled"]


@pytest.mark.parametrize("usage", [TokenUsage(audio_seconds=9.5), TokenUsage(raw={"cost_in_usd_ticks": 200})])
def test_a_cost_without_tokens_is_told_and_never_passes_silently(
    vluna: Vluna, gate: Sandbox, usage: TokenUsage
) -> None:
    with call_context(principal_id="ann"):
        operation = vluna.begin(CALL)
    assert operation is not None
    operation.finish(Ending("complete", usage=usage, finished=True))
    assert vluna.flush(5)
    assert gate.booked("ann").entries == ()
    assert vluna.telemetry.counts["vluna.endpoint.unmetered"] == 1


def test_an_answer_without_usage_is_estimated_and_labelled(vluna: Vluna, gate: Sandbox) -> None:
    with call_context(principal_id="ann"):
        operation = vluna.begin(CALL)
    assert operation is not None
    operation.finish(Ending("complete", finished=True, output_tokens=30))
    assert vluna.flush(5)
    (entry,) = gate.booked("ann").entries
    assert entry.labels["usage_source"] == "estimated"
    assert entry.lines["openai.gpt-4o-mini.tokens.output"] == 30
    assert vluna.telemetry.counts["vluna.usage.estimated"] == 1


def test_an_abandoned_operation_is_settled_from_another_thread(vluna: Vluna, gate: Sandbox) -> None:
    with call_context(principal_id="ann") as scope:
        operation = vluna.begin(CALL)
    assert operation is not None
    operation.abandon(lambda: USED)
    assert scope.wait(5)
    assert gate.booked("ann").entries[0].quantity == 120


def test_background_work_is_parked_and_booked_once_when_a_retrieve_brings_the_usage(
    vluna: Vluna, gate: Sandbox
) -> None:
    with call_context(principal_id="ann"):
        operation = vluna.begin(CALL)
        assert operation is not None
        operation.park("resp_bg")
        assert vluna.flush(2)
        assert gate.booked("ann").entries == ()
        for _ in range(3):
            vluna.book_background("resp_bg", TokenUsage(10, 5), CALL)
            assert vluna.flush(5)
    (entry,) = gate.booked("ann").entries
    assert (entry.kind, entry.quantity) == ("ingest", 15)
    assert entry.labels["response_id"] == "resp_bg"


def test_background_work_is_billed_to_who_asked_for_it_under_its_own_feature(vluna: Vluna, gate: Sandbox) -> None:
    """A retrieve may name nobody, and answers with the dated model name."""
    with call_context(principal_id="ann", labels={"team": "blue"}):
        operation = vluna.begin(CALL)
    assert operation is not None
    operation.park("resp_bg")
    dated = ModelCall("responses", "openai", "gpt-4o-mini-2024-07-18", None)
    vluna.book_background("resp_bg", TokenUsage(10, 5), dated)
    assert vluna.flush(5)
    (entry,) = gate.booked("ann").entries
    assert (entry.feature, entry.quantity) == ("openai.gpt-4o-mini", 15)
    assert entry.labels["team"] == "blue"


def test_background_work_is_booked_once_by_two_hosts(make_vluna: Callable[..., Vluna], gate: Sandbox) -> None:
    for vluna in (make_vluna(), make_vluna()):
        with call_context(principal_id="ann") as scope:
            vluna.book_background("resp_bg", TokenUsage(10, 5), CALL)
        assert vluna.flush(5)
        del scope
    assert [entry.quantity for entry in gate.booked("ann").entries] == [15]


def test_a_job_that_is_run_twice_is_charged_once(make_vluna: Callable[..., Vluna], gate: Sandbox) -> None:
    """The same idempotency key and request on another host meets the first run's lease, and charges nothing more."""
    for vluna in (make_vluna(), make_vluna()):
        with call_context(principal_id="ann", idempotency_key="job-42") as scope:
            operation = vluna.begin(CALL)
            assert operation is not None
            operation.finish(USED)
            assert scope.wait(5)
    assert sum(entry.charged_xusd > 0 for entry in gate.booked("ann").entries) == 1
    assert scope.receipts[0].detail is not None
    assert "already settled" in scope.receipts[0].detail


def test_the_same_request_twice_in_one_job_is_two_charges(vluna: Vluna, gate: Sandbox) -> None:
    with call_context(principal_id="ann", idempotency_key="job-42") as scope:
        for _ in range(2):
            operation = vluna.begin(CALL)
            assert operation is not None
            operation.finish(USED)
        assert scope.wait(5)
    assert [entry.charged_xusd > 0 for entry in gate.booked("ann").entries] == [True, True]


def test_work_that_is_no_model_call(vluna: Vluna, gate: Sandbox) -> None:
    with call_context(principal_id="ann") as scope:
        with vluna.operation(feature_code="tools.search", estimate=1) as op:
            op.record(quantity=3)
        receipt = op.wait(5)
        assert receipt is not None
        assert (receipt.quantity, receipt.input_tokens) == (3, 0)
        with pytest.raises(KeyError), vluna.operation(feature_code="tools.search", estimate=1):
            raise KeyError
        with vluna.operation(feature_code="tools.search"):
            pass
        assert scope.wait(5)
    assert [(entry.feature, entry.lines) for entry in gate.booked("ann").entries] == [
        ("tools.search", {"tools.search": 3})
    ]


def test_what_was_recorded_is_booked_though_the_work_raised(vluna: Vluna, gate: Sandbox) -> None:
    def work() -> None:
        with vluna.operation(feature_code="tools.search") as op:
            op.record(quantity=2)
            raise RuntimeError

    with call_context(principal_id="ann"), pytest.raises(RuntimeError):
        work()
    assert vluna.flush(5)
    assert gate.booked("ann").entries[0].quantity == 2


def test_the_decorator_serves_functions_and_coroutines(vluna: Vluna, gate: Sandbox) -> None:
    @vluna.operation(feature_code="tools.search", estimate=4)
    def plain() -> str:
        return "plain"

    @vluna.operation(feature_code="tools.search")
    async def given(op: Any = None) -> str:
        op.record(quantity=6)
        return "async"

    with call_context(principal_id="ann"):
        assert plain() == "plain"
        assert asyncio.run(given()) == "async"
    assert vluna.flush(5)
    assert sorted(entry.quantity for entry in gate.booked("ann").entries) == [4, 6]


def test_a_cancelled_authorize_owes_nothing(vluna: Vluna, gate: Sandbox) -> None:
    gate.faults.add("hang", "authorize")

    async def main() -> None:
        with call_context(principal_id="ann"):
            task = asyncio.ensure_future(vluna.abegin(CALL))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    gate.faults.clear()
    assert vluna.flush(2)
    assert gate.booked("ann").entries == ()


def test_one_instance_serves_threads_and_loops_that_come_and_go(vluna: Vluna, gate: Sandbox) -> None:
    async def one(customer: str) -> None:
        with call_context(principal_id=customer):
            operation = await vluna.abegin(CALL)
            assert operation is not None
            await asyncio.sleep(0)
            operation.finish(USED)

    def run(customer: str) -> None:
        for _ in range(3):
            asyncio.run(one(customer))

    threads = [threading.Thread(target=run, args=(f"c{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert vluna.flush(10)
    assert [len(gate.booked(f"c{i}").entries) for i in range(4)] == [3, 3, 3, 3]


def test_inline_waiting_gives_the_receipt_in_both_colours(vluna: Vluna) -> None:
    async def main() -> None:
        with call_context(principal_id="ann"):
            operation = await vluna.abegin(CALL)
            assert operation is not None
            operation.finish(USED)
            receipt = await operation.wait_async(5)
            assert receipt is not None
            assert receipt.charged

    asyncio.run(main())
    with call_context(principal_id="ann"):
        operation = vluna.begin(CALL)
    assert operation is not None
    operation.finish(USED)
    receipt = operation.wait(5)
    assert receipt is not None
    assert receipt.charged


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_settles_its_own_and_leaves_its_parents_alone(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Any
) -> None:
    vluna = make_vluna(outbox=str(tmp_path))
    with call_context(principal_id="parent"):
        mine = vluna.begin(CALL)
    assert mine is not None
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            mine.finish(USED)
            with call_context(principal_id="child"):
                own = vluna.begin(CALL)
            assert own is not None
            own.finish(USED)
            code = 0 if vluna.close(10) else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert gate.booked("parent").entries == ()
    mine.finish(USED)
    assert vluna.flush(5)
    assert len(gate.booked("parent").entries) == 1
    assert len(gate.booked("child").entries) == 1


def test_close_is_not_the_end_for_a_stream_that_finishes_later(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Any
) -> None:
    vluna = make_vluna(outbox=str(tmp_path))
    with call_context(principal_id="ann"):
        operation = vluna.begin(CALL)
    assert operation is not None
    vluna.close()
    operation.finish(USED)
    assert vluna.flush(5)
    assert len(gate.booked("ann").entries) == 1


def test_memory_stays_flat_over_many_operations(vluna: Vluna) -> None:
    def run(n: int) -> None:
        for _ in range(n):
            operation = vluna.begin(CALL)
            assert operation is not None
            operation.finish(USED)

    with call_context(principal_id="ann", feature_code="chat.basic"):
        run(30)
        assert vluna.flush(10)
        runtime = vluna._running()
        gc.collect()
        run(60)
        assert vluna.flush(10)
    assert len(runtime.ledger._rows) == 0
    assert len(runtime.ledger._watches) == 0
    assert len(runtime.settler._backlog) == runtime.settler._backlog.lanes == 0


def test_bad_identities_get_one_clear_sentence(vluna: Vluna) -> None:
    for value, what in [
        ("", "is empty"),
        ("x" * 300, "300 characters"),
        (" a", "blanks"),
        ("a\nb", "control"),
        ("日本", "Latin-1"),
    ]:
        with pytest.raises(ConfigurationError, match=f"principal_id.*{what}|principal_id {what}"):
            call_context(principal_id=value)
        with pytest.raises(ConfigurationError, match="principal_id"):
            vluna.bind(object(), principal_id=value)
    with pytest.raises(ConfigurationError, match="estimate must be an integer of at least 0, not -1"):
        vluna.operation(feature_code="x", estimate=-1)


def test_another_principal_never_inherits_the_purse_of_the_outer_one(vluna: Vluna, gate: Sandbox) -> None:
    with call_context(principal_id="ann", user_id="u1"), call_context(principal_id="bob"):
        operation = vluna.begin(CALL)
    assert operation is not None
    operation.finish(USED)
    assert vluna.flush(5)
    assert gate.booked("bob").entries[0].user_id == "bob"


@pytest.mark.parametrize("stranger", [object(), 3, asyncio, None])
def test_wrapping_something_else_is_refused_clearly(vluna: Vluna, stranger: object) -> None:
    with pytest.raises(ConfigurationError, match=r"Vluna\.wrap does not know .*; pass an openai client"):
        vluna.wrap(stranger)


def test_a_gate_that_cannot_be_reached_is_named_with_its_setting_before_the_call_runs(
    make_vluna: Callable[..., Vluna], caplog: pytest.LogCaptureFixture
) -> None:
    vluna = make_vluna(base_url="http://127.0.0.1:9/mgt/v1", authorize_deadline=0.2)
    with call_context(principal_id="ann"):
        operation = vluna.begin(CALL)
    assert operation is not None
    (line,) = [record.getMessage() for record in caplog.records if "ungated" in record.getMessage()]
    assert "VLUNA_SERVICE_BASE_URL" in line
    assert "error.type=GateUnavailable" in line
    operation.fail()


@pytest.mark.parametrize("code", ["Bad Code!", ".dot", "x" * 129])
def test_a_code_that_the_gate_would_refuse_is_refused_at_once(vluna: Vluna, code: str) -> None:
    with pytest.raises(ConfigurationError, match=r"feature_code .* is no code"):
        call_context(feature_code=code)
    with pytest.raises(ConfigurationError, match=r"feature_code .* is no code"):
        vluna.operation(feature_code=code)


def test_a_code_is_kept_in_lower_case_as_the_gate_does(vluna: Vluna, gate: Sandbox) -> None:
    with call_context(principal_id="ann", feature_code="Chat.Basic"):
        operation = vluna.begin(CALL)
    assert operation is not None
    operation.finish(USED)
    assert vluna.flush(5)
    assert gate.booked("ann").entries[0].feature == "chat.basic"


def test_of_a_backlog_whose_callers_have_gone_nothing_is_kept_but_a_scope_that_is_held_is_told(
    make_vluna: Any, gate: Sandbox
) -> None:
    vluna = make_vluna(authorize_deadline=0.2)
    gate.stop()

    def run(times: int) -> None:
        for _ in range(times):
            with call_context(principal_id="ann"):
                operation = vluna.begin(CALL)
            assert operation is not None
            operation.finish(USED)

    with call_context(principal_id="ann") as scope:
        held = vluna.begin(CALL)
        assert held is not None
        held.finish(USED)
        del held
    run(200)
    gc.collect()
    ledger = vluna._running().ledger
    assert len(ledger._watches) == 1, "the scope that is held waits for its receipt"
    assert scope.pending == 1
    gate.start()
    assert scope.wait(10)
    assert [receipt.charged for receipt in scope.receipts] == [True]
    assert vluna.flush(20)
    assert len(gate.booked("ann").entries) == 201


def test_a_copy_of_what_holds_it_holds_the_same_one(vluna: Vluna) -> None:
    """Frameworks copy their configuration deeply; connections and a journal are nobody's to copy."""
    held = copy.deepcopy({"plugins": [vluna]})
    assert held["plugins"][0] is vluna
