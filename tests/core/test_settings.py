"""Settings: every mistake is one sentence that names the setting and the fix, and no secret is ever shown."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vluna_llm import Settings, Vluna
from vluna_llm.errors import ConfigurationError

SECRET = base64.b64encode(bytes(range(32))).decode()
GATE: dict[str, Any] = {
    "base_url": "https://gate.example.com/mgt/v1",
    "realm_id": "realm",
    "key_id": "pk-ExampleKey",
    "key_secret": SECRET,
}
ENVIRONMENT = {
    "VLUNA_SERVICE_BASE_URL": GATE["base_url"],
    "VLUNA_REALM_ID": "realm",
    "VLUNA_SERVICE_KEY_ID": "pk-ExampleKey",
    "VLUNA_SERVICE_KEY_SECRET": SECRET,
}


def test_everything_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        **ENVIRONMENT,
        "VLUNA_LLM_MODE": "observe",
        "VLUNA_LLM_AUTHORIZE_DEADLINE": "0.5",
        "VLUNA_LLM_ON_ABORT": "estimate",
        "VLUNA_LLM_PRINCIPAL": "solo",
        "VLUNA_LLM_METERS": "never",
    }.items():
        monkeypatch.setenv(name, value)
    found = Vluna().settings
    assert (found.base_url, found.mode, found.authorize_deadline) == (GATE["base_url"], "observe", 0.5)
    assert (found.on_abort, found.principal, found.meters) == ("estimate", "solo", "never")


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLUNA_LLM_MODE", "observe")
    assert Settings(mode="off").mode == "off"


@pytest.mark.parametrize("missing", list(ENVIRONMENT))
def test_a_half_configured_environment_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name, value in ENVIRONMENT.items():
        if name != missing:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"half configured: set {missing} "):
        Vluna()


def test_an_unconfigured_environment_names_all_four() -> None:
    with pytest.raises(ConfigurationError) as error:
        Vluna()
    assert all(name in str(error.value) for name in ENVIRONMENT)


def test_off_needs_no_gate() -> None:
    assert Vluna(mode="off").mode == "off"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"mode": "sometimes"}, "VLUNA_LLM_MODE"),
        ({"authorize_deadline": 0}, "VLUNA_LLM_AUTHORIZE_DEADLINE"),
        ({"authorize_deadline": "soon"}, "VLUNA_LLM_AUTHORIZE_DEADLINE"),
        ({"on_abort": "explode"}, "VLUNA_LLM_ON_ABORT"),
        ({"principal": ""}, "VLUNA_LLM_PRINCIPAL is empty"),
        ({"principal": "日本"}, "VLUNA_LLM_PRINCIPAL.*Latin-1"),
        ({"principel": "x"}, "principel is not a setting"),
        ({"key_secret": "not base64!"}, "VLUNA_SERVICE_KEY_SECRET is not base64"),
        ({"key_secret": "AAEC"}, "VLUNA_SERVICE_KEY_SECRET decodes to 3 bytes"),
        ({"base_url": "gate.example.com"}, "VLUNA_SERVICE_BASE_URL needs a scheme"),
        ({"base_url": "http://gate.example.com/mgt/v1"}, "plain http"),
        (
            {"outbox_shared": "mysql://user:not base64!@db/x"},
            "VLUNA_LLM_OUTBOX_SHARED must be a URL such as postgresql:",
        ),
        ({"outbox_shared": "postgresql://user:not base64!@[::1/x"}, "VLUNA_LLM_OUTBOX_SHARED must be a URL"),
        ({"outbox_shared": ""}, "VLUNA_LLM_OUTBOX_SHARED must be a URL"),
        ({"features": "/nowhere/f.toml"}, "VLUNA_LLM_FEATURES: cannot read"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_setting(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence) as error:
        Vluna(**{**GATE, **given})
    text = str(error.value)
    assert "\n" not in text
    assert SECRET not in text
    assert "not base64!" not in text


def test_plain_http_is_for_this_machine_or_on_request() -> None:
    Vluna(**{**GATE, "base_url": "http://127.0.0.1:9/mgt/v1"})
    Vluna(**{**GATE, "base_url": "http://gate.internal/mgt/v1", "allow_plaintext": True})


def test_no_secret_is_in_a_repr(capsys: pytest.CaptureFixture[str]) -> None:
    vluna = Vluna(**GATE, outbox="memory")
    shared = Settings(outbox_shared="postgresql://user:hunter2@db/x")
    seen = f"{vluna!r} {vluna.settings!r} {vluna.gate!r} {vluna.async_gate!r} {vluna.settings.model_dump()} {shared!r}"
    assert SECRET not in seen
    assert "hunter2" not in seen


def test_a_features_file_maps_models(tmp_path: Path) -> None:
    path = tmp_path / "features.json"
    path.write_text(json.dumps({"gpt-4o*": "chat.premium"}))
    assert Vluna(**GATE, features=path)._features.resolve("gpt-4o-mini", "openai").feature_code == "chat.premium"
    path.write_text("{nonsense")
    with pytest.raises(ConfigurationError, match="VLUNA_LLM_FEATURES"):
        Vluna(**GATE, features=path)


def test_the_outbox_directory_is_by_gate_and_realm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    one, other = Settings(**GATE), Settings(**{**GATE, "realm_id": "other"})
    assert one.outbox_directory() != other.outbox_directory()
    assert str(one.outbox_directory()).startswith(str(tmp_path))
    assert Settings(outbox="memory").outbox_directory() is None


def test_importing_the_package_is_light() -> None:
    program = (
        "import sys, vluna_llm; "
        "print(sorted(m for m in ('httpx', 'pydantic', 'openai', 'opentelemetry', 'sqlite3') if m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import vluna_llm

    for name in vluna_llm.__all__:
        assert getattr(vluna_llm, name) is not None
    with pytest.raises(AttributeError):
        _ = vluna_llm.nothing  # type: ignore[attr-defined]
