"""Usage: what a model call consumed, read from what the provider sent."""

from .body import BodyFacts
from .reader import read_body, read_usage
from .stream import StreamReader, UsageChunkFilter, make_reader
from .types import TokenUsage

__all__ = ["BodyFacts", "StreamReader", "TokenUsage", "UsageChunkFilter", "make_reader", "read_body", "read_usage"]
