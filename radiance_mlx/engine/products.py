"""A batch's products on the CPU: by as many threads of OpenBLAS, by columns and padded as is fastest.

OpenBLAS divides a product among its threads by blocks of rows, and a block that is partly filled costs more than a full
one (docs/benchmarks.md). Of few rows, one thread multiplies nearly as fast as two, or as fast, by its kernels for the
processor, and leaves a core to all else that a step needs. Where the library has kernels for small matrices, which read
a weight as it lies in the place of copying it first, one thread multiplies few rows by some columns of Wᵀ after the
other, as many at a time as those kernels take. Of more rows, rows of zeros are put below them and left out of what
comes out, linear by linear: nothing else has more to do.
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
    """What was measured to be fastest. With two threads, rows are filled up to a multiple of `grain`.

    With fewer than `least` in the last block they are not: other code of the library computes them as fast. From the
    first to the last number of rows in `alone` one thread decodes; in `beside`, while the background has work. One
    thread multiplies up to `by_columns` rows by some columns after the other.
    """

    grain: int
    least: int
    alone: tuple[int, int]
    beside: tuple[int, int]
    by_columns: int = 0

    def threads(self, rows: int, *, beside: bool = False) -> int:
        """How many threads of OpenBLAS decode a batch of `rows`; 0: all.

        `beside`: while something else is computed in the background, which has use for the other core.
        """
        fewest, most = self.beside if beside else self.alone
        return 1 if fewest <= rows <= most else 0


#: of all others, and with more threads, nothing is known
UNKNOWN = Best(grain=1, least=1, alone=(1, 0), beside=(1, 0))
AVX2, AVX512 = Best(16, 4, (3, 8), (3, 8)), Best(16, 10, (1, 0), (3, 8))
#: by OpenBLAS's core; `Haswell` and `Zen` have the same kernels
MEASURED = {"Haswell": AVX2, "Zen": AVX2, "SkylakeX": AVX512}
#: the same with kernels for small matrices
WITH_SMALL = {"SkylakeX": Best(16, 10, (1, 8), (1, 12), by_columns=16)}
THREADS = 2
#: multiplications; a product with no more is not divided among threads (OpenBLAS: interface/gemm.c)
SMALL = 4 * 65_536
#: columns at a time, at least: fewer are more calls than they spare
NARROWEST = 8
#: of a model's weights, by columns, for one thread to multiply all of them
NEARLY_ALL = 0.9
#: rows for which that is asked
FEW = 8


def best_here(*, pads: bool = True, columns: bool = True) -> Best:
    """For the default device, its processor and OpenBLAS's threads; `pads`, `columns`: whether it may do so."""
    if mx.default_device() != mx.cpu or not 1 <= blas.threads() <= THREADS:
        return UNKNOWN
    core = blas.core()
    best = MEASURED.get(core, UNKNOWN)
    if columns and core in WITH_SMALL and blas.takes_small(NARROWEST, 1, NARROWEST**2):
        best = WITH_SMALL[core]
    if blas.threads() < THREADS:
        return replace(UNKNOWN, by_columns=best.by_columns)
    return best if pads else replace(best, grain=1, least=1)


def use_threads(count: int = 0) -> None:
    """Have what is evaluated from now on computed by so many threads of OpenBLAS, 0: by all.

    What still computes, a decoding step or the end of a slice, was made for another number: it is waited for.
    """
    if blas.used() != (count or blas.threads()) and blas.can_use_fewer():
        wait()
        blas.use(count)


def shape_products(tree: nn.Module, best: Best) -> Best:
    """Have all plain linears of `tree`, and its embedding where that is the head, multiply as `best` says.

    Rows are padded where several threads compute; where one does, they are multiplied by columns. Returns what is best
    for this tree: where that cannot be done of nearly all its weights, fewer threads are not, either.
    """
    if best.grain == 1 and not best.by_columns:
        return best
    divided = 0
    for module in tree.modules():
        kind = type(module)
        if kind not in (nn.Linear, nn.Embedding):
            continue
        name = "__call__" if kind is nn.Linear else "as_linear"
        module._columns = Columns(module.weight)
        module.__class__ = type(kind.__name__, (kind,), {name: _shaped(getattr(kind, name), best)})
        divided += module.weight.size if module._columns.can_be_divided else 0
    if not best.by_columns or divided >= NEARLY_ALL * _multiplied(tree):
        return best
    other = best_here(columns=False)
    return replace(best, alone=other.alone, beside=other.beside)


def _multiplied(tree: nn.Module) -> int:
    """Elements of all weights that may be factors: an embedding as large as a linear is not the head."""
    weights = {id(m): (m, m.weight) for m in tree.modules() if getattr(m.get("weight"), "ndim", 0) > 1}
    linear = {weight.shape for module, weight in weights.values() if not isinstance(module, nn.Embedding)}
    return sum(w.size for m, w in weights.values() if not isinstance(m, nn.Embedding) or w.shape not in linear)


#: `(n, in, width)`, and `(in, rest)` of what is left over
Divided = tuple[mx.array, mx.array | None]


class Columns:
    """A weight `(out, in)`, to be multiplied by some of its rows, the columns of Wᵀ, after the other."""

    def __init__(self, weight: mx.array) -> None:
        self.weight = weight
        self._by_rows: dict[int, Divided | None] = {}

    @property
    def can_be_divided(self) -> bool:
        """Whether few rows are multiplied by kernels for small matrices."""
        return self._by_itself(FEW) or self.of(FEW) is not None

    def of(self, rows: int) -> Divided | None:
        """For so many rows, sharing the weight's memory; None where whole it is as fast, or it cannot be divided."""
        if rows not in self._by_rows:
            self._by_rows[rows] = None if self._by_itself(rows) else self._divided(rows)
        return self._by_rows[rows]

    def _by_itself(self, rows: int) -> bool:
        return self.weight.dtype == mx.float32 and blas.takes_small(self.weight.shape[0], rows, self.weight.shape[1])

    def _divided(self, rows: int) -> Divided | None:
        if self.weight.dtype != mx.float32 or not memoryview(self.weight).c_contiguous:
            return None
        columns, inner = self.weight.shape
        most = _most_columns(columns, rows, inner)
        if most < NARROWEST:
            return None
        fewest = -(-columns // most)
        even = next((count for count in range(fewest, 2 * fewest) if columns % count == 0), None)
        width = columns // even if even else most
        done = columns // width * width
        many = self.weight[:done].reshape(-1, width, inner).swapaxes(-1, -2)
        return many, self.weight[done:].T if done < columns else None


def _most_columns(columns: int, rows: int, inner: int) -> int:
    """The largest number, up to `columns`, that goes to a kernel for small matrices."""
    fits, too_many = 0, columns + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if blas.takes_small(middle, rows, inner):
            fits = middle
        else:
            too_many = middle
    return fits


def _shaped(product: Callable[..., mx.array], best: Best) -> Callable[..., mx.array]:
    def call(module: Any, x: mx.array) -> mx.array:
        rows = x.size // x.shape[-1]
        if blas.used() == 1:
            return _by_columns(module, x, rows, product) if 0 < rows <= best.by_columns else product(module, x)
        if rows % best.grain < best.least or rows * module.weight.size <= SMALL:
            return product(module, x)
        y = product(module, mx.pad(x.reshape(rows, -1), ((0, -rows % best.grain), (0, 0))))
        return y[:rows].reshape(*x.shape[:-1], -1)

    return call


def _by_columns(module: Any, x: mx.array, rows: int, product: Callable[..., mx.array]) -> mx.array:
    known = module._columns.weight is module.weight and x.dtype == mx.float32
    divided = module._columns.of(rows) if known else None
    if divided is None:
        return product(module, x)
    many, rest = divided
    y = x.reshape(1, rows, -1) @ many
    y = y.swapaxes(0, 1) if rows > 1 else y
    if rest is not None:
        y = mx.concatenate([y.reshape(rows, -1), x.reshape(rows, -1) @ rest], axis=-1)
    y = y.reshape(*x.shape[:-1], -1)
    return y + module.bias if "bias" in module else y
