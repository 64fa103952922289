"""The hooks of the proxy by themselves: that LiteLLM finds them, and the modes in which nobody is refused."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="LiteLLM's proxy is not installed: pip install 'litellm[proxy]'")

from books import Books

from vluna_llm import Vluna
from vluna_llm.errors import GateDenied, GateRateLimited, MissingPrincipal
from vluna_llm.integrations._answer import answer_to
from vluna_llm.integrations._litellm_answer import refusal_in
from vluna_llm.integrations.litellm import VlunaCallback

HOOKS = (
    "async_pre_call_hook",
    "async_post_call_success_hook",
    "async_post_call_failure_hook",
    "async_post_call_streaming_iterator_hook",
    "async_post_call_response_headers_hook",
)


def nobody(**known: Any) -> Any:
    """What the proxy knows of the holder of the master key."""
    return SimpleNamespace(**{"metadata": {}, "team_metadata": None, "team_id": None, "user_id": None, **known})


def before(callback: VlunaCallback, auth: Any, data: dict[str, Any]) -> Any:
    """The hook before a chat."""
    return asyncio.run(callback.async_pre_call_hook(auth, None, data, "acompletion"))


def test_the_proxy_finds_the_hooks_in_the_class_itself() -> None:
    """It looks into no base class; so a class that inherits from ours gets them, too, and keeps its own."""

    class Mine(VlunaCallback):
        pass

    class Other(Mine):
        async def async_pre_call_hook(self, *args: Any, **kwargs: Any) -> Any:
            return None

    for name in HOOKS:
        assert name in vars(VlunaCallback)
        assert name in vars(Mine)
        assert name in vars(Other)
    assert Mine.async_pre_call_hook is VlunaCallback.async_pre_call_hook
    assert Other.async_pre_call_hook is not Mine.async_pre_call_hook


def test_nobody_is_refused_and_the_client_learns_the_fix(vluna: Vluna, make_callback: Any) -> None:
    """As an exception of which LiteLLM makes a 403."""
    callback = make_callback(vluna)
    with pytest.raises(Exception, match="VLUNA_LLM_LITELLM_IDENTITY") as caught:
        before(callback, nobody(), {"model": "gpt-4o"})
    assert getattr(caught.value, "status_code", None) == 403


@pytest.mark.parametrize("auth", [nobody(), nobody(metadata={"vluna": {"nonsense": 1}})], ids=["nobody", "mistake"])
@pytest.mark.parametrize("mode", ["observe", "off"])
def test_nobody_is_refused_in_the_other_modes(
    make_vluna: Any, make_callback: Any, books: Books, mode: str, auth: Any
) -> None:
    """``observe`` tells who could not be billed, ``off`` does nothing at all."""
    callback = make_callback(make_vluna(mode=mode))
    assert before(callback, auth, {"model": "gpt-4o", "messages": []}) is None
    books.nothing()


def test_an_identity_function_that_fails_refuses(vluna: Vluna, make_callback: Any) -> None:
    """Nobody can say who pays; what went wrong is for the operator's log."""

    def broken(auth: Any) -> str:
        raise RuntimeError("secret of the database")

    callback = make_callback(vluna, identity=broken)
    with pytest.raises(Exception, match="Billing is not set up") as caught:
        before(callback, nobody(), {"model": "gpt-4o"})
    assert "secret" not in str(caught.value)


def test_the_hints_and_the_wait_are_in_the_answer() -> None:
    """Seconds are rounded up: nobody comes back too early."""
    answer = answer_to(GateRateLimited("slow down", retry_after=1.2, status=429, code="LIMIT.RATE_EXCEEDED"))
    assert answer.headers() == {"Retry-After": "2"}
    assert answer.error()["provider_specific_fields"]["vluna"]["retry_after"] == 2
    assert answer_to(GateDenied("no", reason="quota", status=402, code="SERVER.CONFIG")).status == 402


def test_a_refusal_is_found_below_what_was_put_around_it() -> None:
    """LiteLLM may wrap it, as a cause, a context, or an attribute."""
    refusal = MissingPrincipal()
    around = RuntimeError("x")
    around.__cause__ = refusal
    outer = RuntimeError("y")
    outer.original_exception = around  # type: ignore[attr-defined]
    assert refusal_in(outer) is refusal
    assert refusal_in(RuntimeError("z")) is None
    outer.__cause__ = outer
    assert refusal_in(outer) is refusal
