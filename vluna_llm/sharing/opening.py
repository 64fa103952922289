"""From the URL in the settings to the shared outbox, and what can be said of the URL before anything is asked."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..outbox.postgres import SharedOutbox


def open_shared(url: str, base_url: str, realm_id: str) -> SharedOutbox:
    """The shared outbox behind this URL; nothing is asked of it yet.

    Raises:
        ConfigurationError: as `check_shared`.
    """
    check_shared(url)
    from ..outbox.postgres import SharedOutbox

    return SharedOutbox(url, base_url, realm_id)


def check_shared(url: str) -> None:
    """See whether this URL can be used; nothing is asked of it.

    Raises:
        ConfigurationError: the package that speaks to PostgreSQL is not installed or finds no libpq, or cannot make
            anything of the URL.
    """
    try:
        importlib.import_module("psycopg")
    except ImportError as error:
        raise ConfigurationError(
            "VLUNA_LLM_OUTBOX_SHARED needs psycopg and libpq, which cannot be loaded here "
            f'({error}): pip install "vluna-llm[postgres]", or "psycopg[binary]" where the system has no libpq.'
        ) from None
    from ..outbox.postgres_connection import understood

    understood(url)
