"""Being told of the streams that LiteLLM makes inside others, at the first read of those."""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Protocol


class _Made(Protocol):
    def __call__(self, stream: Any, /) -> None: ...


_making: ContextVar[_Made | None] = ContextVar("vluna_llm_litellm_making", default=None)


@contextmanager
def making(made: _Made) -> Generator[None, None, None]:
    """Be told of each `CustomStreamWrapper` that is made in the ``with``."""
    with suppress(Exception):  # where LiteLLM has it elsewhere, the items are observed instead
        _see_creations()
    token = _making.set(made)
    try:
        yield
    finally:
        with suppress(ValueError):
            _making.reset(token)


@functools.lru_cache(maxsize=1)
def _see_creations() -> None:
    from litellm.litellm_core_utils.streaming_handler import CustomStreamWrapper

    original = CustomStreamWrapper.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made = _making.get()
        if made is not None:
            made(self)

    CustomStreamWrapper.__init__ = init
