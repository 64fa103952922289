"""The cassettes in the repository are clean, complete and described, and the generated files say what they say."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="reading the cassettes as vcrpy wrote them needs PyYAML")

CASSETTES = Path(__file__).resolve().parents[2] / "cassettes"
FILES = sorted(CASSETTES.glob("*/*.yaml"))

KEPT_HEADERS = {
    *("accept", "content-type", "anthropic-version"),
    *("date", "server", "x-request-id", "retry-after", "x-litellm-version"),
}
SECRET = re.compile(r"\bsk-[\w-]{3,}|\bBearer\s+\S{6,}|(?i:api[-_]?key|authorization|set-cookie)\W{1,4}\w{8,}")
# The slash that begins a path of somebody's machine, or the name of a file with weights.
MACHINE = re.compile(
    r"(?<![\w.:/])/(?:home|root|tmp|usr|opt|var|mnt|srv|Users|workspace)/|\.gguf\b|site-packages|\\\\Users"
)
ADDRESS = re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b(?::\d+)?")


def _bundle_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cassette_bundle", CASSETTES / "bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bundle = _bundle_module()


@cache
def _interactions(path: Path) -> list[dict[str, Any]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return list(yaml.load(path.read_text(encoding="utf-8"), Loader=loader)["interactions"])


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def _json_objects(interaction: dict[str, Any]) -> list[Any]:
    """The JSON of a response, read here once more and without the code under test."""
    text = interaction["response"]["body"]["string"]
    if not text.lstrip().startswith(("data:", "event:", ":")):
        return [json.loads(text)]
    data = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
    return [json.loads(one) for one in data if one != "[DONE]"]


def _usages(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        own = [value["usage"]] if isinstance(value.get("usage"), dict) else []
        return own + [found for key, inner in value.items() if key != "usage" for found in _usages(inner)]
    return [found for inner in value for found in _usages(inner)] if isinstance(value, list) else []


def test_there_are_cassettes() -> None:
    """The tests below have something to look at, from at least three kinds of server."""
    assert len(FILES) >= 25
    assert {"llama-server", "llama-cpp-python", "litellm"} <= {path.parent.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=_name)
class TestEachCassette:
    def test_nothing_secret_and_nothing_of_the_machine_is_in_it(self, path: Path) -> None:
        """No key, cookie, authorization, local path or address but loopback with the server's usual port."""
        text = path.read_text(encoding="utf-8")
        assert not SECRET.search(text)
        assert not MACHINE.search(text)
        assert set(ADDRESS.findall(text)) <= {
            "127.0.0.1:8080",
            "127.0.0.1:8081",
            "127.0.0.1:8000",
            "127.0.0.1:8001",
            "127.0.0.1:4000",
        }

    def test_only_headers_from_the_list_are_kept(self, path: Path) -> None:
        """What was not asked for by name was dropped before the cassette was written."""
        for interaction in _interactions(path):
            for side in ("request", "response"):
                assert set(interaction[side]["headers"]) <= KEPT_HEADERS

    def test_it_is_described_with_its_server_and_version(self, path: Path) -> None:
        """README names the cassette; the server beside it has a name, a version and a day."""
        readme = (CASSETTES / "README.md").read_text(encoding="utf-8")
        server = json.loads((path.parent / "server.json").read_text(encoding="utf-8"))
        assert f"`{_name(path)}`" in readme
        assert server["server"] == path.parent.name
        assert server["version"] in readme
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", server["recorded"])

    def test_every_response_parses(self, path: Path) -> None:
        """Each body is one JSON object, or an event stream whose events are JSON or the end mark."""
        for interaction in _interactions(path):
            assert _json_objects(interaction)
            assert 100 <= interaction["response"]["status"]["code"] < 600

    def test_a_stream_ends_as_its_protocol_says(self, path: Path) -> None:
        """No recording was cut: [DONE], response.completed or message_stop is there where a stream was asked for."""
        for interaction in _interactions(path):
            asked = json.loads(interaction["request"]["body"] or "{}")
            body = interaction["response"]["body"]["string"]
            if asked.get("stream"):
                last = [event for event in re.split(r"\r?\n\r?\n", body) if event.strip()][-1]
                assert re.search(r"data: ?\[DONE\]|response\.completed|message_stop", last)

    def test_the_usage_in_it_is_consistent(self, path: Path) -> None:
        """Numbers are not negative, the parts add up to the total, and what was cached is part of what was read."""
        for interaction in _interactions(path):
            for usage in _usages(_json_objects(interaction)):
                read = usage.get("prompt_tokens", usage.get("input_tokens"))
                made = usage.get("completion_tokens", usage.get("output_tokens", 0))
                details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
                assert read is None or read >= 0  # the last event of a Messages stream only tells the output
                assert made >= 0
                if "total_tokens" in usage:
                    assert usage["total_tokens"] == read + made
                    assert 0 <= (details.get("cached_tokens") or 0) <= read


def test_readme_lists_no_cassette_that_is_not_there() -> None:
    """Every cassette named in README exists."""
    readme = (CASSETTES / "README.md").read_text(encoding="utf-8")
    servers = "|".join(sorted({path.parent.name for path in FILES}, key=len, reverse=True))
    assert set(re.findall(rf"`((?:{servers})/\w+)`", readme)) == {_name(path) for path in FILES}


def test_the_generated_files_say_what_the_cassettes_say() -> None:
    """INDEX.json and the bundle are exactly what bundle.py makes of the YAML today."""
    index, bundled = bundle.render()
    assert (CASSETTES / "INDEX.json").read_text(encoding="utf-8") == index
    assert bundle.bundled() == bundled


def test_the_index_has_the_usage_that_stands_in_the_bodies() -> None:
    """The usage of the index is found again in each body by other code; where none is found the index says null."""
    index = json.loads((CASSETTES / "INDEX.json").read_text(encoding="utf-8"))
    seen = 0
    for one in index:
        interaction = _interactions(CASSETTES / f"{one['cassette']}.yaml")[one["interaction"]]
        found = [usage for usage in _usages(_json_objects(interaction)) if usage]
        if one["usage"] is None:
            assert found == []
            assert one["tokens"] is None
            continue
        seen += 1
        for key, value in one["usage"].items():
            assert value in [usage[key] for usage in found if key in usage]
        last = found[-1]
        if "total_tokens" in last:
            assert one["tokens"]["input"] + one["tokens"]["output"] == last["total_tokens"]
    assert seen >= 40


def test_the_recordings_hold_what_the_demo_needs() -> None:
    """Each kind of answer is there at least once, among them real cached tokens and a stream without usage."""
    index = json.loads((CASSETTES / "INDEX.json").read_text(encoding="utf-8"))
    kinds = {(one["path"], one["stream"], one["usage"] is not None) for one in index if one["status"] == 200}
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/messages"):
        assert {(path, False, True), (path, True, True)} <= kinds
    assert ("/v1/embeddings", False, True) in kinds
    assert ("/v1/chat/completions", True, False) in kinds
    assert {400, 401, 404, 429} <= {one["status"] for one in index}
    assert any(one["tokens"] and one["tokens"]["cached"] > 100 for one in index)
    assert any(one["tokens"] and one["tokens"]["cached"] == 0 for one in index)


def test_the_cassettes_stay_small() -> None:
    """All that is kept of the folder is under one megabyte."""
    kinds = {".yaml", ".json", ".gz", ".md", ".py"}
    assert sum(path.stat().st_size for path in CASSETTES.rglob("*") if path.suffix in kinds) < 1_000_000
