"""One call of a chat model that is metered by its messages: no SDK client inside it can be.

LangChain's ``usage_metadata`` is what settles it: ``input_tokens`` with what came from the cache, ``output_tokens``
with the reasoning.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from ..context import CallContext
from ..ending import Ending, generated_tokens
from ..errors import VlunaError
from ..lifecycle import ModelCall, Operation
from ..slot import Share, Slot, inside
from ..tap import INLINE_SECONDS
from ..usage import TokenUsage
from ..usage.normalize import normalize_usage
from ._langchain_run import paid_by

if TYPE_CHECKING:
    from ..vluna import Vluna

_NAMES = ("model_name", "model", "model_id", "deployment_name", "repo_id")
_FINISHED = ("finish_reason", "stop_reason", "done_reason", "finishReason", "stopReason")


class MessagesCall:
    """The operation of one call, and what a `vluna_llm.tap.Sink` is asked.

    What is metered inside claims the operation and settles it: a client, another model, or this model's own ``_stream``
    where its ``_generate`` is made of that.
    """

    def __init__(self, vluna: Vluna, payer: CallContext, bound: CallContext | None, call: ModelCall) -> None:
        self.vluna = vluna
        self._payer = payer
        self._bound = bound
        self._call = call
        self._slot = Slot()
        self._share: Share | None = None

    def begin(self) -> bool:
        """Ask the gate; whether the call is metered.

        Raises:
            VlunaError: refused; the model must not be called.
        """
        try:
            with paid_by(self._payer):
                return self._admitted(self.vluna.begin(self._call, self._bound))
        except VlunaError:
            raise
        except Exception:
            self.vluna.internal_error("langchain.begin")
            return False

    async def abegin(self) -> bool:
        """`begin` for coroutines."""
        try:
            with paid_by(self._payer):
                return self._admitted(await self.vluna.abegin(self._call, self._bound))
        except VlunaError:
            raise
        except Exception:
            self.vluna.internal_error("langchain.begin")
            return False

    def _admitted(self, operation: Operation | None) -> bool:
        self._slot.offer(operation)
        self._share = self._slot.share
        return operation is not None

    @contextmanager
    def running(self) -> Iterator[None]:
        """What the model does in the ``with`` belongs to this call."""
        with inside(self._slot), paid_by(self._payer, self._bound):
            yield

    # -- how it ends -------------------------------------------------------------------------------------------------

    def failed(self, error: BaseException) -> None:
        """The model raised."""
        if self._share is not None:
            self._share.fail(error)

    def answered(self, result: Any) -> None:
        """The model gave a ``ChatResult``."""
        try:
            ending = ending_of(result)
        except Exception:
            self.vluna.internal_error("langchain.usage")
            ending = Ending(how="complete", finished=True)
        self.finish(ending)

    # -- a sink ------------------------------------------------------------------------------------------------------

    @property
    def on_abort(self) -> Literal["cancel", "estimate", "drain"]:
        """What becomes of an answer that the consumer leaves."""
        return "cancel" if self._share is None else self._share.on_abort

    @property
    def settle_inline(self) -> bool:
        """Whether the consumer waits for the receipt."""
        return self._share is not None and self._share.settle_inline

    def finish(self, ending: Ending) -> None:
        """The answer ended."""
        if self._share is not None:
            self._share.finish(ending)

    def abandon(self, ending: Callable[[], Ending]) -> None:
        """The answer was forgotten."""
        if self._share is not None:
            self._share.abandon(ending)

    def wait(self, timeout: float | None = INLINE_SECONDS) -> object:
        """Wait for the receipt where the settings say so."""
        return self._share.wait(timeout) if self._share is not None and self.settle_inline else None

    def wait_async(self, timeout: float | None = INLINE_SECONDS) -> Awaitable[object]:
        """`wait` for coroutines."""
        return self._wait_async(timeout)

    async def _wait_async(self, timeout: float | None) -> object:
        return await self._share.wait_async(timeout) if self._share is not None and self.settle_inline else None


# -- what is asked -----------------------------------------------------------------------------------------------------


def describe(
    model: Any, messages: Sequence[Any], stop: object, kwargs: Mapping[str, Any], *, stream: bool
) -> ModelCall:
    """The call as the gate's estimate needs it. Never raises."""
    try:
        params = model._get_ls_params(stop=stop, **kwargs)
    except Exception:
        params = {}
    name = params.get("ls_model_name")
    names = (getattr(model, attribute, None) for attribute in _NAMES)
    name = name or next((found for found in names if isinstance(found, str) and found), None) or "default"
    body = {**kwargs, "model": name, "messages": [_plain(message) for message in messages]}
    if isinstance(limit := params.get("ls_max_tokens"), int):
        body.setdefault("max_tokens", limit)
    if stop:
        body["stop"] = stop
    provider = str(params.get("ls_provider") or type(model).__name__)
    if provider == "litellm":
        provider, name = _behind_litellm(model, str(name))
    return ModelCall("chat", provider, str(name), body, stream)


def _behind_litellm(model: Any, name: str) -> tuple[str, str]:
    """Provider and model of ``ChatLiteLLM``, read as LiteLLM's own integration reads them."""
    try:
        from ._litellm_models import model_of

        custom = getattr(model, "custom_llm_provider", None)
        return model_of({"model": name, "custom_llm_provider": custom, "api_base": getattr(model, "api_base", None)})
    except Exception:
        return "litellm", name


def _plain(message: Any) -> dict[str, Any]:
    plain = {"role": getattr(message, "type", ""), "content": getattr(message, "content", "")}
    for name in ("tool_calls", "tool_call_id"):
        if value := getattr(message, name, None):
            plain[name] = value
    return plain


# -- what is answered --------------------------------------------------------------------------------------------------


def ending_of(result: Any) -> Ending:
    """The ending of a whole answer.

    Each of several choices repeats the usage of all of them, so one of them is read and none are added up.
    """
    messages = [generation.message for generation in result.generations]
    usage = next((found for message in messages if (found := usage_of(message)) is not None), None)
    if usage is None:
        said = result.llm_output or {}
        usage = normalize_usage(said.get("token_usage") or said.get("usage"))
    text = sum(text_length(message) for message in messages)
    first = messages[0] if messages else None
    return Ending(
        how="complete",
        usage=usage,
        finished=True,
        output_tokens=generated_tokens(text) or None,
        response_id=response_id_of(first),
        model=model_of(first),
    )


def usage_of(message: Any) -> TokenUsage | None:
    """The usage that LangChain put on a message."""
    said = getattr(message, "usage_metadata", None)
    if not isinstance(said, Mapping):
        return None
    read, written = said.get("input_token_details") or {}, said.get("output_token_details") or {}
    created = read.get("cache_creation") or sum(
        count for name, count in read.items() if name.startswith("ephemeral_") and isinstance(count, int)
    )
    return normalize_usage(
        {
            "input_tokens": said.get("input_tokens"),
            "output_tokens": said.get("output_tokens"),
            "total_tokens": said.get("total_tokens"),
            "input_token_details": {
                "cached_tokens": read.get("cache_read"),
                "cache_write_tokens": created,
                "audio_tokens": read.get("audio"),
            },
            "output_token_details": {
                "reasoning_tokens": written.get("reasoning"),
                "audio_tokens": written.get("audio"),
            },
        }
    )


def response_id_of(message: Any) -> str | None:
    """The provider's id of the answer; not the one that LangChain makes up."""
    found = (getattr(message, "response_metadata", None) or {}).get("id") or getattr(message, "id", None)
    return found if isinstance(found, str) and not found.startswith(("lc_run-", "run-")) else None


def model_of(message: Any) -> str | None:
    """The model that the provider says answered."""
    said = getattr(message, "response_metadata", None) or {}
    found = said.get("model_name") or said.get("model")
    return found if isinstance(found, str) else None


def text_length(message: Any) -> int:
    """About how many characters the model wrote, arguments of tools included."""
    content = getattr(message, "content", "")
    size = len(content) if isinstance(content, str) else sum(_block_length(block) for block in content)
    for call in getattr(message, "tool_call_chunks", None) or ():
        size += len(call.get("args") or "")
    return size


def _block_length(block: Any) -> int:
    if isinstance(block, str):
        return len(block)
    return sum(len(block[name]) for name in ("text", "thinking", "reasoning") if isinstance(block.get(name), str))


class ChunkReader:
    """Follows the chunks of a stream, with what `vluna_llm._tap_watch.Watch` asks of a reader.

    LangChain adds the usage of all chunks up; that sum is the answer's own once the model has finished, and no earlier.
    """

    def __init__(self) -> None:
        self.finished = False
        self.finish_reason_seen = False
        self.failed = False
        self.response_id: str | None = None
        self.model: str | None = None
        self.output_characters = 0
        self.seen = False
        self._usage: TokenUsage | None = None
        self._framing = "sse"

    @property
    def usage(self) -> TokenUsage | None:
        """The final usage."""
        return self._usage if self.finish_reason_seen or self.finished else None

    def take(self, chunk: Any) -> None:
        """Read the next ``ChatGenerationChunk``."""
        self.seen = True
        message = chunk.message
        self.output_characters += text_length(message)
        if getattr(message, "usage_metadata", None) is not None and (found := usage_of(message)) is not None:
            self._usage = found if self._usage is None else self._usage + found
        said = {**(chunk.generation_info or {}), **(message.response_metadata or {})}
        if getattr(message, "chunk_position", None) == "last" or any(said.get(name) for name in _FINISHED):
            self.finish_reason_seen = True
        self.response_id = self.response_id or response_id_of(message)
        self.model = self.model or model_of(message)

    def end(self) -> None:
        """No more chunks will come."""
