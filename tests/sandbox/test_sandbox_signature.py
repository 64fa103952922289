"""The gate's own signature check, against the worked vector of gate contract 3.3."""

from __future__ import annotations

import pytest

from vluna_llm.sandbox.auth import canonical_string, content_digest, signature

SECRET = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
TS = "2026-01-02T03:04:05.678901+00:00"
WHO = {
    "content-type": "application/json; charset=utf-8",
    "x-realm-id": "realm-demo",
    "x-principal-id": "customer_123",
    "x-user-id": "user_1",
}


@pytest.mark.parametrize(
    ("method", "target", "nonce", "key", "body", "expected"),
    [
        (
            "POST",
            "/mgt/v1/gate/authorize",
            "000102030405060708090a0b0c0d0e0f",
            "auth-7f9c0d52",
            b'{"feature_code":"openai.gpt-4o","estimated_quantity_minor":"1200"}',
            "IwLK0ywJIyHzk3o3Hj1ntwTPmutnySIPYe01nPWQDiQ=",
        ),
        (
            "GET",
            "/mgt/v1/gate/limits?feature_code=openai.gpt-4o&expand=quotas",
            "101112131415161718191a1b1c1d1e1f",
            "get-1",
            b"",
            "3sYFwsas6I04uKrq/i7++1L45YETKYV2r/G8r4Lj+cQ=",
        ),
    ],
)
def test_the_worked_vectors_verify(method: str, target: str, nonce: str, key: str, body: bytes, expected: str) -> None:
    """Digest, canonical string and signature are those that the official signer makes."""
    headers = {**WHO, "content-digest": content_digest(body), "idempotency-key": key}
    canonical = canonical_string(method, target, TS, nonce, headers)
    assert canonical.count("\n") == 11
    assert signature(SECRET, canonical) == expected


def test_the_empty_body_has_its_known_digest() -> None:
    """A GET is signed over the digest of zero bytes."""
    assert content_digest(b"") == "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"
