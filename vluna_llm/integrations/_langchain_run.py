"""The LangChain run around a model call: who pays for it by its config, and which labels go into the gate's books.

LangChain hands ``_generate`` a run manager, but none to ``_stream``, and no hook of it sees how every run ends. So a
metered model notes the run in a context variable before LangChain calls it back. A note is read inside that call alone:
nothing of one run is left for the next one in the same task or thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from langchain_core.runnables.config import ensure_config

from ..context import ARGUMENTS, CallContext, telling, within
from ..scoped import scoped
from ._payer import named

if TYPE_CHECKING:
    from ..vluna import Vluna

METADATA_KEY: Final = "vluna"
CONTEXT_FIELDS: Final = tuple(name for name in ARGUMENTS if name != "idempotency_key")
"""A job is one run of the caller's, whatever runs of LangChain's are in it: its key is the call context's alone."""

Payer: TypeAlias = "str | Mapping[str, Any] | None"
IdentityFunction: TypeAlias = "Callable[[Mapping[str, Any]], Payer]"
"""Gets the metadata of the run; gives the principal, or a mapping of what `vluna_llm.call_context` takes, or None where
the surrounding call context pays."""


class Run:
    """One run of a chat model, as far as it is known.

    Attributes:
        run_id: LangChain's id of the run.
        metadata: its metadata, inherited ones included.
        handlers: its callback handlers.
        items: the observed stream of the run, for whoever closes it.
    """

    __slots__ = ("handlers", "items", "metadata", "run_id")

    def __init__(self, run_id: object, metadata: Mapping[str, Any] | None, handlers: Any) -> None:
        self.run_id = run_id
        self.metadata: Mapping[str, Any] = metadata or {}
        self.handlers = handlers or ()
        self.items: Any = None


def run_of_manager(manager: Any) -> Run:
    """The run of a run manager."""
    return Run(manager.run_id, getattr(manager, "metadata", None), getattr(manager, "handlers", None))


def run_of_config(config: Any, model: Any = None) -> Run:
    """The run that this `RunnableConfig`, merged with that of the surrounding run, is for."""
    config = ensure_config(config)
    callbacks, own = config.get("callbacks"), getattr(model, "callbacks", None)
    inherited = getattr(callbacks, "metadata", None)
    handlers = [
        handler
        for found in (callbacks, own)
        for handler in (getattr(found, "handlers", None) or (found if isinstance(found, (list, tuple)) else ()))
    ]
    metadata = {**(getattr(model, "metadata", None) or {}), **(inherited or {}), **(config.get("metadata") or {})}
    return Run(config.get("run_id"), metadata, handlers)


_current: ContextVar[Run | None] = ContextVar("vluna_llm_langchain_run", default=None)


@contextmanager
def noted(run: Run) -> Iterator[Run]:
    """What a metered model does in the ``with`` belongs to this run."""
    with scoped(_current, run):
        yield run


def run_of_call(manager: Any) -> Run:
    """The run of a call that LangChain makes to a model; ``manager`` is the run manager that it was given, if any."""
    noted_run = _current.get()
    if manager is not None and (noted_run is None or noted_run.run_id != getattr(manager, "run_id", None)):
        return run_of_manager(manager)
    return noted_run if noted_run is not None else run_of_config(None)


def payer_of(run: Run, vluna: Vluna) -> CallContext:
    """Who pays by the config of this run, and what it is; no principal where the config names nobody.

    Raises:
        ConfigurationError: what the config or the handler's function names cannot be billed. In ``observe`` that is
            told, and the surrounding call context pays.
    """
    try:
        payer = _named(run)
    except Exception:
        if vluna.mode == "enforce":
            raise
        vluna.internal_error("langchain.identity")
        payer = CallContext()
    return telling(run_id=run.run_id, node=run.metadata.get("langgraph_node")).override(payer)


@contextmanager
def paid_by(payer: CallContext, bound: CallContext | None = None) -> Iterator[None]:
    """In the ``with`` this is who pays; ``bound`` wins."""
    with within(payer if bound is None else payer.override(bound)):
        yield


def _named(run: Run) -> CallContext:
    for handler in run.handlers:
        identity = getattr(handler, "vluna_identity", None)
        if callable(identity):
            return named(identity(run.metadata), "the identity function of VlunaCallbackHandler gave", CONTEXT_FIELDS)
    return named(run.metadata.get(METADATA_KEY), f'config["metadata"]["{METADATA_KEY}"] is', CONTEXT_FIELDS)
