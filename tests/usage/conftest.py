"""The recorded provider traffic, where it is present, and how much of it the readers agree with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

RECORDINGS = Path(__file__).resolve().parents[3] / "shared" / "recordings"
REASON = "../shared/recordings is not beside this checkout: no recorded provider traffic to read"

_TALLY = pytest.StashKey[dict[str, bool]]()


@dataclass(frozen=True)
class Recording:
    """One recorded exchange, as its file has it."""

    id: str
    provider: str
    api: str
    url: str
    content_type: str | None
    body: bytes
    stream: bool
    request: Any
    truth: dict[str, Any] | None
    notes: tuple[str, ...]


def load(path: Path) -> Recording:
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Recording(
        id=raw["id"],
        provider=raw["provider"],
        api=raw["api"],
        url=raw["request"]["url"],
        content_type=raw["response"]["headers"].get("content-type"),
        body=raw["response"]["body_text"].encode("utf-8"),
        stream=raw["stream"],
        request=raw["request"]["body"],
        truth=raw["truth"],
        notes=tuple(raw["notes"]),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per recording; a single skipped one, with the reason, where there are none."""
    if "recording_path" not in metafunc.fixturenames:
        return
    paths = sorted(RECORDINGS.glob("*.json")) if RECORDINGS.is_dir() else []
    if paths:
        metafunc.parametrize("recording_path", paths, ids=[path.stem for path in paths])
    else:
        metafunc.parametrize("recording_path", [pytest.param(None, marks=pytest.mark.skip(reason=REASON))])


@pytest.fixture
def recording(recording_path: Path) -> Recording:
    return load(recording_path)


@pytest.fixture(scope="session")
def recordings() -> dict[str, Recording]:
    """All recordings by id; skips where they are absent."""
    if not RECORDINGS.is_dir():
        pytest.skip(REASON)
    return {path.stem: load(path) for path in sorted(RECORDINGS.glob("*.json"))}


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> dict[str, bool]:
    """Which recordings the readers were shown, and whether they agreed."""
    return request.config.stash.setdefault(_TALLY, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tally = config.stash.get(_TALLY, {})
    if tally:
        terminalreporter.write_line(f"recordings: {sum(tally.values())} of {len(tally)}")
    elif not RECORDINGS.is_dir():
        terminalreporter.write_line(f"recordings: none read ({REASON})")
