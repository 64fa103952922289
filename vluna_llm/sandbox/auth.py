"""Who is calling: the signature check in the order of gate contract 3.4, and bearer tokens.

This is the counterpart of the client's signer and shares no code with it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .problems import FirstCall, Refusal
from .records import Account, Realm, ServiceKey, User
from .tokens import read_token
from .world import World

_AUTHORIZATION = re.compile(
    r"SVC-AUTH keyId=(?P<key_id>[^,]+),sig=(?P<sig>[^,]+),ts=(?P<ts>[^,]+),nonce=(?P<nonce>[^,]+),alg=HMAC-SHA256\Z"
)
_SIGNED_HEADERS = (
    "content-digest",
    "content-type",
    "x-realm-id",
    "x-principal-id",
    "x-user-id",
    "x-billing-account-id",
    "x-billing-user-id",
    "idempotency-key",
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling. ``account`` and ``user`` are set on routes that act for a customer, and for bearers."""

    realm_id: str
    key_id: str | None
    account: Account | None = None
    user: User | None = None
    principal_id: str | None = None
    user_id: str | None = None
    is_admin: bool = False

    @property
    def is_bearer(self) -> bool:
        """Whether an end user's token was shown instead of a service key."""
        return self.key_id is None

    def pair(self) -> tuple[Account, User]:
        """Customer and user of a route that acts for one."""
        if self.account is None or self.user is None:
            raise _no_bindings()
        return self.account, self.user


class KeyRing:
    """The service keys as one process has them in memory: read once, again when an unknown id is shown."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._keys: dict[str, ServiceKey] = {}
        self.reload()

    def reload(self) -> None:
        """Read the keys from the store."""
        self._keys = {key[0]: record for key, record in self._world.store.keys.rows.items()}

    def find(self, key_id: str) -> ServiceKey | None:
        """The key of this id, after a reload where it is not known."""
        key = self._keys.get(key_id)
        if key is None:
            self.reload()
            key = self._keys.get(key_id)
        return key


def canonical_string(method: str, target: str, ts: str, nonce: str, headers: Mapping[str, str]) -> str:
    """The twelve lines that are signed (gate contract 3.2). ``target`` is path and query as sent on the wire."""
    lines = [method.upper(), target, f"ts:{ts}", f"nonce:{nonce}"]
    lines += [f"{name}:{headers.get(name, '')}" for name in _SIGNED_HEADERS]
    return "\n".join(lines)


def signature(secret: str, canonical: str) -> str:
    """Base64 of the HMAC-SHA256 under the base64-decoded secret."""
    return base64.b64encode(hmac.digest(base64.b64decode(secret), canonical.encode(), "sha256")).decode()


def content_digest(body: bytes) -> str:
    """The Content-Digest header value of these body bytes."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def check_realm(world: World, headers: Mapping[str, str]) -> Realm:
    """Step 2: the realm that is named must exist and be active."""
    realm_id = headers.get("x-realm-id", "")
    if not realm_id:
        raise Refusal(400, "VALIDATION.INVALID_INPUT", "missing_realm")
    realm = world.store.realms.get(realm_id)
    if realm is None or realm.status == "deleted":
        meta = {"clear_cached_realm": True, "realm_id": realm_id}
        raise Refusal(404, "AUTH.UNKNOWN_REALM", "unknown_realm", meta=meta)
    if realm.status != "active":
        raise Refusal(403, "AUTH.INSUFFICIENT_SCOPE", "realm_inactive")
    return realm


def check_signature(
    world: World, ring: KeyRing, method: str, target: str, headers: Mapping[str, str], body: bytes
) -> ServiceKey:
    """Steps 3 to 10: a well-formed header of a known, usable key over exactly these bytes."""
    header = headers.get("authorization", "")
    if not header.upper().startswith("SVC-AUTH "):
        raise Refusal(401, "AUTH.UNAUTHORIZED", "unsupported_authorization_scheme")
    match = _AUTHORIZATION.match(header)
    if match is None:
        raise _bad_signature("Authorization header malformed")
    key = ring.find(match["key_id"])
    if key is None:
        raise Refusal(401, "AUTH.SERVICE_KEY_NOT_FOUND", "Service API key not recognized")
    if key.status != "active":
        raise Refusal(403, "AUTH.SERVICE_KEY_DISABLED", "Service API key is not active")
    if key.expires_at is not None and key.expires_at <= world.now():
        raise Refusal(403, "AUTH.SERVICE_KEY_EXPIRED", "Service API key has expired")
    if key.realm_id != headers["x-realm-id"]:
        raise Refusal(403, "AUTH.SERVICE_KEY_REALM_FORBIDDEN", "Service API key not authorized for realm")
    digest = headers.get("content-digest", "")
    if not digest:
        raise _bad_signature("Content-Digest header missing")
    if digest != content_digest(body):
        raise _bad_signature("Content-Digest mismatch")
    expected = signature(key.secret, canonical_string(method, target, match["ts"], match["nonce"], headers))
    if not hmac.compare_digest(expected.encode(), match["sig"].encode("utf-8", "replace")):
        raise _bad_signature("Signature mismatch")
    return key


def authenticate(
    world: World,
    ring: KeyRing,
    *,
    method: str,
    target: str,
    headers: Mapping[str, str],
    body: bytes,
    runtime: bool,
) -> Caller:
    """Steps 2 to 14 for one request. ``runtime`` routes act for a customer and create it on first sight.

    Raises:
        Refusal: in the order and the words of gate contract 3.4; also 500 for the first call of a new principal
            where the options ask for it (the account has been created all the same).
    """
    realm = check_realm(world, headers)
    is_admin = headers.get("x-realm-admin", "").lower() == "true"
    header = headers.get("authorization", "")
    if header.lower().startswith("bearer "):
        claims = read_token(world, header[7:].strip())
        if claims is None or claims["realm_id"] != realm.realm_id:
            raise Refusal(401, "AUTH.UNAUTHORIZED", "invalid_token")
        principal_id, user_id = claims["billing_principal_id"], claims["business_user_id"]
        account, _ = world.ensure_account(realm.realm_id, principal_id)
        user = world.ensure_user(account, user_id)
        if not user.active:
            raise Refusal(403, "AUTH.BILLING_USER_DISABLED", "billing user is not active")
        return Caller(realm.realm_id, None, account, user, principal_id, user_id, is_admin)
    key = check_signature(world, ring, method, target, headers, body)
    principal_id, user_id = headers.get("x-principal-id", ""), headers.get("x-user-id", "")
    if not runtime:
        return Caller(realm.realm_id, key.key_id, None, None, principal_id or None, user_id or None, is_admin)
    if not principal_id or not user_id:
        raise _no_bindings()
    account, created = world.ensure_account(realm.realm_id, principal_id)
    if created and world.options.first_call_fails:
        raise FirstCall
    if headers.get("x-billing-account-id", "") not in ("", account.account_id):
        raise Refusal(403, "AUTH.BILLING_ACCOUNT_MISMATCH", "billing account does not match principal")
    if key.allowed_accounts and account.account_id not in key.allowed_accounts:
        raise Refusal(403, "AUTH.SERVICE_KEY_ACCOUNT_FORBIDDEN", "Service API key not authorized for billing account")
    user = world.ensure_user(account, user_id)
    if headers.get("x-billing-user-id", "") not in ("", user.billing_user_id):
        raise Refusal(403, "AUTH.BILLING_USER_MISMATCH", "billing user does not match user id")
    if not user.active:
        raise Refusal(403, "AUTH.BILLING_USER_DISABLED", "billing user is not active")
    return Caller(realm.realm_id, key.key_id, account, user, principal_id, user_id, is_admin)


def _bad_signature(message: str) -> Refusal:
    return Refusal(401, "AUTH.INVALID_SERVICE_SIGNATURE", message)


def _no_bindings() -> Refusal:
    return Refusal(401, "AUTH.MISSING_RUNTIME_BINDINGS", "x-principal-id and x-user-id are required")
