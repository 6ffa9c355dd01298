"""A batch's products on the CPU: by as many threads of OpenBLAS, and padded to as many rows, as is fastest.

OpenBLAS divides a product among its threads by blocks of rows, and a block that is partly filled costs more than a full
one (docs/benchmarks.md). Of few rows, one thread multiplies nearly as fast as two, or as fast, by its kernels for the
processor, and leaves a core to all else that a step needs. Of more, rows of zeros are put below the others and left out
of what comes out, linear by linear: nothing else has more to do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import blas
from ..lora.halves import wait


@dataclass(frozen=True)
class Best:
    """What was measured to be fastest with two threads. Rows are filled up to a multiple of `grain`.

    With fewer than `least` in the last block they are not: other code of the library computes them as fast. From the
    first to the last number of rows in `alone` one thread decodes; in `beside`, while the background has work.
    """

    grain: int
    least: int
    alone: tuple[int, int]
    beside: tuple[int, int]


#: of all others, and with more threads, nothing is known
UNKNOWN = Best(grain=1, least=1, alone=(1, 0), beside=(1, 0))
AVX2, AVX512 = Best(16, 4, (3, 8), (3, 8)), Best(16, 10, (1, 0), (3, 8))
#: by OpenBLAS's core; `Haswell` and `Zen` have the same kernels
MEASURED = {"Haswell": AVX2, "Zen": AVX2, "SkylakeX": AVX512}
THREADS = 2
#: multiplications; a product with no more is not divided among threads (OpenBLAS: interface/gemm.c), and has no blocks
SMALL = 4 * 65_536


def best_here() -> Best:
    """For the default device, its processor and OpenBLAS's threads."""
    known = mx.default_device() == mx.cpu and blas.threads() == THREADS
    return MEASURED.get(blas.core(), UNKNOWN) if known else UNKNOWN


def threads_here(rows: int, *, beside: bool = False) -> int:
    """How many threads of OpenBLAS decode a batch of `rows` best on the default device; 0: all.

    `beside`: while something else is computed in the background, which has use for the other core.
    """
    best = best_here()
    fewest, most = best.beside if beside else best.alone
    return 1 if fewest <= rows <= most else 0


def use_threads(count: int = 0) -> None:
    """Have what is evaluated from now on computed by so many threads of OpenBLAS, 0: by all.

    What still computes, a decoding step or the end of a slice, was made for another number: it is waited for.
    """
    if blas.used() != (count or blas.threads()):
        wait()
        blas.use(count)


def pad_rows(tree: nn.Module, best: Best) -> None:
    """Have all plain linears of `tree`, and its embedding where that is the head, pad their rows to `best.grain`.

    But where one thread computes them: it has no blocks.
    """
    if best.grain == 1:
        return
    for module in tree.modules():
        kind = type(module)
        if kind is nn.Linear:
            module.__class__ = type(kind.__name__, (kind,), {"__call__": _padded(kind.__call__, best)})
        elif kind is nn.Embedding:
            module.__class__ = type(kind.__name__, (kind,), {"as_linear": _padded(kind.as_linear, best)})


def _padded(product: Callable[..., mx.array], best: Best) -> Callable[..., mx.array]:
    def call(module: Any, x: mx.array) -> mx.array:
        rows = x.size // x.shape[-1]
        if blas.used() == 1 or rows % best.grain < best.least or rows * module.weight.size <= SMALL:
            return product(module, x)
        y = product(module, mx.pad(x.reshape(rows, -1), ((0, -rows % best.grain), (0, 0))))
        return y[:rows].reshape(*x.shape[:-1], -1)

    return call
