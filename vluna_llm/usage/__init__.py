"""Usage: what a model call consumed, read from what the provider sent."""

from .types import TokenUsage

__all__ = ["TokenUsage"]
