"""What a batch will need, before it starts: refused with the keys to change, not found out by dying.

On Metal an allocation that fails ends the process, so the estimate errs on the large side. It is made from
the shapes of the linears alone and knows no architecture.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config.schema import TrainingSection
from ..errors import NotEnoughMemory
from .encoding import Encoded
from .targets import LINEAR, Targets, input_dims, layer_paths


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part, and their sum."""

    base: int
    bank: int
    adapter: int
    optimizer: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        return self.base + self.bank + self.adapter + self.optimizer + self.activations + self.head


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))


def estimate(
    model: nn.Module,
    targets: Targets,
    examples: Iterable[Encoded],
    settings: TrainingSection,
    *,
    rank: int,
    vocab_size: int,
    bank_bytes: int,
    head_on_targets: bool,
) -> Estimate:
    """What training `examples` takes at its largest micro-batch."""
    rows = sorted(examples, key=lambda e: len(e.tokens))[-settings.batch_size :]
    width = 32 * math.ceil(max(len(e.tokens) for e in rows) / 32)
    tokens = width * len(rows)
    per_layer = _activation_bytes_per_token(model)
    if settings.grad_checkpoint:  # one layer at a time, and every layer's input
        hidden = max(input_dims(m) for _, m in _linears(model))
        activations = tokens * (max(per_layer.values()) + 4 * hidden * len(per_layer))
    else:
        activations = tokens * sum(per_layer.values())
    targeted = sum(e.targets for e in rows) if head_on_targets else tokens
    shapes = [(input_dims(m), m.weight.shape[0]) for path, m in _linears(model) if path in set(targets.paths)]
    adapter = sum(4 * rank * (width_in + width_out) for width_in, width_out in shapes)
    return Estimate(
        base=model_bytes(model),
        bank=bank_bytes,
        adapter=3 * adapter,  # weights, gradients, and the sum of accumulated ones
        optimizer=2 * adapter,
        activations=activations,
        head=3 * 4 * targeted * vocab_size,
    )


def device_bytes(limit_gb: float | None) -> int:
    """What the process may take: the configured limit, else what the device says it has."""
    if limit_gb is not None:
        return int(limit_gb * 2**30)
    info = mx.device_info()
    known = info.get("max_recommended_working_set_size") or info.get("memory_size")
    return int(known or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def require(needed: Estimate, limit: int) -> None:
    """Raise `NotEnoughMemory` unless `needed` fits into `limit` bytes."""
    if needed.total <= limit:
        return
    parts = {name: f"{getattr(needed, name) / 2**20:.0f} MiB" for name in needed.__dataclass_fields__}
    raise NotEnoughMemory(
        f"Training this batch needs about {needed.total / 2**30:.2f} GiB, and there are {limit / 2**30:.2f} GiB.",
        "Lower training.batch_size or training.max_seq_length, set training.grad_checkpoint: true, or lower "
        "lora.r or serving.adapter_slots; memory.limit_gb sets the limit.",
        parts,
    )


def _linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LINEAR)]


def _activation_bytes_per_token(model: nn.Module) -> dict[str, int]:
    """For each layer: inputs and outputs of its linears, half as much again for norms, masks and products."""
    layers = dict.fromkeys(layer_paths(model), 0)
    for path, module in _linears(model):
        layer = next((name for name in layers if path.startswith(name + ".")), None)
        if layer:
            layers[layer] += 6 * (input_dims(module) + module.weight.shape[0])
    return layers
