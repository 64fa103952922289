"""Runs the same test against the client for threads and the one for event loops."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from vluna_llm.gate import AsyncGateClient, GateClient, GateCredentials

Colour = Literal["sync", "async"]
COLOURS: tuple[Colour, ...] = ("sync", "async")


class Caller:
    """One client of either colour behind plain calls; a context manager that closes it."""

    def __init__(self, colour: Colour, credentials: GateCredentials, **settings: Any) -> None:
        self.loop = asyncio.new_event_loop() if colour == "async" else None
        make = GateClient if colour == "sync" else AsyncGateClient
        self.client: Any = make(credentials, **settings)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.loop is None:
                return method(*args, **kwargs)
            return self.loop.run_until_complete(method(*args, **kwargs))

        return call

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        if self.loop is None:
            self.client.close()
        else:
            self.loop.run_until_complete(self.client.aclose())
            self.loop.close()
