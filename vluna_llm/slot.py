"""A slot: an operation that an outer layer admitted early, and that the first metered call inside it takes over.

A router or an agent framework has to ask the gate before it knows which client will do the work. Where that client is
metered itself, the work would be asked for and billed twice. So the outer layer opens a slot; the first metered call
inside claims the operation and settles it; a second one is work of its own. What nobody claimed is settled by the layer
that opened it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from .ending import Ending, OnAbort
from .errors import VlunaError
from .lifecycle import Operation
from .scoped import scoped

Claim = Literal["open", "claimed", "passed_on"]


def family_of(kind: str) -> str:
    """Kinds of work between which layers translate (chat, responses, completions, messages) are one family."""
    return kind if kind in ("embeddings", "images", "audio") else "generation"


class _Offer:
    """One operation in a slot.

    Who claims it is decided in one step of the interpreter, without a lock: a signal handler or a finalizer may come in
    between any two of ours and call a model, and a fork would copy a lock that is held.
    """

    __slots__ = ("_taken", "family", "operation")

    def __init__(self, operation: Operation | None, family: str = "") -> None:
        self.operation = operation
        self.family = family
        self._taken: dict[str, tuple[Claim, object]] = {}

    @property
    def claim(self) -> Claim:
        taken = self._taken.get("")
        return "open" if taken is None else taken[0]

    def take(self, claim: Claim) -> bool:
        """Whether the first to come is who asks."""
        ticket = claim, object()
        return self._taken.setdefault("", ticket) is ticket


class Slot:
    """Holds at most one operation at a time for whoever claims it. Safe from any thread.

    Args:
        mark: is given each refusal of a metered call inside before it is raised; marks it for what it passes through.
    """

    __slots__ = ("_offer", "mark")

    def __init__(self, mark: Callable[[VlunaError], object] | None = None) -> None:
        self._offer = _Offer(None)
        self.mark = mark

    @property
    def operation(self) -> Operation | None:
        """What was put in last, whether it was claimed or not."""
        return self._offer.operation

    @property
    def claimed(self) -> bool:
        """Whether a metered call inside settles this: the layer that opened the slot has nothing more to say."""
        return self._offer.claim == "claimed"

    @property
    def passed_on(self) -> bool:
        """Whether a metered call inside bills this work to somebody else: what was admitted here is given up."""
        return self._offer.claim == "passed_on"

    def offer(self, operation: Operation | None, kind: str = "chat") -> None:
        """Put an operation into the slot, in place of one that has ended; None closes it. ``kind`` is its work's."""
        self._offer = _Offer(operation, family_of(kind))

    @property
    def share(self) -> Share | None:
        """By which the layer that opened the slot tells how the work ended; None where nothing was put in."""
        return None if self._offer.operation is None else Share(self, self._offer)

    def claim(
        self, *, gate: tuple[str, str], customer: tuple[str | None, str | None], kind: str = "chat"
    ) -> Operation | None:
        """Take the operation over; None where there is none, where it was taken, or where it is somebody else's.

        In a forked child the operation is the parent's, who settles it: what the child does is work of its own. So is
        work of another kind, such as the embedding of a question before it is asked.

        Args:
            gate: base URL and realm of who asks.
            customer: principal and user of who asks, None for whoever pays for the surrounding work.
            kind: the kind of work.
        """
        offer = self._offer
        operation = offer.operation
        if operation is None or operation.ended or not operation.is_ours or offer.family != family_of(kind):
            return None
        principal, user = customer
        own_principal, own_user = operation.customer
        same = operation.gate == gate and principal in (None, own_principal) and user in (None, own_user)
        return operation if offer.take("claimed" if same else "passed_on") and same else None


class Share:
    """How the work under one operation in a slot ended, as the layer that admitted it has seen it: a `tap.Sink`.

    One rule for all of them: where a metered call inside has claimed the operation, it settles it and nothing is told
    here; where it bills somebody else, nothing is owed; else what is told here is the end. The claim is that of this
    operation, whatever is put into the slot after it.
    """

    __slots__ = ("_offer", "operation", "slot")

    def __init__(self, slot: Slot, offer: _Offer) -> None:
        assert offer.operation is not None
        self.slot = slot
        self._offer = offer
        self.operation: Operation = offer.operation

    @property
    def claimed(self) -> bool:
        """Whether a metered call inside settles it."""
        return self._offer.claim == "claimed"

    @property
    def passed_on(self) -> bool:
        """Whether a metered call inside bills this work to somebody else."""
        return self._offer.claim == "passed_on"

    def finish(self, ending: Ending) -> None:
        """The answer ended."""
        if self.passed_on:
            self.operation.fail()
        elif not self.claimed:
            self.operation.finish(ending)

    def fail(self, error: BaseException | None = None) -> None:
        """No answer came."""
        if not self.claimed:
            self.operation.fail(error)

    def park(self, response_id: str | None) -> None:
        """The provider works on in the background."""
        if self.passed_on:
            self.operation.fail()
        elif not self.claimed:
            self.operation.park(response_id)

    def abandon(self, ending: Callable[[], Ending]) -> None:
        """The answer was forgotten: only queue it."""
        if self.passed_on:
            self.operation.abandon(lambda: Ending(how="error"))
        elif not self.claimed:
            self.operation.abandon(ending)

    @property
    def on_abort(self) -> OnAbort:
        """What becomes of an answer that the consumer leaves."""
        return self.operation.on_abort

    @property
    def settle_inline(self) -> bool:
        """Whether the consumer waits for the receipt, here: whoever has claimed the operation waits by itself."""
        return self.operation.settle_inline and not self.claimed

    def wait(self, timeout: float | None = None) -> object:
        """Wait for the receipt, where it is one of ours."""
        return None if self.claimed else self.operation.wait(timeout)

    async def wait_async(self, timeout: float | None = None) -> object:
        """`wait` for coroutines."""
        return None if self.claimed else await self.operation.wait_async(timeout)

    async def receipt(self, timeout: float) -> None:
        """Wait for the receipt where the settings say so."""
        if self.settle_inline:
            await self.wait_async(timeout)


_open: ContextVar[Slot | None] = ContextVar("vluna_llm_slot", default=None)


def open_slot() -> Slot | None:
    """The innermost slot around the running code."""
    return _open.get()


def mark_refused(error: VlunaError) -> None:
    """Let the layer around the running code mark a refusal that is about to be raised."""
    slot = _open.get()
    if slot is not None and slot.mark is not None:
        slot.mark(error)


@contextmanager
def inside(slot: Slot) -> Iterator[Slot]:
    """Offer the slot to what is called in the ``with``."""
    with scoped(_open, slot):
        yield slot
