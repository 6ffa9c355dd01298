"""The store as others see it: each method is one short transaction."""

import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import Conflict, StoreError
from ..messages import EventKind, Example, Terms
from . import acceptance, checkpoints, jobs, journal
from .checkpoints import CheckpointRecord
from .database import Database
from .files import sync_folder
from .jobs import JobRecord
from .tunings import Tunings
from .uploads import Uploads


class Store:
    """Jobs, examples, checkpoints and events of one home.

    Used from one thread at a time. What a method has returned from is on disk; a method that raises has
    changed nothing. `StoreError` means that the disk or the database file is at fault.
    """

    def __init__(self, home: Path, clock: Callable[[], float] = time.time) -> None:
        """Open the store, made if need be. Raises `StoreError`, for one when a newer version made it."""
        self._clock = clock
        self._data = home / "data"
        state = home / "state"
        try:
            for folder in (state, self._data / "raw", self._data / "curated", self._data / "files"):
                folder.mkdir(parents=True, exist_ok=True)
            for folder in (home, self._data):
                sync_folder(folder)
        except OSError as error:
            raise StoreError(
                f"The home {home} cannot be used: {error}.",
                "It must be a folder in which this user may write.",
            ) from error
        self._database = Database(state / "radiance.db", clock)
        self.uploads = Uploads(self._database, self._data / "files", clock)
        self.tunings = Tunings(self._database)

    def close(self) -> None:
        """May be called more than once."""
        self._database.close()

    # jobs

    def accept(
        self,
        examples: Sequence[Example],
        tags: Sequence[str],
        *,
        raw: bytes,
        curated: Mapping[str, bytes],
        idempotency_key: str | None = None,
        body_hash: str,
        state: Literal["queued", "review"] = "queued",
        terms: Terms | None = None,
        also: Callable[[sqlite3.Connection, JobRecord], None] = lambda db, job: None,
    ) -> tuple[JobRecord, bool]:
        """Make a job of an update; True when it is new.

        `data/raw/<job_id>.json` and the files of `data/curated/<job_id>/` are on disk before the job is. A
        key that is known makes no second job: the first comes back as it now stands, or
        `IdempotencyMismatch` is raised when its body was another. `also` is done in the same transaction.
        """
        with self._database.write() as db:
            known = acceptance.known(db, idempotency_key, body_hash)
            if known is not None:
                return known, False
            now = self._clock()
            job = acceptance.new_job(db, examples, tags, state, idempotency_key, body_hash, now, terms=terms)
            also(db, job)
            acceptance.write_files(self._data, job.job_id, raw, curated)
        return job, True

    def job(self, job_id: str) -> JobRecord:
        """Raises `NotFound`."""
        with self._database.read() as db:
            return jobs.one(db, job_id)

    def jobs(self, *, state: str | None = None, limit: int = 100, before: int | None = None) -> list[JobRecord]:
        """Newest first; `before` is the number of the last job of the page before."""
        with self._database.read() as db:
            return jobs.newest(db, state, limit, before)

    def count_jobs(self) -> dict[str, int]:
        """How many jobs are in each state; states without jobs are there with 0."""
        with self._database.read() as db:
            return jobs.count(db)

    def queued(self) -> list[JobRecord]:
        """The jobs that wait to be trained, oldest first."""
        with self._database.read() as db:
            return jobs.in_states(db, ["queued"])

    def examples_of(self, job_ids: Iterable[str]) -> list[tuple[str, Example]]:
        """(job id, example) in the order in which they were accepted; unknown ids add nothing."""
        with self._database.read() as db:
            return jobs.examples(db, job_ids)

    def set_state(
        self,
        job_ids: Sequence[str],
        state: str,
        *,
        error: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        events: Sequence[tuple[EventKind, Mapping[str, Any]]] = (),
    ) -> None:
        """Move all the jobs and append `events` (kind, data); or raise `Conflict` when one may not go there
        (`jobs.TRANSITIONS`).

        Notes are added to those there are. Training, published and the way back to the queue have methods
        of their own: `start_batch`, `publish`, `requeue`.
        """
        with self._database.write() as db:
            now = self._clock()
            jobs.set_state(db, job_ids, state, error, notes, now)
            journal.append_all(db, events, now)

    def save_progress(self, job_ids: Sequence[str], progress: Mapping[str, Any]) -> None:
        """Remember where the training stands; jobs that do not train any more are left alone."""
        with self._database.write() as db:
            jobs.save_progress(db, job_ids, progress, self._clock())

    def add_notes(self, job_ids: Sequence[str], notes: Sequence[str]) -> None:
        with self._database.write() as db:
            jobs.add_notes(db, job_ids, notes, self._clock())

    def cancel(self, job_id: str) -> JobRecord:
        """Cancel a job that waits. For one that trains the wish is remembered: `publish` refuses it, and when
        its training has been stopped, `requeue` cancels it.

        Raises `Conflict` for a job that has come to an end.
        """
        with self._database.write() as db:
            now = self._clock()
            job = jobs.cancel(db, job_id, now)
            if job.state == "cancelled":
                journal.append(db, "cancelled", {"jobs": [job_id]}, now)
            return job

    def pause(self, job_id: str) -> JobRecord:
        """Have a job wait until `resume`. One that trains is left as it is (see `hold`).

        Raises `NotFound`, or `Conflict` for one that has ended.
        """
        with self._database.write() as db:
            before, now = jobs.one(db, job_id), self._clock()
            job = jobs.pause(db, job_id, now)
            if job.state != before.state:
                journal.append(db, "paused", {"jobs": [job_id]}, now)
            return job

    def hold(self, job_id: str) -> bool:
        """Pause a job whose training has been stopped, with its state kept; False if it was to be cancelled, and is."""
        with self._database.write() as db:
            now = self._clock()
            jobs.hold(db, job_id, now)
            held = jobs.one(db, job_id).state == "paused"
            journal.append(db, "paused" if held else "cancelled", {"jobs": [job_id]}, now)
        return held

    def resume(self, job_id: str) -> JobRecord:
        """Have a paused job wait for its training again. Raises `NotFound`, or `Conflict` when it is not paused."""
        with self._database.write() as db:
            now = self._clock()
            job = jobs.resume(db, job_id, now)
            journal.append(db, "resumed", {"jobs": [job_id]}, now)
            return job

    # batches

    def start_batch(self, job_ids: Sequence[str], base_hash: str) -> str:
        """Move queued jobs to training, one more attempt counted, and return the checkpoint they become.

        The id is never given again, even if the batch fails; a job that was held goes on with the one it has, unless
        another was given since. Raises `Conflict` when a job is not queued.
        """
        if not job_ids:
            raise ValueError("a batch needs jobs")
        with self._database.write() as db:
            found = jobs.many(db, job_ids)
            jobs.require(found, {"queued"}, "cannot start training")
            now = self._clock()
            held = found[0].checkpoint if len(found) == 1 else None
            newest = held is not None and checkpoints.is_newest(db, held)
            checkpoint = held if held is not None and newest else checkpoints.reserve(db, base_hash, now)
            jobs.start(db, job_ids, checkpoint, now)
            return checkpoint

    def interrupted(self) -> list[tuple[str, list[JobRecord]]]:
        """The batches in training or evaluating, as (reserved checkpoint, jobs), oldest first."""
        with self._database.read() as db:
            return jobs.interrupted(db)

    def retry_batch(self, checkpoint: str, job_ids: Sequence[str]) -> None:
        """Count one more attempt for a batch that trains again from its start under the same id."""
        with self._database.write() as db:
            jobs.require_batch(jobs.many(db, job_ids), checkpoint, "cannot be trained again")
            jobs.start(db, job_ids, checkpoint, self._clock())

    def take_back_attempt(self, job_ids: Sequence[str]) -> None:
        """The service stops in good order: the batch goes on after the restart, and this run does not count."""
        with self._database.write() as db:
            jobs.take_back_attempt(db, job_ids, self._clock())

    def requeue(self, job_ids: Sequence[str], *, count_attempt: bool = True) -> list[str]:
        """Give up the batch of these jobs: they are queued again, without a checkpoint; those.

        The others are cancelled: somebody has asked for it while they trained.
        With `count_attempt` false the attempt is taken back, as after a stop that was asked for.
        """
        with self._database.write() as db:
            now = self._clock()
            queued = jobs.requeue(db, job_ids, count_attempt, now)
            ended = [job_id for job_id in dict.fromkeys(job_ids) if job_id not in queued]
            if ended:
                journal.append(db, "cancelled", {"jobs": ended}, now)
            return queued

    # reconsolidations

    def last_accepted(self) -> float | None:
        """When the newest update was accepted, in seconds since the epoch; None before the first."""
        with self._database.read() as db:
            return jobs.last_accepted(db)

    def last_consolidated(self, base_hash: str) -> int | None:
        """The highest number of a checkpoint of this base whose log was, or is being, trained anew, with whatever end.

        What was put aside does not count, a cancellation that somebody asked for does.
        """
        with self._database.read() as db:
            return jobs.last_consolidated(db, base_hash)

    def start_reconsolidation(self, base_hash: str, consolidates: str) -> tuple[str, str]:
        """Make a job, in training from its beginning; (its id, the checkpoint that it becomes).

        Raises `Conflict` unless `consolidates` is the stable checkpoint of this base and no job waits.
        """
        with self._database.write() as db:
            if checkpoints.stable(db, base_hash) != consolidates:
                raise Conflict(f"{consolidates} is not the stable checkpoint: its log is not trained anew.")
            if jobs.in_states(db, ["queued"]):
                raise Conflict("An update waits: the log is not trained anew.")
            now = self._clock()
            job = acceptance.new_job(db, [], [], "queued", None, "", now, consolidates)
            checkpoint = checkpoints.reserve(db, base_hash, now)
            jobs.start(db, [job.job_id], checkpoint, now)
        return job.job_id, checkpoint

    def put_aside(self, job_id: str, why: str) -> None:
        """End a reconsolidation in training: it is cancelled, with the note `why` and an event `put_aside`.

        If somebody has asked for its end meanwhile, it is cancelled like any other job. Raises `Conflict` when it
        does not train.
        """
        with self._database.write() as db:
            job, now = jobs.one(db, job_id), self._clock()
            jobs.require([job], jobs.IN_BATCH, "cannot be put aside")
            asked = job.cancel_requested
            jobs.set_state(db, [job_id], "cancelled", None, [] if asked else [why], now)
            if asked:
                journal.append(db, "cancelled", {"jobs": [job_id]}, now)
            else:
                data = {"jobs": [job_id], "checkpoint": job.checkpoint, "consolidates": job.consolidates, "why": why}
                journal.append(db, "put_aside", data, now)

    # checkpoints

    def publish(
        self,
        record: CheckpointRecord,
        *,
        job_state: Literal["published", "rejected"] = "published",
        events: Sequence[tuple[EventKind, Mapping[str, Any]]],
        error: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a finished checkpoint, end its jobs (with `error`), append `events` (kind, data): all or nothing.

        As published (status stable or risky) it becomes the stable one of its base; as rejected (any
        other status, or risky) the pointer stays. Raises `Conflict` when the id was published before or a
        job does not train for it, and `Cancelled` when one is to be cancelled.
        """
        if record.status not in checkpoints.STATUS_OF_JOB_STATE[job_state]:
            raise ValueError(f"a checkpoint that is {record.status} has no jobs that are {job_state}")
        with self._database.write() as db:
            now = self._clock()
            checkpoints.insert(db, record)
            wish = f"{record.checkpoint} cannot be published"
            found = jobs.many(db, record.jobs)
            jobs.require_batch(found, record.checkpoint, wish)
            jobs.require_wanted(found, wish)
            jobs.put_state(db, record.jobs, job_state, now, error)
            if job_state == "published":
                checkpoints.point(db, record.base_hash, record.checkpoint)
            journal.append_all(db, events, now)

    def checkpoint(self, checkpoint: str) -> CheckpointRecord:
        """Raises `NotFound`."""
        with self._database.read() as db:
            return checkpoints.one(db, checkpoint)

    def checkpoints(self, base_hash: str | None = None) -> list[CheckpointRecord]:
        """Oldest first; of every base when none is named."""
        with self._database.read() as db:
            return checkpoints.oldest_first(db, base_hash)

    def stable(self, base_hash: str) -> str | None:
        """The checkpoint that answers by default; None is the base itself."""
        with self._database.read() as db:
            return checkpoints.stable(db, base_hash)

    def lineage(self, base_hash: str, checkpoint: str | None) -> list[CheckpointRecord]:
        """The checkpoint and its ancestors, newest first; none for the base itself."""
        with self._database.read() as db:
            return checkpoints.lineage(db, base_hash, checkpoint)

    def move_stable(
        self, base_hash: str, to: str | None, reason: str, *, kind: EventKind = "rollback"
    ) -> tuple[str | None, str | None]:
        """Point the stable pointer at `to` (None: the base); (old, new).

        The target and its ancestors are the lineage now: what of them was rolled back is stable again, and a
        candidate becomes stable (one that is risky stays so). The old place and its ancestors that are not
        in that lineage become rolled_back. An event of `kind` tells it. Moving to where the pointer is
        changes nothing. Raises `NotFound`, `Conflict` (another base's, or pruned), `CheckpointDamaged`.
        """
        with self._database.write() as db:
            old, left = checkpoints.move(db, base_hash, to)
            if old != to:
                data = {"base_hash": base_hash, "from": old, "to": to, "reason": reason, "rolled_back": left}
                journal.append(db, kind, data, self._clock())
        return old, to

    def mark_damaged(self, checkpoint: str, why: str | None) -> None:
        """Its files cannot be trusted any more; None: they can again."""
        with self._database.write() as db:
            checkpoints.mark_damaged(db, checkpoint, why)

    def mark_pruned(self, names: Iterable[str]) -> None:
        """Their folders are about to be removed. Raises `Conflict` when one of them is stable."""
        with self._database.write() as db:
            checkpoints.mark_pruned(db, names)

    # events and remembered values

    def event(self, kind: EventKind, data: Mapping[str, Any]) -> int:
        """Append to the journal; the event's id, which rises."""
        with self._database.write() as db:
            return journal.append(db, kind, data, self._clock())

    def events(self, after: int = 0, limit: int = 100) -> list[dict[str, Any]]:
        """Events (id, at, kind, data) with a greater id than `after`, oldest first."""
        with self._database.read() as db:
            return journal.after(db, after, limit)

    def newest_events(self, kinds: Sequence[str], before: int | None, limit: int) -> list[dict[str, Any]]:
        """At most `limit` events of these kinds with a smaller id than `before`, newest first."""
        with self._database.read() as db:
            return journal.newest(db, kinds, before, limit)

    def events_of(self, job_id: str, after: int = 0) -> list[dict[str, Any]]:
        """All events with a greater id than `after` that name this job among theirs, oldest first."""
        with self._database.read() as db:
            return journal.of_job(db, job_id, after)

    def greet_base(self, base_hash: str) -> str | None:
        """Remember the base that is used from now on; the one before it if that was another, and it is told then."""
        with self._database.write() as db:
            last = journal.get(db, "base_hash")
            if last == base_hash:
                return None
            if last is not None:
                journal.append(db, "base_changed", {"from": last, "to": base_hash}, self._clock())
            journal.put(db, "base_hash", base_hash)
            return last
