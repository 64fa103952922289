"""How the gate says no: the exact status, code and message of the real server (gate contract, section 2)."""

from __future__ import annotations

from typing import Any

UNEXPECTED = "Unexpected server error. Please try again later."


class Refusal(Exception):
    """An answer that is not a success. Nothing that the request did is kept.

    ``meta`` is what the envelope carries besides the status; ``bare`` leaves the whole ``meta`` out, as the real
    server does for unforeseen errors and on some routes.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        hints: list[dict[str, Any]] | None = None,
        meta: dict[str, Any] | None = None,
        bare: bool = False,
    ) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.hints = hints or []
        self.meta = meta or {}
        self.bare = bare


class DatabaseFault(Exception):
    """What a database error is on the real server: 500 alone, and in a batch the end of the shared transaction."""


class FirstCall(Exception):
    """A principal was seen for the first time: answer 500 and keep the account (gate contract, section 4)."""


def invalid(message: str) -> Refusal:
    """422 for a field that cannot be used."""
    return Refusal(422, "VALIDATION.INVALID_INPUT", message)


def missing(message: str) -> Refusal:
    """422 for a thing that does not exist or is not active."""
    return Refusal(422, "RESOURCE.NOT_FOUND", message)


def conflict() -> Refusal:
    """409 of the database layer (the process cache spells it with an underscore)."""
    return Refusal(409, "WRITE.INVALID_PAYLOAD", "idempotency conflict")


def unexpected() -> Refusal:
    """500 without ``meta``: an unforeseen error of the server."""
    return Refusal(500, "SERVER.UNEXPECTED", UNEXPECTED, bare=True)


def out_of_range() -> Refusal:
    """500 for an amount beyond 2^53-1."""
    return Refusal(500, "SERVER.CONFIG", "value exceeds numeric range")


def no_route(method: str, path: str) -> Refusal:
    """404 of the router."""
    return Refusal(404, "RESOURCE.NOT_FOUND", f"Cannot {method} {path}")
