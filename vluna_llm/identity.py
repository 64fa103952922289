"""What an id and a label may look like, so that a call that could never be signed or booked is refused at once."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .errors import ConfigurationError

MAX_ID_LENGTH = 255
LONGEST_CODE = 128
MAX_LABELS = 32
MAX_LABEL_LENGTH = 512

_CODE = re.compile(r"[a-z0-9](?:[a-z0-9._/@:-]*[a-z0-9])?")
_PAYERS = frozenset({"principal_id", "user_id", "VLUNA_LLM_PRINCIPAL", "VLUNA_LLM_USER"})


def validate_id(value: object, name: str) -> str:
    """Return ``value`` where it can travel in a signed header (gate contract 3.2), else say what to change.

    The gate reads header values as Latin-1 and strips blanks at their edges, which breaks the signature.

    Args:
        value: a principal, user or other id.
        name: how the caller calls it, e.g. ``principal_id``.

    Raises:
        ConfigurationError: not text, empty, too long, blanks at an edge, control characters, outside Latin-1.
    """
    if not isinstance(value, str):
        raise ConfigurationError(f"{name} must be text, not {type(value).__name__}; pass str(...) of it.")
    if not value:
        fix = "pass the id under which this customer is billed" if name in _PAYERS else "pass a value, or leave it out"
        raise ConfigurationError(f"{name} is empty; {fix}.")
    if len(value) > MAX_ID_LENGTH:
        raise ConfigurationError(f"{name} has {len(value)} characters; use at most {MAX_ID_LENGTH}.")
    if value != value.strip():
        raise ConfigurationError(
            f"{name} {value!r} has blanks at its edges; strip them, or its signature cannot verify."
        )
    try:
        encoded = value.encode("latin-1")
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"{name} {value!r} has the character {value[error.start]!r} outside Latin-1, which the gate cannot verify; "
            "use an ASCII id."
        ) from None
    if any(byte < 0x20 or 0x7F <= byte < 0xA0 for byte in encoded):
        raise ConfigurationError(f"{name} {value!r} has a control character; use printable characters.")
    return value


def validate_labels(labels: Mapping[str, object]) -> dict[str, str]:
    """Return labels as text, bounded in number and length (they are stored with every booking).

    Raises:
        ConfigurationError: too many labels, a name that is no text, or a value that is too long or of a nested type.
    """
    if len(labels) > MAX_LABELS:
        raise ConfigurationError(f"labels has {len(labels)} entries; use at most {MAX_LABELS}.")
    clean: dict[str, str] = {}
    for key, value in labels.items():
        if not isinstance(key, str) or not key:
            raise ConfigurationError(f"labels has the name {key!r}; names must be non-empty text.")
        if not isinstance(value, (str, int, float, bool)):
            raise ConfigurationError(f"labels[{key!r}] is a {type(value).__name__}; use text or a number.")
        text = str(value)
        if len(text) > MAX_LABEL_LENGTH:
            raise ConfigurationError(f"labels[{key!r}] has {len(text)} characters; use at most {MAX_LABEL_LENGTH}.")
        if plain_text(text) != text or plain_text(key) != key:
            raise ConfigurationError(
                f"labels[{key!r}] has a character that cannot be stored (NUL or half a surrogate pair); remove it."
            )
        clean[key] = text
    return clean


def plain_text(value: object) -> str | None:
    """What a provider or caller named, as text that can be stored and sent: bounded, without NUL or half surrogates."""
    if value is None:
        return None
    if isinstance(value, str) and len(value) <= MAX_LABEL_LENGTH and value.isascii() and "\x00" not in value:
        return value
    return str(value)[:MAX_LABEL_LENGTH].replace("\x00", "").encode("utf-8", "replace").decode("utf-8")


def is_code(code: str) -> bool:
    """Whether the gate takes this as a code: 1 to 128 of ``[a-z0-9._/@:-]``, first and last alphanumeric."""
    return len(code) <= LONGEST_CODE and _CODE.fullmatch(code) is not None


def validate_code(code: str, name: str) -> str:
    """The code in lower case, as the gate keeps it.

    Raises:
        ConfigurationError: the gate would refuse it, and the work could never be booked.
    """
    lowered = code.lower() if isinstance(code, str) else ""
    if not is_code(lowered):
        raise ConfigurationError(
            f"{name} {code!r} is no code; use 1 to {LONGEST_CODE} of a-z 0-9 . _ / @ : - "
            "that start and end with a letter or digit."
        )
    return lowered
