"""The optimizer of a batch: MLX's Adam or AdamW, a rate by the batch's own step, state that can be kept.

The rate is set before each update instead of by a schedule inside the optimizer: that one reads the
optimizer's own step count, and a continued lineage would stay at the decayed rate for ever.
"""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..config.schema import TrainingSection


def make_optimizer(settings: TrainingSection) -> optim.Optimizer:
    """A fresh optimizer, as mlx-lm makes it."""
    if settings.optimizer == "adamw":
        return optim.AdamW(learning_rate=settings.lr, weight_decay=settings.weight_decay)
    return optim.Adam(learning_rate=settings.lr)


def learning_rate(step: int, settings: TrainingSection) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then constant, linear or cosine to 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    done = (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
    if settings.schedule == "linear":
        return settings.lr * (1.0 - done)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.lr


def state_arrays(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The whole state as flat arrays, step and rate included."""
    return {name: mx.array(value) for name, value in tree_flatten(optimizer.state)}


def restore(optimizer: optim.Optimizer, parameters: Any, arrays: Mapping[str, mx.array]) -> bool:
    """Take over a kept state; False (and a fresh state) if it is of another optimizer or other shapes."""
    optimizer.init(parameters)
    fresh = dict(tree_flatten(optimizer.state))
    if {k: v.shape for k, v in fresh.items()} != {k: v.shape for k, v in arrays.items()}:
        return False
    optimizer.state = tree_unflatten(list(arrays.items()))
    return True
