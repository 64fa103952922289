"""Middleware of LangChain's agents: every model that the agent calls is metered, and tools that cost money are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

try:
    from langchain.agents.middleware import AgentMiddleware
except ImportError as error:
    raise ImportError("VlunaMiddleware needs LangChain's agents: pip install langchain", name="langchain") from error

from ..billable import BillableTool, billable
from ..context import make_context, telling, within
from ._default import given_or_default
from ._langchain_model import meter
from ._langchain_run import paid_by, payer_of, run_of_config

if TYPE_CHECKING:
    from ..manual import RecordedOperation
    from ..vluna import Vluna


class VlunaMiddleware(AgentMiddleware):  # type: ignore[misc]
    """Meters the models and the billable tools of an agent: ``create_agent(..., middleware=[..., VlunaMiddleware()])``.

    Put it last, so that it also sees models that other middleware brings in (fallbacks, routers). A tool that fails, is
    interrupted or answers with an error is not charged; one that the gate refuses is not run.

    Args:
        vluna: what meters; `Vluna.default()` where not given.
        tools: by the tool's name, its feature code or a `BillableTool`.
        **bound: who pays, as `Vluna.bind` takes it; wins over the config and the call context.

    Raises:
        ConfigurationError: an id or a code cannot be right.
    """

    def __init__(
        self, vluna: Vluna | None = None, *, tools: Mapping[str, str | BillableTool] | None = None, **bound: Any
    ) -> None:
        super().__init__()
        vluna = given_or_default(vluna)
        self.vluna = vluna
        self._bound = make_context(**bound) if bound else None
        self._tools = billable(tools, vluna)

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        """The model is metered."""
        return handler(self._metered(request))

    async def awrap_model_call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        """The model is metered."""
        return await handler(self._metered(request))

    def wrap_tool_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        """A billable tool is an operation of its own."""
        tool = self._tools.get(request.tool_call["name"])
        with self._paid(request), within(telling(tool=request.tool_call["name"])):
            if tool is None:
                return handler(request)
            with tool.operation(self.vluna) as op:
                result = handler(request)
                _used(tool, op, result)
                return result

    async def awrap_tool_call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        """A billable tool is an operation of its own."""
        tool = self._tools.get(request.tool_call["name"])
        with self._paid(request), within(telling(tool=request.tool_call["name"])):
            if tool is None:
                return await handler(request)
            async with tool.operation(self.vluna) as op:
                result = await handler(request)
                _used(tool, op, result)
                return result

    def _metered(self, request: Any) -> Any:
        model = meter(request.model, self.vluna, self._bound)
        return request if model is request.model else request.override(model=model)

    @contextmanager
    def _paid(self, request: Any) -> Iterator[None]:
        run = run_of_config(getattr(request.runtime, "config", None))
        with paid_by(payer_of(run, self.vluna), self._bound):
            yield


def _used(tool: BillableTool, op: RecordedOperation, result: Any) -> None:
    if getattr(result, "status", None) == "error":
        op.record(quantity=0)
    else:
        tool.used(op, result)
