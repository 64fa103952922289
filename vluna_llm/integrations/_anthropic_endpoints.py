"""Which requests of an Anthropic client cost money, which are metered, and what is asked for. No SDK is needed.

The paths are those that the SDK 0.125 to 2.14 posts to; a path may carry a query (``?beta=true``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from ._openai_endpoints import FREE, Endpoint, body_of, path_of, provider_of

_METERED: Final = re.compile(r"(?:\A|/)(?:(messages)|(complete))\Z")
_UNMETERED: Final = re.compile(
    r"(?:\A|/)(?:(messages/batches)|(sessions)(?:/[^/]+/events)?|(deployments)/[^/]+/run|(dreams))\Z"
)
_FREE: Final = re.compile(
    r"(?:\A|/)(?:messages/count_tokens|messages/batches/.+|agents(?:/.+)?|compliance/.+|deployments(?:/.+)?|dreams/.+|"
    r"environments(?:/.+)?|files|memory_stores(?:/.+)?|models(?:/.+)?|organizations/.+|sessions/.+|skills(?:/.+)?|"
    r"tunnels(?:/.+)?|user_profiles(?:/.+)?|vaults(?:/.+)?)\Z"
)
_KINDS: Final = {"messages": "messages", "complete": "completions"}

_PLATFORMS: Final = {
    "AnthropicAWS": "bedrock",
    "AsyncAnthropicAWS": "bedrock",
    "BaseBedrockClient": "bedrock",
    "BaseMantleClient": "bedrock",
    "BaseVertexClient": "vertex_ai",
    "BaseGoogleCloudClient": "vertex_ai",
    "BaseFoundryClient": "azure",
}
"""The SDK's classes for other clouds (they need not be installed whole), and the first part of the feature code."""

_NOT_SENT: Final = frozenset({"Omit", "NotGiven"})


def classify(method: str, url: str, body: Mapping[str, Any] | None = None) -> Endpoint:
    """What this request is, by method and the end of its path (base URLs have paths of their own).

    A POST to a path that nobody knows and that names a model is taken for a model call that cannot be metered.
    """
    if method.upper() != "POST":
        return FREE
    path = path_of(url)
    if match := _METERED.search(path):
        return Endpoint("metered", _KINDS[match.group(1) or match.group(2)])
    if match := _UNMETERED.search(path):
        return Endpoint("unmetered", next(group for group in match.groups() if group).replace("/", "."))
    if _FREE.search(path) or body is None or not body.get("model"):
        return FREE
    return Endpoint("unmetered", path.rpartition("/")[2])


def platform_of(client: object, host: str) -> str:
    """The first part of the feature code: the cloud that the client's class is for, else a host that is known."""
    for kind in type(client).__mro__:
        if kind.__name__ in _PLATFORMS and kind.__module__.partition(".")[0] == "anthropic":
            return _PLATFORMS[kind.__name__]
    return provider_of(host, default="anthropic")


def request_body(options: Any) -> dict[str, Any] | None:
    """The request body as it will be sent, in plain data; None where it is not an object.

    The SDK takes its own models inside a request (an answer's content blocks, handed back) and iterators. The former
    are read as what they will be sent as; of the latter nothing is read, since they can be read only once.
    """
    body = body_of(options.json_data, options.extra_json, getattr(options, "content", None))
    if body is None:
        return None
    return {name: _plain(value) for name, value in body.items() if type(value).__name__ not in _NOT_SENT}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    dump = getattr(value, "model_dump", None)
    return dump(mode="json", exclude_unset=True, warnings=False) if callable(dump) else value
