"""The TOML file: what it can say, and one clear sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from gate_caller import Caller

from vluna_llm.errors import ConfigurationError
from vluna_llm.sandbox import Sandbox, load_config

WHOLE = """
dialect = "lease_token"
realm_id = "realm-shop"
key_id = "pk-shop"
key_secret = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
lease_ttl_seconds = 60
grace_ms = 1000

[defaults]
credit_xusd = 1000
output_xusd = 20

[features."tools.search"]
family = "tools"
meters = ["tools.search.pages"]

[prices."tools.search"]
unit_price_xusd = 100
unit_quantity = 1000
rounding = "ceil"

[prices."tools.search.pages"]
unit_price_xusd = 7

[[quotas]]
limit = 500
window = "day"
feature = "tools.search"

[[rates]]
limit = 2
window = 60
principal = "limited"

[credit]
rich = 5000000

[[faults]]
kind = "error_before"
route = "ingest"
principal = "unlucky"
"""


def test_everything_in_the_file_takes_effect(tmp_path: Path) -> None:
    """Key, realm, prices, credit, quota, rate and fault of the file are those of the gate."""
    path = tmp_path / "gate.toml"
    path.write_text(WHOLE)
    with Sandbox(path) as gate:
        assert gate.env() == {
            "VLUNA_SERVICE_BASE_URL": gate.base_url,
            "VLUNA_REALM_ID": "realm-shop",
            "VLUNA_SERVICE_KEY_ID": "pk-shop",
            "VLUNA_SERVICE_KEY_SECRET": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
        }
        assert (gate.spendable("rich"), gate.spendable("new")) == (5_000_000, 1000)
        rich = Caller(gate, "rich")
        assert rich.ingest(1001, feature="tools.search").json()["data"]["amount_xusd"] == "200"
        lines = [{"meter_code": "tools.search.pages", "quantity_minor": 3}]
        assert rich.ingest(3, feature="tools.search", meters=lines).json()["data"]["amount_xusd"] == "21"
        lines = [{"meter_code": "other.model.tokens.output", "quantity_minor": 3}]
        assert rich.ingest(3, feature="other.model", meters=lines).json()["data"]["amount_xusd"] == "60"
        rich.commit(rich.authorize("tools.search"), 500, feature="tools.search")
        assert rich.send("POST", "/gate/authorize", {"feature_code": "tools.search"}).status_code == 402
        limited = Caller(gate, "limited")
        codes = [limited.send("POST", "/gate/authorize", {"feature_code": "x"}).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        unlucky = Caller(gate, "unlucky")
        assert [unlucky.ingest().status_code for _ in range(2)] == [500, 200]
        late = rich.authorize()
        gate.clock.advance(62)
        assert rich.commit(late).json()["hints"][0]["exceeded_grace"] is True


def test_arguments_win_over_the_file(tmp_path: Path) -> None:
    """An override by name replaces the file's value; ``defaults`` are merged."""
    path = tmp_path / "gate.toml"
    path.write_text(WHOLE)
    config = load_config(path, dialect="lease", defaults={"credit_xusd": 5})
    assert config.dialect == "lease"
    assert (config.defaults.credit_xusd, config.defaults.output_xusd) == (5, 20)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("dialekt = 'lease'", "Unknown setting 'dialekt'"),
        ("dialect = 'C'", "Setting 'dialect'"),
        ("key_id = 'pk-1'", "key_id and key_secret belong together"),
        ("key_id = 'pk-1'\nkey_secret = 'not base64!'", "must be base64"),
        ("lease_ttl_seconds = 0", "Setting 'lease_ttl_seconds'"),
        ("[prices.'a b']\nunit_price_xusd = 1", "'a b' is no feature or meter code"),
        ("[prices.x]\nunit_price_xusd = -1", "Setting 'prices.x.unit_price_xusd'"),
        ("[prices.x]\nunit_price_xusd = 1\nrounding = 'up'", "Setting 'prices.x.rounding'"),
        ("[[faults]]\nkind = 'explode'", "Setting 'faults.0.kind'"),
        ("[[faults]]\nkind = 'hang'\nroute = 'nowhere'", "unknown route 'nowhere'"),
        ("[[quotas]]\nwindow = 'day'", "Setting 'quotas.0.limit'"),
        ("this is not toml", "is not TOML"),
    ],
)
def test_a_mistake_gets_one_sentence_that_names_it(tmp_path: Path, text: str, sentence: str) -> None:
    """The sentence names the file, the setting and what is wrong; no stack of a library's own words."""
    path = tmp_path / "gate.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"gate\.toml") as caught:
        load_config(path)
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """No file, no guess."""
    with pytest.raises(ConfigurationError, match="no configuration file"):
        load_config(tmp_path / "none.toml")


def test_saving_the_same_configuration_again_keeps_the_carried_rest(tmp_path: Path) -> None:
    """Restarting with an unchanged price does not forget the started block of a floor price."""
    prices = {"tools.search": {"unit_price_xusd": 100, "unit_quantity": 1000, "rounding": "floor"}}
    amounts = []
    for _ in range(2):
        with Sandbox(state=str(tmp_path / "gate.sqlite"), prices=prices) as gate:
            amounts.append(Caller(gate).ingest(600, feature="tools.search").json()["data"]["amount_xusd"])
    assert amounts == ["0", "100"]
