"""What `metrics/<checkpoint>.json` holds: the batch's curves and where they were measured."""

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx.core as mx

from .. import __version__
from ..evaluation.metrics import nothing_measured
from ..lora.trainer import Trainer
from ..messages import TrainBatch

_PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers")


def training_metrics(
    trainer: Trainer,
    batch: TrainBatch,
    final_loss: float,
    config: dict[str, Any],
    backend: str,
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
            "versions": {"radiance-mlx": __version__, **{name: _version(name) for name in _PACKAGES}},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "backend": backend,
            "device": str(mx.device_info().get("device_name", platform.machine())),
            "seed": trainer.settings.seed,
            "config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            "data_hash": batch.data_hash,
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
