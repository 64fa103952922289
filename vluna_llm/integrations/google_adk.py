"""Google ADK with every model request authorized, metered and settled: one line.

::

    from google.adk.apps import App
    from vluna_llm.integrations.google_adk import VlunaPlugin

    app = App(name="shop", root_agent=agent, plugins=[
        VlunaPlugin(identity=lambda ctx: {"principal_id": ctx.user_id}),
    ])

The plugin says who pays, and has each request of the app's agents go through a `VlunaLlm`. The model is where it is
done: ADK's model callbacks see neither a run that is left nor one that is cancelled, and what a plugin raises comes out
as a ``RuntimeError``; from the model our own exception comes out as it is. Without a plugin `wrap_model` meters one
model: ``LlmAgent(model=wrap_model("gemini-2.5-flash"))``, with `call_context` around ``runner.run_async``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

try:
    from google.adk.plugins.base_plugin import BasePlugin

    from ._google_adk_model import VlunaLlm, metered
except ImportError as error:
    if not (error.name or "").startswith("google"):
        raise
    raise ImportError(
        "vluna_llm.integrations.google_adk needs Google ADK 2.13 or later: pip install 'vluna-llm[google-adk]'",
        name="google.adk",
    ) from error

from ..billable import BillableTool, billable
from ..context import current_context, enter_context, telling
from ..errors import VlunaError
from ._default import given_or_default
from ._google_adk_run import (
    Identity,
    Payer,
    Use,
    about_to_run,
    agent_of,
    payer_of,
    refuse,
    refused,
    resolve_next,
    stood_down,
)

if TYPE_CHECKING:
    from ..vluna import Vluna

__all__ = ["BillableTool", "Identity", "VlunaLlm", "VlunaPlugin", "wrap_model"]


def wrap_model(model: Any, vluna: Vluna | None = None, **bound: Any) -> VlunaLlm:
    """The model, metered: a `BaseLlm` for ``LlmAgent(model=...)``, of a `BaseLlm` or of a name that ADK resolves.

    ``bound`` names who pays by the arguments of `Vluna.bind`, and wins over the surrounding context.

    Raises:
        ConfigurationError: who pays could not be billed; no ``vluna``, and the environment is incomplete or wrong.
    """
    return VlunaLlm(model, vluna, **bound)


class VlunaPlugin(BasePlugin):  # type: ignore[misc]
    """Gates and settles every model request of an app's agents, and says who pays for them.

    Put it first in ``App(plugins=[...])``. It meters whatever model an agent has, sub agents and agents as tools
    included; one that is wrapped already is metered once, and who is bound to that pays. Each booking bears the labels
    ``run_id`` (the invocation's id) and ``agent``. Agents and models stay as they are, for other runs.

    Args:
        vluna: what meters; `Vluna.default()`, whose settings come from the environment, where not given.
        identity: given the context of the callback (``user_id``, ``state``, ``session``, ...), names who pays: an
            id, the arguments of `call_context`, or a `CallContext`; may be a coroutine function. It is asked for each
            model request and each call of a tool. None, or none given: whoever pays for the surrounding work.
        tools: tools that are sold by themselves: name to feature code or `BillableTool`. Each use is an operation; one
            that raises, answers with an error, is cancelled or asks for leave or a credential first costs nothing.
        name: the plugin's name in ADK, for more than one of them.

    Raises:
        ConfigurationError: a feature code that the gate refuses; no ``vluna``, and the environment is incomplete.
    """

    def __init__(
        self,
        vluna: Vluna | None = None,
        *,
        identity: Identity | None = None,
        tools: Mapping[str, str | BillableTool] | None = None,
        name: str = "vluna",
    ) -> None:
        super().__init__(name=name)
        vluna = given_or_default(vluna)
        self.vluna = vluna
        self.identity = identity
        self.tools = billable(tools, vluna)

    async def before_run_callback(self, *, invocation_context: Any) -> None:
        """Summaries of the history by a model of nobody's wrapping are told, see ``on_unmetered``."""
        if self.vluna.mode == "off":
            return
        try:
            if _summarized_unmetered(invocation_context):
                self.vluna.unmetered("google_adk.compaction (give its summarizer a model of wrap_model)")
        except VlunaError as error:
            refuse(invocation_context, error)
        except Exception:
            self.vluna.internal_error("google_adk.run")

    async def before_agent_callback(self, *, agent: Any, callback_context: Any) -> None:
        """What an agent does without any model that we could meter is told: live connections, hosted agents.

        Raises:
            ConfigurationError: ``on_unmetered="deny"``, and this is a hosted agent. ADK makes a ``RuntimeError`` of it.
        """
        if self.vluna.mode == "off":
            return
        hosted = False
        try:
            invocation = callback_context._invocation_context  # the one in use: the public method copies it
            if invocation.live_request_queue is not None and hasattr(type(agent), "canonical_live_model"):
                resolve_next(invocation, "canonical_live_model_async", self._told)
            hosted = any(kind.__name__ == "ManagedAgent" for kind in type(agent).__mro__)
        except Exception:
            self.vluna.internal_error("google_adk.agent")
        if hosted:
            self.vluna.unmetered(f"google_adk.managed_agent {agent.name}")

    async def before_model_callback(self, *, callback_context: Any, llm_request: Any) -> None:
        """The request that follows is metered, and refused there where it has to be."""
        if self.vluna.mode == "off":
            return
        try:
            invocation = callback_context._invocation_context  # the one in use: the public method copies it
            if invocation.live_request_queue is not None:
                return  # it screens what is said on a live connection
            payer = await payer_of(self.identity, callback_context, self.vluna)

            def resolve(model: Any) -> Any:
                if (error := refused(invocation)) is not None:
                    raise error
                if getattr(invocation.run_config, "support_cfc", False):
                    return self._told(model)
                return self._metered(model, payer)

            resolve_next(invocation, "canonical_model_async", resolve)
        except Exception:
            self.vluna.internal_error("google_adk.model")

    async def after_model_callback(self, *, callback_context: Any, llm_response: Any) -> None:
        """A response of a model that the flow has not looked up where we could meter it is told."""
        try:
            invocation = callback_context._invocation_context
            if stood_down(invocation) and self.vluna.mode != "off":
                self.vluna.unmetered(f"google_adk.{invocation.agent.name} (its model is not looked up by its agent)")
        except VlunaError as error:
            refuse(invocation, error)
        except Exception:
            self.vluna.internal_error("google_adk.answer")

    async def before_tool_callback(self, *, tool: Any, tool_args: Any, tool_context: Any) -> None:
        """What the tool uses is billed to the run's customer, and the tool itself where it is sold.

        ADK runs each call of a tool in a task of its own, this callback included.
        """
        if self.vluna.mode == "off":
            return
        try:
            payer = await payer_of(self.identity, tool_context, self.vluna)
            enter_context(current_context().override(payer.context).override(telling(tool=tool.name)))
            sold = self.tools.get(tool.name)
            if sold is not None or payer.error is not None:
                about_to_run(tool, tool_context, Use(tool, self.vluna, sold, payer.error))
        except Exception:
            self.vluna.internal_error("google_adk.tool")

    async def on_tool_error_callback(self, *, tool: Any, tool_args: Any, tool_context: Any, error: Any) -> None:
        """A refusal ends the run, whatever others answer to the model in the tool's place."""
        if isinstance(error, VlunaError) and self.vluna.mode != "off":
            with suppress(Exception):
                refuse(tool_context._invocation_context, error)

    def _metered(self, model: Any, payer: Payer) -> Any:
        context = payer.checked()
        try:
            return metered(model, self.vluna, context)
        except Exception:
            self.vluna.internal_error("google_adk.model")
            return model

    def _told(self, model: Any) -> Any:
        """A model that is about to be talked to live; one of ours tells by itself."""
        if not isinstance(model, VlunaLlm):
            self.vluna.unmetered("google_adk.live")
        return model


def _summarized_unmetered(invocation: Any) -> bool:
    """Whether the app has its history summarized by a model that is not metered."""
    config = getattr(invocation, "events_compaction_config", None)
    if config is None:
        return False
    summarizer = config.summarizer
    if summarizer is None:  # ADK takes the root agent's model then
        model = getattr(agent_of(invocation), "canonical_model", None)
    else:
        model = getattr(summarizer, "_llm", None)
    return model is not None and not isinstance(model, VlunaLlm)
