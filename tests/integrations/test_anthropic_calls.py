"""Whatever way Anthropic's client is asked: the same answer as without us, and one charge for what was reported."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from claude import HI, MESSAGE, STREAM, TOOL, Claude, anthropic
from conftest import Bill, ask, each, entered
from upstream import Recorded, Upstream

from vluna_llm import Vluna, call_context

Program = Callable[[Any], Any]


async def create(client: Any) -> Any:
    return await ask(client.messages.create(**MESSAGE))


async def stream(client: Any) -> Any:
    return [event async for event in each(await ask(client.messages.create(**STREAM)))]


async def helper_text(client: Any) -> Any:
    async with entered(client.messages.stream(**MESSAGE)) as events:
        return [text async for text in each(events.text_stream)]


async def helper_events(client: Any) -> Any:
    async with entered(client.messages.stream(**MESSAGE)) as events:
        return [event async for event in each(events)]


async def helper_final(client: Any) -> Any:
    async with entered(client.messages.stream(**MESSAGE)) as events:
        return await ask(events.get_final_message())


async def helper_until_done(client: Any) -> Any:
    async with entered(client.messages.stream(**MESSAGE)) as events:
        await ask(events.until_done())
        return await ask(events.get_final_text())


async def raw(client: Any) -> Any:
    response = await ask(client.messages.with_raw_response.create(**MESSAGE))
    return type(response), response.status_code, await ask(response.parse())


async def raw_stream(client: Any) -> Any:
    response = await ask(client.messages.with_raw_response.create(**STREAM))
    return type(response), [event async for event in each(await ask(response.parse()))]


async def raw_of_the_client(client: Any) -> Any:
    return await ask((await ask(client.with_raw_response.messages.create(**MESSAGE))).parse())


async def streaming_response(client: Any) -> Any:
    async with entered(client.messages.with_streaming_response.create(**MESSAGE)) as response:
        return type(response), json.loads(await ask(response.read()))


async def streaming_response_lines(client: Any) -> Any:
    async with entered(client.messages.with_streaming_response.create(**STREAM)) as response:
        return [line async for line in each(response.iter_lines())]


async def beta(client: Any) -> Any:
    return await ask(client.beta.messages.create(**MESSAGE))


async def beta_stream(client: Any) -> Any:
    return [event async for event in each(await ask(client.beta.messages.create(**STREAM)))]


async def beta_helper(client: Any) -> Any:
    async with entered(client.beta.messages.stream(**MESSAGE)) as events:
        return await ask(events.get_final_message())


async def parse(client: Any) -> Any:
    import pydantic

    class Answer(pydantic.BaseModel):
        answer: int

    message = await ask(client.beta.messages.parse(**MESSAGE, output_format=Answer))
    return message.parsed_output.answer


async def with_options(client: Any) -> Any:
    return await create(client.with_options(timeout=9))


async def with_copy(client: Any) -> Any:
    return await create(client.copy(default_headers={"x-tenant": "acme"}))


async def path_by_hand(client: Any) -> Any:
    return await ask(client.post("/v1/messages", body=MESSAGE, cast_to=object))


async def content_blocks_handed_back(client: Any) -> Any:
    """What the SDK answered goes into the next request as it is, and blocks may come from an iterator."""
    blocks = [anthropic.types.TextBlock(type="text", text="a lighthouse warns ships", citations=None)]
    turns = [*HI, {"role": "assistant", "content": blocks}, {"role": "user", "content": iter([_text("go on")])}]
    return await ask(client.messages.create(**{**MESSAGE, "messages": iter(turns)}))


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


WAYS = [
    create,
    stream,
    helper_text,
    helper_events,
    helper_final,
    helper_until_done,
    raw,
    raw_stream,
    raw_of_the_client,
    streaming_response,
    streaming_response_lines,
    beta,
    beta_stream,
    beta_helper,
    parse,
    with_options,
    with_copy,
    path_by_hand,
    content_blocks_handed_back,
]
ways = pytest.mark.parametrize("program", WAYS, ids=lambda one: one.__name__)


@ways
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_the_same_answer_and_one_charge(
    program: Program, encoding: str, claude: Claude, vluna: Vluna, provider: Upstream, billed: Any
) -> None:
    """Same types, events and values as the bare client; 100 tokens read (40 of them cached, 24 written) and 20 made."""
    provider.encoding = encoding
    bare = claude.run(program, claude.bare())
    sent = provider.requests.pop()
    answers: list[Any] = []
    bill: Bill = billed(vluna, lambda: answers.append(claude.run(program, vluna.wrap(claude.bare()))))
    assert repr(answers) == repr([bare])
    assert type(answers[0]) is type(bare)
    (again,) = provider.requests
    assert (again.path, again.body) == (sent.path, sent.body)
    assert {*again.headers} == {*sent.headers}
    receipt = bill.booked_once()
    assert receipt.feature_code == "anthropic.claude-sonnet-5"
    (entry,) = bill.gate.booked(bill.principal_id).entries
    assert entry.labels["response_id"] == "msg_1"


@pytest.mark.parametrize("behaviour", ["ok", "thinking", "searched", "old_delta", "length", "json"])
@pytest.mark.parametrize("program", [create, stream, helper_events, beta_stream], ids=lambda one: one.__name__)
def test_what_an_answer_holds_does_not_change_what_is_charged(
    program: Program, behaviour: str, claude: Claude, vluna: Vluna, provider: Upstream, billed: Any
) -> None:
    """Thinking, a server tool, the short usage of older models, an answer cut off by ``max_tokens``."""
    if behaviour == "json" and program is not create:
        pytest.skip("a stream that is JSON is no stream to the SDK")
    provider.behaviour = behaviour
    bare = claude.run(program, claude.bare())
    answers: list[Any] = []
    bill: Bill = billed(vluna, lambda: answers.append(claude.run(program, vluna.wrap(claude.bare()))))
    assert repr(answers) == repr([bare])
    bill.booked_once()


def test_the_parts_of_the_usage_are_told_apart(claude: Claude, vluna: Vluna, customer: str) -> None:
    """Anthropic gives what was cached beside the input; here it is part of it (design rule 13)."""
    with call_context(principal_id=customer) as scope:
        claude.run(stream, vluna.wrap(claude.bare()))
    usage = scope.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (100, 20, 120)
    assert (usage.cached_tokens, usage.cache_write_tokens) == (40, 24)


def test_an_answer_without_usage_is_estimated(claude: Claude, vluna: Vluna, provider: Upstream, billed: Any) -> None:
    """Rule 5: no usage is not no work."""
    provider.behaviour = "no_usage"
    for program in (create, stream):
        bill: Bill = billed(vluna, lambda program=program: claude.run(program, vluna.wrap(claude.bare())))
    assert [receipt.usage_source for receipt in bill.receipts] == ["estimated"]
    assert [entry.labels["usage_source"] for entry in bill.gate.booked(bill.principal_id).entries] == ["estimated"] * 2


# -- more than one model call ------------------------------------------------------------------------------------------


async def tool_runner(client: Any) -> Any:
    @_tool(client)
    def look_up() -> str:
        """Looks it up."""
        return "it is 42"

    runner = client.beta.messages.tool_runner(**MESSAGE, tools=[look_up])
    return [message.stop_reason async for message in each(runner)]


async def tool_runner_streamed(client: Any) -> Any:
    @_tool(client)
    def look_up() -> str:
        """Looks it up."""
        return "it is 42"

    runner = client.beta.messages.tool_runner(**MESSAGE, tools=[look_up], stream=True)
    seen = []
    async for events in each(runner):
        seen.append((await ask(events.get_final_message())).stop_reason)
    return seen


def _tool(client: Any) -> Any:
    """The decorator for the client's colour."""
    if not isinstance(client, anthropic.AsyncAnthropic):
        return anthropic.beta_tool

    def decorate(function: Callable[[], str]) -> Any:
        async def look_up() -> str:
            return function()

        look_up.__doc__ = function.__doc__
        return anthropic.beta_async_tool(look_up)

    return decorate


def test_every_model_call_of_a_tool_runner_is_its_own(claude: Claude, vluna: Vluna, billed: Any) -> None:
    """Two turns: two leases, two charges."""
    stops: list[Any] = []
    bill: Bill = billed(vluna, lambda: stops.append(claude.run(tool_runner, vluna.wrap(claude.bare()))))
    assert stops == [["tool_use", "end_turn"]]
    entries = bill.gate.booked(bill.principal_id).entries
    assert [(entry.kind, entry.quantity) for entry in entries] == [("commit", 120)] * 2
    assert [lease.state for lease in bill.gate.leases(bill.principal_id)] == ["closed"] * 2


def test_a_streamed_tool_runner_is_metered(claude: Claude, vluna: Vluna, billed: Any) -> None:
    """Its turns pass through the same place."""
    bare = claude.run(tool_runner_streamed, claude.bare())
    stops: list[Any] = []
    bill: Bill = billed(vluna, lambda: stops.append(claude.run(tool_runner_streamed, vluna.wrap(claude.bare()))))
    assert stops == [bare]
    assert [entry.quantity for entry in bill.gate.booked(bill.principal_id).entries] == [120] * len(bare)


def test_tools_of_the_request_are_no_server_tools(claude: Claude, vluna: Vluna, billed: Any) -> None:
    """A call of a tool is an answer like any other."""

    async def program(client: Any) -> Any:
        return (await ask(client.messages.create(**MESSAGE, tools=[TOOL]))).content[0].name

    bill: Bill = billed(vluna, lambda: claude.run(program, vluna.wrap(claude.bare())))
    bill.booked_once()


# -- what is free, and what is not metered -----------------------------------------------------------------------------


async def count_tokens(client: Any) -> Any:
    return await ask(client.messages.count_tokens(model="claude-sonnet-5", messages=HI))


async def models(client: Any) -> Any:
    return [model async for model in each(client.models.list())]


async def files(client: Any) -> Any:
    return [file async for file in each(client.beta.files.list())]


async def an_agents_definition(client: Any) -> Any:
    return await ask(client.post("/v1/agents", body={"model": "claude-sonnet-5", "name": "a"}, cast_to=object))


@pytest.mark.parametrize("program", [count_tokens, models, files, an_agents_definition], ids=lambda one: one.__name__)
def test_what_costs_nothing_is_not_asked_for(
    program: Program, claude: Claude, make_vluna: Any, caplog: pytest.LogCaptureFixture, billed: Any
) -> None:
    """Neither the gate nor ``on_unmetered`` hears of it."""
    vluna = make_vluna(on_unmetered="deny")
    bill: Bill = billed(vluna, lambda: claude.run(program, vluna.wrap(claude.bare())))
    bill.nothing()
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING and one.name.startswith("vluna")]


async def batch(client: Any) -> Any:
    return await ask(client.messages.batches.create(requests=[{"custom_id": "1", "params": MESSAGE}]))


async def session(client: Any) -> Any:
    return await ask(client.post("/v1/sessions", body={"agent": "agent_1"}, cast_to=object))


async def nobody_knows_it(client: Any) -> Any:
    with contextlib.suppress(anthropic.NotFoundError):
        await ask(client.post("/v1/rerank", body={"model": "reranker"}, cast_to=object))


UNMETERED = [(batch, "messages.batches"), (session, "sessions"), (nobody_knows_it, "rerank")]


@pytest.mark.parametrize(("program", "what"), UNMETERED, ids=[what for _, what in UNMETERED])
def test_what_is_not_metered_is_said(
    program: Program,
    what: str,
    claude: Claude,
    vluna: Vluna,
    make_vluna: Any,
    provider: Upstream,
    caplog: pytest.LogCaptureFixture,
    billed: Any,
) -> None:
    """``warn``: it runs and is told; ``deny``: it is not sent (design rule 18)."""
    bill: Bill = billed(vluna, lambda: claude.run(program, vluna.wrap(claude.bare())))
    bill.nothing()
    assert f"anthropic.{what} costs money" in caplog.text
    provider.requests.clear()
    denying = make_vluna(on_unmetered="deny")
    with pytest.raises(Exception, match="VLUNA_LLM_ON_UNMETERED"):
        billed(denying, lambda: claude.run(program, denying.wrap(claude.bare())))
    assert provider.requests == []


def test_legacy_completions_report_nothing_and_are_estimated(claude: Claude, vluna: Vluna, billed: Any) -> None:
    """Text Completions never report usage; the SDK dropped them in 1.0, servers did not."""

    async def program(client: Any) -> Any:
        body = {"model": "claude-2.1", "prompt": "\n\nHuman: hi\n\nAssistant:", "max_tokens_to_sample": 10}
        if hasattr(client, "completions"):
            return (await ask(client.completions.create(**body))).completion
        return (await ask(client.post("/v1/complete", body=body, cast_to=object)))["completion"]

    bill: Bill = billed(vluna, lambda: claude.run(program, vluna.wrap(claude.bare())))
    bill.booked_an_estimate()


# -- side by side, and recorded ----------------------------------------------------------------------------------------


def test_threads_do_not_see_each_others_calls(
    vluna: Vluna, provider: Upstream, shared_gate: Any, customer: str
) -> None:
    """One client, many threads: each call is charged to who made it."""
    client = vluna.wrap(Claude(False, provider).bare())

    def work(number: int) -> None:
        with call_context(principal_id=f"{customer}-{number}") as scope:
            for _ in range(5):
                list(client.messages.create(**STREAM))
                client.messages.create(**MESSAGE)
            assert scope.wait(10)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(6):
        entries = shared_gate.booked(f"{customer}-{number}").entries
        assert [entry.quantity for entry in entries] == [120] * 10


def test_the_snippet_of_the_readme_runs_as_it_stands(provider: Upstream, shared_gate: Any, tmp_path: Path) -> None:
    """It charges the customer whom it names, and warns of nothing."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    (shown,) = [snippet for snippet in snippets if "anthropic.Anthropic()" in snippet]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLUNA_", "ANTHROPIC_"))}
    settings = {"ANTHROPIC_BASE_URL": provider.anthropic_base, "ANTHROPIC_API_KEY": "k", "HOME": str(tmp_path)}
    environment = {**kept, **shared_gate.env(), **settings, "XDG_STATE_HOME": str(tmp_path)}
    before = shared_gate.booked("customer_123").charged_xusd
    done = subprocess.run(
        [sys.executable, "-c", shown], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    charged = shared_gate.booked("customer_123").charged_xusd - before
    assert done.stdout.startswith("word0 word1")
    assert done.stdout.endswith(f" {charged} XUSD charged for 120 tokens, 40 cached\n")
    assert charged > 0


def _of_usage_tests(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "usage" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"_usage_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_shared = _of_usage_tests("conftest")
RECORDED = sorted(_shared.RECORDINGS.glob("*anthropic-messages-*.json")) if _shared.RECORDINGS.is_dir() else []


@pytest.mark.parametrize(
    "path",
    RECORDED or [pytest.param(None, marks=pytest.mark.skip(reason=_shared.REASON))],
    ids=[path.stem for path in RECORDED] or ["none"],
)
def test_a_recorded_answer_is_charged_as_it_says(
    path: Path, claude: Claude, vluna: Vluna, provider: Upstream, billed: Any
) -> None:
    """Real traffic, byte for byte: the numbers that the provider reported, and nothing where it reported none."""
    rec = _shared.load(path)
    status = json.loads(path.read_text(encoding="utf-8"))["response"]["status"]
    address = provider.replay(rec.id, Recorded(status, rec.content_type or "application/json", rec.body, rec.stream))
    request = {**MESSAGE, "model": (rec.request or {}).get("model") or "claude-3", "stream": rec.stream}

    async def program(client: Any) -> Any:
        try:
            answer = await ask(client.messages.create(**request))
            return [event async for event in each(answer)] if rec.stream else answer
        except anthropic.APIError as error:
            return type(error)

    bare = claude.run(program, claude.bare(base_url=address))
    answers: list[Any] = []
    with call_context() as scope:
        bill: Bill = billed(
            vluna, lambda: answers.append(claude.run(program, vluna.wrap(claude.bare(base_url=address))))
        )
    assert repr(answers) == repr([bare])
    entries = bill.gate.booked(bill.principal_id).entries
    expected = _of_usage_tests("test_recordings").expected(rec)
    if expected is None:
        assert entries == ()
        return
    assert {name: getattr(scope.usage, name) for name in expected} == expected
    assert [(entry.kind, entry.quantity) for entry in entries] == [("commit", scope.usage.total_tokens)]
    assert bill.only.usage_source == "provider"
