"""The fixtures of the agents' tests, as a plugin of pytest."""

from __future__ import annotations

from collections.abc import Iterator

import agents
import pytest
from agent_bench import Bench
from agent_provider import AgentProvider

from vluna_llm import Vluna
from vluna_llm.sandbox import Sandbox


@pytest.fixture(scope="session")
def _upstream() -> Iterator[AgentProvider]:
    with AgentProvider() as provider:
        yield provider


@pytest.fixture
def upstream(_upstream: AgentProvider) -> AgentProvider:
    """The scripted provider, with nothing asked of it yet."""
    _upstream.behaviour = "ok"
    _upstream.pause = 0.02
    _upstream.says()
    _upstream.requests.clear()
    _upstream.flaked.clear()
    _upstream.responses.clear()
    _upstream.released.set()
    _upstream.released.clear()
    return _upstream


@pytest.fixture
def bench(vluna: Vluna, upstream: AgentProvider, shared_gate: Sandbox, customer: str) -> Bench:
    """With the gate that all share, and the Responses API."""
    agents.set_tracing_disabled(True)
    return Bench(vluna, upstream, shared_gate, customer)


@pytest.fixture(params=[True, False], ids=["responses", "chat"])
def both(bench: Bench, request: pytest.FixtureRequest) -> Bench:
    """`bench`, with either API."""
    bench.responses = request.param
    return bench


@pytest.fixture(params=[False, True], ids=["run", "streamed"])
def streamed(request: pytest.FixtureRequest) -> bool:
    """``Runner.run``, or ``Runner.run_streamed``."""
    return request.param is True


@pytest.fixture
def own_gate() -> Iterator[Sandbox]:
    """A gate for a test that changes it."""
    with Sandbox() as gate:
        yield gate
