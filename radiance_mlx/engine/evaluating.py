"""What an update has cost, measured on the engine's thread in pieces, between other people's tokens.

`AnchorMeter` measures any adapter on a set of anchors against the base and a parent. `UpdateEvaluation` wraps
one batch's training: what its examples and the earlier updates' cost before and after, the anchors, and what the
policy makes of it. Both are generators of `Piece`s, like training itself.
"""

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..config.schema import TrainingSection
from ..errors import CheckpointDamaged, ModelError
from ..evaluation.anchors import AnchorSet
from ..evaluation.divergence import Reference
from ..evaluation.kept import Kept, KeptReferences
from ..evaluation.measuring import Documents, Measured, measure
from ..evaluation.metrics import AnchorSums, anchor_metrics, kept_gain, nothing_measured
from ..evaluation.plan import EarlierUpdate, Plan, spread
from ..evaluation.policy import FINETUNE_LOSS, Verdict, fires, judge, next_scale
from ..lora import files
from ..lora.bank import AdapterWeights
from ..lora.encoding import Encoded
from ..lora.head import TargetRows, install_head
from ..lora.step import Piece
from ..lora.trainer import Trainer
from ..lora.tree import TrainingTree, adapter_tree, idle_adapter
from ..messages import BASE
from .foundation import Foundation

#: how often `evaluation.scale_first` halves the range of scales
SCALE_STEPS = 5
#: rows of the update that `update_kl` looks at
UPDATE_ROWS = 32


class AnchorMeter:
    """Measures adapters of one base on one set of anchors. What is kept lies in the home under state/anchors."""

    def __init__(self, foundation: Foundation, anchors: AnchorSet) -> None:
        self._base, self._targets, self._home = foundation.base, foundation.targets, foundation.home
        self.anchors, place = anchors, self._home / "state" / "anchors"
        self.documents = Documents(anchors.documents)
        self._kept = KeptReferences(place, self._base.fingerprint, anchors.hash, self.documents)
        self.seconds = 0.0

    def metrics(
        self, tree: TrainingTree, head: TargetRows | None, parent: str | None, out: dict[str, Any], *, name: str = ""
    ) -> Iterator[Piece]:
        """Put the metrics of the tree's adapter into `out`; with `name`, keep its distributions under it.

        `parent` None is the base; a parent that cannot be measured leaves its metrics out.
        """
        started = time.perf_counter()
        base = yield from self._of_base()
        before = base if parent is None else (yield from self._of(parent, base))
        against = {"base": base.reference, **({"parent": before.reference} if before is not None else {})}
        found = Measured.empty(self.documents, list(against))
        yield from measure(tree, head, self.documents, against, found, keep=bool(name))
        for _ in anchor_metrics(self._sums(found, base, before), out):
            yield Piece([], barrier=True)
        if name and found.own is not None:
            yield Piece([], barrier=True, pause=True)
            self._kept.save(name, Kept(found.own, self.documents.sums(found.kl["base"])))
            self._kept.keep_only({BASE, name, parent or BASE})
        self.seconds += time.perf_counter() - started

    def _sums(self, found: Measured, base: Kept, parent: Kept | None) -> AnchorSums:
        sums = self.documents.sums
        return AnchorSums(
            tokens=self.documents.counts,
            base_entropy=sums(np.array(base.reference.entropy)),
            base_target=sums(np.array(base.reference.target)),
            target=sums(found.target),
            base_kl=sums(found.kl["base"]),
            agreement=sums(found.agreement["base"]),
            parent_entropy=None if parent is None else sums(np.array(parent.reference.entropy)),
            parent_kl=None if parent is None else sums(found.kl["parent"]),
            parent_base_kl=None if parent is None else parent.base_kl,
        )

    def _of_base(self) -> Generator[Piece, None, Kept]:
        """What is kept of the base; measured now if nothing is."""
        kept = self._kept.load(BASE)
        if kept is None:
            adapter = idle_adapter(self._base.module, self._targets)
            kept = yield from self._measured(BASE, adapter, {})
        return kept

    def _of(self, checkpoint: str, base: Kept) -> Generator[Piece, None, Kept | None]:
        """What is kept of a checkpoint, measured now if nothing is; None if it cannot be."""
        kept = self._kept.load(checkpoint)
        if kept is None:
            with contextlib.suppress(CheckpointDamaged, ModelError):
                adapter = files.load_adapter(self._home / "adapters" / checkpoint)
                kept = yield from self._measured(checkpoint, adapter, {"base": base.reference})
        return kept

    def _measured(
        self, name: str, adapter: AdapterWeights, against: dict[str, Reference]
    ) -> Generator[Piece, None, Kept]:
        tree = adapter_tree(self._base.module, adapter)
        head = install_head(tree.module, self._base.vocab_size)
        found = Measured.empty(self.documents, list(against))
        yield from measure(tree, head, self.documents, against, found, keep=True)
        assert found.own is not None
        none = np.zeros(len(self.documents.counts))
        kept = Kept(found.own, self.documents.sums(found.kl["base"]) if against else none)
        yield Piece([], barrier=True, pause=True)
        self._kept.save(name, kept)
        return kept

    def facts(self) -> dict[str, Any]:
        """Which anchors, and what they cost."""
        return {
            "source": self.anchors.source,
            "hash": self.anchors.hash,
            "documents": len(self.documents.encoded),
            "tokens": self.documents.tokens,
            "skipped": self.anchors.skipped,
            "seconds": round(self.seconds, 3),
        }


class UpdateEvaluation:
    """Around the training of one batch: `before` it, `after` it. `metrics` and `verdict` are there afterwards."""

    def __init__(self, foundation: Foundation, plan: Plan, settings: TrainingSection) -> None:
        self._base, self._targets, self._encoder = foundation.base, foundation.targets, foundation.encoder
        self.plan, self._settings = plan, settings
        self._meter = AnchorMeter(foundation, plan.anchors) if plan.anchors else None
        self._own: list[Encoded] = []
        self.loss_before: list[float] = []
        self.scale = 1.0
        #: the weights as they were trained, once others have been tried
        self.unscaled: dict[str, mx.array] | None = None
        self.metrics: dict[str, Any] = nothing_measured()
        self.verdict: Verdict = judge(plan.rule, self.metrics)

    def before(self, trainer: Trainer, examples: Sequence[Encoded], known: Sequence[float] | None) -> Iterator[Piece]:
        """The loss of those of `examples` that stand for this update, by the weights that it starts from.

        What stays held out is not learnt, so that nothing of it could be kept either: it stands for nothing.
        `known` is what was measured before an interruption: the weights are others by now.
        """
        if self._meter is None or not self.plan.sample:
            return
        never = set(trainer.holdout.never_trained)
        learnt = [e for place, e in enumerate(examples) if place not in never]
        chosen = (learnt[i] for i in spread(len(learnt), self.plan.sample))
        self._own = [e for e in chosen if e.targets > 0]
        if known is not None:
            self.loss_before.extend(known)
        elif self._own:
            yield from trainer.evaluate(self._own, self.loss_before)

    def after(
        self, trainer: Trainer, head: TargetRows | None, checkpoint: str, parent: str | None, finetune_loss: float
    ) -> Iterator[Piece]:
        """All metrics, the verdict, and, if the plan says so, the largest scale of `b` that passes."""
        if self._meter is not None:
            yield from self._measure(trainer, head, checkpoint, parent)
        self.verdict = judge(self.plan.rule, {**self.metrics, FINETUNE_LOSS: finetune_loss})
        if self._meter is None:
            return
        # a weaker adapter has learnt less: that mends only what is measured on anchors
        on_anchors = self.plan.rule.metric != FINETUNE_LOSS
        if self.plan.scale_first and on_anchors and self.verdict.outcome in ("risky", "rejected"):
            yield from self._scale_down(trainer, head, checkpoint, parent)
        yield from self._update_metrics(trainer, head)

    def _measure(
        self, trainer: Trainer, head: TargetRows | None, checkpoint: str, parent: str | None
    ) -> Iterator[Piece]:
        assert self._meter is not None
        yield from self._meter.metrics(trainer.tree, head, parent, self.metrics, name=checkpoint)

    def _scale_down(
        self, trainer: Trainer, head: TargetRows | None, checkpoint: str, parent: str | None
    ) -> Iterator[Piece]:
        """By bisection; if no scale passes, everything stays as it was trained."""
        assert self._meter is not None
        whole, rule = trainer.tree.parameters(), self.plan.rule
        self.unscaled = whole
        passed, failed = 0.0, 1.0
        for _ in range(SCALE_STEPS):
            middle, found = next_scale(passed, failed), dict[str, Any]()
            trainer.tree.load(scaled(whole, middle))
            yield from self._meter.metrics(trainer.tree, head, parent, found)
            verdict = judge(rule, found)
            good = verdict.value is not None and not fires(rule, verdict.value)
            passed, failed = (middle, failed) if good else (passed, middle)
        self.scale = passed or 1.0
        trainer.tree.load(scaled(whole, self.scale))
        mx.eval(trainer.tree.module.trainable_parameters())
        if passed:
            yield from self._measure(trainer, head, checkpoint, parent)
            self.verdict = judge(rule, self.metrics)

    def _update_metrics(self, trainer: Trainer, head: TargetRows | None) -> Iterator[Piece]:
        rows = [trainer.learnt[i] for i in spread(len(trainer.learnt), UPDATE_ROWS)]
        yield from self._update_kl(trainer, head, rows)
        after: list[float] = []
        if self._own and self.loss_before:
            yield from trainer.evaluate(self._own, after)
            self.metrics["own_sample"] = {
                "sample": self.plan.sample,
                "loss_before": self.loss_before[0],
                "loss_after": after[0],
            }
        kept: dict[str, float] = {}
        for update in self.plan.earlier:
            yield from self._retention_of(trainer, update, kept)
        self.metrics["update_retention"] = float(np.mean(list(kept.values()))) if kept else None
        self.metrics["update_retention_by_checkpoint"] = kept

    def _retention_of(self, trainer: Trainer, update: EarlierUpdate, kept: dict[str, float]) -> Iterator[Piece]:
        room, mask = self._settings.max_seq_length, self._settings.mask_prompt
        encoded = [self._encoder.example(e, mask_prompt=mask, max_tokens=room) for e in update.examples]
        now: list[float] = []
        usable = [e for e in encoded if e.targets > 0]
        if usable:
            yield from trainer.evaluate(usable, now)
            share = kept_gain(update.before, update.after, now[0])
            if share is not None:
                kept[update.checkpoint] = share

    def _update_kl(self, trainer: Trainer, head: TargetRows | None, rows: Sequence[Encoded]) -> Iterator[Piece]:
        """KL(p0 ‖ p) where this update's answers are, mean over their tokens."""
        documents = Documents(rows)
        tree = adapter_tree(self._base.module, idle_adapter(self._base.module, self._targets))
        base_head = install_head(tree.module, self._base.vocab_size)
        base, found = Measured.empty(documents), Measured.empty(documents, ["base"])
        yield from measure(tree, base_head, documents, {}, base, keep=True)
        assert base.own is not None
        yield from measure(trainer.tree, head, documents, {"base": base.own}, found)
        self.metrics["update_kl"] = float(found.kl["base"].mean())

    def facts(self) -> dict[str, Any]:
        """For the metrics file: anchors, policy, what went wrong."""
        return {
            "anchors": self._meter.facts() if self._meter else None,
            "unavailable": self.plan.unavailable or None,
            "scale": self.scale,
            "verdict": self.verdict.as_dict(),
        }


def scaled(weights: dict[str, mx.array], scale: float) -> dict[str, mx.array]:
    """An adapter's flat parameters with every `b` multiplied: the product, and nothing else, gets smaller."""
    return {name: value * scale if name.endswith(".lora_b") else value for name, value in weights.items()}
