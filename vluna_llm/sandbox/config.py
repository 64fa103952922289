"""Configuration of the sandbox gate: a small TOML file, or the same names as keyword arguments.

::

    dialect = "lease_token"            # or "lease"
    realm_id = "realm-sandbox"
    key_id = "pk-..."                  # generated where absent, like key_secret (base64, 32 bytes)
    state = "memory"                   # or a path: an SQLite file that survives a restart
    auto_registry = true               # unknown features come into being
    lease_ttl_seconds = 43200
    grace_ms = 60000
    first_call_fails = false           # true: the first call of a new principal answers 500, as on the real server
    reject_colliding_keys = false      # true: a key that another caller used is refused instead of answered

    [defaults]                         # XUSD per unit, and the credit of a new customer; 1 XUSD = 0.000001 USD
    credit_xusd = 100000000
    primary_xusd = 5
    input_xusd = 3
    cached_xusd = 1
    output_xusd = 12

    [features."tools.search"]
    family = "tools"
    meters = ["tools.search.pages"]    # besides the primary one, which has the feature's name

    [prices."tools.search"]
    unit_price_xusd = 2500
    unit_quantity = 1
    rounding = "nearest"               # or "floor", "ceil"
    unit_cost_xusd = 1000

    [[quotas]]
    limit = 1000000
    window = "day"                     # second, minute, hour, day, week, or a number of seconds
    feature = "tools.search"           # absent: every feature
    principal = "customer_123"         # absent: every customer
    scope = "user"                     # or "account"

    [[rates]]                          # as quotas, counting authorizations
    limit = 60
    window = "minute"

    [credit]
    customer_123 = 5000000             # instead of defaults.credit_xusd

    [[faults]]
    kind = "error_before"
    route = "commits"
    times = 2
"""

from __future__ import annotations

import base64
import binascii
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import ConfigurationError
from ..types import Dialect
from . import fields
from .faults import ROUTES, FaultKind
from .money import ResidualMode, Rounding
from .problems import Refusal
from .records import Policy
from .world import Defaults, Options

_TOML: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

_WINDOWS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400, "week": 604_800}

Code = Annotated[str, Field(min_length=1, max_length=128)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DefaultsConfig(_Section):
    """What things get that nobody configured: prices in XUSD per unit, credit in XUSD."""

    credit_xusd: int = Field(default=100_000_000, ge=0)
    primary_xusd: int | None = Field(default=5, ge=0)
    input_xusd: int | None = Field(default=3, ge=0)
    cached_xusd: int | None = Field(default=1, ge=0)
    output_xusd: int | None = Field(default=12, ge=0)


class FeatureConfig(_Section):
    """A feature; ``meters`` are those besides the primary one, which is named like the feature."""

    family: str = "default"
    meters: tuple[Code, ...] = ()
    outcome_meters: tuple[Code, ...] = ()
    active: bool = True
    entitlement: bool = False


class PriceConfig(_Section):
    """The price of a meter: XUSD per ``unit_quantity`` units, and what it costs the operator."""

    unit_price_xusd: int = Field(ge=0)
    unit_quantity: int = Field(default=1, ge=1)
    rounding: Rounding = "nearest"
    unit_cost_xusd: int = Field(default=0, ge=0)
    cost_unit_quantity: int | None = Field(default=None, ge=1)
    cost_rounding: Rounding | None = None
    residual: ResidualMode = "none"


class LimitConfig(_Section):
    """A quota or a rate: ``limit`` per ``window``, -1 for unlimited."""

    limit: int = Field(ge=-1)
    window: int | Literal["second", "minute", "hour", "day", "week"] = "day"
    feature: Code | None = None
    principal: str | None = None
    scope: Literal["user", "account"] = "user"
    unit: str = "token"

    @property
    def seconds(self) -> int:
        """The length of the window."""
        return window_seconds(self.window)

    def policy(self, kind: Literal["quota", "rate"]) -> Policy:
        """The policy that this limit is."""
        unit = self.unit if kind == "quota" else "request"
        return Policy(kind, self.limit, self.seconds, self.feature, self.scope, unit)


class FaultConfig(_Section):
    """One scripted fault, see :class:`vluna_llm.sandbox.faults.Fault`; ``times`` 0 means for ever."""

    kind: FaultKind
    route: str | None = None
    times: int = Field(default=1, ge=0)
    skip: int = Field(default=0, ge=0)
    principal: str | None = None
    seconds: float = Field(default=0.0, ge=0)
    status: int = Field(default=503, ge=400, le=599)
    body: str = ""

    @field_validator("route")
    @classmethod
    def _known_route(cls, value: str | None) -> str | None:
        if value is not None and value not in ROUTES:
            raise ValueError(f"unknown route {value!r}; one of {', '.join(ROUTES)}")
        return value


class SandboxConfig(_Section):
    """The whole configuration. Without any, every feature code works, is priced, and every customer has credit."""

    dialect: Dialect = "lease_token"
    realm_id: str = Field(default="realm-sandbox", min_length=1)
    key_id: str | None = Field(default=None, min_length=1)
    key_secret: str | None = Field(default=None, repr=False)
    state: str = "memory"
    auto_registry: bool = True
    lease_ttl_seconds: float = Field(default=43_200, gt=0)
    grace_ms: int = Field(default=60_000, ge=0)
    ledger_sync: bool = False
    production: bool = True
    first_call_fails: bool = False
    reject_colliding_keys: bool = False
    defaults: DefaultsConfig = DefaultsConfig()
    features: dict[Code, FeatureConfig] = Field(default_factory=dict)
    prices: dict[Code, PriceConfig] = Field(default_factory=dict)
    quotas: tuple[LimitConfig, ...] = ()
    rates: tuple[LimitConfig, ...] = ()
    credit: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    faults: tuple[FaultConfig, ...] = ()

    @field_validator("key_secret")
    @classmethod
    def _secret_is_base64(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                raw = base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                raise ValueError("must be base64") from None
            if len(raw) < 16:
                raise ValueError("must be base64 of at least 16 bytes")
        return value

    @field_validator("key_id")
    @classmethod
    def _key_id_fits_the_header(cls, value: str | None) -> str | None:
        if value is not None and ("," in value or value != value.strip()):
            raise ValueError("must not contain a comma or blanks at its ends")
        return value

    @field_validator("features", "prices")
    @classmethod
    def _codes_are_codes(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {_code(name): item for name, item in value.items()}

    @model_validator(mode="after")
    def _key_is_whole(self) -> SandboxConfig:
        if (self.key_id is None) != (self.key_secret is None):
            raise ValueError("key_id and key_secret belong together: give both or neither")
        return self

    def options(self) -> Options:
        """What one server process is told."""
        return Options(
            dialect=self.dialect,
            auto_registry=self.auto_registry,
            lease_ttl_seconds=self.lease_ttl_seconds,
            grace_ms=self.grace_ms,
            ledger_sync=self.ledger_sync,
            production=self.production,
            first_call_fails=self.first_call_fails,
            reject_colliding_keys=self.reject_colliding_keys,
            defaults=Defaults(
                self.defaults.primary_xusd,
                self.defaults.input_xusd,
                self.defaults.cached_xusd,
                self.defaults.output_xusd,
                self.defaults.credit_xusd,
            ),
        )


STRICT: Mapping[str, Any] = {
    "auto_registry": False,
    "first_call_fails": True,
    "defaults": {
        "credit_xusd": 0,
        "primary_xusd": None,
        "input_xusd": None,
        "cached_xusd": None,
        "output_xusd": None,
    },
}
"""Overrides that make the gate start as a fresh real server does: nothing is known, priced or paid for."""


def window_seconds(window: int | str) -> int:
    """The length of a window given by name or in seconds. Raises ConfigurationError."""
    if isinstance(window, str):
        if window not in _WINDOWS:
            raise ConfigurationError(f"Unknown window {window!r}: use {', '.join(_WINDOWS)} or a number of seconds.")
        return _WINDOWS[window]
    if window < 1:
        raise ConfigurationError("A window is at least one second long.")
    return window


def make_config(
    source: SandboxConfig | Mapping[str, Any] | str | Path | None = None, **overrides: Any
) -> SandboxConfig:
    """A configuration from a file, a mapping or nothing, with overrides by name.

    Raises:
        ConfigurationError: the file cannot be read, or a setting is unknown or wrong; one sentence names it.
    """
    where = ""
    if isinstance(source, SandboxConfig):
        values = {name: getattr(source, name) for name in source.model_fields_set}
    elif isinstance(source, (str, Path)):
        values = _read(Path(source))
        where = f" in {source}"
    else:
        values = dict(source or {})
    defaults = overrides.get("defaults")
    if isinstance(defaults, Mapping) and isinstance(values.get("defaults"), Mapping):
        overrides["defaults"] = {**values["defaults"], **defaults}
    values.update(overrides)
    try:
        return SandboxConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            raise ConfigurationError(f"Unknown setting {name!r}{where}: check its spelling.") from None
        about = f"Setting {name!r}" if name else "The configuration"
        raise ConfigurationError(f"{about}{where} is wrong: {text[:1].lower()}{text[1:]}.") from None


def load_config(path: str | Path, **overrides: Any) -> SandboxConfig:
    """Read a TOML file. Raises ConfigurationError with one sentence that names the file and the mistake."""
    return make_config(Path(path), **overrides)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError(f"There is no configuration file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The configuration file {path} cannot be read: {error}.") from None
    try:
        values: dict[str, Any] = _TOML.loads(text)
        return values
    except _TOML.TOMLDecodeError as error:
        raise ConfigurationError(f"The configuration file {path} is not TOML: {error}.") from None


def _code(value: str) -> str:
    try:
        return fields.code(value, "code")
    except Refusal as refusal:
        raise ValueError(f"{value!r} is no feature or meter code: {refusal.message}") from None
