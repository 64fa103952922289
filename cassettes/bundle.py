"""Turn the recorded cassettes into `INDEX.json` (what is there) and `bundle.json.gz` (the same with the bodies).

Run `python cassettes/bundle.py` after a recording; `--check` only says whether both files are up to date. The bundle
exists so that replaying needs no YAML reader at run time; a test proves that it says what the YAML says.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

HERE = Path(__file__).resolve().parent
INDEX = HERE / "INDEX.json"
BUNDLE = HERE / "bundle.json.gz"

_EVENT_END = re.compile(r"\r\n\r\n|\n\n|\r\r")


def cassette_files() -> list[Path]:
    """Every cassette, one folder per server, in a stable order."""
    return sorted(HERE.glob("*/*.yaml"))


def load_yaml(path: Path) -> dict[str, Any]:
    """One cassette as vcrpy wrote it; only plain YAML is accepted."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's where it was built in: ten times as fast
    loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path.name} is not a cassette")
    return loaded


def events(body: str) -> list[str]:
    """An event stream cut behind each blank line; joined again it is the body, byte for byte."""
    parts, start = [], 0
    for match in _EVENT_END.finditer(body):
        parts.append(body[start : match.end()])
        start = match.end()
    if body[start:]:
        parts.append(body[start:])
    return parts


def objects(body: str, *, stream: bool) -> Iterator[Any]:
    """The JSON objects of a body: the whole of it, or the data of each event that has JSON in it."""
    if not stream:
        try:
            yield json.loads(body)
        except ValueError:
            return
        return
    for event in events(body):
        data = "\n".join(line[5:].removeprefix(" ") for line in event.splitlines() if line.startswith("data:"))
        if data.startswith("{"):
            yield json.loads(data)


def _usage_of(found: Any) -> Any:
    """The usage object in one JSON object: at the top, in a Responses event, or in a Messages event."""
    if not isinstance(found, Mapping):
        return None
    for holder in (found, found.get("response"), found.get("message")):
        if isinstance(holder, Mapping) and isinstance(holder.get("usage"), Mapping):
            return holder["usage"]
    return None


def usage(body: str, *, stream: bool) -> dict[str, Any] | None:
    """The usage object that the server wrote, None where it wrote none.

    Where a stream has several (Messages: at the start and at the end), a later number replaces an earlier one.
    """
    merged: dict[str, Any] | None = None
    for found in objects(body, stream=stream):
        part = _usage_of(found)
        if part is not None:
            merged = {**(merged or {}), **{k: v for k, v in part.items() if v is not None}}
    return merged


def tokens(reported: Mapping[str, Any] | None) -> dict[str, int] | None:
    """Input, cached and output tokens, plainly by key; the Messages API counts cached tokens beside the input."""
    if reported is None:
        return None
    details = reported.get("prompt_tokens_details") or reported.get("input_tokens_details") or {}
    beside = reported.get("cache_read_input_tokens") or 0
    written = reported.get("cache_creation_input_tokens") or 0
    anthropic = "cache_read_input_tokens" in reported and "total_tokens" not in reported
    read = reported.get("prompt_tokens", reported.get("input_tokens", 0)) or 0
    return {
        "input": read + beside + written if anthropic else read,
        "cached": beside if anthropic else details.get("cached_tokens") or 0,
        "output": reported.get("completion_tokens", reported.get("output_tokens", 0)) or 0,
    }


def _json_or_none(text: object) -> Any:
    if isinstance(text, bytes):
        text = text.decode()
    if not isinstance(text, str) or not text:
        return None
    return json.loads(text)


def recordings() -> list[dict[str, Any]]:
    """Every interaction of every cassette, with its bodies."""
    found: list[dict[str, Any]] = []
    for path in cassette_files():
        server = json.loads((path.parent / "server.json").read_text(encoding="utf-8"))
        for number, interaction in enumerate(load_yaml(path)["interactions"]):
            request, response = interaction["request"], interaction["response"]
            asked = _json_or_none(request.get("body"))
            body = response["body"]["string"]
            headers = {name.lower(): values[0] for name, values in response["headers"].items()}
            stream = headers.get("content-type", "").startswith("text/event-stream")
            options = (asked or {}).get("stream_options") or {}
            reported = usage(body, stream=stream)
            found.append(
                {
                    "cassette": f"{path.parent.name}/{path.stem}",
                    "interaction": number,
                    "server": server["server"],
                    "server_version": server["version"],
                    "recorded": server["recorded"],
                    "method": request["method"],
                    "path": urlsplit(request["uri"]).path,
                    "model": (asked or {}).get("model"),
                    "stream": bool((asked or {}).get("stream")),
                    "include_usage": options.get("include_usage"),
                    "status": response["status"]["code"],
                    "content_type": headers.get("content-type", ""),
                    "events": len(events(body)) if stream else None,
                    "usage": reported,
                    "tokens": tokens(reported),
                    "sha256": hashlib.sha256(body.encode()).hexdigest(),
                    "request": asked,
                    "headers": headers,
                    "body": body,
                }
            )
    return found


def render() -> tuple[str, str]:
    """The text of `INDEX.json` and of `bundle.json.gz`."""
    every = recordings()
    short = [{k: v for k, v in one.items() if k not in ("request", "headers", "body")} for one in every]
    index = "[\n" + ",\n".join(json.dumps(one) for one in short) + "\n]\n"
    bundle = "[\n" + ",\n".join(json.dumps(one, ensure_ascii=False) for one in every) + "\n]\n"
    return index, bundle


def write() -> None:
    """Write both files."""
    index, bundle = render()
    INDEX.write_text(index, encoding="utf-8")
    BUNDLE.write_bytes(gzip.compress(bundle.encode(), compresslevel=9, mtime=0))


def bundled() -> str:
    """The text inside `bundle.json.gz`."""
    return gzip.decompress(BUNDLE.read_bytes()).decode()


def main() -> int:
    """Write the files, or with `--check` compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is out of date")
    if not parser.parse_args().check:
        write()
        return 0
    index, bundle = render()
    if INDEX.read_text(encoding="utf-8") == index and bundled() == bundle:
        return 0
    print("out of date: run python cassettes/bundle.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
