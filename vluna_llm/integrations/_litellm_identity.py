"""Who pays for a request of the LiteLLM proxy: what the proxy itself knows of the caller, by the operator's mapping.

The proxy authenticates a key and then knows its team, its user, its organisation and the metadata that the operator
gave them. The body and the headers of the request are the client's own words: from those at most the label
``end_user`` is taken, unless the operator says that the clients are trusted. LiteLLM's ``end_user_id`` is such a word
of the client, too (it is read from ``user``, from ``metadata.user_id`` and from headers), so it can pay for nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from inspect import isawaitable
from types import MappingProxyType
from typing import Any, TypeAlias

from ..context import CallContext, make_context
from ..errors import ConfigurationError

IDENTITY_VARIABLE = "VLUNA_LLM_LITELLM_IDENTITY"
TRUST_VARIABLE = "VLUNA_LLM_LITELLM_TRUST_CLIENT_IDENTITY"

DEFAULT_PAYERS = ("metadata.vluna", "team_metadata.vluna", "team_id", "user_id")
"""Where the customer is looked for, unless told otherwise: an entry ``vluna`` of the key's metadata, then of the
team's, then the team, then the user."""

NOBODY = frozenset(
    {"default_user_id", "litellm-dashboard", "litellm-internal-health-check", "litellm-cli", "litellm_internal_jobs"}
)
"""Names that LiteLLM gives to itself: the holder of the master key, its dashboard, its own jobs. No customers."""

_WORDS_OF_THE_CLIENT = frozenset({"end_user_id"})
_ENTRY = ("principal_id", "user_id", "feature_code", "feature_family_code", "budget_id", "end_user", "labels")
_CLIENTS_METADATA = ("metadata", "litellm_metadata", "extra_body", "requester_metadata")
_DEPTH = 4

Answer: TypeAlias = "str | Mapping[str, Any] | None"
IdentityFunction: TypeAlias = "Callable[[Any], Answer | Awaitable[Answer]]"
"""Gets LiteLLM's ``UserAPIKeyAuth``; gives the principal, or a mapping with ``principal_id`` and what else
`vluna_llm.call_context` takes, or None for nobody. May be a coroutine function."""
IdentityOption: TypeAlias = "Identity | IdentityFunction | str | Mapping[str, Any] | Iterable[str] | None"


@dataclass(frozen=True, slots=True)
class Identity:
    """How the caller of the proxy becomes a customer of the gate.

    Attributes:
        principal_id: fields of ``UserAPIKeyAuth``, with dots into metadata, tried in this order. A field that holds a
            mapping is read as ``{"principal_id": ..., "user_id": ..., "budget_id": ..., "labels": {...}, ...}``.
        user_id: fields for the purse within the customer; none by default: one purse for each customer.
        labels: name of a label to the field that it is taken from.
        function: asked in place of the fields.
        trust_client: take ``metadata.vluna`` of the request body over all of this, and let ``end_user_id`` pay.
    """

    principal_id: tuple[str, ...] = DEFAULT_PAYERS
    user_id: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    function: IdentityFunction | None = None
    trust_client: bool = False

    def __post_init__(self) -> None:
        if self.trust_client:
            return
        for path in (*self.principal_id, *self.user_id):
            if path.partition(".")[0] in _WORDS_OF_THE_CLIENT:
                raise ConfigurationError(
                    f"{IDENTITY_VARIABLE} names {path}, which LiteLLM takes from what the client writes: anybody could "
                    f"be billed. Name a field of the key or the team, or set {TRUST_VARIABLE}=true where every client "
                    "of the proxy is a program of your own."
                )

    def _believed(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """Those that are not the client's own words."""
        if self.trust_client or not _user_is_claimed():
            return paths
        return tuple(path for path in paths if path != "user_id")

    async def of(self, auth: Any, data: Mapping[str, Any]) -> CallContext:
        """Who pays for this request; a context without principal where it is nobody.

        Args:
            auth: LiteLLM's ``UserAPIKeyAuth`` of the request.
            data: the request, as the client wrote it.

        Raises:
            ConfigurationError: the key or its team name a customer that could never be billed.
        """
        found: dict[str, Any] = {}
        if self.trust_client:
            _merge(found, _entry(_client_entry(data), "the request's metadata.vluna"))
        if found.get("principal_id") is None:
            if self.function is not None:
                _merge(found, _entry(await _asked(self.function, auth), "the identity function"))
            else:
                for path in self._believed(self.principal_id):
                    _merge(found, _entry(_look(auth, path), path))
                    if found.get("principal_id") is not None:
                        break
        if found.get("user_id") is None:
            found["user_id"] = next(
                filter(None, (_text(_look(auth, path)) for path in self._believed(self.user_id))), None
            )
        labels = {name: text for name, path in self.labels.items() if (text := _text(_look(auth, path)))}
        labels.update(found.pop("labels", None) or {})
        end_user = found.pop("end_user", None) or _end_user(auth, data)
        context = make_context(**found, labels=labels or None)
        return _with_end_user(context, end_user)


def _user_is_claimed() -> bool:
    """Whether LiteLLM takes the key's user from a header of the client: its setting ``user_header_mappings``."""
    settings = getattr(sys.modules.get("litellm.proxy.proxy_server"), "general_settings", None)
    found = settings.get("user_header_mappings") if isinstance(settings, Mapping) else None
    mappings = [found] if isinstance(found, Mapping) else found if isinstance(found, (list, tuple)) else []
    return any("internal_user" in str(mapping) for mapping in mappings)


def make_identity(option: IdentityOption = None, *, trust_client: bool | None = None) -> Identity:
    """The mapping that was asked for; from the environment where nothing is given.

    Args:
        option: an `Identity`, a function, fields (``"team_id, user_id"`` or a list of them), a mapping or its JSON
            (``{"principal_id": "team_id", "user_id": "user_id", "labels": {"key": "key_alias"}}``).
        trust_client: whether what the clients write may name the customer.

    Raises:
        ConfigurationError: it cannot be understood, or lets the client choose who pays.
    """
    if trust_client is None:
        trust_client = _flag(os.environ.get(TRUST_VARIABLE, ""))
    if option is None:
        option = os.environ.get(IDENTITY_VARIABLE, "").strip() or None
    if isinstance(option, Identity):
        return replace(option, trust_client=trust_client or option.trust_client)
    if option is None:
        return Identity(trust_client=trust_client)
    if isinstance(option, str) and option.lstrip().startswith("{"):
        try:
            option = json.loads(option)
        except ValueError as error:
            raise ConfigurationError(f"{IDENTITY_VARIABLE} is not valid JSON: {error}.") from None
    if callable(option):
        return Identity(function=option, trust_client=trust_client)
    if isinstance(option, Mapping):
        known = {"principal_id", "user_id", "labels"}
        if unknown := sorted(set(map(str, option)) - known):
            raise ConfigurationError(
                f"{IDENTITY_VARIABLE} has {', '.join(unknown)}; it may have {', '.join(sorted(known))}."
            )
        labels = option.get("labels") or {}
        if not isinstance(labels, Mapping) or not all(isinstance(path, str) for path in labels.values()):
            raise ConfigurationError(f"{IDENTITY_VARIABLE}: labels must map names to fields.")
        return Identity(
            principal_id=_paths(option["principal_id"]) if "principal_id" in option else DEFAULT_PAYERS,
            user_id=_paths(option.get("user_id") or ()),
            labels=MappingProxyType({str(name): path for name, path in labels.items()}),
            trust_client=trust_client,
        )
    return Identity(principal_id=_paths(option), trust_client=trust_client)


def strip_client_identity(data: dict[str, Any]) -> None:
    """Take out what a client wrote under the name ``vluna``: in its metadata, also as JSON text, and in headers that
    would be passed on. What the proxy knows of the key (``user_api_key_...``) is left alone: it is shared."""
    for name in _CLIENTS_METADATA:
        if name in data:
            data[name] = _stripped(data[name], _DEPTH)
    for holder in (data, data.get("metadata"), data.get("litellm_metadata")):
        headers = holder.get("headers") if isinstance(holder, dict) else None
        if isinstance(headers, dict):
            for name in [name for name in headers if str(name).lower().startswith("x-vluna-")]:
                del headers[name]


async def _asked(function: IdentityFunction, auth: Any) -> Any:
    try:
        answer = function(auth)
        return await answer if isawaitable(answer) else answer
    except Exception as error:
        raise ConfigurationError(f"The identity function failed: {type(error).__name__}: {error}") from error


def _stripped(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        if "vluna" not in value and "\\u" not in value:
            return value
        try:
            parsed = json.loads(value)
        except ValueError:
            return value
        return json.dumps(_stripped(parsed, depth)) if isinstance(parsed, dict) else value
    if isinstance(value, dict):
        value.pop("vluna", None)
        if depth:
            for name in _CLIENTS_METADATA:
                if name in value:
                    value[name] = _stripped(value[name], depth - 1)
    return value


def _client_entry(data: Mapping[str, Any]) -> Any:
    for name in ("litellm_metadata", "metadata"):
        value = data.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                continue
        if isinstance(value, Mapping) and value.get("vluna") is not None:
            return value["vluna"]
    return None


def _entry(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        if unknown := sorted(str(name) for name in value if name not in _ENTRY):
            raise ConfigurationError(f"{where} has {', '.join(unknown)}; it may have {', '.join(_ENTRY)}.")
        labels = value.get("labels")
        if labels is not None and not isinstance(labels, Mapping):
            raise ConfigurationError(f"{where}: labels must be a mapping.")
        entry = {name: value[name] for name in _ENTRY if value.get(name) is not None}
        if isinstance(entry.get("principal_id"), int):
            entry["principal_id"] = str(entry["principal_id"])
        return entry
    text = _text(value)
    return {} if text is None or text in NOBODY else {"principal_id": text}


def _merge(found: dict[str, Any], more: Mapping[str, Any]) -> None:
    labels = {**(more.get("labels") or {}), **(found.get("labels") or {})}
    for name, value in more.items():
        found.setdefault(name, value)
    if labels:
        found["labels"] = labels


def _look(auth: Any, path: str) -> Any:
    value = auth
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        if value is None:
            return None
    return value


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _end_user(auth: Any, data: Mapping[str, Any]) -> str | None:
    return _text(getattr(auth, "end_user_id", None)) or _text(data.get("user"))


def _with_end_user(context: CallContext, end_user: Any) -> CallContext:
    try:
        return context if end_user is None else replace(context, end_user=make_context(end_user=end_user).end_user)
    except ConfigurationError:
        return context  # only a label, and the client's own words: never a reason to refuse the call


def _paths(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    try:
        paths = tuple(item.strip() for item in items)
    except (TypeError, AttributeError):
        paths = ()
    if not all(paths) or (not paths and value):
        raise ConfigurationError(
            f"{IDENTITY_VARIABLE} must name fields of LiteLLM's UserAPIKeyAuth, e.g. 'metadata.customer, team_id'."
        )
    return paths


def _flag(text: str) -> bool:
    if text.strip().lower() in ("", "0", "false", "no", "off"):
        return False
    if text.strip().lower() in ("1", "true", "yes", "on"):
        return True
    raise ConfigurationError(f"{TRUST_VARIABLE}: use true or false.")
