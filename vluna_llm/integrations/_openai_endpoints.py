"""Which requests of an OpenAI-compatible client cost money, which are metered, and what is asked for. No SDK is needed.

Only requests that create are billable (design rule 4); what costs money and is not metered is named, never passed over
in silence (design rule 18).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Role = Literal["metered", "unmetered", "retrieve", "free"]

_METERED: Final = re.compile(
    r"(?:\A|/)(?:(chat/completions)|(responses)(?:/compact)?|(completions)|(embeddings)|(images)/(?:generations|edits|"
    r"variations)|(audio)/(?:transcriptions|translations)|(decisions))\Z"
)
_RETRIEVE: Final = re.compile(r"(?:\A|/)responses/([^/]+)\Z")
_CANCEL: Final = re.compile(r"(?:\A|/)responses/([^/]+)/cancel\Z")
_UNMETERED: Final = re.compile(
    r"(?:\A|/)(?:(audio/speech)|(batches)|(realtime)(?:/.+)?|(live)/sessions(?:/[^/]+/fork)?|"
    r"threads/(?:[^/]+/)?(runs)(?:/[^/]+/submit_tool_outputs)?|(videos)(?:/(?:edits|extensions|[^/]+/remix))?|"
    r"(fine_tuning)/(?:jobs|alpha/graders/run)|(vector_stores)|(containers)|(evals)/[^/]+/runs|(chatkit)/sessions|"
    r"(agents)/(?:sessions(?:/[^/]+/events)?|environments|automations/[^/]+/invocations))\Z"
)
_FREE: Final = re.compile(
    r"(?:\A|/)(?:moderations|responses/input_tokens|assistants(?:/[^/]+)?|chat/completions/[^/]+|evals(?:/[^/]+)?|"
    r"fine_tuning/.+|threads(?:/.+)?|files|uploads(?:/.+)?|models(?:/.+)?|vector_stores/.+|conversations(?:/.+)?|"
    r"organization/.+|projects/.+|agents(?:/.+)?|realtime/calls/[^/]+/(?:hangup|reject)|"
    r"live/sessions/[^/]+/(?:hangup|reject))\Z"
)

_HOSTS: Final = (
    (re.compile(r"\.openai\.azure\.com\Z|\.services\.ai\.azure\.com\Z|\.cognitiveservices\.azure\.com\Z"), "azure"),
    (re.compile(r"\Abedrock.*\.amazonaws\.com\Z"), "bedrock"),
    (re.compile(r"(?:\A|\.)openrouter\.ai\Z"), "openrouter"),
    (re.compile(r"(?:\A|\.)groq\.com\Z"), "groq"),
    (re.compile(r"(?:\A|\.)mistral\.ai\Z"), "mistral"),
    (re.compile(r"(?:\A|\.)deepseek\.com\Z"), "deepseek"),
    (re.compile(r"(?:\A|\.)x\.ai\Z"), "xai"),
    (re.compile(r"(?:\A|\.)together\.(?:xyz|ai)\Z"), "together"),
    (re.compile(r"(?:\A|\.)fireworks\.ai\Z"), "fireworks"),
    (re.compile(r"(?:\A|\.)perplexity\.ai\Z"), "perplexity"),
    (re.compile(r"(?:\A|\.)cerebras\.ai\Z"), "cerebras"),
    (re.compile(r"(?:\A|\.)anthropic\.com\Z"), "anthropic"),
    (re.compile(r"(?:\A|\.)googleapis\.com\Z"), "google"),
    (re.compile(r"(?:\A|\.)cohere\.(?:ai|com)\Z"), "cohere"),
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a request is: its ``role``, and its ``kind`` (an API, or the name of what is not metered)."""

    role: Role
    kind: str


FREE: Final = Endpoint("free", "")


def path_of(url: str) -> str:
    """The path of a relative or absolute URL, without query, fragment and trailing slash."""
    path = url.partition("?")[0].partition("#")[0]
    if "://" in path:
        path = "/" + path.partition("://")[2].partition("/")[2]
    return path.rstrip("/")


def classify(method: str, url: str, body: Mapping[str, Any] | None = None) -> Endpoint:
    """What this request is, by method and the end of its path (base URLs have paths of their own).

    A POST to a path that nobody knows and that names a model is taken for a model call that cannot be metered.
    """
    path = path_of(url)
    verb = method.upper()
    if verb == "GET":
        return Endpoint("retrieve", "responses") if _RETRIEVE.search(path) else FREE
    if verb != "POST":
        return FREE
    if match := _METERED.search(path):
        kind = next(group for group in match.groups() if group)
        return Endpoint("metered", kind.replace("/", "."))
    if _CANCEL.search(path):
        return Endpoint("retrieve", "responses")
    if match := _UNMETERED.search(path):
        if _FREE.search(path) and match.group(3):  # hanging up a realtime call
            return FREE
        return Endpoint("unmetered", next(group for group in match.groups() if group).replace("/", "."))
    if _FREE.search(path) or body is None or not body.get("model"):
        return FREE
    return Endpoint("unmetered", path.rpartition("/")[2])


def response_id_of(url: str) -> str | None:
    """The id in the path of a retrieve (or cancel) of a response."""
    path = path_of(url)
    match = _RETRIEVE.search(path) or _CANCEL.search(path)
    return match.group(1) if match else None


def provider_of(host: str, flavour: str = "", default: str = "openai") -> str:
    """The first part of the feature code: the client's flavour, else a host that is known, else ``default``."""
    if flavour:
        return flavour
    for pattern, name in _HOSTS:
        if pattern.search(host):
            return name
    return default


def body_of(json_data: object, extra_json: object, content: object = None) -> dict[str, Any] | None:
    """The request body as it will be sent: ``extra_body`` wins over the arguments; None where it is not an object."""
    body: dict[str, Any] = {}
    if isinstance(json_data, Mapping):
        body.update(json_data)
    elif isinstance(raw := content if json_data is None else json_data, (bytes, bytearray, str)):
        try:
            parsed = json.loads(raw)
        except ValueError:
            return None
        if not isinstance(parsed, dict):
            return None
        body.update(parsed)
    elif json_data is not None:
        return None
    if isinstance(extra_json, Mapping):
        body.update(extra_json)
    return body
