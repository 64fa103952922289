"""Listens to what the library tells while the demo runs: OpenTelemetry events for the tables, log lines for people."""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from opentelemetry._logs import Logger, LoggerProvider, LogRecord, set_logger_provider

Say = Callable[[str], None]
Event = tuple[str, Mapping[str, Any]]

_LOG = logging.getLogger("vluna_llm")
_SHOWN_OF_A_KIND = 1
_HINT_FIELDS = re.compile(r"\bhint\.(\w+=\S+)")


class Witness:
    """Collects events while its ``with`` block runs, and says each kind of warning once per step.

    Args:
        say: prints one line.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._guard = threading.Lock()
        self._events: list[Event] = []
        self._told: Counter[str] = Counter()
        self._handler = _OneLiners(self._warned)
        self._propagate = _LOG.propagate

    def __enter__(self) -> Witness:
        _PROVIDER.install()
        _PROVIDER.witness = self
        self._propagate, _LOG.propagate = _LOG.propagate, False
        _LOG.addHandler(self._handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.next_step()
        _LOG.removeHandler(self._handler)
        _LOG.propagate = self._propagate
        _PROVIDER.witness = None

    @property
    def events(self) -> list[Event]:
        """Name and attributes of every event so far."""
        with self._guard:
            return list(self._events)

    def heard(self, event: Event) -> None:
        """An event was emitted, on whatever thread."""
        with self._guard:
            self._events.append(event)

    def hints(self) -> dict[str, list[str]]:
        """The types of the hints that the gate gave, by operation id."""
        found: dict[str, list[str]] = {}
        for name, attributes in self.events:
            if name == "vluna.hint":
                kinds = found.setdefault(str(attributes.get("vluna.operation.id")), [])
                kind = str(attributes.get("vluna.hint.type"))
                if kind not in kinds:
                    kinds.append(kind)
        return found

    def next_step(self) -> None:
        """Say how many warnings were not shown, and begin to count anew."""
        with self._guard:
            told, self._told = self._told, Counter()
        for kind, times in told.items():
            if times > _SHOWN_OF_A_KIND:
                self._say(f"{kind}: {times - _SHOWN_OF_A_KIND} more of these")

    def _warned(self, line: str) -> None:
        kind = line.partition(":")[0]
        with self._guard:
            self._told[kind] += 1
            show = self._told[kind] <= _SHOWN_OF_A_KIND
        if show:
            self._say(line)


class _OneLiners(logging.Handler):
    """Hands warnings on as one line each, without the identifiers at their end."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        text = " ".join(message.partition(" operation.id=")[0].split())
        fields = _HINT_FIELDS.findall(message)
        self._tell(f"{text}: {' '.join(fields).removeprefix('type=')}" if fields else text)


class _Provider(LoggerProvider):
    """The process's logger provider while a witness listens; without one it swallows what it gets."""

    def __init__(self) -> None:
        self.witness: Witness | None = None
        self._installed = False

    def install(self) -> None:
        """OpenTelemetry takes a provider once per process; one that the program has set before stays."""
        if not self._installed:
            self._installed = True
            set_logger_provider(self)

    def get_logger(self, name: str, *args: Any, **kwargs: Any) -> Logger:
        return _EventLogger(name)


class _EventLogger(Logger):
    def enabled(self, **fields: Any) -> bool:
        return True

    def emit(self, record: LogRecord | None = None, **fields: Any) -> None:
        name = record.event_name if record is not None else fields.get("event_name")
        attributes = record.attributes if record is not None else fields.get("attributes")
        if _PROVIDER.witness is not None and name:
            _PROVIDER.witness.heard((name, dict(attributes or {})))


_PROVIDER = _Provider()
