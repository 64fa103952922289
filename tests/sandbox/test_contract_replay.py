"""Every captured exchange of the real gate that concerns an endpoint of ours, replayed against the embedded one.

The exchanges are read where they are (``../shared/contract/exchanges``) and skipped where they are not. Each must
agree on status, code, message, shape, hints and money; what differs on purpose stands in ``DELIBERATE`` with a reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import contract_setups
import pytest
from contract_booked import booked
from contract_concurrency import CONCURRENT
from contract_lab import PROCESSES, REALM, Lab, Reply, canonical, digest, mac
from contract_match import TOKEN, Ids, differences

from vluna_llm.sandbox.fields import parse_time

EXCHANGES = Path(__file__).resolve().parents[3] / "shared" / "contract" / "exchanges"

NOT_OURS = {
    "ops-17-revenue-report": "POST ops/reports/revenue",
    "ops-20-billing-user-activity": "GET billing-users/{id}/activity",
    "ops-21-billing-user-wallet": "GET billing-users/{id}/wallet",
    "ops-22-billing-user-summary": "GET billing-users/{id}/summary",
}
"""Exchanges with endpoints that this gate does not have."""

_SERIAL = "requests are handled one after another here, so nothing deadlocks; 500s are a fault mode"
DELIBERATE = {
    "concurrency-03-authorizes-one-key": _SERIAL,
    "concurrency-06-batches-opposite-order": _SERIAL,
    "concurrency-07-new-principal-storm": _SERIAL,
    "concurrency-08-auto-registry-storm": _SERIAL,
    "concurrency-10-quota-overshoot": "commits do not race here: the second one is told that the quota is exceeded",
    "concurrency-13-meter-order-deadlock": _SERIAL,
    "concurrency-14-first-commits-in-parallel": _SERIAL,
    "concurrency-16-first-commits-sorted-with-retry": _SERIAL,
    "concurrency-17-first-commits-mixed-order-with-retry": _SERIAL,
    "concurrency-18-ten-users-one-account": _SERIAL,
    "concurrency-20-first-ingests": _SERIAL,
}
"""Deliberate differences, at most 5 % of the cases."""


def load() -> dict[str, dict[str, Any]]:
    if not EXCHANGES.is_dir():
        return {}
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(EXCHANGES.glob("*.json")))
    return {case["case"]: case for case in found if case["case"] not in NOT_OURS}


CASES = load()


def group_of(case: str) -> str:
    """Cases of one group share a laboratory and run in order."""
    parts = case.split("-")
    head = []
    for part in parts:
        if part.isdigit():
            break
        head.append(part)
    return "-".join(head)


class Run:
    """One exchange on its way: what was captured, and what is sent instead."""

    def __init__(self, lab: Lab, ids: Ids, case: dict[str, Any], at_ms: int) -> None:
        request = case["request"]
        self.lab, self.ids, self.at_ms = lab, ids, at_ms
        self.case: str = case["case"]
        self.method: str = request["method"]
        self.path: str = request["path"]
        self.signed_path = self.path
        self.headers: dict[str, str] = dict(request["headers"])
        self.signed_headers = dict(self.headers)
        self.body: Any = request["body"]
        self.answer_body: Any = case["response"]["body"]
        self.captured_booked: dict[str, Any] = case["booked"]
        self.raw_body: bytes | None = request["body_raw"].encode() if "body_raw" in request else None
        self.key_name = "lab"
        self.bearer: str | None = None
        self.sent_body: Any = None
        self.old_canonical = False
        self.process = contract_setups.process_of(self.case)

    @property
    def principal(self) -> str:
        return self.headers.get("x-principal-id", "")

    @property
    def user(self) -> str:
        return self.headers.get("x-user-id", "u1")

    def moment(self, text: str) -> int:
        ms = parse_time(text)
        assert ms is not None
        return ms

    def token(self) -> str:
        """The only lease token of the request, as captured."""
        tokens = {match[0] for match in TOKEN.finditer(json.dumps(self.body))}
        assert len(tokens) == 1, tokens
        return tokens.pop()

    def token_of(self, case: str) -> str:
        match = TOKEN.search(json.dumps(CASES[case]["request"]["body"]))
        assert match is not None
        return match[0]

    def answer_of(self, case: str) -> Any:
        return CASES[case]["response"]["body"]

    def bind(self, captured: str, ours: dict[str, Any]) -> None:
        """Let a captured token stand for a lease of ours."""
        match = TOKEN.fullmatch(captured)
        assert match is not None
        self.ids.learn(captured, ours["lease_token"])
        self.ids.learn(match[1], ours["lease_id"])

    def fresh_lease(self, captured: str, *, process: str = "main") -> dict[str, Any]:
        feature = self.body.get("feature_code") if isinstance(self.body, dict) else None
        known = isinstance(feature, str) and (REALM, feature.lower()) in self.lab.store.features.rows
        mixed = self.case.startswith(("commit-25", "batch"))
        code = feature.lower() if known and isinstance(feature, str) and not mixed else "openai.gpt-4o"
        data: dict[str, Any] = self.lab.authorize(self.principal, code, process=process)
        self.bind(captured, data)
        return data

    def prepare(self) -> None:
        """Bring the laboratory to where the exchange starts."""
        if "ts" in self.headers.get("authorization", "") and self.at_ms:
            self.lab.at(self.at_ms)
        self._customers()
        contract_setups.before(self)
        for match in TOKEN.finditer(json.dumps(self.body)):
            if match[0] not in self.ids.ours and not match[1].startswith("00000000-"):
                self.fresh_lease(match[0])

    def _customers(self) -> None:
        name = self.principal
        realm = self.headers.get("x-realm-id", REALM)
        if not name or name.startswith(contract_setups.NEVER_SEEN) or realm != REALM or name.strip() != name:
            return
        if self.lab.store.accounts.get(REALM, name) is None and name.isascii():
            known = [spec for prefix, spec in contract_setups.CUSTOMERS.items() if name.startswith(prefix)]
            spec = known[0] if known else {"credit": contract_setups.AMPLE}
            self.lab.customer(name, **spec)

    def send(self) -> Reply:
        """Translate, sign and send the request."""
        self.sent_body = _translated(self.body, self.ids)
        path, signed_path = self.ids.translate(self.path), self.ids.translate(self.signed_path)
        raw = self.raw_body
        if raw is None:
            # A captured null is no body at all.
            raw = b"" if self.sent_body is None else json.dumps(self.sent_body, separators=(",", ":")).encode()
        headers = {name: self.ids.translate(value) for name, value in self.headers.items()}
        signed = {name: self.ids.translate(value) for name, value in self.signed_headers.items()}
        for some in (headers, signed):
            if "content-digest" in some and not self.case.startswith(("auth-15", "auth-16")):
                some["content-digest"] = digest(raw)
        if "authorization" in headers:
            headers["authorization"] = self._authorization(headers["authorization"], signed_path, signed)
        return self.lab.send(self.process, self.method, path, headers, raw)

    def _authorization(self, captured: str, path: str, signed: dict[str, str]) -> str:
        if "<token>" in captured:
            return f"Bearer {self.bearer or 'garbage'}"
        key_id, secret = self.lab.keys.get(self.key_name, ("pk-nobody", self.lab.keys["lab"][1]))
        fields = dict(part.lstrip().split("=", 1) for part in captured.partition(" ")[2].split(",") if "=" in part)
        text = canonical(self.method, path, fields.get("ts", ""), fields.get("nonce", ""), signed)
        if self.old_canonical:
            kept = [line for line in text.split("\n") if not line.startswith(("x-user-id:", "x-billing-user-id:"))]
            text = "\n".join([*kept[:4], *sorted(kept[4:])])
        return captured.replace("<service-key-id>", key_id).replace("<base64-signature>", mac(secret, text))


def _translated(value: Any, ids: Ids) -> Any:
    if isinstance(value, dict):
        return {name: _translated(item, ids) for name, item in value.items()}
    if isinstance(value, list):
        return [_translated(item, ids) for item in value]
    return ids.translate(value) if isinstance(value, str) else value


def replay(lab: Lab, ids: Ids, case: dict[str, Any], at_ms: int) -> list[str]:
    """Replay one exchange; what differs."""
    if case["case"] in CONCURRENT:
        return CONCURRENT[case["case"]](lab, case)
    run = Run(lab, ids, case, at_ms)
    run.prepare()
    if case["case"] == "batch-17-300-items":
        return _three_hundred(run)
    reply = run.send()
    out = []
    captured = case["response"]
    if reply.status != captured["status"]:
        out.append(f"status is {reply.status}, captured {captured['status']}: {reply.body}")
    out += differences(captured["body"], reply.body, ids, "body")
    out += [f"header {name} must not be there" for name in ("x-request-id", "traceparent") if name in reply.headers]
    if reply.headers.get("content-type") != captured["headers"].get("content-type"):
        out.append(f"content-type is {reply.headers.get('content-type')}")
    expected = _booked_as_captured(case)
    if expected and not out:
        request = {"headers": run.headers, "body": run.sent_body}
        ours = booked(lab, _translated(expected, ids), request, reply.body)
        out += differences(expected, ours, ids, "booked")
    return out


def _booked_as_captured(case: dict[str, Any]) -> dict[str, Any]:
    """The captured books; where they deny a lease that the captured answer itself holds, the answer is right."""
    expected = dict(case["booked"])
    data = case["response"]["body"].get("data")
    if expected.get("lease_created") is False and isinstance(data, dict) and "lease_id" in data:
        expected["lease_created"] = True
    return expected


def _three_hundred(run: Run) -> list[str]:
    """The captured body is abridged: rebuilt from its first two items, the answer compared in its counts."""
    leases = [run.lab.authorize(run.principal) for _ in range(3)]
    first = run.body["items"][0]
    items = [
        {**first, "idempotency_key": f"z{index}", "lease_token": leases[index % 3]["lease_token"]}
        for index in range(300)
    ]
    run.raw_body = json.dumps({"items": items}).encode()
    run.body = None
    reply = run.send()
    data = reply.body["data"]
    captured = run.answer_body["data"]
    out = differences(captured["items"][0], data["items"][0], Ids(), "item")
    for name in ("committed_count", "failed_count"):
        if data[name] != captured[name]:
            out.append(f"{name} is {data[name]}")
    charged = [
        sum(r.charged_xusd for r in run.lab.store.ratings.rows.values() if r.lease_id == lease["lease_id"])
        for lease in leases
    ]
    if charged != run.captured_booked["charged_per_lease"]:
        out.append(f"charged per lease {charged}")
    return out


def timestamps() -> dict[str, int]:
    """The moment of each request, from its signature; a neighbour's where it is no time."""
    out: dict[str, int] = {}
    last = 0
    for name, case in CASES.items():
        text = case["request"]["headers"].get("authorization", "")
        ts = text.partition("ts=")[2].partition(",")[0]
        ms = parse_time(ts) if ts.startswith("2026-11") else None
        last = ms or last
        out[name] = last or parse_time("2026-11-21T03:11:10Z") or 0
    return out


def new_lab(group: str) -> tuple[Lab, Ids]:
    lab, ids = Lab(), Ids()
    lab.at(parse_time("2026-11-21T03:09:14Z") or 0)
    lab.catalogue()
    lab.at(parse_time("2026-11-21T03:11:00Z") or 0)
    lab.customer("cust_rich", contract_setups.AMPLE)
    lab.customer("cust_rich2", contract_setups.AMPLE)
    lab.customer("cust_lab", 0)
    # A few commits before the captures began: 1500 units and 12,500 XUSD.
    lease = lab.authorize("cust_rich")
    lines = [{"meter_code": "openai.gpt-4o", "quantity_minor": 2500}]
    lab.commit("cust_rich", lease["lease_token"], 1500, meters=lines)
    lab.customer("cust_rich", 0, user="u_other")
    return lab, ids


@pytest.fixture(scope="module")
def results() -> dict[str, list[str]]:
    """Group by group, every exchange replayed once, in order."""
    out: dict[str, list[str]] = {}
    moments = timestamps()
    groups: dict[str, list[str]] = {}
    for name in CASES:
        groups.setdefault(group_of(name), []).append(name)
    for group, names in groups.items():
        lab, ids = new_lab(group)
        for name in names:
            try:
                out[name] = replay(lab, ids, CASES[name], moments[name])
            except Exception as error:
                out[name] = [f"replay failed: {type(error).__name__}: {error}"]
        lab.close()
    return out


@pytest.mark.skipif(not CASES, reason="the gate's captured exchanges (../shared/contract) are not beside this checkout")
def test_at_most_five_percent_differ_on_purpose() -> None:
    """The table of deliberate differences stays short and names only captured cases."""
    assert len(DELIBERATE) <= len(CASES) * 0.05
    assert set(DELIBERATE) <= set(CASES)
    assert set(PROCESSES) >= {contract_setups.process_of(name) for name in CASES}


@pytest.mark.parametrize("name", list(CASES) or [pytest.param("", marks=pytest.mark.skip("no ../shared/contract"))])
def test_answers_like_the_real_gate(
    name: str, results: dict[str, list[str]], record_property: Any, request: pytest.FixtureRequest
) -> None:
    """The embedded gate agrees with the captured exchange; one that differs on purpose really differs."""
    found = results[name]
    if name in DELIBERATE:
        assert found, f"{name} is listed as a deliberate difference but agrees: strike it from the table"
        record_property("contract", "different")
        return
    assert not found, "\n".join([CASES[name]["setup"], *found])
    record_property("contract", "agrees")
