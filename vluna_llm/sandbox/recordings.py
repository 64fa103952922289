"""The recorded model answers that the replay upstream serves, and the rule by which it picks one.

The recordings come from servers that really ran (`cassettes/README.md` says which and how). They are read from one
gzipped JSON file, which a checkout has in `cassettes/` and an installed wheel inside the package; no YAML reader is
needed.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

_PACKAGED = Path(__file__).resolve().parents[1] / "_cassettes" / "bundle.json.gz"
_CHECKOUT = Path(__file__).resolve().parents[2] / "cassettes" / "bundle.json.gz"

_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_AZURE = re.compile(r"^/openai/deployments/(?P<model>[^/]+)(?P<rest>/.*)$")
# What makes two requests the same question; sampling options and stream options do not.
_QUESTION = ("messages", "input", "prompt", "system", "instructions", "tools", "response_format", "text")


class ReportedTokens(NamedTuple):
    """What a recording's server itself reported, in tokens: all input, the cached part of it, all output."""

    input: int
    cached: int
    output: int


@dataclass(frozen=True)
class Recording:
    """One recorded exchange. ``usage`` is the server's own usage object, None where it reported none."""

    cassette: str
    interaction: int
    server: str
    server_version: str
    recorded: str
    method: str
    path: str
    model: str | None
    stream: bool
    include_usage: bool | None
    status: int
    content_type: str
    usage: Mapping[str, Any] | None
    tokens: ReportedTokens | None
    request: Mapping[str, Any] | None = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """``server/scenario#number``: what the ``x-replay-cassette`` header takes and the answer's headers tell."""
        return f"{self.cassette}#{self.interaction}"

    @cached_property
    def question(self) -> str:
        """What was asked, in a form that can be compared."""
        return question_of(self.request)

    @cached_property
    def parts(self) -> tuple[bytes, ...]:
        """The body as it is sent: an event stream cut behind each blank line, anything else whole."""
        if not self.content_type.startswith("text/event-stream"):
            return (self.body,)
        found, start = [], 0
        for match in _EVENT_END.finditer(self.body):
            found.append(self.body[start : match.end()])
            start = match.end()
        return (*found, self.body[start:]) if self.body[start:] else tuple(found)

    @cached_property
    def parts_without_usage(self) -> tuple[bytes, ...]:
        """The same without the chunk that only carries usage, as servers stream to callers who did not ask for it."""
        return tuple(part for part in self.parts if not _is_usage_chunk(part))

    def usage_complete_after(self, parts: tuple[bytes, ...]) -> int | None:
        """How many of these parts have to be sent until the usage is out; None where it is not in them."""
        if self.usage is None:
            return None
        carrying = [number for number, part in enumerate(parts, start=1) if _carries_usage(part)]
        return carrying[-1] if carrying else None


def _carries_usage(part: bytes) -> bool:
    return re.search(rb'"usage"\s*:\s*\{', part) is not None


def _is_usage_chunk(part: bytes) -> bool:
    if not part.startswith(b"data: {") or not _carries_usage(part):
        return False
    chunk = json.loads(part[len(b"data: ") :])
    return chunk.get("choices") == [] and isinstance(chunk.get("usage"), dict)


def question_of(body: Mapping[str, Any] | None) -> str:
    """The part of a request body that makes it the question it is, as canonical JSON."""
    asked = {key: body[key] for key in _QUESTION if body.get(key) is not None} if body else {}
    return json.dumps(asked, sort_keys=True)


def load_recordings(path: Path | None = None) -> tuple[Recording, ...]:
    """Read the recordings: from ``path``, else from the installed package, else from the checkout.

    Raises:
        FileNotFoundError: none of these has the file.
    """
    path = path or next((place for place in (_PACKAGED, _CHECKOUT) if place.is_file()), None)
    if path is None:
        raise FileNotFoundError("no recordings: bundle.json.gz is neither in the package nor in cassettes/")
    return tuple(_recording(one) for one in json.loads(gzip.decompress(path.read_bytes())))


def _recording(one: Mapping[str, Any]) -> Recording:
    tokens = one["tokens"]
    return Recording(
        cassette=one["cassette"],
        interaction=one["interaction"],
        server=one["server"],
        server_version=one["server_version"],
        recorded=one["recorded"],
        method=one["method"],
        path=one["path"],
        model=one["model"],
        stream=one["stream"],
        include_usage=one["include_usage"],
        status=one["status"],
        content_type=one["content_type"],
        usage=one["usage"],
        tokens=None if tokens is None else ReportedTokens(tokens["input"], tokens["cached"], tokens["output"]),
        request=one["request"],
        headers=one["headers"],
        body=one["body"].encode(),
    )


class Choice(NamedTuple):
    """A recording and the parts of it that answer this request."""

    recording: Recording
    parts: tuple[bytes, ...]


class Repertoire:
    """Picks the recording that answers a request.

    1. A scenario that the request names (``llama-server/chat_plain`` or ``llama-server/chat_plain#2``) is taken as it
       was recorded, whatever the model; within it path and ``stream`` decide, several take turns.
    2. Else a recording of the same question to the same model; a recorded error answers the very same request only.
    3. Else the successful recordings of the same path, ``stream`` and model take turns.

    A stream is taken from those recorded with ``include_usage``; a caller who did not ask for usage gets it without
    the usage-only chunk. That is the one change that is ever made to a recording, and never made under rule 1.
    Not safe for several threads: the upstream calls it from its own event loop only.
    """

    def __init__(self, recordings: Iterable[Recording]) -> None:
        self.recordings = tuple(recordings)
        self._turns: dict[object, int] = {}

    def choose(
        self, method: str, path: str, body: Mapping[str, Any] | None, scenario: str | None = None
    ) -> Choice | None:
        """The recording for this request, None where there is none."""
        body = body or {}
        model = body.get("model")
        azure = _AZURE.match(path)
        if azure:
            model, path = azure["model"], f"/v1{azure['rest']}"
        stream = body.get("stream") is True
        asked = (body.get("stream_options") or {}).get("include_usage") is True
        here = [one for one in self.recordings if (one.method, one.path, one.stream) == (method, path, stream)]
        if scenario is not None:
            named = [one for one in here if scenario in (one.cassette, one.name)]
            turn = self._next(("scenario", scenario, path, stream), named)
            return None if turn is None else Choice(turn, turn.parts)
        here = [one for one in here if one.model == model and _can_answer(one, asked=asked)]
        question = question_of(body)
        same = [one for one in here if one.question == question and _repeats(one, body)] if body else []
        succeeded = [one for one in here if one.status < 400]
        pool = same or succeeded
        if stream and any(one.include_usage for one in pool):
            pool = [one for one in pool if one.include_usage]
        turn = self._next((path, stream, model, question if same else None), pool)
        if turn is None:
            return None
        hide = stream and turn.include_usage is True and not asked
        return Choice(turn, turn.parts_without_usage if hide else turn.parts)

    def _next(self, key: object, pool: list[Recording]) -> Recording | None:
        if not pool:
            return None
        turn = self._turns.get(key, 0)
        self._turns[key] = turn + 1
        return pool[turn % len(pool)]


def _repeats(one: Recording, body: Mapping[str, Any]) -> bool:
    """An error may lie in any part of the request; a 401 lies in the key, which no recording has."""
    return one.status < 400 or (one.status != 401 and one.request == body)


def _can_answer(one: Recording, *, asked: bool) -> bool:
    """A chat stream recorded without asking for usage says nothing about what a caller gets who asks for it."""
    needs_asking = one.stream and one.path.endswith("/completions")
    return not (needs_asking and asked and one.include_usage is not True)
