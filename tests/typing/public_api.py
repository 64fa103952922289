"""The public names and their types, as a product's own type checker sees them. Checked by mypy, never run."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import openai
from typing_extensions import assert_type

from vluna_llm import Hint, Lease, Receipt, Scope, Settings, TokenUsage, Vluna, __version__, call_context
from vluna_llm.errors import (
    BudgetExceeded,
    ConfigurationError,
    GateAuthError,
    GateDenied,
    GateError,
    GateRateLimited,
    GateUnavailable,
    IdempotencyConflict,
    InvalidGateRequest,
    MissingPrincipal,
    VlunaError,
)
from vluna_llm.gate import AsyncGateClient, GateClient
from vluna_llm.integrations.asgi import VlunaMiddleware
from vluna_llm.integrations.openai import AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, OpenAI
from vluna_llm.sandbox import Sandbox
from vluna_llm.usage import read_usage

# -- the facade ---------------------------------------------------------------------------------------------------

vluna = Vluna()
vluna = Vluna(Settings(mode="observe"))
vluna = Vluna(base_url="http://127.0.0.1/mgt/v1", realm_id="r", key_id="k", key_secret="c2VjcmV0")
assert_type(Vluna.default(), Vluna)
assert_type(vluna.mode, Literal["enforce", "observe", "off"])
vluna.mode = "off"
vluna.mode = "on"  # type: ignore[assignment]
assert_type(vluna.settings, Settings)
assert_type(vluna.gate, GateClient)
assert_type(vluna.async_gate, AsyncGateClient)
assert_type(vluna.flush(1.5), bool)
assert_type(vluna.close(), bool)
assert_type(__version__, str)

# -- wrapping keeps the static type -------------------------------------------------------------------------------


class Own(openai.OpenAI):
    """A product's own client."""

    tenant: str = "acme"


assert_type(vluna.wrap(openai.OpenAI()), openai.OpenAI)
assert_type(vluna.wrap(openai.AsyncOpenAI()), openai.AsyncOpenAI)
assert_type(vluna.wrap(Own()), Own)
assert_type(vluna.wrap(Own()).tenant, str)
assert_type(vluna.wrap(openai.AzureOpenAI(api_version="v", azure_endpoint="e")), openai.AzureOpenAI)
assert_type(vluna.wrap(openai), types.ModuleType)
assert_type(vluna.bind(openai.AsyncOpenAI(), principal_id="customer_123"), openai.AsyncOpenAI)
assert_type(
    vluna.bind(Own(), principal_id="p", user_id="u", feature_code="f", budget_id="b", labels={"team": "x"}), Own
)
vluna.bind(Own(), customer="p")  # type: ignore[call-arg]
completion = vluna.wrap(openai.OpenAI()).chat.completions.create(model="m", messages=[])
assert_type(completion.id, str)

drop_in: openai.OpenAI = OpenAI(vluna=vluna, api_key="sk")
async_drop_in: openai.AsyncOpenAI = AsyncOpenAI(vluna=vluna)
azure_drop_in: openai.AzureOpenAI = AzureOpenAI(vluna=vluna)
async_azure_drop_in: openai.AsyncAzureOpenAI = AsyncAzureOpenAI(vluna=vluna)

# -- the call context ---------------------------------------------------------------------------------------------

with call_context(principal_id="customer_123", labels={"team": "x"}, idempotency_key="job-42") as scope:
    assert_type(scope, Scope)
    assert_type(scope.receipts, list[Receipt])
    assert_type(scope.usage, TokenUsage)
    assert_type(scope.settled_xusd, int)
    assert_type(scope.estimated_xusd, int)
    assert_type(scope.pending, int)
    assert_type(scope.wait(timeout=2), bool)
call_context("customer_123")  # type: ignore[call-arg]


async def in_a_coroutine() -> None:
    """The same, async."""
    async with call_context(principal_id="customer_123") as inner:
        assert_type(inner, Scope)
        assert_type(await inner.wait_async(2), bool)
    assert_type(await vluna.aflush(1), bool)
    assert_type(await vluna.aclose(), bool)
    async with vluna.operation(feature_code="tools.search", estimate=1) as op:
        op.record(quantity=1)
        assert_type(await op.wait_async(1), Receipt | None)


# -- anything else that costs money -------------------------------------------------------------------------------

with vluna.operation(feature_code="tools.search", estimate=1) as work:
    work.record(quantity=1)
    work.record(TokenUsage(input_tokens=1, output_tokens=2))
    work.record(meters={"tools.search.queries": 1, "tools.search.results": 20})
    work.record(quantity=1, meters={"tools.search.queries": 1})
    work.record(meters={"tools.search.queries": 1.5})  # type: ignore[dict-item]
    assert_type(work.wait(1), Receipt | None)


@vluna.operation(feature_code="tools.search")
def search(query: str) -> int:
    """A decorated function keeps its type."""
    return len(query)


assert_type(search("x"), int)

# -- values -------------------------------------------------------------------------------------------------------


def look_at(receipt: Receipt, lease: Lease, hint: Hint, usage: TokenUsage) -> None:
    """Attributes that products read."""
    assert_type(receipt.operation_id, str)
    assert_type(receipt.charged, bool)
    assert_type(receipt.amount_xusd, int | None)
    assert_type(receipt.charged_xusd, int | None)
    assert_type(receipt.quantity, int)
    assert_type(receipt.hints, tuple[Hint, ...])
    assert_type(receipt.usage_source, Literal["provider", "estimated", "caller"] | None)
    assert_type(lease.dialect, Literal["lease_token", "lease"])
    assert_type(hint.type, str)
    assert_type(hint.fields, Mapping[str, Any])
    assert_type(hint.means_not_charged, bool)
    assert_type(usage.total_tokens, int)
    assert_type(usage + usage, TokenUsage)
    receipt.state = "booked"  # type: ignore[misc]


assert_type(read_usage("/v1/chat/completions", "application/json", b"{}"), TokenUsage | None)

settings = Settings()
assert_type(settings.mode, Literal["enforce", "observe", "off"])
assert_type(settings.settle, Literal["background", "inline"])
assert_type(settings.authorize, Literal["strict", "overlap"])
assert_type(settings.authorize_deadline, float)
assert_type(settings.on_gate_unavailable, Literal["allow", "deny"])
assert_type(settings.on_outbox_unavailable, Literal["allow", "deny"])
assert_type(settings.on_abort, Literal["cancel", "estimate", "drain"])
assert_type(settings.on_unmetered, Literal["warn", "deny", "ignore"])
assert_type(settings.meters, Literal["auto", "always", "never"])
assert_type(settings.principal, str | None)
assert_type(settings.base_url, str | None)

# -- errors -------------------------------------------------------------------------------------------------------

try:
    vluna.wrap(openai.OpenAI()).responses.create(model="m", input="hi")
except GateDenied as denied:
    assert_type(denied.reason, Literal["insufficient_credit", "quota", "budget", "entitlement", "disabled"])
    assert_type(denied.hints, tuple[Hint, ...])
    assert_type(denied.status, int | None)
    assert_type(denied.request_id, str | None)
except GateRateLimited as limited:
    assert_type(limited.retry_after, float | None)
except (GateUnavailable, GateAuthError, IdempotencyConflict, InvalidGateRequest) as failed:
    assert_type(failed.retryable, bool)
    gate_error: GateError = failed
except (MissingPrincipal, ConfigurationError) as wrong:
    any_error: VlunaError = wrong

# -- the embedded gate --------------------------------------------------------------------------------------------

with Sandbox() as gate:
    assert_type(gate.base_url, str)
    assert_type(gate.booked("customer_123").charged_xusd, int)
    assert_type(gate.env(), dict[str, str])


# -- a task's limits, generators, web applications ------------------------------------------------------------------

with call_context(principal_id="ann", max_amount_xusd=50_000, max_tokens=10_000) as task:
    assert_type(task, Scope)
call_context(principal_id="ann", max_tokens="many")  # type: ignore[arg-type]


def over_budget(error: BudgetExceeded) -> None:
    assert_type(error.limit, Literal["max_amount_xusd", "max_tokens"])
    assert_type(error.spent, int)


@vluna.operation(feature_code="tools.pages", estimate=1)
def pages(count: int) -> Iterator[int]:
    yield from range(count)


assert_type(pages(3), Iterator[int])


async def app(scope: Any, receive: Any, send: Any) -> None: ...


def customer_of(scope: Any) -> dict[str, str] | None:
    return {"principal_id": "ann"}


VlunaMiddleware(app, identity=customer_of, vluna=vluna)
VlunaMiddleware(app)  # type: ignore[call-arg]
