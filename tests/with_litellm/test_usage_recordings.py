"""Recorded provider traffic through real LiteLLM: what is booked is exactly what the provider reported.

The recorded bytes are served on loopback, LiteLLM is asked for them with `VlunaCallback` installed, by its sync and its
async function, and the embedded gate's books are compared with the recording's ``truth``. A table at the end of the
output says how many of each shape were replayed, how many of them are exact, and what could not be replayed, and why.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, Literal, get_args

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # LiteLLM fetches tokenizers to count with

import litellm
from replayed import REASON, Exchange, Way, check, exchanges, expected, function
from upstream import Upstream

from vluna_llm import Scope, Vluna, call_context
from vluna_llm.integrations import litellm as integration
from vluna_llm.integrations._litellm_usage import ChunkReader, ending_of, model_call_of
from vluna_llm.sandbox import Sandbox
from vluna_llm.usage import TokenUsage

OLD = tuple(int(part) for part in version("litellm").split(".")[:2]) < (1, 90)
"""Whether this is the older of the two lines (1.83)."""

LOSES = {"cohere-cohere-chat-7f77fb6d": {"cached_tokens"}}
"""Parts of the usage that LiteLLM shows nobody, in either line (Cohere's reasoning is another): its object has not got
them, and the body is shown to no callback."""

RAISES = {
    "cohere-cohere-chat-a1f513fc",
    "openai-chat-completions-00c8c65b" if OLD else "snowflake-cortex-chat-completions-39ea0a95",
}
"""Answers of which this line of LiteLLM can make nothing: it raises, and what was reported is booked all the same."""

ALL = {"input_tokens", "output_tokens"}
OBJECTS_LOSE: dict[str, set[str]] = {
    **LOSES,
    "anthropic-anthropic-messages-3ee39186": {"reasoning_tokens"},  # counted from the text, so left out
    "anthropic-anthropic-messages-40e1294e": {"reasoning_tokens"},
    # 1.106 adds up the steps of a loop on the server, which are in the totals already.
    "anthropic-anthropic-messages-9d1ce0b3": {"reasoning_tokens"} if OLD else {*ALL, "reasoning_tokens"},
    "groq-chat-completions-00b25ea2": ALL,  # usage in `x_groq` of a stream
    "groq-chat-completions-b2c2e1ec": ALL,
    "mistral-audio-e840fa6c": {*ALL, "audio_input_tokens"},  # a transcription's usage
    **({"openai-chat-completions-c5058f86": ALL} if OLD else {}),  # 1.83 stops reading: two choices
}
"""What the objects of LiteLLM do not show, and what is therefore read below them or from the provider's body."""

EXCHANGES = list(exchanges())
REPLAYED = [exchange for exchange in EXCHANGES if exchange.ways]
SHAPES = sorted({exchange.shape for exchange in REPLAYED})

Outcome = Literal["exact", "parts lost", "estimated", "nothing owed", "wrong"]


class Table:
    """What was replayed, shape by shape, told at the end of the test run."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[Outcome]] = defaultdict(Counter)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        line, columns = terminalreporter.write_line, get_args(Outcome)
        line(f"recordings through LiteLLM {version('litellm')}, each way in by itself:")
        line(f"  {'shape':30} {'replayed':>8}  " + "  ".join(f"{name:>12}" for name in columns))
        everything = sum(self.outcomes.values(), Counter[Outcome]())
        for shape, outcomes in [*sorted(self.outcomes.items()), ("all", everything)]:
            counts = "  ".join(f"{outcomes[name]:12}" for name in columns)
            line(f"  {shape:30} {sum(outcomes.values()):8}  {counts}")
        for exchange in EXCHANGES:
            if not exchange.ways:
                line(f"  not replayable: {exchange.id}: {exchange.why_not}")


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    """The table of this run."""
    made = Table()
    request.config.pluginmanager.register(made)
    return made


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One loop for all async calls: LiteLLM's connections belong to the loop in which they were made."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.run_until_complete(litellm.close_litellm_async_clients())
    loop.close()


@pytest.fixture(scope="module")
def meter(shared_gate: Sandbox) -> Iterator[Vluna]:
    """One metering for all recordings."""
    vluna = Vluna(
        base_url=shared_gate.base_url,
        realm_id=shared_gate.realm_id,
        key_id=shared_gate.key_id,
        key_secret=shared_gate.key_secret,
        outbox="memory",
    )
    yield vluna
    vluna.close()


@pytest.fixture(scope="module", autouse=True)
def _collected_between_calls() -> Iterator[None]:
    """The garbage collector runs between calls only.

    1.83 leaves some sync streams unfinished (Anthropic's, Cohere's; the same without us). Collected while another
    request holds the lock of the connection pool, such a stream waits for that very lock for ever.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM fetches nothing, and prints no advice."""
    monkeypatch.setattr(litellm, "disable_hf_tokenizer_download", True, raising=False)
    monkeypatch.setattr(litellm, "suppress_debug_info", True)


def ask(exchange: Exchange, way: Way, loop: asyncio.AbstractEventLoop, upstream: Upstream) -> Any:
    """Ask by this way and read the answer to its end; what LiteLLM raises is the answer, too."""
    call, given = function(way.name), exchange.serve(upstream, way)

    async def main() -> Any:
        answer = await call(**given)
        if exchange.rec.stream:
            return [item async for item in answer]
        return answer

    try:
        if inspect.iscoroutinefunction(call):
            return loop.run_until_complete(main())
        answer = call(**given)
        return list(answer) if exchange.rec.stream else answer
    except Exception as error:
        return error


def wanted(exchange: Exchange) -> dict[str, int] | None:
    """The usage that must be booked; None where the provider reported none."""
    want: dict[str, int] | None = expected(exchange.rec)
    return want


def judge(exchange: Exchange, scope: Scope, gate: Sandbox, customer: str, answer: Any) -> Outcome:
    """How this was booked; asserts that it was booked as it must be, to the last part and once."""
    entries = gate.booked(customer).entries
    (lease,) = gate.leases(customer)
    want = wanted(exchange)
    if want is None and exchange.rec.api == "responses" and exchange.status == 200:
        assert (lease.state, entries) == ("active", ()), "a background response waits for its retrieve"
        return "nothing owed"
    if want is None and not isinstance(answer, Exception) and any("finish:" in note for note in exchange.rec.notes):
        (entry,) = entries
        assert (lease.state, entry.status, entry.labels["usage_source"]) == ("closed", "applied", "estimated")
        return "estimated"
    total = 0 if want is None else want["input_tokens"] + want["output_tokens"]
    if want is None or not total:
        assert (lease.state, entries) == ("canceled", ()), "nothing was reported, or nothing that is a token"
        return "nothing owed"
    (entry,) = entries
    assert (lease.state, entry.status, entry.labels["usage_source"]) == ("closed", "applied", "provider")
    assert entry.quantity == total
    lost = LOSES.get(exchange.id, set())
    cached = 0 if "cached_tokens" in lost else want["cached_tokens"]
    lines = {"input": want["input_tokens"] - cached, "cached": cached, "output": want["output_tokens"]}
    booked = {name.rpartition(".")[2]: quantity for name, quantity in entry.lines.items()}
    assert booked == {name: quantity for name, quantity in lines.items() if quantity}
    if lost:
        return "parts lost"
    check(exchange.rec, scope.usage)
    return "exact"


@pytest.mark.skipif(not EXCHANGES, reason=REASON)
@pytest.mark.parametrize("exchange", REPLAYED, ids=[exchange.id for exchange in REPLAYED])
def test_what_the_provider_reported_is_booked(
    exchange: Exchange,
    upstream: Upstream,
    loop: asyncio.AbstractEventLoop,
    meter: Vluna,
    shared_gate: Sandbox,
    customer: str,
    table: Table,
) -> None:
    """One lease and one commit with the provider's numbers in all their parts, by every function that can ask for them;
    an estimate where the provider gave none, nothing where it refused."""
    litellm.callbacks = [integration.VlunaCallback(meter)]
    for way in exchange.ways:
        gc.collect(1)
        payer, outcome = f"{customer}_{way.name}", table.outcomes[exchange.shape]
        outcome["wrong"] += 1
        with call_context(principal_id=payer) as scope:
            answer = ask(exchange, way, loop, upstream)
        assert scope.wait(10), way
        assert meter.flush(10), way
        if exchange.status >= 400 or exchange.id in RAISES:
            assert isinstance(answer, Exception), way
        outcome[judge(exchange, scope, shared_gate, payer, answer)] += 1
        outcome["wrong"] -= 1


@pytest.mark.skipif(not EXCHANGES, reason=REASON)
def test_every_recording_is_replayed_or_named() -> None:
    """Nothing is left out in silence."""
    assert len(EXCHANGES) == 210
    assert all(bool(exchange.ways) != bool(exchange.why_not) for exchange in EXCHANGES)
    assert len(REPLAYED) == 203


# -- without the callback: what LiteLLM's own objects say --------------------------------------------------------------


def read_by_objects(exchange: Exchange, upstream: Upstream) -> TokenUsage | None:
    """The usage as LiteLLM's objects alone have it, or the raw items of its streams."""
    way = exchange.ways[0]
    given = exchange.serve(upstream, way)
    call = model_call_of(way.kind, given)
    answer = function(way.name)(**given)
    if not exchange.rec.stream:
        return ending_of(answer, call).usage
    reader = ChunkReader(call)
    if getattr(answer, "make_call", None) is not None and answer.completion_stream is None:
        answer.fetch_sync_stream()  # as LiteLLM does at the first read
    source = getattr(answer, "completion_stream", None)
    if source is None or inspect.isgenerator(source):
        for item in answer:
            reader.read(item)
        return reader.usage

    def observed() -> Iterator[Any]:
        for item in source:
            reader.read(item)
            yield item

    answer.completion_stream = observed()
    list(answer)
    return reader.usage


@pytest.mark.skipif(not EXCHANGES, reason=REASON)
@pytest.mark.parametrize("shape", SHAPES)
def test_objects_of_litellm_are_read_as_the_provider_meant_them(shape: str, upstream: Upstream) -> None:
    """Where nothing but LiteLLM's objects can be seen, they give the same usage, apart from what is named above."""
    for exchange in REPLAYED:
        want = wanted(exchange)
        if exchange.shape != shape or want is None or exchange.id in RAISES or not sum(want.values()):
            continue
        if shape == "completions stream":
            continue  # LiteLLM's text chunks have no usage; what is below them is read
        gc.collect(1)
        usage = read_by_objects(exchange, upstream)
        lost = OBJECTS_LOSE.get(exchange.id, set())
        differs = {name for name, value in want.items() if (getattr(usage, name) if usage else 0) != value}
        assert differs == lost, (exchange.id, usage)
