"""Who pays for a model call and for what: the call context, and the scope that adds up what was spent in it."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from types import MappingProxyType, TracebackType
from typing import Any, Final

from .budget import Amount, Limits
from .errors import GateError
from .identity import plain_text, validate_code, validate_id, validate_labels
from .reentry import held
from .scoped import scoped, take_own, unset
from .types import Receipt
from .usage.types import TokenUsage

_NO_LABELS: Mapping[str, str] = MappingProxyType({})


def _no_labels() -> Mapping[str, str]:
    return _NO_LABELS


_MAX_RECEIPTS = 10_000

_FIELDS = (
    "principal_id",
    "user_id",
    "feature_code",
    "feature_family_code",
    "budget_id",
    "end_user",
    "request_id",
    "idempotency_key",
    "parent_operation_id",
)


@dataclass(frozen=True, slots=True)
class CallContext:
    """An immutable answer to "who pays, and for what?". It is captured when an operation starts, never read later.

    Attributes:
        principal_id: the customer who pays.
        user_id: the purse within the customer; the principal itself where not given (design rule 11).
        feature_code: what is sold, in place of the code derived from the model.
        feature_family_code: the family of that feature.
        budget_id: a budget that binds this work (a uuid in the ``lease_token`` dialect).
        labels: text stored with the booking.
        told: what a framework tells of the work (``run_id``, ``agent``, ``tool``), stored as labels of which the
            innermost holds; a label of the caller's own with the same name wins.
        end_user: who used it, as a label; it has no purse.
        request_id: the caller's own request id, sent to the gate and stored as a label.
        idempotency_key: names a job that may be run more than once (design rule 17).
        parent_operation_id: the operation inside which the work is done; stored as a label.
        scopes: the scopes that add up this call, innermost last.
        job: the scope in which ``idempotency_key`` was given: one run of the job, whatever contexts it opens inside.
    """

    principal_id: str | None = None
    user_id: str | None = None
    feature_code: str | None = None
    feature_family_code: str | None = None
    budget_id: str | None = None
    end_user: str | None = None
    request_id: str | None = None
    idempotency_key: str | None = None
    parent_operation_id: str | None = None
    labels: Mapping[str, str] = field(default_factory=_no_labels, hash=False)
    told: Mapping[str, str] = field(default_factory=_no_labels, hash=False)
    scopes: tuple[Scope, ...] = ()
    job: Scope | None = None

    def override(self, other: CallContext) -> CallContext:
        """This context with every field that ``other`` sets; labels are merged, scopes joined.

        Another principal never inherits the purse of this one: ``user_id``, ``budget_id`` and ``end_user`` are taken
        from ``other`` alone when it names a different principal.
        """
        if other is self:
            return self
        changes: dict[str, Any] = {name: value for name in _FIELDS if (value := getattr(other, name)) is not None}
        if other.principal_id is not None and other.principal_id != self.principal_id:
            for name in ("user_id", "budget_id", "end_user"):
                changes[name] = getattr(other, name)
        if other.labels:
            changes["labels"] = MappingProxyType({**self.labels, **other.labels})
        if other.told:
            changes["told"] = MappingProxyType({**self.told, **other.told})
        if other.scopes:
            changes["scopes"] = (*self.scopes, *(scope for scope in other.scopes if scope not in self.scopes))
        if other.job is not None:
            changes["job"] = other.job
        return replace(self, **changes) if changes else self


def make_context(
    *,
    principal_id: str | None = None,
    user_id: str | None = None,
    feature_code: str | None = None,
    feature_family_code: str | None = None,
    budget_id: str | None = None,
    labels: Mapping[str, object] | None = None,
    end_user: str | None = None,
    request_id: str | None = None,
    idempotency_key: str | None = None,
) -> CallContext:
    """A validated `CallContext`.

    Raises:
        ConfigurationError: an id is empty, too long, outside Latin-1 or has blanks at an edge; a code has characters
            that the gate refuses; a label is unusable.
    """
    given: dict[str, Any] = {
        "principal_id": principal_id,
        "user_id": user_id,
        "feature_code": feature_code,
        "feature_family_code": feature_family_code,
        "budget_id": budget_id,
        "end_user": end_user,
        "request_id": request_id,
        "idempotency_key": idempotency_key,
    }
    for name, value in given.items():
        if value is not None:
            validate_id(value, name)
    for name in ("feature_code", "feature_family_code"):
        if given[name] is not None:
            given[name] = validate_code(given[name], name)
    clean = MappingProxyType(validate_labels(labels)) if labels else _NO_LABELS
    return CallContext(**given, labels=clean)


def telling(**told: object) -> CallContext:
    """A context that only says what a framework tells of the work; values that are None or empty are left out."""
    texts = {name: text for name, value in told.items() if (text := plain_text(value))}
    return CallContext(told=MappingProxyType(texts))


ARGUMENTS: Final = tuple(make_context.__kwdefaults__ or ())
"""What a call context is made of, by name: for layers that read it from a mapping of somebody's."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One operation that is not settled: what it will cost, and what of its tokens is not counted as used yet."""

    estimate: Amount
    kept: object = None


_scopes: weakref.WeakSet[Scope] = weakref.WeakSet()


class Scope:
    """What was spent inside one ``with call_context(...)``, nested contexts included.

    Settling happens in the background: `wait` until nothing is pending before reading final figures. Safe to read
    from any thread. At most the last 10,000 receipts are kept; the sums count all.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._guard = threading.RLock()
        self._changed = threading.Condition(self._guard)
        self._pending: dict[str, _Entry] = {}
        self._limits = limits
        _scopes.add(self)
        self._receipts: deque[Receipt] = deque(maxlen=_MAX_RECEIPTS)
        self._usage = TokenUsage()
        self._settled_xusd = 0
        self._in_flight = Amount()
        self._occurrences: dict[str, int] = {}
        self._last_denial: GateError | None = None

    @property
    def last_denial(self) -> GateError | None:
        """The gate's last refusal of a call in here, with its reason and hints; None where there was none.

        Frameworks may put an exception of their own in the place of ours: this one is always whole.
        """
        with self._changed:
            return self._last_denial

    @property
    def receipts(self) -> list[Receipt]:
        """The receipts so far, in the order in which they came."""
        with self._changed:
            return list(self._receipts)

    @property
    def usage(self) -> TokenUsage:
        """The tokens of all completed calls, known as soon as each call ends (also before it is settled)."""
        with self._changed:
            return self._usage

    @property
    def settled_xusd(self) -> int:
        """What the gate charged so far, in XUSD."""
        with self._changed:
            return self._settled_xusd

    @property
    def estimated_xusd(self) -> int:
        """What pending operations will cost by their estimate, in XUSD (0 where prices are not known)."""
        with self._changed:
            return self._in_flight.xusd

    @property
    def pending(self) -> int:
        """How many operations were started and are not settled yet."""
        with self._changed:
            return len(self._pending)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait at most ``timeout`` seconds until nothing is pending; False where something still is.

        Do not call it on an event loop's thread: use `wait_async` there.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while self._pending:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
            return True

    async def wait_async(self, timeout: float | None = None) -> bool:
        """`wait` for coroutines: the loop goes on meanwhile."""
        import asyncio

        if not self.pending:
            return True
        return await asyncio.to_thread(self.wait, timeout)

    @property
    def entered(self) -> bool:
        """Whether this thread is changing or reading the sums at this moment."""
        return held(self._guard)

    def after_fork(self) -> None:
        """In a forked child: the parent's operations are the parent's, and so is the thread that held the lock."""
        self._guard = threading.RLock()
        self._changed = threading.Condition(self._guard)
        self._pending.clear()
        self._in_flight = Amount()

    # -- told by the lifecycle, from any thread ------------------------------------------------------------------

    @property
    def limits(self) -> Limits | None:
        """What everything in here may cost at most."""
        return self._limits

    def reserve(self, operation_id: str, estimate: Amount) -> None:
        """Count an operation that is about to be admitted as in flight, if there is room for it. Again: once.

        Raises:
            BudgetExceeded: there is none; nothing was counted.
        """
        with self._changed:
            known = self._pending.get(operation_id, _Entry(Amount()))
            if self._limits is not None:
                spent = Amount(self._settled_xusd, self._usage.total_tokens)
                if (refusal := self._limits.judge(spent, self._in_flight - known.estimate, estimate)) is not None:
                    raise refusal
            self._put(operation_id, _Entry(estimate, known.kept))

    def opened(self, operation_id: str, estimated_xusd: int = 0, *, kept: object = None) -> None:
        """An operation started in this scope, which keeps ``kept`` until it is closed.

        What was reserved for it stays as it is.
        """
        with self._changed:
            known = self._pending.get(operation_id)
            self._put(operation_id, _Entry(Amount(estimated_xusd) if known is None else known.estimate, kept))

    def _put(self, operation_id: str, entry: _Entry) -> None:
        known = self._pending.get(operation_id)
        self._pending[operation_id] = entry
        self._in_flight += entry.estimate if known is None else entry.estimate - known.estimate

    def denied(self, error: GateError) -> None:
        """The gate refused a call of this scope."""
        with self._changed:
            self._last_denial = error

    def used(self, usage: TokenUsage, operation_id: str = "", cost_xusd: int | None = None) -> None:
        """An operation completed with this usage.

        Args:
            usage: what it used.
            operation_id: which one, where it was `opened` here.
            cost_xusd: what that costs by the prices known; None where none are, and its first estimate stays.
        """
        with self._changed:
            self._usage = self._usage + usage
            self._estimated_anew(operation_id, cost_xusd)

    def unused(self, operation_id: str) -> None:
        """An operation ended without usage: nothing of it is in flight any more."""
        with self._changed:
            self._estimated_anew(operation_id, 0)

    def _estimated_anew(self, operation_id: str, xusd: int | None) -> None:
        entry = self._pending.get(operation_id)
        if entry is not None:
            self._put(operation_id, _Entry(Amount(entry.estimate.xusd if xusd is None else xusd), entry.kept))

    def closed(self, operation_id: str, receipt: Receipt | None) -> None:
        """An operation came to its end; ``receipt`` is None where the gate had nothing to say."""
        with self._changed:
            entry = self._pending.pop(operation_id, None)
            if entry is not None:
                self._in_flight -= entry.estimate
            if receipt is not None:
                self._receipts.append(receipt)
                if receipt.charged_xusd:
                    self._settled_xusd += receipt.charged_xusd
            self._changed.notify_all()

    def occurrence(self, fingerprint: str) -> int:
        """How often this request was made in the scope before, counted from 0 (design rule 17).

        The ``fingerprint`` also tells who pays and for what, so that customers in one job do not count each other's.
        """
        with self._changed:
            n = self._occurrences.get(fingerprint, 0)
            self._occurrences[fingerprint] = n + 1
            return n


_current: ContextVar[CallContext | None] = ContextVar("vluna_llm_call_context", default=None)


def current_context() -> CallContext:
    """The context of the running task or thread; an empty one where none was entered."""
    return _current.get() or _EMPTY


class call_context:
    """Name who pays for the model calls inside a ``with`` (or ``async with``); contexts nest, the inner one wins.

    Entering gives a `Scope`. The context follows `contextvars`: into tasks and callbacks started inside, not into
    threads. A generator handed to a web framework inside the ``with`` runs after it was left: use ``vluna.bind`` there.

    ``max_amount_xusd`` and ``max_tokens`` limit what everything inside may cost, contexts of other customers included:
    the call that would go beyond is refused by `BudgetExceeded` before the gate is asked. Calls under way count by
    their estimates. Tokens are in the unit of each feature; in mode ``observe`` nothing is refused.

    Raises:
        ConfigurationError: on construction, for an id that could not be signed, a label that could not be stored, or a
            limit that is no integer of at least 0.
    """

    def __init__(
        self,
        *,
        principal_id: str | None = None,
        user_id: str | None = None,
        feature_code: str | None = None,
        feature_family_code: str | None = None,
        budget_id: str | None = None,
        labels: Mapping[str, object] | None = None,
        end_user: str | None = None,
        request_id: str | None = None,
        idempotency_key: str | None = None,
        max_amount_xusd: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        limited = max_amount_xusd is not None or max_tokens is not None
        self._limits = Limits(max_amount_xusd, max_tokens) if limited else None
        self._own = make_context(
            principal_id=principal_id,
            user_id=user_id,
            feature_code=feature_code,
            feature_family_code=feature_family_code,
            budget_id=budget_id,
            labels=labels,
            end_user=end_user,
            request_id=request_id,
            idempotency_key=idempotency_key,
        )
        self._entered: list[tuple[Token[CallContext | None], CallContext]] = []

    def __enter__(self) -> Scope:
        scope = Scope(self._limits)
        job = scope if self._own.idempotency_key is not None else None
        merged = current_context().override(replace(self._own, scopes=(scope,), job=job))
        self._entered.append((_current.set(merged), merged))
        return scope

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        token, _ = take_own(self._entered, lambda entry: entry[1] is current_context())
        unset(_current, token)

    async def __aenter__(self) -> Scope:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, value, traceback)


@contextmanager
def within(context: CallContext) -> Iterator[CallContext]:
    """Let what this context sets win in the ``with``, and add up nothing: for layers that have captured who pays."""
    merged = current_context().override(context)
    with scoped(_current, merged):
        yield merged


@contextmanager
def afresh() -> Iterator[None]:
    """Nothing of the surrounding context holds in the ``with``: a server may have been started in somebody's."""
    with scoped(_current, None):
        yield


def enter_context(context: CallContext) -> None:
    """Make it the context for the rest of the running task: for hooks of servers, which have no ``with``.

    In place of what was there: a request begins with nothing of the one before it on the same connection.
    """
    _current.set(context)


_EMPTY = CallContext()


def _forked() -> None:
    for scope in list(_scopes):
        scope.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
