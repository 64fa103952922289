"""Google ADK with every model request authorized, metered and settled: one line.

::

    from google.adk.agents import LlmAgent
    from vluna_llm.integrations.google_adk import wrap_model

    agent = LlmAgent(name="helper", model=wrap_model("gemini-2.5-flash"))

Who pays is named by `call_context` around ``runner.run_async``, or bound to the model. The model is where it is done:
ADK's model callbacks see neither a run that is left nor one that is cancelled, and what a plugin raises comes out as a
``RuntimeError``; from the model our own exception comes out as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from ._google_adk_model import VlunaLlm
except ImportError as error:
    if not (error.name or "").startswith("google"):
        raise
    raise ImportError(
        "vluna_llm.integrations.google_adk needs Google ADK 2.13 or later: pip install 'vluna-llm[google-adk]'",
        name="google.adk",
    ) from error

if TYPE_CHECKING:
    from ..vluna import Vluna

__all__ = ["VlunaLlm", "wrap_model"]


def wrap_model(model: Any, vluna: Vluna | None = None, **bound: Any) -> VlunaLlm:
    """The model, metered: a `BaseLlm` for ``LlmAgent(model=...)``, of a `BaseLlm` or of a name that ADK resolves.

    ``bound`` names who pays by the arguments of `Vluna.bind`, and wins over the surrounding context.

    Raises:
        ConfigurationError: who pays could not be billed; no ``vluna``, and the environment is incomplete or wrong.
    """
    return VlunaLlm(model, vluna, **bound)
