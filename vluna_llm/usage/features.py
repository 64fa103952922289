"""Which feature a model call is billed as: codes, families and meters (design rule 12)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import Any, Final, NoReturn

from ..errors import ConfigurationError
from ..identity import LONGEST_CODE, is_code

"""Characters of a feature, family or meter code, at most (gate contract, section 5)."""

_ILLEGAL: Final = re.compile(r"[^a-z0-9._/@:-]+")
_EDGE: Final = "._/@:-"
_SETTING: Final = "VLUNA_LLM_FEATURES"
_KEYS: Final = {
    "feature": "feature_code",
    "feature_code": "feature_code",
    "family": "family_code",
    "family_code": "family_code",
    "feature_family_code": "family_code",
    "meters": "meters",
}
_MOST_KNOWN: Final = 2_000


def normalize_feature_code(model: str | None, provider: str = "openai") -> str:
    """The feature code of a model where nothing else is configured: ``openai.gpt-4o-mini``.

    Lower-cased, every run of characters that a code may not have becomes one ``-``, edges that are not alphanumeric go,
    and it is cut to 128. A provider that the name already carries (``openai/gpt-4o``) is not said twice. Dated names
    stay dated: ``gpt-4o-2024-08-06`` is a feature of its own unless it is mapped. No model is ``unknown``.
    """
    prefix = _legal(provider)
    name = (model or "").lower().strip()
    if prefix:
        name = name.removeprefix(prefix + "/")
    name = _legal(name) or "unknown"
    return _legal(f"{prefix}.{name}" if prefix else name)


def _legal(text: str) -> str:
    return _ILLEGAL.sub("-", text.lower()).strip(_EDGE)[:LONGEST_CODE].rstrip(_EDGE)


@dataclass(frozen=True, slots=True)
class MeterCodes:
    """The meters of one feature, in full."""

    input: str
    cached: str
    output: str


@dataclass(frozen=True, slots=True)
class MeterNames:
    """How the meters of a feature are named: a suffix of its code where the name begins with ``.``, else a whole code.

    Raises:
        ConfigurationError: a name is not one that the gate takes.
    """

    input: str = ".tokens.input"
    cached: str = ".tokens.cached"
    output: str = ".tokens.output"

    def __post_init__(self) -> None:
        for kind in ("input", "cached", "output"):
            name = getattr(self, kind)
            if not isinstance(name, str) or not is_code(name.removeprefix(".")) or len(name) > LONGEST_CODE // 2:
                raise ConfigurationError(
                    f"{_SETTING}: the {kind} meter {name!r} must be a suffix such as '.tokens.{kind}' or a whole meter "
                    "code, of a-z 0-9 . _ / @ : - with an alphanumeric end, at most 64 characters."
                )

    def codes(self, feature_code: str) -> MeterCodes:
        """The meter codes of this feature. A feature code too long for its suffix is cut, since 128 is the limit."""
        return MeterCodes(*(_join(feature_code, name) for name in (self.input, self.cached, self.output)))


def _join(feature_code: str, name: str) -> str:
    if not name.startswith("."):
        return name
    return feature_code[: LONGEST_CODE - len(name)].rstrip(_EDGE) + name


DEFAULT_NAMES: Final = MeterNames()


@dataclass(frozen=True, slots=True)
class Feature:
    """What a call is billed as."""

    feature_code: str
    family_code: str | None = None
    names: MeterNames = DEFAULT_NAMES


@dataclass(frozen=True, slots=True)
class _Rule:
    feature_code: str | None
    family_code: str | None
    names: MeterNames

    def feature(self, default_code: str) -> Feature:
        return Feature(self.feature_code or default_code, self.family_code, self.names)


class FeatureMap:
    """From a model's name to the feature, family and meters that it is billed as.

    The first of these that knows the model decides: an exact name, a glob (in the order given), ``function``. Names are
    compared without case, as the caller wrote them and as a feature code (``openai.gpt-4o``). What nothing knows gets
    `normalize_feature_code` and the default meters.

    Args:
        rules: model or glob to a feature code, or to an object with any of ``feature``, ``family`` and ``meters``
            (``input``, ``cached``, ``output``), as `VLUNA_LLM_FEATURES` holds it.
        function: asked with the model's name; a feature code, a `Feature`, or None where it does not know.

    Raises:
        ConfigurationError: one sentence that names VLUNA_LLM_FEATURES and what is wrong in it.
    """

    def __init__(
        self,
        rules: Mapping[str, Any] | None = None,
        *,
        function: Callable[[str], str | Feature | None] | None = None,
    ) -> None:
        self._exact: dict[str, _Rule] = {}
        self._globs: list[tuple[re.Pattern[str], _Rule]] = []
        self._names: dict[str, MeterNames] = {}
        self._function = function
        self._known: dict[tuple[str, str], Feature] = {}
        if rules is not None and not isinstance(rules, Mapping):
            raise ConfigurationError(f"{_SETTING} must hold an object that maps models to features.")
        for pattern, value in (rules or {}).items():
            self._add(str(pattern), value)

    @classmethod
    def from_dict(cls, parsed: Mapping[str, Any]) -> FeatureMap:
        """The map that a parsed JSON or TOML file holds."""
        return cls(parsed)

    def resolve(self, model: str | None, provider: str = "openai") -> Feature:
        """The feature of a call. Never raises but for what ``function`` raises or answers wrongly."""
        key = (model or "", provider)
        found = self._known.get(key)
        if found is None:
            found = self._look_up(*key)
            if len(self._known) >= _MOST_KNOWN:  # callers may invent model names: stay bounded
                self._known.clear()
            self._known[key] = found
        return found

    def names(self, feature_code: str) -> MeterNames:
        """The meter names of a feature code, also of one that another process resolved and left in its journal."""
        found = self._names.get(feature_code)
        if found is not None:
            return found
        spellings = (feature_code, feature_code.partition(".")[2])
        for spelling in spellings:
            if (rule := self._exact.get(spelling)) and rule.feature_code is None:
                return rule.names
        for pattern, rule in self._globs:
            if rule.feature_code is None and any(pattern.match(spelling) for spelling in spellings):
                return rule.names
        return DEFAULT_NAMES

    def _look_up(self, model: str, provider: str) -> Feature:
        default = normalize_feature_code(model, provider)
        spellings = (model.lower().strip(), default)
        for spelling in spellings:
            if rule := self._exact.get(spelling):
                return self._remember(rule.feature(default))
        for pattern, rule in self._globs:
            if any(pattern.match(spelling) for spelling in spellings):
                return self._remember(rule.feature(default))
        if self._function is not None and (answer := self._function(model)) is not None:
            feature = Feature(answer) if isinstance(answer, str) else answer
            if not isinstance(feature, Feature) or not is_code(feature.feature_code):
                raise ConfigurationError(
                    f"The feature function must answer a feature code of a-z 0-9 . _ / @ : - "
                    f"(at most {LONGEST_CODE}, alphanumeric ends), not {answer!r}, for the model {model!r}."
                )
            return self._remember(feature)
        return Feature(default, None, self.names(default))

    def _remember(self, feature: Feature) -> Feature:
        if feature.names != DEFAULT_NAMES:
            self._names[feature.feature_code] = feature.names
        return feature

    def _add(self, pattern: str, value: object) -> None:
        rule = _rule(pattern, value)
        if rule.feature_code is not None:
            before = self._names.get(rule.feature_code)
            if before is not None and before != rule.names:
                _wrong(pattern, f"feature {rule.feature_code!r} is given other meters elsewhere in the file")
            self._names[rule.feature_code] = rule.names
        text = pattern.lower().strip()
        if not text:
            _wrong(pattern, "a model name or pattern must not be empty")
        if any(char in text for char in "*?["):
            self._globs.append((re.compile(translate(text)), rule))
        else:
            self._exact[text] = rule


def _rule(pattern: str, value: object) -> _Rule:
    if isinstance(value, str):
        value = {"feature": value}
    if not isinstance(value, Mapping) or not value:
        _wrong(pattern, "must be a feature code or an object with feature, family or meters")
    given: dict[str, object] = {}
    for key, item in value.items():
        if key not in _KEYS:
            _wrong(pattern, f"unknown member {key!r}; known are feature, family and meters")
        given[_KEYS[key]] = item
    for kind in ("feature_code", "family_code"):
        code = given.get(kind)
        if code is not None and not (isinstance(code, str) and is_code(code)):
            _wrong(pattern, f"{kind} {code!r} must be a-z 0-9 . _ / @ : - with alphanumeric ends, at most 128")
    meters = given.get("meters", {})
    if not isinstance(meters, Mapping) or not set(meters) <= {"input", "cached", "output"}:
        _wrong(pattern, "meters must be an object with input, cached or output")
    feature_code, family_code = given.get("feature_code"), given.get("family_code")
    return _Rule(
        feature_code if isinstance(feature_code, str) else None,
        family_code if isinstance(family_code, str) else None,
        MeterNames(**meters),
    )


def _wrong(pattern: str, what: str) -> NoReturn:
    raise ConfigurationError(f"{_SETTING}: {pattern!r}: {what}.")
