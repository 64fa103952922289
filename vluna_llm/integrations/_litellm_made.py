"""Being told of the streams that LiteLLM makes: inside others at their first read, and where no function is wrapped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from ..scoped import scoped
from ._litellm_parts import STREAM, part


class _Made(Protocol):
    def __call__(self, stream: Any, /) -> None: ...


_making: ContextVar[_Made | None] = ContextVar("vluna_llm_litellm_making", default=None)


@contextmanager
def making(made: _Made) -> Generator[None, None, None]:
    """Be told of each `CustomStreamWrapper` that is made in the ``with``; of none where creations are not seen."""
    with scoped(_making, made):
        yield


def see_creations(elsewhere: _Made) -> None:
    """Have those told who wait for a stream; once is enough. Where LiteLLM has no such class, nothing happens.

    Args:
        elsewhere: is told of the streams for which nobody waits. Must not raise.
    """
    kind = part(STREAM)
    before = vars(kind).get("__init__") if isinstance(kind, type) else None
    if before is None or _seen:
        return

    @functools.wraps(before)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        if _seen and _seen[0][2] is init:
            (_making.get() or elsewhere)(self)

    _seen.append((kind, before, init))
    kind.__init__ = init


def forget_creations() -> None:
    """Put the class back as it was. What somebody else has put around ours stays, and ours tells nobody any more."""
    while _seen:
        kind, before, ours = _seen.pop()
        if vars(kind).get("__init__") is ours:
            kind.__init__ = before


_seen: list[tuple[Any, Callable[..., None], Callable[..., None]]] = []
