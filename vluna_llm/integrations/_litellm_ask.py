"""Asking for the usage of a stream on the caller's behalf (design rule 2), through LiteLLM.

LiteLLM asks by itself only where it talks to OpenAI's own address. Elsewhere the option goes into the request by
``extra_body``, not as LiteLLM's own ``stream_options``: that one is part of LiteLLM's cache keys, changes which chunks
LiteLLM gives, and is refused for some providers before the call. Below, in the provider's stream, it is the same; and
LiteLLM leaves out a usage-only chunk that it was not asked for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from ..lifecycle import ModelCall
from ._litellm_parts import LOOKUP, SUPPORTED, part
from ._openai_usage_option import KINDS, REFUSERS, is_asked, is_refusal

_OPENAI_WIRE: Final = frozenset({"openai", "azure", "text-completion-openai", "custom_openai"})
"""Beside LiteLLM's own list of OpenAI-compatible providers."""
_DEEPEST: Final = 5


def ask_usage(
    kwargs: Mapping[str, Any], model_call: ModelCall, refused: Container[str] = ()
) -> tuple[dict[str, Any], bool]:
    """The arguments with ``include_usage`` asked for, and whether that was done; a copy, the caller's stay as they are.

    Nothing is done where the caller asks, where no stream is asked for, where the provider does not speak OpenAI's
    protocol (the others report usage unasked), and where this upstream has refused the option before, or just now
    (``refused``).
    """
    given = dict(kwargs)
    if not given.get("stream") or model_call.kind not in KINDS or is_asked(given):
        return given, False
    body = given.get("extra_body")
    if not isinstance(body, (Mapping, type(None))) or (isinstance(body, Mapping) and is_asked(body)):
        return given, False
    provider, model = _provider(given, model_call)
    upstream = upstream_of(given, model_call)
    if not _knows_option(provider, model) or upstream in refused or upstream in REFUSERS:
        return given, False
    options = {**_mapping(given.get("stream_options")), **_mapping((body or {}).get("stream_options"))}
    given["extra_body"] = {**(body or {}), "stream_options": {**options, "include_usage": True}}
    return given, True


def is_refused(error: BaseException) -> bool:
    """Whether a call may have failed because usage was asked for: it is made once more with the caller's arguments.

    What the upstream said may only stand in the exception that LiteLLM has put one of its own in the place of.
    """
    status = getattr(error, "status_code", None)
    said = ""
    found: BaseException | None = error
    for _ in range(_DEEPEST):
        if found is None:
            break
        said += f" {found} {getattr(found, 'body', '')}"
        found = found.__cause__ or found.__context__
    return isinstance(status, int) and is_refusal(status, said)


def remember_refusal(kwargs: Mapping[str, Any], model_call: ModelCall) -> None:
    """The call went through without the option: this upstream is not asked again."""
    REFUSERS.add(upstream_of(kwargs, model_call))


@dataclass(frozen=True, slots=True)
class Again:
    """Makes the stream of a text completion once more, as it would be had nobody asked for its usage.

    LiteLLM sends the request of such a stream at its first read, long after its function has returned.
    """

    make: Callable[[], Any]
    upstream: str


def without_asking(stream: Any) -> Again | None:
    """How to make this stream again without the option; None where it is no generator that still has to send it."""
    frame = getattr(stream, "gi_frame", None) or getattr(stream, "ag_frame", None)
    if frame is None:
        return None
    code, given = frame.f_code, frame.f_locals
    arguments = {name: given[name] for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
    if (inner := without_asking(arguments.get("response"))) is not None:  # LiteLLM's async stream around another
        function = frame.f_globals[code.co_name]
        return Again(lambda: function(**{**arguments, "response": inner.make()}), inner.upstream)
    data: Any = arguments.get("data")
    body = data.get("extra_body") if isinstance(data, Mapping) else None
    if "self" not in arguments or not isinstance(body, Mapping) or not is_asked(body):
        return None
    options = {name: value for name, value in body["stream_options"].items() if name != "include_usage"}
    rest = {name: value for name, value in body.items() if name != "stream_options"}
    arguments["data"] = {**data, "extra_body": {**rest, "stream_options": options} if options else rest}
    method = getattr(arguments.pop("self"), code.co_name)
    return Again(lambda: method(**arguments), str(arguments.get("api_base")))


def upstream_of(kwargs: Mapping[str, Any], model_call: ModelCall) -> str:
    """Under which name it is remembered whether the option is refused."""
    base = kwargs.get("api_base") or kwargs.get("base_url")
    return str(base) if base else f"litellm:{model_call.provider}"


def _provider(kwargs: Mapping[str, Any], model_call: ModelCall) -> tuple[str, str]:
    model = kwargs.get("model")
    if not isinstance(model, str):
        return model_call.provider, model_call.model
    base = kwargs.get("api_base") or kwargs.get("base_url")
    named = kwargs.get("custom_llm_provider")
    try:
        return _resolved(model, named if isinstance(named, str) else None, base if isinstance(base, str) else None)
    except Exception:  # no such model: LiteLLM will say so in its own words
        return model_call.provider, model_call.model


@lru_cache(maxsize=256)
def _resolved(model: str, named: str | None, base: str | None) -> tuple[str, str]:
    lookup = part(LOOKUP)
    found = lookup(model=model, custom_llm_provider=named, api_base=base)
    return str(found[1]), str(found[0])


@lru_cache(maxsize=256)
def _knows_option(provider: str, model: str) -> bool:
    """Whether requests to this provider have OpenAI's shape and LiteLLM itself lets the option through to it."""
    import litellm

    compatible = getattr(litellm, "openai_compatible_providers", ())
    if provider not in _OPENAI_WIRE and provider not in compatible:
        return False
    if provider == "text-completion-openai":
        return True
    supported = part(SUPPORTED)
    if supported is None:
        return provider in _OPENAI_WIRE
    known = supported(model=model, custom_llm_provider=provider)
    return known is not None and "stream_options" in known


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
