"""Where operations and settlements wait, durably."""

from .due import DueRows
from .journal import Journal
from .row import Row

__all__ = ["DueRows", "Journal", "Row"]
