"""What a gate's address and key may look like; every mistake is one sentence that names the setting."""

from __future__ import annotations

import base64

import pytest

from vluna_llm.errors import ConfigurationError
from vluna_llm.gate.credentials import GateCredentials, header_value, is_loopback

SECRET = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
GOOD = {"base_url": "https://gate.example.com/mgt/v1", "realm_id": "r", "key_id": "pk-1", "secret": SECRET}


def test_good_credentials() -> None:
    """A slash at the end is dropped, the secret is decoded, blanks around it are forgiven."""
    credentials = GateCredentials(**{**GOOD, "base_url": "https://gate.example.com/mgt/v1/", "secret": f" {SECRET}\n"})
    assert credentials.base_url == "https://gate.example.com/mgt/v1"
    assert credentials.path == "/mgt/v1"
    assert credentials.health_path == "/health"
    assert credentials.key == bytes(range(32))
    assert GateCredentials(**{**GOOD, "secret": bytes(range(32))}).key == bytes(range(32))


def test_health_keeps_a_prefix_and_drops_the_api_path() -> None:
    """Behind a prefix the health check is under the prefix; under another path it is at the root."""
    assert GateCredentials(**{**GOOD, "base_url": "https://h/billing/mgt/v1"}).health_path == "/billing/health"
    assert GateCredentials(**{**GOOD, "base_url": "https://h/other"}).health_path == "/health"


@pytest.mark.parametrize(
    ("change", "setting", "needle"),
    [
        ({"base_url": ""}, "VLUNA_SERVICE_BASE_URL", "is empty"),
        ({"base_url": None}, "VLUNA_SERVICE_BASE_URL", "is empty"),
        ({"base_url": "gate.example.com/mgt/v1"}, "VLUNA_SERVICE_BASE_URL", "scheme"),
        ({"base_url": "ftp://gate.example.com/mgt/v1"}, "VLUNA_SERVICE_BASE_URL", "scheme"),
        ({"base_url": "https:///mgt/v1"}, "VLUNA_SERVICE_BASE_URL", "host"),
        ({"base_url": "https://h:99999/mgt/v1"}, "VLUNA_SERVICE_BASE_URL", "not a URL"),
        ({"base_url": "https://[::1/mgt/v1"}, "VLUNA_SERVICE_BASE_URL", "not a URL"),
        ({"base_url": "https://h/mgt/v1?x=1"}, "VLUNA_SERVICE_BASE_URL", "query"),
        ({"base_url": "https://h/mgt/v1#top"}, "VLUNA_SERVICE_BASE_URL", "query"),
        ({"base_url": "https://u:p@h/mgt/v1"}, "VLUNA_SERVICE_BASE_URL", "password"),
        ({"base_url": "https://h"}, "VLUNA_SERVICE_BASE_URL", "/mgt/v1"),
        ({"base_url": "https://h/"}, "VLUNA_SERVICE_BASE_URL", "/mgt/v1"),
        ({"base_url": "https://h/mgt v1"}, "VLUNA_SERVICE_BASE_URL", "percent-encode"),
        ({"base_url": "https://h/größe"}, "VLUNA_SERVICE_BASE_URL", "percent-encode"),
        ({"base_url": "http://gate.example.com/mgt/v1"}, "VLUNA_SERVICE_BASE_URL", "plain http"),
        ({"realm_id": ""}, "VLUNA_REALM_ID", "empty"),
        ({"key_id": ""}, "VLUNA_SERVICE_KEY_ID", "empty"),
        ({"key_id": "pk,1"}, "VLUNA_SERVICE_KEY_ID", "comma"),
        ({"key_id": "pk 1"}, "VLUNA_SERVICE_KEY_ID", "blank"),
        ({"secret": ""}, "VLUNA_SERVICE_KEY_SECRET", "empty"),
        ({"secret": "not base64!"}, "VLUNA_SERVICE_KEY_SECRET", "not base64"),
        ({"secret": "größe"}, "VLUNA_SERVICE_KEY_SECRET", "not base64"),
        ({"secret": base64.b64encode(b"short").decode()}, "VLUNA_SERVICE_KEY_SECRET", "5 bytes"),
        ({"secret": b"short"}, "VLUNA_SERVICE_KEY_SECRET", "5 bytes"),
    ],
)
def test_mistakes_name_the_setting(change: dict[str, object], setting: str, needle: str) -> None:
    """One sentence, the setting and what to do; never the secret itself."""
    with pytest.raises(ConfigurationError) as caught:
        GateCredentials(**{**GOOD, **change})  # type: ignore[arg-type]
    text = str(caught.value)
    assert setting in text
    assert needle in text
    assert "\n" not in text
    if change.get("secret"):
        assert str(change["secret"]) not in text


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "gate.localhost", "[::1]"])
def test_plain_http_is_fine_on_this_machine(host: str) -> None:
    """Nobody is on the way between two processes of one machine."""
    assert is_loopback(host)
    assert GateCredentials(**{**GOOD, "base_url": f"http://{host}:8080/mgt/v1"}).base_url.startswith("http://")


@pytest.mark.parametrize("host", ["10.0.0.1", "localhost.example.com", "gate", "0.0.0.0", "127.0.0.1.example.com"])
def test_plain_http_elsewhere_has_to_be_allowed(host: str) -> None:
    """Another machine needs TLS, or somebody who says that it does not."""
    url = f"http://{host}/mgt/v1"
    with pytest.raises(ConfigurationError, match="plain http"):
        GateCredentials(**{**GOOD, "base_url": url})
    assert GateCredentials(**GOOD | {"base_url": url}, allow_plaintext=True).base_url == url


def test_header_value_takes_what_verifies() -> None:
    """ASCII, inner blanks and Latin-1 pass; a long key passes where its own limit allows."""
    for value in ("customer_123", "a b", "café", "x" * 255):
        assert header_value(value, "principal_id") == value
    assert header_value("k" * 2000, "idempotency_key", limit=2000) == "k" * 2000


@pytest.mark.parametrize("value", ["", " a", "a ", "a\tb\n", "a\r\nx: y", "顧客", "a\x85b", "x" * 256, None, 7, b"a"])
def test_header_value_refuses_what_does_not(value: object) -> None:
    """Everything that a header would change, cut or smuggle is refused, naming the argument."""
    with pytest.raises(ConfigurationError, match="principal_id"):
        header_value(value, "principal_id")


@pytest.mark.parametrize("value", ["k" * 2001, "k" * 300 + "\n", "k" * 300 + "\r\nx: y" + "k" * 300, "顧" * 300])
def test_a_long_key_is_checked_all_along(value: str) -> None:
    """The longer limit of a key does not let bad characters through."""
    with pytest.raises(ConfigurationError, match="idempotency_key"):
        header_value(value, "idempotency_key", limit=2000)
