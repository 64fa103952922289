"""The command line: what it prints, what it refuses, its exit codes. Against real gates on loopback."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")
pytest.importorskip("uvicorn", reason="these tests need the extra sandbox")

from vluna_llm import Settings, Vluna, __version__, call_context
from vluna_llm.cli import main
from vluna_llm.cli.verify import _clock, findings
from vluna_llm.errors import GateDenied
from vluna_llm.gate.wire import Answer
from vluna_llm.sandbox import Sandbox

SECRET = "VLUNA_SERVICE_KEY_SECRET"
URL = "VLUNA_SERVICE_BASE_URL"


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Ran]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Runs ``vluna-llm`` in this process, away from the developer's own journals."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def run(*arguments: str, **environment: str) -> Ran:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["vluna-llm", *arguments])
            with pytest.raises(SystemExit) as ended:
                main()
        code = ended.value.code
        out, err = capsys.readouterr()
        return Ran(0 if code is None else int(code), out, err)

    return run


def plain(text: str) -> str:
    """The text of a table without its line breaks."""
    return " ".join(text.split())


# -- the door ----------------------------------------------------------------------------------------------------------


def test_version(cli: Cli) -> None:
    """``--version`` is the version of the package."""
    assert cli("--version") == Ran(0, f"vluna-llm {__version__}\n", "")


def test_python_dash_m_is_the_same_command() -> None:
    """``python -m vluna_llm`` works where the script is not on the path."""
    ran = subprocess.run([sys.executable, "-m", "vluna_llm", "--version"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, f"vluna-llm {__version__}\n")


def test_help_imports_no_sdk_and_no_server() -> None:
    """``--help`` lists the commands and loads neither openai nor the embedded gate."""
    code = (
        "import sys\n"
        "from vluna_llm.cli import main\n"
        "sys.argv = ['vluna-llm', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit: pass\n"
        "heavy = {'openai', 'starlette', 'uvicorn', 'httpx', 'pydantic'} & set(sys.modules)\n"
        "print('LOADED', sorted(heavy))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("demo", "sandbox", "verify", "outbox"):
        assert f"  {command} " in ran.stdout
    assert "LOADED []" in ran.stdout


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_extra_the_command_names_it(package: str) -> None:
    """Without typer or rich there is one sentence with the extra to install, and no traceback."""
    code = f"import sys; sys.modules['{package}'] = None\nfrom vluna_llm.cli import main\nmain()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == "The command vluna-llm needs its extra: pip install 'vluna-llm[cli]'.\n"


@pytest.mark.parametrize(
    ("command", "package", "extra"), [("demo", "openai", "demo"), ("sandbox", "uvicorn", "sandbox")]
)
def test_a_command_names_the_extra_that_it_lacks(command: str, package: str, extra: str) -> None:
    """A command whose packages are missing names the extra to install."""
    code = f"import sys; sys.modules['{package}'] = None; sys.argv = ['vluna-llm', '{command}']\n"
    code += "from vluna_llm.cli import main\nmain()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert f"pip install 'vluna-llm[{extra}]'" in ran.stderr
    assert "Traceback" not in ran.stderr


# -- verify ------------------------------------------------------------------------------------------------------------


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


# -- sandbox -----------------------------------------------------------------------------------------------------------


def _serve(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vluna_llm", "sandbox", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _exports(server: subprocess.Popen[str]) -> tuple[dict[str, str], str]:
    """What a shell makes of the lines, and the line about stopping."""
    assert server.stdout is not None
    lines = [server.stdout.readline() for _ in range(5)]
    shell = subprocess.run(
        ["/bin/sh", "-c", f"{''.join(lines)}\nenv"], capture_output=True, text=True, check=True, env={}
    )
    env = dict(line.split("=", 1) for line in shell.stdout.splitlines() if line.startswith("VLUNA_"))
    return env, lines[-1]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_sandbox_prints_what_a_shell_needs_and_stops_cleanly(cli: Cli, stop: signal.Signals, tmp_path: Path) -> None:
    """The four lines are a working environment; Ctrl-C ends it with 0; the books survive in their file."""
    config = tmp_path / "gate.toml"
    config.write_text('realm_id = "realm-of-mine"\n')
    arguments = ("--port", "0", "--config", str(config), "--state", str(tmp_path / "books.sqlite3"))
    server = _serve(*arguments)
    try:
        env, last = _exports(server)
        assert set(env) == {URL, "VLUNA_REALM_ID", "VLUNA_SERVICE_KEY_ID", SECRET}
        assert env["VLUNA_REALM_ID"] == "realm-of-mine"
        assert "Ctrl-C" in last
        assert cli("verify", **env).code == 0
    finally:
        server.send_signal(stop)
        out, err = server.communicate(timeout=10)
    assert (server.returncode, out, err) == (0, "", "")
    again = _serve(*arguments)
    try:
        assert _exports(again)[0][SECRET] == env[SECRET]
    finally:
        again.terminate()
        again.communicate(timeout=10)


def test_sandbox_speaks_the_dialect_that_was_asked_for(cli: Cli) -> None:
    """``--dialect lease`` is a gate without cancel."""
    server = _serve("--port", "0", "--dialect", "lease")
    try:
        assert "lease: preflight, no cancel" in cli("verify", **_exports(server)[0]).out
    finally:
        server.terminate()
        server.communicate(timeout=10)


def test_sandbox_names_what_is_wrong(cli: Cli, gate: Sandbox, tmp_path: Path) -> None:
    """A port that is taken, a file that is not there and a setting that does not exist: one sentence each."""
    port = gate.base_url.split(":")[2].split("/")[0]
    taken = cli("sandbox", "--port", port)
    assert (taken.code, taken.out) == (2, "")
    assert "choose another port" in taken.err
    assert "There is no configuration file" in cli("sandbox", "--config", str(tmp_path / "no.toml")).err
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("dialekt = 1\n")
    assert "Unknown setting 'dialekt'" in cli("sandbox", "--config", str(wrong)).err


# -- outbox ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def left_behind(gate: Sandbox, make_vluna: Callable[..., Vluna], tmp_path: Path) -> Path:
    """A directory with a journal in which one operation waits for the gate, one was booked and one denied."""
    directory = tmp_path / "outbox"
    vluna = make_vluna(outbox=str(directory))
    with call_context(principal_id="acme") as scope, vluna.operation(feature_code="tools.search", estimate=1) as op:
        op.record(quantity=2)
    assert scope.wait(5)
    gate.set_credit("broke", 0)
    denied = vluna.operation(feature_code="tools.search", estimate=1)
    with call_context(principal_id="broke"), pytest.raises(GateDenied), denied:
        pass
    with call_context(principal_id="globex"), vluna.operation(feature_code="tools.search", estimate=1) as op:
        gate.stop()
        op.record(quantity=7)
    vluna.close(timeout=0.0)
    return directory


def test_outbox_lists_what_waits_and_nothing_else(cli: Cli, left_behind: Path) -> None:
    """Booked and denied operations are not listed; leases and the bytes for the gate are not shown."""
    ran = cli("outbox", str(left_behind), "--json")
    assert ran.code == 0
    data = json.loads(ran.out)
    (operation,) = data["operations"]
    assert operation["state"] in ("pending", "sent")
    assert operation["principal_id"] == "globex"
    assert operation["usage"] == {"input_tokens": 7}
    assert "lease." not in ran.out
    assert "lease_token" not in operation
    assert "body" not in operation
    table = cli("outbox", str(left_behind)).out
    assert "globex" in table
    assert "acme" not in table
    assert "1 operation(s)" in table


def test_outbox_changes_nothing(cli: Cli, gate: Sandbox, left_behind: Path, make_vluna: Callable[..., Vluna]) -> None:
    """Listing leaves the files as they are, and the next process still delivers what waits, once."""
    journals = sorted(left_behind.glob("journal-*.sqlite3"))
    before = [path.read_bytes() for path in journals]
    cli("outbox", str(left_behind))
    assert [path.read_bytes() for path in journals] == before
    gate.start()
    heir = make_vluna(outbox=str(left_behind))
    with call_context(principal_id="acme"), heir.operation(feature_code="tools.search", estimate=1) as op:
        op.record(quantity=1)
    assert heir.flush(10)
    assert [entry.quantity for entry in gate.booked("globex").entries] == [7]
    assert json.loads(cli("outbox", str(left_behind), "--json").out)["operations"] == []


def test_outbox_reads_the_journal_of_a_running_process(
    cli: Cli, gate: Sandbox, make_vluna: Callable[..., Vluna], tmp_path: Path
) -> None:
    """An operation in flight is counted while its process runs."""
    vluna = make_vluna(outbox=str(tmp_path / "live"))
    with call_context(principal_id="acme"), vluna.operation(feature_code="tools.search", estimate=1) as op:
        assert json.loads(cli("outbox", str(tmp_path / "live"), "--json").out)["in_flight"] == 1
        op.record(quantity=1)


@pytest.mark.parametrize("with_shared_memory", [True, False])
def test_outbox_reads_what_a_killed_process_left(
    cli: Cli, gate: Sandbox, make_vluna: Callable[..., Vluna], tmp_path: Path, with_shared_memory: bool
) -> None:
    """Rows that are only in the write-ahead log are seen, and the log is not moved into the file by looking."""
    vluna = make_vluna(outbox=str(tmp_path / "live"))
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    with call_context(principal_id="acme"), vluna.operation(feature_code="tools.search", estimate=1) as op:
        gate.stop()
        op.record(quantity=7)
    for path in (tmp_path / "live").glob("journal-*"):
        if path.suffix != ".lock" and (with_shared_memory or not path.name.endswith("-shm")):
            (crashed / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in crashed.iterdir() if not path.name.endswith("-shm")}
    assert any(name.endswith("-wal") and content for name, content in before.items())
    data = json.loads(cli("outbox", str(crashed), "--json").out)
    assert [operation["usage"] for operation in data["operations"]] == [{"input_tokens": 7}]
    assert {path.name: path.read_bytes() for path in crashed.iterdir() if not path.name.endswith("-shm")} == before


def test_outbox_looks_where_the_settings_say(cli: Cli, left_behind: Path, tmp_path: Path) -> None:
    """VLUNA_LLM_OUTBOX is the default; without it, every journal of this user."""
    assert "globex" in cli("outbox", VLUNA_LLM_OUTBOX=str(left_behind)).out
    assert "Nothing waits" in cli("outbox").out
    home = tmp_path / "state" / "vluna-llm" / "some-gate"
    home.parent.mkdir(parents=True)
    left_behind.rename(home)
    assert "globex" in cli("outbox").out


def test_outbox_names_a_journal_that_cannot_be_read(cli: Cli, tmp_path: Path) -> None:
    """A broken file is named and makes the exit code 1; it does not hide the others."""
    (tmp_path / "journal-1-broken.sqlite3").write_bytes(b"no database" * 100)
    ran = cli("outbox", str(tmp_path))
    assert ran.code == 1
    assert "journal-1-broken.sqlite3" in ran.out
    assert json.loads(cli("outbox", str(tmp_path), "--json").out)["unreadable"][0]["problem"]


def test_outbox_refuses_what_it_cannot_look_at(cli: Cli, tmp_path: Path) -> None:
    """An outbox in memory and a directory that is not there: one sentence each, exit code 2."""
    memory = cli("outbox", VLUNA_LLM_OUTBOX="memory")
    assert memory.code == 2
    assert "nothing on disk to list" in memory.err
    assert cli("outbox", str(tmp_path / "none")).err == f"There is no directory {tmp_path / 'none'}.\n"


# -- demo --live -------------------------------------------------------------------------------------------------------


def _live(gate: Sandbox, upstream: Any) -> dict[str, str]:
    return {**gate.env(), "OPENAI_API_KEY": "sk-mine", "OPENAI_BASE_URL": upstream.base_url}


@pytest.fixture
def upstream() -> Iterator[Any]:
    """Stands for the user's provider."""
    pytest.importorskip("openai", reason="the demo needs the extra openai")
    from vluna_llm.sandbox.replay import ReplayUpstream

    with ReplayUpstream() as running:
        yield running


LIVE = ("demo", "--live", "--model", "smollm2-135m-instruct")


def test_live_says_what_it_will_spend_and_does_nothing_unasked(cli: Cli, gate: Sandbox, upstream: Any) -> None:
    """Without a terminal and without --yes it stops after saying model, calls and upper bound."""
    ran = cli(*LIVE, "--principal", "me", **_live(gate, upstream))
    assert ran.code == 2
    assert "smollm2-135m-instruct" in ran.out
    assert "208 tokens" in ran.out
    assert "pass --yes" in ran.err
    assert upstream.served == ()
    assert gate.requests == []


def test_live_calls_and_shows_what_was_billed(cli: Cli, gate: Sandbox, upstream: Any) -> None:
    """With --yes two calls are made with the user's own settings, and both are charged to the customer."""
    ran = cli(*LIVE, "--principal", "me", "--yes", **_live(gate, upstream))
    assert ran.code == 0
    assert len(upstream.served) == 2
    assert len(gate.booked("me").applied) == 2
    assert f"{gate.booked('me').entries[0].charged_xusd:,}" in ran.out
    assert "sk-mine" not in ran.out + ran.err


def test_live_tells_a_refusal(cli: Cli, gate: Sandbox, upstream: Any) -> None:
    """A customer without credit: said, exit code 1, and the provider was not called."""
    gate.set_credit("me", 0)
    ran = cli(*LIVE, "--principal", "me", "--yes", **_live(gate, upstream))
    assert ran.code == 1
    assert "before the provider was called" in ran.out
    assert upstream.served == ()


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("OPENAI_API_KEY", "OPENAI_API_KEY is not set"),
        ("VLUNA_REALM_ID", "half configured: set VLUNA_REALM_ID"),
        ("principal", "pass --principal"),
    ],
)
def test_live_names_what_is_missing(cli: Cli, gate: Sandbox, upstream: Any, missing: str, said: str) -> None:
    """Before anything is announced or called: one sentence with what is missing."""
    env = _live(gate, upstream)
    env.pop(missing, None)
    payer = () if missing == "principal" else ("--principal", "me")
    ran = cli(*LIVE, "--yes", *payer, **env)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert upstream.served == ()


def test_live_refuses_while_billing_is_off(cli: Cli, gate: Sandbox, upstream: Any) -> None:
    """With the mode off nothing would be billed, so nothing is spent either."""
    ran = cli(*LIVE, "--yes", "--principal", "me", **_live(gate, upstream), VLUNA_LLM_MODE="off")
    assert ran.code == 2
    assert "VLUNA_LLM_MODE is 'off'" in ran.err
    assert upstream.served == ()


def test_settings_of_the_environment_are_not_read_by_these_tests() -> None:
    """The fixture that hides the developer's own settings works here too."""
    assert Settings().base_url is None
