"""What the tests of nested layers share: a provider, the gate's own books, and the metered clients that may be inside.

A *source* is one model call of some client, as an async iterator of texts: ``source(stage, stream, payer)``, where
``payer`` is whom the client is bound to, None for whoever pays for the surrounding work. A layer around it is made of
the same, so a stack of two is a source again.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import itertools
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from agent_provider import AgentProvider, _ScriptedHandler
from conftest import ask, each
from upstream import _UpstreamHandler

from vluna_llm import Vluna, call_context
from vluna_llm.errors import VlunaError
from vluna_llm.integrations.httpx import AsyncMeteringTransport, MeteringTransport
from vluna_llm.sandbox import Sandbox

HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
TOKENS = 120
"""What the provider reports of each answer."""
OWN_TOKENS = 7
"""What a layer says of an answer that something inside of it has given: never charged where that is metered."""

Texts = AsyncIterator[str]
Source = Callable[["Stage", bool, "str | None"], Texts]

_customers = itertools.count(1)
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Nobody here speaks TLS, and to load the certificates for each client would take longer than its call."""


def http_library() -> Any:
    """httpx or httpx2: the one that OpenAI's SDK is made for."""
    base = importlib.import_module("openai._base_client")
    return getattr(base, "httpx2", None) or base.httpx


class _Handler(_ScriptedHandler, _UpstreamHandler):  # type: ignore[misc]
    owner: Any


class NestedProvider(AgentProvider):
    """OpenAI's APIs by a script, and Anthropic's Messages under ``/anthropic``."""

    handler = _Handler
    recorded: dict[str, Any] = {}  # noqa: RUF012

    def reset(self) -> None:
        """Nothing asked yet, well-behaved."""
        self.behaviour = "ok"
        self.pause = 0.02
        self.says()
        self.requests.clear()
        self.responses.clear()
        self.released.set()
        self.released = type(self.released)()


@dataclass
class Books:
    """What the gate has written down of one customer: authorizes asked, how their leases ended, quantities charged."""

    asked: int
    leases: list[str]
    charged: list[int]

    @classmethod
    def of(cls, gate: Sandbox, customer: str) -> Books:
        """As they are now."""
        entries = gate.booked(customer).entries
        assert all((entry.kind, entry.status) == ("commit", "applied") for entry in entries), entries
        asked = [one for one in gate.requests if one.principal_id == customer and one.path.endswith("/authorize")]
        leases = gate.leases(customer)
        committed = [entry.lease_id for entry in entries]
        assert len(set(committed)) == len(committed), "a lease was committed twice"
        return cls(len(asked), sorted(lease.state for lease in leases), [entry.quantity for entry in entries])


NOTHING = Books(0, [], [])
REFUSED = Books(1, [], [])


def charged(*quantities: int, canceled: int = 0) -> Books:
    """Each by a lease of its own; so many more were asked for and given back."""
    count = len(quantities)
    return Books(count + canceled, ["canceled"] * canceled + ["closed"] * count, list(quantities))


GIVEN_BACK = charged(canceled=1)


@dataclass
class Stage:
    """One metering for all tests, and what a single one of them needs."""

    vluna: Vluna
    gate: Sandbox
    upstream: NestedProvider
    loop: asyncio.AbstractEventLoop
    closing: list[Any] = field(default_factory=list)

    # -- clients ---------------------------------------------------------------------------------------------------

    def client(self, *, sync: bool = False, **options: Any) -> Any:
        """A bare client of OpenAI's, closed at the end of the work."""
        kind = openai.OpenAI if sync else openai.AsyncOpenAI
        http = http_library()
        options.setdefault("http_client", (http.Client if sync else http.AsyncClient)(verify=_NO_TLS))
        client = kind(**{"base_url": self.upstream.base_url, "api_key": "sk", "max_retries": 0, **options})
        self.closing.append(client)
        return client

    def metered(self, client: Any, payer: str | None = None) -> Any:
        """The client metered, bound where there is a payer."""
        return self.vluna.wrap(client) if payer is None else self.vluna.bind(client, principal_id=payer)

    def http_client(self, payer: str | None = None, *, sync: bool = False) -> Any:
        """An HTTP client, of the library that the SDK is made for, over a transport that meters."""
        http = http_library()
        who = {} if payer is None else {"principal_id": payer}
        if sync:
            return http.Client(transport=MeteringTransport(http.HTTPTransport(verify=_NO_TLS), self.vluna, **who))
        return http.AsyncClient(
            transport=AsyncMeteringTransport(http.AsyncHTTPTransport(verify=_NO_TLS), self.vluna, **who)
        )

    # -- work ------------------------------------------------------------------------------------------------------

    def customer(self, credit: int | None = None) -> str:
        """One whom nobody knows yet."""
        name = f"nested_{next(_customers)}"
        if credit is not None:
            self.gate.set_credit(name, credit)
        return name

    def run(self, work: Callable[[], Awaitable[Any]], customer: str) -> Any:
        """Do it for the customer, until everything is settled."""

        async def main() -> Any:
            try:
                with call_context(principal_id=customer) as scope:
                    result = await work()
                    if others := self.others():
                        await asyncio.wait(others, timeout=10)
                for _ in range(100):  # what was dropped in the middle is settled when it is collected
                    if await scope.wait_async(0.1):
                        break
                    gc.collect()
                return result
            finally:
                for client in self.closing:
                    await ask(client.close())
                self.closing.clear()

        try:
            return self.loop.run_until_complete(main())
        finally:
            assert self.vluna.flush(10)

    def others(self) -> list[asyncio.Task[Any]]:
        """What works on in the background, but for LiteLLM's logging, which never ends."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        return [task for task in tasks if "LoggingWorker" not in repr(task)]

    def books(self, customer: str) -> Books:
        """What the gate says of the customer."""
        return Books.of(self.gate, customer)


@contextmanager
def staged(gate: Sandbox) -> Iterator[Stage]:
    """A metering, a provider and a loop for all tests of a module."""
    vluna = Vluna(
        base_url=gate.base_url, realm_id=gate.realm_id, key_id=gate.key_id, key_secret=gate.key_secret, outbox="memory"
    )
    loop = asyncio.new_event_loop()
    with NestedProvider() as upstream:
        yield Stage(vluna, gate, upstream, loop)
    vluna.close()
    loop.close()


@contextmanager
def one_test(stage: Stage, caplog: pytest.LogCaptureFixture) -> Iterator[Stage]:
    """The stage, with nothing asked yet. In the end nothing waits in the journal, and nobody of ours has complained."""
    stage.upstream.reset()
    caplog.set_level(logging.WARNING, "vluna_llm")
    yield stage
    stage.upstream.released.set()
    told = [one.getMessage() for one in caplog.get_records("call") if one.name.startswith("vluna_llm")]
    assert told == []
    owed = stage.vluna._running().ledger.journal.rows("none", "pending", "sent", "quarantined", "refused", "lost")
    assert [row for row in owed if row.state.may_run] == []


async def all_of(texts: Texts) -> str:
    """Read to the end."""
    said = [text async for text in texts]
    assert said, "no answer"
    return "".join(said)


async def left(texts: Texts) -> None:
    """Read the first text, and leave."""
    assert await anext(texts)
    await texts.aclose()  # type: ignore[attr-defined]


async def cancelled(stage: Stage, texts: Texts) -> None:
    """Cancel the task when the provider has been asked."""
    task = asyncio.ensure_future(all_of(texts))
    for _ in range(2000):
        if stage.upstream.posts() or task.done():
            break
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.02)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return
    finally:
        stage.upstream.released.set()
    raise AssertionError("it was not cancelled")


def piped(make: Callable[[], Texts]) -> Texts:
    """The same texts, read in a task of its own: frameworks with cancel scopes do not bear to be suspended in one."""
    queue: asyncio.Queue[Any] = asyncio.Queue(1)

    async def read() -> None:
        try:
            async with aclosing(make()) as texts:  # type: ignore[type-var]
                async for text in texts:
                    await queue.put((text, None))
            await queue.put((None, None))
        except Exception as error:
            await queue.put((None, error))

    async def pipe() -> Texts:
        task = asyncio.ensure_future(read())
        try:
            while True:
                text, error = await queue.get()
                if error is not None:
                    raise error
                if text is None:
                    return
                yield text
        finally:
            task.cancel()
            await asyncio.wait([task])

    return pipe()


def refusal_in(error: BaseException) -> BaseException | None:
    """Our own exception: this one, or the one that an answer of `MeteringTransport` stands for."""
    if isinstance(error, VlunaError):
        return error
    found: BaseException | None = error  # frameworks put exceptions of their own around that answer's
    while found is not None:
        extensions = getattr(getattr(found, "response", None), "extensions", {})
        if "vluna_error" in extensions:
            return extensions["vluna_error"]
        found = found.__cause__ or found.__context__
    return None


# -- what may be inside ------------------------------------------------------------------------------------------------


def chat(client: Any, stream: bool) -> Texts:
    """One chat completion of a client."""
    return chat_texts(lambda: client.chat.completions.create(model="gpt-4o", messages=HI, stream=stream), stream)


async def chat_texts(make: Callable[[], Any], stream: bool) -> Texts:
    """The texts of a chat completion; the stream is closed when it is left."""
    answer = await ask(make())
    if not stream:
        yield answer.choices[0].message.content
        return
    try:
        async for chunk in each(answer):
            if chunk.choices and (text := chunk.choices[0].delta.content):
                yield text
    finally:
        if (close := getattr(answer, "aclose", None) or getattr(answer, "close", None)) is not None:
            await ask(close())


def bare(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """A client that nobody meters: the layer around it has to settle."""
    return chat(stage.client(), stream)


def wrapped(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """``vluna.wrap(openai.AsyncOpenAI())``."""
    return chat(stage.metered(stage.client(), payer), stream)


def wrapped_sync(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """``vluna.wrap(openai.OpenAI())``."""
    return chat(stage.metered(stage.client(sync=True), payer), stream)


def transport(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """A bare client over `AsyncMeteringTransport`."""
    return chat(stage.client(http_client=stage.http_client(payer)), stream)


def wrapped_over_transport(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """A wrapped client over `AsyncMeteringTransport`."""
    return chat(stage.metered(stage.client(http_client=stage.http_client()), payer), stream)


async def claude(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """``vluna.wrap(anthropic.AsyncAnthropic())``."""
    import anthropic

    made = anthropic.AsyncAnthropic(base_url=stage.upstream.host + "/anthropic", api_key="sk", max_retries=0)
    stage.closing.append(made)
    client = stage.metered(made, payer)
    asked: dict[str, Any] = {"model": "claude-sonnet-5", "max_tokens": 100, "messages": HI}
    if not stream:
        yield (await client.messages.create(**asked)).content[0].text
        return
    async with client.messages.stream(**asked) as events:
        async for text in events.text_stream:
            yield text


def paid(payer: str | None) -> dict[str, Any]:
    """How a call of LiteLLM names who pays."""
    return {} if payer is None else {"metadata": {"vluna": {"principal_id": payer}}}


def lite(stage: Stage, stream: bool, payer: str | None, function: str = "acompletion", **options: Any) -> Texts:
    """``litellm.acompletion`` with `VlunaCallback`."""
    import litellm

    asked = {"model": "openai/gpt-4o", "messages": HI, "api_base": stage.upstream.base_url, "api_key": "sk"}
    options = {**asked, "stream": stream, "max_retries": 0, **paid(payer), **options}
    return chat_texts(lambda: getattr(litellm, function)(**options), stream)


def lite_sync(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """``litellm.completion`` with `VlunaCallback`."""
    return lite(stage, stream, payer, "completion")


def lite_over_client(stage: Stage, stream: bool, payer: str | None) -> Texts:
    """``litellm.acompletion(client=vluna.wrap(...))`` with `VlunaCallback`."""
    return lite(stage, stream, None, client=stage.metered(stage.client(), payer))


@contextmanager
def litellm_callback(vluna: Vluna) -> Iterator[None]:
    """LiteLLM with our callback, and as it was afterwards."""
    import litellm

    from vluna_llm.integrations import litellm as integration

    names = [name for name in vars(litellm) if "callback" in name or name.endswith(("provider_list", "provider_map"))]
    lists = [name for name in [*names, "_custom_providers"] if isinstance(getattr(litellm, name, None), list)]
    before = {name: list(getattr(litellm, name)) for name in lists}
    litellm.callbacks = [integration.VlunaCallback(vluna)]
    yield
    integration.uninstall()
    for name, kept in before.items():  # LiteLLM copies a callback into lists of its own
        getattr(litellm, name)[:] = kept
