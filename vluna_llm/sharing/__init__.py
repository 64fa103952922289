"""Settlements in PostgreSQL, delivered by any host (``VLUNA_LLM_OUTBOX_SHARED``)."""

from .stage import Sharing, Workers, check_shared, open_shared

__all__ = ["Sharing", "Workers", "check_shared", "open_shared"]
