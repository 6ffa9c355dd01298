"""One batch in training, as the engine's background work: prepared, cut into slices, measured, written.

A `TrainingTask` never touches the bank or the requests. Its state is kept every so often under
`state/training/<checkpoint>`, so that the same batch can go on after a crash from the last kept step.
"""

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.folder import read, unfinished, verify
from ..config import Config
from ..config.schema import ReplaySection, TrainingSection
from ..errors import Cancelled, CheckpointDamaged, ModelError, StoreError, TrainingFailed
from ..evaluation.plan import Plan
from ..lora import files, memory
from ..lora.bank import AdapterWeights
from ..lora.encoding import ChatEncoder, Encoded
from ..lora.head import TargetRows, install_head
from ..lora.step import Piece
from ..lora.targets import Targets
from ..lora.trainer import Trainer
from ..lora.tree import make_tree
from ..lora.whole import run_whole
from ..messages import Progress, TrainBatch, TrainResult
from .evaluating import UpdateEvaluation
from .kept_state import KeptState
from .lasting import Asked, Lasting, Lesson
from .metrics import training_metrics
from .model import BaseModel
from .slices import Slices

Report = Callable[[Progress], None]


class TrainingTask:
    """Drives a `Trainer` in slices. Preparing (encoding, the preflight, the tree) is sliced work like the rest."""

    def __init__(
        self,
        base: BaseModel,
        targets: Targets,
        encoder: ChatEncoder,
        config: Config,
        home: Path,
        batch: TrainBatch,
        *,
        bank_bytes: int,
        context: int,
        head_on_targets: bool,
        backend: str,
        report: Report,
        cancelled: threading.Event,
        plan: Plan | None = None,
    ) -> None:
        self.batch = batch
        self._base, self._config, self._home, self._report = base, config, home, report
        self._targets, self._backend, self._cancelled = targets, backend, cancelled
        self._notes = list(batch.notes)
        self._started = time.time()
        self._settings = _settings(config.training, batch, context)
        self._replay = ReplaySection() if batch.reconsolidated else config.replay
        self._encoder, self._bank_bytes = encoder, bank_bytes
        self._head_on_targets = head_on_targets and config.training.slice_ms > 0
        self._examples: list[Encoded] = []
        self._prepared: Trainer | None = None
        self._kept_at = time.monotonic()
        self._kept = KeptState(home / "state" / "training" / batch.checkpoint)
        self._final: list[float] = []
        self._evaluation = plan and UpdateEvaluation(base, targets, encoder, home, plan, self._settings)
        self._lasting: Lasting | None = None
        self._rehearsed_anchors = plan.rehearsed if plan else ()
        if Lasting.wanted(self._replay, config.rehearsal):
            asked = Asked(
                base.module, base.vocab_size, encoder, targets, home / "state" / "rehearsal", base.fingerprint
            )
            self._lasting = Lasting(asked, self._replay, config.rehearsal)
        self._head: TargetRows | None = None
        self._known_before: list[float] | None = None
        self._phase: Any = "training"
        self._slices = Slices(self._all_pieces(), self._check)

    # --- preparation -----------------------------------------------------------------------------

    @property
    def _trainer(self) -> Trainer:
        assert self._prepared is not None
        return self._prepared

    def _preparation(self) -> Iterator[Piece]:
        """Encode in pieces, estimate memory, build the tree. Raises `RadianceError` for what cannot be trained."""
        room = self._settings.max_seq_length
        for example in self.batch.examples:
            encoded = self._encoder.example(example, mask_prompt=self._settings.mask_prompt, max_tokens=room)
            self._examples.append(encoded)
            yield Piece([], barrier=True)
        cut = [e for e in self._examples if e.cut]
        if cut:
            self._notes.append(
                f"{len(cut)} of {len(self._examples)} examples were longer than {room} tokens and were cut "
                f"(the longest by {max(e.cut for e in cut)} or more); see training.max_seq_length"
            )
        self._preflight(self._examples)
        mx.reset_peak_memory()
        yield Piece([], barrier=True)
        if self._lasting:
            yield from self._lasting.prepare(self._lesson(), self._rehearsed_anchors)
            self._notes += self._lasting.notes
            self._examples = [self._examples[i] for i in self._lasting.kept]
            self._preflight([*self._examples, *self._lasting.rows(room)])
        self._prepared = self._prepare()
        yield Piece([], barrier=True)

    def _lesson(self) -> Lesson:
        batch = self.batch
        return Lesson(
            checkpoint=batch.checkpoint,
            number=batch.number,
            examples=batch.examples,
            log=batch.log,
            replayable=batch.replayable,
            line=batch.line,
            seed=self._settings.seed,
            max_tokens=self._settings.max_seq_length,
            mask_prompt=self._settings.mask_prompt,
            reconsolidated=batch.reconsolidated,
        )

    def _preflight(self, rows: Sequence[Encoded]) -> None:
        needed = memory.estimate(
            self._base.module,
            self._targets,
            rows,
            self._settings,
            rank=self._config.lora.r,
            vocab_size=self._base.vocab_size,
            bank_bytes=self._bank_bytes,
            head_on_targets=self._head_on_targets,
            dropout=self._config.lora.dropout,
        )
        memory.require(needed, memory.device_bytes(self._config.memory.limit_gb))
        self.estimate = needed

    def _prepare(self) -> Trainer:
        lora, whole = self._config.lora, self._config.training.slice_ms == 0
        tree = make_tree(
            self._base.module,
            self._targets,
            rank=lora.r,
            scale=lora.scale,
            dropout=lora.dropout,
            seed=_seed(self._settings.seed, self.batch.number),
            grad_checkpoint=self._settings.grad_checkpoint,
            plain=whole,
        )
        self._head = install_head(tree.module, self._base.vocab_size) if self._head_on_targets else None
        lasting = self._lasting
        trainer = Trainer(
            tree,
            self._head,
            [*self._examples, *(lasting.examples if lasting else [])],
            self._settings,
            self.batch.number,
            self._after_step,
            replay=lasting.replay if lasting else None,
            rehearsal=lasting.rehearsal if lasting else None,
            origins=[*range(len(self._examples)), *(lasting.origins if lasting else [])],
        )
        self._note_sizes(trainer)
        if not self._resume(trainer):
            self._start(trainer)
        return trainer

    def _note_sizes(self, trainer: Trainer) -> None:
        """Where the batch is too small for what the settings say."""
        fitted, held = trainer.args, len(trainer.holdout.held)
        if fitted.grad_accumulation_steps < self._settings.grad_accum:
            self._notes.append(
                f"one optimizer step takes {fitted.batch_size} x {fitted.grad_accumulation_steps} rows: "
                f"the batch has {len(trainer.examples)} examples" + (f", {held} of them held out" if held else "")
            )
        if trainer.holdout.note:
            self._notes.append(trainer.holdout.note)

    def _start(self, trainer: Trainer) -> None:
        """From the parent's weights and optimizer, if the lineage goes on and the shapes are the same.

        Raises `CheckpointDamaged` if they are not what was published.
        """
        parent = self.batch.parent
        if parent is None or self.batch.lineage == "fresh":
            return
        folder = self._home / "adapters" / parent
        verify(folder, read(folder)["files"])
        weights = files.load_arrays(folder / files.ADAPTER_FILE)
        changed = [] if trainer.tree.fits(weights) else ["lora.r or lora.target_modules"]
        if not math.isclose(_trained_scale(folder), self._config.lora.scale):
            changed.append("lora.alpha / lora.r")
        if changed:
            self._notes.append(
                f"started fresh from the base: {' and '.join(changed)} is not what {parent} was trained with"
            )
            return
        file = folder / files.OPTIMIZER_FILE
        if not trainer.start_from(weights, files.load_arrays(file) if file.is_file() else None):
            self._notes.append(f"the optimizer of {parent} was of another kind: it starts fresh")

    # --- kept state ------------------------------------------------------------------------------

    def _identity(self) -> str:
        """What a kept state must have in common with this batch to be gone on from."""
        config = self._config
        facts: list[Any] = [self.batch.data_hash, self.batch.parent, self._base.fingerprint, self.batch.lineage]
        facts.append(config.model.chat_template_args)
        chosen = (config.lora, self._settings, self._replay, config.rehearsal)
        sections = [section.model_dump() for section in chosen]
        return hashlib.sha256(json.dumps([facts, sections], sort_keys=True).encode()).hexdigest()

    def _resume(self, trainer: Trainer) -> bool:
        if not self._kept.there or self._config.training.slice_ms == 0:
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

    def live(self) -> AdapterWeights:
        """The weights as they are now."""
        return self._trainer.tree.adapter()

    def slice(self, seconds: float) -> TrainResult | None:
        """Work for about `seconds`; the result when all is done. Raises `RadianceError` if the batch fails."""
        return self._result() if self._slices.run(seconds) else None

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("The job was cancelled.")

    def _all_pieces(self) -> Iterator[Piece]:
        yield from self._preparation()
        if self._evaluation:
            yield from self._evaluation.before(self._trainer, self._examples, self._known_before)
        if self._config.training.slice_ms == 0:
            yield from run_whole(self._trainer, self._after_step)
        else:
            yield from self._trainer.run()
        self._phase = "evaluating"
        self._report(self._progress())
        self._trainer.tree.set_scale(self._served_scale)
        yield from self._trainer.evaluate_all(self._final)
        if self._evaluation:
            yield from self._evaluate(self._evaluation)

    def _evaluate(self, evaluation: UpdateEvaluation) -> Iterator[Piece]:
        yield from evaluation.after(
            self._trainer, self._head, self.batch.checkpoint, self.batch.parent, self._final[-1]
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
        if due and self._config.training.slice_ms > 0 and trainer.step < trainer.total_steps:
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
        if self._trainer.finished_early:
            self._notes.append(self._trainer.finished_early)
        written = self._write()
        used = {
            "base_model": self._config.base_model,
            "lineage": self.batch.lineage,
            "lora": lora.model_dump(),
            "merge_toward_base": self._config.serving.merge_toward_base,
            "training": self._settings.model_dump(),
            "replay": self._replay.model_dump(),
            "rehearsal": self._config.rehearsal.model_dump(),
        }
        return TrainResult(
            checkpoint=self.batch.checkpoint,
            parent=self.batch.parent,
            written=str(written),
            metrics=training_metrics(
                self._trainer, self.batch, self._final[-1], used, self._backend, time.time() - self._started
            )
            | ({**self._evaluation.metrics, "evaluation": self._evaluation.facts()} if self._evaluation else {}),
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
        self._kept.close(forget=forget_state)


def _settings(training: TrainingSection, batch: TrainBatch, context: int) -> TrainingSection:
    """`training` for this batch and model. Of a reconsolidation nothing is held out: all of it was learnt before."""
    fitted = {
        "max_seq_length": min(training.max_seq_length, context),
        "max_steps": batch.max_steps or training.max_steps,
    }
    whole = {"eval_fraction": 0.0, "eval_holdout": False, "patience": 0} if batch.reconsolidated else {}
    return training.model_copy(update={**fitted, **whole})


def _trained_scale(folder: Path) -> float:
    """What a checkpoint was trained with: the adapter's own scale may be a merged one."""
    lora = read(folder)["config"]["lora"]
    return float(lora["alpha"]) / int(lora["r"])


def _seed(seed: int, number: int) -> int:
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
