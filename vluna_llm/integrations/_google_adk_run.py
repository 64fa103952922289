"""One run of Google ADK as a plugin sees it: who pays, the model that meters a request, and the tools that are sold.

What a plugin's callback raises comes out of the runner as a ``RuntimeError``; what a model or a tool raises comes out
as it is. So the callbacks only note what is to be done, and the model and the tool do it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..billable import BillableTool
from ..context import CallContext, telling
from ..errors import ConfigurationError, VlunaError
from ._looking_like import looking_like
from ._payer import named, tell_nobody

if TYPE_CHECKING:
    from ..vluna import Vluna

Named: TypeAlias = "CallContext | Mapping[str, Any] | str | None"
Identity: TypeAlias = "Callable[[Any], Named | Awaitable[Named]]"
"""From the context of a callback to who pays: an id, what `call_context` takes, or None for the surrounding one."""

_STANDS_FOR = "_vluna_stands_for"
_AS_MADE = "_vluna_as_made"
_USE = "_vluna_use"
_REFUSED = "_vluna_refused"
_GATED = "_vluna_gated"
"""What we keep on objects of one run, in their own attributes, so that it ends with them."""


# -- who pays ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Payer:
    """Who pays for one model request or tool call: a context, or the error because of which there is none."""

    context: CallContext
    error: Exception | None = None

    def checked(self) -> CallContext:
        """The context.

        Raises:
            Exception: what ``identity`` raised, or why the gate could not bill what it named.
        """
        if self.error is not None:
            raise self.error
        return self.context


async def payer_of(identity: Identity | None, context: Any, vluna: Vluna) -> Payer:
    """Who pays by ``identity``, and what the run is. Never raises.

    Only ``enforce`` refuses: in ``observe`` an identity that cannot be billed is told, and the surrounding work pays.
    """
    run = telling(run_id=context.invocation_id, agent=context.agent_name)
    try:
        return Payer(run.override(await _named(identity, context)))
    except Exception as error:
        if vluna.mode == "enforce":
            return Payer(CallContext(), error)
        tell_nobody(vluna, error)
        return Payer(run)


async def _named(identity: Identity | None, context: Any) -> CallContext:
    found: Any = identity(context) if identity is not None else None
    if inspect.isawaitable(found):
        found = await found
    payer = named(found, "identity= gave")
    if payer.idempotency_key is not None:
        raise ConfigurationError(
            "identity= is asked for each request, and a job is all of them: give idempotency_key to the call_context "
            "around the run."
        )
    return payer


# -- models ------------------------------------------------------------------------------------------------------------


def agent_of(invocation: Any) -> Any:
    """The agent of an invocation, which one of our own may stand for."""
    agent = invocation.agent
    return getattr(agent, "__dict__", {}).get(_STANDS_FOR, agent)


def resolve_next(invocation: Any, method: str, resolve: Callable[[Any], Any]) -> None:
    """Let ``resolve`` make something of the model which the flow will look up next, by this method of its agent.

    The flow asks ``invocation.agent``. So a copy of the agent stands there until then; the agent itself, which other
    runs use at the same time, is never touched, but for what a callback sets on the agent that it finds: that is meant
    for the agent. What ``resolve`` raises comes out of the run as it is.
    """
    agent = _put_back(invocation)

    async def resolved(context: Any) -> Any:
        _put_back(invocation)
        found = getattr(agent, method, None)
        return resolve(getattr(agent, method.removesuffix("_async")) if found is None else await found(context))

    twin = copy.copy(agent)
    twin.__dict__.update({method: resolved, _STANDS_FOR: agent})
    twin.__dict__[_AS_MADE] = dict(twin.__dict__)
    invocation.agent = twin


def _put_back(invocation: Any) -> Any:
    """The agent, in its own place again, with what was set on the copy that stood for it."""
    found, agent = invocation.agent, agent_of(invocation)
    if found is not agent:
        now = dict(found.__dict__)
        made = now.pop(_AS_MADE)
        agent.__dict__.update({name: value for name, value in now.items() if made.get(name, made) is not value})
        invocation.agent = agent
    return agent


def stood_down(invocation: Any) -> bool:
    """Put the agent back; whether another one still stood for it, because no model was looked up."""
    found = invocation.agent
    return found is not _put_back(invocation)


def refuse(invocation: Any, error: VlunaError) -> None:
    """Note a refusal that somebody may make an answer of: no request of this run follows it."""
    invocation.__dict__[_REFUSED] = error


def refused(invocation: Any) -> VlunaError | None:
    """The refusal because of which this run is over."""
    error: VlunaError | None = invocation.__dict__.get(_REFUSED)
    return error


# -- tools -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Use:
    """One call of a tool, as its context keeps it: what is sold, or why it is refused."""

    tool: Any
    vluna: Vluna
    sold: BillableTool | None
    error: Exception | None

    async def run(self, run: Callable[..., Awaitable[Any]], args: Any, context: Any) -> Any:
        """Use the tool.

        Raises:
            VlunaError: the gate refused; the tool was not run.
        """
        if self.error is not None:
            raise self.error
        if self.sold is None:
            return await run(args=args, tool_context=context)
        async with self.sold.operation(self.vluna) as op:
            result = await run(args=args, tool_context=context)
            if _undone(self.tool, context, result):
                op.record(quantity=0)
            else:
                self.sold.used(op, result)
            return result


def about_to_run(tool: Any, context: Any, use: Use) -> None:
    """Have the tool run as ``use`` says, in this context alone.

    The tool is put into a class that looks like its own. It may be used by others at the same time, for whom nothing
    changes: what is to be done stands on the context of the call.

    Raises:
        TypeError: objects of this kind cannot be put into another class.
    """
    if not getattr(tool, _GATED, False):
        kind: Any = type(tool)
        tool.__class__ = _gated(kind)
    setattr(context, _USE, use)


@functools.lru_cache(maxsize=64)
def _gated(kind: Any) -> type[Any]:
    """A class of tools whose calls are as their context says; of one base, so that the objects fit in."""
    made = looking_like(kind, (kind,))

    async def run_async(self: Any, *, args: Any, tool_context: Any) -> Any:
        run: Callable[..., Awaitable[Any]] = super(made, self).run_async
        use: Use | None = getattr(tool_context, _USE, None)
        if use is None or use.tool is not self:
            return await run(args=args, tool_context=tool_context)
        return await use.run(run, args, tool_context)

    def reduced(self: Any, protocol: Any) -> Any:
        function, arguments, *state = super(made, self).__reduce_ex__(protocol)
        return (_anew, (kind,), *state) if function.__name__ == "__newobj__" else (function, arguments, *state)

    setattr(made, "run_async", run_async)  # noqa: B010 (mypy knows nothing of the class)
    setattr(made, "__reduce_ex__", reduced)  # noqa: B010 (a copy, here or in another process, is of the tool's class)
    setattr(made, _GATED, True)
    return made


def _anew(kind: Any) -> Any:
    return kind.__new__(kind)


def _undone(tool: Any, context: Any, result: Any) -> bool:
    """Whether the tool has not done its work: it asks for leave or for a credential, or answers with an error."""
    actions = context.actions
    if actions.requested_auth_configs or actions.requested_tool_confirmations:
        return True
    detect = getattr(tool, "_detect_error_in_response", None)
    return detect is not None and detect(result) is not None
