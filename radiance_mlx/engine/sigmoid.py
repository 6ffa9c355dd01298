"""A sigmoid for x86 processors: 1 / (1 + 2^(-x log2 e)), where MLX's own takes twice as long.

MLX has vector code for Apple's processors alone. Elsewhere its CPU backend computes exponentials one by one, by a
polynomial each step of which is a call; a power is one call of the C library. SiLU is made of sigmoids, one for each
inner dimension of every MLP and token: of a pass over prompts a fifth (docs/benchmarks.md). What mlx-lm's models make
of SiLU, its product with the MLP's other half, keeps three arrays for the backward pass in the place of four.
"""

import math
import platform
import sys
from typing import Any

import mlx.core as mx
from mlx_lm.models import activations

_SLOPE = -1.0 / math.log(2.0)
_own = mx.sigmoid
_own_swiglu = activations.swiglu
#: modules that have taken `swiglu` over by name, each for itself; those to come take it from `activations`
_MODELS = "mlx_lm.models."


def powers_here() -> bool:
    """Whether a power is faster than MLX's exponential on the default device."""
    return mx.default_device() == mx.cpu and platform.machine().lower() in ("x86_64", "amd64")


def by_powers(setting: str) -> bool:
    """Whether `setting`, auto or off, means powers on the default device."""
    return setting == "auto" and powers_here()


def use_powers(wanted: bool) -> None:
    """Have `mx.sigmoid`, and what `mlx.nn` and mlx-lm's models make of it, computed so in this process, or as MLX does.

    What was compiled stays as it was: on the CPU nothing is.
    """
    mx.sigmoid = sigmoid if wanted else _own
    for name, module in list(sys.modules.items()):
        if name.startswith(_MODELS) and getattr(module, "swiglu", None) in (_own_swiglu, swiglu):
            vars(module)["swiglu"] = swiglu if wanted else _own_swiglu


def sigmoid(x: mx.array) -> mx.array:
    """As `mx.sigmoid` to float32's rounding; of other types, whose exponents would be rounded before, by that."""
    return _by_power(x) if getattr(x, "dtype", None) == mx.float32 else _own(x)


def _forward(x: mx.array) -> mx.array:
    return 1.0 / (1.0 + mx.power(2.0, x * _SLOPE))


def _backward(x: mx.array, above: mx.array, y: mx.array) -> mx.array:
    return above * (y * (1.0 - y))


_by_power: Any = mx.custom_function(_forward)
_by_power.vjp(_backward)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """SiLU of `gate`, times `x`, as mlx-lm's: by powers, if both are float32 of one shape, else by that.

    One array less is kept for the backward pass; without one, sigmoids are there until the product is computed.
    """
    if gate.dtype == x.dtype == mx.float32 and gate.shape == x.shape:
        return _gated(gate, x)[0]
    return _own_swiglu(gate, x)


def _gated_forward(gate: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    y = _forward(gate)
    return gate * y * x, y


def _gated_backward(
    primals: tuple[mx.array, mx.array], above: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array]:
    """By both; the sigmoids are an output to be here again, and nobody else's."""
    (gate, x), y = primals, outputs[1]
    part = above[0] * y
    return part * x * (1.0 + gate * (1.0 - y)), part * gate


_gated: Any = mx.custom_function(_gated_forward)
_gated.vjp(_gated_backward)
