"""``vluna-llm verify`` against real gates, gates of another dialect, and what is no gate."""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("uvicorn", reason="these tests need the extra sandbox")

from vluna_llm.cli.verify import _clock, findings
from vluna_llm.gate.wire import Answer
from vluna_llm.sandbox import Sandbox

SECRET = "VLUNA_SERVICE_KEY_SECRET"
URL = "VLUNA_SERVICE_BASE_URL"

Cli = Callable[..., Any]


def plain(text: str) -> str:
    """The text of a table without its line breaks."""
    return " ".join(text.split())


def test_verify_accepts_a_good_environment(cli: Cli, gate: Sandbox) -> None:
    """Settings that are right give exit code 0, and the table says which dialect the gate speaks."""
    ran = cli("verify", **gate.env())
    assert ran.code == 0
    assert "key and signature are accepted" in ran.out
    assert "lease_token: cancel, no preflight" in ran.out
    assert "Ready" in ran.out


def test_verify_creates_no_customer_and_shows_no_secret(cli: Cli, gate: Sandbox) -> None:
    """No request names a customer, so the gate creates none; the secret is in no output."""
    ran = cli("verify", **gate.env())
    wrong = cli("verify", **{**gate.env(), SECRET: "c2VjcmV0IHRoYXQgbXVzdCBub3QgYmUgc2hvd24"})
    assert {request.principal_id or None for request in gate.requests} == {None}
    assert gate.key_secret not in ran.out + ran.err
    assert "c2VjcmV0" not in wrong.out + wrong.err


def test_verify_tells_the_other_dialect(cli: Cli) -> None:
    """A gate with preflight and without cancel is told from one with cancel."""
    with Sandbox(dialect="lease") as other:
        assert "lease: preflight, no cancel" in cli("verify", **other.env()).out


def test_verify_reads_the_limits_of_a_customer_on_request(cli: Cli) -> None:
    """``--principal`` reads that customer's limits, also where its very first request answers 500."""
    with Sandbox(first_call_fails=True) as strict:
        ran = cli("verify", "--principal", "acme", **strict.env())
        assert ran.code == 0
        assert "limits of acme" in ran.out


def _broken(gate: Sandbox, name: str, value: str | None) -> dict[str, str]:
    env = gate.env()
    env.pop(name, None)
    return env if value is None else {**env, name: value}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (URL, None, f"{URL} not set Set it to the address of your gate"),
        ("VLUNA_REALM_ID", None, "VLUNA_REALM_ID not set Set it to the id of your realm"),
        (SECRET, None, f"{SECRET} not set Set it to the base64 secret"),
        (SECRET, "not base64!", f"{SECRET} is not base64 Copy the secret exactly"),
        (SECRET, "c2hvcnQ=", f"{SECRET} decodes to 5 bytes, not 32 Copy the whole secret"),
        (SECRET, "A" * 43 + "=", "Signature mismatch Check VLUNA_SERVICE_KEY_SECRET"),
        ("VLUNA_SERVICE_KEY_ID", "pk-unknown", "Service API key not recognized Check VLUNA_SERVICE_KEY_ID"),
        ("VLUNA_REALM_ID", "elsewhere", "unknown_realm Check VLUNA_REALM_ID"),
        (URL, "gate.example.com/mgt/v1", f"{URL} needs a scheme and a host"),
        (URL, "http://gate.example.com/mgt/v1", "set VLUNA_LLM_ALLOW_PLAINTEXT=true"),
        (URL, "http://127.0.0.1:9/mgt/v1", "Start the gate, or correct VLUNA_SERVICE_BASE_URL"),
        ("VLUNA_LLM_MODE", "enfroce", "VLUNA_LLM_MODE: input should be 'enforce', 'observe' or 'off'"),
        ("VLUNA_LLM_OUTBOX", "/dev/null/x", "VLUNA_LLM_OUTBOX /dev/null cannot be written"),
    ],
)
def test_verify_names_the_setting_and_the_fix(cli: Cli, gate: Sandbox, name: str, value: str | None, said: str) -> None:
    """Each mistake gives exit code 1 and a line with the setting and what to do."""
    ran = cli("verify", **_broken(gate, name, value))
    assert ran.code == 1
    assert said in plain(ran.out)
    assert ran.err == ""


def test_verify_tells_a_gate_at_another_path(cli: Cli, gate: Sandbox) -> None:
    """A base URL with the wrong path is told from a wrong key."""
    ran = cli("verify", **_broken(gate, URL, gate.base_url.replace("/mgt/v1", "/api")))
    assert ran.code == 1
    assert "usually ending in /mgt/v1" in plain(ran.out)


def test_verify_tells_a_web_server_that_is_no_gate(cli: Cli, gate: Sandbox, web_server: str) -> None:
    """A page that answers 200 to everything is not taken for a gate."""
    ran = cli("verify", **_broken(gate, URL, f"{web_server}/mgt/v1"))
    assert ran.code == 1
    assert "is not a gate Correct VLUNA_SERVICE_BASE_URL" in plain(ran.out)


def test_verify_warns_about_settings_that_nothing_reads(cli: Cli, gate: Sandbox) -> None:
    """A misspelt setting is named with the one that was probably meant; the rest is checked all the same."""
    ran = cli("verify", **gate.env(), VLUNA_LLM_ON_ABROT="cancel")
    assert ran.code == 0
    assert "VLUNA_LLM_ON_ABROT is no setting, so nothing reads it Did you mean VLUNA_LLM_ON_ABORT?" in plain(
        ran.out.replace("warn", "")
    )


def test_verify_as_json(cli: Cli, gate: Sandbox) -> None:
    """``--json`` holds the same findings."""
    data = json.loads(cli("verify", "--json", **gate.env()).out)
    assert data["ok"] is True
    assert {"signature", "dialect", "clock", "health"} <= {finding["name"] for finding in data["findings"]}


@pytest.mark.parametrize(("off", "status"), [(0, "ok"), (7200, "warn"), (-7200, "warn")])
def test_verify_compares_the_clocks(off: int, status: str) -> None:
    """A clock that is hours away from the gate's is worth a warning."""
    now = 1_795_000_000.0
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now + off))
    assert _clock(Answer(200, {"date": date}, b""), now).status == status


def test_findings_do_not_ask_a_gate_whose_settings_are_wrong(gate: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """With half a configuration nothing is sent anywhere."""
    for name, value in gate.env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(SECRET)
    found = {finding.name: finding.status for finding in findings(os.environ)}
    assert found["gate"] == "skip"
    assert found[SECRET] == "fail"
    assert gate.requests == []


@pytest.fixture
def web_server() -> Iterator[str]:
    """A web server that answers every request with a friendly page."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<html>Welcome</html>"
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()
