"""How the gate reads the fields of a request: numbers, codes, labels, dates (gate contract, sections 6 and 7).

The real server is written in JavaScript and converts like it; the rules here are its rules, so that a client that
works against this gate works against that one.
"""

from __future__ import annotations

import json
import math
import re
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import UUID

from .problems import invalid

MAX_SAFE = 2**53 - 1
"""The largest amount and the cap of an unlimited lease."""
MAX_INT64 = 2**63 - 1

_CODE = re.compile(r"[a-z0-9._/@:-]+\Z")
_HEX_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+\Z")
_OCTAL_NUMBER = re.compile(r"0[oO][0-7]+\Z")
_BINARY_NUMBER = re.compile(r"0[bB][01]+\Z")
_DECIMAL_NUMBER = re.compile(r"[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?)\Z")
_ISO_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?\s*(Z|z|[+-]\d\d:?\d\d)?)?\Z"
)


def parse_json(body: bytes) -> Any:
    """Decode JSON as JavaScript does: integers beyond 2^53 lose digits, integral fractions become integers.

    Raises:
        ValueError: the bytes are not JSON.
    """
    return json.loads(body, parse_int=_js_int, parse_float=_js_float, parse_constant=_no_constant)


def _js_int(text: str) -> int:
    value = int(text)
    return value if -MAX_SAFE <= value <= MAX_SAFE else int(float(text))


def _js_float(text: str) -> float | int:
    value = float(text)
    return int(value) if math.isfinite(value) and value.is_integer() else value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def number(value: Any) -> int | None:
    """A quantity as JavaScript's ``Number()`` reads it, floored; None where it is not a finite number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return math.floor(value) if math.isfinite(value) else None
    if not isinstance(value, str):
        return None
    text = value.strip()
    if text == "":
        return 0
    if text.isascii() and text.isdigit():
        plain = int(text)
        return plain if plain <= MAX_SAFE else int(float(plain))
    for pattern, base in ((_HEX_NUMBER, 16), (_OCTAL_NUMBER, 8), (_BINARY_NUMBER, 2)):
        if pattern.match(text):
            return int(text, base)
    if not _DECIMAL_NUMBER.match(text):
        return None
    result = float(text)
    return math.floor(result) if math.isfinite(result) else None


def quantity(value: Any, name: str, *, positive: bool) -> int:
    """A quantity of a request; absent counts as 0. Raises 422 in the words of the real server."""
    if value is None:
        read: int | None = 0
    else:
        read = number(value)
    if read is None:
        raise invalid(f"{name} must be a number or numeric string")
    if read < 0:
        raise invalid(f"{name} must be greater than or equal to 0")
    if positive and read == 0:
        raise invalid(f"{name} must be greater than 0")
    return read


def code(value: Any, name: str) -> str:
    """A feature, family or meter code, trimmed and lower-cased. Raises 422."""
    if not isinstance(value, str):
        raise invalid(f"{name} must be a string")
    text = value.strip().lower()
    if not text:
        raise invalid(f"{name} is required")
    if len(text) > 128:
        raise invalid(f"{name} must be 1..128 chars")
    if not _CODE.match(text):
        raise invalid(f"{name} must match [a-z0-9._/@:-]+")
    if not (text[0].isalnum() and text[-1].isalnum()):
        raise invalid(f"{name} must start and end with [a-z0-9]")
    return text


def labels(value: Any) -> dict[str, str]:
    """Labels as strings; empty ones are dropped. A string counts as a list of its characters."""
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, (list, str)):
        pairs = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {}
    out = {}
    for key, item in pairs:
        text = js_string(item).strip() if item is not None else ""
        if text and key.strip():
            out[key] = text
    return out


def js_string(value: Any) -> str:
    """What JavaScript's ``String()`` makes of a decoded JSON value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "[object Object]"
    if isinstance(value, list):
        return ",".join("" if item is None else js_string(item) for item in value)
    return str(value)


def is_uuid(value: str) -> bool:
    """Whether the text is a uuid in its usual form."""
    try:
        return str(UUID(value)) == value.lower()
    except ValueError:
        return False


def parse_time(value: Any) -> int | None:
    """A date in milliseconds since the epoch; None where it cannot be read. A number counts as milliseconds."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return int(value)
    if not isinstance(value, str):
        return None
    match = _ISO_TIME.match(value.strip())
    try:
        if match is None:
            moment = parsedate_to_datetime(value)
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=timezone.utc)
            return int(moment.timestamp() * 1000)
        year, month, day, hour, minute, second, fraction, zone = match.groups()
        moment = datetime(
            int(year), int(month), int(day), int(hour or 0), int(minute or 0), int(second or 0), tzinfo=timezone.utc
        )
    except (ValueError, TypeError, IndexError):
        return None
    ms = int(moment.timestamp()) * 1000 + int(((fraction or "") + "000")[:3])
    if zone and zone not in "Zz":
        offset = (int(zone[1:3]) * 60 + int(zone[-2:])) * 60_000
        ms += offset if zone[0] == "-" else -offset
    return ms


def iso(ms: int) -> str:
    """A moment as the gate writes it: UTC, milliseconds, ``Z``."""
    return datetime.fromtimestamp(ms // 1000, tz=timezone.utc).strftime("%Y-%m-%dT%H:%M:%S") + f".{ms % 1000:03d}Z"


def usd(xusd: int) -> str:
    """An amount of XUSD in dollars, without trailing zeros."""
    sign = "-" if xusd < 0 else ""
    whole, rest = divmod(abs(xusd), 1_000_000)
    return f"{sign}{whole}" + (f".{rest:06d}".rstrip("0") if rest else "")


def amounts(xusd: int) -> dict[str, str]:
    """An amount in both units."""
    return {"xusd": str(xusd), "usd": usd(xusd)}
