"""Where the gate is and who is asking: checked once, before anything is sent."""

from __future__ import annotations

import base64
import binascii
import ipaddress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ..errors import ConfigurationError
from ..identity import MAX_ID_LENGTH, validate_id

SECRET_BYTES = 32
"""Length of a service key's secret once decoded (gate contract 3.2)."""

MAX_IDEMPOTENCY_KEY = 2000

_URL_EXAMPLE = "https://gate.example.com/mgt/v1"


def header_value(value: object, what: str, *, limit: int = MAX_ID_LENGTH) -> str:
    """Return ``value`` where it can be sent as a header whose signature verifies (gate contract 3.2).

    The rules are those of `vluna_llm.identity.validate_id`; plain ASCII, which is nearly everything, is passed quickly.
    An idempotency key may be longer than an id, hence ``limit`` (characters).

    Raises:
        ConfigurationError: the value cannot be sent; the text names ``what`` and the fix.
    """
    if isinstance(value, str) and value.isascii() and value.isprintable() and 0 < len(value) <= limit:
        if value[0] != " " and value[-1] != " ":
            return value
    elif isinstance(value, str) and MAX_ID_LENGTH < len(value) <= limit:
        for start in range(0, len(value), MAX_ID_LENGTH):
            validate_id(value[start : start + MAX_ID_LENGTH].strip(" ") or "-", what)
        if value == value.strip():
            return value
    return validate_id(value, what)


@dataclass(frozen=True, slots=True)
class GateCredentials:
    """Address, realm and service key of one gate; the secret is in no repr.

    Args:
        base_url: where the gate is, path included, e.g. ``https://gate.example.com/mgt/v1``
            (``VLUNA_SERVICE_BASE_URL``). A slash at the end is dropped.
        realm_id: ``VLUNA_REALM_ID``.
        key_id: ``VLUNA_SERVICE_KEY_ID``.
        secret: ``VLUNA_SERVICE_KEY_SECRET``: 32 bytes in base64, or the bytes themselves.
        allow_plaintext: accept ``http://`` to a host that is not this machine. Requests are signed, not encrypted:
            without TLS everybody on the way reads who is billed for what.

    Raises:
        ConfigurationError: one of them is missing or malformed. The text names the environment setting and the fix.
    """

    base_url: str
    realm_id: str
    key_id: str
    secret: str | bytes = field(repr=False)
    allow_plaintext: bool = False
    key: bytes = field(init=False, repr=False, compare=False)
    """The decoded secret."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_url", _checked_url(self.base_url, allow_plaintext=self.allow_plaintext))
        header_value(self.realm_id, "VLUNA_REALM_ID")
        header_value(self.key_id, "VLUNA_SERVICE_KEY_ID")
        if "," in self.key_id or " " in self.key_id:
            raise ConfigurationError(
                "VLUNA_SERVICE_KEY_ID contains a comma or a blank; copy the key id alone, e.g. 'pk-...'."
            )
        object.__setattr__(self, "key", _decoded_secret(self.secret))

    @property
    def path(self) -> str:
        """Path of the base URL as it goes on the wire, without a slash at the end, e.g. ``/mgt/v1``."""
        return urlsplit(self.base_url).path

    @property
    def health_path(self) -> str:
        """Path of the health check, which is outside of the API's own path (gate contract 7.1)."""
        path = self.path
        return f"{path[: -len('/mgt/v1')] if path.endswith('/mgt/v1') else ''}/health"


def is_loopback(host: str) -> bool:
    """Whether this host name can only mean the machine that we run on."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _checked_url(value: object, *, allow_plaintext: bool) -> str:
    setting = "VLUNA_SERVICE_BASE_URL"
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"{setting} is empty; set it to the address of your gate, e.g. {_URL_EXAMPLE}.")
    url = value.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigurationError(
            f"{setting} is not a URL ({error}); set it to something like {_URL_EXAMPLE}."
        ) from None
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigurationError(f"{setting} needs a scheme and a host; set it to something like {_URL_EXAMPLE}.")
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError(
            f"{setting} carries a user name or password; remove it, the service key signs requests."
        )
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise ConfigurationError(f"{setting} must not have a query or fragment; end it after the path, e.g. /mgt/v1.")
    if not url.isascii() or any(char <= " " or char == "\x7f" for char in url):
        raise ConfigurationError(f"{setting} contains a blank or a character outside ASCII; percent-encode it.")
    if not parts.path:
        raise ConfigurationError(f"{setting} has no path; append the API's own, usually /mgt/v1: {url}/mgt/v1.")
    if parts.scheme == "http" and not allow_plaintext and not is_loopback(host):
        raise ConfigurationError(
            f"{setting} is plain http:// to {host}, readable for everybody on the way; "
            "use https://, or set VLUNA_LLM_ALLOW_PLAINTEXT=true (allow_plaintext=True) where the network is trusted."
        )
    return url


def _decoded_secret(value: object) -> bytes:
    setting = "VLUNA_SERVICE_KEY_SECRET"
    if not isinstance(value, (str, bytes)) or not value.strip():
        raise ConfigurationError(f"{setting} is empty; set it to the base64 secret of your service key.")
    try:
        key = value if isinstance(value, bytes) else base64.b64decode(value.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise ConfigurationError(
            f"{setting} is not base64; copy the secret exactly as it was shown when the service key was made."
        ) from None
    if len(key) != SECRET_BYTES:
        raise ConfigurationError(
            f"{setting} decodes to {len(key)} bytes, not {SECRET_BYTES}; copy the whole secret of the service key."
        )
    return key
