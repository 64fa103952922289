"""LangChain and LangGraph with every model call authorized, metered and settled.

::

    from langchain_openai import ChatOpenAI
    from vluna_llm import call_context
    from vluna_llm.integrations.langchain import wrap_model

    model = wrap_model(ChatOpenAI(model="gpt-4o-mini"))     # the one line; settings from the environment
    with call_context(principal_id="customer_123"):
        model.invoke("What is a lighthouse for?")

The wrapped model settles; callbacks never do, since LangChain tells them nothing of an ``ainvoke`` that is cancelled
and little of a stream that is left. Who pays is, the first that names somebody:

1. what the model is bound to: ``wrap_model(model, principal_id="customer_123")``;
2. the config of the run: ``config={"metadata": {"vluna": {"principal_id": "customer_123"}}}``, which LangChain hands on
   to everything that runs inside, in whatever thread or task; or what the function of a `VlunaCallbackHandler` makes of
   that metadata;
3. ``with call_context(...)``, which follows LangChain into its threads and tasks.

Whoever writes the config names who pays: where configs come from clients, bind the model or use the function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

try:
    from langchain_core.callbacks import BaseCallbackHandler
except ImportError as error:
    raise ImportError(
        "vluna_llm.integrations.langchain needs LangChain: pip install 'vluna-llm[langchain]'", name="langchain_core"
    ) from error

from ..context import make_context
from ..errors import ConfigurationError, VlunaError
from ._default import given_or_default
from ._langchain_model import MeteredSerialized, meter
from ._langchain_run import METADATA_KEY, IdentityFunction, Payer

if TYPE_CHECKING:
    from ..billable import BillableTool
    from ..vluna import Vluna
    from ._langchain_agent import VlunaMiddleware

__all__ = ["BillableTool", "VlunaCallbackHandler", "VlunaMiddleware", "may_retry", "wrap_model"]

M = TypeVar("M")


def wrap_model(
    model: M,
    vluna: Vluna | None = None,
    *,
    principal_id: str | None = None,
    user_id: str | None = None,
    feature_code: str | None = None,
    feature_family_code: str | None = None,
    budget_id: str | None = None,
    labels: Mapping[str, object] | None = None,
    end_user: str | None = None,
    request_id: str | None = None,
) -> M:
    """A metered copy of a chat model, whose class is a subclass of its own; the given one stays as it was.

    A model that holds clients of an SDK that `Vluna.wrap` knows gets metered ones; any other is metered by the
    ``usage_metadata`` of its messages. Also takes what ``bind_tools``, ``with_retry`` and ``with_fallbacks`` give.
    Wrapping a metered model again meters it once, and adds to what it is bound to.

    Pickled, it is metered again by `Vluna.default()` where it is read. What ``langchain_core.load`` reads is bare.

    Args:
        model: the chat model.
        vluna: what meters; `Vluna.default()` where not given.
        principal_id: who pays, whatever config and context say; so with all that follow, as in `Vluna.bind`.
        user_id: the purse within the customer.
        feature_code: what is sold, in place of the code made of the model's name.
        feature_family_code: the family of that feature.
        budget_id: a budget that binds this work.
        labels: text stored with the booking.
        end_user: who used it, as a label.
        request_id: the caller's own request id.

    Raises:
        ConfigurationError: this is no chat model, or an id could not be signed.
    """
    given: dict[str, Any] = {
        "principal_id": principal_id,
        "user_id": user_id,
        "feature_code": feature_code,
        "feature_family_code": feature_family_code,
        "budget_id": budget_id,
        "labels": labels,
        "end_user": end_user,
        "request_id": request_id,
    }
    bound = {name: value for name, value in given.items() if value is not None}
    vluna = given_or_default(vluna)
    metered = meter(model, vluna, make_context(**bound) if bound else None)
    if metered is model and not _holds_metered(model):
        raise ConfigurationError(
            f"wrap_model takes a chat model, not {type(model).__name__}: wrap each model before it is put into "
            "a chain, or give it clients that vluna.wrap has wrapped."
        )
    return metered  # type: ignore[no-any-return]


def _holds_metered(model: Any) -> bool:
    from ._langchain_model import metering_of

    while metering_of(model) is None:
        if (model := getattr(model, "bound", None)) is None:
            return False
    return True


def may_retry(error: BaseException) -> bool:
    """Whether trying again may help: not after a refusal of the gate, which is an answer.

    For whatever retries more than one model: ``chain.with_retry(retry_if_exception_type=may_retry)``, LangGraph's
    ``RetryPolicy(retry_on=may_retry)``, ``ModelRetryMiddleware(retry_on=may_retry)``. A metered model's own
    ``with_retry`` knows it already.
    """
    return isinstance(error, Exception) and not isinstance(error, VlunaError)


class VlunaCallbackHandler(BaseCallbackHandler):  # type: ignore[misc]
    """Says who pays for the runs that it is handed on to, and tells of models that nobody has wrapped.

    It settles nothing and holds nothing: a metered model finds it among the handlers of its run, in whatever thread or
    task that is, and asks it. So parallel branches and runs that were cancelled cannot be mixed up.

    Args:
        identity: gets the metadata of the run; gives the principal, or a mapping of what `vluna_llm.call_context`
            takes, or None where the surrounding context pays. Without it the metadata's entry ``vluna`` says so.
        vluna: who is told of calls that are not metered (``on_unmetered``); `Vluna.default()` where not given.
    """

    raise_error = True
    run_inline = True

    def __init__(self, identity: IdentityFunction | None = None, vluna: Vluna | None = None) -> None:
        super().__init__()
        self._identity = identity
        self._vluna = vluna

    def vluna_identity(self, metadata: Mapping[str, Any]) -> Payer:
        """Who pays for a run with this metadata."""
        return metadata.get(METADATA_KEY) if self._identity is None else self._identity(metadata)

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        """A model is about to be called: one that is not metered follows ``on_unmetered``."""
        if not isinstance(serialized, MeteredSerialized):
            self._unmetered(serialized)

    def on_llm_start(self, serialized: Any, prompts: Any, **kwargs: Any) -> None:
        """A model of LangChain's older kind, which is never metered here."""
        self._unmetered(serialized)

    def _unmetered(self, serialized: Any) -> None:
        self._vluna = given_or_default(self._vluna)
        if self._vluna.mode != "off":
            name = (serialized or {}).get("name") or "model"
            self._vluna.unmetered(f"langchain.{name} (not given to wrap_model)")


def __getattr__(name: str) -> Any:
    """The middleware needs the package ``langchain``; models and callbacks only ``langchain-core``."""
    if name not in ("BillableTool", "VlunaMiddleware"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import _langchain_agent

    return getattr(_langchain_agent, name)
