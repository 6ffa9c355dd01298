"""Training one batch, in pieces.

`Trainer.run()` is a generator of `Piece`s; whoever drives it evaluates them, as many at once as its time
allows. Losses, data, optimizer steps and results are those of mlx-lm's `train`; only where the step is cut is
ours. State can be taken out after any step and put back: the run then goes on the same, bit by bit where as many
threads of OpenBLAS compute it.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner.trainer import TrainingArgs

from ..config.schema import TrainingSection
from ..errors import TrainingFailed
from .batches import Batch, fit_to_data
from .encoding import Encoded
from .focus import focus_steps, hardest, row_losses
from .halves import halved
from .head import TargetRows
from .holdout import Best, Holdout
from .measured import mean_loss, require_finite
from .optimizer import learning_rate, make_optimizer, restore, state_arrays
from .rehearsal import Begun, Rehearsal, RehearsalLoss
from .replay import Replay, replay_stream
from .step import (
    ComputeGradients,
    Gradients,
    LossFunction,
    MicroBatch,
    MicroBatchResult,
    Piece,
    add_grads,
    own_gradients,
    unflatten,
)
from .tree import TrainingTree


@dataclass
class History:
    """What was measured: one row per optimizer step, and (step, loss) of each evaluation."""

    steps: list[dict[str, float]] = field(default_factory=list)
    evals: list[dict[str, float]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "evals": self.evals}


class Trainer:
    """One batch's training on one tree. `on_step` is called after each optimizer step.

    With `replay`, earlier examples share the rows of each step; with `rehearsal`, each step has further
    micro-batches that hold the model to the base. With neither, or with nothing in them, the run is the same to
    the last bit as without.

    `origins[i]` tells which original `examples[i]` is or rewords (by default each is its own): what
    `settings.eval_fraction` holds out is whole originals (see `holdout`). `gradients` computes those of a step
    (by default `own_gradients`): other machines may take part in it; rehearsal and evaluation stay here.
    """

    def __init__(
        self,
        tree: TrainingTree,
        head: TargetRows | None,
        examples: Sequence[Encoded],
        settings: TrainingSection,
        number: int,
        on_step: Callable[["Trainer"], None] = lambda trainer: None,
        *,
        replay: Replay | None = None,
        rehearsal: Rehearsal | None = None,
        origins: Sequence[int] | None = None,
        gradients: ComputeGradients | None = None,
    ) -> None:
        self.tree = tree
        self.settings = settings
        self.number = number
        self.examples = [e for e in examples if e.targets > 0]
        if not self.examples:
            raise TrainingFailed(
                "No example has a token to learn.", "Check that outputs are not empty for this tokenizer."
            )
        named = zip(examples, range(len(examples)) if origins is None else origins, strict=True)
        self.holdout = Holdout(self.examples, [origin for e, origin in named if e.targets > 0], settings, number)
        self.replay = replay
        self._replay_first = replay.without(self.holdout.held) if replay and self.holdout.held else replay
        self._gradients = gradients or own_gradients
        self.rehearsal = rehearsal if rehearsal is not None and rehearsal.active else None
        self._args_first = _args(settings, len(self.holdout.trained), self._replay_first)
        self._args_second = _args(settings, len(self.examples), replay)
        self.optimizer = make_optimizer(settings)
        self.optimizer.init(tree.module.trainable_parameters())
        self.step = 0
        self.history = History()
        self.trained_tokens = 0
        self.finished_early = ""
        self._head = head
        self._focuses: dict[int, list[int]] = {}  # from which step on which of the replayed rows come
        self._on_step = on_step
        self._loss = LossFunction(tree, head)
        in_halves = halved(settings.halves)
        self._micro = MicroBatch(tree, self._loss, halved=in_halves)
        rehearsed = RehearsalLoss(tree, head, self.rehearsal.kl_weight if self.rehearsal else 0.0)
        self._rehearse = MicroBatch(tree, rehearsed, summed=True, seen_often=False, halved=in_halves)
        self._seconds = 0.0

    @property
    def args(self) -> TrainingArgs:
        """The sizes of the present phase's steps."""
        return self._args_first if self.holdout.second_from is None else self._args_second

    @property
    def learnt(self) -> list[Encoded]:
        """The examples that the whole run trains on."""
        return self.holdout.trained if self.settings.eval_holdout else self.examples

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run, as far as is known by now."""
        return self.holdout.total_steps

    @property
    def held_out_loss(self) -> float | None:
        """What the weights at the end of the first phase say of the held-out rows; None without such rows."""
        losses = self._held_out_losses
        if not losses:
            return None
        return min(losses) if self.holdout.out_of_patience(losses) else losses[-1]

    @property
    def _held_out_losses(self) -> list[float]:
        return [row["loss"] for row in self.history.evals] if self.holdout.held else []

    @property
    def seconds(self) -> float:
        """Wall time in optimizer steps so far, answers given meanwhile included."""
        return self._seconds

    @property
    def tokens_per_s(self) -> float:
        """Tokens through the model a second of wall time, over the run so far."""
        return self.trained_tokens / self._seconds if self._seconds else 0.0

    @property
    def eta_s(self) -> float | None:
        """Estimated seconds for the steps that are left, at the pace so far."""
        return self._seconds / self.step * (self.total_steps - self.step) if self.step else None

    # --- state -----------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, mx.array], dict[str, mx.array], dict[str, Any]]:
        """(weights, optimizer state, plain progress): all that `resume` needs, beside `best_arrays`."""
        progress = {
            "step": self.step,
            "trained_tokens": self.trained_tokens,
            "seconds": self._seconds,
            "second_from": self.holdout.second_from,
            "finished_early": self.finished_early,
            "extended": self.holdout.extended,
            "has_best": self.holdout.best is not None,
            "focuses": sorted(self._focuses.items()),
        }
        return (
            self.tree.parameters(),
            state_arrays(self.optimizer),
            {**progress, "history": self.history.as_dict()},
        )

    def best_arrays(self) -> dict[str, mx.array]:
        """Flat arrays of the best evaluation, as far as the run may go back to it."""
        return self.holdout.best.arrays() if self.holdout.best is not None else {}

    def start_from(self, weights: Mapping[str, mx.array], optimizer: Mapping[str, mx.array] | None) -> bool:
        """Go on from a parent's weights and optimizer; whether the optimizer's state could be used."""
        self.tree.load(weights)
        return optimizer is not None and restore(self.optimizer, self.tree.module.trainable_parameters(), optimizer)

    def resume(
        self,
        weights: Mapping[str, mx.array],
        optimizer: Mapping[str, mx.array],
        progress: Mapping[str, Any],
        best: Mapping[str, mx.array] | None = None,
    ) -> None:
        """Put back what `state` and `best_arrays` gave."""
        if not self.start_from(weights, optimizer):
            raise TrainingFailed("The saved state belongs to another optimizer.")
        if progress["has_best"] and not best:
            raise TrainingFailed("The saved state lacks the weights of the best evaluation.")
        self.holdout.best = Best.from_arrays(best) if best else None
        self.holdout.second_from = progress["second_from"]
        self.holdout.extended = [float(loss) for loss in progress["extended"]]
        self.finished_early = str(progress["finished_early"])
        self._focuses.update((int(step), list(places)) for step, places in progress["focuses"])
        self.step = int(progress["step"])
        self.trained_tokens = int(progress["trained_tokens"])
        self._seconds = float(progress["seconds"])
        self.history = History(list(progress["history"]["steps"]), list(progress["history"]["evals"]))

    # --- the run ---------------------------------------------------------------------------------

    def run(self) -> Iterator[Piece]:
        """Train to `max_steps` (or `stop_loss`, or `patience`). Raises `NonFinite`; the tree is then not to be used."""
        rehearsed = self._rehearsed_from(self.step)
        if self.holdout.second_from is None:
            yield from self._first_phase(rehearsed)
        if self.holdout.second_from is not None:
            yield from self._second_phase(self.holdout.second_from, rehearsed)

    def extend(self, loss: float) -> bool:
        """Whether `run` is to go on, for `loss`, the mean over all that is learnt, tells that it is not learnt yet.

        It then takes as many steps again, at the same rates. A run with a second phase has no more.
        """
        settings, holdout = self.settings, self.holdout
        done = holdout.has_second or self.finished_early or len(holdout.extended) >= settings.extensions
        if done or loss <= settings.learnt_loss:
            return False
        holdout.extended.append(loss)
        return True

    def _first_phase(self, rehearsed: Iterator[list[Begun]]) -> Iterator[Piece]:
        """Everything, or all but the held-out rows. What follows the last piece is done at once, or once more."""
        steps = self._steps(self.micro_batches(), self.step)
        yield from self._evaluate_if_due()  # an interruption may have come between a step and its evaluation
        while self.step < self.holdout.first_steps and not self._why_stop():
            yield from self._refocus_if_due()
            yield from self._timed_step(next(steps), next(rehearsed))
            yield from self._evaluate_if_due()
            self._on_step(self)
        if self.holdout.held and not self._evaluated:
            yield from self._evaluate_held_out()
        self.finished_early = self._why_stop()
        if self.holdout.best is not None and self.holdout.out_of_patience(self._held_out_losses):
            self.start_from(self.holdout.best.weights, self.holdout.best.optimizer)
        if self.holdout.has_second:
            self.holdout.second_from, self.holdout.best = self.step, None
            if self.finished_early:
                self.finished_early += f"; further steps, with the held-out rows: {self.holdout.second_steps}"

    def _second_phase(self, start: int, rehearsed: Iterator[list[Begun]]) -> Iterator[Piece]:
        stream = self.holdout.second_stream(
            self.replay,
            batch_size=self.args.batch_size,
            accumulate=self.args.grad_accumulation_steps,
            max_tokens=self.args.max_seq_length,
        )
        steps = self._steps(stream, self.step - start)
        while self.step < self.total_steps:
            yield from self._timed_step(next(steps), next(rehearsed))
            self._on_step(self)

    def _steps(self, stream: Iterator[Batch], start: int) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step of the present phase, from its step `start` on."""
        per_step = self.args.grad_accumulation_steps
        for step in itertools.count():
            batches = [next(stream) for _ in range(per_step)]
            if step >= start:
                yield batches

    def _timed_step(self, batches: list[Batch], rehearsed: list[Begun]) -> Iterator[Piece]:
        started = time.perf_counter()
        yield from self._optimizer_step(batches, rehearsed)
        self._seconds += time.perf_counter() - started

    def _why_stop(self) -> str:
        """Why the first phase ends before its steps are done; "" if it does not."""
        settings, steps = self.settings, self.history.steps
        if self.holdout.out_of_patience(self._held_out_losses):
            evaluations = f"{settings.patience} evaluation{'s' if settings.patience > 1 else ''}"
            return f"stopped at step {self.step}: the held-out loss has not improved for {evaluations}"
        if settings.stop_loss is not None and steps and steps[-1]["loss"] < settings.stop_loss:
            return f"stopped at step {self.step}: the loss is below stop_loss {settings.stop_loss}"
        return ""

    def micro_batches(self) -> Iterator[Batch]:
        """The first phase's micro-batches from its first step on, without end."""
        return replay_stream(
            self.holdout.trained,
            self._replay_first,
            batch_size=self._args_first.batch_size,
            accumulate=self._args_first.grad_accumulation_steps,
            max_tokens=self._args_first.max_seq_length,
            seed=(self.settings.seed, self.number),
            focuses=self._focuses,
        )

    def _refocus_if_due(self) -> Iterator[Piece]:
        replay = self._replay_first
        if replay is None or not replay.active or self.step in self._focuses:
            return
        steps = self.holdout.first_steps if self.holdout.has_second else self.settings.max_steps
        if self.step % self.settings.max_steps in focus_steps(replay.refocus, steps):
            losses: list[float] = []
            yield from row_losses(self.tree, self._head, replay.examples, losses)
            self._focuses[self.step] = hardest(losses, self.args.batch_size * self.args.grad_accumulation_steps)

    def _rehearsed_from(self, step: int) -> Iterator[list[Begun]]:
        if self.rehearsal is None:
            return itertools.repeat([])
        return self.rehearsal.steps(
            batch_size=self.settings.batch_size,
            max_tokens=self.args.max_seq_length,
            seed=(self.settings.seed, self.number),
            start=step,
        )

    def _optimizer_step(self, batches: list[Batch], rehearsed: list[Begun]) -> Iterator[Piece]:
        found: list[Gradients] = []
        keys = [self._dropout_key(index) for index in range(len(batches))]
        yield from self._gradients(self._micro, batches, keys, found)
        [(grads, loss)] = found
        tokens = sum(_tokens(batch) for batch in batches)
        row: dict[str, float] = {}
        if rehearsed:
            yield Piece([loss, *grads.values()], barrier=True)
            grads = dict(grads)
            yield from self._rehearsal_pieces(rehearsed, len(batches), grads, row)
            tokens += sum(_tokens(batch) for batch, _ in rehearsed)
        rate = learning_rate(self.step % self.settings.max_steps, self.settings)
        nested, norm = optim.clip_grad_norm(unflatten(grads), self.settings.clip_norm or math.inf)
        yield Piece([loss, norm], barrier=True)
        self.check_finite(loss.item(), norm.item())
        self.optimizer.learning_rate = rate
        self.optimizer.update(self.tree.module, nested if self.settings.clip_norm else unflatten(grads))
        # counted before the next piece: whoever stops there and takes the state gets weights and step that agree
        self.step += 1
        self.trained_tokens += tokens
        done = {"step": self.step, "loss": loss.item(), "lr": rate, "grad_norm": norm.item(), "tokens": tokens}
        self.history.steps.append({**done, **row})
        yield Piece(
            [*self.tree.parameters().values(), *state_arrays(self.optimizer).values()],
            barrier=True,
        )

    def _rehearsal_pieces(
        self, batches: list[Begun], before: int, grads: dict[str, mx.array], row: dict[str, float]
    ) -> Iterator[Piece]:
        """Add the gradients of the step's rehearsal to `grads`, and put its mean divergence into `row` as `kl`.

        `before` micro-batches of the step have had their dropout keys.
        """
        assert self.rehearsal is not None
        weighted = 0.0
        for index, (batch, begun) in enumerate(batches, before):
            result = MicroBatchResult()
            yield from self._rehearse.pieces(batch, self._dropout_key(index), result, begun)
            grads.update(add_grads(grads, result.grads))
            assert result.loss is not None
            yield Piece([result.loss, *grads.values()], barrier=True)
            weighted += result.loss.item()
        row["kl"] = weighted / self.rehearsal.kl_weight

    def _dropout_key(self, micro: int) -> mx.array:
        position = np.random.SeedSequence([self.settings.seed, self.number, self.step, micro])
        return mx.array(position.generate_state(2))

    def check_finite(self, loss: float, norm: float = 0.0) -> None:
        """Raises `NonFinite`."""
        require_finite(loss, norm, min(self.step + 1, self.total_steps))

    # --- evaluation ------------------------------------------------------------------------------

    def evaluate(self, examples: Sequence[Encoded], out: list[float], *, own: bool = False) -> Iterator[Piece]:
        """Token-mean loss over `examples` without dropout; the value is appended to `out`.

        `own` ones are learnt here: what the tree's prefix makes of them is kept.
        """
        sizes = {"batch_size": self.args.batch_size, "max_tokens": self.args.max_seq_length}
        yield from mean_loss(self.tree, self._loss, examples, out, **sizes, own=own)

    def evaluate_all(self, out: list[float]) -> Iterator[Piece]:
        """`evaluate` over all that is learnt. Raises `NonFinite`: the last update may have ruined the weights."""
        yield from self.evaluate(self.learnt, out, own=True)
        self.check_finite(out[-1])

    @property
    def _evaluated(self) -> bool:
        return bool(self.history.evals) and self.history.evals[-1]["step"] == self.step

    def _evaluate_if_due(self) -> Iterator[Piece]:
        every = self.settings.eval_every
        if not every or not self.step or self.step % every or self._evaluated:
            return
        if self.holdout.held:
            yield from self._evaluate_held_out()
        elif self.step < self.total_steps:
            yield from self._evaluate_sample()

    def _evaluate_sample(self) -> Iterator[Piece]:
        """At most as many rows as one optimizer step trains: evaluation never costs over a third of it."""
        rows = self.args.batch_size * self.args.grad_accumulation_steps
        value: list[float] = []
        yield from self.evaluate(self.examples[:rows], value, own=True)
        self.history.evals.append({"step": self.step, "loss": value[0]})

    def _evaluate_held_out(self) -> Iterator[Piece]:
        """All held-out rows. Raises `NonFinite`: no loss is lower than one that is no number."""
        value: list[float] = []
        yield from self.evaluate(self.holdout.held, value, own=True)
        self.check_finite(value[0])
        self.history.evals.append({"step": self.step, "loss": value[0]})
        self.holdout.keep_best(self._held_out_losses, self.tree.parameters(), state_arrays(self.optimizer))


def _tokens(batch: tuple[Any, ...]) -> int:
    """Tokens of a micro-batch that go through the model, padding included."""
    rows, width = batch[0].shape
    return int(rows * (width - 1))


def _args(settings: TrainingSection, new: int, replay: Replay | None) -> TrainingArgs:
    return fit_to_data(settings, replay.rows_with(new) if replay else new)
