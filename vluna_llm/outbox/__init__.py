"""Where operations and settlements wait, durably."""

from .journal import DueRows, Journal
from .row import Row

__all__ = ["DueRows", "Journal", "Row"]
