"""What `metrics/<checkpoint>.json` holds: the batch's curves and where they were measured."""

from typing import Any

import mlx.core as mx

from ..evaluation.metrics import nothing_measured
from ..lora.trainer import Trainer
from ..messages import TrainBatch
from .backend import Backend
from .conditions import conditions


def training_metrics(
    trainer: Trainer,
    batch: TrainBatch,
    final_loss: float,
    config: dict[str, Any],
    backend: Backend,
    seconds: float,
) -> dict[str, Any]:
    """Losses in nats per answer token; `finetune_loss` is over all that was learnt, after the last step.

    `eval_loss` is the same, or, of rows that were held out, their loss before they were learnt.
    """
    steps, held_out = trainer.history.steps, trainer.held_out_loss
    return {
        "checkpoint": batch.checkpoint,
        "parent": batch.parent,
        "reconsolidated": batch.reconsolidated,
        "finetune_loss": final_loss,
        "eval_loss": final_loss if held_out is None else held_out,
        **nothing_measured(),
        "first_loss": steps[0]["loss"] if steps else None,
        "last_step_loss": steps[-1]["loss"] if steps else None,
        "examples": len(batch.examples),
        "trained_examples": len(trainer.learnt),
        "held_out_examples": len(trainer.holdout.held),
        "never_trained": trainer.holdout.never_trained,
        "target_tokens": sum(e.targets for e in trainer.learnt),
        "steps": trainer.step,
        "trained_tokens": trainer.trained_tokens,
        "seconds": round(seconds, 3),
        "training_seconds": round(trainer.seconds, 3),
        "tokens_per_s": round(trainer.tokens_per_s, 1),
        "peak_memory_bytes": mx.get_peak_memory(),
        "curves": {"finetune_loss": steps, "eval_loss": trainer.history.evals},
        "run": {
            **conditions(backend.name, backend.device, trainer.settings.seed, config),
            "data_hash": batch.data_hash,
        },
    }
