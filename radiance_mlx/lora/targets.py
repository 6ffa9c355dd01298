"""Which modules an adapter touches: from names such as `q_proj` to the paths that a base really has."""

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..errors import ConfigError

ALL_LINEAR = "all-linear"
LINEAR = (nn.Linear, nn.QuantizedLinear)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)


@dataclass(frozen=True)
class Targets:
    """Paths of the adapted modules (as in `named_modules()`), and the same as mlx-lm's `keys` and `num_layers`."""

    paths: tuple[str, ...]
    keys: tuple[str, ...]
    num_layers: int


def find_targets(model: nn.Module, names: Iterable[str], num_layers: int = -1) -> Targets:
    """The linears of `model` that `names` mean: leaf names, dotted tails of paths, or `all-linear`.

    `num_layers` keeps the last so many layers (-1: all). Raises `ConfigError` for a name that matches
    nothing, with what the model has, and for mixture-of-experts linears, which no bank can hold.
    """
    names = list(names)
    layers = layer_paths(model)
    chosen = set(layers[-num_layers:] if num_layers > 0 else layers)
    skipped = set(layers) - chosen
    linears = {p: m for p, m in model.named_modules() if isinstance(m, LINEAR)}
    experts = [p for p, m in model.named_modules() if isinstance(m, EXPERTS)]
    matched: set[str] = set()
    missing = []
    for name in names:
        if name == ALL_LINEAR:
            hits = {p for p in linears if _layer_of(p, chosen)}
        else:
            _refuse_experts(name, experts)
            hits = {p for p in linears if _ends_with(p, name)}
        if not hits:
            missing.append(name)
        matched |= {p for p in hits if not _layer_of(p, skipped)}
    if missing or not matched:
        raise _nothing_matches(missing or names, linears)
    paths = tuple(p for p in linears if p in matched)
    return Targets(paths, *_as_mlx_lm(paths, layers, linears))


def layer_paths(model: nn.Module) -> list[str]:
    """Paths of the decoder layers, in order."""
    by_id = {id(module): path for path, module in model.named_modules()}
    return [by_id[id(layer)] for layer in model.layers if id(layer) in by_id]


def input_dims(linear: nn.Module) -> int:
    """Width of a linear's input, also when its weight is packed."""
    width: int = linear.weight.shape[1]
    return width * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else width


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _layer_of(path: str, layers: Iterable[str]) -> str | None:
    return next((layer for layer in layers if path.startswith(layer + ".")), None)


def _refuse_experts(name: str, experts: list[str]) -> None:
    hit = next((path for path in experts if _ends_with(path, name)), None)
    if hit:
        raise ConfigError(
            f"lora.target_modules: {name} means {hit}, a mixture-of-experts linear, which cannot be adapted.",
            "Name the attention projections instead, or use all-linear, which leaves the experts out.",
        )


def _nothing_matches(names: list[str], linears: Iterable[str]) -> ConfigError:
    has = sorted({path.rsplit(".", 1)[-1] for path in linears})
    return ConfigError(
        f"lora.target_modules: nothing in this model is called {', '.join(names)}.",
        f"It has: {', '.join(has)}; or use all-linear.",
        [{"key": "lora.target_modules", "problem": f"matches nothing: {name}", "has": has} for name in names],
    )


def _as_mlx_lm(paths: tuple[str, ...], layers: list[str], linears: Iterable[str]) -> tuple[tuple[str, ...], int]:
    """Keys relative to a layer and how many last layers, where that says exactly `paths`; else full paths."""
    wanted = set(paths)
    layer_of = {path: _layer_of(path, layers) for path in linears}
    used = {layer for path in paths if (layer := layer_of[path])}
    if used and all(layer_of[path] for path in paths):
        first = min(layers.index(layer) for layer in used)
        relative = {path.removeprefix(f"{layer_of[path]}.") for path in paths}
        said = {p for p, ly in layer_of.items() if ly and p.removeprefix(f"{ly}.") in relative}
        if {p for p in said if layers.index(str(layer_of[p])) >= first} == wanted:
            return tuple(sorted(relative)), len(layers) - first
    return paths, 0
