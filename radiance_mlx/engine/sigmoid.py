"""A sigmoid for x86 processors: 1 / (1 + 2^(-x log2 e)), where MLX's own takes twice as long.

MLX has vector code for Apple's processors alone. Elsewhere its CPU backend computes exponentials one by one, by a
polynomial each step of which is a call; a power is one call of the C library. SiLU is made of sigmoids, one for each
inner dimension of every MLP and token: of a pass over prompts a fifth (docs/benchmarks.md).
"""

import math
import platform
from typing import Any

import mlx.core as mx

_SLOPE = -1.0 / math.log(2.0)
_own = mx.sigmoid


def powers_here() -> bool:
    """Whether a power is faster than MLX's exponential on the default device."""
    return mx.default_device() == mx.cpu and platform.machine().lower() in ("x86_64", "amd64")


def by_powers(setting: str) -> bool:
    """Whether `setting`, auto or off, means powers on the default device."""
    return setting == "auto" and powers_here()


def use_powers(wanted: bool) -> None:
    """Have `mx.sigmoid`, and what `mlx.nn` makes of it, computed so in this process, or as MLX does.

    What was compiled stays as it was: on the CPU nothing is.
    """
    mx.sigmoid = sigmoid if wanted else _own


def sigmoid(x: mx.array) -> mx.array:
    """As `mx.sigmoid` to float32's rounding; of other types, whose exponents would be rounded before, by that."""
    return _by_power(x) if getattr(x, "dtype", None) == mx.float32 else _own(x)


def _forward(x: mx.array) -> mx.array:
    return 1.0 / (1.0 + mx.power(2.0, x * _SLOPE))


def _backward(x: mx.array, above: mx.array, y: mx.array) -> mx.array:
    return above * (y * (1.0 - y))


_by_power: Any = mx.custom_function(_forward)
_by_power.vjp(_backward)
