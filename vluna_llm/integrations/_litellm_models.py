"""Which model a call through LiteLLM really goes to, and what its request says: from arguments to `ModelCall`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final
from urllib.parse import urlsplit

import litellm

from ..lifecycle import ModelCall
from ._litellm_parts import LOOKUP, part
from ._openai_endpoints import provider_of

_POSITIONAL: Final[Mapping[str, tuple[str, ...]]] = {
    "chat.completions": ("model", "messages"),
    "responses": ("input", "model"),
    "completions": ("prompt", "model"),
    "embeddings": ("model", "input"),
    "images": ("prompt", "model"),
    "audio": ("model", "file"),
    "anthropic.messages": ("max_tokens", "messages", "model"),
}
"""The first positional parameters of LiteLLM's functions, by API, where their signature does not tell."""

_WORDS: Final[Mapping[str, str]] = {
    "anthropic_text": "anthropic",
    "azure_ai": "azure",
    "azure_text": "azure",
    "bedrock_converse": "bedrock",
    "bedrock_mantle": "bedrock",
    "codestral": "mistral",
    "cohere_chat": "cohere",
    "custom_openai": "openai",
    "fireworks_ai": "fireworks",
    "gemini": "google",
    "ollama_chat": "ollama",
    "openai_like": "openai",
    "text-completion-codestral": "mistral",
    "text-completion-openai": "openai",
    "together_ai": "together",
    "vertex_ai_beta": "vertex_ai",
    "watsonx_text": "watsonx",
}
"""LiteLLM has several words for one provider, by route; a feature has one, the same as through a wrapped client."""

_ROUTES: Final[Mapping[str, tuple[str, ...]]] = {
    "openai": ("responses/", "chat/"),
    "azure": ("azure/", "responses/", "o_series/", "gpt5_series/"),
    "bedrock": (
        "chat_completions/",
        "converse_like/",
        "converse/",
        "claude_platform/",
        "async_invoke/",
        "invoke/",
        "mantle/",
        "openai/",
        "llama/",
        "deepseek_r1/",
    ),
    "vertex_ai": ("openai/",),
    "google": ("models/",),
}
"""What LiteLLM lets a caller write before a model's own name to choose a route of its own."""

_REGION: Final = re.compile(r"\A[a-z]{2}(?:-[a-z]+)+-\d/(?:\d+-month-commitment/)?")
"""A region (and a commitment) that LiteLLM takes before a Bedrock model: ``us-east-1/anthropic.claude-v2:1``."""

_REQUEST: Final = (
    "messages",
    "input",
    "prompt",
    "instructions",
    "system",
    "tools",
    "functions",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "n",
    "response_format",
    "text",
    "reasoning",
    "reasoning_effort",
    "thinking",
    "temperature",
    "top_p",
    "stop",
    "seed",
    "tool_choice",
    "size",
    "quality",
    "image",
    "dimensions",
    "previous_response_id",
    "background",
    "extra_body",
)
"""The arguments that are the request: measured for the estimate, and what makes it this request and no other."""

_BY_DEPLOYMENT: Final = ("chat.completions", "completions")
"""Where LiteLLM takes ``deployment_id`` for the model; its other functions hand it on unread."""

_KNOWN: dict[tuple[str, str | None, str | None], tuple[str, str]] = {}
_MOST_KNOWN: Final = 2_000


def model_call_of(
    kind: str, kwargs: Mapping[str, Any], args: Sequence[Any] = (), names: Sequence[str] = ()
) -> ModelCall:
    """What is known of a call before it is made. Never raises.

    Args:
        kind: the API: ``chat.completions``, ``responses``, ``completions``, ``embeddings``, ``images``, ``audio``,
            ``anthropic.messages``.
        kwargs: the keyword arguments of LiteLLM's function, or a deployment's ``litellm_params`` with the request.
        args: its positional arguments.
        names: how its signature calls them.
    """
    given = dict(kwargs)
    for name, value in zip(names or _POSITIONAL.get(kind, ()), args, strict=False):
        given.setdefault(name, value)
    if kind not in _BY_DEPLOYMENT:
        given.pop("deployment_id", None)
    provider, model = model_of(given)
    body: dict[str, Any] = {name: _plain(given[name]) for name in _REQUEST if name in given and given[name] is not None}
    if body:
        body["model"] = model
    return ModelCall(kind, provider, model, body or None, given.get("stream") is True)


@lru_cache(maxsize=128)
def positional_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's positional parameters: an image is edited by ``(image, prompt, model)``."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)


def as_deployed(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a proxy's call as far as they name the model: what an Azure deployment runs is the operator's
    word (``model_info``), and 1.83 lets a client's ``base_model`` through."""
    return {name: said for name, said in given.items() if name != "base_model"} if "base_model" in given else given


def other_model(given: Mapping[str, Any], model_call: ModelCall) -> str | None:
    """The model that ``extra_body`` names, where it is another one than the call's.

    Some functions and versions of LiteLLM send it in the place of the call's own (the OpenAI SDK lays ``extra_body``
    over the request), others take it out: nobody can tell beforehand what is going to be asked and sold.
    """
    body = given.get("extra_body")
    named = body.get("model") if isinstance(body, Mapping) else None
    if named is None or named in (given.get("model"), model_call.model):
        return None
    return str(named)


def model_of(given: Mapping[str, Any]) -> tuple[str, str]:
    """Provider and model of a call, as the feature code has them: ``("bedrock", "us.anthropic.claude-...")``.

    LiteLLM's own reading of the name decides (`litellm.get_llm_provider`); then

    * an Azure deployment is called what its ``base_model`` says, where one is given (``base_model``, or
      ``model_info`` as a Router has it): deployments are named as their owner likes;
    * a name sent to another host in OpenAI's dialect (``openai/deepseek-chat`` with DeepSeek's ``api_base``) belongs
      to that host, where it is one we know;
    * routes and regions that LiteLLM takes inside a name (``converse/``, ``responses/``, ``us-east-1/``) go.
      A Bedrock inference profile (``us.``) stays: it is what is asked for, and may have a price of its own.
    """
    model = given.get("model") or given.get("engine") or ""
    model = model if isinstance(model, str) else str(model)
    custom = given.get("custom_llm_provider")
    if isinstance(deployment := given.get("deployment_id"), str) and deployment:
        model, custom = deployment, "azure"
    provider, name = _split(model, str(custom) if custom else None, _base(given))
    if provider == "azure" and (base := _base_model(given)):
        named, name = _split(base, None, None)
        if named not in ("openai", "azure"):  # a base model without a prefix is looked up like any other name
            name = base.removeprefix("azure/")
    return provider, name


def _split(model: str, custom: str | None, api_base: str | None) -> tuple[str, str]:
    aliases = getattr(litellm, "model_alias_map", None)
    if isinstance(aliases, Mapping) and isinstance(alias := aliases.get(model), str):
        model = alias
    key = (model, custom, api_base)
    found = _KNOWN.get(key)
    if found is None:
        word, name = _looked_up(model, custom, api_base)
        if word is None:
            return "unknown", model
        found = _tidy(word, name, api_base)
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = found
    return found


def _looked_up(model: str, custom: str | None, api_base: str | None) -> tuple[str | None, str]:
    """LiteLLM's word for the provider, and the rest of the name.

    A name that says its provider is taken at its word, which is what LiteLLM does; its own function reads keys and
    tokens besides, sometimes over the network. It is asked about all others.
    """
    prefix, slash, rest = model.partition("/")
    if custom:
        return custom, rest if slash and prefix == custom else model
    if slash and rest and prefix in getattr(litellm, "provider_list", ()):
        return prefix, rest
    lookup = part(LOOKUP)
    if lookup is None:
        return (prefix, rest) if slash and rest else (None, model)
    try:
        name, word, _, _ = lookup(model=model, api_base=api_base, api_key="-")
    except Exception:  # LiteLLM will refuse the call in its own words
        return None, model
    return word, name


def _tidy(word: str, name: str, api_base: str | None) -> tuple[str, str]:
    provider = _WORDS.get(word, word)
    if provider == "openai" and name.startswith("azure/"):  # LiteLLM sends Azure's other models in OpenAI's dialect
        provider = "azure"
    if provider == "openai" and api_base:
        provider = provider_of(urlsplit(api_base).hostname or "")
    for route in _ROUTES.get(provider, ()):
        name = name.removeprefix(route)
    if provider == "bedrock":
        name = _REGION.sub("", name)
    return provider, name


def _base(given: Mapping[str, Any]) -> str | None:
    for name in ("api_base", "base_url"):
        if isinstance(value := given.get(name), str) and value:
            return value
    return None


def _base_model(given: Mapping[str, Any]) -> str | None:
    """An Azure deployment's model: where `completion` and the Router look for it."""
    places: list[Any] = [given, given.get("model_info")]
    for name in ("metadata", "litellm_metadata"):
        if isinstance(metadata := given.get(name), Mapping):
            places.append(metadata.get("model_info"))
    for place in places:
        if isinstance(place, Mapping) and isinstance(base := place.get("base_model"), str) and base:
            return base
    return None


def _plain(value: Any) -> Any:
    """Messages may be LiteLLM's own objects (an answer put back into the conversation): the estimate reads mappings."""
    if not isinstance(value, list):
        return value
    return [item.model_dump() if hasattr(item, "model_dump") else item for item in value]
