"""The lineage of one base: which checkpoint is stable, publishing a new one, going back, keeping disk bounded.

The asyncio side's view: the database says what is true, this object what is served. A checkpoint is committed
to disk, then given a slot, then recorded; only then does `stable` name it.
"""

import asyncio
import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import structlog

from .checkpoints import folder as folders
from .checkpoints.retention import removable
from .engine.thread import EngineThread
from .errors import Cancelled, CheckpointDamaged, Conflict, InternalError, NotFound, RadianceError, Rejected, StoreError
from .evaluation.metrics import NAMES, UPDATE_NAMES
from .messages import BASE, EventKind, TrainResult
from .storage import StoreThread
from .store import CheckpointRecord, write_durably

log = structlog.get_logger(__name__)
#: what the policy's outcome makes of a checkpoint; it is stable otherwise
STATUS_OF_OUTCOME = {"risky": "risky", "rejected": "rolled_back"}


class Lineage:
    """Made by `open`, which also verifies the stable checkpoint."""

    def __init__(self, store: StoreThread, engine: EngineThread, home: Path, base_hash: str, keep: int) -> None:
        self._store, self._engine, self._home, self._keep = store, engine, home, keep
        self.base_hash = base_hash
        self.stable: str | None = None
        self.status = BASE
        self.warnings: list[str] = []
        self._moving = asyncio.Lock()
        self._known: dict[str, CheckpointRecord] = {}
        self._changes = 0

    @property
    def current(self) -> str:
        """What `search` answers from: the stable checkpoint's id, or `base`."""
        return self.stable or BASE

    def folder(self, checkpoint: str) -> Path:
        """Where a checkpoint's files are."""
        return self._home / "adapters" / checkpoint

    async def record(self, checkpoint: str) -> CheckpointRecord:
        """A checkpoint's row, read once until something changes. Raises `NotFound`."""
        known = self._known.get(checkpoint)
        if known is None:
            changes = self._changes
            known = await self._store(lambda s: s.checkpoint(checkpoint))
            if changes == self._changes:
                self._known[checkpoint] = known
        return known

    async def fingerprint(self, checkpoint: str) -> str | None:
        """What tells the weights of `checkpoint` (or "base") from any others; None for what is no checkpoint yet."""
        parts = [self.base_hash]
        if checkpoint != BASE:
            try:
                files = (await self.record(checkpoint)).files
            except NotFound:
                return None
            parts += [files.get(name, "") for name in ("adapters.safetensors", "adapter_config.json")]
        return "fp_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _changed(self) -> None:
        self._changes += 1
        self._known.clear()

    # --- at start --------------------------------------------------------------------------------

    async def open(self) -> None:
        """Find the newest sound checkpoint of this base's lineage and make ready to serve it."""
        await self._greet_base()
        await asyncio.to_thread(folders.remove_unfinished, self._home / "adapters")
        await asyncio.to_thread(folders.remove_unfinished, self._home / "state" / "training")
        for record in await self._store(lambda s: s.checkpoints(self.base_hash)):
            if record.pruned:  # a crash may have come between the row and the folder
                await asyncio.to_thread(shutil.rmtree, self.folder(record.checkpoint), True)
        await self._serve_newest_sound()

    async def leave_damaged(self) -> None:
        """The checkpoint that serves was found damaged: its newest sound ancestor serves from now on."""
        async with self._moving:
            await self._serve_newest_sound()

    async def _serve_newest_sound(self) -> None:
        stable = await self._store(lambda s: s.stable(self.base_hash))
        for record in await self._store(lambda s: s.lineage(self.base_hash, stable)):
            if await self._sound(record):
                await self._settle(stable, record)
                return
        await self._settle(stable, None)

    async def _greet_base(self) -> None:
        last = await self._store(lambda s: s.greet_base(self.base_hash))
        if last is not None:
            known = await self._store(lambda s: s.checkpoints(self.base_hash))
            what = "goes on with its own lineage" if known else "starts a lineage of its own"
            self.warnings.append(f"this home was last used with another base model; this one {what}")
            log.warning("another base model", base_hash=self.base_hash[:12], last=last[:12])

    async def _sound(self, record: CheckpointRecord) -> bool:
        if not record.pruned:
            try:  # also if it was damaged once: the files may have been restored
                await self._require_sound(record)
                return True
            except CheckpointDamaged:
                pass
        self.warnings.append(
            f"checkpoint {record.checkpoint} cannot be served: "
            + ("its files were removed to save room" if record.pruned else "its files are damaged")
        )
        return False

    async def mark_damaged(self, checkpoint: str, error: RadianceError) -> CheckpointDamaged:
        """Remember what was found; the error to raise."""
        why = error.message.removeprefix(f"{checkpoint}: ").rstrip(".")
        await self._store(lambda s: s.mark_damaged(checkpoint, why))
        self._changed()
        log.error("damaged checkpoint", checkpoint=checkpoint, why=why)
        return damaged(checkpoint, why)

    async def _settle(self, recorded: str | None, record: CheckpointRecord | None) -> None:
        sound = record.checkpoint if record else None
        if sound != recorded:
            reason = f"{recorded} is damaged; {sound or BASE} is its newest sound ancestor"
            await self._store(lambda s: s.move_stable(self.base_hash, sound, reason, kind="damaged"))
            log.warning("serving an ancestor", checkpoint=sound or BASE, instead_of=recorded)
        await self._serve(sound)

    async def _serve(self, checkpoint: str | None) -> None:
        self._changed()
        status = (await self._store(lambda s: s.checkpoint(checkpoint))).status if checkpoint is not None else BASE
        await self._now_serves(checkpoint, status)
        await self._write_curves()  # what is stable has changed, or a crash came before they were written

    async def _now_serves(self, checkpoint: str | None, status: str) -> None:
        self.stable, self.status = checkpoint, status
        with contextlib.suppress(RadianceError):  # the engine stops, or answers as before: what is published is
            await self._engine.call(lambda engine: engine.follow(checkpoint))

    # --- publishing ------------------------------------------------------------------------------

    async def commit(self, result: TrainResult) -> CheckpointRecord:
        """Make the trained files a checkpoint folder, with its metrics beside; not served yet."""
        facts = {
            "checkpoint": result.checkpoint,
            "parent": result.parent,
            "base_hash": self.base_hash,
            "jobs": list(result.jobs),
            "data_hash": result.data_hash,
            "config": result.config,
            "metrics": {k: v for k, v in result.metrics.items() if k != "curves"},
            "notes": list(result.notes),
            "status": STATUS_OF_OUTCOME.get(result.outcome, "stable"),
            "reconsolidated": result.reconsolidated,
        }
        final = self.folder(result.checkpoint)
        # metrics first: a folder that is there is published after a crash, and must not lack them
        try:
            await asyncio.to_thread(self._write_metrics, result.checkpoint, result.metrics)
            await asyncio.to_thread(folders.commit, Path(result.written), final, facts)
        except OSError as error:
            raise StoreError(f"{result.checkpoint} cannot be written: {error.strerror or error}") from error
        return self.recorded(result.checkpoint)

    def _write_metrics(self, checkpoint: str, metrics: dict[str, Any]) -> None:
        file = self._home / "metrics" / f"{checkpoint}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, (json.dumps(metrics, indent=2) + "\n").encode())

    def recorded(self, checkpoint: str, created: float = 0.0) -> CheckpointRecord:
        """The row for a committed folder, from its own `checkpoint.json`. Raises `CheckpointDamaged`."""
        folder = self.folder(checkpoint)
        facts = folders.read(folder)
        if facts.get("base_hash") != self.base_hash:
            raise CheckpointDamaged(f"{checkpoint} belongs to another base model.")
        return CheckpointRecord(
            checkpoint=checkpoint,
            number=number_of(checkpoint),
            base_hash=self.base_hash,
            parent=facts["parent"],
            status=facts.get("status", "stable"),
            created=created or (folder / folders.CHECKPOINT_FILE).stat().st_mtime,
            jobs=tuple(facts["jobs"]),
            data_hash=facts["data_hash"],
            files=facts["files"],
            metrics=facts["metrics"],
            config=facts["config"],
            notes=tuple(facts["notes"]),
            reconsolidated=bool(facts.get("reconsolidated", False)),
        )

    def finished_folder(self, checkpoint: str, data_hash: str) -> CheckpointRecord | None:
        """The folder that a crashed run had completed for this very batch, if it is sound."""
        try:
            record = self.recorded(checkpoint)
            folders.verify(self.folder(checkpoint), record.files)
        except (CheckpointDamaged, KeyError, OSError):
            return None
        return record if record.data_hash == data_hash else None

    async def publish(self, record: CheckpointRecord) -> None:
        """Give it a slot, record it with its jobs in one transaction, and serve it from now on.

        One that the policy has rejected is recorded, with why, and its parent goes on to serve.

        Raises `Cancelled` if the stable checkpoint is not its parent any more: somebody rolled back meanwhile; or
        if one of its jobs is to be cancelled.
        """
        async with self._moving:
            if record.parent != self.stable:
                raise Cancelled(f"The stable checkpoint moved while {record.checkpoint} trained.")
            data: dict[str, Any] = {"checkpoint": record.checkpoint, "parent": record.parent, "jobs": list(record.jobs)}
            if record.reconsolidated:
                data["reconsolidated"] = True
            if record.rejected:
                await self._reject(record, data)
            else:
                over = record.verdict.get("outcome") in ("logged", "risky")
                data["status"] = record.status
                if over:
                    data["verdict"] = record.verdict
                await self._engine.call(lambda engine: engine.warm(record.checkpoint))
                await self._store(lambda s: s.publish(record, events=[("published", data)]))
                await self._now_serves(record.checkpoint, record.status)
                log.info("published", checkpoint=record.checkpoint, loss=record.metrics.get("finetune_loss"))
                if over:
                    log.warning("over the threshold", checkpoint=record.checkpoint, reason=record.verdict["reason"])
        await self._prune()
        await self._write_curves()

    async def _reject(self, record: CheckpointRecord, data: dict[str, Any]) -> None:
        verdict = record.verdict
        error = Rejected(f"The checkpoint was rejected: {verdict['reason']}.", details=verdict).as_dict()
        events: list[tuple[EventKind, dict[str, Any]]] = [("rejected", {**data, "verdict": verdict})]
        await self._store(lambda s: s.publish(record, job_state="rejected", events=events, error=error))
        self._changed()
        log.warning("rejected", checkpoint=record.checkpoint, reason=verdict["reason"])

    async def _write_curves(self) -> None:
        """`metrics/curves.jsonl`, anew from the database: one line a checkpoint, with its status now.

        A fault is no fault of what was made.
        """
        try:
            records = await self._store(lambda s: s.checkpoints(self.base_hash))
            lines = "".join(json.dumps(curve_row(record)) + "\n" for record in records)
            await asyncio.to_thread(write_durably, self._home / "metrics" / "curves.jsonl", lines.encode())
        except (RadianceError, OSError) as error:
            log.error("the curves could not be written", error=str(error))

    async def _prune(self) -> None:
        """A fault here is no fault of what was published."""
        try:
            await self._remove_superfluous()
        except (RadianceError, OSError) as error:
            log.error("old checkpoints could not be removed", error=str(error))

    async def _remove_superfluous(self) -> None:
        records = await self._store(lambda s: s.checkpoints(self.base_hash))
        chain = await self._store(lambda s: s.lineage(self.base_hash, self.stable))
        on_disk = [r.checkpoint for r in records if not r.pruned]
        gone = removable(on_disk, [r.checkpoint for r in chain], self._keep)
        if gone:
            await self._store(lambda s: s.mark_pruned(gone))
            self._changed()
            for checkpoint in gone:
                await asyncio.to_thread(shutil.rmtree, self.folder(checkpoint), True)

    # --- going back ------------------------------------------------------------------------------

    async def rollback(self, to: str | None, reason: str) -> tuple[str, str]:
        """Serve `to` (an id, "base", or None for the parent) from now on; (previous, current).

        Raises `NotFound`, `Conflict`, `CheckpointDamaged`; then nothing has changed.
        """
        async with self._moving:
            return await self._move(to, reason)

    async def _move(self, to: str | None, reason: str) -> tuple[str, str]:
        previous = self.current
        if to is None and self.stable is None:
            raise Conflict("The base itself is being served: it has no parent.", "Name a checkpoint to go to.")
        if to is None:
            target = (await self._store(lambda s: s.checkpoint(str(self.stable)))).parent
        else:
            target = None if to == BASE else to
        if target is not None:
            record = await self._target(target)
            if not record.pruned and record.base_hash == self.base_hash:
                await self._require_sound(record)
        await self._store(lambda s: s.move_stable(self.base_hash, target, reason))
        await self._serve(target)
        log.info("rolled back", previous=previous, checkpoint=self.current, reason=reason)
        return previous, self.current

    async def _target(self, checkpoint: str) -> CheckpointRecord:
        try:
            return await self._store(lambda s: s.checkpoint(checkpoint))
        except NotFound as error:
            hint = 'Name one that GET /checkpoints lists, or "base" for the base; null goes to the parent.'
            raise NotFound(error.message, hint) from error

    async def _require_sound(self, record: CheckpointRecord) -> None:
        """Look at the files, whatever the row says of them: they may have been damaged since, or restored."""
        try:
            await asyncio.to_thread(folders.verify, self.folder(record.checkpoint), record.files)
            await self._engine.call(lambda engine: engine.warm(record.checkpoint))
        except (CheckpointDamaged, NotFound, InternalError) as error:
            raise await self.mark_damaged(record.checkpoint, error) from error
        if record.damaged is not None:
            await self._store(lambda s: s.mark_damaged(record.checkpoint, None))
            self._changed()
            log.info("a checkpoint is sound again", checkpoint=record.checkpoint)


def curve_row(record: CheckpointRecord) -> dict[str, Any]:
    """A checkpoint's line in `metrics/curves.jsonl`."""
    measured = {name: record.metrics.get(name) for name in ("finetune_loss", "eval_loss", *NAMES, *UPDATE_NAMES)}
    return {
        "checkpoint": record.checkpoint,
        "parent": record.parent,
        "created": record.created,
        "status": record.status,
        **measured,
        "seconds": record.metrics.get("seconds"),
    }


def damaged(checkpoint: str, why: str) -> CheckpointDamaged:
    """What users are told of a damaged checkpoint."""
    return CheckpointDamaged(
        f"{checkpoint} is damaged: {why}.", "Use another checkpoint, or restore its files and roll back to it."
    )


def number_of(checkpoint: str) -> int:
    """The rising number in a checkpoint's id."""
    return int(checkpoint.rsplit("_", 1)[1])
