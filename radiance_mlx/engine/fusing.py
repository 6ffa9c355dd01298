"""An adapter folded into a base's weights; as a model folder, which `mlx_lm.load` reads without the adapter."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import save

from ..errors import InvalidRequest, ModelError, StoreError
from ..lora.bank import AdapterWeights
from ..lora.targets import input_dims
from ..lora.tree import adapter_tree
from .model import BaseModel

#: of the adapter's change (root of the summed squares), what rounding may take: about what half precision itself adds
LOSS = 0.05


def fuse(base: BaseModel, adapter: AdapterWeights, out: Path) -> tuple[int, float]:
    """Write `base` with `adapter` folded into its weights to the new folder `out`.

    Gives how many modules were folded, and the share of the adapter's change that rounding took (`share_lost`).
    W + scale·(a b)ᵀ is computed in float32 and kept in W's own dtype. What an adapter changes of a quantised base is
    kept in full precision, for quantising it again would lose most of what was learnt; the rest stays quantised.
    The folder is written beside and renamed. Raises `InvalidRequest` if `out` is there already, `ModelError` for an
    adapter of another base or of numbers that the weights cannot hold, `StoreError` if it cannot be written.
    """
    refuse_existing(out)
    module = adapter_tree(base.module, adapter).module
    adapted = [(path, m) for path, m in module.named_modules() if isinstance(m, LoRALinear)]
    folded, lost, whole = [], 0.0, 0.0
    for path, m in adapted:
        plain = fold(m.linear, m.lora_a, m.lora_b, m.scale)
        off, change = rounding(m.linear, plain, m.lora_a, m.lora_b, m.scale)
        mx.eval(plain.weight, off, change)
        folded.append((path, plain))
        lost, whole = lost + off.item(), whole + change.item()
    share = share_lost(lost, whole)
    if not math.isfinite(share):
        raise ModelError("The adapter cannot be folded: it makes numbers that are none, or too large for the weights.")
    module.update_modules(tree_unflatten(folded))
    beside = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    try:
        save(beside, base.folder, module, base.tokenizer, _config(base, [path for path, _ in folded]))
        refuse_existing(out)
        beside.rename(out)
    except (OSError, RuntimeError) as error:  # MLX tells a full disk by the latter
        raise StoreError(f"{out} cannot be written: {error}.", "Name a folder on a disk with room.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return len(folded), share


def _config(base: BaseModel, folded: list[str]) -> dict[str, Any]:
    """The base's `config.json`, in which no folded module is said to be quantised in a way of its own."""
    config: dict[str, Any] = json.loads((base.folder / "config.json").read_text())
    for name in ("quantization", "quantization_config"):
        if isinstance(config.get(name), dict):
            config[name] = {key: value for key, value in config[name].items() if key not in folded}
    return config


def refuse_existing(out: Path) -> None:
    """Raises `InvalidRequest` if there is something at `out`."""
    if os.path.lexists(out):
        raise InvalidRequest(f"{out} is there already.", "Name a new folder: nothing is overwritten.")


def fold(linear: nn.Module, a: mx.array, b: mx.array, scale: float) -> nn.Linear:
    """A linear with the weight W + scale·(a b)ᵀ, in W's dtype or that of a quantised W's scales; not evaluated."""
    plain = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(plain)
    added = scale * (a.astype(mx.float32) @ b.astype(mx.float32)).T
    plain.weight = (_whole(linear) + added).astype(_dtype(linear))
    if "bias" in linear:
        plain.bias = linear.bias
    return plain


def rounding(linear: nn.Module, plain: nn.Linear, a: mx.array, b: mx.array, scale: float) -> tuple[mx.array, mx.array]:
    """Summed squares of what `fold` has rounded away, and of the adapter's whole change."""
    change = scale * (a.astype(mx.float32) @ b.astype(mx.float32)).T
    off = plain.weight.astype(mx.float32) - _whole(linear) - change
    return (off * off).sum(), (change * change).sum()


def share_lost(lost: float, whole: float) -> float:
    """Of sums of what `rounding` gives: the share of the change that is lost, 0 where nothing is changed."""
    return math.sqrt(lost / whole) if whole else 0.0


def folded_bytes(linear: nn.Module) -> int:
    """What the weight that `fold` makes of `linear` takes."""
    return int(linear.weight.shape[0]) * input_dims(linear) * _dtype(linear).size


def _dtype(linear: nn.Module) -> mx.Dtype:
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight.dtype
    scales: mx.Dtype = linear.scales.dtype
    return scales if mx.issubdtype(scales, mx.floating) else mx.bfloat16  # mxfp4 and the like have exponents there


def _whole(linear: nn.Module) -> mx.array:
    """The weight (outputs, inputs) in float32."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight.astype(mx.float32)
    return mx.dequantize(
        linear.weight,
        linear.scales,
        linear.get("biases"),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    ).astype(mx.float32)
