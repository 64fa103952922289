"""Work that costs money and is no model call: ``with vluna.operation(feature_code=..., estimate=...) as op``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .context import CallContext
from .lifecycle import Operation
from .types import Lease, Receipt
from .usage.types import TokenUsage

if TYPE_CHECKING:
    from .vluna import Vluna

F = TypeVar("F", bound=Callable[..., Any])


class RecordedOperation:
    """The running work inside the ``with``: report what it used with `record`.

    Attributes:
        operation_id: ours, a UUID; empty where the work is not metered (mode ``off``).
        lease: what authorize returned; None where the work runs without one.
    """

    def __init__(self, operation: Operation | None) -> None:
        self._operation = operation
        self._recorded: int | TokenUsage | None = None
        self.operation_id = operation.operation_id if operation else ""
        self.lease: Lease | None = operation.lease if operation else None

    def record(self, usage: TokenUsage | None = None, *, quantity: int | None = None) -> None:
        """Say what was used: a `TokenUsage`, or a plain ``quantity`` (>= 0) in the feature's unit. The last one counts.

        It is booked when the ``with`` is left, also when it is left by an exception: what was used was used.

        Raises:
            ValueError: neither or both were given, or the quantity is negative or not an integer.
        """
        if (usage is None) == (quantity is None):
            raise ValueError("record takes either a TokenUsage or quantity=..., one of the two")
        if quantity is not None and (isinstance(quantity, bool) or not isinstance(quantity, int) or quantity < 0):
            raise ValueError(f"quantity must be an integer of at least 0, not {quantity!r}")
        self._recorded = usage if usage is not None else quantity

    def wait(self, timeout: float | None = None) -> Receipt | None:
        """Wait at most ``timeout`` seconds for the receipt, after the ``with`` was left; None where it did not come."""
        return self._operation.wait(timeout) if self._operation else None

    async def wait_async(self, timeout: float | None = None) -> Receipt | None:
        """`wait` for coroutines."""
        return await self._operation.wait_async(timeout) if self._operation else None

    def _end(self, vluna: Vluna, error: BaseException | None) -> None:
        if self._operation is None:
            return
        if isinstance(self._recorded, TokenUsage):
            self._operation.record(self._recorded)
        elif self._recorded is not None:
            self._operation.record_quantity(self._recorded)
        else:
            if error is None:
                vluna.tell_nothing_recorded(self._operation.operation_id)
            self._operation.fail(error)


class OperationContext:
    """What ``vluna.operation(...)`` returns: a context manager, an async one, and a decorator of both kinds."""

    def __init__(self, vluna: Vluna, context: CallContext, estimate: int) -> None:
        self._vluna = vluna
        self._context = context
        self._estimate = estimate
        self._open: list[RecordedOperation] = []

    def __enter__(self) -> RecordedOperation:
        operation = self._vluna.begin_work(self._context, self._estimate)
        self._open.append(RecordedOperation(operation))
        return self._open[-1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.pop()._end(self._vluna, error)

    async def __aenter__(self) -> RecordedOperation:
        operation = await self._vluna.abegin_work(self._context, self._estimate)
        self._open.append(RecordedOperation(operation))
        return self._open[-1]

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.pop()._end(self._vluna, error)

    def __call__(self, function: F) -> F:
        """Decorate a function or coroutine function. A parameter named ``op`` receives the running operation.

        Without one the estimate is booked when the function returns, and nothing when it raises.
        """
        takes_op = "op" in inspect.signature(function).parameters

        def prepared(op: RecordedOperation, kwargs: dict[str, Any]) -> dict[str, Any]:
            return {**kwargs, "op": op} if takes_op and "op" not in kwargs else kwargs

        def returned(op: RecordedOperation) -> None:
            if not takes_op:
                op.record(quantity=self._estimate)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: Any, **kwargs: Any) -> Any:
                async with OperationContext(self._vluna, self._context, self._estimate) as op:
                    result = await function(*args, **prepared(op, kwargs))
                    returned(op)
                    return result

            return cast(F, run_async)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with OperationContext(self._vluna, self._context, self._estimate) as op:
                result = function(*args, **prepared(op, kwargs))
                returned(op)
                return result

        return cast(F, run)
