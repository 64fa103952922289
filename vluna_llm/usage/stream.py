"""Reading usage from a stream of bytes while it passes: incremental, cut anywhere, almost free per chunk.

A reader is fed the decoded bytes of one response in whatever pieces they arrive. Most pieces of a stream are one event
that says nothing but a few more characters of text; those are recognised by comparing bytes, without JSON:

* Chat Completions: an event that begins and ends like an earlier one that said nothing else, with a JSON string free
  of quotes in between (and another where OpenAI pads its events: ``obfuscation``), differs from it in the text only.
* Responses, Anthropic: the event's own name says that it is a delta.
* otherwise: an event without any of the names that matter (usage counts, finish reason, error, ``[DONE]``).

Everything that may matter is parsed; what it means is ruled in `facts` and `normalize`. Event boundaries are those of
the event-stream format: a blank line, with LF, CRLF or CR line ends. Nothing is kept but the event in progress.
"""

from __future__ import annotations

import re
from typing import Final

from .events import EventReader
from .facts import generated_characters
from .framing import BOM, BOUNDARY, Framing, announced, decode, payload_of, sniff

_LARGEST: Final = 32 * 1024 * 1024
_KEPT_HEAD: Final = 64 * 1024
_KEPT_TAIL: Final = 1024 * 1024
_LARGEST_USAGE_CHUNK: Final = 64 * 1024
_SAMPLE_FIRST: Final = 1024
_SAMPLE_EVERY: Final = 16 * 1024
"""Bytes of events that are not counted, after which one of them is."""
_BYTES_PER_CHARACTER: Final = 60
"""Of an event, before any was measured: a delta of a few characters in some 250 bytes."""
_RELEARN: Final = 16
_NEVER: Final = b"\x00"
"""No JSON begins with it: the template that matches nothing."""

_QUIET: Final = (
    b"event: response.output_text.delta\n",
    b"event: content_block_delta\n",
    b"event: response.function_call_arguments.delta\n",
    b"event: response.reasoning_summary_text.delta\n",
    b"event: response.reasoning_text.delta\n",
    b'data: {"type":"response.output_text.delta",',
    b'data: {"type":"response.function_call_arguments.delta",',
    b'data: {"type":"response.reasoning_text.delta",',
)
"""How an event begins that is a delta by its own name and can carry neither usage nor an end."""

_HAS_CHOICES: Final = re.compile(rb'"choices"\s*:\s*\[\s*[^\]\s]')
_MAY_BE_USAGE_CHUNK: Final = re.compile(rb"\s*(?:\Z|[:dier])")
_TEXT_MEMBER: Final = re.compile(rb'"(?:content|reasoning_content|reasoning|text|arguments)": ?"')
_PADDING: Final = re.compile(rb'"obfuscation": ?"')


class StreamReader(EventReader):
    """Follows one response and says, at any time and at no cost, what it has reported so far.

    ``feed`` decoded bytes in any pieces and call ``end`` when there are no more; a body that is plain JSON is kept and
    read at ``end``. What was reported is in the attributes of `EventReader`. The reader never raises on what it is fed.
    It is not made for two threads at once.
    """

    __slots__ = (
        "_framing",
        "_hide",
        "_learned_at",
        "_middle",
        "_middle_length",
        "_passed",
        "_pending",
        "_prefix",
        "_prefix_length",
        "_quiet",
        "_quiet_bytes",
        "_sample_at",
        "_sampled_bytes",
        "_sampled_characters",
        "_spare",
        "_suffix",
        "_suffix_length",
        "_template",
        "_templates_left",
    )

    def __init__(self, url: str, content_type: str | None, *, hide_usage_chunk: bool = False) -> None:
        super().__init__(url)
        self._framing: Framing = announced(content_type)
        self._hide = hide_usage_chunk
        self._pending = bytearray()  # the event (or body) in progress
        self._passed = 0  # how much of it the caller has been given already, where something may have to be hidden
        # The template of a chat event that only adds text: prefix, a string, [middle, a string,] suffix.
        self._template = self._prefix = _NEVER  # _prefix is the template while its short cut is open
        self._prefix_length = 1
        self._quiet: tuple[bytes, ...] = (_NEVER,)
        self._middle = b""
        self._middle_length = 0
        self._suffix = _NEVER
        self._suffix_length = 1
        self._spare: tuple[bytes, bytes, bytes] = (_NEVER, b"", _NEVER)
        self._templates_left = _RELEARN
        self._learned_at = 0
        # Bytes of events whose characters were not counted, with a sample to scale them by.
        self._quiet_bytes = 0
        self._sample_at = _SAMPLE_FIRST
        self._sampled_bytes = 0
        self._sampled_characters = 0

    # -- feeding ----------------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> bool:
        """Read the next piece; True where usage, finish, failure or the end became known with it."""
        if data.startswith(self._prefix):
            end = data.find(b'"', self._prefix_length)
            if self._middle_length:
                if data.startswith(self._middle, end):
                    start = end + self._middle_length
                    if data.find(b'"', start) + self._suffix_length == len(data) and data.endswith(self._suffix):
                        self._characters += end - self._prefix_length
                        return False
            elif end + self._suffix_length == len(data) and data.endswith(self._suffix):
                self._characters += end - self._prefix_length
                return False
        elif (
            data.startswith(self._quiet)
            and data.endswith(b"\n\n")
            and data.find(b"\n", data.find(b"data:")) == len(data) - 2
            and self._quiet_bytes < self._sample_at
        ):
            self._quiet_bytes += len(data)
            return False
        return self._feed(data, None)

    def pass_through(self, data: bytes) -> bytes:
        """Read the next piece and give back what the caller may see of it: all but the usage-only chunk.

        With ``hide_usage_chunk`` the event with empty ``choices`` and a usage object is left out, byte for byte, and an
        unfinished event at the end of a piece that may still turn out to be it is held back until it is finished.
        Nothing else is changed or delayed. What is held at the end of the stream comes from `flush`.
        """
        if data.startswith(self._prefix):  # the same test as in feed: a call less per chunk
            end = data.find(b'"', self._prefix_length)
            if self._middle_length:
                if data.startswith(self._middle, end):
                    start = end + self._middle_length
                    if data.find(b'"', start) + self._suffix_length == len(data) and data.endswith(self._suffix):
                        self._characters += end - self._prefix_length
                        return data
            elif end + self._suffix_length == len(data) and data.endswith(self._suffix):
                self._characters += end - self._prefix_length
                return data
        if not self._hide:
            self.feed(data)
            return data
        out: list[bytes] = []
        self._feed(data, out)
        return out[0] if len(out) == 1 else b"".join(out)

    def flush(self) -> bytes:
        """No more bytes will come: read what is unfinished; give back what was held, unless it is the usage chunk."""
        held = bytes(self._pending[self._passed :]) if self._hide and self._framing == "sse" else b""
        return b"" if self._finish() else held

    def end(self) -> None:
        """No more bytes will come: read what is left (a last event without its blank line, or a JSON body)."""
        self._finish()

    @property
    def output_characters(self) -> int:
        """About how many characters the model has produced so far: counted where events were read, else scaled."""
        if self._sampled_bytes:
            return self._characters + round(self._quiet_bytes * self._sampled_characters / self._sampled_bytes)
        return self._characters + self._quiet_bytes // _BYTES_PER_CHARACTER

    @property
    def framing(self) -> Framing:
        """What the bytes have turned out to be; ``unknown`` until the first of them that tells."""
        return self._framing

    # -- framing ----------------------------------------------------------------------------------------------------

    def _feed(self, data: bytes, out: list[bytes] | None) -> bool:
        if self._framing == "sse" and not self._pending and data.endswith(b"\n\n"):
            if data.startswith(self._spare[0]) and self._swap(data):
                if out is not None:
                    out.append(data)
                return False
            if self._may_skip(data):
                self._skip(data)
                self._arm()
                if out is not None:
                    out.append(data)
                return False
        before = (self.usage, self.finished, self.finish_reason_seen, self.failed)
        given = 0
        if self._framing == "unknown":
            self._pending += data
            given = self._passed
            self._framing = sniff(self._pending)
            if self._framing == "sse":
                data = bytes(self._pending)
                self._pending.clear()
            elif self._framing == "opaque":
                self._pending.clear()
            else:
                self._passed = len(self._pending)
        elif self._framing == "ndjson":
            self._feed_lines(data)
        elif self._framing == "json":
            self._pending += data
            self._bound()
        if self._framing == "sse":
            self._feed_events(data, out, given)
        elif out is not None:
            out.append(data)
        self._arm()
        return before != (self.usage, self.finished, self.finish_reason_seen, self.failed)

    def _arm(self) -> None:
        """Open the short cuts of `feed` where the next piece begins an event, and close them in the middle of one."""
        if self._pending:
            self._prefix, self._quiet = _NEVER, (_NEVER,)
            return
        self._prefix = self._template
        named = self._protocol in ("responses", "anthropic") and not self._identifying()
        self._quiet = _QUIET if named else (_NEVER,)

    def _swap(self, data: bytes) -> bool:
        """Take the other template where this piece is like it: two choices, or text and reasoning, take turns."""
        mine = (self._template, self._middle, self._suffix)
        self._use(*self._spare)
        self._spare = mine
        self._arm()
        start = self._prefix_length
        end = data.find(b'"', start)
        close = end
        if self._middle:
            if not data.startswith(self._middle, end):
                return False
            close = data.find(b'"', end + len(self._middle))
        if close + self._suffix_length != len(data) or not data.endswith(self._suffix):
            return False
        self._characters += end - start
        return True

    def _use(self, template: bytes, middle: bytes, suffix: bytes) -> None:
        self._template, self._prefix_length = template, len(template)
        self._middle, self._middle_length = middle, len(middle)
        self._suffix, self._suffix_length = suffix, len(suffix)

    def _feed_events(self, data: bytes, out: list[bytes] | None, given: int) -> None:
        """Read all events that are whole now; ``given`` bytes at the start have been passed on before."""
        pending = self._pending
        if pending:
            given = self._passed
            known = max(len(pending) - 3, 0)
            pending += data
            if BOUNDARY.search(pending, known) is None:
                if out is not None:
                    self._pass_unfinished(out)
                self._bound()
                return
            data = bytes(pending)
            pending.clear()
        cut = max(data.rfind(b"\n\n") + 2, data.rfind(b"\n\r\n") + 3, data.rfind(b"\r\r") + 2)
        if cut < 4 and BOUNDARY.search(data) is None:  # what rfind answers where there is none
            cut = 0
        if cut:
            whole = data if cut == len(data) else data[:cut]
            if self._may_skip(whole):
                self._skip(whole)
                if out is not None:
                    out.append(whole[given:] if given else whole)
            else:
                start = 0
                for boundary in BOUNDARY.finditer(whole):
                    event, end = whole[start : boundary.start()], boundary.end()
                    drop = self._read_event(event)
                    if out is not None:
                        # Blank lines before a dropped event are not part of it.
                        kept = start + len(event) - len(event.lstrip(b"\r\n")) if drop else end
                        out.append(whole[max(start, given) : kept])
                    start = end
                cut = start
        self._passed = max(given - cut, 0)
        if cut < len(data):
            pending += data[cut:]
            if out is not None:
                self._pass_unfinished(out)
            self._bound()

    def _pass_unfinished(self, out: list[bytes]) -> None:
        """Hand on the event in progress unless it can still turn out to be the usage chunk."""
        pending = self._pending
        if (
            self._passed
            or len(pending) > _LARGEST_USAGE_CHUNK
            or not _MAY_BE_USAGE_CHUNK.match(pending.removeprefix(BOM))
            or _HAS_CHOICES.search(pending)
        ):
            out.append(bytes(pending[self._passed :]))
            self._passed = len(pending)

    def _feed_lines(self, data: bytes) -> None:
        self._pending += data
        if b"\n" in data:
            *lines, rest = bytes(self._pending).split(b"\n")
            self._pending[:] = rest
            for line in lines:
                self._read_payload(line, None)
        self._bound()

    def _bound(self) -> None:
        """Keep memory flat: of an event or body beyond 32 MiB only the head and the tail stay.

        Comes after passing on: what is removed here has been given to the caller, since no usage chunk is that large.
        """
        if len(self._pending) > _LARGEST:
            removed = len(self._pending) - _KEPT_HEAD - _KEPT_TAIL
            del self._pending[_KEPT_HEAD : _KEPT_HEAD + removed]
            self._passed = max(self._passed - removed, 0)
            self._truncated = True

    def _finish(self) -> bool:
        """Read what is left; True where that is a usage-only chunk."""
        rest = bytes(self._pending)
        self._pending.clear()
        self._passed = 0
        if not rest:
            return False
        if self._framing == "sse":
            return self._read_event(rest)
        if self._framing == "ndjson":
            self._read_payload(rest, None)
        elif self._framing == "json":
            self._read_body(rest)
        return False

    # -- events -----------------------------------------------------------------------------------------------------

    def _may_skip(self, events: bytes) -> bool:
        """Whether these whole events certainly say nothing but text: by the names that a saying event must contain."""
        if self._identifying():
            return False
        protocol = self._protocol
        if protocol == "chat":
            return not (
                b'_tokens"' in events
                or b'reason":"' in events
                or b'reason": "' in events
                or b"DONE]" in events
                or b"error" in events
            )
        if protocol == "responses":
            if events.startswith(_QUIET) and events.find(b"\n", events.find(b"data:")) == len(events) - 2:
                return True
            return not (b'"response"' in events or b'"usage"' in events or b"error" in events or b"DONE]" in events)
        if protocol == "anthropic":
            if events.startswith(_QUIET) and events.find(b"\n", events.find(b"data:")) == len(events) - 2:
                return True
            return not (
                b'_tokens"' in events or b"message_st" in events or b"stop_reason" in events or b"error" in events
            )
        return False

    def _skip(self, events: bytes) -> None:
        """Note the size of events that say nothing, measure one of them now and then, and learn what they look like."""
        self._measure(events)
        if self._protocol == "chat":
            self._learn(events)

    def _measure(self, events: bytes) -> None:
        self._quiet_bytes += len(events)
        if self._quiet_bytes >= self._sample_at:
            self._sample_at = self._quiet_bytes + _SAMPLE_EVERY
            event = BOUNDARY.split(events, 1)[0]
            if (obj := decode(payload_of(event)[0])) is not None:
                self._sampled_bytes += len(event) + 2
                self._sampled_characters += generated_characters(obj)

    def _learn(self, event: bytes) -> None:
        """Make a template of one chat event that is known to say nothing but text.

        Sound without JSON: every byte outside the string (and the padding) is the same as in this event, and a string
        without a quote cannot contain any of the names that would make the event matter.
        """
        if self._characters - self._learned_at > 64:  # the last template has earned its keep
            self._templates_left = _RELEARN
        if self._templates_left == 0 or not event.startswith(b"data:"):
            return
        match = _TEXT_MEMBER.search(event)
        if match is None:
            return
        start = match.end()
        end = event.find(b'"', start)
        boundary = BOUNDARY.search(event)
        if end < 0 or b"\\" in event[start:end] or boundary is None or boundary.end() != len(event):
            return
        self._templates_left -= 1
        self._learned_at = self._characters
        padding = _PADDING.search(event, end)
        middle, rest = b"", end
        if padding is not None:
            middle, rest = event[end : padding.end()], event.find(b'"', padding.end())
        self._spare = (self._template, self._middle, self._suffix)
        self._use(event[:start], middle, event[rest:])

    def _read_event(self, event: bytes) -> bool:
        """Read one event without its blank line; True where it is a usage-only chunk."""
        if self._may_skip(event):
            self._measure(event)
            return False
        if self._events == 0:
            event = event.removeprefix(BOM)
        if not event.strip():
            return False
        self._events += 1
        payload, name, junk_error = payload_of(event)
        if junk_error or name == b"error":
            self.failed = True
        return self._read_payload(payload, name)


class UsageChunkFilter:
    """Takes the usage-only chunk that we asked for out of a chat event stream (design rule 2); see `pass_through`."""

    __slots__ = ("reader",)

    def __init__(self, url: str = "/chat/completions", content_type: str | None = "text/event-stream") -> None:
        self.reader = StreamReader(url, content_type, hide_usage_chunk=True)

    def feed(self, data: bytes) -> bytes:
        """The bytes to pass on now."""
        return self.reader.pass_through(data)

    def flush(self) -> bytes:
        """The bytes that are still held when the stream has ended."""
        return self.reader.flush()


def make_reader(url: str, content_type: str | None, *, hide_usage_chunk: bool = False) -> StreamReader:
    """A reader for one response: of an event stream, lines of JSON or a JSON body, whichever it turns out to be."""
    return StreamReader(url, content_type, hide_usage_chunk=hide_usage_chunk)
