"""The async gate client on uvloop, on which uvicorn and LiteLLM's proxy run where it is installed."""

from __future__ import annotations

import pytest

from vluna_llm.gate.client_async import AsyncGateClient
from vluna_llm.gate.credentials import GateCredentials
from vluna_llm.sandbox import Sandbox

uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")


def test_the_gate_answers_on_uvloop() -> None:
    """Its transports do not inherit from asyncio's."""

    async def main(gate: Sandbox) -> str:
        credentials = GateCredentials(gate.base_url, gate.realm_id, gate.key_id, gate.key_secret)
        async with AsyncGateClient(credentials) as client:
            lease = await client.authorize(principal_id="customer", feature_code="openai.gpt-4o")
        return lease.token

    with Sandbox() as gate:
        assert uvloop.run(main(gate))
