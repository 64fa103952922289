"""SVC-AUTH: the signature that every request to the gate carries (gate contract, section 3)."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from binascii import b2a_base64
from datetime import datetime, timezone

JSON_CONTENT_TYPE = "application/json; charset=utf-8"
"""Content type of every request; it is signed byte for byte, so one spelling is used everywhere."""


def content_digest(body: bytes) -> str:
    """Value of the ``Content-Digest`` header for these raw bytes."""
    return f"sha-256=:{b2a_base64(hashlib.sha256(body).digest(), newline=False).decode('ascii')}:"


EMPTY_DIGEST = content_digest(b"")


class Signer:
    """Signs requests of one service key in one realm. Holds the secret; shows only the key id."""

    __slots__ = ("_alg_tail", "_key", "_scheme_head", "key_id", "realm_id")

    def __init__(self, *, key_id: str, key: bytes, realm_id: str) -> None:
        self.key_id = key_id
        self.realm_id = realm_id
        self._key = key
        self._scheme_head = f"SVC-AUTH keyId={key_id},sig="
        self._alg_tail = ",alg=HMAC-SHA256"

    def __repr__(self) -> str:
        return f"Signer(key_id={self.key_id!r}, realm_id={self.realm_id!r})"

    def sign(
        self,
        method: str,
        path: str,
        body: bytes,
        *,
        principal_id: str = "",
        user_id: str = "",
        idempotency_key: str = "",
        content_type: str = JSON_CONTENT_TYPE,
        ts: str | None = None,
        nonce: str | None = None,
    ) -> tuple[str, str]:
        """Return the values of ``Authorization`` and ``Content-Digest``.

        ``path`` is what goes on the wire, query included. Time and nonce are fresh unless given. The billing ids of
        the canonical string stay empty: they are never sent (design rule 11).
        """
        digest = content_digest(body) if body else EMPTY_DIGEST
        ts = ts or datetime.now(timezone.utc).isoformat()
        nonce = nonce or secrets.token_hex(16)
        canonical = (
            f"{method}\n{path}\nts:{ts}\nnonce:{nonce}\ncontent-digest:{digest}\ncontent-type:{content_type}\n"
            f"x-realm-id:{self.realm_id}\nx-principal-id:{principal_id}\nx-user-id:{user_id}\n"
            f"x-billing-account-id:\nx-billing-user-id:\nidempotency-key:{idempotency_key}"
        )
        mac = hmac.digest(self._key, canonical.encode("utf-8"), "sha256")
        signature = b2a_base64(mac, newline=False).decode("ascii")
        return f"{self._scheme_head}{signature},ts={ts},nonce={nonce}{self._alg_tail}", digest
