"""How many tokens a call will use, guessed before it is made: what authorize is told.

No tokenizer: they cost megabytes and milliseconds, differ by model, and do not know what a provider adds (chat format,
tool instructions, hidden prompts). Instead the request is measured (`request.measure_request`), and each feature learns
from the usage that comes back how its measures become tokens:

* input: a linear model in the measures, one small Kalman filter per feature, whose prior is what is published about
  tokens and whose result is kept within bounds of that prior;
* output: what calls like this one have produced (a median over the feature's last calls, weighted by likeness), never
  more than the request's own limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from .request import Measures, measure_request
from .types import TokenUsage

_MOST_FEATURES: Final = 1_000
_REMEMBERED: Final = 24
"""Calls that a feature remembers (numbers only)."""

_STRANGER: Final = 0.02
"""What the request's own guess of the output weighs among the feature's past calls, of which a like one weighs 1."""
_NEAR: Final = 0.5
"""How far a call may be to correct the input of another: a factor of e ** 0.5 in one of its sizes."""

Vector = tuple[float, ...]

# Per component of Measures.vector: the prior weight and how far from it a feature may plausibly be (one sigma).
_PRIOR: Final[Vector] = (1.0, 1.0, 10.0, 1.0, 1.0, 1.0)
_SIGMA: Final[Vector] = (3.0, 0.25, 130.0, 0.5, 0.8, 1.5)
_NOISE_SHARE: Final = 0.04
_NOISE_TOKENS: Final = 2.0
_DRIFT: Final = 1.02
"""Old calls count a little less with each new one, so that a changed prompt format is followed."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A guess, in tokens. ``basis`` says whether this feature's own past took part in it.

    ``features_for_update`` belongs to `Estimator.update`: numbers, never text.
    """

    input_tokens: int
    output_tokens: int
    basis: Literal["calibrated", "uncalibrated"]
    features_for_update: Vector = ()

    @property
    def total(self) -> int:
        """Input plus output; at least 1, since an estimate of nothing asks the gate nothing."""
        return max(self.input_tokens + self.output_tokens, 1)


@dataclass(frozen=True, slots=True)
class _Past:
    """What a feature has learned: replaced as a whole, so that threads see one state or the other."""

    weights: Vector
    covariance: tuple[Vector, ...]
    calls: tuple[tuple[Vector, float, float], ...]  # likeness, input seen by input modelled, output of one choice


_NO_PAST: Final = _Past(
    _PRIOR,
    tuple(tuple(_SIGMA[i] ** 2 if i == j else 0.0 for j in range(len(_PRIOR))) for i in range(len(_PRIOR))),
    (),
)


class Estimator:
    """Guesses tokens and learns, by feature. Usable from any thread; a lost race loses one lesson, nothing else.

    Never raises on what a caller puts into a request; remembers numbers of at most 1,000 features, and no text.
    """

    __slots__ = ("_past",)

    def __init__(self) -> None:
        self._past: dict[str, _Past] = {}

    def predict(self, feature_code: str, body: Mapping[str, Any] | None, *, kind: str) -> Estimate:
        """The guess for a request that is about to be made.

        Args:
            feature_code: whose past to use.
            body: the decoded request; None where it is not known (multipart).
            kind: ``chat``, ``responses``, ``completions``, ``embeddings``, ``images``, ``audio``, ``messages``, alone
                or followed by the rest of the API's name (``chat.completions``); one that is not known is as chat.
        """
        measures = measure_request(body, kind)
        return _guess(measures, self._past.get(feature_code))

    def uncalibrated(self, body: Mapping[str, Any] | None, *, kind: str) -> Estimate:
        """The guess from the request alone: the same request gives the same numbers in any process (design rule 17)."""
        return _guess(measure_request(body, kind), None)

    def update(self, feature_code: str, estimate: Estimate, usage: TokenUsage) -> None:
        """Learn from what the call really used. Usage without tokens and estimates of others teach nothing."""
        numbers = estimate.features_for_update
        if len(numbers) != len(_PRIOR) + 3 or not usage.total_tokens or usage.input_tokens > 10**8:
            return
        learned = _learn(self._past.get(feature_code, _NO_PAST), numbers, usage)
        if len(self._past) > _MOST_FEATURES // 2:  # near the bound, the least recently used has to go first
            self._past.pop(feature_code, None)
        self._past[feature_code] = learned
        if len(self._past) > _MOST_FEATURES:
            try:
                self._past.pop(next(iter(self._past)), None)
            except (RuntimeError, StopIteration):  # another thread was faster
                pass


def _guess(measures: Measures, past: _Past | None) -> Estimate:
    vector = measures.vector
    numbers = (*vector, float(measures.limit or 0), float(measures.kind), float(measures.choices))
    known = past is not None and bool(past.calls)
    output = float(measures.typical_output)
    input_tokens = float(measures.exact_input or 0)
    distances = _distances(past, numbers) if past is not None else []
    if measures.exact_input is None:
        input_tokens = plain = _dot(_PRIOR, vector)
        if past is not None:
            learned = _dot(past.weights, vector) * _correction(past, distances)
            input_tokens = min(max(learned, plain * 0.2), plain * 5 + 2_000)
    if past is not None and known and measures.produces:
        output = _usual_output(past, distances, output / measures.choices) * measures.choices
    if measures.limit is not None:
        output = min(output, measures.limit * measures.choices)
    if not measures.produces:
        output = 0.0
    return Estimate(
        input_tokens=max(round(input_tokens), 0),
        output_tokens=max(round(output), 0),
        basis="calibrated" if known else "uncalibrated",
        features_for_update=numbers,
    )


def _learn(past: _Past, numbers: Vector, usage: TokenUsage) -> _Past:
    """One step of the filter, and one more call to remember."""
    size = len(_PRIOR)
    vector = numbers[:size]
    expected = _dot(past.weights, vector)
    covariance = past.covariance
    spread = [_dot(row, vector) for row in covariance]
    # The noise grows with what was reported, so that one absurd report moves little.
    noise = (_NOISE_TOKENS + _NOISE_SHARE * max(usage.input_tokens, expected)) ** 2
    scale = _dot(spread, vector) + noise
    surprise = usage.input_tokens - expected
    weights = tuple(past.weights[i] + spread[i] / scale * surprise for i in range(size))
    covariance = tuple(
        tuple(
            min((covariance[i][j] - spread[i] * spread[j] / scale) * _DRIFT, _SIGMA[i] ** 2)
            if i == j
            else (covariance[i][j] - spread[i] * spread[j] / scale)
            for j in range(size)
        )
        for i in range(size)
    )
    ratio = usage.input_tokens / max(_dot(weights, vector), 1.0)
    call = (_likeness(numbers), ratio, usage.output_tokens / max(numbers[-1], 1.0))
    return _Past(weights, covariance, (*past.calls[-_REMEMBERED + 1 :], call))


def _likeness(numbers: Vector) -> Vector:
    """Where a call stands among others: logarithms of its sizes, so that calls are alike by factors."""
    base, text, tools, defined, media, built_in, limit, kind, _ = numbers
    log = math.log1p
    return (
        log(base),
        log(text),
        tools,
        0.5 * log(defined),
        0.5 * log(media),
        0.5 * log(built_in),
        0.2 * log(limit),
        kind,
    )


def _distances(past: _Past, numbers: Vector) -> list[float]:
    here, dist = _likeness(numbers), math.dist
    return [dist(here, call[0]) for call in past.calls]


def _usual_output(past: _Past, distances: list[float], typical: float) -> float:
    """The median of what like calls produced; the request's own guess takes part with the weight of a distant call."""
    last, exp = len(distances) - 1, math.exp
    pairs = [
        (call[2], exp(-2.0 * distance - 0.03 * (last - i)))
        for i, (call, distance) in enumerate(zip(past.calls, distances, strict=False))
    ]
    pairs.append((typical, _STRANGER))
    return _weighted_median(pairs)


def _correction(past: _Past, distances: list[float]) -> float:
    """How far the model was off for calls almost like this one: what it cannot express, such as a hidden prompt."""
    near = [
        (call[1], 1.0 - distance / _NEAR)
        for call, distance in zip(past.calls, distances, strict=False)
        if distance < _NEAR
    ]
    return min(max(_weighted_median(near), 0.3), 3.0) if near else 1.0


def _weighted_median(pairs: list[tuple[float, float]]) -> float:
    pairs.sort()
    half = sum(weight for _, weight in pairs) / 2
    for value, weight in pairs:
        half -= weight
        if half <= 0:
            return value
    return pairs[-1][0]


def _dot(one: Vector | list[float], other: Vector) -> float:
    return sum(map(float.__mul__, one, other))
