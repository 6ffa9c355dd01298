"""One batch in training, as the engine's background work: prepared, cut into slices, measured, written.

A `TrainingTask` never touches the bank or the requests. Its state is kept every so often under
`state/training/<checkpoint>`, so that the same batch can go on after a crash from the last kept step.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.folder import unfinished
from ..config import Config
from ..errors import Cancelled, CheckpointDamaged, ModelError, StoreError, TrainingFailed
from ..evaluation.plan import Plan
from ..lora import files
from ..lora.bank import AdapterWeights
from ..lora.halves import halved
from ..lora.head import TargetRows
from ..lora.ranks import Ranks
from ..lora.step import Piece
from ..lora.trainer import Trainer
from ..lora.whole import run_whole
from ..messages import Progress, TrainBatch, TrainResult
from .backend import Backend
from .evaluating import UpdateEvaluation
from .foundation import Foundation
from .kept_state import KeptState
from .lane import Lane, goes_aside
from .metrics import training_metrics
from .preparing import Preparation, fitted
from .products import use_threads
from .sigmoid import by_powers
from .slices import Slices

Report = Callable[[Progress], None]


class TrainingTask:
    """Drives a `Preparation` and its `Trainer` in slices, and measures what came of it."""

    def __init__(
        self,
        foundation: Foundation,
        config: Config,
        batch: TrainBatch,
        *,
        bank_bytes: int,
        make_room: Callable[[int], None],
        base_head: TargetRows | None,
        ranks: Ranks | None,
        backend: Backend,
        report: Report,
        cancelled: threading.Event,
        plan: Plan | None = None,
    ) -> None:
        self.batch = batch
        home = foundation.home
        self._config = fitted(config, batch, foundation.base.context)
        self._settings = self._config.training
        self._sliced = self._settings.slice_ms > 0
        self._base, self._targets, self._home = foundation.base, foundation.targets, home
        self._backend, self._report, self._cancelled = backend, report, cancelled
        self._started = time.time()
        self._preparation = Preparation(
            foundation,
            self._config,
            batch,
            plan.rehearsed if plan else (),
            self._after_step,
            bank_bytes=bank_bytes,
            make_room=make_room,
            base_head=base_head if self._sliced else None,
            ranks=ranks,
        )
        self._notes = self._preparation.notes
        self._notes += plan.notes if plan else ()
        self._prepared: Trainer | None = None
        self._kept_at = time.monotonic()
        self._kept = KeptState(home / "state" / "training" / batch.checkpoint)
        self._final: list[float] = []
        self._validation: list[float] = []
        self._encoder = foundation.encoder
        self._evaluation = plan and UpdateEvaluation(foundation, plan, self._settings)
        self._known_before: list[float] | None = None
        self._phase: Any = "training"
        self._lane = Lane(2 * self._settings.share) if goes_aside(self._settings) and ranks is None else None
        self._learning = False
        self._slices = Slices(self._all_pieces(), self._check, self._lane)
        self._leaves = mx.default_device() == mx.cpu  # elsewhere the next step reads what is computed before it waits

    @property
    def _trainer(self) -> Trainer:
        assert self._prepared is not None
        return self._prepared

    # --- kept state ------------------------------------------------------------------------------

    def _identity(self) -> str:
        """What a kept state must have in common with this batch to be gone on from."""
        config = self._config
        facts: list[Any] = [self.batch.data_hash, self.batch.parent, self._base.fingerprint, self.batch.lineage]
        facts.append(config.model.chat_template_args)
        facts += [halved(config.training.halves), by_powers(config.serving.sigmoid)]  # both round otherwise
        chosen = (config.lora, config.training, config.replay, config.rehearsal)
        elsewhere = {"ask_ahead", "aside"}  # when it is asked, and where it is computed, changes nothing
        sections = [section.model_dump(exclude=elsewhere) for section in chosen]
        return hashlib.sha256(json.dumps([facts, sections], sort_keys=True).encode()).hexdigest()

    def _resume(self, trainer: Trainer) -> bool:
        if not self._kept.there or not self._sliced:
            return False
        try:
            progress = self._kept.progress()
            if progress["identity"] != self._identity():
                return False
            weights, optimizer = self._kept.arrays(files.ADAPTER_FILE), self._kept.arrays(files.OPTIMIZER_FILE)
            if weights is None or optimizer is None:
                return False
            trainer.resume(weights, optimizer, progress, self._kept.arrays(files.BEST_FILE))
            self._known_before = list(progress.get("loss_before", [])) or None
        except (OSError, ValueError, KeyError, CheckpointDamaged, TrainingFailed, ModelError):
            return False
        self._notes.append(f"taken up again at step {trainer.step} after an interruption")
        return True

    def keep_state(self, *, wait: bool = False) -> None:
        """Write what `_resume` reads."""
        if self._prepared is None:
            return
        self.take_back()
        weights, optimizer, progress = self._trainer.state()
        if self._evaluation and self._evaluation.unscaled is not None:
            weights = self._evaluation.unscaled
        arrays = {files.ADAPTER_FILE: weights, files.OPTIMIZER_FILE: optimizer}
        if best := self._trainer.best_arrays():
            arrays[files.BEST_FILE] = best
        before = self._evaluation.loss_before if self._evaluation else []
        self._kept.keep(arrays, {**progress, "identity": self._identity(), "loss_before": before}, wait=wait)
        self._kept_at = time.monotonic()

    # --- the run ---------------------------------------------------------------------------------

    @property
    def _served_scale(self) -> float:
        """What answers are computed with; training itself always uses the whole of `lora.alpha / lora.r`."""
        return self._config.lora.scale * self._config.serving.merge_toward_base

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._prepared.step if self._prepared is not None else 0

    @property
    def alive(self) -> bool:
        """Whether there are weights to answer from."""
        return self._prepared is not None

    @property
    def needs_base_asked(self) -> bool:
        """Whether what is asked ahead of updates is to come first: it would be asked for this one."""
        return self._preparation.at_asking and not self._cancelled.is_set()

    def live(self) -> AdapterWeights:
        """The weights as they are now."""
        return self._trainer.tree.adapter()

    @property
    def under_way_s(self) -> float:
        """About how long what the last slice has begun will still take."""
        return self._slices.under_way_s

    @property
    def goes_aside(self) -> bool:
        """Whether what comes next may be computed on a lane of its own."""
        return self._learning and self._lane is not None

    def feed(self) -> TrainResult | None:
        """Give the lane something to do; the result when all is done. Raises `RadianceError` if the batch fails."""
        return self._result() if self._slices.feed() else None

    def take_back(self) -> None:
        """Nothing is computed on the lane any more, until the next `feed`."""
        self._slices.take_back()

    def slice(self, seconds: float) -> TrainResult | None:
        """Work for about `seconds`; the result when all is done. Raises `RadianceError` if the batch fails."""
        return self._result() if self._slices.run(seconds, leave=self._leaves) else None

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("The job was cancelled.")

    def _all_pieces(self) -> Iterator[Piece]:
        yield from self._preparation.pieces()
        trainer = self._preparation.trainer
        assert trainer is not None
        if not self._resume(trainer):
            self._preparation.start_from_parent(trainer)
        self._prepared = trainer
        yield Piece([], barrier=True)
        if self._evaluation:
            yield from self._evaluation.before(trainer, self._preparation.examples, self._known_before)
        if self._lane is not None:
            mx.eval(trainer.tree.module.parameters())  # the base's are used by two threads from here on
        self._learning = True
        yield from self._learn(trainer)
        self._learning = False
        yield Piece([], barrier=True, pause=True)  # what follows is no longer for the lane
        self._phase = "evaluating"
        self._report(self._progress())
        if self._evaluation:
            yield from self._evaluate(self._evaluation)
        if self.batch.validation:
            yield from self._validate()

    def _learn(self, trainer: Trainer) -> Iterator[Piece]:
        """Train, and measure the loss of what answers; train on while that is too high and there are extensions."""
        while True:
            trainer.tree.set_scale(self._config.lora.scale)
            yield from trainer.run() if self._sliced else self._run_whole(trainer)
            trainer.tree.set_scale(self._served_scale)
            yield from trainer.evaluate_all(self._final)
            if not trainer.extend(self._final[-1]):
                return

    def _run_whole(self, trainer: Trainer) -> Iterator[Piece]:
        use_threads()  # decoding may have left fewer, and this is evaluated by itself
        yield from run_whole(trainer, self._after_step)

    def _validate(self) -> Iterator[Piece]:
        """The loss of examples that were not learnt."""
        room, mask = self._settings.max_seq_length, self._settings.mask_prompt
        rows = [self._encoder.example(e, mask_prompt=mask, max_tokens=room) for e in self.batch.validation]
        yield Piece([], barrier=True, pause=True)
        usable = [row for row in rows if row.targets > 0]
        if usable:
            yield from self._trainer.evaluate(usable, self._validation)

    def _evaluate(self, evaluation: UpdateEvaluation) -> Iterator[Piece]:
        yield from evaluation.after(
            self._trainer, self._preparation.head, self.batch.checkpoint, self.batch.parent, self._final[-1]
        )
        if evaluation.plan.unavailable:
            self._notes.append(f"anchors were not measured: {evaluation.plan.unavailable}")
        if evaluation.scale != 1.0:
            self._notes.append(f"published at {evaluation.scale:.3g} of its strength: {evaluation.verdict.reason}")
            yield from self._trainer.evaluate_all(self._final)

    def _after_step(self, trainer: Trainer) -> None:
        self._check()
        self._report(self._progress())
        due = time.monotonic() - self._kept_at >= self._settings.save_every_s
        if due and self._sliced and trainer.step < trainer.total_steps:
            self.keep_state()

    def _progress(self) -> Progress:
        steps = self._trainer.history.steps
        return Progress(
            step=self._trainer.step,
            max_steps=self._trainer.total_steps,
            loss=steps[-1]["loss"] if steps else None,
            tokens_per_s=round(self._trainer.tokens_per_s, 1),
            eta_s=self._trainer.eta_s,
            phase=self._phase,
        )

    # --- the end ---------------------------------------------------------------------------------

    def _result(self) -> TrainResult:
        lora = self._config.lora
        for times, loss in enumerate(self._trainer.holdout.extended, 1):
            steps = self._settings.max_steps
            self._notes.append(f"not learnt in {times * steps} steps (loss {loss:.3g}): {steps} more")
        if self._trainer.finished_early:
            self._notes.append(self._trainer.finished_early)
        written = self._write()
        used = {
            "base_model": self._config.base_model,
            "lineage": self.batch.lineage,
            "lora": lora.model_dump(),
            "merge_toward_base": self._config.serving.merge_toward_base,
            "training": self._settings.model_dump(),
            "replay": self._config.replay.model_dump(),
            "rehearsal": self._config.rehearsal.model_dump(),
            "evaluation": self._config.evaluation.model_dump(),
            "chat_template_args": self._config.model.chat_template_args,
        }
        return TrainResult(
            checkpoint=self.batch.checkpoint,
            parent=self.batch.parent,
            written=str(written),
            metrics=training_metrics(
                self._trainer, self.batch, self._final[-1], used, self._backend, time.time() - self._started
            )
            | ({**self._evaluation.metrics, "evaluation": self._evaluation.facts()} if self._evaluation else {})
            | ({"validation_loss": self._validation[-1]} if self._validation else {}),
            outcome=self._evaluation.verdict.outcome if self._evaluation else "pass",
            config=used,
            notes=tuple(self._notes),
            data_hash=self.batch.data_hash,
            jobs=self.batch.jobs,
            reconsolidated=self.batch.reconsolidated,
        )

    def _write(self) -> Path:
        """The unfinished folder with the adapter and the optimizer. Raises `StoreError` where the disk fails."""
        adapters, lora = self._home / "adapters", self._config.lora
        weights, optimizer, _ = self._trainer.state()
        config = files.adapter_config(self._targets, rank=lora.r, scale=self._served_scale, dropout=lora.dropout)
        try:
            adapters.mkdir(parents=True, exist_ok=True)
            written = unfinished(adapters, self.batch.checkpoint)
            files.save_adapter(written, weights, {**config, "base_model": self._config.base_model})
            files.save_arrays(written / files.OPTIMIZER_FILE, optimizer)
        except (OSError, RuntimeError) as error:
            raise StoreError(f"The trained adapter cannot be written to {adapters}: {error}") from error
        return written

    def close(self, *, forget_state: bool) -> None:
        """Let go of everything; with `forget_state` the kept state goes too."""
        self._slices.stop()
        if self._lane is not None:
            self._lane.close()
        self._kept.close(forget=forget_state)
