"""Every kind of call passes through unchanged and is settled once with the usage that the provider reported."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pydantic
import pytest
from conftest import Colour, MakeVluna, ask, each, entered
from provider import Provider

from vluna_llm import Vluna

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"model": "gpt-4o", "messages": MESSAGES}
RESPONSE = {"model": "gpt-4o", "input": "hi"}


class Answer(pydantic.BaseModel):
    """What `parse` is asked for."""

    answer: int


def show(value: Any) -> Any:
    """An answer as plain data that two runs can be compared by, with the name of its type."""
    if hasattr(value, "model_dump"):
        return type(value).__name__, value.model_dump(mode="json", warnings=False)
    return type(value).__name__, value if isinstance(value, (str, bytes, dict, list)) else ""


async def chat(client: Any) -> Any:
    return show(await ask(client.chat.completions.create(**CHAT)))


async def chat_stream(client: Any) -> Any:
    stream = await ask(client.chat.completions.create(**CHAT, stream=True))
    return type(stream).__name__, [(show(chunk), chunk.choices[0].index) async for chunk in each(stream)]


async def chat_stream_with_usage(client: Any) -> Any:
    options = {"include_usage": True}
    stream = await ask(client.chat.completions.create(**CHAT, stream=True, stream_options=options))
    return [show(chunk) async for chunk in each(stream)]


async def chat_stream_without_usage(client: Any) -> Any:
    options = {"include_usage": False}
    stream = await ask(client.chat.completions.create(**CHAT, stream=True, stream_options=options))
    return [(show(chunk), chunk.choices[0].index) async for chunk in each(stream)]


async def chat_raw(client: Any) -> Any:
    raw = await ask(client.chat.completions.with_raw_response.create(**CHAT))
    return type(raw).__name__, raw.headers["x-request-id"], show(await ask(raw.parse()))


async def chat_raw_stream(client: Any) -> Any:
    raw = await ask(client.chat.completions.with_raw_response.create(**CHAT, stream=True))
    stream = await ask(raw.parse())
    return type(raw).__name__, type(stream).__name__, [show(chunk) async for chunk in each(stream)]


async def chat_streaming_response(client: Any) -> Any:
    async with entered(client.chat.completions.with_streaming_response.create(**CHAT)) as response:
        return type(response).__name__, show(await ask(response.parse()))


async def chat_streaming_response_read(client: Any) -> Any:
    async with entered(client.chat.completions.with_streaming_response.create(**CHAT)) as response:
        return json.loads(await ask(response.read()))


async def chat_streaming_response_lines(client: Any) -> Any:
    async with entered(client.chat.completions.with_streaming_response.create(**CHAT, stream=True)) as response:
        # Where usage is asked for, the API writes "usage": null into every other chunk: parsed, that is the same.
        lines = [line.replace(',"usage":null', "") async for line in each(response.iter_lines())]
        return type(response).__name__, lines


async def chat_streaming_response_stream(client: Any) -> Any:
    async with entered(client.chat.completions.with_streaming_response.create(**CHAT, stream=True)) as response:
        stream = await ask(response.parse())
        return type(stream).__name__, [show(chunk) async for chunk in each(stream)]


async def chat_helper(client: Any) -> Any:
    async with entered(client.chat.completions.stream(**CHAT)) as stream:
        events = [event.type async for event in each(stream)]
        return type(stream).__name__, events, show(await ask(stream.get_final_completion()))


async def chat_parse(client: Any) -> Any:
    answer = await ask(client.chat.completions.parse(**CHAT, response_format=Answer))
    return type(answer).__name__, answer.choices[0].message.parsed


async def beta_chat_parse(client: Any) -> Any:
    answer = await ask(client.beta.chat.completions.parse(**CHAT, response_format=Answer))
    return type(answer).__name__, answer.choices[0].message.parsed


async def responses(client: Any) -> Any:
    return show(await ask(client.responses.create(**RESPONSE)))


async def responses_stream(client: Any) -> Any:
    stream = await ask(client.responses.create(**RESPONSE, stream=True))
    return type(stream).__name__, [show(event) async for event in each(stream)]


async def responses_helper(client: Any) -> Any:
    async with entered(client.responses.stream(**RESPONSE)) as stream:
        events = [event.type async for event in each(stream)]
        return type(stream).__name__, events, show(await ask(stream.get_final_response()))


async def responses_parse(client: Any) -> Any:
    answer = await ask(client.responses.parse(**RESPONSE, text_format=Answer))
    return type(answer).__name__, answer.output_parsed


async def responses_raw(client: Any) -> Any:
    raw = await ask(client.responses.with_raw_response.create(**RESPONSE))
    return type(raw).__name__, show(await ask(raw.parse()))


async def embeddings(client: Any) -> Any:
    return show(await ask(client.embeddings.create(model="text-embedding-3-small", input="hi")))


async def completions(client: Any) -> Any:
    return show(await ask(client.completions.create(model="davinci", prompt="hi")))


async def completions_stream(client: Any) -> Any:
    stream = await ask(client.completions.create(model="davinci", prompt="hi", stream=True))
    return [(show(chunk), chunk.choices[0].text) async for chunk in each(stream)]


async def images(client: Any) -> Any:
    return show(await ask(client.images.generate(model="gpt-image-1", prompt="a cat")))


async def image_edit(client: Any) -> Any:
    picture = ("cat.png", io.BytesIO(b"png"), "image/png")
    return show(await ask(client.images.edit(model="gpt-image-1", image=picture, prompt="a hat")))


async def transcription(client: Any) -> Any:
    sound = ("hi.wav", io.BytesIO(b"RIFF"), "audio/wav")
    return show(await ask(client.audio.transcriptions.create(model="gpt-4o-transcribe", file=sound)))


async def raw_post(client: Any) -> Any:
    return show(await ask(client.post("/chat/completions", body=dict(CHAT), cast_to=object)))


async def raw_post_to_a_full_url(client: Any) -> Any:
    url = f"{str(client.base_url).rstrip('/')}/chat/completions?trace=1"
    return show(await ask(client.post(url, body=dict(CHAT), cast_to=object)))


async def raw_post_of_bytes(client: Any) -> Any:
    if "content" not in inspect.signature(client.post).parameters:  # 2.0 takes no bytes
        return show(await ask(client.post("/chat/completions", body=dict(CHAT), cast_to=object)))
    body = json.dumps(CHAT).encode()
    options = {"headers": {"Content-Type": "application/json"}}
    return show(await ask(client.post("/chat/completions", content=body, cast_to=object, options=options)))


async def through_with_raw_response(client: Any) -> Any:
    raw = await ask(client.with_raw_response.chat.completions.create(**CHAT))
    return type(raw).__name__, show(await ask(raw.parse()))


async def through_with_streaming_response(client: Any) -> Any:
    async with entered(client.with_streaming_response.chat.completions.create(**CHAT)) as response:
        return type(response).__name__, show(await ask(response.parse()))


async def model_in_extra_body(client: Any) -> Any:
    extra = {"model": "gpt-4o-extra", "stream_options": {"include_obfuscation": False}}
    stream = await ask(client.chat.completions.create(**CHAT, stream=True, extra_body=extra))
    return [show(chunk) async for chunk in each(stream)]


Program = Callable[[Any], Awaitable[Any]]


@dataclass(frozen=True)
class Row:
    program: Program
    tokens: int = 120
    feature: str = "openai.gpt-4o"


ROWS = [
    Row(chat),
    Row(chat_stream),
    Row(chat_stream_with_usage),
    Row(chat_stream_without_usage),
    Row(chat_raw),
    Row(chat_raw_stream),
    Row(chat_streaming_response),
    Row(chat_streaming_response_read),
    Row(chat_streaming_response_lines),
    Row(chat_streaming_response_stream),
    Row(chat_helper),
    Row(chat_parse),
    Row(beta_chat_parse),
    Row(responses),
    Row(responses_stream),
    Row(responses_helper),
    Row(responses_parse),
    Row(responses_raw),
    Row(embeddings, 8, "openai.text-embedding-3-small"),
    Row(completions, feature="openai.davinci"),
    Row(completions_stream, feature="openai.davinci"),
    Row(images, 1050, "openai.gpt-image-1"),
    Row(image_edit, 1050, "openai.gpt-image-1"),
    Row(transcription, 59, "openai.gpt-4o-transcribe"),
    Row(raw_post),
    Row(raw_post_to_a_full_url),
    Row(raw_post_of_bytes),
    Row(through_with_raw_response),
    Row(through_with_streaming_response),
    Row(model_in_extra_body, feature="openai.gpt-4o-extra"),
]

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.program.__name__)


@rows
def test_a_call_is_settled_once_with_the_reported_usage(row: Row, colour: Colour, vluna: Vluna, billed: Any) -> None:
    """One lease, one commit, the provider's numbers, the feature of the model that was asked for."""
    bill = billed(vluna, lambda: colour.run(row.program, vluna.wrap(colour.bare())))
    assert bill.booked_once(row.tokens).feature_code == row.feature


@rows
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_a_call_gives_what_the_unwrapped_client_gives(
    row: Row, encoding: str, colour: Colour, make_vluna: MakeVluna, provider: Provider, customer: str
) -> None:
    """Same program, bare and wrapped: same types, same chunks, same values, also where the answer comes compressed."""
    provider.encoding = encoding
    expected = colour.run(row.program, colour.bare())
    provider.responses.clear()
    vluna = make_vluna()
    assert colour.run(row.program, vluna.bind(colour.bare(), principal_id=customer)) == expected


@pytest.mark.parametrize("row", ROWS[:20], ids=lambda row: row.program.__name__)
def test_compressed_answers_are_read(row: Row, colour: Colour, vluna: Vluna, provider: Provider, billed: Any) -> None:
    """Usage is read from decoded bytes, wherever the encoding is undone."""
    provider.encoding = "gzip"
    bill = billed(vluna, lambda: colour.run(row.program, vluna.wrap(colour.bare())))
    bill.booked_once(row.tokens)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.program.__name__)
def test_off_changes_no_byte_of_the_request(
    row: Row, colour: Colour, vluna: Vluna, provider: Provider, billed: Any
) -> None:
    """With ``mode="off"`` the gate is not asked and the provider is asked exactly what the caller asked."""
    colour.run(row.program, colour.bare())
    vluna.mode = "off"
    bill = billed(vluna, lambda: colour.run(row.program, vluna.wrap(colour.bare())))
    bill.nothing()
    bare, wrapped = provider.requests
    if not isinstance(bare.body, bytes):  # a multipart body has a random boundary
        assert wrapped.body == bare.body


def test_the_callers_own_dictionaries_are_not_changed(colour: Colour, vluna: Vluna, billed: Any) -> None:
    """``include_usage`` is set in a copy."""
    options: dict[str, Any] = {"include_obfuscation": False}
    extra: dict[str, Any] = {"stream_options": options}

    async def program(client: Any) -> None:
        for kwargs in ({"stream_options": options}, {"extra_body": extra}):
            stream = await ask(client.chat.completions.create(**CHAT, stream=True, **kwargs))
            async for _ in each(stream):
                pass

    billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    assert options == {"include_obfuscation": False}
    assert extra == {"stream_options": options}


async def _list_models(client: Any) -> Any:
    async for _ in each(client.models.list()):
        pass


async def _moderate(client: Any) -> Any:
    return await ask(client.moderations.create(input="hi"))


@pytest.mark.parametrize("program", [_list_models, _moderate])
def test_what_costs_nothing_asks_nobody(program: Program, colour: Colour, vluna: Vluna, billed: Any) -> None:
    """Listing and moderating need no principal, no lease and no warning."""
    bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    bill.nothing()


def test_a_transcript_as_text_is_billed_by_estimate(colour: Colour, vluna: Vluna, billed: Any) -> None:
    """Subtitles say nothing about usage; the work was done all the same (design rule 5)."""

    async def program(client: Any) -> Any:
        sound = ("hi.wav", io.BytesIO(b"RIFF"), "audio/wav")
        return await ask(client.audio.transcriptions.create(model="whisper-1", file=sound, response_format="srt"))

    bill = billed(vluna, lambda: colour.run(program, vluna.wrap(colour.bare())))
    assert bill.only.usage_source == "estimated"
