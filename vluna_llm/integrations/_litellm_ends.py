"""LiteLLM's own end of a stream, which may come before the provider's.

`CustomStreamWrapper` stops at the first chunk after the finish reason in some of its branches, raises errors of its own
over a stream that is whole (a rule, a time limit, a repetition), and leaves the response unread and open. Also where it
reads to the provider's end it may leave the connection to the garbage collector; here it is given back. In its
``aclose`` it reaches the response only where its iterator can be closed (1.83: not for Anthropic and most others). So
the object is given a subclass of its own class that tells these ends; nothing else of it changes.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any, Final

from .._tap_watch import Watch
from ..tap import arelease, release
from ._litellm_call import told_for
from ._litellm_parts import STREAM, part

_END: Final = "_vluna_end"


def tell_end(stream: Any, watch: Watch, source: Any, *, is_async: bool) -> None:
    """Have the source closed when LiteLLM ends this stream and nobody knows yet; streams of other kinds are left alone.

    Never raises.

    Args:
        stream: LiteLLM's stream, as the consumer reads it.
        watch: knows whether the end was told.
        source: the response below, or the iterator; with ``close`` or ``aclose``, by which the end is told.
        is_async: the colour of the call.
    """
    try:
        known = part(STREAM)
        if known is None or not isinstance(stream, known) or _END in vars(stream):
            return
        kind: Any = type(stream)
        telling = _async_class(kind) if is_async else _sync_class(kind)
        setattr(stream, _END, (watch, source))
        stream.__class__ = telling
    except Exception:  # what is observed below goes on
        watch.report("litellm.ends")


def _broke(stream: Any, error: BaseException) -> None:
    end = vars(stream).get(_END)
    if end is not None:
        end[0].broke(error)


@lru_cache(maxsize=32)
def _sync_class(kind: Any) -> type[Any]:
    read = kind.__next__

    def __next__(self: Any) -> Any:
        try:
            return read(self)
        except StopIteration:
            _close(self)
            raise
        except BaseException as error:
            _broke(self, error)
            if (told := told_for(error)) is error:
                raise
            raise told from error

    return _subclass(kind, {"__next__": __next__})


def _close(stream: Any) -> None:
    watch, source = vars(stream).get(_END, (None, None))
    if watch is None:
        return
    try:
        if watch.told:
            release(source)
        else:
            source.close()
    except Exception as error:
        watch.broke(error)


@lru_cache(maxsize=32)
def _async_class(kind: Any) -> type[Any]:
    read, leave = kind.__anext__, kind.aclose

    async def __anext__(self: Any) -> Any:
        try:
            return await read(self)
        except StopAsyncIteration:
            await _aclose(self)
            raise
        except BaseException as error:
            _broke(self, error)
            if (told := told_for(error)) is error:
                raise
            raise told from error

    async def aclose(self: Any) -> None:
        await leave(self)
        await _aclose(self)

    return _subclass(kind, {"__anext__": __anext__, "aclose": aclose})


async def _aclose(stream: Any) -> None:
    watch, source = vars(stream).get(_END, (None, None))
    if watch is None:
        return
    try:
        if watch.told:
            return await arelease(source)
        left = (getattr(source, "aclose", None) or source.close)()
        if inspect.isawaitable(left):
            await left
    except Exception as error:
        watch.broke(error)


def _subclass(kind: type[Any], members: dict[str, Any]) -> type[Any]:
    """A class that looks like the one it stands for, also in a repr and to a logger."""
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**named, **members})
