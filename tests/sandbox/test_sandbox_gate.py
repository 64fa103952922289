"""The embedded gate as its users meet it: over HTTP, with defaults, faults, a state file and the books."""

from __future__ import annotations

import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import httpx
import pytest
from gate_caller import FEATURE, Caller

from vluna_llm.errors import ConfigurationError
from vluna_llm.sandbox import STRICT, Sandbox

LINES = [
    {"meter_code": f"{FEATURE}.tokens.input", "quantity_minor": "100"},
    {"meter_code": f"{FEATURE}.tokens.cached", "quantity_minor": "40"},
    {"meter_code": f"{FEATURE}.tokens.output", "quantity_minor": "20"},
]
PRICED = 100 * 3 + 40 * 1 + 20 * 12


@pytest.fixture
def gate() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


# -- defaults and the books --------------------------------------------------------------------------------------------


def test_any_feature_works_out_of_the_box(gate: Sandbox) -> None:
    """Without configuration an unknown feature is priced and an unknown customer has credit."""
    caller = Caller(gate)
    answer = caller.commit(caller.authorize("anthropic.claude"), 160, feature="anthropic.claude")
    assert answer.json()["data"]["amount_xusd"] == str(160 * 5)
    assert gate.booked("c1").charged_xusd == 160 * 5


def test_the_books_tell_what_was_charged(gate: Sandbox) -> None:
    """An entry has kind, lines, labels, status, shown and charged amounts; quarantined ones charge nothing."""
    caller = Caller(gate)
    lease = caller.authorize()
    caller.commit(lease, 160, meters=LINES, labels={"operation": "op-1"}, key="k-1")
    caller.commit(lease, 7, key="k-2")
    caller.ingest(3, occurred_at="2026-01-02T03:04:05Z")
    booked = gate.booked("c1")
    assert booked.charged_xusd == PRICED + 15
    first, second, third = booked.entries
    assert (first.kind, first.status, first.charged_xusd, first.shown_xusd) == ("commit", "applied", PRICED, PRICED)
    assert first.lines == {line["meter_code"]: int(line["quantity_minor"]) for line in LINES}
    assert first.labels == {"operation": "op-1"}
    assert first.idempotency_key == "k-1"
    assert (second.status, second.charged_xusd, second.shown_xusd) == ("quarantined", 0, 35)
    assert second.reason_codes == ("lease_closed_at_commit",)
    assert (third.kind, third.lease_id) == ("ingest", None)
    assert third.occurred_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    assert booked.lines[FEATURE] == 3
    assert len(gate.booked()) == 3
    assert gate.booked("nobody").charged_xusd == 0


def test_strict_is_a_fresh_real_server() -> None:
    """With STRICT nothing is known, priced or paid for, and a principal's first call answers 500."""
    with Sandbox(STRICT) as gate:
        caller = Caller(gate)
        body = {"feature_code": FEATURE}
        first = caller.send("POST", "/gate/authorize", body, key="k")
        second = caller.send("POST", "/gate/authorize", body, key="k")
        assert first.status_code == 500
        assert first.json() == {
            "ok": False,
            "code": "SERVER.UNEXPECTED",
            "message": "Unexpected server error. Please try again later.",
        }
        assert (second.status_code, second.json()["message"]) == (422, "feature not found")
        gate.feature(FEATURE)
        gate.price(FEATURE, 5)
        third = caller.send("POST", "/gate/authorize", body, key="k")
        assert (third.status_code, third.json()["message"]) == (402, "grant balance exhausted")
        gate.credit("c1", 100)
        caller.commit(caller.authorize(), 30)
        assert gate.booked("c1").charged_xusd == 150
        assert (gate.spendable("c1"), gate.debt("c1")) == (0, 50)


def test_prices_quotas_rates_budgets_and_users_can_be_set(gate: Sandbox) -> None:
    """What an operator does at a real gate is a method here, and takes effect at once."""
    caller = Caller(gate)
    gate.price("tools.search", 2500, cost=1000)
    assert caller.ingest(2, feature="tools.search").json()["data"]["amount_xusd"] == "5000"
    gate.quota(100, feature="tools.search", principal_id="c1")
    caller.commit(caller.authorize("tools.search"), 100, feature="tools.search")
    refused = caller.send("POST", "/gate/authorize", {"feature_code": "tools.search"})
    assert (refused.status_code, refused.json()["message"]) == (402, "quota limit exhausted")
    gate.rate(1, feature="tools.other", window=3600)
    caller.authorize("tools.other")
    limited = caller.send("POST", "/gate/authorize", {"feature_code": "tools.other"})
    assert limited.status_code == 429
    assert limited.json()["hints"][0]["remaining"] == 0
    gate.clock.advance(3600)
    caller.authorize("tools.other")
    budget = gate.budget("c1", 100)
    lease = caller.authorize(budget_id=budget)
    gate.close_budget(budget)
    assert caller.commit(lease).status_code == 422
    gate.feature("tools.secret", entitlement=True)
    assert (
        caller.send("POST", "/gate/authorize", {"feature_code": "tools.secret"}).json()["code"]
        == "ENTITLEMENT.REQUIRED"
    )
    gate.customer("c1", grant=("tools.secret",))
    lease = caller.authorize("tools.secret")
    gate.revoke("c1", "tools.secret")
    assert caller.commit(lease, feature="tools.secret").status_code == 403
    gate.unprice("tools.search")
    assert caller.ingest(2, feature="tools.search").json()["data"]["amount_xusd"] == "0"
    gate.disable_user("c1")
    assert caller.ingest().json()["code"] == "AUTH.BILLING_USER_DISABLED"


def test_a_lease_expires_by_the_gates_clock(gate: Sandbox) -> None:
    """Late within the grace is charged and hinted; later it is quarantined; cancelled leases are, too."""
    caller = Caller(gate)
    within, beyond = caller.authorize(), caller.authorize()
    gate.clock.advance(43_200 + 30)
    late = caller.commit(within).json()
    gate.clock.advance(60)
    gone = caller.commit(beyond).json()
    assert [hint["exceeded_grace"] for hint in (*late["hints"], *gone["hints"])] == [False, True]
    assert gate.booked("c1").charged_xusd == 50


# -- idempotency -------------------------------------------------------------------------------------------------------


def test_a_colliding_key_hands_over_anothers_receipt_or_is_refused() -> None:
    """The first cache is one for all callers, as on the real gate; the switch makes a collision loud."""
    for reject in (False, True):
        with Sandbox(reject_colliding_keys=reject) as gate:
            first = Caller(gate, "a").ingest(key="job-1").json()
            second = Caller(gate, "b").ingest(key="job-1")
            assert gate.booked("b").charged_xusd == 0
            if reject:
                assert second.status_code == 409
                assert "globally unique" in second.json()["message"]
            else:
                assert second.json() == first


def test_parallel_commits_of_one_key_are_booked_once(gate: Sandbox) -> None:
    """Twenty threads send the same commit: one rating, one answer."""
    caller = Caller(gate)
    lease = caller.authorize()
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: caller.commit(lease, 10, key="same").json(), range(20)))
    assert all(answer == answers[0] for answer in answers)
    assert gate.booked("c1").charged_xusd == 50


# -- faults ------------------------------------------------------------------------------------------------------------


def test_an_error_before_booking_books_nothing_and_the_retry_books_once(gate: Sandbox) -> None:
    """The deadlock of a real gate: 500 twice, then the same bytes and key are booked."""
    caller = Caller(gate)
    lease = caller.authorize()
    fault = gate.faults.add("error_before", "commits", times=2)
    codes = [caller.commit(lease, 10, key="k").status_code for _ in range(3)]
    assert codes == [500, 500, 200]
    assert fault.hits == 2
    assert gate.booked("c1").charged_xusd == 50


@pytest.mark.parametrize("kind", ["error_after", "drop_after", "hang_after", "garbage"])
def test_a_lost_answer_was_booked_and_the_retry_replays_it(gate: Sandbox, kind: str) -> None:
    """Booked, but the answer is a 500, a closed connection, silence or nonsense: the retry does not book again."""
    caller = Caller(gate)
    caller.http.timeout = httpx.Timeout(0.3)
    lease = caller.authorize()
    gate.faults.add(kind, "commits", body="<html>proxy</html>")  # type: ignore[arg-type]
    try:
        answer = caller.commit(lease, 10, key="k")
    except httpx.TransportError:
        assert kind in ("drop_after", "hang_after")
    else:
        assert kind == "error_after" if answer.status_code == 500 else answer.text == "<html>proxy</html>"
    assert gate.booked("c1").charged_xusd == 50
    retry = caller.commit(lease, 10, key="k")
    assert retry.status_code == 200
    assert retry.json()["data"]["commit_id"] == gate.booked("c1").entries[0].commit_id
    assert gate.booked("c1").charged_xusd == 50


@pytest.mark.parametrize("kind", ["drop_before", "hang"])
def test_a_request_that_never_arrived_books_nothing(gate: Sandbox, kind: str) -> None:
    """The connection goes away before anything was done."""
    caller = Caller(gate)
    caller.http.timeout = httpx.Timeout(0.3)
    gate.faults.add(kind, "ingest")  # type: ignore[arg-type]
    with pytest.raises(httpx.TransportError):
        caller.ingest(key="k")
    assert gate.booked("c1").charged_xusd == 0
    assert caller.ingest(key="k").status_code == 200


def test_a_hanging_request_is_let_go(gate: Sandbox) -> None:
    """``release`` closes the connection of what hangs."""
    caller = Caller(gate)
    gate.faults.add("hang", "authorize")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(caller.send, "POST", "/gate/authorize", {"feature_code": FEATURE})
        time.sleep(0.1)
        assert not waiting.done()
        gate.faults.release()
        with pytest.raises(httpx.TransportError):
            waiting.result(2)


def test_storms_proxies_and_latency(gate: Sandbox) -> None:
    """429 with a hint, a proxy's 503 page, and a slow answer; ``skip`` and ``principal_id`` choose the victims."""
    caller, other = Caller(gate, "a"), Caller(gate, "b")
    gate.faults.add("rate_limited", "authorize", seconds=7, principal_id="a", skip=1)
    gate.faults.add("status", "ingest", status=503, body="<h1>no</h1>")
    assert caller.send("POST", "/gate/authorize", {"feature_code": FEATURE}).status_code == 200
    assert other.send("POST", "/gate/authorize", {"feature_code": FEATURE}).status_code == 200
    limited = caller.send("POST", "/gate/authorize", {"feature_code": FEATURE})
    assert limited.status_code == 429
    assert limited.json()["hints"][0]["seconds"] == 7
    assert caller.ingest().text == "<h1>no</h1>"
    gate.faults.add("latency", seconds=0.2, times=None)
    begin = time.monotonic()
    assert caller.ingest().status_code == 200
    assert time.monotonic() - begin >= 0.2
    gate.faults.clear()
    with pytest.raises(ValueError, match="unknown route"):
        gate.faults.add("hang", "nowhere")


def test_the_gate_goes_away_and_comes_back(gate: Sandbox) -> None:
    """Stopped, connections are refused; started again it has the same port, keys and books."""
    caller = Caller(gate)
    lease, url = caller.authorize(), gate.base_url
    gate.stop()
    with pytest.raises(httpx.ConnectError):
        caller.commit(lease, 10, key="k")
    gate.start()
    assert gate.base_url == url
    assert caller.commit(lease, 10, key="k").status_code == 200
    assert gate.booked("c1").charged_xusd == 50


def test_a_poisoned_batch_reports_what_it_rolled_back(gate: Sandbox) -> None:
    """The bad habit of the batch route: committed in the answer, nothing in the books, replayed as a success."""
    caller = Caller(gate)
    items = [
        {"idempotency_key": "i-1", "lease_token": caller.authorize(), "feature_code": FEATURE, "quantity_minor": "10"},
        {"idempotency_key": "i-2", "lease_token": "lease.abc.0", "feature_code": FEATURE, "quantity_minor": "1"},
    ]
    for _ in range(2):
        answer = caller.send("POST", "/gate/commits/batch", {"items": items}, key="outer").json()["data"]
        assert [item["status"] for item in answer["items"]] == ["committed", "failed"]
        assert gate.booked("c1").charged_xusd == 0
    caller.send("POST", "/gate/commits/batch", {"items": items[:1]})
    assert gate.booked("c1").charged_xusd == 50


def test_received_requests_are_kept_without_their_signature(gate: Sandbox) -> None:
    """The log of requests has route, customer, key, body, status and fault; no header, no secret."""
    caller = Caller(gate)
    gate.faults.add("drop_before", "ingest")
    with pytest.raises(httpx.TransportError):
        caller.ingest(key="k-1")
    caller.ingest(key="k-1")
    lost, kept = gate.requests[-2:]
    assert (lost.route, lost.fault, lost.status) == ("ingest", "drop_before", None)
    assert (kept.route, kept.fault, kept.status, kept.idempotency_key) == ("ingest", None, 200, "k-1")
    assert (kept.principal_id, kept.body["quantity_minor"]) == ("c1", "10")
    assert gate.key_secret not in repr(gate.requests) + repr(gate) + repr(gate.config)
    assert "SVC-AUTH" not in repr(gate.requests)


# -- state -------------------------------------------------------------------------------------------------------------


def test_the_books_survive_a_restart_in_a_file(tmp_path: Path) -> None:
    """Another process on the same file has the key, leases, receipts and money; only the process cache is gone."""
    path = tmp_path / "state" / "gate.sqlite"
    with Sandbox(state=str(path)) as gate:
        caller = Caller(gate)
        done, open_lease = caller.authorize(), caller.authorize(key="auth-1")
        receipt = caller.commit(done, 160, meters=LINES, key="k-1").json()
        key_id, spendable = gate.key_id, gate.spendable("c1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with Sandbox(state=str(path)) as gate:
        caller = Caller(gate)
        assert gate.key_id == key_id
        assert gate.booked("c1").charged_xusd == PRICED
        assert gate.spendable("c1") == spendable
        assert caller.commit(done, 160, meters=LINES, key="k-1").json() == receipt
        assert caller.authorize(key="auth-1") == open_lease
        assert caller.commit(open_lease, 1).status_code == 200
        assert gate.booked("c1").charged_xusd == PRICED + 5


def test_an_acknowledged_booking_is_in_the_file_before_the_answer(tmp_path: Path) -> None:
    """Somebody else who opens the file after the answer finds the rating."""
    path = tmp_path / "gate.sqlite"
    with Sandbox(state=str(path)) as gate:
        commit_id = Caller(gate).ingest().json()["data"]["commit_id"]
        with sqlite3.connect(path) as reader:
            rows = reader.execute("SELECT body FROM sandbox_rows WHERE kind = 'ratings'").fetchall()
        assert [commit_id in body for (body,) in rows] == [True]


def test_two_gates_never_share_a_file(tmp_path: Path) -> None:
    """The second one is refused while the first lives, and welcome afterwards."""
    path = str(tmp_path / "gate.sqlite")
    with Sandbox(state=path), pytest.raises(ConfigurationError, match="in use by another"):
        Sandbox(state=path)
    Sandbox(state=path).close()


def test_a_file_of_another_version_is_named(tmp_path: Path) -> None:
    """A row that cannot be read is told as what it is, in one sentence."""
    path = tmp_path / "gate.sqlite"
    Sandbox(state=str(path)).close()
    with sqlite3.connect(path) as other:
        other.execute("INSERT INTO sandbox_rows (kind, id, body) VALUES ('realms', '[\"x\"]', '{}')")
    with pytest.raises(ConfigurationError, match="another version") as caught:
        Sandbox(state=str(path))
    assert "\n" not in str(caught.value)


def test_serve_runs_until_it_is_told_to_stop() -> None:
    """``serve`` calls back when it is ready, prints nothing of its own and ends cleanly on SIGTERM."""
    code = (
        "from vluna_llm.sandbox import SandboxConfig, serve\n"
        "serve(SandboxConfig(), ready=lambda gate: print(gate.base_url, flush=True))"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert httpx.get(url.replace("/mgt/v1", "/health")).json()["data"]["status"] == "healthy"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "", "")


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    """A file that is no state file of ours is refused with one sentence, and not changed."""
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE precious (x)")
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="not a state file"):
        Sandbox(state=str(path))
    assert path.read_bytes() == before
    path.write_text("hello, this is not a database at all")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Sandbox(state=str(path))


# -- dialect B ---------------------------------------------------------------------------------------------------------


def test_the_lease_dialect() -> None:
    """``lease`` in and out, preflight instead of cancel, trace ids, unknown meters refused when nothing registers."""
    with Sandbox(dialect="lease", auto_registry=False, features={FEATURE: {}}) as gate:
        caller = Caller(gate)
        assert caller.authorize(lease="mine-1") == "mine-1"
        again = caller.send("POST", "/gate/authorize", {"feature_code": FEATURE, "lease": "mine-1"})
        assert again.status_code == 409
        preflight = caller.send("POST", "/gate/preflight", {"feature_code": FEATURE}).json()
        assert set(preflight["data"]) == {
            "as_of",
            "feature_code",
            "feature_family_code",
            "window_start",
            "window_end",
        }
        assert caller.send("POST", "/gate/cancel", {"lease_token": "x"}).status_code == 404
        unknown = caller.commit("mine-1", meters=[{"meter_code": "x.y", "quantity_minor": "1"}])
        assert (unknown.status_code, unknown.json()["message"]) == (422, "meter_not_allowed_for_feature: x.y")
        answer = caller.commit("mine-1", 10).json()
        assert answer["data"]["lines"][0]["rating_status"] == "priced"
        assert len(answer["trace_id"]) == 32
        assert caller.commit("no-such-lease").json()["message"] == "lease not found"
        closed = caller.commit("mine-1", 3).json()
        assert closed["data"]["amount_xusd"] == "0"
        assert closed["hints"] == [{"type": "lease.closed_at_commit", "state": "closed"}]
        assert gate.booked("c1").charged_xusd == 50


def test_an_entitlement_error_of_the_lease_dialect_names_the_feature() -> None:
    """Dialect B: meta carries feature and family."""
    with Sandbox(dialect="lease", features={FEATURE: {"entitlement": True, "family": "llm"}}) as gate:
        meta = Caller(gate).send("POST", "/gate/authorize", {"feature_code": FEATURE}).json()["meta"]
        assert meta == {"status": 403, "feature_code": FEATURE, "feature_family_code": "llm"}


def test_the_gate_stays_on_loopback() -> None:
    """A gate with money to give is not offered to a network."""
    with pytest.raises(ConfigurationError, match="loopback"):
        Sandbox(host="0.0.0.0")
    with Sandbox() as gate, pytest.raises(ConfigurationError, match="choose another port"):
        Sandbox(port=int(gate.base_url.split(":")[2].split("/")[0])).start()
