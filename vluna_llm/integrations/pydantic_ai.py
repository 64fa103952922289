"""Pydantic AI with every model request authorized, metered and settled: one line.

::

    from pydantic_ai import Agent
    from vluna_llm.integrations.pydantic_ai import VlunaCapability

    agent = Agent("openai:gpt-4o-mini", deps_type=Customer, capabilities=[
        VlunaCapability(identity=lambda ctx: {"principal_id": ctx.deps.customer_id}),
    ])

The capability says who pays, and puts a `VlunaModel` around whatever model serves a request, by the framework's own
extension point for that. The model settles: Pydantic AI's request hooks see a stream that was left as an answer without
usage, and a cut one as a cancellation, while the model sees both as they are. Outside of an agent, and where one model
is to be metered for everybody, `VlunaModel` does the same by itself: ``Agent(VlunaModel("openai:gpt-4o-mini"))``, with
`call_context` around the run.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

try:
    from pydantic_ai.capabilities import AbstractCapability, CapabilityOrdering
except ImportError as error:
    raise ImportError(
        "vluna_llm.integrations.pydantic_ai needs Pydantic AI 2.68 or later: pip install 'vluna-llm[pydantic-ai]'",
        name="pydantic_ai",
    ) from error

from ..billable import BillableTool, billable
from ..context import CallContext, call_context, current_context, telling, within
from ..errors import ConfigurationError
from ._default import given_or_default
from ._payer import named, tell_nobody
from ._pydantic_ai_call import Refusals
from ._pydantic_ai_model import VlunaModel

if TYPE_CHECKING:
    from ..vluna import Vluna

__all__ = ["BillableTool", "VlunaCapability", "VlunaModel"]

Named = CallContext | Mapping[str, Any] | str | None
Identity = Callable[[Any], "Named | Awaitable[Named]"]


class VlunaCapability(AbstractCapability[Any]):  # type: ignore[misc]
    """Gates and settles every model request of an agent's runs, and says who pays for them.

    Who pays is asked once, when a run begins, and holds for all that belongs to the run: its model requests, its tools
    and output functions with the metered clients and agents that they use. Runs at the same time are never mixed up.
    Each booking bears the labels ``run_id`` and ``agent``.

    Args:
        vluna: what meters; `Vluna.default()`, whose settings come from the environment, where not given.
        identity: given the run's context, names who pays: an id, the arguments of `call_context`, e.g.
            ``lambda ctx: {"principal_id": ctx.deps.customer_id}``, or a `CallContext`; may be a coroutine function.
            None, or none given: whoever pays for the surrounding work.
        tools: tools that are sold by themselves: name to feature code or `BillableTool`. Each execution is an
            operation, charged when the tool returns, and with nothing when it raises.
        id: as any capability has it.

    Raises:
        ConfigurationError: a feature code that the gate refuses; no ``vluna``, and the environment is incomplete.
    """

    def __init__(
        self,
        vluna: Vluna | None = None,
        *,
        identity: Identity | None = None,
        tools: Mapping[str, str | BillableTool] | None = None,
        id: str | None = None,
    ) -> None:
        vluna = given_or_default(vluna)
        self.id = id
        self.vluna = vluna
        self.identity = identity
        self.tools = billable(tools, vluna)
        self._bound: CallContext | None = None
        self._refusals = Refusals()

    def get_ordering(self) -> CapabilityOrdering:
        """Around other capabilities: what they fall back to and wrap is seen whole."""
        return CapabilityOrdering(position="outermost")

    async def for_run(self, ctx: Any) -> VlunaCapability:
        """The capability of one run, which knows who pays for it.

        Raises:
            ConfigurationError: what ``identity`` named could not be billed. In ``observe`` the surrounding context pays
                then, and where ``identity`` raises.
            Exception: what ``identity`` raised.
        """
        run = copy.copy(self)
        run._refusals = Refusals()
        if self.vluna.mode != "off":
            run._bound = await self._payer(ctx)
        return run

    def get_wrapper_model(self, model: Any) -> Any:
        """The model with each of its requests metered."""
        return VlunaModel(model, self.vluna, bound=self._bound, refusals=self._refusals)

    async def wrap_model_request(self, ctx: Any, *, request_context: Any, handler: Any) -> Any:
        """A refusal comes out as it is, whatever another capability would fall back to."""
        self._refusals.refused = None
        with self._paying(), self._refusals.final():
            return await handler(request_context)

    async def wrap_tool_execute(self, ctx: Any, *, call: Any, tool_def: Any, args: Any, handler: Any) -> Any:
        """What the tool uses is billed to the run's customer, and the tool itself where it is sold.

        Raises:
            VlunaError: the gate refused the tool; it was not run.
        """
        with self._paying(), within(telling(tool=call.tool_name)):
            sold = self.tools.get(call.tool_name)
            if sold is None:
                return await handler(args)
            async with sold.operation(self.vluna) as op:
                result = await handler(args)
                sold.used(op, result)
                return result

    async def wrap_output_validate(self, ctx: Any, *, output_context: Any, output: Any, handler: Any) -> Any:
        """What the validation uses is billed to the run's customer."""
        with self._paying():
            return await handler(output)

    async def wrap_output_process(self, ctx: Any, *, output_context: Any, output: Any, handler: Any) -> Any:
        """What output functions and validators use is billed to the run's customer."""
        with self._paying():
            return await handler(output)

    # -- who pays ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _paying(self) -> Iterator[None]:
        if self._bound is None:
            yield
        else:
            with within(self._bound):
                yield

    async def _payer(self, ctx: Any) -> CallContext:
        run = telling(run_id=getattr(ctx, "run_id", None), agent=getattr(getattr(ctx, "agent", None), "name", None))
        try:
            payer = self.identity(ctx) if self.identity is not None else None
            if inspect.isawaitable(payer):
                payer = await payer
            return _context(payer or {}).override(run)
        except Exception as error:
            if self.vluna.mode == "enforce":
                raise
            tell_nobody(self.vluna, error)
            return _context({}).override(run)


def _context(payer: Any) -> CallContext:
    if not isinstance(payer, Mapping):
        return current_context().override(named(payer, "identity= gave"))
    try:
        entered = call_context(**payer)
    except TypeError:
        unknown = ", ".join(sorted(map(str, payer)))
        raise ConfigurationError(
            f"identity must name who pays by the arguments of call_context, not {unknown}."
        ) from None
    with entered:
        return current_context()
