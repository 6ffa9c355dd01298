"""The batch under way: what it is, where it stands, and what the database hears of that."""

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass, field

from .errors import RadianceError
from .messages import Progress
from .storage import StoreThread

PERSIST_S = 1.0


@dataclass
class Running:
    """The batch that is under way."""

    checkpoint: str
    jobs: tuple[str, ...]
    progress: Progress | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    persisted_at: float = 0.0
    evaluating: bool = False
    reconsolidates: bool = False
    aside: str = ""  # why it is put aside, or begins anew, once that is known
    begun: tuple[str, ...] = ()  # jobs that have trained for this before; steps of theirs may have been told
    anew: str = ""  # why those begin anew, if it turns out that they do
    pausing: set[str] = field(default_factory=set)  # jobs that are to wait until they are resumed
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class ProgressLog:
    """Belongs to the event loop."""

    def __init__(self, store: StoreThread) -> None:
        self._store = store
        self._writes: set[asyncio.Task[None]] = set()

    def report(self, running: Running, progress: Progress) -> None:
        """Called after each optimizer step; the database hears of it once a second."""
        # only now is it known: whether a kept state can be gone on from is seen where it is read
        anew = bool(running.begun) and running.progress is None and progress.phase == "training" and progress.step <= 1
        running.progress = progress
        now = time.monotonic()
        entered = progress.phase == "evaluating" and not running.evaluating
        if entered:
            running.evaluating = True
        if entered or now - running.persisted_at >= PERSIST_S:
            running.persisted_at = now
            write = asyncio.ensure_future(self._persist(running, progress, entered, anew))
            self._writes.add(write)
            write.add_done_callback(self._writes.discard)

    async def _persist(self, running: Running, progress: Progress, entered: bool, anew: bool) -> None:
        data = progress.as_dict()
        with contextlib.suppress(RadianceError):
            if anew:
                restarted = {"jobs": list(running.begun), "why": running.anew}
                await self._store(lambda s: s.event("restarted", restarted))
            if entered:
                await self._store(lambda s: s.set_state(running.jobs, "evaluating"))
            await self._store(lambda s: s.save_progress(running.jobs, data))
            event = {"checkpoint": running.checkpoint, "jobs": list(running.jobs), **data}
            await self._store(lambda s: s.event("progress", event))

    async def settle(self) -> None:
        """Wait for what is being written."""
        if self._writes:
            await asyncio.gather(*self._writes, return_exceptions=True)
