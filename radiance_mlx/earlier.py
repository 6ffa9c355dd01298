"""The log: every example that led to a checkpoint, oldest first, as the store has it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from .messages import Example
from .storage import StoreThread
from .store import CheckpointRecord, JobRecord

#: the newest so many are looked at
LOG_EXAMPLES = 100_000
#: an example, and the job that it came with
Row = tuple[str, Example]


class Log:
    """Reads it."""

    def __init__(self, store: StoreThread) -> None:
        self._store = store

    async def rows(self, line: Sequence[CheckpointRecord]) -> list[Row]:
        """What was learnt on the way, `line` being newest first: without what was held out for good."""
        jobs = [job for record in reversed(line) for job in record.jobs]
        rows = await self._store(lambda s: s.examples_of(jobs))
        held_out = [r for r in line if r.metrics.get("never_trained") and not r.reconsolidated]
        if held_out:
            batches = await self._store(lambda s: [s.examples_of(record.jobs) for record in held_out])
            rows = _trained(rows, [(b, r.metrics["never_trained"]) for b, r in zip(batches, held_out, strict=True)])
        return rows[-LOG_EXAMPLES:]

    async def replayable(self, rows: Sequence[Row], jobs: Sequence[JobRecord], by_tag: bool) -> list[int]:
        """The places in `rows` of the examples that may be trained again beside `jobs`."""
        if not by_tag:
            return list(range(len(rows)))
        wanted = {tag for job in jobs for tag in job.tags}
        names = list(dict.fromkeys(job for job, _ in rows))
        earlier = await self._store(lambda s: [s.job(name) for name in names])
        sharing = {job.job_id for job in earlier if wanted.intersection(job.tags)}
        return [place for place, (job, _) in enumerate(rows) if job in sharing]


def _trained(rows: Sequence[Row], batches: Iterable[tuple[Sequence[Row], Sequence[int]]]) -> list[Row]:
    """`rows` without what was held out for good: of each batch's own rows, those at the places."""
    left_out = set[tuple[str, int]]()
    for batch, places in batches:
        numbered = list(_numbered(batch))
        left_out.update(numbered[place] for place in places)
    return [row for row, number in zip(rows, _numbered(rows), strict=True) if number not in left_out]


def _numbered(rows: Iterable[Row]) -> Iterator[tuple[str, int]]:
    """The job of each row, and its place among the rows of that job."""
    seen = Counter[str]()
    for job, _ in rows:
        yield job, seen[job]
        seen[job] += 1
