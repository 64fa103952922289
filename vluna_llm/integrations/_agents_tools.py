"""Tools of the OpenAI Agents SDK that cost money, and tools inside of which the gate may refuse something.

The SDK gives an error of a tool to the model as a text, and raises ``UserError`` in its place where it raises at all.
Neither may happen to a refusal: it is an answer for the customer. So the tool's twin notes the error below the SDK's
handling and raises it above; and it makes it an ``AgentsException`` besides, which the SDK lets pass as it is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from agents import AgentsException, FunctionTool

from ..billable import BillableTool
from ..context import within
from ..errors import ConfigurationError, VlunaError
from ..manual import OperationContext
from ..scoped import unset
from ._agents_payer import Identity, inheriting, run_of
from ._default import given_or_default
from ._looking_like import looking_like

if TYPE_CHECKING:
    from ..vluna import Vluna

E = TypeVar("E", bound=VlunaError)
Invoke = Callable[[Any, str], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Price:
    """What is sold with each use of a tool; by `Vluna.default()` where no ``vluna`` is given."""

    sold: BillableTool
    vluna: Vluna | None = None

    def operation(self) -> OperationContext:
        """The gate's part of one use."""
        return self.sold.operation(given_or_default(self.vluna))


@dataclass(slots=True)
class _Use:
    """One use of a tool: the error that it ended with, which the SDK may have made a text of."""

    errors: list[BaseException] = field(default_factory=list)

    def raise_refusal(self) -> None:
        for error in self.errors:
            if isinstance(error, VlunaError):
                raise passing(error)


_use: ContextVar[_Use | None] = ContextVar("vluna_llm_agents_tool_use", default=None)


def twin_of(tool: FunctionTool, price: Price | None) -> FunctionTool:
    """The same tool, in which a refusal ends the run; each use is an operation of its own where it has a price.

    Raises:
        ConfigurationError: this is not a function tool, or it has a price already.
    """
    if not isinstance(tool, FunctionTool):
        raise ConfigurationError(
            f"Only function tools can be gated, not {type(tool).__name__!r}: the provider runs its own tools itself."
        )
    twin = copy.copy(tool)
    twin.on_invoke_tool = _dressed(twin.on_invoke_tool, price)
    return twin


def passing(error: E) -> E:
    """The same error object, which the SDK passes on as it is from now on."""
    if not isinstance(error, AgentsException):
        kind: Any = type(error)
        error.__class__ = looking_like(kind, (kind, AgentsException))
        error.run_data = None  # type: ignore[attr-defined]
    return error


# -- using it ----------------------------------------------------------------------------------------------------------


async def _used(invoke: Invoke, context: Any, arguments: str, price: Price | None) -> Any:
    """Use the tool, and raise what the gate refused in it, whatever the SDK made of that."""
    provider: Any = getattr(getattr(context, "run_config", None), "model_provider", None)
    identity: Identity | None = getattr(provider, "_vluna_identity", None)  # how this run knows who pays
    payer = nullcontext() if identity is None else inheriting(identity, context.context, provider._vluna)
    use = _Use()
    token = _use.set(use)
    try:
        told = run_of(getattr(getattr(context, "agent", None), "name", None), getattr(context, "tool_name", None))
        with within(told), payer:
            if price is None:
                result = await invoke(context, arguments)
            else:
                async with price.operation() as operation:
                    result = await invoke(context, arguments)
                    if not use.errors:
                        price.sold.used(operation, result)
                    use.raise_refusal()
    except VlunaError as error:
        passing(error)
        raise
    finally:
        unset(_use, token)
    use.raise_refusal()
    return result


def _noting(implementation: Invoke) -> Invoke:
    """What the SDK's handling of errors is wrapped around; it notes them before they become texts."""

    @functools.wraps(implementation)
    async def invoke(context: Any, arguments: str) -> Any:
        try:
            return await implementation(context, arguments)
        except BaseException as error:
            if (use := _use.get()) is not None:
                use.errors.append(error)
            raise

    return invoke


class _Dressed:
    """An invoker of the SDK's own class, by which it recognises what it has made of a Python function."""

    _vluna_price: Price | None

    async def __call__(self, context: Any, arguments: str) -> Any:
        invoke: Invoke = super().__call__  # type: ignore[misc]
        return await _used(invoke, context, arguments, self._vluna_price)

    def __agents_bind_function_tool__(self, tool: Any) -> Any:
        bound = super().__agents_bind_function_tool__(tool)  # type: ignore[misc]
        return bound if bound is self else _in_class(bound, self._vluna_price)


def _dressed(invoker: Any, price: Price | None) -> Any:
    if isinstance(invoker, _Dressed):
        if price is not None and invoker._vluna_price is not None:
            raise ConfigurationError("This tool has a price already: gate it once.")
        return invoker if price is None else _in_class(copy.copy(invoker), price)
    implementation = getattr(invoker, "_invoke_tool_impl", None)
    if implementation is not None and hasattr(invoker, "__agents_bind_function_tool__"):
        twin = copy.copy(invoker)
        twin._invoke_tool_impl = _noting(implementation)
        return _in_class(twin, price)

    @functools.wraps(invoker)
    async def invoke(context: Any, arguments: str) -> Any:
        return await _used(_noting(invoker), context, arguments, price)

    return invoke


def _in_class(invoker: Any, price: Price | None) -> Any:
    if not isinstance(invoker, _Dressed):
        kind: Any = type(invoker)
        invoker.__class__ = looking_like(kind, (_Dressed, kind))
    invoker._vluna_price = price
    return invoker
