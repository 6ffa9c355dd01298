"""Fine-tuning on the service's own jobs: files that are kept, jobs made of them, and what became of each."""

import asyncio
import contextlib
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import structlog

from .curation import curated_files
from .errors import Conflict, IdempotencyMismatch, NotReady
from .messages import Example, Terms
from .scheduler import Scheduler
from .storage import StoreThread
from .store import CheckpointRecord, JobRecord, Store, Tuned, TuningRecord, UploadRecord
from .store.tunings import insert

log = structlog.get_logger(__name__)
STOP_S = 10.0  # how long a cancellation waits for training to stop


class Tuning:
    """All methods belong to the event loop."""

    def __init__(self, store: StoreThread, scheduler: Scheduler) -> None:
        self._store, self._scheduler = store, scheduler

    # --- files -----------------------------------------------------------------------------------

    async def upload(self, filename: str, purpose: str, content: bytes, examples: int) -> UploadRecord:
        """Keep a file that is sound, and so many examples; it is durable once this returns."""
        return await self._store(lambda s: s.uploads.add(filename, purpose, content, examples))

    async def file(self, file_id: str) -> UploadRecord:
        """Raises `NotFound`."""
        return await self._store(lambda s: s.uploads.one(file_id))

    async def files(self) -> list[UploadRecord]:
        """Newest first."""
        return await self._store(lambda s: s.uploads.all())

    async def content(self, file_id: str) -> bytes:
        """Raises `NotFound`, `StoreError`."""
        return await self._store(lambda s: s.uploads.content(file_id))

    async def delete(self, file_id: str) -> None:
        """Jobs that were made of it keep their examples. Raises `NotFound`."""
        await self._store(lambda s: s.uploads.delete(file_id))

    # --- jobs ------------------------------------------------------------------------------------

    async def known(self, request: dict[str, Any], idempotency_key: str | None) -> Tuned | None:
        """The job that this key has already made of this request. Raises `IdempotencyMismatch`."""
        if idempotency_key is None:
            return None
        async with self._keys_as_known():
            return await self._store(lambda s: s.tunings.known(idempotency_key, _hash(request)))

    async def create(
        self,
        request: dict[str, Any],
        examples: Sequence[Example],
        validation: Sequence[Example],
        *,
        terms: Terms | None,
        suffix: str | None,
        idempotency_key: str | None = None,
    ) -> Tuned:
        """Accept a job durably. With `terms` it is a batch of its own, and trains as soon as nothing else does.

        Raises `IdempotencyMismatch`.
        """
        raw = await asyncio.to_thread(_raw, request, examples)
        curated = await asyncio.to_thread(curated_files, examples)

        def record(job: JobRecord) -> TuningRecord:
            return TuningRecord(f"ftjob-{secrets.token_hex(12)}", job.job_id, job.created, suffix, request)

        def accept(store: Store) -> tuple[JobRecord, bool]:
            return store.accept(
                examples,
                [f"suffix:{suffix}"] if suffix else [],
                raw=raw,
                curated=curated,
                idempotency_key=idempotency_key,
                body_hash=_hash(request),
                terms=terms,
                also=lambda db, job: insert(db, record(job), validation),
            )

        async with self._keys_as_known():
            job, new = await self._store(accept)
        if new:
            log.info("accepted", job=job.job_id, examples=job.example_count, fine_tuning=True)
            self._scheduler.wake()
        tuned = await self._store(lambda s: s.tunings.of_job(job.job_id))
        assert tuned is not None
        return tuned

    @contextlib.asynccontextmanager
    async def _keys_as_known(self) -> AsyncIterator[None]:
        """A mismatch inside names the fine-tuning job that has the key; an update has no id that is known here."""
        try:
            yield
        except IdempotencyMismatch as error:
            job_id = error.job_id
            tuned = await self._store(lambda s: s.tunings.of_job(job_id))
            raise error.called(tuned[0].tuning_id if tuned else "an update of POST /update") from None

    async def one(self, tuning_id: str) -> Tuned:
        """Raises `NotFound`."""
        return await self._store(lambda s: s.tunings.one(tuning_id))

    async def page(
        self, metadata: Mapping[str, str], after: str | None, limit: int
    ) -> tuple[list[tuple[TuningRecord, JobRecord, CheckpointRecord | None]], bool]:
        """Those with this metadata after `after`, newest first, and whether there are more.

        Each with its job, and the checkpoint that was published of it. Raises `NotFound` if `after` is none of them.
        """
        return await self._store(lambda s: s.tunings.page(metadata, after, limit))

    async def names(self) -> dict[str, str]:
        """`checkpoint:suffix` → checkpoint, of jobs that were given a suffix; newest first."""
        return await self._store(lambda s: s.tunings.names())

    async def events(self, job_id: str, after: int = 0) -> list[dict[str, Any]]:
        """What the journal says of a job, oldest first; entries with a greater id than `after`."""
        return await self._store(lambda s: s.events_of(job_id, after))

    async def made(self, job: JobRecord) -> CheckpointRecord | None:
        """The checkpoint that came of a job, if one did."""
        checkpoint = job.checkpoint
        if job.state != "published" or checkpoint is None:
            return None
        return await self._store(lambda s: s.checkpoint(checkpoint))

    async def pause(self, tuning_id: str) -> Tuned:
        """Have it wait; what it has learnt so far is kept. Raises `NotFound`, `Conflict`, `NotReady`."""
        tuning, _ = await self.one(tuning_id)
        with _as_known(tuning):
            return tuning, await self._scheduler.pause(tuning.job_id)

    async def resume(self, tuning_id: str) -> Tuned:
        """Raises `NotFound`, `Conflict`."""
        tuning, _ = await self.one(tuning_id)
        with _as_known(tuning):
            return tuning, await self._scheduler.resume(tuning.job_id)

    async def cancel(self, tuning_id: str) -> Tuned:
        """In training, it is cancelled as soon as that has stopped, for which this waits a while.

        Raises `NotFound`, `Conflict`.
        """
        tuning, _ = await self.one(tuning_id)
        with _as_known(tuning):
            await self._scheduler.cancel(tuning.job_id)
        running = self._scheduler.running
        if running is not None and tuning.job_id in running.jobs:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(running.ended.wait(), STOP_S)
        return await self.one(tuning_id)


@contextlib.contextmanager
def _as_known(tuning: TuningRecord) -> Iterator[None]:
    """Refusals inside name the fine-tuning job, and not the job that does it."""
    try:
        yield
    except (Conflict, NotReady) as error:
        raise error.called(tuning.tuning_id) from None


def _hash(request: dict[str, Any]) -> str:
    """Tells a request from others: it names its files, whose contents never change."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _raw(request: dict[str, Any], examples: Sequence[Example]) -> bytes:
    """What is kept of a job as it was asked for. Example by example: one long `dumps` would hold up all threads."""
    listed = ", ".join(json.dumps(example.as_dict()) for example in examples)
    return f'{{"request": {json.dumps(request)}, "examples": [{listed}]}}'.encode()
