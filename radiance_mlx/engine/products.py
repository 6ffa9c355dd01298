"""A batch's products on the CPU: by as many threads of OpenBLAS, in blocks and padded as is fastest.

OpenBLAS divides a product among its threads by blocks of rows, and a block that is partly filled costs more than a full
one (docs/benchmarks.md). Of few rows, one thread multiplies nearly as fast as two, or as fast, by its kernels for the
processor, and leaves a core to all else that a step needs. Where the library has kernels for small matrices, which read
a weight as it lies in the place of copying it first, few rows are multiplied by some columns of Wᵀ after the other, so
many that those kernels take them. Of more rows, rows of zeros are put below them and left out of what comes out, linear
by linear: nothing else has more to do.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import blas
from ..lora.halves import wait


@dataclass(frozen=True)
class Best:
    """What was measured to be fastest with two threads. Rows are filled up to a multiple of `grain`.

    With fewer than `least` in the last block they are not: other code of the library computes them as fast. From the
    first to the last number of rows in `alone` one thread decodes; in `beside`, while the background has work. Up to
    `blocks` rows one thread multiplies in blocks of columns.
    """

    grain: int
    least: int
    alone: tuple[int, int]
    beside: tuple[int, int]
    blocks: int = 0


#: of all others, and with more threads, nothing is known
UNKNOWN = Best(grain=1, least=1, alone=(1, 0), beside=(1, 0))
AVX2, AVX512 = Best(16, 4, (3, 8), (3, 8)), Best(16, 10, (1, 0), (3, 8))
#: with kernels for small matrices
AVX512_BLOCKS = Best(16, 10, (1, 8), (1, 12), blocks=16)
#: by OpenBLAS's core; `Haswell` and `Zen` have the same kernels
MEASURED = {"Haswell": AVX2, "Zen": AVX2, "SkylakeX": AVX512}
IN_BLOCKS = {"SkylakeX": AVX512_BLOCKS}
THREADS = 2
#: multiplications; a product with no more is not divided among threads (OpenBLAS: interface/gemm.c), and has no blocks
SMALL = 4 * 65_536
#: columns of a block at least: fewer are more calls than they spare
NARROWEST = 8


def best_here(*, pads: bool = True, blocks: bool = True) -> Best:
    """For the default device, its processor and OpenBLAS's threads; `pads`, `blocks`: whether it may do so."""
    if mx.default_device() != mx.cpu or not 1 <= blas.threads() <= THREADS:
        return UNKNOWN
    core = blas.core()
    best = MEASURED.get(core, UNKNOWN)
    if blocks and core in IN_BLOCKS and blas.takes_small(NARROWEST, 1, NARROWEST**2):
        best = IN_BLOCKS[core]
    if blas.threads() < THREADS:
        return replace(UNKNOWN, blocks=best.blocks)
    return best if pads else replace(best, grain=1, least=1)


def threads_here(rows: int, *, beside: bool = False, blocks: bool = True) -> int:
    """How many threads of OpenBLAS decode a batch of `rows` best on the default device; 0: all.

    `beside`: while something else is computed in the background, which has use for the other core.
    """
    best = best_here(blocks=blocks)
    fewest, most = best.beside if beside else best.alone
    return 1 if fewest <= rows <= most else 0


def use_threads(count: int = 0) -> None:
    """Have what is evaluated from now on computed by so many threads of OpenBLAS, 0: by all.

    What still computes, a decoding step or the end of a slice, was made for another number: it is waited for.
    """
    if blas.used() != (count or blas.threads()):
        wait()
        blas.use(count)


def shape_products(tree: nn.Module, best: Best) -> None:
    """Have all plain linears of `tree`, and its embedding where that is the head, multiply as `best` says.

    Rows are padded where several threads compute, and multiplied in blocks of columns where one does.
    """
    if best.grain == 1 and not best.blocks:
        return
    for module in tree.modules():
        kind = type(module)
        if kind is nn.Linear:
            name = "__call__"
        elif kind is nn.Embedding:
            name = "as_linear"
        else:
            continue
        module._blocks = Blocks(module.weight)
        module.__class__ = type(kind.__name__, (kind,), {name: _shaped(getattr(kind, name), best)})


class Blocks:
    """A weight `(out, in)` by blocks of its rows, the columns of Wᵀ."""

    def __init__(self, weight: mx.array) -> None:
        self.weight = weight
        self._by_rows: dict[int, mx.array | None] = {}

    def of(self, rows: int) -> mx.array | None:
        """`(out / n, in, n)`, sharing the weight's memory; None where whole it is as fast, or it cannot be divided."""
        if rows not in self._by_rows:
            self._by_rows[rows] = self._divided(rows)
        return self._by_rows[rows]

    def _divided(self, rows: int) -> mx.array | None:
        columns, inner = self.weight.shape
        if self.weight.dtype != mx.float32 or not memoryview(self.weight).c_contiguous:
            return None
        if blas.takes_small(columns, rows, inner):
            return None
        for count in range(2, columns // NARROWEST + 1):
            if columns % count == 0 and blas.takes_small(columns // count, rows, inner):
                return self.weight.reshape(count, columns // count, inner).swapaxes(-1, -2)
        return None


def _shaped(product: Callable[..., mx.array], best: Best) -> Callable[..., mx.array]:
    def call(module: Any, x: mx.array) -> mx.array:
        rows = x.size // x.shape[-1]
        if blas.used() == 1:
            return _in_blocks(module, x, rows, product) if rows <= best.blocks else product(module, x)
        if rows % best.grain < best.least or rows * module.weight.size <= SMALL:
            return product(module, x)
        y = product(module, mx.pad(x.reshape(rows, -1), ((0, -rows % best.grain), (0, 0))))
        return y[:rows].reshape(*x.shape[:-1], -1)

    return call


def _in_blocks(module: Any, x: mx.array, rows: int, product: Callable[..., mx.array]) -> mx.array:
    blocks = module._blocks.of(rows) if module._blocks.weight is module.weight and x.dtype == mx.float32 else None
    if blocks is None:
        return product(module, x)
    y = x.reshape(1, rows, -1) @ blocks
    y = (y.swapaxes(0, 1) if rows > 1 else y).reshape(*x.shape[:-1], -1)
    return y + module.bias if "bias" in module else y
