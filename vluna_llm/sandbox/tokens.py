"""End-user tokens: JSON Web Tokens signed with HS256 (gate contract 7.2)."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import secrets
from typing import Any

from .fields import iso, number
from .problems import FirstCall, invalid
from .world import World, new_id

_SCOPES = ("checkout", "portal")
_CLAIMS = ("realm_id", "billing_principal_id", "business_user_id")


def issue_token(world: World, realm_id: str, key_id: str | None, body: dict[str, Any]) -> dict[str, Any]:
    """The data of token/issue: a session token of one user of a customer, both created on first sight."""
    principal_id, user_id = body.get("principal_id"), body.get("user_id")
    if not isinstance(principal_id, str) or not principal_id.strip():
        raise invalid("missing_principal")
    if not isinstance(user_id, str) or not user_id.strip():
        raise invalid("missing_user_id")
    account, created = world.ensure_account(realm_id, principal_id)
    if created and world.options.first_call_fails:
        raise FirstCall
    user = world.ensure_user(account, user_id)
    wanted = body.get("scopes")
    scopes = [scope for scope in _SCOPES if isinstance(wanted, list) and scope in wanted] or list(_SCOPES)
    ttl = number(body.get("session_ttl_sec")) or 0
    ttl = min(max(ttl, 60), 3600) if ttl > 0 else 900
    issued = world.now() // 1000
    claims = {
        "scope": "billing:read billing:write",
        "realm_id": realm_id,
        "billing_account_id": account.account_id,
        "billing_user_id": user.billing_user_id,
        "billing_principal_id": principal_id,
        "business_user_id": user_id,
        "plt_scopes": scopes,
        "tu": "plt",
        "token_use": "platform",
        "tv": 1,
        "ib": key_id,
        "iat": issued,
        "exp": issued + ttl,
        "aud": "vluna-llm.sandbox",
        "iss": f"sandbox/realms/{realm_id}",
        "sub": user_id,
        "jti": new_id(),
    }
    header = {"alg": "HS256", "kid": f"plt:v1:realm:{realm_id}", "typ": "JWT"}
    unsigned = f"{_encode(_dump(header))}.{_encode(_dump(claims))}"
    return {
        "access_token": f"{unsigned}.{_sign(world, unsigned)}",
        "token_type": "Bearer",
        "expires_in": ttl,
        "expires_at": iso((issued + ttl) * 1000),
        "billing_account_id": account.account_id,
        "billing_user_id": user.billing_user_id,
    }


def read_token(world: World, token: str) -> dict[str, Any] | None:
    """The claims of a token of this gate that has not expired; None for anything else."""
    unsigned, _, mark = token.rpartition(".")
    if unsigned.count(".") != 1 or not hmac.compare_digest(_sign(world, unsigned).encode(), mark.encode()):
        return None
    try:
        claims = json.loads(_decode(unsigned.partition(".")[2]))
    except (ValueError, binascii.Error):
        return None
    if not isinstance(claims, dict) or not all(isinstance(claims.get(name), str) for name in _CLAIMS):
        return None
    expires = claims.get("exp")
    return claims if isinstance(expires, int) and expires * 1000 > world.now() else None


def _sign(world: World, unsigned: str) -> str:
    secret = world.store.secrets.get("tokens")
    if secret is None:
        secret = secrets.token_hex(32)
        with world.store.transaction():
            world.store.secrets.put("tokens", secret)
    return _encode(hmac.digest(bytes.fromhex(secret), unsigned.encode(), "sha256"))


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
