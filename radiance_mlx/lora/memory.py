"""What a batch will need, before it starts: refused with the keys to change, not found out by dying.

On Metal an allocation that fails ends the process, so the estimate errs on the large side. It is made from
the shapes of the linears and the numbers of attention heads, and knows no architecture.
"""

import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config.schema import TrainingSection
from ..errors import NotEnoughMemory
from .batches import padded
from .encoding import Encoded
from .halves import halved
from .head import TargetRows
from .head_loss import chunk_rows
from .targets import EXPERTS, LINEAR, Targets, input_dims, layer_paths

#: what mlx-lm's attention modules call their number of heads, and its routers the experts that a token gets
_HEADS = ("n_heads", "num_heads", "num_attention_heads", "n_head")
_CHOSEN_EXPERTS = ("num_experts_per_tok", "top_k")
#: a layer's attention scores exist so often at once while it is worked on, beside those kept for going back
_SCORES_AT_WORK = 3


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part, and their sum."""

    base: int
    bank: int
    adapter: int
    optimizer: int
    activations: int
    head: int
    kept: int = 0

    @property
    def total(self) -> int:
        return self.base + self.bank + self.adapter + self.optimizer + self.activations + self.head + self.kept


def hidden_bytes(model: nn.Module, tokens: int) -> int:
    """Of what goes from one layer to the next."""
    return _float_bytes(model) * _hidden(model) * tokens


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
    head: TargetRows | None,
    dropout: float = 0.0,
    together: int = 0,
    kept: int = 0,
) -> Estimate:
    """What training `examples` takes at its largest micro-batch; `head` is what the base's head allows.

    There may be micro-batches of `together` tokens in any case; `kept` bytes are there beside, through the whole batch.
    """
    rows = sorted(examples, key=lambda e: len(e.tokens))[-settings.batch_size :]
    width = padded(max(len(e.tokens) for e in rows))
    tokens = max(width * len(rows), together)
    layers = _layers(model, set(targets.paths) if dropout else set())
    scores = [_float_bytes(model) * layer.heads * width * tokens for layer in layers]
    if settings.grad_checkpoint:  # every layer's input; one layer at a time, and what goes back through it
        inputs = 4 * _hidden(model) * len(layers) * tokens
        activations = inputs + 2 * max(layer.bytes_per_token for layer in layers) * tokens + max(scores)
    else:
        activations = sum(layer.bytes_per_token for layer in layers) * tokens + sum(scores)
    activations += _SCORES_AT_WORK * max(scores)
    targeted = tokens if head is None else max(sum(e.targets for e in rows), together)
    if head is not None and head.project is not None:
        targeted = min(targeted, (2 if halved(settings.halves) else 1) * chunk_rows(vocab_size))
    shapes = [(input_dims(m), m.weight.shape[0]) for path, m in _linears(model) if path in set(targets.paths)]
    adapter = sum(4 * rank * (width_in + width_out) for width_in, width_out in shapes)
    best = settings.patience > 0  # weights and optimizer of the best evaluation are kept
    return Estimate(
        base=model_bytes(model),
        bank=bank_bytes,
        adapter=(3 + best) * adapter,  # weights, gradients, and the sum of accumulated ones
        optimizer=(2 + 2 * best) * adapter,
        activations=activations,
        head=3 * 4 * targeted * vocab_size,
        kept=kept,
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
    parts = {name: readable(getattr(needed, name)) for name in needed.__dataclass_fields__}
    raise NotEnoughMemory(
        f"Training this batch needs about {readable(needed.total)}, and there are {readable(limit)}.",
        "Lower training.batch_size or training.max_seq_length, set training.grad_checkpoint: true, or lower "
        "lora.r or serving.adapter_slots; memory.limit_gb sets the limit.",
        parts,
    )


def readable(size: int) -> str:
    """Bytes in the unit that suits: `1.50 GiB`, `9.8 MiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LINEAR)]


@dataclass
class _Layer:
    bytes_per_token: int = 0
    heads: int = 0


def _layers(model: nn.Module, dropped: set[str]) -> list[_Layer]:
    """For each layer: inputs and outputs of its linears, half as much again for norms, masks and products.

    A linear in `dropped` keeps its input a second time, with what dropout left of it.
    """
    layers = {path: _Layer() for path in layer_paths(model)}
    for path, module in model.named_modules():
        layer = next((layers[name] for name in layers if path.startswith(name + ".")), None)
        if layer is None:
            continue
        layer.heads = max(layer.heads, _number(module, _HEADS))
        if isinstance(module, LINEAR):
            inputs = input_dims(module)
            layer.bytes_per_token += 6 * (inputs + module.weight.shape[0] + inputs * (path in dropped))
        elif isinstance(module, EXPERTS):
            layer.bytes_per_token += 6 * _chosen_experts(model) * (module.input_dims + module.output_dims)
    if not any(layer.heads for layer in layers.values()):
        for layer in layers.values():
            layer.heads = max(1, _hidden(model) // 64)
    return list(layers.values())


def _hidden(model: nn.Module) -> int:
    """The width that most linears take in."""
    return statistics.mode(input_dims(m) for _, m in _linears(model))


def _float_bytes(model: nn.Module) -> int:
    """Bytes of one number between the layers: that of the norms' weights, which widen what they meet."""
    norms = [v.dtype.size for _, v in tree_flatten(model.parameters()) if v.ndim == 1]
    return max(norms, default=4)


def _chosen_experts(model: nn.Module) -> int:
    return max(_number(module, _CHOSEN_EXPERTS) for module in model.modules()) or 8


def _number(module: nn.Module, names: Iterable[str]) -> int:
    return max((value for name in names if isinstance(value := getattr(module, name, None), int)), default=0)
