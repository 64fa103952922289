"""Vluna's own SDK as an outside witness: which version is here, and a client of it for an embedded gate."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any, TypeVar

from vluna_llm.sandbox import Sandbox

T = TypeVar("T")


def sdk_version() -> tuple[int, ...] | None:
    """The installed version of ``vlunaai``; None where it is not installed."""
    try:
        return tuple(int(part) for part in metadata.version("vlunaai").split(".")[:3])
    except metadata.PackageNotFoundError:
        return None


def context(principal_id: str, **more: Any) -> Any:
    """The SDK's request context for one customer."""
    from vlunaai import RequestContext

    return RequestContext(principal_id=principal_id, user_id=principal_id, **more)


def run(gate: Sandbox, work: Callable[[Any], Awaitable[T]], *, error_mode: Any = "raise") -> T:
    """Run ``work`` with a service client of the SDK that is pointed to the gate."""
    from vlunaai import ServiceClientOptions, ServiceKeyCredentials, VlunaAIConfig, create_service_client

    env = gate.env()

    async def main() -> T:
        client = create_service_client(
            ServiceClientOptions(
                config=VlunaAIConfig(base_url=env["VLUNA_SERVICE_BASE_URL"], realm_id=env["VLUNA_REALM_ID"]),
                service_key=ServiceKeyCredentials(
                    key_id=env["VLUNA_SERVICE_KEY_ID"], secret=env["VLUNA_SERVICE_KEY_SECRET"]
                ),
                error_mode=error_mode,
            )
        )
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(main())
