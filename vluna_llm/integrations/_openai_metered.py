"""What makes the two methods of a metered client those of an OpenAI client."""

from __future__ import annotations

from typing import Any, ClassVar

import openai

from ._openai_call import OpenAICall, prepare
from ._sdk_metered import AsyncMetered, Metered, SyncMetered


class _OpenAIMetered(Metered):
    _vluna_status_error: ClassVar[type[Exception]] = openai.APIStatusError

    def _vluna_prepare(self, options: Any, stream: bool) -> OpenAICall | None:
        metering = self._vluna_metering
        return prepare(metering.vluna, metering.bound, self, options, stream, flavour=_flavour(self))


class SyncOpenAIMetered(_OpenAIMetered, SyncMetered):
    """The two methods, in the colour of `openai.OpenAI`."""


class AsyncOpenAIMetered(_OpenAIMetered, AsyncMetered):
    """The two methods, in the colour of `openai.AsyncOpenAI`."""


_AZURE = (openai.AzureOpenAI, openai.AsyncAzureOpenAI)
_BEDROCK = tuple(
    kind for name in ("BedrockOpenAI", "AsyncBedrockOpenAI") if isinstance(kind := getattr(openai, name, None), type)
)


def _flavour(client: object) -> str:
    return "azure" if isinstance(client, _AZURE) else "bedrock" if isinstance(client, _BEDROCK) else ""
