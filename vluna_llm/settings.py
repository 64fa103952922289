"""Settings, from arguments or the environment; every mistake is one sentence that names the setting and the fix."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from .errors import ConfigurationError
from .identity import validate_id
from .usage.meters import MetersMode

Mode = Literal["enforce", "observe", "off"]
Settle = Literal["background", "inline"]
AuthorizeMode = Literal["strict", "overlap"]
OnUnavailable = Literal["allow", "deny"]
OnAbortSetting = Literal["cancel", "estimate", "drain"]
OnUnmetered = Literal["warn", "deny", "ignore"]

_CREDENTIALS = {
    "base_url": "VLUNA_SERVICE_BASE_URL",
    "realm_id": "VLUNA_REALM_ID",
    "key_id": "VLUNA_SERVICE_KEY_ID",
    "key_secret": "VLUNA_SERVICE_KEY_SECRET",
}


def _from(field: str, variable: str) -> AliasChoices:
    return AliasChoices(field, variable)


class Settings(BaseSettings):
    """How a `Vluna` behaves. Arguments win over the environment; the environment wins over the defaults.

    Attributes:
        base_url: the gate, e.g. ``https://gate.example.com/mgt/v1`` (``VLUNA_SERVICE_BASE_URL``).
        realm_id: the realm (``VLUNA_REALM_ID``).
        key_id: the service key's id (``VLUNA_SERVICE_KEY_ID``).
        key_secret: the service key's secret, base64 (``VLUNA_SERVICE_KEY_SECRET``).
        mode: ``enforce`` refuses what the gate refuses, ``observe`` asks and books but never refuses, ``off`` is off.
        outbox: a directory for the journal, or ``memory``; default: the user's state directory, by gate and realm.
        outbox_shared: a ``postgresql://`` URL: settlements are kept there as well, and any host delivers them.
        settle: ``background``, or ``inline`` to wait for the receipt before the answer is handed over.
        authorize: ``strict`` asks the gate first, ``overlap`` starts the model call meanwhile.
        authorize_deadline: seconds for an authorize with all its retries.
        on_gate_unavailable: ``allow`` runs the call and books it later, ``deny`` raises `GateUnavailable`.
        on_outbox_unavailable: ``allow`` runs the call when the journal cannot be written, ``deny`` refuses it.
        on_abort: what an abandoned answer costs: ``cancel`` nothing, ``estimate`` what was generated, ``drain`` what
            the rest of the answer reports.
        on_unmetered: what happens on an endpoint that costs money and is not metered: ``warn``, ``deny``, ``ignore``.
        meters: ``auto`` splits by the meters that have a price, ``always`` sends all, ``never`` only the total.
        principal: the customer of a single-customer program.
        user: that customer's user.
        features: a JSON or TOML file: model pattern to feature, family and meters.
        allow_plaintext: permit ``http://`` to a host that is not this machine.

    Raises:
        ConfigurationError: a value is missing or wrong.
    """

    model_config = SettingsConfigDict(
        env_prefix="VLUNA_LLM_",
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        hide_input_in_errors=True,
        env_ignore_empty=True,
    )

    base_url: str | None = Field(None, validation_alias=_from("base_url", "VLUNA_SERVICE_BASE_URL"))
    realm_id: str | None = Field(None, validation_alias=_from("realm_id", "VLUNA_REALM_ID"))
    key_id: str | None = Field(None, validation_alias=_from("key_id", "VLUNA_SERVICE_KEY_ID"))
    key_secret: SecretStr | None = Field(None, validation_alias=_from("key_secret", "VLUNA_SERVICE_KEY_SECRET"))

    mode: Mode = "enforce"
    outbox: str | None = None
    outbox_shared: SecretStr | None = None
    settle: Settle = "background"
    authorize: AuthorizeMode = "strict"
    authorize_deadline: float = Field(2.0, gt=0, le=60)
    on_gate_unavailable: OnUnavailable = "allow"
    on_outbox_unavailable: OnUnavailable = "allow"
    on_abort: OnAbortSetting = "cancel"
    on_unmetered: OnUnmetered = "warn"
    meters: MetersMode = "auto"
    principal: str | None = None
    user: str | None = None
    features: Path | None = None
    allow_plaintext: bool = False

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**{name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            raise ConfigurationError(_one_sentence(error)) from None

    @field_validator("outbox_shared")
    @classmethod
    def _check_shared(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not _is_postgres(value.get_secret_value()):
            raise ValueError(
                "VLUNA_LLM_OUTBOX_SHARED must be a URL such as postgresql://user:password@host:5432/database, "
                "with special characters percent-encoded."
            )
        return value

    @field_validator("principal", "user")
    @classmethod
    def _check_id(cls, value: str | None, info: Any) -> str | None:
        return value if value is None else validate_id(value, f"VLUNA_LLM_{info.field_name.upper()}")

    def missing_credentials(self) -> list[str]:
        """The environment names of the four gate settings that are not set."""
        return [variable for name, variable in _CREDENTIALS.items() if not _given(getattr(self, name))]

    def require_credentials(self) -> tuple[str, str, str, str]:
        """Base URL, realm, key id and secret, as they were given.

        Raises:
            ConfigurationError: one of the four is missing.
        """
        missing = self.missing_credentials()
        if missing or not (self.base_url and self.realm_id and self.key_id and self.key_secret):
            present = [variable for variable in _CREDENTIALS.values() if variable not in missing]
            have = f" ({', '.join(present)} {'is' if len(present) == 1 else 'are'} set)" if present else ""
            raise ConfigurationError(
                f"The gate is {'half' if present else 'not'} configured: set {', '.join(missing)}{have}; "
                'or set VLUNA_LLM_MODE="off" to run without billing.'
            )
        return self.base_url, self.realm_id, self.key_id, self.key_secret.get_secret_value()

    def outbox_directory(self) -> Path | None:
        """Where the journal lives; None for ``memory``. Made by gate and realm, so that two never share one."""
        if self.outbox == "memory":
            return None
        if self.outbox:
            return Path(self.outbox).expanduser()
        scope = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{re.sub(r'^https?://', '', self.base_url or '')}-{self.realm_id}")
        return journal_root() / scope.strip("-")[:150]

    def load_features(self) -> dict[str, Any]:
        """The parsed features file; empty where none is set.

        Raises:
            ConfigurationError: the file cannot be read, or is neither JSON nor TOML.
        """
        if self.features is None:
            return {}
        try:
            text = self.features.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ConfigurationError(f"VLUNA_LLM_FEATURES: cannot read {self.features} ({reason}).") from None
        try:
            if self.features.suffix.lower() == ".toml":
                return _parse_toml(text)
            parsed = json.loads(text)
        except ValueError as error:
            raise ConfigurationError(f"VLUNA_LLM_FEATURES: {self.features} is not valid: {error}.") from None
        if not isinstance(parsed, dict):
            raise ConfigurationError(f"VLUNA_LLM_FEATURES: {self.features} must hold an object at its top.")
        return parsed


def _is_postgres(url: str) -> bool:
    try:
        return urlsplit(url).scheme in ("postgresql", "postgres")  # the driver looks at the rest
    except ValueError:
        return False


def journal_root() -> Path:
    """Where this user's journals are by default: one directory for each gate and realm."""
    return _state_directory() / "vluna-llm"


def _given(value: str | SecretStr | None) -> bool:
    return bool(value.get_secret_value() if isinstance(value, SecretStr) else value)


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError:
        raise ConfigurationError(
            "VLUNA_LLM_FEATURES: reading TOML on Python 3.10 needs the package tomli; install it, or use JSON."
        ) from None
    parsed: dict[str, Any] = tomllib.loads(text)
    return parsed


def _state_directory() -> Path:
    if os.name == "nt":  # pragma: no cover - not run on Windows
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    given = os.environ.get("XDG_STATE_HOME")
    return Path(given) if given and Path(given).is_absolute() else Path.home() / ".local" / "state"


def _one_sentence(error: ValidationError) -> str:
    parts = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        name = str(item["loc"][0]) if item["loc"] else "settings"
        if item["type"] == "extra_forbidden":
            known = ", ".join(Settings.model_fields)
            parts.append(f"{name} is not a setting; the settings are {known}.")
            continue
        variable = _CREDENTIALS.get(name) or (name if name.isupper() else f"VLUNA_LLM_{name.upper()}")
        message = re.sub(r"^(Value error|Assertion failed), ", "", item["msg"])
        if item["type"].startswith("bool"):
            message = "use true or false"
        parts.append(message if variable in message else f"{variable}: {message[:1].lower()}{message[1:]}.")
    return " ".join(parts)
