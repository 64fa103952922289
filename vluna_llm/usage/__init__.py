"""Usage: what a model call consumed, read from what the provider sent."""

from .body import BodyFacts
from .estimate import Estimate, Estimator
from .features import Feature, FeatureMap, MeterCodes, MeterNames, normalize_feature_code
from .meters import MeterLine, MetersMode, compose_lines
from .reader import read_body, read_usage
from .stream import StreamReader, UsageChunkFilter, make_reader
from .types import TokenUsage

__all__ = [
    "BodyFacts",
    "Estimate",
    "Estimator",
    "Feature",
    "FeatureMap",
    "MeterCodes",
    "MeterLine",
    "MeterNames",
    "MetersMode",
    "StreamReader",
    "TokenUsage",
    "UsageChunkFilter",
    "compose_lines",
    "make_reader",
    "normalize_feature_code",
    "read_body",
    "read_usage",
]
