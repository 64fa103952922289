"""A signing HTTP caller for tests of the embedded gate, independent of the package's own client."""

from __future__ import annotations

import json
import uuid
from typing import Any
from urllib.parse import urlsplit

import httpx
from contract_lab import digest, sign

from vluna_llm.sandbox import Sandbox

FEATURE = "openai.gpt-4o"


class Caller:
    """Calls one gate as one customer."""

    def __init__(self, gate: Sandbox, principal: str = "c1", user: str | None = None) -> None:
        self.gate = gate
        self.principal = principal
        self.user = user or principal
        self.http = httpx.Client(timeout=5, trust_env=False)

    def send(
        self, method: str, path: str, body: Any = None, *, key: str | None = None, **headers: str
    ) -> httpx.Response:
        """One signed request; a dict as body is sent as JSON."""
        url = self.gate.base_url + path
        parts = urlsplit(url)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        raw = b"" if body is None else json.dumps(body).encode()
        signed = {
            "content-digest": digest(raw),
            "content-type": "application/json; charset=utf-8",
            "x-realm-id": self.gate.realm_id,
            "x-principal-id": self.principal,
            "x-user-id": self.user,
            "idempotency-key": key or uuid.uuid4().hex,
        }
        sig = sign(self.gate.key_secret, method, target, "now", "n", signed)
        auth = f"SVC-AUTH keyId={self.gate.key_id},sig={sig},ts=now,nonce=n,alg=HMAC-SHA256"
        extra = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.request(method, url, content=raw, headers={**signed, "authorization": auth, **extra})

    def authorize(self, feature: str = FEATURE, *, key: str | None = None, **body: Any) -> str:
        """A lease token (either dialect)."""
        answer = self.send("POST", "/gate/authorize", {"feature_code": feature, **body}, key=key)
        assert answer.status_code == 200, answer.text
        data = answer.json()["data"]
        return str(data.get("lease_token") or data["lease"])

    def commit(
        self, lease: str, quantity: int = 10, *, key: str | None = None, feature: str = FEATURE, **body: Any
    ) -> httpx.Response:
        """A commit of the primary meter, or of ``meters``."""
        name = "lease" if self.gate.config.dialect == "lease" else "lease_token"
        return self.send(
            "POST",
            "/gate/commits",
            {name: lease, "feature_code": feature, "quantity_minor": str(quantity), **body},
            key=key,
        )

    def ingest(
        self, quantity: int = 10, *, key: str | None = None, feature: str = FEATURE, **body: Any
    ) -> httpx.Response:
        """An ingest of the primary meter, or of ``meters``."""
        return self.send(
            "POST", "/gate/ingest", {"feature_code": feature, "quantity_minor": str(quantity), **body}, key=key
        )
