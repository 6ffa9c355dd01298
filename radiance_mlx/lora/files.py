"""Adapters on disk: the two files that mlx-lm reads, and the optimizer's state beside them.

Only safetensors and JSON. Saving here neither syncs nor renames: `radiance_mlx.checkpoints` does that to
whole folders.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointDamaged
from .bank import AdapterWeights
from .targets import Targets

ADAPTER_FILE = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
OPTIMIZER_FILE = "optimizer.safetensors"
PROGRESS_FILE = "progress.json"
BEST_FILE = "best.safetensors"


def adapter_config(targets: Targets, *, rank: int, scale: float, dropout: float) -> dict[str, Any]:
    """What `adapter_config.json` says, in mlx-lm's own words."""
    return {
        "fine_tune_type": "lora",
        "num_layers": targets.num_layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": list(targets.keys)},
    }


def save_adapter(folder: Path, weights: dict[str, mx.array], config: dict[str, Any]) -> None:
    """Write weights (flat, mlx-lm's names) and configuration into an existing folder."""
    mx.save_safetensors(str(folder / ADAPTER_FILE), weights, metadata={"format": "mlx"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_arrays(file: Path, arrays: dict[str, mx.array]) -> None:
    """Write flat arrays."""
    mx.save_safetensors(str(file), arrays)


def load_arrays(file: Path) -> dict[str, mx.array]:
    """Read flat arrays, fully: the file may change afterwards. Raises `CheckpointDamaged`."""
    try:
        arrays = mx.load(str(file))
        mx.eval(arrays)
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointDamaged(f"{file} cannot be read: {error}") from error
    return dict(arrays)


def load_adapter(folder: Path) -> AdapterWeights:
    """The adapter in `folder`, ready for the bank. Raises `CheckpointDamaged`."""
    weights = load_arrays(folder / ADAPTER_FILE)
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        scale = float(config["lora_parameters"]["scale"])
        paths = sorted({name.rsplit(".", 1)[0] for name in weights})
        kind = config.get("fine_tune_type", "lora")
        if kind != "lora" or not all(name.endswith((".lora_a", ".lora_b")) for name in weights):
            raise ValueError(f"its kind is {kind}, and only lora can be used here")
        pairs = {path: (weights[f"{path}.lora_a"], weights[f"{path}.lora_b"]) for path in paths}
        if not pairs:
            raise ValueError("it holds no weights")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{folder} cannot be used as an adapter: {error}") from error
    return AdapterWeights(pairs, scale)
