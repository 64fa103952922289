"""How a recorded exchange is asked for again through LiteLLM, and what must come of it.

A recording is replayed through every function of LiteLLM that speaks its API and can be pointed at an address on
loopback; the rest is named with the reason. What is expected is worked out by the tests of the readers
(``tests/usage/test_recordings.py``) from what the provider reported: the same expectation for every way in.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import litellm
from upstream import Recorded, Upstream

_USAGE_TESTS = Path(__file__).resolve().parents[1] / "usage"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_of_usage_tests_{name}", _USAGE_TESTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_shared = _load("conftest")
_readers = _load("test_recordings")
RECORDINGS: Path = _shared.RECORDINGS
REASON: str = _shared.REASON
check = _readers.check
expected = _readers.expected

_PREFIX = {
    "azure-openai": "azure",
    "azure-ai-foundry": "azure_ai",
    "cerebras": "cerebras",
    "deepseek": "deepseek",
    "groq": "groq",
    "litellm-proxy": "litellm_proxy",
    "mistral": "mistral",
    "openrouter": "openrouter",
    "perplexity": "perplexity",
    "snowflake-cortex": "snowflake",
    "together": "together_ai",
    "vercel-ai-gateway": "vercel_ai_gateway",
    "vllm": "hosted_vllm",
    "xai": "xai",
    "zai": "zai",
}
"""LiteLLM's word for who answered; everybody else speaks OpenAI's dialect and is asked as ``openai/``."""

_SAY = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class Way:
    """One way in: a function of LiteLLM's, sync or async, and its arguments."""

    name: str
    kind: str
    kwargs: dict[str, Any]
    suffix: str = "/v1"

    def __str__(self) -> str:
        return f"{self.name}({self.kwargs['model']})"


@dataclass(frozen=True)
class Exchange:
    """One recording, with its status and with the ways in which LiteLLM can ask for it."""

    rec: Any
    status: int
    ways: tuple[Way, ...]
    why_not: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def id(self) -> str:
        return str(self.rec.id)

    @property
    def shape(self) -> str:
        """The API and the framing, as the table has it."""
        return f"{self.rec.api}{' stream' if self.rec.stream else ''}"

    def serve(self, upstream: Upstream, way: Way) -> dict[str, Any]:
        """Put the recorded bytes behind an address; the arguments with which to ask for them."""
        content_type = self.rec.content_type or "application/json"
        base = upstream.replay(self.id, Recorded(self.status, content_type, self.rec.body, self.rec.stream))
        given = {**way.kwargs, "api_base": base + way.suffix, "api_key": "sk-test", "max_retries": 0, "timeout": 20}
        if self.rec.stream:
            given["stream"] = True
        if way.kwargs["model"].startswith("azure/"):
            given["api_version"] = "2024-10-21"
        return given


def exchanges() -> Iterator[Exchange]:
    """Every recording, with how it can be replayed or why it cannot."""
    for path in sorted(RECORDINGS.glob("*.json")):
        rec = _shared.load(path)
        status = json.loads(path.read_text(encoding="utf-8"))["response"]["status"]
        found = _ways(rec)
        if isinstance(found, str):
            yield Exchange(rec, status, (), found)
        else:
            yield Exchange(rec, status, found)


def _ways(rec: Any) -> tuple[Way, ...] | str:
    model = (rec.request or {}).get("model") or ""
    prefix = _PREFIX.get(rec.provider, "openai")
    if rec.api == "chat.completions":
        return _both("chat.completions", "completion", f"{prefix}/{model or 'gpt-4o'}", messages=_SAY)
    if rec.api == "responses":
        # LiteLLM asks for a stream only where it knows that the model can: the name is one that it knows.
        name = f"azure/{model or 'gpt-4o'}" if rec.provider == "azure-openai" else "openai/gpt-4o"
        return _both("responses", "responses", name, input="hi")
    if rec.api == "completions":
        return _both("completions", "text_completion", f"text-completion-openai/{model or 'm'}", prompt="hi")
    if rec.api == "embeddings":
        return _both("embeddings", "embedding", f"{prefix}/{model or 'm'}", input=["hi"])
    if rec.api == "anthropic.messages":
        name = f"anthropic/{model or 'claude-3-7-sonnet-20250219'}"
        given = {"messages": _SAY, "max_tokens": 100}
        theirs = Way("messages.acreate", "anthropic.messages", {"model": name, **given}, "")  # has no sync twin
        return (*_both("chat.completions", "completion", name, suffix="", **given), theirs)
    if rec.api == "images":
        return _both("images", "image_generation", f"openai/{model or 'gpt-image-1'}", prompt="hi")
    if rec.api == "audio":
        if rec.stream:
            return "LiteLLM has no streamed transcription"
        return _both("audio", "transcription", f"openai/{model or 'whisper-1'}", file=("a.wav", b"RIFF0000WAVE"))
    if rec.api == "cohere.chat":
        return _both("chat.completions", "completion", f"cohere_chat/{model or 'command-r'}", suffix="", messages=_SAY)
    if rec.api == "ollama.chat":
        return _both("chat.completions", "completion", f"ollama_chat/{model or 'm'}", suffix="", messages=_SAY)
    if rec.api == "gemini.generateContent":
        return _both("chat.completions", "completion", "gemini/gemini-2.5-flash", suffix="", messages=_SAY)
    return {
        "anthropic.count_tokens": "counts tokens, uses none: no function of LiteLLM's that is metered",
        "assistants.runs": "not metered (told by on_unmetered)",
        "batches": "not metered (told by on_unmetered)",
        "bedrock.converse": "refused for its signature: LiteLLM signs for AWS, and the recording is of that refusal",
        "responses.input_tokens": "counts tokens, uses none: no function of LiteLLM's that is metered",
    }[rec.api]


def _both(kind: str, name: str, model: str, suffix: str = "/v1", **kwargs: Any) -> tuple[Way, ...]:
    given = {"model": model, **kwargs}
    return Way(name, kind, given, suffix), Way(f"a{name}", kind, given, suffix)


def function(name: str) -> Any:
    """LiteLLM's function of that name, looked up as a user does."""
    return litellm.anthropic.messages.acreate if name == "messages.acreate" else getattr(litellm, name)
