"""Who pays, as a LiteLLM user says it in ``metadata={"vluna": {...}}``, and what other callbacks find in its place.

The ``vluna`` entry is taken out of the metadata before LiteLLM sees it: for ``responses`` and Anthropic's messages the
metadata goes to the provider, and everywhere else to whatever logs the call. What stands there later is a `Trace`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast

from ..context import ARGUMENTS, CallContext, Scope, current_context, make_context
from ..errors import ConfigurationError
from ._litellm_key import is_believed

if TYPE_CHECKING:
    from ..lifecycle import Operation

KEY: Final = "vluna"
BUCKETS: Final = ("metadata", "litellm_metadata")


class Trace(dict[str, Any]):
    """What other callbacks find as ``metadata["vluna"]``: the operation's id, and what it cost once that is known.

    A plain dict to whoever reads, copies or serialises it; LiteLLM copies metadata deeply between attempts, and the
    ``owner`` (the attempt that it belongs to) goes along as it is.
    """

    def __init__(self, owner: object = None) -> None:
        super().__init__()
        self.owner = owner
        self.operation: Operation | None = None

    def __copy__(self) -> Trace:
        return self

    def __deepcopy__(self, memo: object) -> Trace:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def follow(self, operation: Operation) -> None:
        """Name the operation that the call runs under."""
        self.operation = operation
        self["operation_id"] = operation.operation_id
        self["feature_code"] = operation.feature_code
        self["principal_id"] = operation.customer[0]


def take_identity(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], CallContext | None, Trace | None]:
    """The arguments without the ``vluna`` metadata, what that says, and the trace with which a call was handed on.

    Metadata that is given is copied, so that nothing which is added to it later reaches the caller's own dict.
    In a proxy the entry is a client's word, and says nothing; a trace is ours, which no client can write.
    LiteLLM's ``user`` becomes the label ``end_user`` where nobody else was named and it can be stored.

    Raises:
        ConfigurationError: the entry is not a mapping, has a key that nobody knows, or a value that cannot be used.
    """
    changed = dict(kwargs)
    said: dict[str, Any] = {}
    trace: Trace | None = None
    for bucket in BUCKETS:
        metadata = changed.get(bucket)
        if not isinstance(metadata, Mapping):
            continue
        rest = {key: value for key, value in metadata.items() if key != KEY}
        entry = metadata.get(KEY)
        # Metadata that was made for us alone leaves as if it had never been there.
        changed[bucket] = rest if rest or KEY not in metadata else None
        if isinstance(entry, Trace):
            trace = entry
        elif entry is not None and is_believed():
            said.update(_fields(entry))
    return changed, _context(said, changed.get("user")), trace


def strip(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without the ``vluna`` metadata, whatever it says."""
    changed = dict(kwargs)
    for bucket in BUCKETS:
        metadata = changed.get(bucket)
        if isinstance(metadata, Mapping) and KEY in metadata:
            changed[bucket] = {key: value for key, value in metadata.items() if key != KEY} or None
    return changed


def _fields(entry: object) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ConfigurationError(
            f'metadata["vluna"] is a {type(entry).__name__}; pass a dict such as {{"principal_id": "customer_123"}}.'
        )
    for key in entry:
        if key not in ARGUMENTS:
            raise ConfigurationError(f'metadata["vluna"] has the key {key!r}; it takes {", ".join(ARGUMENTS)}.')
    labels = entry.get("labels")
    if labels is not None and not isinstance(labels, Mapping):
        raise ConfigurationError(f'metadata["vluna"]["labels"] is a {type(labels).__name__}; pass a dict of text.')
    return {key: value for key, value in entry.items() if value is not None}


def _context(said: dict[str, Any], user: object) -> CallContext | None:
    context = None
    if said:
        try:
            context = make_context(**said)
        except ConfigurationError as error:
            raise ConfigurationError(f'metadata["vluna"]: {error}') from None
        if context.idempotency_key is not None:
            context = replace(context, job=Scope())
    if isinstance(user, str) and "end_user" not in said and current_context().end_user is None:
        try:
            named = make_context(end_user=user)
        except ConfigurationError:
            return context  # it is the provider's argument, not ours: what cannot be stored is no reason to refuse
        context = named if context is None else replace(context, end_user=user)
    return context


def trace_in(kwargs: Mapping[str, Any]) -> Trace | None:
    """The trace in what LiteLLM hands to its logging callbacks."""
    params = kwargs.get("litellm_params")
    for home in (params, kwargs):
        if isinstance(home, Mapping):
            for bucket in BUCKETS:
                metadata = home.get(bucket)
                if isinstance(metadata, Mapping) and isinstance(metadata.get(KEY), Trace):
                    return cast(Trace, metadata[KEY])
    return None


def leave_trace(kwargs: dict[str, Any], trace: Trace) -> None:
    """Put the trace where LiteLLM's logging callbacks read: ``kwargs["litellm_params"]["metadata"]["vluna"]``.

    ``kwargs`` is what ``log_pre_api_call`` is given. Where the very dict that stands there also goes to the provider, a
    copy takes its place.
    """
    params = kwargs.get("litellm_params")
    if not isinstance(params, dict):
        return
    metadata: Any = params.get("metadata")
    sent: Any = (kwargs.get("additional_args") or {}).get("complete_input_dict")
    outgoing: Any = sent.get("metadata") if isinstance(sent, Mapping) else None
    if not isinstance(metadata, dict):
        if metadata is None:
            params["metadata"] = {KEY: trace}
    elif metadata is outgoing:
        params["metadata"] = {**metadata, KEY: trace}
    else:
        metadata[KEY] = trace
