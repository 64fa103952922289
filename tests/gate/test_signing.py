"""The signature, against the two vectors that the official signer produced and a server accepted."""

from __future__ import annotations

import base64
import re

import pytest

from vluna_llm.gate.signing import EMPTY_DIGEST, Signer, content_digest

SECRET = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
TS = "2026-01-02T03:04:05.678901+00:00"
BODY = b'{"feature_code":"openai.gpt-4o","estimated_quantity_minor":"1200"}'


@pytest.fixture
def signer() -> Signer:
    return Signer(key_id="pk-ExampleKey000001", key=base64.b64decode(SECRET), realm_id="realm-demo")


def test_post_vector(signer: Signer) -> None:
    """The worked POST example of the contract comes out to the byte."""
    authorization, digest = signer.sign(
        "POST",
        "/mgt/v1/gate/authorize",
        BODY,
        principal_id="customer_123",
        user_id="user_1",
        idempotency_key="auth-7f9c0d52",
        ts=TS,
        nonce="000102030405060708090a0b0c0d0e0f",
    )
    assert digest == "sha-256=:C9H8tlWrJWY+Lz+zDDyESdRhiYOmNnyPuRngkP0spxg=:"
    assert authorization == (
        "SVC-AUTH keyId=pk-ExampleKey000001,sig=IwLK0ywJIyHzk3o3Hj1ntwTPmutnySIPYe01nPWQDiQ=,"
        f"ts={TS},nonce=000102030405060708090a0b0c0d0e0f,alg=HMAC-SHA256"
    )


def test_get_vector(signer: Signer) -> None:
    """The worked GET example: the query is signed as sent, the empty body has its own digest."""
    authorization, digest = signer.sign(
        "GET",
        "/mgt/v1/gate/limits?feature_code=openai.gpt-4o&expand=quotas",
        b"",
        principal_id="customer_123",
        user_id="user_1",
        idempotency_key="get-1",
        ts=TS,
        nonce="101112131415161718191a1b1c1d1e1f",
    )
    assert digest == EMPTY_DIGEST == "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"
    assert ",sig=3sYFwsas6I04uKrq/i7++1L45YETKYV2r/G8r4Lj+cQ=," in authorization


def test_every_signature_is_fresh(signer: Signer) -> None:
    """Time and nonce are new for every request, and in the form that the official SDK sends."""
    headers = {signer.sign("POST", "/x", BODY)[0] for _ in range(50)}
    assert len(headers) == 50
    pattern = r"SVC-AUTH keyId=[^,]+,sig=[^,]+,ts=\d{4}-\d\d-\d\dT[\d:.]+\+00:00,nonce=[0-9a-f]{32},alg=HMAC-SHA256"
    assert all(re.fullmatch(pattern, header) for header in headers)


def test_digest_covers_the_raw_bytes() -> None:
    """White space in a body changes its digest: it is taken over bytes, not over JSON."""
    assert content_digest(b'{"a":1}') != content_digest(b'{"a": 1}')


def test_repr_shows_no_secret(signer: Signer) -> None:
    """The secret is in no form in the repr."""
    key = base64.b64decode(SECRET)
    assert SECRET not in repr(signer)
    assert repr(key) not in repr(signer)
    assert key.hex() not in repr(signer)
