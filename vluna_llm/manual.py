"""Work that costs money and is no model call: ``with vluna.operation(feature_code=..., estimate=...) as op``.

What is asked of the gate inside such work, model calls and operations of their own, bears its id as the label
``parent_operation_id``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .context import CallContext, current_context, within
from .identity import validate_code
from .lifecycle import Operation
from .scoped import take_own
from .types import Lease, Receipt, UsageSource
from .usage.meters import MeterLine
from .usage.types import TokenUsage

if TYPE_CHECKING:
    from .vluna import Vluna

F = TypeVar("F", bound=Callable[..., Any])


class RecordedOperation:
    """The running work inside the ``with``: report what it used with `record`.

    Attributes:
        operation_id: ours, a UUID; empty where the work is not metered (mode ``off``).
        parent_operation_id: the operation around this one; None where there is none.
        lease: what authorize returned; None where the work runs without one.
    """

    def __init__(self, operation: Operation | None) -> None:
        self._operation = operation
        self.parent_operation_id = current_context().parent_operation_id
        self._recorded: TokenUsage | tuple[int, tuple[MeterLine, ...]] | None = None
        self._source: UsageSource = "caller"
        self.operation_id = operation.operation_id if operation else ""
        self.lease: Lease | None = operation.lease if operation else None

    def record(
        self,
        usage: TokenUsage | None = None,
        *,
        quantity: int | None = None,
        meters: Mapping[str, int] | None = None,
    ) -> None:
        """Say what was used. The last one counts.

        It is booked when the ``with`` is left, also when it is left by an exception: what was used was used.

        Args:
            usage: the tokens of a model, priced as a whole; nothing can stand beside it.
            quantity: so much (>= 0) in the feature's unit, priced by the feature's primary meter.
            meters: so much (>= 0) on each of these meters of the feature, each priced by itself. A ``quantity`` beside
                them is the total that counts against quotas, at least 1, and prices nothing; without it the total is
                their sum. Zeros are left out; where nothing is left, nothing was used.

        Raises:
            ValueError: nothing was given, a usage together with something else, or a number that is negative or not
                an integer.
            ConfigurationError: the gate would not take the code of a meter.
        """
        if (usage is None) == (quantity is None and meters is None):
            raise ValueError("record takes a TokenUsage, or quantity=... and meters=... (one of them or both)")
        self._source = "caller"
        if quantity is not None:
            _whole(quantity, "quantity")
        if usage is not None:
            self._recorded = usage
        elif meters is None:
            self._recorded = (quantity or 0, ())
        else:
            lines = _lines(meters)
            total = sum(line.quantity for line in lines)
            # The gate takes no commit of 0, and a total without lines would be charged by the primary meter.
            self._recorded = (total if quantity is None or not lines else max(quantity, 1), lines)

    def record_estimate(self, quantity: int) -> None:
        """So much was used, as far as anybody knows: booked as `record` does, and labelled as an estimate."""
        self.record(quantity=quantity)
        self._source = "estimated"

    def wait(self, timeout: float | None = None) -> Receipt | None:
        """Wait at most ``timeout`` seconds for the receipt, after the ``with`` was left; None where it did not come."""
        return self._operation.wait(timeout) if self._operation else None

    async def wait_async(self, timeout: float | None = None) -> Receipt | None:
        """`wait` for coroutines."""
        return await self._operation.wait_async(timeout) if self._operation else None

    def _around(self) -> AbstractContextManager[object]:
        """What runs in the ``with`` is work inside this one."""
        return within(CallContext(parent_operation_id=self.operation_id)) if self.operation_id else nullcontext()

    def _end(self, vluna: Vluna, error: BaseException | None) -> None:
        if self._operation is None:
            return
        if isinstance(self._recorded, TokenUsage):
            self._operation.record(self._recorded)
        elif self._recorded is not None:
            self._operation.record_quantity(*self._recorded, source=self._source)
        else:
            if error is None:
                vluna.tell_nothing_recorded(self._operation.operation_id)
            self._operation.fail(error)


def _lines(meters: Mapping[str, int]) -> tuple[MeterLine, ...]:
    """One line for each meter that was used, in the order of their codes (gate contract 1.7)."""
    if not isinstance(meters, Mapping):
        raise ValueError(f"meters must be a mapping like {{'ocr.pages': 12}}, not {type(meters).__name__}")
    found: dict[str, int] = {}
    for name, quantity in meters.items():
        code = validate_code(name, "meters key")
        found[code] = found.get(code, 0) + _whole(quantity, f"meters[{name!r}]")
    return tuple(MeterLine(code, quantity) for code, quantity in sorted(found.items()) if quantity)


def _whole(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, not {value!r}")
    return value


class OperationContext:
    """What ``vluna.operation(...)`` returns: a context manager, an async one, and a decorator of four kinds."""

    def __init__(self, vluna: Vluna, context: CallContext, estimate: int) -> None:
        self._vluna = vluna
        self._context = context
        self._estimate = estimate
        self._open: list[tuple[RecordedOperation, ExitStack, CallContext]] = []

    def __enter__(self) -> RecordedOperation:
        return self._entered(self._begin())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        op, around, _ = take_own(self._open, lambda entry: entry[2] is current_context())
        around.close()
        op._end(self._vluna, error)

    async def __aenter__(self) -> RecordedOperation:
        return self._entered(await self._abegin())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def _begin(self) -> RecordedOperation:
        return RecordedOperation(self._vluna.begin_work(self._context, self._estimate))

    async def _abegin(self) -> RecordedOperation:
        return RecordedOperation(await self._vluna.abegin_work(self._context, self._estimate))

    def _entered(self, op: RecordedOperation) -> RecordedOperation:
        around = ExitStack()
        around.enter_context(op._around())
        self._open.append((op, around, current_context()))
        return op

    def __call__(self, function: F) -> F:
        """Decorate a function, coroutine function, generator function or async generator function.

        A parameter named ``op`` receives the running operation. Without one the estimate is booked when the function
        returns or the generator is exhausted, and nothing when it raises or is left early. The gate is asked when the
        function is called; for a generator, when its first item is asked for.
        """
        if inspect.isasyncgenfunction(function):
            return cast(F, self._generating_async(function))
        if inspect.isgeneratorfunction(function):
            return cast(F, self._generating(function))
        if inspect.iscoroutinefunction(function):
            return cast(F, self._running_async(function))
        return cast(F, self._running(function))

    def _running(self, function: Callable[..., Any]) -> Callable[..., Any]:
        inside = _Inside(function, self._estimate)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._once() as op:
                result = function(*args, **inside.given(op, kwargs))
                inside.returned(op)
                return result

        return inside.shown(run)

    def _running_async(self, function: Callable[..., Any]) -> Callable[..., Any]:
        inside = _Inside(function, self._estimate)

        @functools.wraps(function)
        async def run(*args: Any, **kwargs: Any) -> Any:
            async with self._once() as op:
                result = await function(*args, **inside.given(op, kwargs))
                inside.returned(op)
                return result

        return inside.shown(run)

    def _generating(self, function: Callable[..., Any]) -> Callable[..., Any]:
        inside = _Inside(function, self._estimate)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            op = self._begin()
            try:
                result = yield from _stepwise(function(*args, **inside.given(op, kwargs)), op)
                inside.returned(op)
            except BaseException as error:
                op._end(self._vluna, error)
                raise
            op._end(self._vluna, None)
            return result

        return inside.shown(run)

    def _generating_async(self, function: Callable[..., Any]) -> Callable[..., Any]:
        inside = _Inside(function, self._estimate)

        @functools.wraps(function)
        async def run(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            op = await self._abegin()
            value: Any = None
            error: BaseException | None = None
            try:
                steps = function(*args, **inside.given(op, kwargs))
                while True:
                    with op._around():
                        try:
                            item = await (steps.asend(value) if error is None else steps.athrow(error))
                        except StopAsyncIteration:
                            break
                    value, error = None, None
                    try:
                        value = yield item
                    except GeneratorExit:
                        with op._around():
                            await steps.aclose()
                        raise
                    except BaseException as thrown:
                        error = thrown
                inside.returned(op)
            except BaseException as left:
                op._end(self._vluna, left)
                raise
            op._end(self._vluna, None)

        return inside.shown(run)

    def _once(self) -> OperationContext:
        """One of its own for each call of a decorated function: calls may overlap."""
        return OperationContext(self._vluna, self._context, self._estimate)


class _Inside:
    """How a decorated function is handed the operation, and what its return books."""

    def __init__(self, function: Callable[..., Any], estimate: int) -> None:
        self._signature = inspect.signature(function)
        self._takes_op = "op" in self._signature.parameters
        self._estimate = estimate

    def shown(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The decorated function, whose signature leaves the operation out: frameworks read there what to ask for."""
        if self._takes_op:
            others = [given for name, given in self._signature.parameters.items() if name != "op"]
            run.__signature__ = self._signature.replace(parameters=others)  # type: ignore[attr-defined]
        return run

    def given(self, op: RecordedOperation, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments, with the operation where the function has a place for it."""
        return {**kwargs, "op": op} if self._takes_op and "op" not in kwargs else kwargs

    def returned(self, op: RecordedOperation) -> None:
        """It came to its end."""
        if not self._takes_op:
            op.record(quantity=self._estimate)


def _stepwise(steps: Generator[Any, Any, Any], op: RecordedOperation) -> Generator[Any, Any, Any]:
    """Run a generator step by step: between two steps the context is its consumer's, who shares the thread with it."""
    value: Any = None
    error: BaseException | None = None
    while True:
        with op._around():
            try:
                item = steps.send(value) if error is None else steps.throw(error)
            except StopIteration as stop:
                return stop.value
        value, error = None, None
        try:
            value = yield item
        except GeneratorExit:
            with op._around():
                steps.close()
            raise
        except BaseException as thrown:
            error = thrown
