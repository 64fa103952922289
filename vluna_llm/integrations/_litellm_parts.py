"""What we use of LiteLLM by name, looked up when it is needed: another version may have it elsewhere, or no more.

Nothing here is worth a call of the user's: each place that uses a part goes on without it, and what is not covered then
is told once, when LiteLLM is wrapped.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from ..telemetry import log

STREAM: Final = "litellm.litellm_core_utils.streaming_handler:CustomStreamWrapper"
ROUTER: Final = "litellm:Router"
LOOKUP: Final = "litellm:get_llm_provider"
SUPPORTED: Final = "litellm:get_supported_openai_params"
BUILDER: Final = "litellm:stream_chunk_builder"
TOO_LONG: Final = "litellm:ContextWindowExceededError"
LOGGER: Final = "litellm.integrations.custom_logger:CustomLogger"

_WITHOUT: Final[Mapping[str, str]] = {
    STREAM: "a stream that LiteLLM itself ends early is settled when it is collected; with install=False the usage of "
    "streams is estimated where nobody asks for it",
    ROUTER: "what a Router tries is a call of its own each time, and a refusal may be tried again",
    LOOKUP: "a model without its provider before it is booked as unknown",
    SUPPORTED: "the usage of streams is asked for at OpenAI and Azure alone, and estimated elsewhere",
    BUILDER: "complete_response=True bills what LiteLLM says was used",
    TOO_LONG: "context_window_fallback_dict is left to LiteLLM",
    LOGGER: "none of its hooks are called: no spend for other callbacks, nothing in the proxy, nothing with "
    "install=False",
}
"""What is not covered where a part is missing."""


def part(where: str) -> Any:
    """The part of LiteLLM that is called so (``module:name``, or a module); None where this version has none there."""
    module, _, name = where.partition(":")
    try:
        found = importlib.import_module(module)
        return getattr(found, name, None) if name else found
    except Exception:  # whatever a module of LiteLLM's raises when it is imported
        return None


def tell_missing(entries: Iterable[str] = ()) -> None:
    """Warn of what this version of LiteLLM does not have where we know it.

    Args:
        entries: entry functions that were not found.
    """
    for where, without in _WITHOUT.items():
        if part(where) is None:
            log.warning("this version of LiteLLM has no %s: %s", where.replace(":", "."), without)
    if missing := sorted(entries):
        log.warning("this version of LiteLLM has no %s: what it has instead is not metered", ", ".join(missing))
