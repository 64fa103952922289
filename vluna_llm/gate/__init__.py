"""The wire to the gate: signing, requests, answers and the two typed clients."""

from .client import GateClient
from .client_async import AsyncGateClient
from .core import AUTHORIZE_DEADLINE, DEFAULT_TIMEOUT
from .credentials import GateCredentials
from .models import BatchItem, BatchResult, CancelResult, CommitLine, CommitResult, IngestResult
from .requests import BatchCommit, GateRequest, MeterLine
from .wire import Answer

__all__ = [
    "AUTHORIZE_DEADLINE",
    "DEFAULT_TIMEOUT",
    "Answer",
    "AsyncGateClient",
    "BatchCommit",
    "BatchItem",
    "BatchResult",
    "CancelResult",
    "CommitLine",
    "CommitResult",
    "GateClient",
    "GateCredentials",
    "GateRequest",
    "IngestResult",
    "MeterLine",
]
