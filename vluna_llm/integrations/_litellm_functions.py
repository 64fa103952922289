"""Which of LiteLLM's functions cost money, which of those report usage, and where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

HOMES: Final = (
    "litellm",
    "litellm.main",
    "litellm.responses.main",
    "litellm.images.main",
    "litellm.llms.anthropic.pass_through.messages.handler",
    "litellm.llms.anthropic.experimental_pass_through.messages.handler",
)
METERED: Final[Mapping[str, str]] = {
    "completion": "chat.completions",
    "acompletion": "chat.completions",
    "completion_with_retries": "chat.completions",
    "acompletion_with_retries": "chat.completions",
    "responses": "responses",
    "aresponses": "responses",
    "compact_responses": "responses",
    "acompact_responses": "responses",
    "text_completion": "completions",
    "atext_completion": "completions",
    "embedding": "embeddings",
    "aembedding": "embeddings",
    "image_generation": "images",
    "aimage_generation": "images",
    "image_edit": "images",
    "aimage_edit": "images",
    "image_variation": "images",
    "aimage_variation": "images",
    "transcription": "audio",
    "atranscription": "audio",
    "anthropic_messages": "anthropic.messages",
    "anthropic_messages_handler": "anthropic.messages",
}
"""LiteLLM's functions whose answers bring usage, and the API that each speaks."""

UNMETERED_HOMES: Final = (
    "litellm",
    "litellm.main",
    "litellm.google_genai.main",
    "litellm.rerank_api.main",
    "litellm.realtime_api.main",
    "litellm.responses.main",
    "litellm.batches.main",
    "litellm.videos.main",
    "litellm.ocr.main",
    "litellm.search.main",
    "litellm.assistants.main",
    "litellm.rag.main",
)
UNMETERED: Final = (
    "speech",
    "aspeech",
    "rerank",
    "arerank",
    "create_batch",
    "acreate_batch",
    "create_fine_tuning_job",
    "acreate_fine_tuning_job",
    "video_generation",
    "avideo_generation",
    "video_remix",
    "avideo_remix",
    "video_edit",
    "avideo_edit",
    "video_extension",
    "avideo_extension",
    "ocr",
    "aocr",
    "search",
    "asearch",
    "run_thread",
    "arun_thread",
    "run_thread_stream",
    "arun_thread_stream",
    "generate_content",
    "agenerate_content",
    "generate_content_stream",
    "agenerate_content_stream",
    "_arealtime",
    "_aresponses_websocket",
    "acreate_realtime_client_secret",
    "arealtime_calls",
)
"""Those that cost money and are not metered: each call of one follows ``on_unmetered`` (design rule 18)."""

BATCHES: Final = ("batch_completion", "batch_completion_models", "batch_completion_models_all_responses")
"""Those that make many calls at once, in threads that know nothing of the caller's context."""


MOCKS: Final[Mapping[str, tuple[str, ...]]] = {
    "chat.completions": ("mock_response", "mock_tool_calls", "mock_timeout"),
    "completions": ("mock_response", "mock_tool_calls", "mock_timeout"),
    "embeddings": ("mock_response",),
    "images": ("mock_response",),
}
"""The arguments by which LiteLLM's functions make an answer up."""


RETRYING: Final = ("completion_with_retries", "acompletion_with_retries")
"""A call of their own where a user calls them; LiteLLM's functions call them inside, too."""
