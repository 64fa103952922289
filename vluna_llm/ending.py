"""How an answer ended, and what that means for the bill (design rules 3, 4 and 5). Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from .types import UsageSource
from .usage.meters import MeterLine
from .usage.types import TokenUsage

OnAbort = Literal["cancel", "estimate", "drain"]

_CHARACTERS_PER_TOKEN: Final = 4


def generated_tokens(characters: int) -> int:
    """About how many tokens these characters were that a model has written: four to a token, rounded up.

    For answers that bring no usage (design rules 4 and 5). A request, which is known before, is measured better:
    `vluna_llm.usage.estimate`.
    """
    return -(-characters // _CHARACTERS_PER_TOKEN)


@dataclass(frozen=True, slots=True)
class Ending:
    """What was seen of an answer when nothing more could be seen.

    Attributes:
        how: ``complete`` where the whole answer was read, ``closed`` where the consumer left it, ``error`` where it
            broke, ``abandoned`` where the garbage collector found it.
        usage: the final or cumulative usage that the provider reported, if any.
        finished: the protocol said that the answer is whole (``[DONE]``, a terminal ``response.*`` event, ...).
        finish_reason_seen: the model had finished, whatever of the stream was left.
        failed: the provider reported an error inside the answer.
        output_tokens: about how many tokens were generated, where that could be told.
        response_id: the provider's id of the answer.
        model: the model that the provider says answered.
    """

    how: Literal["complete", "closed", "error", "abandoned"]
    usage: TokenUsage | None = None
    finished: bool = False
    finish_reason_seen: bool = False
    failed: bool = False
    output_tokens: int | None = None
    response_id: str | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with the operation, and what to tell.

    ``forgone_tokens`` counts the generated tokens that are given away when an abort cancels. ``meters`` is what the
    caller recorded on meters of its own.
    """

    work: Literal["completed", "failed", "aborted"]
    usage: TokenUsage | None = None
    source: UsageSource | None = None
    forgone_tokens: int = 0
    meters: tuple[MeterLine, ...] = ()


def judge(ending: Ending, *, estimated_input: int, estimated_output: int, on_abort: OnAbort) -> Verdict:
    """Decide how an operation is settled.

    Usage that the provider reported is committed whatever else happened. Without it: an answer that the model had
    finished was spent and is estimated (rules 3 and 5), a broken one is cancelled, an abandoned one follows
    ``on_abort`` (rule 4; ``drain`` has read all it could before it gets here and then cancels).

    Args:
        ending: what was seen.
        estimated_input: input tokens as told to authorize.
        estimated_output: output tokens as told to authorize, used where what was generated cannot be told.
        on_abort: the setting ``VLUNA_LLM_ON_ABORT``.
    """
    if ending.usage is not None:
        return Verdict("completed", ending.usage, "provider")
    generated = ending.output_tokens
    if ending.failed and not ending.finish_reason_seen:
        return Verdict("failed", forgone_tokens=generated or 0)
    if ending.how == "complete" or ending.finished or ending.finish_reason_seen:
        return Verdict("completed", _estimated(estimated_input, estimated_output, generated), "estimated")
    if ending.how == "error":
        return Verdict("failed", forgone_tokens=generated or 0)
    if on_abort == "estimate":
        return Verdict("completed", _estimated(estimated_input, 0, generated), "estimated")
    return Verdict("aborted", forgone_tokens=generated or 0)


def _estimated(input_tokens: int, output_tokens: int, generated: int | None) -> TokenUsage:
    return TokenUsage(input_tokens=input_tokens, output_tokens=output_tokens if generated is None else generated)
