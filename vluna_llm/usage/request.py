"""Measuring a request: the few numbers from which tokens are guessed. No text leaves this module.

The published figures behind the priors: about four characters of English per token; three to four tokens of format per
message; 85 tokens for an image and 170 more per tile of 512 pixels (OpenAI, vision); ten tokens per second of audio
(OpenAI, speech); the output tokens of an image by size and quality (OpenAI, image generation).
"""

from __future__ import annotations

import binascii
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_CHARS_PER_TOKEN: Final = 4.6
_TOOL_CHARS_PER_TOKEN: Final = 7.0
"""Definitions are sent as JSON and read by the model in a much shorter form."""
_MESSAGE_TOKENS: Final = 3.6
_BASE_TOKENS: Final = 3.0
_IMAGE_TOKENS: Final = 765.0
_LOW_IMAGE_TOKENS: Final = 85.0
_FILE_TOKENS: Final = 1_500.0
_FILE_CHARS_PER_TOKEN: Final = 24.0
_BUILT_IN_TOOL_TOKENS: Final = 1_500.0
_AUDIO_TOKENS_PER_SECOND: Final = 10.0
_MOST_NODES: Final = 20_000

_IMAGE_OUTPUT: Final = {"low": 272, "medium": 1056, "high": 4160}
_SMALL_LIMIT: Final = 256
_TYPICAL_OUTPUT: Final = 200
_TYPICAL_TOOL_OUTPUT: Final = 60
_TYPICAL_REASONING: Final = 250
_REASONING_MODEL: Final = re.compile(r"(?:\A|/|-|\.)(?:o[1-9]\b|gpt-5|gpt-oss|.*(?:reason|think|r1\b))", re.IGNORECASE)

_IMAGES: Final = frozenset({"image_url", "input_image", "image"})
_FILES: Final = frozenset({"file", "input_file", "document"})
_AUDIO: Final = frozenset({"input_audio", "audio"})
_TEXT_MEMBERS: Final = (
    "content",
    "text",
    "parts",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "input",
    "output",
    "thinking",
    "summary",
    "refusal",
)
_KINDS: Final = {"chat": 0, "responses": 1, "completions": 2, "messages": 3}
_OWN_TOOLS: Final = frozenset({"function", "custom", None})


@dataclass(frozen=True, slots=True)
class Measures:
    """What was counted in a request.

    ``vector`` is (format, text, tools given or not, tool definitions, images and audio and files, built-in tools), each
    but the third in tokens by the published figures.
    """

    vector: tuple[float, float, float, float, float, float]
    choices: int = 1
    limit: int | None = None
    typical_output: int = _TYPICAL_OUTPUT
    produces: bool = True
    exact_input: int | None = None
    kind: int = 0


class _Count:
    __slots__ = ("media", "messages", "nodes", "text")

    def __init__(self) -> None:
        self.text = 0.0
        self.media = 0.0
        self.messages = 0
        self.nodes = 0

    def add_text(self, text: str) -> None:
        self.text += text_tokens(text)

    def walk(self, value: object) -> None:
        if isinstance(value, str):
            self.text += text_tokens(value)
            return
        self.nodes += 1
        if self.nodes > _MOST_NODES:
            return
        if isinstance(value, (list, tuple)):
            for item in value:
                self.walk(item)
        elif isinstance(value, Mapping):
            kind = value.get("type")
            if kind in _IMAGES or "inlineData" in value or "inline_data" in value:
                self.media += _image(value)
            elif kind in _AUDIO:
                self.media += _audio(value)
            elif kind in _FILES:
                self.media += _file(value)
            else:
                for member in _TEXT_MEMBERS:
                    if member in value:
                        self.walk(value[member])


def measure_request(body: Mapping[str, Any] | None, kind: str) -> Measures:
    """Count what a request asks for. Never raises: what is odd counts little.

    ``kind`` is an API as `Estimator.predict` lists them; what follows a ``.`` or ``/`` (``images.generations``) says
    nothing more here.
    """
    kind = kind.replace("/", ".").partition(".")[0]
    try:
        if not isinstance(body, Mapping):
            return Measures((_BASE_TOKENS, 20.0, 0.0, 0.0, 0.0, 0.0))
        if kind == "embeddings":
            return _embeddings(body)
        if kind == "images":
            return _images(body)
        return _chat(body, _KINDS.get(kind, 0))
    except Exception:  # a caller's own classes may do anything
        return Measures((_BASE_TOKENS, 20.0, 0.0, 0.0, 0.0, 0.0))


def text_tokens(text: str) -> float:
    """Tokens of a text by its size: characters and words for ASCII, more where characters take several bytes."""
    size = len(text)
    words = text.count(" ") + 1
    tokens = 0.5 * size / _CHARS_PER_TOKEN + 0.5 * min(words * 1.25, size)
    if not text.isascii():
        tokens += 0.3 * (len(text.encode("utf-8", "replace")) - size)
    return tokens


def _chat(body: Mapping[str, Any], kind: int) -> Measures:
    count = _Count()
    messages = 1
    for name in ("messages", "input", "contents", "prompt"):
        given = body.get(name)
        if given is None:
            continue
        if name == "prompt" and (exact := _token_list(given)) is not None:
            return Measures(
                (_BASE_TOKENS, float(exact), 0.0, 0.0, 0.0, 0.0), _choices(body), _limit(body), exact_input=exact
            )
        count.walk(given)
        messages = len(given) if isinstance(given, (list, tuple)) else 1
        break
    for name in ("system", "instructions", "systemInstruction"):
        if (extra := body.get(name)) is not None:
            count.walk(extra)
            messages += 1
    tools = body.get("tools") or body.get("functions")
    own, built_in = _tools(tools)
    schema = body.get("response_format") or _format(body.get("text"))
    definitions = _size(own) if own else 0
    if isinstance(schema, Mapping) and schema.get("type") == "json_schema":
        definitions += _size(schema)
    has_tools = bool(own or built_in)
    limit = _limit(body)
    return Measures(
        vector=(
            _BASE_TOKENS + _MESSAGE_TOKENS * messages,
            count.text,
            1.0 if has_tools else 0.0,
            definitions / _TOOL_CHARS_PER_TOKEN,
            count.media,
            built_in * _BUILT_IN_TOOL_TOKENS,
        ),
        choices=_choices(body),
        limit=limit,
        typical_output=_typical(body, limit, has_tools) * _choices(body),
        kind=kind,
    )


def _typical(body: Mapping[str, Any], limit: int | None, has_tools: bool) -> int:
    """Output where nothing is known of the feature: a small limit is mostly reached, a large one hardly ever."""
    if limit is not None and limit <= _SMALL_LIMIT:
        return limit
    usual = _TYPICAL_TOOL_OUTPUT if has_tools else _TYPICAL_OUTPUT
    model = body.get("model")
    asked = body.get("reasoning") or body.get("reasoning_effort") or body.get("thinking")
    if asked or (isinstance(model, str) and _REASONING_MODEL.search(model[:64])):
        usual += _TYPICAL_REASONING
    return usual if limit is None else min(usual, limit)


def _limit(body: Mapping[str, Any]) -> int | None:
    limits = [
        value
        for name in ("max_completion_tokens", "max_output_tokens", "max_tokens")
        if type(value := body.get(name)) is int and 0 < value < 10**9
    ]
    return min(limits) if limits else None


def _choices(body: Mapping[str, Any]) -> int:
    choices = body.get("n")
    return min(max(choices, 1), 128) if type(choices) is int else 1


def _tools(tools: object) -> tuple[list[object], int]:
    """The caller's own definitions, and how many tools the provider runs itself (their prompts are not in sight)."""
    if not isinstance(tools, (list, tuple)):
        return [], 0
    own: list[object] = []
    for tool in tools:
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind in _OWN_TOOLS or (isinstance(tool, Mapping) and "input_schema" in tool):
            own.append(tool)
    return own, len(tools) - len(own)


def _format(text: object) -> object:
    return text.get("format") if isinstance(text, Mapping) else None


def _size(value: object) -> int:
    return len(repr(value))


def _embeddings(body: Mapping[str, Any]) -> Measures:
    given = body.get("input")
    exact = _token_list(given)
    if exact is not None:
        return Measures((0.0, float(exact), 0.0, 0.0, 0.0, 0.0), produces=False, exact_input=exact)
    count = _Count()
    count.walk(given)
    return Measures((0.0, count.text, 0.0, 0.0, count.media, 0.0), produces=False)


def _token_list(given: object) -> int | None:
    """How many tokens a prompt of token numbers has: a list of integers, or a list of such lists."""
    if not isinstance(given, (list, tuple)) or not given:
        return None
    if isinstance(given[0], int):
        return len(given)
    if isinstance(given[0], (list, tuple)):
        return sum(len(item) for item in given if isinstance(item, (list, tuple)))
    return None


def _images(body: Mapping[str, Any]) -> Measures:
    count = _Count()
    count.walk(body.get("prompt"))
    each = _IMAGE_OUTPUT.get(str(body.get("quality")), _IMAGE_OUTPUT["medium"])
    width, _, height = str(body.get("size")).partition("x")
    if width.isdigit() and height.isdigit():
        each = round(each * min(max(int(width) * int(height) / 1024**2, 0.2), 4.0))
    media = _IMAGE_TOKENS / 4 if body.get("image") else 0.0
    return Measures(
        (_BASE_TOKENS, count.text, 0.0, 0.0, media, 0.0),
        choices=_choices(body),
        typical_output=each * _choices(body),
    )


def _image(part: Mapping[str, Any]) -> float:
    source = part.get("image_url") or part.get("source") or part.get("inlineData") or part.get("inline_data")
    detail = part.get("detail")
    url: object = source
    if isinstance(source, Mapping):
        detail = source.get("detail", detail)
        url = source.get("url") or source.get("data")
    if detail == "low":
        return _LOW_IMAGE_TOKENS
    if not isinstance(url, str):
        return _IMAGE_TOKENS
    size = _png_size(url)
    if size is None:
        return _IMAGE_TOKENS
    width, height = size
    shrink = min(1.0, 2048 / max(width, height))
    shrink = min(shrink, 768 / max(min(width, height) * shrink, 1) * shrink)
    tiles = math.ceil(width * shrink / 512) * math.ceil(height * shrink / 512)
    return 85.0 + 170.0 * min(max(tiles, 1), 16)


def _png_size(url: str) -> tuple[int, int] | None:
    """Width and height of a PNG given in base64: they stand in its first 24 bytes."""
    start = url.find(",") + 1 if url.startswith("data:") else 0
    head = url[start : start + 32]
    if not head.startswith("iVBORw0KGgo"):
        return None
    try:
        raw = binascii.a2b_base64(head)
    except ValueError:
        return None
    width, height = int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")
    return (width, height) if 0 < width < 100_000 and 0 < height < 100_000 else None


def _audio(part: Mapping[str, Any]) -> float:
    source = part.get("input_audio") or part.get("audio") or part
    data = source.get("data") if isinstance(source, Mapping) else source
    if not isinstance(data, str):
        return 10 * _AUDIO_TOKENS_PER_SECOND
    wav = isinstance(source, Mapping) and source.get("format") == "wav"
    return len(data) * 0.75 / (48_000 if wav else 16_000) * _AUDIO_TOKENS_PER_SECOND


def _file(part: Mapping[str, Any]) -> float:
    source = part.get("file") or part.get("source") or part
    if isinstance(source, Mapping):
        data = source.get("file_data") or source.get("data") or source.get("text")
        if isinstance(data, str):
            return len(data) / _FILE_CHARS_PER_TOKEN
    return _FILE_TOKENS
