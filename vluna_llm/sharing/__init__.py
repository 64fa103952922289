"""Settlements in PostgreSQL, delivered by any host (``VLUNA_LLM_OUTBOX_SHARED``).

A row goes there in three steps that survive a crash at any point: the journal says that it is being copied
(``sharing``), PostgreSQL takes it where it is not there yet, the journal says that it is there (``shared``). From the
first step on it is delivered from PostgreSQL alone, under a claim of its lane, by whichever host has that. While
PostgreSQL is away, rows that were never offered are delivered from here, and the others wait for it.
"""

from .opening import check_shared, open_shared
from .stage import Sharing
from .workers import Workers

__all__ = ["Sharing", "Workers", "check_shared", "open_shared"]
