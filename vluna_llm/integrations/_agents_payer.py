"""Who pays for the calls of an agent's run, where that is read from the run's own context object.

A model of the SDK is not told for which run it is called. ``RunHooks.on_llm_start`` is, but it runs in a task of its
own, whose context variables nobody else sees. What both share is the moment before: the runner asks the provider for
the model in the run's own task, right before the hook. There a `Turn` is laid down, for this one call: the model
keeps it, the hook finds it in the context that its task has copied, and writes into it who pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from agents import get_current_span, get_current_trace

from ..context import CallContext, telling, within
from ..errors import ConfigurationError
from ..scoped import scoped
from ._default import given_or_default
from ._payer import named, tell_nobody

if TYPE_CHECKING:
    from ..vluna import Vluna

Identity = Callable[[Any], "CallContext | Mapping[str, Any] | str | None"]
"""From the run's context object to who pays: an id, a `CallContext`, its fields, or None for the surrounding one."""


class Turn:
    """One model call of one run, from the moment when the runner looks the model up.

    Attributes:
        identity: reads who pays from the run's context object.
        vluna: what meters; the process's own where None.
        payer: who that is, once the hook was called.
        begun: whether the model was called: what the hook finds then belongs to a run that is over.
    """

    __slots__ = ("begun", "identity", "payer", "told", "vluna")

    def __init__(self, identity: Identity, vluna: Vluna | None) -> None:
        self.identity = identity
        self.vluna = vluna
        self.payer: CallContext | None = None
        self.told = False
        self.begun = False


_turn: ContextVar[Turn | None] = ContextVar("vluna_llm_agents_turn", default=None)
_inherited: ContextVar[Identity | None] = ContextVar("vluna_llm_agents_inherited", default=None)


def lay_down(identity: Identity, vluna: Vluna | None) -> Turn:
    """A turn for the model that is being looked up in the running task."""
    turn = Turn(identity, vluna)
    _turn.set(turn)
    return turn


def fill_in(context: Any) -> None:
    """Write who pays into the turn that was laid down for the call that is about to be made.

    Raises:
        ConfigurationError: the model of this call does not come from a provider that knows how to read it.
        Exception: what `read` raises.
    """
    turn = _turn.get()
    if turn is None or turn.begun:
        if turn is not None and given_or_default(turn.vluna).mode != "enforce":
            return
        raise ConfigurationError(
            "VlunaRunHooks are told of a call whose model does not come from VlunaModelProvider(identity=...): nobody "
            "would know who pays. Pass RunConfig(model_provider=VlunaModelProvider(identity=...)) and name models by "
            "strings, or leave the hooks out and use call_context(...)."
        )
    turn.payer = read(turn.identity, context, turn.vluna)
    turn.told = True


def read(identity: Identity, context: Any, vluna: Vluna | None) -> CallContext:
    """Who pays, by the run's context object. Nobody is asked in mode ``off``, and in ``observe`` nothing is refused.

    Raises:
        ConfigurationError: what ``identity`` gave has fields that a call context has not, or ids that cannot be signed.
        Exception: what ``identity`` raised.
    """
    vluna = given_or_default(vluna)
    if vluna.mode == "off":
        return CallContext()
    try:
        return named(identity(context), "identity= gave")
    except Exception as error:
        if vluna.mode == "enforce":
            raise
        tell_nobody(vluna, error)
        return CallContext()


_NO_TRACE = "no-op"
"""The id of a trace where tracing is disabled."""


def run_of_call() -> CallContext:
    """What is told of the run that calls a model: the agent, and the run's trace where it has one.

    A model is not told who calls it. The SDK's current span, a turn's or the agent's, says so also without tracing.
    """
    data = getattr(get_current_span(), "span_data", None)
    kind = getattr(data, "type", None)
    return run_of(getattr(data, "agent_name", None) or (getattr(data, "name", None) if kind == "agent" else None))


def run_of(agent: object, tool: object = None) -> CallContext:
    """What is told of work of this agent in the run that is under way."""
    trace_id = getattr(get_current_trace(), "trace_id", None)
    return telling(run_id=trace_id if trace_id != _NO_TRACE else None, agent=agent, tool=tool)


@contextmanager
def paying(vluna: Vluna, turn: Turn | None, told: CallContext) -> Iterator[None]:
    """What runs in the ``with`` bills the turn's customer; without a turn, whoever the surrounding context names.

    ``told`` is what `run_of_call` gave.

    Raises:
        ConfigurationError: the provider reads who pays from the run's context, and the run has no hooks that do.
    """
    payer = None
    if turn is not None and vluna.mode != "off":
        turn.begun = True
        if turn.told:
            payer = turn.payer
        elif _inherited.get() is not turn.identity and vluna.mode == "enforce":
            raise ConfigurationError(
                "VlunaModelProvider(identity=...) learns of the run's context from hooks: pass hooks=VlunaRunHooks() "
                "to Runner.run (and to as_tool, for a run inside a run), or wrap that tool in surface_refusals(...)."
            )
    with within(told.override(payer) if payer is not None else told):
        yield


@contextmanager
def inheriting(identity: Identity, context: Any, vluna: Vluna | None) -> Iterator[None]:
    """What runs in the ``with`` (a tool, and the runs inside it) bills whom this run's context names."""
    with scoped(_inherited, identity), within(read(identity, context, vluna)):
        yield
