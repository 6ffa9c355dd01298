"""The service: what starts and stops, in which order, and the operations behind the HTTP routes.

`Service` is the composition root: lock → store → engine → lineage → scheduler, and back. Its methods speak in
the project's own values and errors; HTTP is `radiance_mlx.api`'s affair.
"""

import asyncio
import contextlib
import hashlib
import platform
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import structlog

from . import __version__
from .config import Config, Loaded
from .curation import curated_files
from .engine.thread import EngineThread
from .errors import CheckpointDamaged, Conflict, InvalidRequest, NotReady, StoreError
from .evaluation.metrics import NAMES, UPDATE_NAMES
from .evaluator import Evaluator, all_subjects, asked_for, subject_of
from .lineage import Lineage, damaged
from .messages import BASE, STABLE, Answer, EngineFacts, EventKind, Example, Generate, TextDelta, iso
from .scheduler import Scheduler
from .storage import StoreThread
from .store import CheckpointRecord, HomeLock, JobRecord
from .tuning import Tuning

log = structlog.get_logger(__name__)


class Service:
    """One home, one base, one engine. `on_death` is told if the engine's thread ends by itself."""

    def __init__(
        self,
        loaded: Loaded,
        on_death: Callable[[BaseException], None] = lambda error: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config: Config = loaded.config
        self.home: Path = loaded.home
        self._on_death, self._clock = on_death, clock
        self._lock = HomeLock(loaded.home)
        self._store: StoreThread | None = None
        self._engine: EngineThread | None = None
        self._lineage: Lineage | None = None
        self._scheduler: Scheduler | None = None
        self._evaluator: Evaluator | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._ending, self._ended = asyncio.Lock(), False
        self.facts: EngineFacts | None = None

    # --- life ------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take the home: its lock and its database. Raises `HomeLocked` or `StoreError`."""
        try:
            for name in ("adapters", "data/raw", "data/curated", "data/anchors", "metrics", "state"):
                (self.home / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"The home {self.home} cannot be used: {error.strerror}.", "Choose another.") from error
        self._lock.acquire()
        try:
            self._store = StoreThread(self.home, self._clock)
        except BaseException:
            self._lock.release()
            raise

    async def start(self) -> None:
        """Load the base, verify the lineage, begin to schedule. Raises `RadianceError`."""
        store = self._require_store()
        self._engine = EngineThread(self.config, self.home, self._on_death)
        self.facts = await self._engine.start()
        lineage = Lineage(store, self._engine, self.home, self.facts.base_hash, self.config.storage.keep_checkpoints)
        await lineage.open()
        self._evaluator = Evaluator(self.config, self.home, self._engine, self.facts)
        self._scheduler = Scheduler(self.config, self.home, store, self._engine, lineage, self._evaluator, self._clock)
        self._lineage = lineage
        self._task = asyncio.create_task(self._scheduler.run(), name="scheduler")
        self._task.add_done_callback(self._scheduler_ended)

    def _scheduler_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the scheduler has ended", exc_info=error)
            self._on_death(error)

    async def stop(self) -> None:
        """End requests, keep the state of what trains, close the database, give the home back.

        May be called more than once, and by several at a time.
        """
        self._stopping = True
        async with self._ending:
            if not self._ended:
                await self._end()
                self._ended = True

    async def _end(self) -> None:
        if self._engine is not None:
            await self._engine.stop()
        if self._task is not None and self._scheduler is not None:
            self._scheduler.stop()
            await asyncio.wait({self._task})
        if self._store is not None:
            await asyncio.to_thread(self._store.close)
        self._lock.release()

    @property
    def ready(self) -> bool:
        """Whether a search can be answered now."""
        return bool(
            not self._stopping and self._lineage is not None and self._engine is not None and self._engine.working
        )

    def _require_store(self) -> StoreThread:
        if self._store is None:
            raise NotReady("The service has not been opened.")
        return self._store

    def _require(self) -> tuple[StoreThread, EngineThread, Lineage, Scheduler]:
        if not (self._store and self._engine and self._lineage and self._scheduler) or self._stopping:
            raise NotReady("The model is still loading, or the service is stopping.", "Try again in a moment.")
        return self._store, self._engine, self._lineage, self._scheduler

    # --- search ----------------------------------------------------------------------------------

    async def search(self, request: Generate) -> Answer:
        """The whole answer. Cancelling the awaiting task ends the generation."""
        _, engine, _, _ = self._require()
        asked = await self.address(request)
        try:
            return await engine.answer(asked)
        except CheckpointDamaged as error:
            fault = await self._found_damaged(asked.checkpoint, error)
            if request.checkpoint != STABLE:
                raise fault from error
        return await engine.answer(await self.address(request))

    async def _found_damaged(self, checkpoint: str, error: CheckpointDamaged) -> CheckpointDamaged:
        """Remember it; if it was the one that serves, its newest sound ancestor does from now on."""
        _, _, lineage, scheduler = self._require()
        fault = await lineage.mark_damaged(checkpoint, error)
        if checkpoint == lineage.stable:
            await lineage.leave_damaged()
            scheduler.restart_batch()
        return fault

    async def address(self, request: Generate) -> Generate:
        """The request with its checkpoint resolved: "stable" becomes what is stable now.

        Raises `NotFound`, `CheckpointDamaged` or `Conflict` for a checkpoint that cannot answer.
        """
        _, _, lineage, _ = self._require()
        if request.checkpoint == STABLE:
            checkpoint, status = lineage.current, lineage.status
        elif request.checkpoint in (BASE, lineage.current):
            checkpoint = request.checkpoint
            status = BASE if checkpoint == BASE else lineage.status
        else:
            record = await lineage.record(request.checkpoint)
            self._require_servable(record, lineage)
            checkpoint, status = record.checkpoint, record.status
        return replace(request, checkpoint=checkpoint, checkpoint_status=status)

    async def stream(self, request: Generate) -> AsyncIterator[TextDelta | Answer]:
        """Pieces, then the answer. Leaving the iterator ends the generation."""
        _, engine, _, _ = self._require()
        for again in (True, False):
            asked = await self.address(request)
            try:
                async with contextlib.aclosing(engine.generate(asked)) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        yield piece
                return
            except CheckpointDamaged as error:  # before the first piece: adapters are loaded whole
                fault = await self._found_damaged(asked.checkpoint, error)
                if request.checkpoint != STABLE or not again:
                    raise fault from error

    async def tokens(self, text: str) -> tuple[int, ...]:
        """Bare text as the base's tokens. Raises `PromptTooLong`."""
        return await self._require()[1].tokens(text)

    async def fingerprint(self, checkpoint: str) -> str | None:
        """What tells the weights of `checkpoint` (or "base") from any others; None for what is no checkpoint yet."""
        return await self._require()[2].fingerprint(checkpoint)

    @staticmethod
    def _require_servable(record: CheckpointRecord, lineage: Lineage) -> None:
        if record.base_hash != lineage.base_hash:
            raise Conflict(f"{record.checkpoint} belongs to another base model.", "GET /checkpoints lists this one's.")
        if record.pruned:
            raise Conflict(
                f"The files of {record.checkpoint} were removed to save room.",
                "storage.keep_checkpoints says how many are kept.",
            )
        if record.damaged is not None:
            raise damaged(record.checkpoint, record.damaged)

    # --- update ----------------------------------------------------------------------------------

    async def update(
        self,
        examples: Sequence[Example],
        tags: Sequence[str],
        *,
        raw: bytes,
        idempotency_key: str | None = None,
    ) -> tuple[JobRecord, bool]:
        """Accept examples durably; (job, whether it is new).

        Raises `IdempotencyMismatch`, and `InvalidRequest` for tools that the base's chat template would not show.
        """
        store, _, _, scheduler = self._require()
        await self.require_place_for_tools(examples)
        files = await asyncio.to_thread(curated_files, examples)
        digest = hashlib.sha256(raw).hexdigest()
        job, new = await store(
            lambda s: s.accept(
                examples, tags, raw=raw, curated=files, idempotency_key=idempotency_key, body_hash=digest
            )
        )
        if new:
            log.info("accepted", job=job.job_id, examples=job.example_count)
            scheduler.wake()
        return job, new

    async def require_place_for_tools(self, examples: Sequence[Example]) -> None:
        """Raises `InvalidRequest` if some have tools, and the base's chat template would not show them."""
        calling = sum(example.needs_tools for example in examples)
        if calling and not await self.shows_tools():
            raise InvalidRequest(
                f"{calling} examples have tools, for which the chat template of {self.config.base_model} has no place; "
                "nothing was stored.",
                "Leave tools and tool_calls out, or teach another base.",
            )

    async def shows_tools(self) -> bool:
        """Whether the base's chat template has a place for tools and their calls."""
        _, engine, _, _ = self._require()
        return await engine.encode(lambda encoder: encoder.shows_tools)

    async def job(self, job_id: str) -> JobRecord:
        """Raises `NotFound`."""
        return await self._require()[0](lambda s: s.job(job_id))

    async def jobs(self, state: str | None, limit: int, before: int | None) -> list[JobRecord]:
        """Newest first."""
        return await self._require()[0](lambda s: s.jobs(state=state, limit=limit, before=before))

    async def cancel(self, job_id: str) -> JobRecord:
        """Raises `NotFound`, or `Conflict` for a job that has ended."""
        return await self._require()[3].cancel(job_id)

    def progress_of(self, job: JobRecord) -> dict[str, Any] | None:
        """Live progress of a job in training, else what was recorded last."""
        running = self._scheduler.running if self._scheduler else None
        if running and running.progress and job.job_id in running.jobs and job.state in ("training", "evaluating"):
            return running.progress.as_dict()
        return job.progress

    @property
    def tuning(self) -> Tuning:
        """Files and fine-tuning jobs. Raises `NotReady`."""
        return Tuning(self._require()[0], self._require()[3])

    # --- checkpoints -----------------------------------------------------------------------------

    @property
    def current(self) -> tuple[str, str]:
        """(checkpoint, status) that answers by default."""
        return (self._lineage.current, self._lineage.status) if self._lineage else (BASE, BASE)

    @property
    def in_training(self) -> str | None:
        """The checkpoint that the batch under way becomes."""
        running = self._scheduler.running if self._scheduler else None
        return running.checkpoint if running else None

    async def checkpoints(self) -> list[CheckpointRecord]:
        """This base's, oldest first."""
        store, _, lineage, _ = self._require()
        return await store(lambda s: s.checkpoints(lineage.base_hash))

    async def checkpoint(self, name: str) -> CheckpointRecord:
        """Raises `NotFound`."""
        return await self._require()[0](lambda s: s.checkpoint(name))

    async def rollback(self, to: str | None, reason: str) -> str:
        """Move the stable pointer; the checkpoint that was current. What trains begins anew from there."""
        _, _, lineage, scheduler = self._require()
        previous, now = await lineage.rollback(to, reason)
        if previous != now:
            scheduler.restart_batch()
        return previous

    async def events(self, kind: EventKind | None, limit: int, before: int | None) -> list[dict[str, Any]]:
        """What happened, newest first; without `kind`, everything but the progress of training."""
        kinds = [kind] if kind else [known for known in get_args(EventKind) if known != "progress"]
        return await self._require()[0](lambda s: s.newest_events(kinds, before, limit))

    # --- evaluation ------------------------------------------------------------------------------

    async def evaluate(
        self,
        checkpoints: Sequence[str] | None,
        against: str | None,
        anchors: Mapping[str, Any],
        report: Callable[[int, int], None] = lambda done, of: None,
    ) -> dict[str, Any]:
        """Measure checkpoints (None: every one that can be served) on the configured anchors, or as `anchors` says.

        Raises `NotFound`, `CheckpointDamaged`, `Conflict`, `AnchorsUnavailable`.
        """
        _, _, lineage, _ = self._require()
        assert self._evaluator is not None
        for name in (*(checkpoints or []), *([against] if against else [])):
            if name not in (BASE, STABLE):
                self._require_servable(await lineage.record(name), lineage)
        beside = lineage.current if against == STABLE else against
        if checkpoints is None:
            usable = [r.checkpoint for r in await self.checkpoints() if not r.pruned and r.damaged is None]
            subjects = all_subjects(self.home, usable, beside, lineage.base_hash)
        else:
            named = [lineage.current if name == STABLE else name for name in checkpoints]
            subjects = [subject_of(self.home, name, beside, lineage.base_hash) for name in named]
        settings = asked_for(self._evaluator.anchors, self.home, anchors)
        return await self._evaluator.evaluate(subjects, settings, report)

    # --- info ------------------------------------------------------------------------------------

    async def info(self) -> dict[str, Any]:
        """The specification's fields, and what else helps."""
        store, engine, lineage, scheduler = self._require()
        facts = self.facts
        assert facts is not None
        records = await store(lambda s: s.checkpoints(lineage.base_hash))
        counts = await store(lambda s: s.count_jobs())
        running = scheduler.running
        waiting = sum(counts.get(state, 0) for state in ("review", "queued", "paused", "training", "evaluating"))
        published = [r for r in records if r.status != "candidate" and not (r.rejected and r.status == "rolled_back")]
        return {
            "base_model": facts.base_model,
            "current_checkpoint": lineage.current,
            "queue_depth": waiting,
            "last_update": iso(published[-1].created) if published else None,
            "loss_curves": {
                "finetune_loss": [r.metrics.get("finetune_loss") for r in published],
                "forgetting_loss": [r.metrics.get("forgetting_loss") for r in published] if self._measures else None,
                "eval_loss": [r.metrics.get("eval_loss") for r in published],
            },
            "forgetting_summary": self._forgetting(records, lineage.stable) if self._measures else None,
            "hardware": {
                "device": facts.device,
                "backend": facts.backend,
                "memory_bytes": facts.memory_bytes,
                "host": platform.node(),
            },
            "checkpoint_status": lineage.status,
            "ready": self.ready,
            "version": __version__,
            "update_mode": self.config.update_mode,
            "jobs": counts,
            "training": running
            and {
                "checkpoint": running.checkpoint,
                "jobs": list(running.jobs),
                "progress": running.progress and running.progress.as_dict(),
            },
            "checkpoints": len(published),
            "damaged": {r.checkpoint: r.damaged for r in records if r.damaged is not None},
            "home": str(self.home),
            "base_hash": facts.base_hash,
            "context": facts.context,
            "engine": engine.status,
            "warnings": [
                *([scheduler.trouble] if scheduler.trouble else []),
                *facts.warnings,
                *lineage.warnings,
                *(self._evaluator.warnings if self._evaluator else []),
            ],
            "config": self.config.model_dump(mode="json", exclude={"server": {"token"}}),
        }

    @property
    def _measures(self) -> bool:
        return self._evaluator is not None and self._evaluator.enabled

    @staticmethod
    def _forgetting(records: Sequence[CheckpointRecord], stable: str | None) -> dict[str, Any] | None:
        """What the checkpoint that answers has forgotten; None if that was not measured."""
        if stable is None:  # the base, by definition
            return {"anchor_ce_delta": 0.0, "retention_score": 1.0}
        metrics = next((r.metrics for r in records if r.checkpoint == stable), {})
        if metrics.get("retention_score") is None:
            return None
        first = ("anchor_ce_delta", "retention_score")
        return {
            **{name: metrics.get(name) for name in (*first, *(n for n in (*NAMES, *UPDATE_NAMES) if n not in first))},
            "intervals": metrics.get("intervals"),
            "anchors": metrics["evaluation"]["anchors"],
        }
