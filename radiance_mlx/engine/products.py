"""A batch's products on the CPU: by as many threads of OpenBLAS, and padded to as many rows, as is fastest.

OpenBLAS divides a product among its threads by blocks of rows, and a block that is partly filled costs more than a full
one (docs/benchmarks.md). Of few rows, one thread multiplies as fast as two, which leaves a core to all else that a step
needs. Of more, rows of zeros are put below the others and left out of what comes out, linear by linear: nothing else
has more to do.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import blas
from ..lora.halves import wait

#: threads of OpenBLAS → rows that fill their blocks. One thread has no such steps; more than two were not measured
GRAINS = {2: 16}
#: threads of OpenBLAS → the fewest and the most rows of a batch that one of them decodes alone
ALONE = {2: (3, 8)}
#: with fewer rows than that in the last block it is not filled up: they are computed by other code of the library
LEAST = 4
#: multiplications; a product with no more is not divided among threads (OpenBLAS: interface/gemm.c), and has no blocks
SMALL = 4 * 65_536


def grain_here() -> int:
    """To a multiple of how many rows products are best padded on the default device; 1: to none."""
    return GRAINS.get(blas.threads(), 1) if mx.default_device() == mx.cpu else 1


def threads_here(rows: int) -> int:
    """How many threads of OpenBLAS decode a batch of `rows` best on the default device; 0: all."""
    fewest, most = ALONE.get(blas.threads(), (1, 0)) if mx.default_device() == mx.cpu else (1, 0)
    return 1 if fewest <= rows <= most else 0


def use_threads(count: int = 0) -> None:
    """Have what is evaluated from now on computed by so many threads of OpenBLAS, 0: by all.

    A decoding step that still computes was made for another number: it is waited for.
    """
    if blas.used() != (count or blas.threads()):
        wait()
        blas.use(count)


def pad_rows(tree: nn.Module, grain: int) -> None:
    """Have all plain linears of `tree`, and its embedding where that is the head, pad their rows to `grain`.

    But where one thread computes them: it has no blocks.
    """
    if grain == 1:
        return
    for module in tree.modules():
        kind = type(module)
        if kind is nn.Linear:
            module.__class__ = type(kind.__name__, (kind,), {"__call__": _padded(kind.__call__, grain)})
        elif kind is nn.Embedding:
            module.__class__ = type(kind.__name__, (kind,), {"as_linear": _padded(kind.as_linear, grain)})


def _padded(product: Callable[..., mx.array], grain: int) -> Callable[..., mx.array]:
    def call(module: Any, x: mx.array) -> mx.array:
        rows = x.size // x.shape[-1]
        if blas.used() == 1 or rows % grain < LEAST or rows * module.weight.size <= SMALL:
            return product(module, x)
        y = product(module, mx.pad(x.reshape(rows, -1), ((0, -rows % grain), (0, 0))))
        return y[:rows].reshape(*x.shape[:-1], -1)

    return call
