"""The OpenAI Agents SDK: every model call of a run is an operation of its own, with its own lease and settlement.

::

    from agents import Agent, RunConfig, Runner
    from vluna_llm import call_context
    from vluna_llm.integrations.openai_agents import VlunaModelProvider

    metered = RunConfig(model_provider=VlunaModelProvider())             # one run
    with call_context(principal_id="customer_123"):
        result = await Runner.run(Agent(name="guide", model="gpt-4o-mini"), "...", run_config=metered)

    Agent(name="guide", model=VlunaModel(some_model))                    # one agent
    install()                                                            # every run that names OpenAI's models

A refusal (`vluna_llm.errors`) comes out of ``Runner.run`` and out of ``stream_events()`` as it is, before the model is
called; what earlier turns used stays charged. ``run_streamed`` takes the call context along when it is called, and
works on when its consumer leaves, so that is charged, too; ``result.cancel()`` ends the call under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..context import make_context

try:
    import agents
    from agents import FunctionTool, Model, ModelProvider, MultiProvider, RunHooks, function_tool
    from agents.models import _openai_shared
    from agents.models.openai_provider import shared_http_client
    from openai import AsyncOpenAI
except ImportError as error:
    raise ImportError(
        "vluna_llm.integrations.openai_agents needs the OpenAI Agents SDK: pip install 'vluna-llm[agents]'",
        name="agents",
    ) from error

from ..billable import BillableTool
from ._agents_model import VlunaModel
from ._agents_payer import Identity, fill_in, lay_down
from ._agents_tools import Price, twin_of
from ._default import given_or_default

if TYPE_CHECKING:
    from ..vluna import Vluna

__all__ = [
    "Identity",
    "VlunaModel",
    "VlunaModelProvider",
    "VlunaRunHooks",
    "gated_tool",
    "install",
    "surface_refusals",
    "uninstall",
]


class VlunaModelProvider(ModelProvider):  # type: ignore[misc]
    """A model provider whose models are metered (`VlunaModel`), for ``RunConfig(model_provider=...)``.

    Models that an agent holds as objects are not asked of a provider: wrap those in `VlunaModel`.

    Args:
        vluna: the metering; `Vluna.default()` where not given, looked up at the first call.
        inner: the provider of the models; the SDK's own (``MultiProvider()``) where not given, with the default client
            or key of the SDK.
        identity: who pays, by the run's context object (``Runner.run(..., context=...)``): gives an id, the
            arguments of `call_context` as a dict, or a `CallContext`. It wins over the surrounding ``call_context``,
            and needs ``hooks=VlunaRunHooks()``. Without it the surrounding ``call_context`` pays.
    """

    def __init__(
        self, vluna: Vluna | None = None, inner: ModelProvider | None = None, *, identity: Identity | None = None
    ) -> None:
        self._vluna = vluna
        self._vluna_inner = inner if inner is not None else MultiProvider()
        self._vluna_identity = identity

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_vluna"):
            raise AttributeError(name)
        return getattr(self._vluna_inner, name)

    def get_model(self, model_name: str | None) -> Model:
        """The inner provider's model, metered."""
        model = self._vluna_inner.get_model(model_name)
        turn = lay_down(self._vluna_identity, self._vluna) if self._vluna_identity is not None else None
        return VlunaModel(model, self._vluna, _turn=turn)

    async def aclose(self) -> None:
        """Close the inner provider."""
        await self._vluna_inner.aclose()


class VlunaRunHooks(RunHooks):  # type: ignore[misc]
    """The hooks by which `VlunaModelProvider(identity=...)` learns whose run it is: ``Runner.run(..., hooks=...)``.

    Hooks of your own may be a subclass: call ``super().on_llm_start(...)``. One object serves any number of runs.
    """

    async def on_llm_start(self, context: Any, agent: Any, system_prompt: str | None, input_items: list[Any]) -> None:
        """Note who pays for the call that is about to be made; what ``identity`` raises ends the run before it.

        Raises:
            ConfigurationError: the model of this call does not come from ``VlunaModelProvider(identity=...)``.
        """
        fill_in(context.context)


def gated_tool(
    *,
    feature_code: str,
    estimate: int = 1,
    quantity: Callable[[Any], int | Mapping[str, int]] | None = None,
    feature_family_code: str | None = None,
    vluna: Vluna | None = None,
) -> Callable[[FunctionTool | Callable[..., Any]], FunctionTool]:
    """Make a tool that costs money an operation with a feature code of its own::

        @gated_tool(feature_code="tools.search", estimate=1)
        @function_tool
        async def search(query: str) -> str: ...

    The gate is asked before each use. A refusal there, or of a model call inside the tool, ends the run with our own
    exception; no ``failure_error_function`` makes a text for the model of it. A use that fails, or is cancelled, costs
    nothing. A function that is no tool yet is made one; ``agent.as_tool(...)`` works as well.

    Args:
        feature_code: what is sold.
        estimate: about how much one use takes, in the feature's unit; charged where ``quantity`` is not given.
        quantity: how much it took, by what the tool returned; or how much on each meter, by the meter's code. Where it
            fails, that is told and the estimate is charged, labelled.
        feature_family_code: the feature's family.
        vluna: the metering; `Vluna.default()` where not given, looked up at the first use.

    Raises:
        ConfigurationError: a code has characters that the gate refuses, or the tool runs at the provider.
    """
    make_context(feature_code=feature_code, feature_family_code=feature_family_code)
    price = Price(BillableTool(feature_code, estimate, quantity, feature_family_code), vluna)

    def gate(tool: FunctionTool | Callable[..., Any]) -> FunctionTool:
        plain = callable(tool) and not isinstance(tool, FunctionTool)
        return twin_of(function_tool(tool) if plain else tool, price)

    return gate


def surface_refusals(tool: FunctionTool) -> FunctionTool:
    """The same tool, in which a refusal of the gate ends the run with our own exception.

    For tools that are free themselves and call models: ``surface_refusals(agent.as_tool(...))``, or a function with a
    metered client. Without it the SDK gives the model a text in the place of the refusal, and goes on.

    Raises:
        ConfigurationError: this is not a function tool.
    """
    return twin_of(tool, None)


# -- for the whole process ---------------------------------------------------------------------------------------------

_installed: tuple[AsyncOpenAI | None, AsyncOpenAI] | None = None
"""The SDK's default client as it was, and ours."""


def install(vluna: Vluna | None = None) -> None:
    """Meter the SDK's default OpenAI client: every run from now on that names OpenAI's models by strings.

    The default client that was set is metered, or one with the SDK's own defaults; set a default key before. Other
    providers (``litellm/...``), Responses over a WebSocket and models that agents hold as objects are not covered:
    `VlunaModelProvider` and `VlunaModel` are for those. Doing it again replaces the metering.

    Args:
        vluna: the metering; `Vluna.default()` where not given.

    Raises:
        ConfigurationError: the environment is incomplete or wrong; or Responses go over a WebSocket, which is not
            metered here, and ``on_unmetered`` is ``deny``.
        openai.OpenAIError: the SDK has neither a default client nor a key.
    """
    global _installed
    vluna = given_or_default(vluna)
    uninstall()
    before = _openai_shared.get_default_openai_client()
    bare = before
    if bare is None:
        bare = AsyncOpenAI(api_key=_openai_shared.get_default_openai_key(), http_client=shared_http_client())
    metered = vluna.wrap(bare)
    if _openai_shared.get_default_openai_responses_transport() == "websocket":
        vluna.unmetered("Responses over a WebSocket after install() of openai_agents (use VlunaModelProvider)")
    agents.set_default_openai_client(metered, use_for_tracing=False)
    _installed = (before, metered)


def uninstall() -> None:
    """Give the SDK back the default client that it had before `install`. Does nothing where another one was set."""
    global _installed
    installed, _installed = _installed, None
    if installed is not None and _openai_shared.get_default_openai_client() is installed[1]:
        _openai_shared.set_default_openai_client(installed[0])
