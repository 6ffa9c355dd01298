"""`training.slice_ms: 0`: the batch is trained by `mlx_lm.tuner.trainer.train` itself, through its own hooks.

Nothing is answered meanwhile. Our data order comes in as its `iterate_batches`, clipping and the rate as its
optimizer, progress and cancellation through its callback.
"""

import contextlib
import io
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import train
from mlx_lm.utils import maybe_set_recommended_wired_limit

from .batches import COMPILED_WIDTHS, Batch, batch_stream
from .optimizer import learning_rate
from .step import Piece
from .trainer import Trainer


class _StopEarly(Exception):
    """Raised out of mlx-lm's loop at `stop_loss`."""


class _Hooked:
    """An optimizer for mlx-lm's loop: clips, sets the rate by the batch's own step, then updates."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._inner = trainer.optimizer
        self._clip = trainer.settings.clip_norm

    @property
    def state(self) -> Any:
        return self._inner.state

    @property
    def learning_rate(self) -> Any:
        return self._inner.learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self._inner.learning_rate = rate

    def update(self, module: Any, grads: Any) -> None:
        if self._clip:
            grads, _ = optim.clip_grad_norm(grads, self._clip)
        self._inner.update(module, grads)


class _Callback(TrainingCallback):
    """mlx-lm's report after each optimizer step, as a row of the trainer's history.

    `tokens` counts what went through the model since the last one; mlx-lm itself counts targets only.
    """

    def __init__(self, trainer: Trainer, optimizer: _Hooked, on_step: Any) -> None:
        self._trainer, self._optimizer, self._on_step = trainer, optimizer, on_step
        self._started = time.perf_counter()
        self.tokens = 0

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        trainer = self._trainer
        trainer.check_finite(train_info["train_loss"])
        trainer.step += 1
        trainer.history.steps.append(
            {
                "step": trainer.step,
                "loss": train_info["train_loss"],
                "lr": train_info["learning_rate"],
                "tokens": self.tokens,
            }
        )
        trainer.trained_tokens += self.tokens
        self.tokens = 0
        trainer._seconds = time.perf_counter() - self._started
        self._optimizer.learning_rate = learning_rate(trainer.step, trainer.settings)
        self._on_step(trainer)
        stop = trainer.settings.stop_loss
        if stop is not None and train_info["train_loss"] < stop:
            trainer.finished_early = f"stopped at step {trainer.step}: the loss is below stop_loss {stop}"
            raise _StopEarly


def run_whole(trainer: Trainer, on_step: Any) -> Iterator[Piece]:
    """Like `Trainer.run`, in one piece: yields nothing until mlx-lm's `train` is through.

    The trainer's tree must be a plain one (`make_tree(plain=True)`), and its head the full one.
    """
    args = trainer.args
    optimizer = _Hooked(trainer)
    optimizer.learning_rate = learning_rate(trainer.step, trainer.settings)

    callback = _Callback(trainer, optimizer, on_step)

    def order(**_: Any) -> Iterator[Batch]:
        for batch in batch_stream(
            trainer.examples,
            batch_size=args.batch_size,
            max_tokens=args.max_seq_length,
            seed=(trainer.settings.seed, trainer.number),
            widths=COMPILED_WIDTHS,
        ):
            callback.tokens += int(batch[0].size) - batch[0].shape[0]
            yield batch

    class_before = type(trainer.tree.module.layers[0])
    call_before = class_before.__call__
    wired_before = maybe_set_recommended_wired_limit()  # mlx-lm's loop sets it and leaves it
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args.adapter_file = str(Path(folder) / "adapters.safetensors")
        try:
            train(
                trainer.tree.module,
                optimizer,
                trainer.examples,
                args=args,
                iterate_batches=order,
                training_callback=callback,
            )
        except _StopEarly:
            pass
        finally:
            # mlx-lm's grad_checkpoint patches the class, which the serving tree shares
            class_before.__call__ = call_before
            if wired_before is not None:
                mx.set_wired_limit(wired_before)
    final = trainer.history.steps[-1]["loss"] if trainer.history.steps else math.nan
    trainer.check_finite(final)
    yield Piece(list(trainer.tree.parameters().values()), barrier=True)
