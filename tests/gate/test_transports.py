"""TLS, trio and the ways round the bare connections."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from colours import COLOURS, Caller, Colour
from wire_server import LEASE, drop, ok, serving

from vluna_llm.errors import GateUnavailable
from vluna_llm.gate import AsyncGateClient
from vluna_llm.gate.transport import tls_context


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost, made now, valid for a day."""
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    extra = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run(command + extra, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no openssl here to make a certificate: {error}")
    return cert, key


@pytest.fixture
def server_tls(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


@pytest.fixture
def trusted(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    tls_context.cache_clear()
    yield
    tls_context.cache_clear()


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.usefixtures("trusted")
def test_tls_with_a_trusted_certificate(colour: Colour, server_tls: ssl.SSLContext) -> None:
    """Calls work over TLS and share one connection."""
    with serving(ok(LEASE), tls=server_tls) as gate:
        url = f"https://localhost:{gate.port}/mgt/v1"
        with Caller(colour, gate.credentials(base_url=url)) as client:
            for _ in range(3):
                assert client.authorize(principal_id="c", feature_code="f").lease_id == LEASE["lease_id"]
    assert [seen.connection for seen in gate.seen] == [1, 1, 1]
    assert gate.seen[0].headers["host"] == f"localhost:{gate.port}"


@pytest.mark.parametrize("colour", COLOURS)
def test_tls_with_a_stranger(colour: Colour, server_tls: ssl.SSLContext) -> None:
    """A certificate that nobody vouches for: nothing is sent, and the text says why."""
    tls_context.cache_clear()
    with serving(ok(LEASE), tls=server_tls) as gate:
        url = f"https://localhost:{gate.port}/mgt/v1"
        with Caller(colour, gate.credentials(base_url=url)) as client, pytest.raises(GateUnavailable) as caught:
            client.authorize(principal_id="c", feature_code="f", deadline=0.3)
    assert caught.value.meta["transport"] == "connect"
    assert "certificate verify failed" in str(caught.value)
    assert gate.seen == []


@pytest.mark.parametrize("colour", COLOURS)
def test_a_client_of_the_callers_is_used_and_left_open(colour: Colour) -> None:
    """Whoever brings a client keeps it, and its failures come out as ours."""
    own: Any = httpx.Client() if colour == "sync" else httpx.AsyncClient()
    with serving(ok(LEASE), drop) as gate, Caller(colour, gate.credentials(), http_client=own) as client:
        assert client.authorize(principal_id="c", feature_code="f").lease_id == LEASE["lease_id"]
        with pytest.raises(GateUnavailable) as caught:
            client.authorize(principal_id="c", feature_code="f", deadline=0.2)
        assert caught.value.meta["transport"] == "broken"
    assert not own.is_closed


def test_trio() -> None:
    """Under trio the async client works as well, through httpx."""
    trio = pytest.importorskip("trio")

    async def run(client: AsyncGateClient) -> None:
        for _ in range(2):
            lease = await client.authorize(principal_id="c", feature_code="f")
            assert lease.lease_id == LEASE["lease_id"]
        with pytest.raises(GateUnavailable):
            await client.authorize(principal_id="c", feature_code="f", deadline=0.3)
        await client.aclose()

    with serving(ok(LEASE), ok(LEASE), drop) as gate:
        trio.run(run, AsyncGateClient(gate.credentials()))
