"""LiteLLM's entry functions, wrapped: the gate is asked before the provider is, and every answer is settled.

No hook of LiteLLM can refuse a synchronous call, and none fires for a stream that is left; so the functions themselves
are wrapped, in LiteLLM's modules and wherever they were imported before. The wrappers look like what they wrap (name,
signature, coroutine function or not, pickling), and take up `install`ed metering when they are called.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, cast

import litellm

from ..context import CallContext, current_context
from ..errors import ConfigurationError, VlunaError
from ..scoped import scoped
from ..tap import INLINE_SECONDS
from ._litellm_attempt import Attempt, current_attempt, is_own_call, open_attempt
from ._litellm_background import RETRIEVES, book_retrieved
from ._litellm_call import LogicalCall, call_for, give_back_unasked, refusal
from ._litellm_functions import BATCHES, HOMES, METERED, MOCKS, RETRYING, UNMETERED, UNMETERED_HOMES
from ._litellm_key import enter_key, in_proxy, is_unasked
from ._litellm_metadata import KEY, Trace, take_identity
from ._litellm_models import other_model
from ._litellm_names import found, replace_everywhere
from ._litellm_parts import BUILDER, TOO_LONG, part

if TYPE_CHECKING:
    from ..vluna import Vluna


class _Installed:
    """What the wrappers work for; shared by all of them."""

    __slots__ = ("twins", "vluna")

    def __init__(self) -> None:
        self.vluna: Vluna | None = None
        self.twins: dict[Callable[..., Any], Callable[..., Any]] = {}


_installed: Final = _Installed()
_guard = threading.Lock()
_announced: ContextVar[bool] = ContextVar("vluna_llm_litellm_announced", default=False)


def install(vluna: Vluna) -> list[str]:
    """Wrap LiteLLM's entry functions, once however often this is called; the latest ``vluna`` meters them all.

    Returns those that this version of LiteLLM does not have, of the ones that would be metered.
    """
    with _guard:
        _installed.vluna = vluna
        twins: dict[Callable[..., Any], Callable[..., Any]] = {}
        for homes, names, wrap in (
            (HOMES, tuple(METERED), _metered),
            (UNMETERED_HOMES, UNMETERED, _unmetered),
            (HOMES, BATCHES, _batch),
            (HOMES, RETRIEVES, _retrieve),
        ):
            for name in names:
                for function in found(homes, name):
                    if not hasattr(function, "_vluna_original") and function not in twins:
                        twins[function] = wrap(function, name)
        # What was wrapped before is put in the place of names that were bound to the original meanwhile, too.
        replace_everywhere({**_installed.twins, **twins})
        _installed.twins.update(twins)
        return [f"litellm.{name}" for name in METERED if not found(HOMES, name)]


def uninstall() -> None:
    """Put LiteLLM's own functions back, wherever a wrapper stands; a wrapper held elsewhere does nothing any more."""
    with _guard:
        replace_everywhere({twin: original for original, twin in _installed.twins.items()})
        _installed.twins.clear()
        _installed.vluna = None


def installed() -> Vluna | None:
    """The metering that LiteLLM's functions work for; None where they are not wrapped."""
    return _installed.vluna


def _metering() -> Vluna | None:
    vluna = _installed.vluna
    return None if vluna is None or vluna.mode == "off" else vluna


def open_call(kwargs: Mapping[str, Any]) -> LogicalCall | None:
    """The logical call of an outer entry, such as a Router's method; None where nothing is metered.

    Raises:
        ConfigurationError: what ``metadata["vluna"]`` says is unusable.
    """
    vluna = _metering()
    if vluna is None:
        return None
    try:
        _, bound, _ = take_identity(kwargs)
    except VlunaError as error:
        if vluna.mode == "enforce":
            raise refusal(error) from None
        vluna.internal_error("litellm.identity")
        bound = None
    return LogicalCall(vluna, bound)


# -- metered -----------------------------------------------------------------------------------------------------------


def _metered(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    kind = METERED[name]
    wrapper = _async_entry(original, kind) if inspect.iscoroutinefunction(original) else _sync_entry(original, kind)
    wrapper._vluna_original = original  # type: ignore[attr-defined]
    return wrapper


def _sync_entry(original: Callable[..., Any], kind: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def entry(*args: Any, **kwargs: Any) -> Any:
        attempt = _begin(original, kind, args, kwargs)
        if attempt is None:
            return original(*args, **kwargs)
        attempt.admit()
        while True:
            try:
                with attempt.running():
                    result = original(*attempt.args, **attempt.kwargs)
                    if inspect.iscoroutine(result):
                        return _later(attempt, result)
                    break
            except BaseException as error:
                if not attempt.again(error):
                    _raise(attempt, error)
            attempt.admit()
        if attempt.owes_anew(result):
            attempt.readmit()
        answer = attempt.answered(result, is_async=False)
        if (operation := attempt.waits) is not None:
            operation.wait(INLINE_SECONDS)
        return _whole(answer, attempt.kwargs) if attempt.complete else answer

    return entry


def _async_entry(original: Callable[..., Any], kind: str) -> Callable[..., Any]:
    @functools.wraps(original)
    async def entry(*args: Any, **kwargs: Any) -> Any:
        if is_unasked():
            await enter_key()
        attempt = _begin(original, kind, args, kwargs)
        if attempt is None:
            return await original(*args, **kwargs)
        await attempt.aadmit()
        while True:
            try:
                with attempt.running():
                    result = await original(*attempt.args, **attempt.kwargs)
                    break
            except BaseException as error:
                if not attempt.again(error):
                    _raise(attempt, error)
            await attempt.aadmit()
        return await _answered(attempt, result)

    return entry


async def _later(attempt: Attempt, pending: Any) -> Any:
    """A sync function of LiteLLM gave a coroutine (``is_async=True``): the answer comes when it is awaited."""
    try:
        with attempt.running():
            result = await pending
    except BaseException as error:
        _raise(attempt, error)
    return await _answered(attempt, result)


async def _answered(attempt: Attempt, result: Any) -> Any:
    if attempt.owes_anew(result):
        await attempt.areadmit()
    answer = attempt.answered(result, is_async=True)
    if (operation := attempt.waits) is not None:
        await operation.wait_async(INLINE_SECONDS)
    return answer


def _raise(attempt: Attempt, error: BaseException) -> None:
    told = attempt.failed(error)
    if told is error:
        raise
    raise told from error


def _begin(original: Callable[..., Any], kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attempt | None:
    """The attempt that this call of an entry function is; None where LiteLLM's own function is called as it is.

    Raises:
        ConfigurationError: what ``metadata["vluna"]`` says is unusable.
    """
    vluna = _metering()
    if vluna is None:
        return None
    name = str(getattr(original, "__name__", ""))
    around = current_attempt()
    if _is_mocked(name, kind, kwargs):
        if around is None:
            give_back_unasked(call_for(kwargs))
        return None
    if around is not None and (is_own_call(kwargs) or around.hands_to(original) or name in RETRYING):
        return None
    attempt = open_attempt(vluna, original, kind, args, kwargs)
    if attempt is not None:
        attempt.behind = getattr(original, "__wrapped__", None)
        _sell_what_is_asked(vluna, attempt)
        try:
            _prepare(attempt, is_async=inspect.iscoroutinefunction(original))
        except Exception:
            vluna.internal_error("litellm.prepare")
    return attempt


def _is_mocked(name: str, kind: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether LiteLLM makes the answer up. The other functions take no notice of these arguments and ask the provider:
    a proxy's client, who writes them into the body, would have its answers for nothing."""
    if kind in ("responses", "anthropic.messages"):
        return isinstance(said := kwargs.get("mock_response"), str) and bool(said)
    if kind == "images" and not name.endswith("image_generation"):
        return False
    return any(kwargs.get(name) for name in MOCKS.get(kind, ()))


def _sell_what_is_asked(vluna: Vluna, attempt: Attempt) -> None:
    """See to it that the provider is asked for the model of which the feature is made.

    Raises:
        ConfigurationError: ``extra_body`` names another one. Where a proxy's client wrote that, it is taken out.
    """
    named = other_model(attempt.kwargs, attempt.model_call)
    if named is None:
        return
    text = (
        f"extra_body names the model {named!r} and the call {attempt.model_call.model!r}: write it as model=..., so "
        "that the one that answers is the one that is billed."
    )
    if in_proxy():
        body = attempt.kwargs["extra_body"]
        attempt.kwargs["extra_body"] = {key: said for key, said in body.items() if key != "model"}
    elif vluna.mode == "enforce":
        raise refusal(ConfigurationError(text))
    else:
        vluna.telemetry.emit("vluna.endpoint.unmetered", "error", {"error.type": "ConfigurationError"}, message=text)


def _prepare(attempt: Attempt, *, is_async: bool) -> None:
    """Change the arguments where the work could not be followed otherwise."""
    kwargs = attempt.kwargs
    if attempt.kind == "chat.completions":
        whole = kwargs.get("stream") is True and kwargs.get("complete_response") is True and not is_async
        if whole and not is_own_call(kwargs) and part(BUILDER) is not None:
            del kwargs["complete_response"]
            attempt.complete = True
        if not (kwargs.get("num_retries") or getattr(litellm, "num_retries", None)):
            dictionary = kwargs.get("context_window_fallback_dict")
            if isinstance(dictionary, Mapping) and dictionary and not _by_router(kwargs) and part(TOO_LONG) is not None:
                attempt.fallbacks = kwargs.pop("context_window_fallback_dict")
        if kwargs.get("fallbacks") or getattr(litellm, "model_fallbacks", None):
            _hand_on(kwargs, attempt.trace)
    if attempt.model_call.stream:
        attempt.ask_usage()


def _by_router(kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(kwargs.get(name), Mapping) and "model_group" in kwargs[name] for name in ("metadata",))


def _hand_on(kwargs: dict[str, Any], trace: Trace) -> None:
    metadata = kwargs.get("metadata")
    kwargs["metadata"] = {**(metadata if isinstance(metadata, Mapping) else {}), KEY: trace}


def _whole(stream: Any, kwargs: Mapping[str, Any]) -> Any:
    """``complete_response=True``: the stream, read and put together as LiteLLM does it."""
    return part(BUILDER)(list(stream), messages=kwargs.get("messages"))


# -- many at once, and what is not metered -----------------------------------------------------------------------------


def _batch(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def batch(*args: Any, **kwargs: Any) -> Any:
        vluna = _metering()
        if vluna is None:
            return original(*args, **kwargs)
        try:
            given, bound, trace = take_identity(kwargs)
        except VlunaError as error:
            if vluna.mode == "enforce":
                raise refusal(error) from None
            return original(*args, **kwargs)
        if trace is None:
            context = current_context() if bound is None else current_context().override(bound)
            _hand_on(given, Trace(context))
        return original(*args, **given)

    batch._vluna_original = original  # type: ignore[attr-defined]
    return batch


def _retrieve(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    wrapper: Any
    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def aretrieve(*args: Any, **kwargs: Any) -> Any:
            if is_unasked():
                await enter_key()
            vluna, given, bound = _retrieved_for(kwargs)
            response = await original(*args, **given)
            if vluna is not None:
                book_retrieved(vluna, response, bound)
            return response

        wrapper = aretrieve
    else:

        @functools.wraps(original)
        def retrieve(*args: Any, **kwargs: Any) -> Any:
            vluna, given, bound = _retrieved_for(kwargs)
            response = original(*args, **given)
            if vluna is not None:
                book_retrieved(vluna, response, bound)
            return response

        wrapper = retrieve
    wrapper._vluna_original = original
    return cast(Callable[..., Any], wrapper)


def _retrieved_for(kwargs: dict[str, Any]) -> tuple[Vluna | None, dict[str, Any], CallContext | None]:
    vluna = _metering()
    if vluna is None:
        return None, kwargs, None
    try:
        given, bound, _ = take_identity(kwargs)
        return vluna, given, bound
    except VlunaError as error:
        if vluna.mode == "enforce":
            raise refusal(error) from None
        vluna.internal_error("litellm.retrieve")
        return None, kwargs, None


def _unmetered(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    wrapper: Any
    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def aentry(*args: Any, **kwargs: Any) -> Any:
            if is_unasked():
                await enter_key()
            given = _announce(name, kwargs)
            with scoped(_announced, True):
                return await original(*args, **given)

        wrapper = aentry
    else:

        @functools.wraps(original)
        def entry(*args: Any, **kwargs: Any) -> Any:
            given = _announce(name, kwargs)
            with scoped(_announced, True):
                return original(*args, **given)

        wrapper = entry
    wrapper._vluna_original = original
    return cast(Callable[..., Any], wrapper)


def _announce(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Say that this costs money and is not metered, once for each call however LiteLLM hands it on.

    Raises:
        ConfigurationError: ``on_unmetered="deny"``, or ``metadata["vluna"]`` is unusable.
    """
    vluna = _metering()
    if vluna is None:
        return kwargs
    try:
        given, bound, _ = take_identity(kwargs)
        if not _announced.get():
            vluna.unmetered(f"litellm.{name}", bound)
        return given
    except VlunaError as error:
        if vluna.mode == "enforce":
            raise refusal(error) from None
        vluna.internal_error("litellm.unmetered")
    except Exception:
        vluna.internal_error("litellm.unmetered")
    return kwargs


def _forked() -> None:
    global _guard
    _guard = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
