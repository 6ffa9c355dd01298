"""`lineage: reconsolidate`: when the service is idle, the whole log of the stable line is trained anew from the base.

A reconsolidation is a job that is in training from its beginning and has no examples of its own: what it learns is
what led to the stable checkpoint. Whatever makes it moot puts it aside, and the next idle time begins another.
"""

import asyncio
from collections.abc import Callable, Sequence

from .config import Config
from .curation import data_hash
from .earlier import Log
from .errors import Cancelled
from .lineage import Lineage, number_of
from .lora.log import still_true
from .messages import Example, TrainBatch
from .storage import StoreThread
from .store import CheckpointRecord, JobRecord
from .triggers import reconsolidation_due

#: why a reconsolidation is put aside, as its job's note says
UPDATE_DUE = "an update is due; the next idle time begins another"
STABLE_MOVED = "the stable checkpoint has moved"
SWITCHED_OFF = "lineage is not reconsolidate any more"


class Reconsolidation:
    """What the scheduler asks and does about it."""

    def __init__(self, config: Config, store: StoreThread, lineage: Lineage, clock: Callable[[], float]) -> None:
        self._config, self._store, self._lineage, self._clock = config, store, lineage, clock
        self._log = Log(store)

    async def wait_s(self) -> float | None:
        """Seconds until one is due, 0 for now, when nothing is queued; None: not before something changes."""
        stable, base = self._lineage.stable, self._lineage.base_hash
        if self._config.lineage != "reconsolidate" or stable is None:
            return None
        line = await self._store(lambda s: s.lineage(base, stable))
        accepted, last = await self._store(lambda s: (s.last_accepted(), s.last_consolidated(base)))
        settings = self._config.reconsolidate
        return reconsolidation_due(
            learnt=len(since_last(line)),
            after_updates=settings.after_updates,
            done=last is not None and last >= number_of(stable),
            last_accepted=accepted or 0.0,
            idle_s=settings.idle_minutes * 60,
            now=self._clock(),
        )

    async def begin(self) -> tuple[str, str]:
        """Record one of the stable checkpoint; (its job, what it becomes).

        Raises `Conflict` if that moves, or an update waits.
        """
        stable = str(self._lineage.stable)
        return await self._store(lambda s: s.start_reconsolidation(self._lineage.base_hash, stable))

    async def examples(self, consolidates: str) -> tuple[Example, ...]:
        """All that led to the checkpoint, oldest first, without what has been answered otherwise since."""
        line = await self._store(lambda s: s.lineage(s.checkpoint(consolidates).base_hash, consolidates))
        log = [example for _, example in await self._log.rows(line)]
        places: list[int] = []
        for _ in still_true(log, (), places):
            await asyncio.sleep(0)
        return tuple(log[place] for place in places)

    async def batch(self, job: JobRecord, checkpoint: str) -> TrainBatch:
        """What is to be trained. Raises `Cancelled`, with why, if that is moot by now."""
        stable = self._lineage.stable
        if self._config.lineage != "reconsolidate":
            raise Cancelled(SWITCHED_OFF)
        if stable is None or stable != job.consolidates:
            raise Cancelled(STABLE_MOVED)
        line = await self._store(lambda s: s.lineage(self._lineage.base_hash, stable))
        updates = sum(not record.reconsolidated for record in line)
        examples = await self.examples(stable)
        steps = min(self._config.training.max_steps * updates, self._config.reconsolidate.max_steps)
        return TrainBatch(
            checkpoint=checkpoint,
            parent=stable,
            jobs=(job.job_id,),
            examples=examples,
            data_hash=data_hash(examples),
            number=number_of(checkpoint),
            lineage="fresh",
            reconsolidated=True,
            max_steps=steps,
            notes=(f"reconsolidated: trained from the base over {len(examples)} examples of {updates} updates",),
        )


def since_last(line: Sequence[CheckpointRecord]) -> list[CheckpointRecord]:
    """The part of `line` (newest first) that is newer than its last reconsolidation."""
    last = next((i for i, record in enumerate(line) if record.reconsolidated), len(line))
    return list(line[:last])
