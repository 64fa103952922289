"""From a provider's usage object to `TokenUsage`: the rules of design rule 13, each with its source.

Everything here looks at names and numbers only, never at who answered: proxies and gateways put one provider's numbers
behind another's address, so the host proves nothing.

The sources are the providers' API references (OpenAI "usage" of Chat Completions, Responses, Images and Audio;
Anthropic "usage" of Messages; Gemini ``UsageMetadata``; Cohere v2 ``usage``; Ollama ``/api/chat``) and, where those are
silent or wrong, what providers really sent: a rule marked *observed* was seen in recorded traffic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .types import TokenUsage

_LARGEST: Final = 2**53
"""A count above this is a broken answer, not a number of tokens."""

_INPUT_DETAILS: Final = (
    "prompt_tokens_details",
    "input_tokens_details",
    "input_token_details",
    "prompt_token_details",
)
_OUTPUT_DETAILS: Final = (
    "completion_tokens_details",
    "output_tokens_details",
    "output_token_details",
    "completion_token_details",
)


def normalize_usage(raw: object) -> TokenUsage | None:
    """Read one usage object as the provider sent it; None where it reports nothing.

    None, an object without members and an object whose members are all null report nothing. An object that carries
    only something else than tokens (a cost, seconds of audio) is a report: its counts are 0, ``raw`` has the rest.

    The shape decides the meaning:

    * Gemini (``promptTokenCount``), Cohere (``tokens``/``billed_units``), Ollama (``eval_count``): own rules below.
    * Anthropic (``cache_read_input_tokens`` or ``cache_creation_input_tokens`` and no total): cached beside the input.
    * everything else: OpenAI's meaning, checked against the provider's own total (`_openai`).

    Strings and floats beside the counts (``service_tier``, ``cost``, ``queue_time``) are ignored; a count that came as
    ``"12"`` or ``12.0`` is read as 12; a negative, fractional or absurd count is read as not given.
    """
    if not isinstance(raw, Mapping) or not _says_something(raw):
        return None
    if "promptTokenCount" in raw or "totalTokenCount" in raw or "candidatesTokenCount" in raw:
        return _gemini(raw)
    if isinstance(raw.get("tokens"), Mapping) or isinstance(raw.get("billed_units"), Mapping):
        return _cohere(raw)
    if "prompt_eval_count" in raw or "eval_count" in raw:
        return _ollama(raw)
    if _is_anthropic(raw):
        return _anthropic(raw)
    return _openai(raw)


def merge_anthropic(start: Mapping[str, Any], delta: Mapping[str, Any]) -> dict[str, Any]:
    """The usage of an Anthropic stream: ``message_start`` overwritten by the non-null members of ``message_delta``.

    Source: Anthropic's streaming reference ("the token counts shown in the usage field of the message_delta event are
    cumulative"); older models send only ``output_tokens`` there, so the input is known from the start alone.
    """
    return {**start, **{key: value for key, value in delta.items() if value is not None}}


def _openai(raw: Mapping[str, Any]) -> TokenUsage:
    """OpenAI's meaning: cached tokens are part of the input, reasoning is part of the output, total is their sum.

    Source: OpenAI API reference; ``output`` is 0 where none is given (embeddings; *observed* in legacy completions).

    Where input + output is not the provider's own total, the first reading under which the total holds wins and is
    named in ``contradiction``:

    * ``reasoning_beside_output``: xAI, also behind Azure: the total has the reasoning, the output has not (*observed*).
    * ``audio_beside_input``: Mistral: ``prompt_tokens`` has the text only, the total has the audio (*observed*).
    * ``cached_beside_input``: Anthropic's or Bedrock's numbers under OpenAI's names.
    * ``hidden_output``: the total is larger and no count explains it: Gemini's OpenAI endpoint leaves thinking out of
      every count but the total (*observed*). It was produced, so it is output.
    * ``total_below_parts``: no reading gives a total that small; the counts are kept, since each was stated.

    Where the total holds, a part that is larger than its whole is cut to it and named: ``cached_exceeds_input`` (xAI
    and Mistral round the cached prefix up to whole blocks, *observed*), ``reasoning_exceeds_output`` (Vercel's gateway
    leaves hidden reasoning out of output *and* total, *observed*: its own total wins).
    """
    input_details = _details(raw, _INPUT_DETAILS)
    output_details = _details(raw, _OUTPUT_DETAILS)
    given_in = _first(raw, "prompt_tokens", "input_tokens", "inputTokens")
    given_out = _first(raw, "completion_tokens", "output_tokens", "outputTokens")
    total = _first(raw, "total_tokens", "totalTokens")
    cached = _first_of(
        _first(input_details, "cached_tokens", "cache_read_tokens"),
        _first(
            raw,
            "cached_tokens",
            "num_cached_tokens",
            "prompt_cache_hit_tokens",
            "cache_read_input_tokens",
            "cacheReadInputTokens",
        ),
    )
    written = _first_of(
        _first(input_details, "cache_write_tokens", "cache_creation_tokens"),
        _first(raw, "cache_creation_input_tokens", "cacheWriteInputTokens"),
    )
    reasoning = _first_of(
        _first(output_details, "reasoning_tokens", "thinking_tokens"), _first(raw, "reasoning_tokens")
    )
    audio_in = _first_of(_first(input_details, "audio_tokens"), _first(raw, "audio_prompt_tokens"))
    audio_out = _first(output_details, "audio_tokens")
    input_tokens, output_tokens, contradiction = _reconcile(
        given_in, given_out, total, reasoning or 0, audio_in or 0, (cached or 0) + (written or 0)
    )
    seconds = _seconds(raw) if raw.get("type") == "duration" else None
    return _parts_within(
        raw,
        contradiction,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached=cached,
        written=written,
        reasoning=reasoning,
        audio_in=audio_in,
        audio_out=audio_out,
        image_in=_first(input_details, "image_tokens"),
        image_out=_first(output_details, "image_tokens"),
        seconds=seconds,
    )


def _reconcile(
    given_in: int | None, given_out: int | None, total: int | None, reasoning: int, audio_in: int, cache: int
) -> tuple[int, int, str | None]:
    """Input, output and the name of the reading under which the provider's own total holds (see `_openai`)."""
    if not total:
        if reasoning > (given_out or 0):
            return given_in or 0, (given_out or 0) + reasoning, "reasoning_beside_output"
        return given_in or 0, given_out or 0, None
    if given_in is None and given_out is None:
        return total, 0, "total_only"
    if given_in is None:
        known = given_out or 0
        return max(total - known, 0), known, None if total >= known else "total_below_parts"
    known_out = given_out or 0
    plain = given_in + known_out
    if total == plain:
        return given_in, known_out, None
    readings = (
        ("reasoning_beside_output", 0, reasoning),
        ("audio_beside_input", audio_in, 0),
        ("cached_beside_input", cache, 0),
        ("audio_beside_input", audio_in, reasoning),
        ("cached_beside_input", cache, reasoning),
    )
    for name, more_in, more_out in readings:
        if (more_in or more_out) and total == plain + more_in + more_out:
            return given_in + more_in, known_out + more_out, name
    if total > plain:
        return given_in, total - given_in, None if given_out is None else "hidden_output"
    return given_in, known_out, "total_below_parts"


def _is_anthropic(raw: Mapping[str, Any]) -> bool:
    if "prompt_tokens" in raw or _first(raw, "total_tokens") is not None:
        return False
    return "cache_read_input_tokens" in raw or "cache_creation_input_tokens" in raw


def _anthropic(raw: Mapping[str, Any]) -> TokenUsage:
    """Anthropic's meaning: ``input_tokens`` is what was neither read from nor written to the cache; there is no total.

    Source: Anthropic "prompt caching" (total input = cache_read + cache_creation + input). Thinking is part of
    ``output_tokens``. ``iterations`` are the steps of a server-side loop and are already in the top-level counts,
    apart from what another model did (``advisor_message``), which Anthropic leaves out of them (*observed*):
    the top level is what we report, and ``contradiction`` is ``iterations_beside_usage`` so that the gap is seen.
    """
    cached = _first(raw, "cache_read_input_tokens")
    written = _first(raw, "cache_creation_input_tokens")
    if written is None and isinstance(parts := raw.get("cache_creation"), dict):
        written = sum(_count(value) or 0 for value in parts.values())
    fresh = _first(raw, "input_tokens") or 0
    output_tokens = _first(raw, "output_tokens") or 0
    beside = None
    if isinstance(steps := raw.get("iterations"), list):
        stepped = sum(_first(step, "output_tokens") or 0 for step in steps if isinstance(step, dict))
        beside = "iterations_beside_usage" if stepped > output_tokens else None
    return _parts_within(
        raw,
        beside,
        input_tokens=fresh + (cached or 0) + (written or 0),
        output_tokens=output_tokens,
        cached=cached,
        written=written,
        reasoning=_first(_details(raw, _OUTPUT_DETAILS), "thinking_tokens", "reasoning_tokens"),
    )


def _gemini(raw: Mapping[str, Any]) -> TokenUsage:
    """Gemini's meaning: thoughts stand beside the candidates, tool-use prompts beside the prompt; cached is inside it.

    Source: Gemini API reference, ``UsageMetadata``: totalTokenCount is prompt + candidates + toolUsePrompt + thoughts.
    """
    thoughts = _first(raw, "thoughtsTokenCount") or 0
    input_tokens = (_first(raw, "promptTokenCount") or 0) + (_first(raw, "toolUsePromptTokenCount") or 0)
    output_tokens = (_first(raw, "candidatesTokenCount", "responseTokenCount") or 0) + thoughts
    total = _first(raw, "totalTokenCount")
    contradiction = None
    if total and total > input_tokens + output_tokens:
        output_tokens, contradiction = total - input_tokens, "hidden_output"
    elif total and total < input_tokens + output_tokens:
        contradiction = "total_below_parts"
    return _parts_within(
        raw,
        contradiction,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached=_first(raw, "cachedContentTokenCount"),
        reasoning=thoughts,
        audio_in=_modality(raw.get("promptTokensDetails"), "AUDIO"),
        audio_out=_modality(raw.get("candidatesTokensDetails"), "AUDIO"),
        image_in=_modality(raw.get("promptTokensDetails"), "IMAGE"),
        image_out=_modality(raw.get("candidatesTokensDetails"), "IMAGE"),
    )


def _cohere(raw: Mapping[str, Any]) -> TokenUsage:
    """Cohere's meaning: ``tokens`` is what the model read and wrote, ``billed_units`` what Cohere charges for.

    Source: Cohere v2 reference. Rule 13 wants what the model read, so ``tokens`` wins; ``billed_units`` is read only
    where there is no ``tokens`` (embed, classify). ``cached_tokens`` is part of the input, reasoning of the output.
    """
    tokens = raw.get("tokens")
    counts = tokens if isinstance(tokens, dict) and tokens else raw.get("billed_units")
    counts = counts if isinstance(counts, dict) else {}
    return _parts_within(
        raw,
        None,
        input_tokens=_first(counts, "input_tokens") or 0,
        output_tokens=_first(counts, "output_tokens") or 0,
        cached=_first(raw, "cached_tokens"),
        reasoning=_first(counts, "reasoning_tokens"),
    )


def _ollama(raw: Mapping[str, Any]) -> TokenUsage:
    """Ollama's meaning: ``prompt_eval_count`` is the input, ``eval_count`` the output, thinking included."""
    return TokenUsage(
        input_tokens=_first(raw, "prompt_eval_count") or 0, output_tokens=_first(raw, "eval_count") or 0, raw=raw
    )


def _parts_within(
    raw: Mapping[str, Any],
    contradiction: str | None,
    *,
    input_tokens: int,
    output_tokens: int,
    cached: int | None = None,
    written: int | None = None,
    reasoning: int | None = None,
    audio_in: int | None = None,
    audio_out: int | None = None,
    image_in: int | None = None,
    image_out: int | None = None,
    seconds: float | None = None,
) -> TokenUsage:
    """Cut each part to its whole and name the first cut, unless the numbers already have a named contradiction."""
    if (cached or 0) > input_tokens:
        contradiction = contradiction or "cached_exceeds_input"
    if (reasoning or 0) > output_tokens:
        contradiction = contradiction or "reasoning_exceeds_output"
    return TokenUsage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_tokens=min(cached or 0, input_tokens),
        cache_write_tokens=min(written or 0, input_tokens),
        reasoning_tokens=min(reasoning or 0, output_tokens),
        audio_input_tokens=min(audio_in or 0, input_tokens),
        audio_output_tokens=min(audio_out or 0, output_tokens),
        image_input_tokens=min(image_in or 0, input_tokens),
        image_output_tokens=min(image_out or 0, output_tokens),
        audio_seconds=seconds,
        contradiction=contradiction,
        raw=raw,
    )


def _says_something(raw: Mapping[str, Any]) -> bool:
    return any(value is not None and value != {} and value != [] for value in raw.values())


def _count(value: object) -> int | None:
    if type(value) is int:
        return value if 0 <= value <= _LARGEST else None
    if isinstance(value, float):
        return int(value) if 0 <= value <= _LARGEST and value.is_integer() else None
    if isinstance(value, str) and len(value) < 16 and value.isascii() and value.isdigit():
        return int(value)
    return None


def _first(raw: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        if name in raw and (count := _count(raw[name])) is not None:
            return count
    return None


def _first_of(first: int | None, second: int | None) -> int | None:
    return second if first is None else first


def _details(raw: Mapping[str, Any], names: tuple[str, ...]) -> Mapping[str, Any]:
    for name in names:
        if isinstance(value := raw.get(name), dict):
            return value
    return {}


def _modality(details: object, modality: str) -> int:
    if not isinstance(details, list):
        return 0
    return sum(
        _first(item, "tokenCount") or 0
        for item in details
        if isinstance(item, dict) and item.get("modality") == modality
    )


def _seconds(raw: Mapping[str, Any]) -> float | None:
    """Seconds of audio, where OpenAI's transcription bills by duration (``{"type": "duration", "seconds": 7}``)."""
    value = raw.get("seconds")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _LARGEST:
        return float(value)
    return None
