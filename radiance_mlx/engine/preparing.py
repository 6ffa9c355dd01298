"""What comes before a batch's first step: examples to rows, whether they fit into memory, the tree, where it starts.

Sliced work, like the training itself.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.folder import read, verify
from ..config import Config
from ..config.schema import ReplaySection
from ..lora import files, memory
from ..lora.batches import fit_to_data
from ..lora.encoding import Encoded
from ..lora.head import TargetRows, install_found, install_head, unadapted
from ..lora.prefix import Prefix, install_prefix, lowest_adapted
from ..lora.ranks import Ranks
from ..lora.rehearsal import REHEARSED_TOGETHER
from ..lora.step import ComputeGradients, Piece
from ..lora.trainer import Trainer
from ..lora.tree import TrainingTree, make_tree
from ..messages import TrainBatch
from .foundation import Foundation
from .lasting import CARRIED, Lasting, Lesson


def fitted(config: Config, batch: TrainBatch, context: int) -> Config:
    """`config` for this batch and model.

    A reconsolidation replays nothing, for its batch is the log, and holds nothing out, for all of it was learnt before;
    its steps are as many as its own section says. The batch's own terms go before the configuration: steps of so many
    epochs are not extended.
    """
    training = {
        "max_seq_length": min(config.training.max_seq_length, context),
        "max_steps": batch.max_steps or config.training.max_steps,
        **_by_terms(config, batch),
    }
    off = {"eval_fraction": 0.0, "eval_holdout": False, "patience": 0, "extensions": 0}
    whole = off if batch.reconsolidated else {}
    return config.model_copy(
        update={
            "training": config.training.model_copy(update={**training, **whole}),
            "replay": ReplaySection() if batch.reconsolidated else config.replay,
        }
    )


def _by_terms(config: Config, batch: TrainBatch) -> dict[str, Any]:
    """A step's examples are divided into micro-batches that are no larger than the configured ones."""
    settings, terms, found = config.training, batch.terms, dict[str, Any]()
    if terms.seed is not None:
        found["seed"] = terms.seed
    if terms.lr_multiplier is not None:
        found["lr"] = settings.lr * terms.lr_multiplier
    if terms.batch_size is not None:
        rows = min(terms.batch_size, len(batch.examples))
        micro = next(size for size in range(min(settings.batch_size, rows), 0, -1) if rows % size == 0)
        found |= {"batch_size": micro, "grad_accum": rows // micro}
    if terms.epochs is not None:
        step = fit_to_data(settings.model_copy(update=found), len(batch.examples))
        rows = step.batch_size * step.grad_accumulation_steps
        own = 1.0 - config.replay.fraction if batch.replayable else 1.0  # of a step's rows
        found["extensions"] = 0
        found["max_steps"] = math.ceil(terms.epochs * len(batch.examples) / (rows * own))
    return found


class Preparation:
    """Of one batch, by a `fitted` configuration. `rehearsed` are the anchors to learn from.

    After `pieces` the `trainer` stands at its first step, on fresh weights; `examples` are what is learnt of the
    batch's own, and `notes` are for the job.
    """

    def __init__(
        self,
        foundation: Foundation,
        config: Config,
        batch: TrainBatch,
        rehearsed: Sequence[Encoded],
        on_step: Callable[[Trainer], None],
        *,
        bank_bytes: int,
        make_room: Callable[[int], None],
        base_head: TargetRows | None,
        ranks: Ranks | None,
    ) -> None:
        self._base, self._targets, self._encoder = foundation.base, foundation.targets, foundation.encoder
        self._config, self._settings, self._home, self._batch = config, config.training, foundation.home, batch
        self._rehearsed, self._on_step, self._make_room = rehearsed, on_step, make_room
        self._bank_bytes, self._base_head, self._ranks = bank_bytes, base_head, ranks
        self._lasting = Lasting.of(foundation, config)
        self._asked = self._lasting.base if self._lasting else None
        #: whether the base is to be asked next, or has been: what had to be looked at before is done
        self.at_asking = False
        self.examples: list[Encoded] = []
        self.notes = list(batch.notes)
        self.head: TargetRows | None = None
        self.trainer: Trainer | None = None

    def pieces(self) -> Iterator[Piece]:
        """Raises `RadianceError` for what cannot be trained."""
        room = self._settings.max_seq_length
        for example in self._batch.examples:
            encoded = self._encoder.example(example, mask_prompt=self._settings.mask_prompt, max_tokens=room)
            self.examples.append(encoded)
            yield Piece([], barrier=True)
        self._note_cut()
        self._preflight(self.examples)
        mx.reset_peak_memory()
        yield Piece([], barrier=True)
        if self._lasting:
            self.at_asking = True
            yield Piece([], barrier=True, pause=True)  # what is asked ahead has its turn
            yield from self._lasting.prepare(self._lesson(), self._rehearsed)
            self.notes += self._lasting.notes
            self.examples = [self.examples[i] for i in self._lasting.kept]
            self._preflight([*self.examples, *self._lasting.rows(room)])
        yield from self._make_trainer()

    def _note_cut(self) -> None:
        cut = [e for e in self.examples if e.cut]
        if cut:
            self.notes.append(
                f"{len(cut)} of {len(self.examples)} examples were longer than {self._settings.max_seq_length} tokens "
                f"and were cut (the longest by {max(e.cut for e in cut)} or more); see training.max_seq_length"
            )

    def _lesson(self) -> Lesson:
        batch = self._batch
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
            head=self._base_head,
            dropout=self._config.lora.dropout,
            together=REHEARSED_TOGETHER if self._config.rehearsal.kl_weight > 0 else 0,
            kept=self._kept_bytes(rows),
        )
        self._make_room(needed.total)
        memory.require(needed, memory.device_bytes(self._config.memory.limit_gb))

    def _make_trainer(self) -> Iterator[Piece]:
        """Each of the parts tries its tree with some passes of a few tokens: a slice for each."""
        lora, lasting = self._config.lora, self._lasting
        tree = make_tree(
            self._base.module,
            self._targets,
            rank=lora.r,
            scale=lora.scale,
            dropout=lora.dropout,
            seed=_seed(self._settings.seed, self._batch.number),
            grad_checkpoint=self._settings.grad_checkpoint,
            plain=self._settings.slice_ms == 0,
        )
        if self._base_head is not None:
            narrow = not self._settings.grad_checkpoint
            self.head = self._install_head(tree, self._base_head, narrow)
            yield Piece([], barrier=True, pause=True)
        rows = [*self.examples, *(lasting.trained if lasting else [])]
        self._install_prefix(tree, rows)
        yield Piece([], barrier=True, pause=True)
        if tree.prefix is not None:
            yield from self._fill(tree.prefix, rows)
        trainer = Trainer(
            tree,
            self.head,
            [*self.examples, *(lasting.examples if lasting else [])],
            self._settings,
            self._batch.number,
            self._on_step,
            replay=lasting.replay if lasting else None,
            rehearsal=lasting.rehearsal if lasting else None,
            gradients=self._shared(),
            origins=[*range(len(self.examples)), *(lasting.origins if lasting else [])],
        )
        self._note_sizes(trainer)
        self.trainer = trainer

    def _install_head(self, tree: TrainingTree, base_head: TargetRows, narrow: bool) -> TargetRows | None:
        vocab, found = self._base.vocab_size, base_head.found
        if found is None or unadapted(base_head, self._targets.paths) is None:
            return install_head(tree.module, vocab, narrow=narrow)
        return install_found(tree.module, vocab, found, narrow=narrow)

    def _install_prefix(self, tree: TrainingTree, rows: Sequence[Encoded]) -> None:
        """For `rows`, all that are learnt. They are kept where they come twice at least: else nothing is won by it.

        What is rehearsed was kept when the base was asked about it, and begins there in any case.
        """
        settings, lasting = self._settings, self._lasting
        replay, rehearsal = (lasting.replay, lasting.rehearsal) if lasting else (None, None)
        come = settings.max_steps * settings.batch_size * settings.grad_accum
        come += replay.refocus * len(replay.examples) if replay else 0
        tokens = sum(len(row.tokens) for row in rows)
        if come >= 2 * len(rows):
            install_prefix(tree, tokens, self._settings.prefix_bytes)
        if tree.prefix is None and rehearsal and rehearsal.begun:
            install_prefix(tree, tokens, self._settings.prefix_bytes, keeps=False)
        if rehearsal and tree.prefix and self._asked and tree.prefix.depth != self._asked.depth:
            rehearsal.forget_hidden()

    def _fill(self, prefix: Prefix, rows: Sequence[Encoded]) -> Iterator[Piece]:
        """Of rows that are replayed, what was kept by the updates that learnt them; of the others, it is computed."""
        asked, batch = self._asked, self._batch
        if not prefix.keeps:
            return
        if asked is None or not self._config.replay.fraction or asked.depth != prefix.depth:
            yield from prefix.fill(rows)
            return
        line = [batch.checkpoint, *batch.line[:CARRIED]]  # its own: of an attempt that was interrupted
        wanted = prefix.missing(rows)
        for kept in asked.learnt(line, wanted):
            prefix.recall(kept)
            yield Piece([], barrier=True)
        new = prefix.missing(rows)
        yield from prefix.fill(rows)
        yield from asked.keep_learnt(batch.checkpoint, prefix.part(new))
        asked.keep_only("learnt", line)

    def _kept_bytes(self, rows: Sequence[Encoded]) -> int:
        """At most, of what the prefix makes of `rows`."""
        if not self._settings.prefix_bytes or not lowest_adapted(self._base.module, self._targets):
            return 0
        return min(
            2 * self._settings.prefix_bytes, memory.hidden_bytes(self._base.module, sum(len(r.tokens) for r in rows))
        )

    def _shared(self) -> ComputeGradients | None:
        """How the step's gradients are computed with other machines; None: here."""
        if self._ranks is None or self._ranks.size == 1:
            return None
        lora, targets = self._config.lora, self._targets
        made_of: dict[str, Any] = {"rank": lora.r, "scale": lora.scale, "dropout": lora.dropout}
        made_of |= {"paths": targets.paths, "keys": targets.keys, "num_layers": targets.num_layers}
        made_of |= {"grad_checkpoint": self._settings.grad_checkpoint, "halves": self._settings.halves}
        self.notes.append(f"trained on {self._ranks.size} machines")
        return partial(self._ranks.gradients, made_of)

    def _note_sizes(self, trainer: Trainer) -> None:
        """Where the batch is too small for what the settings say."""
        fitting, held = trainer.args, len(trainer.holdout.held)
        if fitting.grad_accumulation_steps < self._settings.grad_accum:
            self.notes.append(
                f"one optimizer step takes {fitting.batch_size} x {fitting.grad_accumulation_steps} rows: "
                f"the batch has {len(trainer.examples)} examples" + (f", {held} of them held out" if held else "")
            )
        if trainer.holdout.note:
            self.notes.append(trainer.holdout.note)

    def start_from_parent(self, trainer: Trainer) -> None:
        """From the parent's weights and optimizer, if the lineage goes on and the shapes are the same.

        Raises `CheckpointDamaged` if they are not what was published.
        """
        parent = self._batch.parent
        if parent is None or self._batch.lineage == "fresh":
            return
        folder = self._home / "adapters" / parent
        verify(folder, read(folder)["files"])
        weights = files.load_arrays(folder / files.ADAPTER_FILE)
        changed = [] if trainer.tree.fits(weights) else ["lora.r or lora.target_modules"]
        if not math.isclose(_trained_scale(folder), self._config.lora.scale):
            changed.append("lora.alpha / lora.r")
        if changed:
            self.notes.append(
                f"started fresh from the base: {' and '.join(changed)} is not what {parent} was trained with"
            )
            return
        file = folder / files.OPTIMIZER_FILE
        if not trainer.start_from(weights, files.load_arrays(file) if file.is_file() else None):
            self.notes.append(f"the optimizer of {parent} was of another kind: it starts fresh")


def _trained_scale(folder: Path) -> float:
    """What a checkpoint was trained with: the adapter's own scale may be a merged one."""
    lora = read(folder)["config"]["lora"]
    return float(lora["alpha"]) / int(lora["r"])


def _seed(seed: int, number: int) -> int:
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
