"""One operation from its admission to its settlement, as an integration holds it.

Every method returns after at most one write to the journal, and none is a coroutine: a stream may be closed, cancelled
or lose its event loop, and its end is noted all the same. What has to go over the network is the settler's.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .ending import Ending, OnAbort, Verdict, judge
from .failpoints import hit
from .identity import plain_text
from .ledger import Watch, ended
from .outbox import Row
from .reporting import attributes_of, span_of
from .settlement import receipt_of, withdrawn
from .types import Lease, Receipt, UsageSource
from .usage.meters import MeterLine
from .usage.types import TokenUsage

if TYPE_CHECKING:
    from .process import Process
    from .runtime import Runtime
    from .usage.estimate import Estimate


@dataclass(frozen=True, slots=True)
class ModelCall:
    """What an integration knows of a model call before it is made.

    Attributes:
        kind: the API, e.g. ``chat.completions``, ``responses``, ``embeddings``, ``anthropic.messages``.
        provider: the first part of the feature code, e.g. ``openai``.
        model: the model that is asked for.
        body: the request body; read for the estimate, never stored.
        stream: whether an event stream is asked for.
    """

    kind: str
    provider: str
    model: str
    body: Mapping[str, Any] | None = None
    stream: bool = False


class Operation:
    """One logical model call that was admitted.

    Every method is synchronous, never raises into the product, may be called from any thread and more than once: the
    first ending that means something wins, and usage outranks an abort (design rules 3 and 4). ``ended`` tells whether
    one was told yet.
    """

    __slots__ = (
        "_estimate",
        "_pid",
        "_process",
        "_row",
        "_used",
        "_watch",
        "ended",
        "lease",
        "on_abort",
        "operation_id",
        "settle_inline",
    )

    def __init__(
        self,
        process: Process,
        row: Row,
        *,
        watch: Watch,
        lease: Lease | None,
        estimate: Estimate | None,
        on_abort: OnAbort,
        settle_inline: bool,
    ) -> None:
        self._process = process
        self._row = row
        self._watch = watch
        self._estimate = estimate
        self._pid = os.getpid()
        self._used = False
        self.ended = False
        self.operation_id = row.operation_id
        self.lease = lease
        self.on_abort: OnAbort = on_abort
        self.settle_inline = settle_inline

    def __repr__(self) -> str:
        return f"<Operation {self.operation_id} {self._row.feature_code}>"

    @property
    def is_ours(self) -> bool:
        """Whether this process admitted it, and not one from which it was forked."""
        return os.getpid() == self._pid

    @property
    def customer(self) -> tuple[str, str]:
        """Principal and user who pay."""
        return self._row.principal_id, self._row.user_id

    @property
    def gate(self) -> tuple[str, str]:
        """Base URL and realm of the gate that admitted it."""
        return self._row.base_url, self._row.realm_id

    @property
    def feature_code(self) -> str:
        """What is sold, as the lease has it."""
        return self._row.feature_code

    # -- how it ends -----------------------------------------------------------------------------------------------

    def finish(self, ending: Ending) -> None:
        """The answer ended, in whatever way; what that means for the bill is decided by `vluna_llm.ending.judge`."""
        self._settle(
            lambda: judge(
                ending,
                estimated_input=self._row.estimated_input,
                estimated_output=self._row.estimated_output,
                on_abort=self.on_abort,
            ),
            response_id=ending.response_id,
        )

    def record(self, usage: TokenUsage) -> None:
        """The caller says what was used."""
        self._settle(lambda: Verdict("completed", usage, "caller"))

    def record_quantity(
        self, quantity: int, meters: tuple[MeterLine, ...] = (), source: UsageSource = "caller"
    ) -> None:
        """The caller says how much was used, in the feature's own unit: priced as a whole, or by these ``meters``."""
        self._settle(lambda: Verdict("completed", TokenUsage(input_tokens=quantity), source, meters=meters))

    def fail(self, error: BaseException | None = None) -> None:
        """No answer came: the provider refused, the connection failed, or the call was cancelled before."""
        self._settle(lambda: Verdict("failed"), cause=type(error).__name__ if error is not None else None)

    def park(self, response_id: str | None) -> None:
        """The provider works on in the background; `Vluna.book_background` books what a retrieve brings."""
        self.ended = True
        self._do("operation.park", lambda: self._process.write(lambda runtime: self._park(runtime, response_id)))

    def abandon(self, ending: Callable[[], Ending]) -> None:
        """The garbage collector found the answer: only take a note, in whatever thread or lock this is (rule 15)."""
        if self.is_ours:
            self._process.later(lambda: self.finish(ending()))

    # -- waiting for the receipt -----------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> Receipt | None:
        """Wait at most ``timeout`` seconds for the gate's receipt; None where it did not come."""
        self._watch.wait(timeout)
        return self._watch.receipt

    async def wait_async(self, timeout: float | None = None) -> Receipt | None:
        """`wait` for coroutines; no thread is held meanwhile."""
        loop = asyncio.get_running_loop()
        told = asyncio.Event()

        def tell() -> None:
            try:
                loop.call_soon_threadsafe(told.set)
            except RuntimeError:
                pass  # the loop is gone, and so is who waited

        self._watch.call_when_closed(tell)
        try:
            await asyncio.wait_for(told.wait(), timeout)
        except asyncio.TimeoutError:
            return None
        return self._watch.receipt

    # -- plumbing --------------------------------------------------------------------------------------------------

    def _settle(self, verdict: Callable[[], Verdict], *, response_id: object = None, cause: str | None = None) -> None:
        self.ended = True

        def settle() -> None:
            found, said = verdict(), plain_text(response_id)
            self._process.write(lambda runtime: self._settle_in(runtime, found, said, cause))

        self._do("operation.settle", settle)

    def _do(self, where: str, act: Callable[[], None]) -> None:
        """Do it now, or soon where the garbage collector ran the caller inside one of our own locks. Never raises."""
        if not self.is_ours:
            return  # a forked child never settles its parent's operations

        def safely() -> None:
            try:
                act()
            except Exception:
                self._process.internal_error(where)

        if self._process.entered or any(scope.entered for scope in self._watch.scopes):
            self._process.later(safely)
        else:
            safely()

    def _park(self, runtime: Runtime, response_id: str | None) -> None:
        row = runtime.ledger.apply(
            self.operation_id,
            lambda now: ended(self._known(now)).evolve(
                state=self._known(now).state.parked(), response_id=plain_text(response_id)
            ),
            fallback=self._row,
            watch=self._watch,
        )
        hit("operation.parked")
        if row is not None and row.state.work == "parked":
            runtime.ledger.settled(row, None)

    def _known(self, row: Row) -> Row:
        """The row, or what we know better: that the call was admitted could not be written."""
        return self._row if self._row.state.may_run and not row.state.may_run else row

    def _settle_in(self, runtime: Runtime, verdict: Verdict, response_id: str | None, cause: str | None) -> None:
        usage = verdict.usage
        changed = False

        def change(found: Row) -> Row:
            nonlocal changed
            changed = False
            now = self._known(found)
            if verdict.work == "completed":
                assert usage is not None
                state = now.state.completed(
                    usage, verdict.source or "provider", shared_lease=now.derived, meters=verdict.meters
                )
            elif verdict.work == "failed":
                state = now.state.failed()
            else:
                state = now.state.aborted()
            if state == now.state:
                return found
            changed = True
            row = now if now.body is None or state.route == now.state.route else withdrawn(now)
            return row.evolve(state=state, response_id=response_id or row.response_id, ended_at=time.time())

        row = runtime.ledger.apply(self.operation_id, change, fallback=self._row, watch=self._watch)
        if row is None or not changed:
            return
        hit("operation.ended")
        if usage is not None and not self._used:
            self._used = True
            for scope in self._watch.scopes:
                scope.used(usage, self.operation_id, self._cost(runtime, row, usage))
            if verdict.source == "provider" and self._estimate is not None:
                runtime.learn(row.feature_code, self._estimate, usage)
        elif usage is None:
            for scope in self._watch.scopes:
                scope.unused(self.operation_id)
        if row.state.settlement == "pending":
            runtime.settler.enqueue(row)
        elif row.state.settlement == "lapsed":
            runtime.ledger.settled(row, receipt_of(row, "lapsed", None, None))
        self._tell(runtime, row, verdict, cause)

    @staticmethod
    def _cost(runtime: Runtime, row: Row, usage: TokenUsage) -> int | None:
        """What the usage costs by the prices known, in XUSD; None where none are."""
        if not runtime.prices.knows(row.feature_code):
            return None
        if row.state.meters and runtime.settings.meters != "never":
            return runtime.prices.guess_lines(row.feature_code, row.state.meters)
        names = None if row.unsplit else runtime.names(row.feature_code)
        return runtime.prices.guess(
            row.feature_code, names, usage.input_tokens, usage.output_tokens, usage.cached_tokens
        )

    def _tell(self, runtime: Runtime, row: Row, verdict: Verdict, cause: str | None) -> None:
        if verdict.work == "completed" and verdict.source == "estimated" and verdict.usage is not None:
            runtime.telemetry.emit(
                "vluna.usage.estimated",
                "warn",
                {
                    **attributes_of(row),
                    "gen_ai.usage.input_tokens": verdict.usage.input_tokens,
                    "gen_ai.usage.output_tokens": verdict.usage.output_tokens,
                },
                span=span_of(row),
                message="it is not known how much was used; an estimate is billed, labelled usage_source=estimated",
            )
        elif verdict.usage is not None and verdict.usage.costs_without_tokens:
            runtime.telemetry.emit(
                "vluna.endpoint.unmetered",
                "warn",
                {**attributes_of(row), "vluna.audio_seconds": verdict.usage.audio_seconds},
                span=span_of(row),
                message="the provider charged for this call and reported no tokens: nobody is billed for it",
            )
        elif verdict.work != "completed":
            runtime.count_forgone(row.principal_id, verdict.forgone_tokens)
            runtime.telemetry.emit(
                "vluna.operation.aborted",
                "info",
                {**attributes_of(row), "error.type": cause, "vluna.forgone_tokens": verdict.forgone_tokens},
                span=span_of(row),
            )
