"""A typed client of a running service, for programs and for the commands: `Client`, and `AsyncClient` for asyncio.

Every fault is a `RadianceError`: the service's own errors come back as the class that carries their code, and no answer
at all is `ServiceUnreachable`.
"""

from .address import Service, configured_url, is_local, locate, read_server_file, tidy_url
from .aio import AsyncClient, AsyncSearchStream
from .results import (
    Checkpoint,
    Checkpoints,
    Evaluation,
    Event,
    Events,
    Info,
    Job,
    Jobs,
    LossCurves,
    Progress,
    RollbackResult,
    SearchResult,
    UpdateResult,
    Usage,
)
from .retrying import Retry
from .sync import Client, SearchStream

__all__ = [
    "AsyncClient",
    "AsyncSearchStream",
    "Checkpoint",
    "Checkpoints",
    "Client",
    "Evaluation",
    "Event",
    "Events",
    "Info",
    "Job",
    "Jobs",
    "LossCurves",
    "Progress",
    "Retry",
    "RollbackResult",
    "SearchResult",
    "SearchStream",
    "Service",
    "UpdateResult",
    "Usage",
    "configured_url",
    "is_local",
    "locate",
    "read_server_file",
    "tidy_url",
]
