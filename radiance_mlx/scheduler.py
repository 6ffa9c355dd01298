"""Jobs → batches → engine → checkpoint → published. One asyncio task; one batch at a time.

Every state a job can be in is on disk before the step that follows it, so a restart finds what was under way
and goes on: a finished folder is published, an interrupted training is taken up again, three times at most.
"""

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from .config import Config
from .curation import data_hash
from .earlier import Log
from .engine.thread import EngineThread
from .errors import (
    Cancelled,
    CheckpointDamaged,
    Conflict,
    NotReady,
    RadianceError,
    RankLost,
    StoreError,
    TrainingFailed,
)
from .evaluator import Evaluator
from .lineage import Lineage, number_of
from .messages import Example, Progress, Terms, TrainBatch
from .progress import ProgressLog, Running
from .reconsolidation import STABLE_MOVED, UPDATE_DUE, Reconsolidation, since_last
from .storage import StoreThread
from .store import CheckpointRecord, JobRecord
from .triggers import Decision, decide

log = structlog.get_logger(__name__)
MAX_ATTEMPTS = 4  # the first, and three times taken up again
LOOK_S = 60.0
LESS = "a job that trained with it was paused or cancelled"


class Scheduler:
    """`run` is its task; the other methods are called by the service."""

    def __init__(
        self,
        config: Config,
        home: Path,
        store: StoreThread,
        engine: EngineThread,
        lineage: Lineage,
        evaluator: Evaluator,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._home, self._clock = config, home, clock
        self._store, self._engine, self._lineage, self._evaluator = store, engine, lineage, evaluator
        self._log = Log(store)
        self._reconsolidation = Reconsolidation(config, store, lineage, clock)
        self._wake = asyncio.Event()
        self._alone: set[str] = set()  # jobs that failed in company
        self._due: set[str] = set()  # jobs whose batch was given up through no fault of theirs
        self.trouble: str | None = None  # what keeps the queue from going on, while it does
        self._stopping = False
        self._progress = ProgressLog(store)
        self.running: Running | None = None

    def wake(self) -> None:
        """Something may have changed: a new job, a cancelled one."""
        self._wake.set()

    def stop(self) -> None:
        """Have `run` end. A batch under way ends it by itself once the engine has stopped."""
        self._stopping = True
        self.wake()

    async def run(self) -> None:
        """Take up what was interrupted, then train batch after batch. Ends after `stop`, or with the engine."""
        with contextlib.suppress(NotReady):
            while not self._stopping:
                try:
                    await self._recover()
                    while not self._stopping:
                        await self._look()
                except StoreError as error:  # a full disk, say: what is accepted waits until it has passed
                    self.trouble = f"training waits: {error.message}"
                    log.error("the store failed; trying again", error=error.message, seconds=LOOK_S)
                    self._wake.clear()
                    if not self._stopping:
                        await self._sleep(LOOK_S)

    async def _look(self) -> None:
        """Train what is due, or wait."""
        self._wake.clear()
        decision = await self._decision()
        if decision.jobs:
            await self._begin(decision.jobs)
            return
        wait = decision.wait_s
        if wait is None:  # nothing is queued
            wait = await self._reconsolidation.wait_s()
            if wait == 0:
                await self._reconsolidate()
                return
        self.trouble = None
        await self._sleep(wait)

    async def _decision(self) -> Decision:
        queued = await self._store(lambda s: s.queued())
        return decide(
            queued,
            self._config.update_mode,
            max_examples=self._config.batch.max_examples,
            max_age_s=self._config.batch.max_age_minutes * 60,
            now=self._clock(),
            alone=self._alone,
            own={job.job_id for job in queued if job.terms is not None},
            due=self._due,
        )

    async def _sleep(self, seconds: float | None) -> None:
        """Until something changes, or so long; at most `LOOK_S`, since the loop's clock rests while a Mac sleeps."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), None if seconds is None else min(seconds, LOOK_S))

    # --- after a restart -------------------------------------------------------------------------

    async def _recover(self) -> None:
        for checkpoint, jobs in await self._store(lambda s: s.interrupted()):
            ids = tuple(job.job_id for job in jobs)
            of = jobs[0].consolidates
            examples = await (self._examples(ids) if of is None else self._reconsolidation.examples(of))
            record = self._lineage.finished_folder(checkpoint, data_hash(examples))
            if record is not None and record.parent == self._lineage.stable:
                log.info("publishing what was finished before the restart", checkpoint=checkpoint)
                try:
                    await self._publish(record)
                    continue
                except (Cancelled, CheckpointDamaged) as error:
                    log.warning("not published", checkpoint=checkpoint, error=error.message)
            await self._take_up(checkpoint, ids)

    async def _take_up(self, checkpoint: str, ids: Sequence[str]) -> None:
        jobs = await self._store(lambda s: [s.job(job_id) for job_id in ids])
        unwanted = [job.job_id for job in jobs if job.cancel_requested]
        if unwanted:
            await self._store(lambda s: s.set_state(unwanted, "cancelled", events=[("cancelled", {"jobs": unwanted})]))
        worn_out = [job.job_id for job in jobs if job.attempts >= MAX_ATTEMPTS and job.job_id not in unwanted]
        if worn_out:
            error = TrainingFailed(
                f"The process ended {MAX_ATTEMPTS} times while this job trained.",
                "See the service's log for the cause; post the examples again to retry.",
            )
            document = error.as_dict()
            over: dict[str, Any] = {"jobs": worn_out, "checkpoint": checkpoint, "error": document}
            await self._store(
                lambda s: s.set_state(worn_out, "quarantined", error=document, events=[("quarantined", over)])
            )
            log.error("quarantined", jobs=worn_out)
        rest = [job for job in jobs if job.job_id not in (*unwanted, *worn_out)]
        if not rest:
            self._drop(checkpoint)
            return
        left = [job.job_id for job in rest]
        alone = len(ids) > 1 and max(job.attempts for job in rest) >= MAX_ATTEMPTS - 1
        if unwanted or worn_out or alone:
            await self._store(lambda s: s.requeue(left))
            # one of them may be what ends the process: the others must not go down with it again
            (self._alone if worn_out or alone else self._due).update(left)
            self._drop(checkpoint)
            why = "the process ended again and again while it trained with others" if worn_out or alone else LESS
            await self._tell_restarted(left, why)
            return
        begun = tuple(job.job_id for job in rest if job.attempts or job.progress)
        await self._store(lambda s: s.retry_batch(checkpoint, left))
        anew = self._why_anew(checkpoint, checkpoint)
        reconsolidates = rest[0].consolidates is not None
        await self._train(Running(checkpoint, tuple(left), reconsolidates=reconsolidates, begun=begun, anew=anew))

    def _why_anew(self, checkpoint: str, before: str | None) -> str:
        """Why a batch that was to become `before` has to begin anew as `checkpoint`, if it has to."""
        if before != checkpoint:
            return "something else was trained meanwhile"
        if self._state(checkpoint).is_dir():
            return "what was kept of it cannot be gone on from: other settings, another parent, or damaged files"
        return "it was interrupted before anything of it was kept"

    # --- one batch -------------------------------------------------------------------------------

    async def _begin(self, jobs: tuple[str, ...]) -> None:
        try:
            before = await self._store(lambda s: [s.job(job_id) for job_id in jobs])
            checkpoint = await self._store(lambda s: s.start_batch(jobs, self._lineage.base_hash))
        except Conflict:  # one was cancelled between looking and starting
            return
        held = {job.job_id: job.checkpoint for job in before if job.checkpoint is not None}  # they were paused
        for one in {*held.values()} - {checkpoint}:
            self._drop(one)
        self._due.difference_update(jobs)
        begun = tuple(job.job_id for job in before if job.job_id in held and job.progress)
        anew = self._why_anew(checkpoint, held[begun[0]]) if begun else ""
        await self._train(Running(checkpoint, jobs, begun=begun, anew=anew))

    async def _reconsolidate(self) -> None:
        try:
            job, checkpoint = await self._reconsolidation.begin()
        except Conflict:  # the stable checkpoint is moving, or an update was accepted between looking and starting
            return
        await self._train(Running(checkpoint, (job,), reconsolidates=True))

    async def _train(self, running: Running) -> None:
        self.trouble = None
        self.running, checkpoint, jobs = running, running.checkpoint, running.jobs
        try:
            async with self._making_way(running):
                batch = await self._batch(running)
                log.info("training", checkpoint=checkpoint, jobs=list(jobs), examples=len(batch.examples))
                plan = await self._evaluator.plan(await self._line(), self._examples)
                result = await self._engine.train(batch, self._report, running.cancelled, plan)
            record = await self._lineage.commit(result)
            if result.notes:
                await self._store(lambda s: s.add_notes(jobs, result.notes))
            await self._publish(record)
        except (Cancelled, RankLost) as error:
            await self._give_up(running, error)
        except NotReady:
            await asyncio.shield(self._store(lambda s: s.take_back_attempt(jobs)))
            raise
        except CheckpointDamaged as error:
            await self._parent_is_damaged(running, error)
        except StoreError:  # no fault of the jobs: what is finished is published when the store works again
            if not self._lineage.folder(checkpoint).is_dir():  # it has to be trained again
                with contextlib.suppress(RadianceError):
                    await self._store(lambda s: s.take_back_attempt(jobs))
            raise
        except Exception as error:
            await self._after_failure(running, error)
        finally:
            with contextlib.suppress(NotReady):
                await self._engine.call(lambda engine: engine.settle())
            await self._progress.settle()
            self.running = None
            running.ended.set()

    async def _give_up(self, running: Running, error: RadianceError) -> None:
        """Through no fault of the jobs: they are queued again. A reconsolidation is over."""
        if running.reconsolidates:
            why = f"put aside: {running.aside or error.message}"
            await self._store(lambda s: s.put_aside(running.jobs[0], why))
            log.info("put aside", checkpoint=running.checkpoint, why=why)
        elif running.pausing == set(running.jobs) and len(running.jobs) == 1:
            if await self._store(lambda s: s.hold(running.jobs[0])):
                self._drop_files(running.checkpoint)  # what is kept of it stays: it goes on from there
                return
        else:
            queued = await self._store(lambda s: s.requeue(running.jobs, count_attempt=False))
            await self._store(lambda s: [s.pause(job) for job in running.pausing & set(queued)])
            left = sorted(set(queued) - running.pausing)
            self._due.update(left)
            less = LESS if len(left) < len(running.jobs) else ""
            await self._tell_restarted(left, running.aside or less or error.message)
        self._drop(running.checkpoint)

    @contextlib.asynccontextmanager
    async def _making_way(self, running: Running) -> AsyncIterator[None]:
        """Inside, a reconsolidation is stopped as soon as an update is due."""
        watch = asyncio.create_task(self._make_way(running)) if running.reconsolidates else None
        try:
            yield
        finally:
            if watch is not None:
                watch.cancel()

    async def _make_way(self, running: Running) -> None:
        while True:
            self._wake.clear()
            wait: float | None = LOOK_S
            with contextlib.suppress(StoreError):  # looked at again
                decision = await self._decision()
                if decision.jobs:
                    running.aside = UPDATE_DUE
                    running.cancelled.set()
                    return
                wait = decision.wait_s
            await self._sleep(wait)

    async def _parent_is_damaged(self, running: Running, error: CheckpointDamaged) -> None:
        """No fault of the jobs: they train on the newest sound ancestor instead."""
        parent = self._lineage.stable
        if parent is None:
            await self._after_failure(running, error)
            return
        await self._lineage.mark_damaged(parent, error)
        await self._lineage.leave_damaged()
        if self._lineage.stable == parent:  # its files are sound: something else is at fault
            await self._after_failure(running, error)
            return
        await self._give_up(running, error)

    async def _batch(self, running: Running) -> TrainBatch:
        # `cancel` finds what is running from now on; what it was asked before is in the store
        jobs = await self._store(lambda s: [s.job(job_id) for job_id in running.jobs])
        if any(job.cancel_requested for job in jobs):
            running.cancelled.set()
        if running.reconsolidates:
            return await self._reconsolidation.batch(jobs[0], running.checkpoint)
        examples = await self._examples(running.jobs)
        line = await self._line()
        log = await self._log.rows(line) if self._uses_log else []
        return TrainBatch(
            checkpoint=running.checkpoint,
            parent=self._lineage.stable,
            jobs=running.jobs,
            examples=examples,
            data_hash=await asyncio.to_thread(data_hash, examples),
            number=number_of(running.checkpoint),
            lineage="fresh" if self._config.lineage == "fresh" else "continue",
            log=tuple(example for _, example in log),
            replayable=tuple(await self._log.replayable(log, jobs, self._config.replay.by_tag)),
            # a reconsolidation rehearses the neighbours of all that was before it
            line=tuple(record.checkpoint for record in line[: len(since_last(line)) + 1]),
            terms=(jobs[0].terms if len(jobs) == 1 else None) or Terms(),
            validation=await self._store(lambda s: s.tunings.validation(running.jobs)),
        )

    @property
    def _uses_log(self) -> bool:
        return self._config.replay.fraction > 0 or self._config.rehearsal.kl_weight > 0

    async def _line(self) -> list[CheckpointRecord]:
        """The stable checkpoint and what led to it, newest first."""
        return await self._store(lambda s: s.lineage(self._lineage.base_hash, self._lineage.stable))

    async def _publish(self, record: CheckpointRecord) -> None:
        await self._lineage.publish(record)
        self._alone.difference_update(record.jobs)
        self._forget_state(record.checkpoint)

    async def _after_failure(self, running: Running, error: Exception) -> None:
        if not isinstance(error, RadianceError):
            log.exception("a batch failed", checkpoint=running.checkpoint)
            error = TrainingFailed(f"The batch failed: {type(error).__name__}: {error}", "See the log.")
        self._drop(running.checkpoint)
        if len(running.jobs) > 1:
            log.warning("a batch failed; its jobs are tried one by one", error=error.message)
            left = await self._store(lambda s: s.requeue(running.jobs, count_attempt=False))
            self._alone.update(left)
            await self._tell_restarted(left, "its batch failed; its jobs are tried one by one")
            return
        document = error.as_dict()
        log.error("job failed", jobs=list(running.jobs), error=error.message)
        data = {"jobs": list(running.jobs), "checkpoint": running.checkpoint, "error": document}
        await self._store(lambda s: s.set_state(running.jobs, "failed", error=document, events=[("failed", data)]))
        self._alone.difference_update(running.jobs)

    async def _tell_restarted(self, jobs: Sequence[str], why: str) -> None:
        if jobs:  # none is left of a job that was alone, and is cancelled or paused
            await self._store(lambda s: s.event("restarted", {"jobs": list(jobs), "why": why}))

    def _drop(self, checkpoint: str) -> None:
        """Nothing of a batch that is given up stays: it may have been committed, but never recorded."""
        self._forget_state(checkpoint)
        self._drop_files(checkpoint)

    def _drop_files(self, checkpoint: str) -> None:
        shutil.rmtree(self._lineage.folder(checkpoint), ignore_errors=True)
        (self._home / "metrics" / f"{checkpoint}.json").unlink(missing_ok=True)

    def _forget_state(self, checkpoint: str) -> None:
        shutil.rmtree(self._state(checkpoint), ignore_errors=True)

    def _state(self, checkpoint: str) -> Path:
        return self._home / "state" / "training" / checkpoint

    async def _examples(self, jobs: Sequence[str]) -> tuple[Example, ...]:
        rows = await self._store(lambda s: s.examples_of(jobs))
        return tuple(example for _, example in rows)

    def _report(self, progress: Progress) -> None:
        if self.running is not None:
            self._progress.report(self.running, progress)

    # --- called by the service -------------------------------------------------------------------

    async def cancel(self, job_id: str) -> JobRecord:
        """Cancel a job in any state before publication. Raises `NotFound` or `Conflict`."""
        job = await self._store(lambda s: s.cancel(job_id))
        if self.running is not None and job_id in self.running.jobs:
            self.running.cancelled.set()
        elif job.state == "cancelled" and job.checkpoint is not None:  # it was paused in training
            self._drop(job.checkpoint)
        self.wake()
        return job

    async def pause(self, job_id: str) -> JobRecord:
        """Have a job wait until it is resumed; one that trains is stopped first, and goes on from there later.

        If others train with it, they begin anew without it. Raises `NotFound`, or `Conflict` for a job that has ended,
        be it meanwhile; `NotReady` while it is in training and nothing trains it: after a restart or a fault of the
        disk, until it is taken up again or published.
        """
        job = await self._store(lambda s: s.job(job_id))
        if job.consolidates is not None:
            raise Conflict(f"{job_id} trains the whole log anew: it makes way by itself.", "Cancel it.")
        await self._store(lambda s: s.pause(job_id))
        running = self.running
        if running is not None and job_id in running.jobs:
            running.pausing.add(job_id)
            if len(running.jobs) == 1 and self._config.training.slice_ms > 0:
                await self._engine.call(lambda engine: engine.pause())
            running.cancelled.set()  # if it has not begun yet, or is not to be gone on from
            await running.ended.wait()
        job = await self._store(lambda s: s.job(job_id))
        if job.state in ("training", "evaluating"):
            raise NotReady.about_job(
                job_id,
                lambda name: f"{name} cannot be paused at this moment: it is about to be taken up again, or to end.",
                "Ask again in a moment.",
            )
        if job.state != "paused":
            raise Conflict.about_job(job_id, lambda name: f"{name} was not paused: it is {job.state} by now.")
        return job

    async def resume(self, job_id: str) -> JobRecord:
        """Raises `NotFound`, or `Conflict` for a job that is not paused."""
        job = await self._store(lambda s: s.resume(job_id))
        self.wake()
        return job

    def restart_batch(self) -> None:
        """The stable checkpoint has moved: what trains on the old one begins again from the new, if it is an update."""
        if self.running is not None:
            self.running.aside = STABLE_MOVED
            self.running.cancelled.set()
        self.wake()
