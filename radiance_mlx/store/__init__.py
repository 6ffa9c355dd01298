"""What the service remembers: examples, jobs, checkpoints and their lineage, events.

One SQLite database under `<home>/state`, and the posted data as files under `<home>/data`. Nothing here
knows of models, threads or HTTP.
"""

from .checkpoints import CheckpointRecord
from .files import write_durably
from .jobs import JobRecord
from .lock import HomeLock
from .store import Store

__all__ = ["CheckpointRecord", "HomeLock", "JobRecord", "Store", "write_durably"]
