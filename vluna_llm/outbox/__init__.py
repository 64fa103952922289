"""Where operations and settlements wait, durably."""

from .journal import Journal
from .row import Row

__all__ = ["Journal", "Row"]
