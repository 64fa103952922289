"""Which clients of Anthropic's SDK are metered: wrapped, bound, copied, drop-in, with middleware, for other clouds."""

from __future__ import annotations

import base64
import gc
import json
import struct
import subprocess
import sys
import weakref
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from claude import MESSAGE, STREAM, Claude, anthropic
from conftest import Bill, MakeVluna, ask, each, settled
from upstream import Recorded, Upstream

from vluna_llm import Vluna, call_context
from vluna_llm.errors import ConfigurationError, GateDenied
from vluna_llm.integrations.anthropic import Anthropic, AsyncAnthropic
from vluna_llm.sandbox import Sandbox


async def create(client: Any, **more: Any) -> Any:
    return await ask(client.messages.create(**{**MESSAGE, **more}))


async def stream(client: Any, **more: Any) -> Any:
    return [event async for event in each(await ask(client.messages.create(**{**STREAM, **more})))]


def quantities(vluna: Vluna, gate: Sandbox, customer: str) -> list[tuple[str, int]]:
    """What was booked, in what state and how much."""
    assert vluna.flush(10)
    return [(entry.kind, entry.quantity) for entry in gate.booked(customer).entries]


# -- wrapped -----------------------------------------------------------------------------------------------------------


def test_a_wrapped_client_is_of_the_same_class(claude: Claude, vluna: Vluna, provider: Upstream) -> None:
    """And the original stays as it was: unmetered."""
    bare = claude.bare(timeout=7, default_headers={"x-tenant": "acme"})
    wrapped = vluna.wrap(bare)
    assert isinstance(wrapped, type(bare))
    assert (type(wrapped).__name__, type(wrapped).__module__) == (type(bare).__name__, type(bare).__module__)
    assert (wrapped.timeout, wrapped.api_key, wrapped.base_url) == (7, "sk-ant-test", bare.base_url)
    assert wrapped._client is bare._client
    claude.run(create, bare)  # names nobody who pays, and is not asked to
    assert provider.requests[-1].headers["x-tenant"] == "acme"


def test_wrapping_twice_meters_once(claude: Claude, vluna: Vluna, shared_gate: Sandbox, customer: str) -> None:
    """``wrap(wrap(c))`` and ``bind(wrap(c))``."""
    wrapped = vluna.wrap(claude.bare())
    assert vluna.wrap(wrapped) is wrapped
    claude.run(create, vluna.bind(vluna.wrap(wrapped), principal_id=customer))
    assert quantities(vluna, shared_gate, customer) == [("commit", 120)]


def test_a_bound_client_wins_over_the_context(
    claude: Claude, vluna: Vluna, shared_gate: Sandbox, customer: str
) -> None:
    """And what is bound again is merged."""
    mine = vluna.bind(vluna.bind(claude.bare(), principal_id=customer), feature_code="chat.answer")
    with call_context(principal_id="somebody-else") as scope:
        claude.run(stream, mine)
    assert scope.wait(10)
    (receipt,) = scope.receipts
    assert (receipt.principal_id, receipt.feature_code) == (customer, "chat.answer")


@pytest.mark.parametrize("how", ["copy", "with_options", "with_middleware"])
def test_copies_are_metered_and_bound(
    how: str, claude: Claude, vluna: Vluna, shared_gate: Sandbox, customer: str
) -> None:
    """So are copies of copies, and copies of a drop-in client."""
    for metered in (claude.bare(), _drop_in(claude, vluna)):
        client = vluna.bind(metered, principal_id=customer)
        kind = type(client)
        for _ in range(2):
            client = getattr(client, how)()
            assert type(client) is kind
        claude.run(create, client)
    assert quantities(vluna, shared_gate, customer) == [("commit", 120)] * 2


def test_a_copy_keeps_credentials_that_only_the_sdks_own_class_hands_on(claude: Claude, vluna: Vluna) -> None:
    """The SDK looks at ``type(client)``: a metered client must not lose its token provider for that."""
    credentials = anthropic.AccessToken if hasattr(anthropic, "AccessToken") else None
    assert credentials is not None

    def token(**_: Any) -> Any:
        return credentials(token="t", expires_at=None)

    bare = claude.bare(api_key=None, credentials=token)
    assert bare.copy().credentials is token
    assert vluna.wrap(bare).copy().credentials is token
    assert _drop_in(claude, vluna, api_key=None, credentials=token).with_options(timeout=3).credentials is token


class Own(anthropic.Anthropic):
    """A product's own client, with an argument that only it knows."""

    def __init__(self, *, tenant: str, **options: Any) -> None:
        self.tenant = tenant
        super().__init__(**options)

    def copy(self, **options: Any) -> Any:
        return super().copy(_extra_kwargs={"tenant": self.tenant}, **options)

    with_options = copy


def test_a_subclass_of_the_products_own(vluna: Vluna, provider: Upstream, shared_gate: Sandbox, customer: str) -> None:
    """It stays what it is, and so do its copies."""
    claude = Claude(False, provider)
    client = vluna.bind(Own(tenant="acme", **claude.options), principal_id=customer)
    assert (type(client).__name__, client.tenant, client.with_options(timeout=3).tenant) == ("Own", "acme", "acme")
    claude.run(create, client.with_options(timeout=3))
    assert quantities(vluna, shared_gate, customer) == [("commit", 120)]


def test_bound_clients_are_freed(claude: Claude, vluna: Vluna) -> None:
    """A client for each request does not fill the memory, middleware or not."""
    bare = claude.bare()
    bound = vluna.bind(bare, principal_id="one")
    gone = weakref.ref(bound)
    del bound
    gc.collect()
    assert gone() is None


def test_strangers_are_refused_clearly(vluna: Vluna) -> None:
    """The module has no client of its own."""
    with pytest.raises(ConfigurationError, match=r"anthropic\.Anthropic\(\)"):
        vluna.wrap(anthropic)
    with pytest.raises(ConfigurationError, match="anthropic client"):
        vluna.wrap(object())


# -- drop-in -----------------------------------------------------------------------------------------------------------


def _drop_in(claude: Claude, vluna: Vluna | None, **options: Any) -> Any:
    kind = AsyncAnthropic if claude.is_async else Anthropic
    given = {"vluna": vluna} if vluna is not None else {}
    return kind(**{**claude.options, **options}, **given)


def test_the_drop_in_classes_meter(claude: Claude, vluna: Vluna, shared_gate: Sandbox, customer: str) -> None:
    """One changed import."""
    client = _drop_in(claude, vluna)
    assert isinstance(client, anthropic.AsyncAnthropic if claude.is_async else anthropic.Anthropic)
    with call_context(principal_id=customer):
        claude.run(create, client)
        claude.run(stream, _drop_in(claude, vluna).with_options(timeout=9))
    assert quantities(vluna, shared_gate, customer) == [("commit", 120)] * 2


@pytest.fixture
def _fresh_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("vluna_llm.vluna._default", None)
    yield
    from vluna_llm import vluna

    if vluna._default is not None:
        vluna._default.close()


@pytest.mark.usefixtures("_fresh_default")
def test_the_drop_in_classes_take_the_environment(
    claude: Claude, shared_gate: Sandbox, customer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No word of ours but the import."""
    for name, value in {**shared_gate.env(), "VLUNA_LLM_OUTBOX": "memory"}.items():
        monkeypatch.setenv(name, value)
    with call_context(principal_id=customer):
        claude.run(create, _drop_in(claude, None))
    assert quantities(Vluna.default(), shared_gate, customer) == [("commit", 120)]


def test_a_subclass_of_a_drop_in_class(vluna: Vluna, provider: Upstream, shared_gate: Sandbox, customer: str) -> None:
    """Its copies are made by its constructor, as the SDK's are."""

    class Mine(Anthropic):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.tenant = "acme"

    claude = Claude(False, provider)
    client = Mine(vluna=vluna, **claude.options).with_options(timeout=3)
    assert (type(client), client.tenant) == (Mine, "acme")
    with call_context(principal_id=customer):
        claude.run(create, client)
    assert quantities(vluna, shared_gate, customer) == [("commit", 120)]


@pytest.mark.parametrize(("missing", "extra"), [("anthropic", "vluna-llm[anthropic]"), ("openai", "")])
def test_each_sdk_is_needed_for_itself_alone(missing: str, extra: str) -> None:
    """Without Anthropic's SDK the extra is named; without OpenAI's nothing is amiss."""
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "try:\n    import vluna_llm.integrations.anthropic\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert extra in done.stdout if extra else done.stdout == ""


# -- middleware --------------------------------------------------------------------------------------------------------

needs_middleware = pytest.mark.skipif(not hasattr(anthropic, "Middleware"), reason="this SDK has no middleware")


class Noting(getattr(anthropic, "Middleware", object)):  # type: ignore[misc]
    """Sees every attempt, and may answer in the provider's place."""

    def __init__(self, answer: Any = None) -> None:
        self.seen: list[int] = []
        self.answer = answer

    def handle(self, request: Any, call_next: Any) -> Any:
        if self.answer is not None:
            return self.answer
        response = call_next(request)
        self.seen.append(response.status_code)
        return response

    async def handle_async(self, request: Any, call_next: Any) -> Any:
        if self.answer is not None:
            return self.answer
        response = await call_next(request)
        self.seen.append(response.status_code)
        return response


@needs_middleware
@pytest.mark.parametrize("program", [create, stream], ids=lambda one: one.__name__)
@pytest.mark.parametrize(("behaviour", "statuses"), [("ok", [200]), ("busy", [529, 200])])
def test_a_client_with_middleware_is_metered(
    program: Any, behaviour: str, statuses: list[int], claude: Claude, vluna: Vluna, provider: Upstream, billed: Any
) -> None:
    """The middleware runs for each attempt, errors included; the call is one."""
    provider.behaviour = behaviour
    noting = Noting()
    bill: Bill = billed(vluna, lambda: claude.run(program, vluna.wrap(claude.bare(middleware=[noting], max_retries=2))))
    assert noting.seen == statuses
    bill.booked_once()


@needs_middleware
def test_an_answer_of_a_middleware_costs_nothing(claude: Claude, vluna: Vluna, provider: Upstream, billed: Any) -> None:
    """A cache inside the client: the lease is given back."""
    answers: list[Any] = []
    client = vluna.wrap(claude.bare(middleware=[Noting(answer="from the cache")]))
    bill: Bill = billed(vluna, lambda: answers.append(claude.run(create, client)))
    assert answers == ["from the cache"]
    assert provider.requests == []
    bill.cancelled_once()


def _with_fallback(claude: Claude) -> Any:
    middleware = anthropic.BetaRefusalFallbackMiddleware([{"model": "claude-opus-5"}])
    return claude.bare(middleware=[middleware])


CAUTIOUS = {**MESSAGE, "model": "cautious"}


@needs_middleware
@pytest.mark.parametrize("streamed", [False, True])
def test_each_model_that_a_fallback_asks_is_charged(
    streamed: bool, claude: Claude, vluna: Vluna, shared_gate: Sandbox, customer: str, provider: Upstream
) -> None:
    """The second model continues the stream after ``request`` has returned, and outside of the ``with``: the same
    customer pays for it."""

    async def program(client: Any) -> Any:
        with call_context(principal_id=customer) as scope:
            answer = await ask(client.beta.messages.create(**CAUTIOUS, stream=streamed))
        seen = [event async for event in each(answer)] if streamed else [answer]
        return scope, seen

    _, bare = claude.run(program, _with_fallback(claude))
    scope, seen = claude.run(program, vluna.wrap(_with_fallback(claude)))
    assert repr(seen) == repr(bare)
    assert [request.body["model"] for request in provider.posts()] == ["cautious", "claude-opus-5"] * 2
    bill = settled(vluna, scope, shared_gate, customer)
    entries = sorted((entry.feature, entry.quantity) for entry in shared_gate.booked(customer).entries)
    assert entries == [("anthropic.cautious", 120), ("anthropic.claude-opus-5", 120)]
    assert [lease.state for lease in shared_gate.leases(customer)] == ["closed"] * 2
    assert len(bill.receipts) == 2


@needs_middleware
def test_a_fallback_that_the_gate_denies_is_not_sent(claude: Claude, make_vluna: MakeVluna, provider: Upstream) -> None:
    """The first model's answer is charged, the second is not asked."""
    with Sandbox() as gate:
        vluna = make_vluna(gate)

        async def program(client: Any) -> None:
            noting = client.beta.messages.create(**CAUTIOUS)
            await ask(noting)

        class Broke(Noting):
            def handle(self, request: Any, call_next: Any) -> Any:
                response = call_next(request)
                gate.set_credit("alice", 0)
                return response

            async def handle_async(self, request: Any, call_next: Any) -> Any:
                response = await call_next(request)
                gate.set_credit("alice", 0)
                return response

        middleware = [anthropic.BetaRefusalFallbackMiddleware([{"model": "claude-opus-5"}]), Broke()]
        client = vluna.bind(claude.bare(middleware=middleware), principal_id="alice")
        with pytest.raises(GateDenied):
            claude.run(program, client)
        assert [request.body["model"] for request in provider.posts()] == ["cautious"]
        assert quantities(vluna, gate, "alice") == [("commit", 120)]


# -- other clouds ------------------------------------------------------------------------------------------------------


def _platform(claude: Claude, name: str, **options: Any) -> Any:
    kind = getattr(anthropic, f"Async{name}" if claude.is_async else name)
    return kind(base_url=options.pop("base_url", claude.options["base_url"]), max_retries=0, **options)


def test_foundry(claude: Claude, vluna: Vluna, billed: Any) -> None:
    """Its Messages are Anthropic's own, billed as Azure's."""
    client = vluna.wrap(_platform(claude, "AnthropicFoundry", api_key="k")).with_options(timeout=9)
    bill: Bill = billed(vluna, lambda: claude.run(stream, client))
    assert bill.booked_once().feature_code == "azure.claude-sonnet-5"


def _events(body: dict[str, Any], provider: Upstream) -> bytes:
    """The event stream that our upstream would send."""
    handler = provider._server.RequestHandlerClass
    shell = object.__new__(handler)
    return "".join(handler._message_events(shell, body)).encode()


@pytest.mark.parametrize("streamed", [False, True])
def test_vertex(streamed: bool, claude: Claude, vluna: Vluna, provider: Upstream, billed: Any) -> None:
    """The model stands in the path when the request is sent; who is charged for what is known before."""
    body = {"model": "claude-sonnet-5"}
    whole = json.dumps({**_message(), "content": [], "usage": USAGE}).encode()
    kind = "text/event-stream" if streamed else "application/json"
    answer = _events(body, provider) if streamed else whole
    address = provider.replay(f"vertex-{claude.is_async}-{streamed}", Recorded(200, kind, answer, streamed))
    client = _platform(claude, "AnthropicVertex", base_url=address, region="us-east5", project_id="p", access_token="t")
    bill: Bill = billed(vluna, lambda: claude.run(stream if streamed else create, vluna.wrap(client)))
    assert bill.booked_once().feature_code == "vertex_ai.claude-sonnet-5"
    assert provider.requests[-1].path.endswith(":streamRawPredict" if streamed else ":rawPredict")


USAGE = {
    "input_tokens": 36,
    "cache_read_input_tokens": 40,
    "cache_creation_input_tokens": 24,
    "output_tokens": 20,
}


def _message() -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-5",
        "stop_reason": "end_turn",
    }


def _aws(event: dict[str, Any]) -> bytes:
    """One message of AWS's event stream (AWS documentation, "Event stream encoding"), as Bedrock sends it."""
    payload = json.dumps({"bytes": base64.b64encode(json.dumps(event).encode()).decode()}).encode()
    pairs = ((":event-type", "chunk"), (":content-type", "application/json"), (":message-type", "event"))
    headers = b"".join(
        bytes([len(name)]) + name.encode() + b"\x07" + struct.pack(">H", len(value)) + value.encode()
        for name, value in pairs
    )
    prelude = struct.pack(">II", 16 + len(headers) + len(payload), len(headers))
    head = prelude + struct.pack(">I", zlib.crc32(prelude))
    message = head + headers + payload
    return message + struct.pack(">I", zlib.crc32(message))


@pytest.mark.parametrize("streamed", [False, True])
def test_bedrock(streamed: bool, claude: Claude, vluna: Vluna, provider: Upstream, billed: Any) -> None:
    """Its streams are binary messages of AWS: events and charge are those of the bare client."""
    pytest.importorskip("botocore", reason="boto3 is not installed: pip install 'anthropic[bedrock]'")
    if streamed:
        lines = _events({"model": "claude-sonnet-5"}, provider).decode().splitlines()
        body = b"".join(_aws(json.loads(line[6:])) for line in lines if line.startswith("data: "))
        kind = "application/vnd.amazon.eventstream"
    else:
        body, kind = json.dumps({**_message(), "content": [], "usage": USAGE}).encode(), "application/json"
    address = provider.replay(f"bedrock-{claude.is_async}-{streamed}", Recorded(200, kind, body, streamed))

    def client() -> Any:
        keys = {"aws_access_key": "a", "aws_secret_key": "s", "aws_region": "us-east-1"}
        return _platform(claude, "AnthropicBedrock", base_url=address, **keys)

    program = stream if streamed else create
    bare = claude.run(program, client())
    answers: list[Any] = []
    wrapped = vluna.wrap(client())
    assert wrapped.messages._client is wrapped
    bill: Bill = billed(vluna, lambda: answers.append(claude.run(program, wrapped.with_options(timeout=9))))
    assert repr(answers) == repr([bare])
    assert bill.booked_once().feature_code == "bedrock.claude-sonnet-5"
