"""What the service remembers: examples, jobs, checkpoints and their lineage, uploads, events.

One SQLite database under `<home>/state`, and the posted data as files under `<home>/data`. Nothing here
knows of models, threads or HTTP.
"""

from .checkpoints import CheckpointRecord
from .files import write_durably
from .jobs import JobRecord
from .lock import HomeLock
from .store import Store
from .tunings import Tuned, TuningRecord
from .uploads import UploadRecord

__all__ = [
    "CheckpointRecord",
    "HomeLock",
    "JobRecord",
    "Store",
    "Tuned",
    "TuningRecord",
    "UploadRecord",
    "write_durably",
]
