"""What is measured: as a metrics SDK collects it, with the names, units and attributes that dashboards are built on."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the OpenTelemetry SDK is not installed")

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.alarm import Alarm
from vluna_llm.ending import Ending
from vluna_llm.errors import GateDenied
from vluna_llm.gauges import Depths, Gauges, Rate
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.sandbox import Sandbox

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True, response_id="resp_1")


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Measured:
    """Gauges with an SDK behind them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider(metric_readers=[self.reader])
        self.gauges = Gauges(self.provider.get_meter("test"), self.clock)

    def metric(self, name: str) -> Any:
        data = self.reader.get_metrics_data()
        found = [
            metric
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
        ]
        return found[0] if found else None

    def points(self, name: str) -> dict[tuple[str, ...], Any]:
        """Values by their attributes' values."""
        metric = self.metric(name)
        points = metric.data.data_points if metric else ()
        return {tuple(map(str, (point.attributes or {}).values())): point.value for point in points}


@pytest.fixture
def measured() -> Iterator[Measured]:
    made = Measured()
    yield made
    made.provider.shutdown()


def test_counts_are_told_by_what_they_are_counted_by(measured: Measured) -> None:
    """Admissions by how, settlements by outcome and route, tokens as a sum."""
    for how in ("leased", "leased", "ungated", "denied"):
        measured.gauges.admitted(how)  # type: ignore[arg-type]
    measured.gauges.delivered("booked", "commit", 0.2)
    measured.gauges.delivered("booked", "ingest", 90.0)
    measured.gauges.delivered("cancelled", "cancel")
    measured.gauges.forgone(40)
    measured.gauges.forgone(2)
    assert measured.points("vluna.operations") == {("leased",): 2, ("ungated",): 1, ("denied",): 1}
    assert measured.points("vluna.settlements") == {
        ("booked", "commit"): 1,
        ("booked", "ingest"): 1,
        ("cancelled", "cancel"): 1,
    }
    assert measured.points("vluna.tokens.forgone") == {(): 42}
    assert measured.points("vluna.outbox.deliveries") == {(): 3}
    (delay,) = measured.metric("vluna.settlement.delay").data.data_points
    assert (delay.count, delay.sum) == (2, 90.2)
    assert (delay.bucket_counts[delay.explicit_bounds.index(0.25)], delay.explicit_bounds[-1]) == (1, 86400.0)


def test_units_are_those_of_the_table(measured: Measured) -> None:
    """UCUM, as the table at the top of the module says."""
    measured.gauges.admitted("leased")
    measured.gauges.arrived()
    measured.gauges.delivered("booked", "commit", 1.0)
    measured.gauges.forgone(1)
    measured.gauges.watch(lambda: {"pending": (1, 0.0)})
    units = {
        "vluna.outbox.depth": "{operation}",
        "vluna.outbox.oldest_age": "s",
        "vluna.outbox.arrivals": "{settlement}",
        "vluna.outbox.deliveries": "{settlement}",
        "vluna.outbox.arrival_rate": "{settlement}/s",
        "vluna.outbox.drain_rate": "{settlement}/s",
        "vluna.settlements": "{settlement}",
        "vluna.settlement.delay": "s",
        "vluna.operations": "{operation}",
        "vluna.tokens.forgone": "{token}",
    }
    assert {name: measured.metric(name).unit for name in units} == units


def test_depth_and_age_add_up_the_outboxes_that_are_open(measured: Measured) -> None:
    """Each state is told, also when nothing waits in it; a closed outbox is no longer asked."""
    now = time.time()
    first: Depths = {"pending": (3, now - 100), "lost": (1, now - 5)}
    second: Depths = {"pending": (2, now - 700), "held": (0, 0.0)}
    close = measured.gauges.watch(lambda: first)
    measured.gauges.watch(lambda: second)
    assert measured.points("vluna.outbox.depth") == {
        ("pending",): 5,
        ("held",): 0,
        ("dead",): 0,
        ("quarantined",): 0,
        ("lost",): 1,
    }
    ages = measured.points("vluna.outbox.oldest_age")
    assert {state: round(age / 50) * 50 for (state,), age in ages.items()} == {
        "pending": 700,
        "held": 0,
        "dead": 0,
        "quarantined": 0,
        "lost": 0,
    }
    close()
    close()
    assert measured.points("vluna.outbox.depth")["pending",] == 2


def test_nothing_is_told_where_no_outbox_is_open(measured: Measured) -> None:
    """No outbox is not an empty one."""
    measured.gauges.watch(dict)()
    assert measured.points("vluna.outbox.depth") == {}
    assert measured.points("vluna.outbox.drain_rate") == {}


def test_an_outbox_that_cannot_be_asked_does_not_hide_the_others(measured: Measured) -> None:
    def broken() -> Depths:
        raise OSError("disk")

    measured.gauges.watch(broken)
    measured.gauges.watch(lambda: {"dead": (2, 0.0)})
    assert measured.points("vluna.outbox.depth")["dead",] == 2


def test_a_journal_is_asked_once_for_both_gauges(measured: Measured) -> None:
    asked = []
    measured.gauges.watch(lambda: asked.append(1) or {"pending": (len(asked), 0.0)})  # type: ignore[func-returns-value]
    assert measured.points("vluna.outbox.depth")["pending",] == 1
    assert len(asked) == 1
    measured.clock.now += 1.5
    assert measured.points("vluna.outbox.depth")["pending",] == 2


def test_collecting_holds_up_nobody(measured: Measured) -> None:
    """While a slow journal is asked, calls are counted."""
    asked, go_on = threading.Event(), threading.Event()

    def slow() -> Depths:
        asked.set()
        assert go_on.wait(10)
        return {}

    measured.gauges.watch(slow)
    collecting = threading.Thread(target=measured.reader.get_metrics_data)
    collecting.start()
    assert asked.wait(10)
    counting = threading.Thread(target=lambda: (measured.gauges.arrived(), measured.gauges.admitted("leased")))
    counting.start()
    counting.join(5)
    assert not counting.is_alive()
    go_on.set()
    collecting.join(10)


def test_rates_are_of_the_last_minute(measured: Measured) -> None:
    """Ten a second arrive and five are drained; a minute after the last one both are nothing."""
    for _ in range(60):
        measured.clock.now += 1
        for _ in range(10):
            measured.gauges.arrived()
        for _ in range(5):
            measured.gauges.delivered("booked", "commit")
    assert measured.points("vluna.outbox.arrival_rate") == {(): 10.0}
    assert measured.points("vluna.outbox.drain_rate") == {(): 5.0}
    measured.clock.now += 61
    assert measured.points("vluna.outbox.drain_rate") == {(): 0.0}
    assert measured.points("vluna.outbox.deliveries") == {(): 300}


def test_a_rate_counts_from_its_start() -> None:
    """Forty in the first ten seconds are four a second."""
    rate = Rate(0.0)
    for second in range(10):
        rate.count(second + 0.5, 4)
    assert rate.per_second(10.0) == 4.0
    assert rate.per_second(0.0) >= 0.0


def test_calls_are_counted_from_inside_our_own_lock(measured: Measured) -> None:
    """The garbage collector may end one call while another one is being counted on the same thread."""
    with measured.gauges._guard:
        measured.gauges.arrived()
        measured.gauges.forgone(1)
    assert measured.points("vluna.outbox.arrivals") == {(): 1}


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this platform has no fork")
def test_a_forked_child_counts_for_itself() -> None:
    """What the parent has counted is not told twice, and its outbox is not the child's."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def child() -> None:
        from vluna_llm.gauges import of_this_process

        gauges = of_this_process()
        writer.send((sum(gauges._totals.values()), len(gauges._sources)))

    from vluna_llm.gauges import of_this_process

    of_this_process().admitted("leased")
    close = of_this_process().watch(dict)
    process = context.Process(target=child)
    process.start()
    assert reader.poll(20)
    assert reader.recv() == (0, 0)
    process.join(20)
    close()


# -- with a gate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def metered(measured: Measured, make_vluna: Callable[..., Vluna], tmp_path: Path) -> Vluna:
    """A `Vluna` that tells the gauges of this test instead of the process's own."""
    vluna = make_vluna(outbox=str(tmp_path / "outbox"))
    vluna.telemetry.gauges = measured.gauges
    return vluna


def begin(vluna: Vluna, principal: str = "ann") -> Operation:
    with call_context(principal_id=principal):
        operation = vluna.begin(CALL)
    assert operation is not None
    return operation


def test_a_day_of_a_product_is_told(measured: Measured, metered: Vluna, gate: Sandbox) -> None:
    """Booked, given up, refused by the gate and run without it; what waits is in the depth, and nothing twice."""
    begin(metered).finish(USED)
    begin(metered, "bob").finish(Ending("error", output_tokens=33))
    gate.set_credit("broke", 0)
    with pytest.raises(GateDenied):
        begin(metered, "broke")
    assert metered.flush(10)
    assert measured.points("vluna.operations") == {("leased",): 2, ("denied",): 1}
    assert measured.points("vluna.settlements") == {("booked", "commit"): 1, ("cancelled", "cancel"): 1}
    assert measured.points("vluna.outbox.arrivals") == {(): 2}
    assert measured.points("vluna.outbox.deliveries") == {(): 2}
    assert set(measured.points("vluna.outbox.depth").values()) == {0}
    (delay,) = measured.metric("vluna.settlement.delay").data.data_points
    assert delay.count == 1
    assert 0 < delay.sum < 10

    gate.faults.add("status", "authorize", times=None, status=503)
    gate.faults.add("status", "ingest", times=None, status=503)
    begin(metered, "carl").finish(USED)
    measured.clock.now += 2
    assert measured.points("vluna.operations")["ungated",] == 1
    assert measured.points("vluna.outbox.depth")["pending",] == 1
    assert measured.points("vluna.outbox.arrivals") == {(): 3}
    assert 0 < measured.points("vluna.outbox.oldest_age")["pending",] < 60
    metered.close(timeout=0.1)
    measured.clock.now += 2
    assert measured.points("vluna.outbox.depth") == {}, "a closed outbox is not told"
    assert not measured.gauges._sources, "nor kept"


def test_what_waits_for_a_person_has_its_own_depth(measured: Measured, metered: Vluna, gate: Sandbox) -> None:
    """Refused, charged nothing, or held: an alert can be set on each."""
    dead = begin(metered, "dead")
    gate.feature("openai.gpt-4o-mini", active=False)
    dead.finish(USED)
    assert dead.wait(10) is not None
    gate.feature("openai.gpt-4o-mini", active=True)
    quarantined = begin(metered, "quarantined")
    for meter in ("", ".tokens.input", ".tokens.cached", ".tokens.output"):
        gate.unprice(f"openai.gpt-4o-mini{meter}")
    quarantined.finish(USED)
    assert quarantined.wait(10) is not None
    held = begin(metered, "held")
    unknown = '{"ok":false,"code":"AUTH.SERVICE_KEY_NOT_FOUND","message":"Service API key not recognized"}'
    gate.faults.add("status", "commits", times=None, status=401, body=unknown)
    held.finish(USED)
    until = time.monotonic() + 10
    while not measured.points("vluna.outbox.depth").get(("held",)):
        assert time.monotonic() < until
        time.sleep(0.05)
        measured.clock.now += 2
    assert measured.points("vluna.outbox.depth") == {
        ("pending",): 0,
        ("held",): 1,
        ("dead",): 1,
        ("quarantined",): 1,
        ("lost",): 0,
    }
    outcomes = measured.points("vluna.settlements")
    assert outcomes == {("refused", "commit"): 1, ("quarantined", "commit"): 1}


def test_tokens_that_are_given_away_are_counted(measured: Measured, metered: Vluna, gate: Sandbox) -> None:
    begin(metered).finish(Ending("closed", output_tokens=33))
    assert metered.flush(10)
    assert sum(measured.points("vluna.tokens.forgone").values()) >= 33


# -- the alarm ---------------------------------------------------------------------------------------------------------


def run(alarm: Alarm, seconds: int, arrive: int, drain: int, start: tuple[float, int, int, int]) -> list[Any]:
    """Observe every five seconds; gives the changes and where it ended."""
    now, arrived, delivered, depth = start
    changes = []
    for _ in range(seconds // 5):
        now += 5
        arrived += 5 * arrive
        done = min(5 * drain, depth + 5 * arrive)
        delivered += done
        depth += 5 * arrive - done
        change = alarm.observe(now, arrived, delivered, depth)
        if change is not None:
            changes.append(change)
    return [changes, (now, arrived, delivered, depth)]


def test_the_alarm_is_raised_once_and_called_off_once() -> None:
    """Arrivals outrun the drain, then the backlog drains."""
    alarm = Alarm()
    changes, there = run(alarm, 600, 20, 10, (0.0, 0, 0, 0))
    assert [change.level for change in changes] == ["behind"]
    assert alarm.raised
    raised = changes[0]
    assert (raised.arrival_rate, raised.drain_rate, raised.seconds_to_drain) == (20.0, 10.0, None)
    changes, there = run(alarm, 1200, 5, 30, there)
    assert [change.level for change in changes] == ["caught_up"]
    assert not alarm.raised
    assert there[3] == 0


def test_the_alarm_is_called_off_when_the_drain_has_won_for_a_window() -> None:
    """A long backlog need not be gone for that; how long it lasts is told."""
    alarm = Alarm()
    _, there = run(alarm, 120, 20, 10, (0.0, 0, 0, 0))
    assert alarm.raised
    far = (there[0], there[1], there[2], 1_100)
    changes, _ = run(alarm, 200, 10, 12, far)
    assert [change.level for change in changes] == ["caught_up"]
    assert changes[0].depth > 500
    assert changes[0].seconds_to_drain == pytest.approx(changes[0].depth / 2.0)


def test_the_alarm_does_not_flutter() -> None:
    """Winning for less than a window and losing again changes nothing."""
    alarm = Alarm()
    _, there = run(alarm, 300, 20, 10, (0.0, 0, 0, 0))
    changes: list[Any] = []
    for _ in range(10):
        won, there = run(alarm, 70, 9, 10, there)
        lost, there = run(alarm, 70, 12, 10, there)
        changes += won + lost
    assert changes == []
    assert alarm.raised


def test_a_handful_that_waits_is_no_backlog() -> None:
    changes, there = run(Alarm(floor=100), 600, 1, 1, (0.0, 0, 0, 99))
    assert changes == []
    assert run(Alarm(floor=100), 90, 1, 0, there)[0][0].level == "behind"


def test_a_burst_that_the_drain_outlives_raises_nothing() -> None:
    """A backlog alone is no alarm: it shrinks."""
    assert run(Alarm(), 600, 10, 20, (0.0, 5_000, 0, 5_000))[0] == []


def test_the_alarm_takes_no_counts_of_another_runtime_for_its_own() -> None:
    """Counts that begin anew are no negative rate, and a window passes before anything is said."""
    alarm = Alarm()
    _, there = run(alarm, 60, 1, 1, (0.0, 10_000, 10_000, 500))
    assert alarm.observe(there[0] + 5, 40, 0, 600) is None
    assert alarm.observe(there[0] + 30, 80, 0, 640) is None
    change = alarm.observe(there[0] + 66, 140, 0, 700)
    assert change is not None
    assert change.arrival_rate == pytest.approx(100 / 61)


def test_a_meter_provider_may_come_later() -> None:
    """Applications often set theirs after their imports; without any, everything is counted and nothing is told."""
    script = (
        "from vluna_llm.gauges import of_this_process\n"
        "gauges = of_this_process()\n"
        "gauges.admitted('leased'); gauges.delivered('booked', 'commit', 1.0)\n"
        "from opentelemetry import metrics\n"
        "from opentelemetry.sdk.metrics import MeterProvider\n"
        "from opentelemetry.sdk.metrics.export import InMemoryMetricReader\n"
        "reader = InMemoryMetricReader()\n"
        "metrics.set_meter_provider(MeterProvider(metric_readers=[reader]))\n"
        "gauges.admitted('leased'); gauges.delivered('booked', 'commit', 1.0)\n"
        "scope, = reader.get_metrics_data().resource_metrics[0].scope_metrics\n"
        "values = {m.name: [getattr(p, 'value', None) or p.count for p in m.data.data_points] for m in scope.metrics}\n"
        "assert scope.scope.name == 'vluna_llm' and scope.scope.version, scope.scope\n"
        "assert values['vluna.operations'] == [2] and values['vluna.settlement.delay'] == [1], values\n"
    )
    assert_runs(script)


def assert_runs(script: str) -> None:
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
