"""Context variables that hold for a ``with``, also where it is left in another task than it was entered in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def scoped(variable: ContextVar[T], value: T) -> Iterator[T]:
    """In the ``with`` the variable has this value."""
    token = variable.set(value)
    try:
        yield value
    finally:
        unset(variable, token)


def unset(variable: ContextVar[T], token: Token[T]) -> None:
    """Give the variable the value back that it had before.

    A generator or a coroutine may be closed by somebody else (another task, the garbage collector), whose context never
    saw the value: there is nothing to give back there.
    """
    try:
        variable.reset(token)
    except ValueError:
        pass


def take_own(entered: list[T], is_own: Callable[[T], bool]) -> T:
    """Take the innermost entry that is the running task's own out of those of an object that several may have entered.

    The last one where none is: it is left by somebody else than it was entered by.
    """
    found = next((entry for entry in reversed(entered) if is_own(entry)), entered[-1])
    entered.remove(found)
    return found
